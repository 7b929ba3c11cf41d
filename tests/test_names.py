"""Tensor names of the authors and of timm, translated one to one."""

import re

import pytest
from helpers import GOLDENS, HEADS, Golden

from repvit_mm.names import backbone_prefix, origin_of, translate

golden_names = pytest.mark.parametrize('golden', GOLDENS, ids=lambda golden: golden.name)


def our_shapes(golden: Golden, deploy: bool = False) -> dict[str, tuple[int, ...]]:
    network = golden.backbone(golden.arch, deploy=deploy)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def fuse_names(names: list[str]) -> list[str]:
    """The tensors that a reference network is left with once its owners' code has fused it."""
    fused = {}
    for name in names:
        # A convolution and its norm become one; so do all branches of a re-parameterizable depthwise block.
        name = re.sub(r'(\.c)?\.weight$|\.bn\.weight$', '.weight', name)
        name = re.sub(r'(\.bn)?\.(bias|running_mean|running_var|num_batches_tracked)$', '.bias', name)
        name = re.sub(r'(token_mixer(\.0)?)\.conv1?\.(weight|bias)$', r'\1.\3', name)
        fused[name] = None
    return list(fused)


@golden_names
def test_names_map_one_to_one_onto_ours_with_the_same_shapes(golden):
    ours = translate(golden.shapes)
    assert list(ours) == list(golden.shapes)
    heads = {name for name in golden.shapes if name.startswith(HEADS)}
    assert heads and {name for name, mine in ours.items() if mine is None} == heads
    mapped = [(ours[name], shape) for name, shape in golden.shapes.items() if name not in heads]
    assert len(dict(mapped)) == len(mapped), 'no two tensors share a name'
    assert dict(mapped) == our_shapes(golden)


@golden_names
def test_fused_names_map_one_to_one_onto_those_of_a_fused_network(golden):
    names = fuse_names([name for name in golden.shapes if not name.startswith(HEADS)])
    assert not any('.bn.' in name or '.c.' in name for name in names)
    ours = translate(names)
    assert sorted(ours.values()) == sorted(our_shapes(golden, deploy=True))


@golden_names
@pytest.mark.parametrize('deploy', [False, True], ids=['unfused', 'fused'])
def test_our_names_stay_ours(golden, deploy):
    names = list(our_shapes(golden, deploy))
    assert translate(names) == dict(zip(names, names, strict=True))


@pytest.mark.parametrize('golden', [GOLDENS[0], GOLDENS[-1]], ids=lambda golden: golden.name)
def test_names_of_truncated_networks_map_alike(golden):
    """A checkpoint that ends with some stage still says where its stages begin."""
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
    translated = translate([*golden.shapes, *unknown])
    assert {name: translated[name] for name in unknown} == dict(zip(unknown, unknown, strict=True))


@golden_names
@pytest.mark.parametrize('deploy', [False, True], ids=['unfused', 'fused'])
@pytest.mark.parametrize('convention', ['authors', 'timm'])
def test_translation_goes_both_ways(golden, convention, deploy):
    """There and back again; names that the reference itself has are met on the way."""
    ours = list(our_shapes(golden, deploy))
    theirs = translate(ours, convention)
    assert len(set(theirs.values())) == len(ours) and origin_of(theirs.values()) == convention
    assert translate(theirs.values()) == {theirs[name]: name for name in ours}
    if convention == origin_of(golden.shapes):
        real = [name for name in golden.shapes if not name.startswith(HEADS)]
        assert sorted(theirs.values()) == sorted(fuse_names(real) if deploy else real)


@pytest.mark.parametrize('golden', [GOLDENS[0], GOLDENS[-1]], ids=lambda golden: golden.name)
def test_prefix_of_a_backbone_in_a_whole_model_is_found(golden):
    assert backbone_prefix(['neck.a', 'features.x', 'head.stem.b']) is None
    for prefix in ('', 'backbone.', 'module.', 'module.backbone.', 'student.img_backbone.'):
        for names in (golden.shapes, translate(our_shapes(golden), 'timm'), our_shapes(golden, deploy=True)):
            assert backbone_prefix(['neck.a', *(f'{prefix}{name}' for name in names)]) == prefix
    both = [f'{prefix}{name}' for prefix in ('teacher.backbone.', 'backbone.') for name in golden.shapes]
    assert backbone_prefix(both) == 'backbone.'
