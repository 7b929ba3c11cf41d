"""The long half of these tests, which runs with ``--torture`` only, and the table at its end.

The options are in the ``conftest.py`` above, which pytest reads before the command line.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

HERE = Path(__file__).parent
TRIED = pytest.StashKey[int]()


def pytest_report_header(config: pytest.Config) -> str:
    return f'torture: --torture-seed {config.option.torture_seed}'


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.torture:
        return
    long = [item for item in items if item.get_closest_marker('torture')]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope='session')
def torture_seed(request: pytest.FixtureRequest) -> int:
    """What all that is drawn at random hangs on."""
    return request.config.option.torture_seed


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Counts the cases of a test that tries several; without it a test is one case."""
    request.node.stash[TRIED] = 0

    def count() -> None:
        request.node.stash[TRIED] += 1

    return count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == 'call':
        report.user_properties.append(('tried', item.stash.get(TRIED, 1)))
    return report


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """A row for each file: what was tried, what survived and what did not. A lost case ends its test."""
    if not config.option.torture:
        return
    rows: dict[str, list[float]] = {}
    for outcome in ('passed', 'failed', 'error'):
        for report in terminalreporter.stats.get(outcome, ()):
            path = config.rootpath / report.nodeid.partition('::')[0]
            if path.parent != HERE:
                continue
            row = rows.setdefault(path.stem.removeprefix('test_').replace('_', ' '), [0, 0, 0.0])
            row[0] += dict(report.user_properties).get('tried', 1)
            row[1] += outcome != 'passed'
            row[2] += report.duration
    terminalreporter.section(f'torture, seed {config.option.torture_seed}')
    terminalreporter.write_line(f'{"group":12}{"tried":>9}{"survived":>10}{"lost":>6}{"minutes":>9}')
    rows['all'] = [sum(column) for column in zip(*rows.values(), strict=True)] or [0, 0, 0.0]
    for name, (tried, lost, seconds) in rows.items():
        terminalreporter.write_line(f'{name:12}{tried:9,}{tried - lost:10,}{lost:6,}{seconds / 60:9.1f}')
