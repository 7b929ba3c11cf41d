from dataclasses import FrozenInstanceError

import pytest

from repvit_mm.loading import FAMILIES
from repvit_mm.specs import FASTVIT_SPECS, MOBILEONE_SPECS, REPVIT_SPECS, FastViTSpec, MobileOneSpec, RepViTSpec


def test_repvit_has_the_published_variants():
    assert list(REPVIT_SPECS) == ['m0_6', 'm0_9', 'm1_0', 'm1_1', 'm1_5', 'm2_3', 'm1', 'm2', 'm3']
    assert [name for name, spec in REPVIT_SPECS.items() if not spec.norm_after_sum] == ['m1', 'm2', 'm3']


def test_fastvit_has_the_published_variants():
    assert list(FASTVIT_SPECS) == ['t8', 't12', 's12', 'sa12', 'sa24', 'sa36', 'ma36']
    for name, spec in FASTVIT_SPECS.items():
        assert sum(spec.depths) == (10 if name == 't8' else int(name[-2:]))
        assert spec.attention is ('a' in name) and spec.mlp_ratio == (3 if name.startswith('t') else 4)


def test_mobileone_has_the_published_variants():
    """The paper's table 2: width multipliers of 64, 128, 256 and 512 channels."""
    multipliers = {
        's0': (0.75, 1, 1, 2),
        's1': (1.5, 1.5, 2, 2.5),
        's2': (1.5, 2, 2.5, 4),
        's3': (2, 2.5, 3, 4),
        's4': (3, 3.5, 3.5, 4),
    }
    assert list(MOBILEONE_SPECS) == list(multipliers)
    for name, spec in MOBILEONE_SPECS.items():
        assert spec.channels == tuple(int(64 * 2**stage * m) for stage, m in enumerate(multipliers[name]))
        assert spec.stem_channels == min(64, int(64 * multipliers[name][0]))
        assert spec.num_convs == (4 if name == 's0' else 1) and any(spec.se_depths) is (name == 's4')


def test_published_accuracy_is_of_variants():
    for family in FAMILIES:
        assert family.top1.keys() <= family.specs.keys()
        assert all(60 < accuracy < 90 for top1 in family.top1.values() for accuracy in top1 if accuracy is not None)


@pytest.mark.parametrize(
    'spec', [next(iter(family.specs.values())) for family in FAMILIES], ids=lambda spec: type(spec).__name__
)
def test_spec_cannot_be_changed(spec):
    with pytest.raises(FrozenInstanceError):
        spec.depths = (1, 1, 1, 1)


@pytest.mark.parametrize(
    ('spec', 'fields', 'words'),
    [
        (RepViTSpec, dict(channels=(8, 16, 24)), ['channels=(8, 16, 24)', 'four positive integers']),
        (RepViTSpec, dict(channels=(8, 16, 24, 0)), ['channels=(8, 16, 24, 0)', 'four positive integers']),
        (RepViTSpec, dict(channels=(8, 16.0, 24, 32)), ['channels=(8, 16.0, 24, 32)', 'four positive integers']),
        (RepViTSpec, dict(channels=(7, 16, 24, 32)), ['channels=(7, 16, 24, 32)', 'even']),
        (RepViTSpec, dict(depths=(1, 1, 1, 1, 1)), ['depths=(1, 1, 1, 1, 1)', 'four positive integers']),
        (RepViTSpec, dict(depths=(1, -1, 1, 1)), ['depths=(1, -1, 1, 1)', 'four positive integers']),
        (RepViTSpec, dict(norm_after_sum='no'), ["norm_after_sum='no'", 'True or False']),
        (FastViTSpec, dict(channels=(8, 16, 32)), ['channels=(8, 16, 32)', 'four positive integers']),
        (FastViTSpec, dict(channels=(8, 16, 24, 48)), ['channels=(8, 16, 24, 48)', 'a multiple of the one before']),
        (FastViTSpec, dict(depths=(1, 1, 1, 0)), ['depths=(1, 1, 1, 0)', 'four positive integers']),
        (FastViTSpec, dict(mlp_ratio=2.5), ['mlp_ratio=2.5', 'positive integer']),
        (FastViTSpec, dict(attention='yes'), ["attention='yes'", 'True or False']),
        (FastViTSpec, dict(channels=(6, 12, 24, 48), attention=True), ['channels=(6, 12, 24, 48)', 'multiple of 32']),
        (FastViTSpec, dict(layer_scale=0.0), ['layer_scale=0.0', 'positive number']),
        (MobileOneSpec, dict(channels=(8, 16, 24)), ['channels=(8, 16, 24)', 'four positive integers']),
        (MobileOneSpec, dict(num_convs=0), ['num_convs=0', 'positive integer']),
        (MobileOneSpec, dict(num_convs=1.5), ['num_convs=1.5', 'positive integer']),
        (MobileOneSpec, dict(se_depths=(0, 0, 1)), ['se_depths=(0, 0, 1)', 'four integers']),
        (MobileOneSpec, dict(se_depths=(0, 0, 2, 0)), ['se_depths=(0, 0, 2, 0)', 'from 0 to depths=(1, 1, 1, 1)']),
        (MobileOneSpec, dict(se_depths=(0, 0, 0, 0.5)), ['se_depths=(0, 0, 0, 0.5)', 'four integers']),
    ],
)
def test_impossible_spec_names_the_field(spec, fields, words):
    with pytest.raises(ValueError) as error:
        spec(**{'channels': (8, 16, 32, 64), 'depths': (1, 1, 1, 1), **fields})
    assert all(word in str(error.value) for word in words)
    assert '\n' not in str(error.value)
