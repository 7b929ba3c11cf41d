"""The road from MobileNetV3-L to RepViT: that each step is what it says, and changes nothing else."""

import importlib
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDENS, image, largest_error, normalize, randomize, relative_error, slow_but
from mmengine.registry import MODELS
from PIL import Image
from torch import Tensor, nn

import repvit_mm.repvit
from repvit_mm import RepViT, RepViTRoadmap, RepViTRoadmapClassifier, switch_to_deploy
from repvit_mm.checkpoint import CheckpointError
from repvit_mm.compat.pytorch import BatchNorm
from repvit_mm.deploy.benchmark.charts import label_points, new_figure
from repvit_mm.deploy.benchmark.measures import count_macs, count_parameters
from repvit_mm.deploy.benchmark.synthetic import make_trained_like
from repvit_mm.layers import SqueezeExcite
from repvit_mm.reparam import KernelSum, plain_formulation
from repvit_mm.roadmap import (
    ABLATIONS,
    ROADMAP,
    STEPS,
    ApartBlock,
    FeedForward,
    InvertedBottleneck,
    LargeTokenMixer,
    RoadmapSpec,
    make_head,
)

TOOLS = Path(__file__).parents[1] / 'tools'
sys.path.append(str(TOOLS))
roadmap = importlib.import_module('roadmap')

# Every kind of block in few channels.
SMALL = {
    'inverted': dict(channels=(8, 16, 24, 32), expansion=3, depths=(1, 1, 2, 1)),
    'apart': dict(mixers_apart=True, channels=(8, 16, 24, 32), expansion=3, depths=(1, 1, 2, 1)),
    'deep': dict(ROADMAP['stage_ratio'].__dict__, channels=(8, 16, 24, 32), depths=(1, 1, 2, 1)),
}


def described(name: str) -> nn.Module:
    """A step's classifier without its numbers."""
    with torch.device('meta'):
        return RepViTRoadmapClassifier(name)


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def macs(network: nn.Module, side: int) -> int:
    return count_macs(network.eval(), torch.zeros(1, 3, side, side))


