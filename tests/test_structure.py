"""Which operators of a graph may compute in int8."""

import pytest

from repvit_mm.deploy.structure import Layer, Node, Structure, find_structure, module_of


def node(name: str, kind: str, *inputs: str, leaves: bool = False) -> Node:
    return Node(name, kind, name, inputs, leaves)


def names(structure: Structure) -> list[str]:
    return [layer.name for layer in structure.layers]


GATED_BLOCK = [
    node('normalize', 'mul'),
    node('stem', 'conv', 'normalize'),
    node('mixer', 'conv', 'stem'),
    node('pool', 'other', 'mixer'),
    node('fc', 'conv', 'pool'),
    node('sigmoid', 'other', 'fc'),
    node('gate', 'mul', 'mixer', 'sigmoid'),
    node('expand', 'conv', 'gate'),
    node('gelu', 'other', 'expand'),
    node('project', 'conv', 'gelu'),
    node('sum', 'add', 'gate', 'project'),
]


def test_gates_and_sums_between_convolutions_are_layers():
    structure = find_structure([*GATED_BLOCK, node('head', 'conv', 'sum'), node('scale', 'mul', 'head', leaves=True)])
    assert names(structure) == ['stem', 'mixer', 'fc', 'gate', 'expand', 'project', 'sum', 'head']
    assert 'gelu' in structure.between and not {'normalize', 'scale'} & structure.between
    assert [layer.name for layer in structure.layers if layer.end] == ['head']
    takes = {layer.name: layer.takes for layer in structure.layers}
    assert takes['gate'] == {'mixer', 'fc'} and takes['project'] == {'expand'} and takes['sum'] == {'gate', 'project'}


def test_arithmetic_on_boxes_is_no_layer():
    """Boxes are multiplied and added to behind the last convolution, in front of a selection by value."""
    graph = [
        node('conv', 'conv'),
        node('boxes', 'conv', 'conv'),
        node('exp', 'other', 'boxes'),
        node('decode', 'mul', 'boxes', 'exp'),
        node('shifted', 'add', 'decode', 'boxes'),
        node('nms', 'barrier', 'shifted'),
        node('pooled', 'barrier', 'conv', 'nms'),
        node('fc', 'linear', 'pooled', leaves=True),
    ]
    structure = find_structure(graph)
    assert names(structure) == ['conv', 'boxes', 'fc']
    assert {layer.name: layer.section for layer in structure.layers} == {'conv': 0, 'boxes': 0, 'fc': 2}
    assert all(layer.end for layer in structure.layers)
    assert structure.between == {'conv', 'boxes', 'fc'}


def test_arithmetic_on_sizes_is_no_layer():
    graph = [
        node('conv', 'conv'),
        node('height', 'shape', 'conv'),
        node('width', 'shape', 'conv'),
        node('area', 'mul', 'height', 'width'),
        node('resize', 'other', 'conv', 'area'),
        node('last', 'conv', 'resize', leaves=True),
    ]
    assert names(find_structure(graph)) == ['conv', 'last']


def test_a_square_is_no_gate():
    graph = [node('conv', 'conv'), node('square', 'mul', 'conv', 'conv'), node('last', 'conv', 'square', leaves=True)]
    assert names(find_structure(graph)) == ['conv', 'last']


@pytest.mark.parametrize(
    ('name', 'weights', 'module'),
    [
        ('/backbone/stem/conv1/Conv', ['model.backbone.stem.conv1.weight'], 'backbone.stem.conv1'),
        ('/bbox_head/fc/Gemm', ['model.roi_head.bbox_head.fc.weight'], 'roi_head.bbox_head.fc'),
        ('/backbone/stages.2/stages.2.9/channel_mixer/Add', [], 'backbone.stages.2.9.channel_mixer'),
        ('/neck/Add_1', ['onnx::Add_12'], 'neck'),
    ],
)
def test_module_of_a_node(name, weights, module):
    assert module_of(name, weights) == module


def test_the_same_layer_in_another_format():
    layer = Layer('/roi_head/fc/Gemm', 'linear', 'roi_head.bbox_head.fc')
    assert layer.is_same_layer('bbox_head.fc', 'linear')
    assert layer.is_same_layer('model.roi_head.bbox_head.fc', 'linear')
    assert not layer.is_same_layer('bbox_head.fc', 'add') and not layer.is_same_layer('head.fc', 'linear')
