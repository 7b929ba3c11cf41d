"""Tensor names of the authors and of timm, translated one to one."""

import re
from functools import cache

import pytest
import torch
from helpers import ENDS, GOLDENS, HEADS, Golden, family_of, fuse_as_owners, slow_but

from repvit_mm.backbone import ReparamBackbone

golden_names = pytest.mark.parametrize('golden', slow_but(ENDS, GOLDENS))
some_golden_names = pytest.mark.parametrize('golden', ENDS, ids=lambda golden: golden.name)


@cache
def shapes_of(cls: type[ReparamBackbone], arch: str, form: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a network, in one of three forms: unfused, fused, or fused as by the owners."""
    with torch.device('meta'):
        network = cls(arch, deploy=form == 'fused')
    network = fuse_as_owners(network) if form == 'owners' else network
    assert network.deployed is (form == 'fused' or (form == 'owners' and not family_of(cls).owners_leave))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def shapes(golden: Golden, form: str = 'unfused') -> dict[str, tuple[int, ...]]:
    return shapes_of(golden.backbone, golden.arch, form)


def fuse_names(golden: Golden) -> list[str]:
    """The tensors that a reference network is left with once its owners' code has fused it."""
    fused = {}
    for name in golden.shapes:
        for pattern, conv in golden.family.owners_fuse:
            if match := re.match(pattern, name):
                fused |= {f'{match.expand(conv)}.{part}': None for part in ('weight', 'bias')}
                break
        else:
            fused[name] = None
    return [name for name in fused if not name.startswith(HEADS)]


@golden_names
def test_names_map_one_to_one_onto_ours_with_the_same_shapes(golden):
    ours = golden.backbone.naming.translate(golden.shapes)
    assert list(ours) == list(golden.shapes)
    heads = {name for name in golden.shapes if name.startswith(HEADS)}
    assert heads and {name for name, mine in ours.items() if mine is None} == heads
    mapped = [(ours[name], shape) for name, shape in golden.shapes.items() if name not in heads]
    assert len(dict(mapped)) == len(mapped), 'no two tensors share a name'
    assert dict(mapped) == shapes(golden)


@golden_names
def test_fused_names_map_one_to_one_onto_those_of_a_network_fused_as_far(golden):
    names = fuse_names(golden)
    assert len(names) < len(golden.shapes) / 2
    ours = golden.backbone.naming.translate(names)
    assert sorted(ours.values()) == sorted(shapes(golden, 'owners'))


@golden_names
@pytest.mark.parametrize('form', ['unfused', 'fused'])
def test_our_names_stay_ours(golden, form):
    names = list(shapes(golden, form))
    assert golden.backbone.naming.translate(names) == dict(zip(names, names, strict=True))


@some_golden_names
def test_names_of_truncated_networks_map_alike(golden):
    """A checkpoint that ends with some stage still says where its stages begin."""
    translate = golden.backbone.naming.translate
    whole = translate(golden.shapes)
    for stages in (1, 2, 3):
        part = [name for name, ours in whole.items() if ours and not re.match(rf'stages\.[{stages}-3]\.', ours)]
        # The last block of a stage is a part of the downsample behind it under timm's names: cut in front of it.
        part = [name for name in part if not name.startswith(f'stages.{stages}.downsample')]
        assert 0 < len(part) < len(whole)
        assert translate(part) == {name: whole[name] for name in part}


@golden_names
def test_unknown_names_are_left_alone(golden):
    unknown = ['neck.conv.weight', 'backbone.stem.conv1.c.weight', 'features', 'features.x.weight', 'weight', '']
    translated = golden.backbone.naming.translate([*golden.shapes, *unknown])
    assert {name: translated[name] for name in unknown} == dict(zip(unknown, unknown, strict=True))


@golden_names
@pytest.mark.parametrize('form', ['unfused', 'owners'])
@pytest.mark.parametrize('convention', ['authors', 'timm'])
def test_translation_goes_both_ways(golden, convention, form):
    """There and back again; names that the reference itself has are met on the way."""
    naming = golden.backbone.naming
    ours = list(shapes(golden, form))
    theirs = naming.translate(ours, convention)
    assert len(set(theirs.values())) == len(ours) and naming.origin_of(theirs.values()) == convention
    assert naming.translate(theirs.values()) == {theirs[name]: name for name in ours}
    if convention == naming.origin_of(golden.shapes):
        real = [name for name in golden.shapes if not name.startswith(HEADS)]
        assert sorted(theirs.values()) == sorted(fuse_names(golden) if form == 'owners' else real)


@some_golden_names
def test_prefix_of_a_backbone_in_a_whole_model_is_found(golden):
    naming = golden.backbone.naming
    assert naming.prefix_of(['neck.a', 'features.x', 'network.x', 'head.stem.b']) is None
    ours = list(shapes(golden))
    for prefix in ('', 'backbone.', 'module.', 'module.backbone.', 'student.img_backbone.'):
        for names in (golden.shapes, ours, naming.translate(ours, 'timm').values(), shapes(golden, 'fused')):
            assert naming.prefix_of(['neck.a', *(f'{prefix}{name}' for name in names)]) == prefix
    both = [f'{prefix}{name}' for prefix in ('teacher.backbone.', 'backbone.') for name in golden.shapes]
    assert naming.prefix_of(both) == 'backbone.'
