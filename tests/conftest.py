import copy
import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import SMALL, randomize, slow_but
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from programs import spare_mmengine

from repvit_mm.backbone import ReparamBackbone

# The maps of the tests are too small to share between threads: handing them over costs more than it saves.
torch.set_num_threads(1)
spare_mmengine()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup('torture', 'what tests/torture does')
    group.addoption('--torture', action='store_true', help='the long half too, and a table of what was tried')
    group.addoption(
        '--torture-seed', type=int, metavar='N', help='repeats a run (default: 0, with --torture a new one)'
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.torture_seed is None:  # the workers of pytest-xdist are handed what is drawn here
        config.option.torture_seed = random.SystemRandom().randrange(10**6) if config.option.torture else 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with skipping_what_is_refused():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with skipping_what_is_refused():
        return (yield)


@contextmanager
def skipping_what_is_refused() -> Iterator[None]:
    """What the package refuses beside an older torch is skipped beside it, with the package's own words."""
    try:
        yield
    except Exception as error:
        if refusal := re.search(r'\S.* needs torch [\d.]+ or later, this is torch \S+', str(error)):
            pytest.skip(refusal[0])
        raise


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files that a test trusts; no other test does."""
    files: set[str] = set()
    monkeypatch.setattr('repvit_mm.checkpoint.TRUSTED', files)
    return files


@pytest.fixture
def scope_restored() -> Iterator[None]:
    """For tests that leave another library's scope behind."""
    before = copy.copy(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(params=slow_but(['repvit', 'fastvit', 'mobileone'], SMALL))
def build(request: pytest.FixtureRequest) -> Callable[..., ReparamBackbone]:
    """Builds a small network of one kind, with the given options and weights that its tensors' names decide."""
    cls, arch = SMALL[request.param]

    return lambda **options: randomize(cls(arch, **options))


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What the package writes into MMEngine's log from here on."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
