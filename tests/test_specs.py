from dataclasses import FrozenInstanceError

import pytest

from repvit_mm.specs import REPVIT_SPECS, RepViTSpec


def test_repvit_has_the_published_variants():
    assert list(REPVIT_SPECS) == ['m0_6', 'm0_9', 'm1_0', 'm1_1', 'm1_5', 'm2_3', 'm1', 'm2', 'm3']
    assert [name for name, spec in REPVIT_SPECS.items() if not spec.norm_after_sum] == ['m1', 'm2', 'm3']


def test_spec_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        REPVIT_SPECS['m1_1'].depths = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ('fields', 'words'),
    [
        (dict(channels=(8, 16, 24)), ['channels=(8, 16, 24)', 'four positive integers']),
        (dict(channels=(8, 16, 24, 0)), ['channels=(8, 16, 24, 0)', 'four positive integers']),
        (dict(channels=(8, 16.0, 24, 32)), ['channels=(8, 16.0, 24, 32)', 'four positive integers']),
        (dict(channels=(7, 16, 24, 32)), ['channels=(7, 16, 24, 32)', 'even']),
        (dict(depths=(1, 1, 1, 1, 1)), ['depths=(1, 1, 1, 1, 1)', 'four positive integers']),
        (dict(depths=(1, -1, 1, 1)), ['depths=(1, -1, 1, 1)', 'four positive integers']),
        (dict(norm_after_sum='no'), ["norm_after_sum='no'", 'True or False']),
    ],
)
def test_impossible_spec_names_the_field(fields, words):
    with pytest.raises(ValueError) as error:
        RepViTSpec(**{'channels': (8, 16, 24, 32), 'depths': (1, 1, 1, 1), **fields})
    assert all(word in str(error.value) for word in words)
    assert '\n' not in str(error.value)