def layers_by_hand(step: str, side: int) -> list[tuple[int, int, int, int]]:
    """The convolutions of a fused step, written out: input channels of a group, output channels, kernel, pixels."""
    steps = list(STEPS)
    done = set(steps[: steps.index(step) + 1])
    pixels = [(side // 2 ** (i + 1)) ** 2 for i in range(5)]
    if 'stem' in done:
        layers = [(3, 24, 3, pixels[0]), (24, 48, 3, pixels[1])]
    else:
        layers = [(3, 16, 3, pixels[0]), (1, 16, 3, pixels[0]), (16, 16, 1, pixels[0])]
        layers += [(16, 64, 1, pixels[0]), (1, 64, 3, pixels[1]), (64, 48 if 'width' in done else 24, 1, pixels[1])]
    # Output and hidden channels, kernel, and whether there is a gate, of each block of MobileNetV3-L.
    stages = [
        [(24, 72, 3, False)],
        [(40, 72, 5, True), (40, 120, 5, True), (40, 120, 5, True)],
        [(80, 240, 3, False), (80, 200, 3, False), (80, 184, 3, False), (80, 184, 3, False)],
        [(160, 672, 5, True), (160, 960, 5, True), (160, 960, 5, True)],
    ]
    stages[2] += [(112, 480, 3, True), (112, 672, 3, True)]
    if 'stage_ratio' in done:  # the last two fifths of 14 blocks are five
        stages[0] *= 2
        stages[2] = [stages[2][0]] + [(192, 0, 3, False)] * 9 + [(192, 0, 3, True)] * 5
    width = 48 if 'width' in done else 24
    for stage, blocks in enumerate(stages):
        area = pixels[stage + 1]
        for position, (output, hidden, kernel, gate) in enumerate(blocks):
            downsamples = stage > 0 and position == 0
            output = (48, 96, 192, 384)[stage] if 'width' in done else output
            hidden = 2 * width if 'expansion' in done else hidden
            kernel = 3 if 'kernel_size' in done else kernel
            if 'se' in done:
                gate = (position - (stage > 0)) % 2 == 0 and not downsamples
            rounded = (width + 16) // 32 * 8 if width > 32 else 8
            squeeze = [(width, rounded, 1, 1), (rounded, width, 1, 1)] if gate else []
            if downsamples and 'downsampling' in done:
                before = pixels[stage]
                layers += [
                    (1, width, 3 if stage != 2 or 'kernel_size' in done else 5, before),
                    (width, 2 * width, 1, before),
                ]
                layers += [(2 * width, width, 1, before)]
                layers += [(1, width, kernel, area), (width, output, 1, area)]
                layers += [(output, 2 * output, 1, area), (2 * output, output, 1, area)]
            elif 'mixers' in done:
                layers += [(1, width, kernel, area), *squeeze, (width, hidden, 1, area), (hidden, output, 1, area)]
            else:
                entry = pixels[stage] if downsamples else area
                rounded = {72: 24, 120: 32, 480: 120, 672: 168, 960: 240}.get(hidden)
                squeeze = [(hidden, rounded, 1, 1), (rounded, hidden, 1, 1)] if gate else []
                layers += [(width, hidden, 1, entry), (1, hidden, kernel, area), *squeeze, (hidden, output, 1, area)]
            width = output
    if 'classifier' in done:
        return [*layers, (width, 1000, 1, 1)]
    return [*layers, (width, 960, 1, pixels[4]), (960, 1280, 1, 1), (1280, 1000, 1, 1)]


class TestSteps:
    def test_each_sets_one_field(self):
        spec = RoadmapSpec()
        for name, step in STEPS.items():
            assert len(step.change) == (name != 'mobilenetv3')
            assert ROADMAP[name] == replace(spec, **step.change) and (ROADMAP[name] != spec) == bool(step.change)
            spec = ROADMAP[name]
        assert all(ROADMAP[name] == replace(spec, **step.change) != spec for name, step in ABLATIONS.items())
        assert list(ROADMAP) == [*STEPS, *ABLATIONS]

    # Which tensors may differ from those of the step before, in shape or by being there.
    @pytest.mark.parametrize(
        ('name', 'changed'),
        [
            ('mixers', r'backbone\.stages\.'),
            ('expansion', r'backbone\.stages\.\d\.\d\.channel_mixer\.(expand\.|project\.conv\.)'),
            ('width', r'backbone\.stages\.|backbone\.stem\.bottleneck\.project\.|head\.0\.conv\.'),
            ('stem', r'backbone\.stem\.'),
            ('downsampling', r'backbone\.stages\.([123]\.0|0\.1|1\.3|2\.6)\.'),
            ('classifier', r'head\.'),
            ('stage_ratio', r'backbone\.stages\.[02]\.'),
            ('kernel_size', r'backbone\.stages\.[13]\.\d\.(token_mixer\.conv3x3|spatial)\.conv\.weight'),
            ('se', r'backbone\.stages\.\d\.\d+\.se\.'),
        ],
    )
    def test_each_changes_one_thing(self, name, changed):
        names = list(STEPS)
        before, after = (shapes(described(step)) for step in (names[names.index(name) - 1], name))
        differing = {tensor for tensor, _ in before.items() ^ after.items()}
        assert differing and [tensor for tensor in differing if not re.match(changed, tensor)] == []

    def test_first_is_mobilenetv3(self):
        """5,483,032 parameters have torchvision's and timm's; its paper says 219 million multiply-accumulates."""
        assert count_parameters(described('mobilenetv3')) == 5_483_032
        assert macs(RepViTRoadmapClassifier('mobilenetv3'), 224) == pytest.approx(219e6, rel=0.02)

    @pytest.mark.parametrize('name', slow_but(['mobilenetv3', 'se'], STEPS))
    def test_parameters_and_multiply_accumulates_by_hand(self, name):
        layers = layers_by_hand(name, 64)
        network = switch_to_deploy(RepViTRoadmapClassifier(name).eval())
        assert count_parameters(network) == sum(i * o * k * k + o for i, o, k, _ in layers)
        assert macs(network, 64) == sum(i * o * k * k * pixels for i, o, k, pixels in layers)

    @pytest.mark.slow  # the import of mmseg is
    @pytest.mark.needs_ops
    def test_first_has_the_layers_of_mmseg(self):
        """Its MobileNetV3-L is another's; the first layer of our classifier is its backbone's last."""
        from mmseg.models.backbones import MobileNetV3

        ours = described('mobilenetv3')
        layers = [*ours.backbone.modules(), *ours.head[0].modules()]
        with torch.device('meta'):
            theirs = MobileNetV3(arch='large')
        found = [
            sorted(tuple(m.weight.shape) for m in modules if isinstance(m, nn.Conv2d))
            for modules in (layers, theirs.modules())
        ]
        assert found[0] == found[1]

    @pytest.mark.parametrize('tap', slow_but(['stage_end'], ['stage_end', 'pre_downsample']))
    def test_last_is_repvit_m1(self, tap):
        ours, m1 = RepViTRoadmap('se', tap=tap), RepViT('m1', tap=tap)
        x = torch.randn(2, 3, 64, 96)
        make_trained_like(m1, x)
        ours.eval().load_state_dict(m1.state_dict())
        mine, its = ours.state_dict(), m1.state_dict()
        assert list(mine) == list(its) and all(torch.equal(mine[name], its[name]) for name in its)
        assert all(torch.equal(mine, its) for mine, its in zip(ours(x), m1(x), strict=True))

    def test_last_loads_the_published_m1(self):
        golden = next(golden for golden in GOLDENS if golden.name == 'timm_repvit_m1')
        network = RepViTRoadmap('se', tap='pre_downsample').eval()
        network.load_state_dict(golden.state_dict())
        with torch.no_grad():
            maps = network(image())
        assert largest_error(maps, golden.maps('pre_downsample')) < 1e-5
        # The classifier has as many tensors as theirs has without its second head, for a teacher.
        theirs = [shape for name, shape in golden.shapes.items() if 'head_dist' not in name]
        assert sorted(map(tuple, theirs)) == sorted(shapes(described('se')).values())


class TestNetworks:
    @pytest.mark.parametrize('name', slow_but(['mobilenetv3', 'downsampling'], ROADMAP))
    def test_registry_builds_what_folds_and_takes_any_size(self, name):
        network = MODELS.build(dict(type='RepViTRoadmapClassifier', step=name, num_classes=7))
        backbone = MODELS.build(dict(type='RepViTRoadmap', step=name)).eval()
        x = torch.randn(2, 3, 33, 95)
        make_trained_like(network, x)
        with torch.no_grad():
            for mine, its in zip(backbone.state_dict().values(), network.backbone.state_dict().values(), strict=True):
                mine.copy_(its)
            maps = backbone(x)
            assert [tuple(m.shape[2:]) for m in maps] == [(9, 24), (5, 12), (3, 6), (2, 3)]
            assert [m.shape[1] for m in maps] == list(backbone.out_channels) == list(ROADMAP[name].channels)
            with plain_formulation(network):
                expected = network(x)
            assert expected.shape == (2, 7) and relative_error(network(x), expected) < 1e-4
            assert torch.equal(network.head(maps[3]), network(x))
            switch_to_deploy(network)
            assert relative_error(network(x), expected) < 1e-4
        assert network.backbone.deployed and not any(isinstance(module, BatchNorm) for module in network.modules())

    @pytest.mark.parametrize('step', SMALL.values(), ids=SMALL)
    def test_frozen_training_has_the_gradients_of_the_branches(self, step):
        network = randomize(RepViTRoadmap(step, norm_eval=True)).double().train()
        x = torch.randn(1, 3, 64, 32).double()
        found = []
        for fold in (False, True):
            network.zero_grad()
            for module in network.modules():
                module.folds = fold
            sum((m**2).sum() for m in network(x)).backward()
            found.append({name: parameter.grad for name, parameter in network.named_parameters()})
        assert max(relative_error(found[1][name], gradient) for name, gradient in found[0].items()) < 1e-8

    @pytest.mark.parametrize('step', SMALL.values(), ids=SMALL)
    def test_every_parameter_learns(self, step):
        """None is behind a norm that starts at nothing without a residual branch around it."""
        network = RepViTRoadmap(step, drop_path_rate=0.1).train()
        for module in network.modules():
            if isinstance(module, BatchNorm) and module.weight.abs().max() == 0:
                nn.init.ones_(module.weight)  # of a residual branch
        sum((m**2).sum() for m in network(torch.randn(8, 3, 64, 64))).backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())

    def test_spec_made_of_a_step_is_a_step(self):
        """The paper's aside: the new widths on MobileNetV3's own block."""
        with torch.device('meta'):
            network = MODELS.build(
                dict(type='RepViTRoadmap', step=asdict(replace(ROADMAP['width'], mixers_apart=False)))
            )
        blocks = [block for stage in network.stages for block in stage]
        assert {type(block) for block in blocks} == {InvertedBottleneck}
        assert all(2 * block.expand.conv.in_channels == block.expand.conv.out_channels for block in blocks)

    def test_unfused_tensors_are_fused_as_they_load(self):
        network = randomize(RepViTRoadmap(SMALL['apart'])).eval()
        fused = RepViTRoadmap(SMALL['apart'], deploy=True)
        fused.load_state_dict(network.state_dict())
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert largest_error(fused(x), network(x)) < 1e-5

    def test_checkpoint_of_another_network_is_named(self):
        with pytest.raises(CheckpointError, match="it holds RepViT m0_6: set type='RepViT', arch='m0_6'"):
            RepViTRoadmap('se').load_state_dict(RepViT('m0_6').state_dict())

    @pytest.mark.parametrize(
        ('options', 'words'),
        [
            (dict(step='stems'), "step='stems': expected one of mobilenetv3, .*; the nearest is 'stem'"),
            (dict(step=3), 'step=3: expected one of'),
            (dict(arch='m1'), "takes no option 'arch': the nearest is 'step'"),
            (dict(step=dict(kernels=3)), "kernels.*the nearest is 'kernel_sizes'"),
            (dict(step='se', outindices=(0,)), "no option 'outindices': the nearest is 'out_indices'"),
        ],
        ids=str,
    )
    def test_bad_argument(self, options, words):
        with pytest.raises((ValueError, TypeError), match=words) as error:
            RepViTRoadmap(**options)
        assert '\n' not in str(error.value)

    @pytest.mark.parametrize(
        ('fields', 'words'),
        [
            (dict(stem='late'), "stem='late': expected one of mobilenetv3, early"),
            (dict(se=True), 'se=True: expected one of'),
            (dict(reparam='no'), "reparam='no': expected True or False"),
            (dict(expansion=2.0), 'expansion=2.0: expected a positive integer, or None'),
            (dict(kernel_sizes=(3, 4, 3, 3)), r'kernel_sizes=\(3, 4, 3, 3\): expected odd sizes'),
            (dict(channels=(7, 16, 24, 32), stem='early'), r'channels=\(7, 16, 24, 32\): the first width must be even'),
            (dict(depths=(2, 2, 14, 2)), r'depths=\(2, 2, 14, 2\): .*set expansion and other channels too'),
            (dict(depths=(2, 2, 14, 2), expansion=2), r'depths=\(2, 2, 14, 2\)'),
            (dict(downsampling='deep', expansion=2), "downsampling='deep': .*set mixers_apart and expansion too"),
        ],
        ids=str,
    )
    def test_impossible_spec_names_the_field(self, fields, words):
        with pytest.raises(ValueError, match=words) as error:
            RoadmapSpec(**fields)
        assert '\n' not in str(error.value)


def gated_of(name: str) -> list[list[bool]]:
    return [
        [any(isinstance(module, SqueezeExcite) for module in block.modules()) for block in stage]
        for stage in described(name).backbone.stages
    ]


NO, YES = False, True


class TestPlaces:
    """Where gates, kernels and blocks stand. The first block of stages 1 to 3 has stride 2."""

    def test_se_where_mobilenetv3_has_it(self):
        expected = [[NO], [YES] * 3, [NO] * 4 + [YES] * 2, [YES] * 3]
        assert gated_of('mobilenetv3') == gated_of('stem') == expected
        # Deep downsampling has none, neither in the block in front of it.
        assert gated_of('downsampling') == [
            [NO, NO], [NO, YES, YES, NO], [NO, NO, NO, NO, YES, YES, NO], [NO, YES, YES],
        ]  # fmt: skip
        assert gated_of('kernel_size')[2] == [NO] + [NO] * 9 + [YES] * 5 + [NO]

    def test_se_of_ablations(self):
        lengths = [3, 4, 16, 3]
        assert gated_of('without_se') == [[NO] * length for length in lengths]
        every = [[stage == 0 or position > 0 for position in range(n)] for stage, n in enumerate(lengths)]
        assert gated_of('se_in_every_block') == every

    def test_without_reparam_is_the_same_network_when_fused(self):
        plain, branches = (switch_to_deploy(RepViTRoadmap(name)) for name in ('without_reparam', 'se'))
        assert shapes(plain) == shapes(branches)
        names = shapes(described('without_reparam'))
        assert not any('conv3x3' in name or 'conv1x1' in name for name in names)
        assert 'backbone.stages.0.0.token_mixer.conv.weight' in names

    @pytest.mark.parametrize(('name', 'sizes'), [('se', {3}), ('kernel_5x5', {5})])
    def test_kernels(self, name, sizes):
        stages = described(name).backbone.stages
        depthwise = [
            m for m in stages.modules() if isinstance(m, nn.Conv2d) and m.groups > 1 and m.kernel_size > (1, 1)
        ]
        assert len(depthwise) == 26 and {m.kernel_size[0] for m in depthwise} == sizes

    def test_shallow_downsampling_has_neither_block_before_nor_network_behind(self):
        shallow = described('shallow_downsampling').backbone
        assert [len(stage) for stage in shallow.stages] == [2, 3, 15, 3]
        for stage, width in zip(shallow.stages[1:], (48, 96, 192), strict=True):
            block = stage[0]
            assert isinstance(block, ApartBlock) and block.token_mixer.stride == 2 and block.se is None
            assert block.channel_mixer.expand.conv.out_channels == 2 * width
            assert not block.channel_mixer.residual


def gated(x: Tensor, se: SqueezeExcite) -> Tensor:
    hidden = se.fc1(x.mean((2, 3), keepdim=True)).clamp(min=0)
    return x * torch.sigmoid(se.fc2(hidden))


def conv_bn(x: Tensor, layer: nn.Module, **options: int) -> Tensor:
    return normalize(F.conv2d(x, layer.conv.weight, **options), layer.bn)


class TestBlocks:
    """Each block written out a second time, in float64."""

    @pytest.mark.parametrize('hidden', [12, 6])
    @pytest.mark.parametrize(('out', 'stride'), [(6, 1), (8, 1), (6, 2)])
    def test_inverted_bottleneck(self, hidden, out, stride):
        block = randomize(InvertedBottleneck(6, hidden, out, 5, stride, with_se=True).double()).eval()
        x = torch.randn(2, 6, 9, 7).double()
        y = x if hidden == 6 else F.gelu(conv_bn(x, block.expand))
        y = F.gelu(conv_bn(y, block.depthwise, stride=stride, padding=2, groups=hidden))
        y = conv_bn(gated(y, block.se), block.project)
        expected = x + y if (out, stride) == (6, 1) else y
        assert relative_error(block(x), expected) < 1e-12
        with plain_formulation(block):
            assert relative_error(block(x), expected) < 1e-12

    @pytest.mark.parametrize(('out', 'stride', 'reparam'), [(6, 1, True), (8, 1, True), (6, 1, False), (8, 2, True)])
    def test_apart_block(self, out, stride, reparam):
        block = ApartBlock(6, 18, out, 5, stride, with_se=True, drop_path_rate=0.0, reparam=reparam)
        block = randomize(block.double()).eval()
        x = torch.randn(2, 6, 9, 7).double()
        if stride == 1 and reparam:
            y = conv_bn(x, block.token_mixer.conv3x3, padding=2, groups=6) + x
            y = y + conv_bn(x, block.token_mixer.conv1x1, groups=6)
        else:
            y = conv_bn(x, block.token_mixer, stride=stride, padding=2, groups=6)
        y = gated(y, block.se)
        mixed = conv_bn(F.gelu(conv_bn(y, block.channel_mixer.expand)), block.channel_mixer.project)
        expected = y + mixed if out == 6 else mixed
        assert relative_error(block(x), expected) < 1e-12
        with plain_formulation(block):
            assert relative_error(block(x), expected) < 1e-12

    def test_large_token_mixer_without_its_identity_is_noticed(self, monkeypatch):
        """Twin: an equivalent kernel that forgets the identity is not the branches' sum."""
        mixer = randomize(LargeTokenMixer(6, 5).double()).eval()
        x = torch.randn(2, 6, 9, 7).double()
        with plain_formulation(mixer):
            expected = mixer(x)
        assert relative_error(mixer.to_conv()(x), expected) < 1e-12
        monkeypatch.setattr(repvit_mm.repvit, 'identity_kernel', lambda: KernelSum(()))
        assert relative_error(mixer.to_conv()(x), expected) > 0.1

    def test_feed_forward_starts_as_nothing_only_beside_a_residual(self):
        x = torch.randn(2, 6, 5, 5)
        assert torch.equal(FeedForward(6, 24, 6, drop_path_rate=0.0)(x), x)
        assert FeedForward(6, 24, 8, drop_path_rate=0.0)(x).abs().max() > 0

    def test_simple_head(self):
        head = randomize(make_head('simple', 6, 10)).double().eval()
        x = torch.randn(2, 6, 5, 4).double()
        _, norm_linear, _ = head
        expected = F.linear(
            normalize(x, norm_linear.norm).mean((2, 3)), norm_linear.linear.weight, norm_linear.linear.bias
        )
        assert relative_error(head(x), expected) < 1e-12
        assert relative_error(switch_to_deploy(head)(x), expected) < 1e-12


class TestTool:
    @pytest.mark.slow
    def test_measures_and_draws(self, tmp_path, capsys, monkeypatch):
        steps = {name: STEPS[name] for name in ('mobilenetv3', 'expansion', 'classifier')}
        ablations = {'shallow_downsampling': ABLATIONS['shallow_downsampling']}
        monkeypatch.setattr(roadmap, 'STEPS', steps)
        monkeypatch.setattr(roadmap, 'ABLATIONS', ablations)
        roadmap.main(f'--size 32 --rounds 1 --ablations --out-dir {tmp_path}'.split())
        assert 'From MobileNetV3-L to RepViT, fused, 32x32, batch 1, float32 on cpu' in capsys.readouterr().out
        rows = json.loads((tmp_path / 'roadmap.json').read_text())['rows']
        assert [row['route'] for row in rows] == [*steps, *ablations]
        assert rows[0]['times_first'] == 1 and all(row['ms'] > 0 for row in rows)
        assert [(row['top1'], row['phone_ms']) for row in rows] == [
            (step.top1, step.phone_ms) for step in (steps | ablations).values()
        ]
        with Image.open(tmp_path / 'roadmap.png') as picture:
            assert picture.width > 1000 and len(picture.getcolors(picture.width * picture.height)) > 100

    def test_network_that_fusing_changes_ends_the_run(self, tmp_path, monkeypatch):
        def broken(network):
            switch_to_deploy(network).head[-2].bias.data += 100
            return network

        monkeypatch.setattr(roadmap, 'switch_to_deploy', broken)
        with pytest.raises(SystemExit, match='route mobilenetv3 differs'):
            roadmap.main(['--size', '32', '--out-dir', str(tmp_path)])
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ('arguments', 'words'),
        [
            (['--size', '16'], '--size 16: expected height and width, at least 32 each'),
            (['--rounds', '0'], '--rounds: expected a positive number'),
            (['--out-dir', f'{TOOLS}/roadmap.py/out'], 'cannot be made'),
        ],
        ids=str,
    )
    def test_one_line_on_what_cannot_be_measured(self, arguments, words):
        with pytest.raises(SystemExit) as end:
            roadmap.main(arguments)
        assert words in str(end.value.code) and '\n' not in str(end.value.code)

    def test_labels_cover_neither_points_nor_each_other(self):
        figure, (axis,) = new_figure('', 1)
        points = [(x, y, f'step {x} of {y}', 'black') for x, y in [(1, 1), (1.02, 1), (1.04, 1), (1.02, 1.05), (2, 2)]]
        axis.scatter(*zip(*(point[:2] for point in points), strict=True))
        axis.margins(0.3)
        figure.draw_without_rendering()
        label_points(axis, points)
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == len(points)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        places = axis.transData.transform([point[:2] for point in points])
        assert not any(box.contains(*place) for box in boxes for place in places)
