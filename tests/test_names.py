"""Tensor names of the authors and of timm, translated one to one."""

import re

import pytest
import torch
from helpers import ENDS, GOLDENS, HEADS, Golden, fuse_as_owners

from repvit_mm.backbone import ReparamBackbone

golden_names = pytest.mark.parametrize('golden', GOLDENS, ids=lambda golden: golden.name)
some_golden_names = pytest.mark.parametrize('golden', ENDS, ids=lambda golden: golden.name)
fused_or_not = pytest.mark.parametrize('deploy', [False, True], ids=['unfused', 'fused'])


def build(golden: Golden, deploy: bool = False) -> ReparamBackbone:
    with torch.device('meta'):
        return golden.backbone(golden.arch, deploy=deploy)


def shapes(network: ReparamBackbone) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


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
    assert dict(mapped) == shapes(build(golden))


@golden_names
def test_fused_names_map_one_to_one_onto_those_of_a_network_fused_as_far(golden):
    names = fuse_names(golden)
    assert len(names) < len(golden.shapes) / 2
    ours = golden.backbone.naming.translate(names)
    network = fuse_as_owners(build(golden))
    assert sorted(ours.values()) == sorted(shapes(network))
    assert network.deployed is not bool(golden.family.owners_leave)


@golden_names
@fused_or_not
def test_our_names_stay_ours(golden, deploy):
    names = list(shapes(build(golden, deploy)))
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
@fused_or_not
@pytest.mark.parametrize('convention', ['authors', 'timm'])
def test_translation_goes_both_ways(golden, convention, deploy):
    """There and back again; names that the reference itself has are met on the way."""
    naming = golden.backbone.naming
    ours = list(shapes(fuse_as_owners(build(golden)) if deploy else build(golden)))
    theirs = naming.translate(ours, convention)
    assert len(set(theirs.values())) == len(ours) and naming.origin_of(theirs.values()) == convention
    assert naming.translate(theirs.values()) == {theirs[name]: name for name in ours}
    if convention == naming.origin_of(golden.shapes):
        real = [name for name in golden.shapes if not name.startswith(HEADS)]
        assert sorted(theirs.values()) == sorted(fuse_names(golden) if deploy else real)


@some_golden_names
def test_prefix_of_a_backbone_in_a_whole_model_is_found(golden):
    naming = golden.backbone.naming
    assert naming.prefix_of(['neck.a', 'features.x', 'network.x', 'head.stem.b']) is None
    ours = list(shapes(build(golden)))
    for prefix in ('', 'backbone.', 'module.', 'module.backbone.', 'student.img_backbone.'):
        for names in (golden.shapes, ours, naming.translate(ours, 'timm').values(), shapes(build(golden, deploy=True))):
            assert naming.prefix_of(['neck.a', *(f'{prefix}{name}' for name in names)]) == prefix
    both = [f'{prefix}{name}' for prefix in ('teacher.backbone.', 'backbone.') for name in golden.shapes]
    assert naming.prefix_of(both) == 'backbone.'
