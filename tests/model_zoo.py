"""The model zoo: every variant and every recipe, with what its authors published and what was measured.

``python tests/model_zoo.py`` writes ``docs/model_zoo.md`` from the configs, their metafiles and the tables of variants.
``python tests/model_zoo.py BENCHMARK.json`` first takes over the latencies that ``tools/benchmark.py backbone`` left.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repvit_mm import FastViT, MobileOne, RepViT, switch_to_deploy
from repvit_mm.deploy.benchmark.measures import count_parameters

ROOT = Path(__file__).parents[1]
PAGE = ROOT / 'docs/model_zoo.md'
LATENCIES = ROOT / 'docs/data/latency.json'
METAFILES = tuple(ROOT / path for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import'])

VARIANTS = {
    f'{family.__name__}:{arch}': (family, arch) for family in (RepViT, FastViT, MobileOne) for arch in family.top1
}
"""Every variant of published accuracy, by the name that the benchmark gives it."""

SIZE = 224
"""Height and width in pixels that arithmetic is counted at, as RepViT's authors do."""

INTRODUCTION = f"""\
# Model zoo

<!-- Written by `python tests/model_zoo.py`; `tests/test_model_zoo.py` compares. -->

Accuracy, AP and mIoU are the authors' published figures. They were not measured again here:
`python tools/reproduce.py` does so for whoever has COCO, ADE20K or ImageNet. Parameters and multiply-accumulates
(MACs) are counted from the code.

## Backbones

Parameters are those of the network as it is trained, and as it is deployed, without a classifier. MACs are those of the
deployed network at {SIZE}x{SIZE} pixels. Top-1 is the accuracy on ImageNet-1k, of weights that were trained on the
labels alone and of distilled ones; RepViT's figures are those of 300 epochs. The link is the file that the configs
begin with.

"""

COMMANDS = {
    'det': ('Object detection and instance segmentation, COCO-2017', 'bbox segm', ('box AP', 'mask AP')),
    'seg': ('Semantic segmentation, ADE20K', 'mIoU', ('mIoU',)),
}
"""Folder of configs -> the title of its table, what ``--eval`` takes, and the metrics of its metafile."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def millions(count: int) -> str:
    """A number of parameters as the tables have it."""
    return f'{count / 1e6:.2f}'


def macs(network: nn.Module) -> str:
    """Billions of multiply-accumulates of a network on the meta device, where nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, SIZE, SIZE, device='meta'))
    return f'{counter.get_total_flops() / 2e9:.2f}'  # torch counts a multiplication and an addition


def link(address: str | None) -> str:
    """A link to a checkpoint that is named by its file."""
    return f'[{address.rpartition("/")[2]}]({address})' if address else ''


def recipes() -> dict[str, list[dict[str, Any]]]:
    """Folder of configs -> the models of its metafile."""
    return {path.parent.name: yaml.safe_load(path.read_text())['Models'] for path in METAFILES}


def pretrained(config: Path) -> str:
    """The address of the file that a config's backbone begins with: each recipe assigns it to ``checkpoint``."""
    statements = {
        statement.targets[0].id: statement.value
        for statement in ast.parse(config.read_text()).body
        if isinstance(statement, ast.Assign)
    }
    return ast.literal_eval(statements['checkpoint'])


def variant(name: str) -> str:
    """The backbone that a recipe's name names, as in 'RepViT:m1_1'."""
    (found,) = (full for full in VARIANTS if f'_{full.lower().replace(":", "_")}_' in name)
    return found


def take_latencies(benchmark: Path) -> None:
    """Write what the page shows of a benchmark's JSON file to ``docs/data/latency.json``."""
    measured = json.loads(benchmark.read_text())
    kept = [
        {key: row[key] for key in ('name', 'batch', 'route')} | {'ms': round(row['ms'], 2)}
        for row in measured['rows']
        if row['batch'] == 1 and row['route'] != 'roofline'
    ]
    machine = {key: measured['machine'][key] for key in ('processor', 'threads', 'versions')}
    settings = {key: measured['settings'][key] for key in ('size', 'rounds')}
    command = re.sub(r' --out-dir \S+', '', measured['command'])
    content = {'command': command, 'settings': settings, 'machine': machine, 'rows': kept}
    LATENCIES.parent.mkdir(exist_ok=True)
    LATENCIES.write_text(json.dumps(content, indent=2) + '\n')


def backbones(weights: Mapping[str, str]) -> Iterator[str]:
    """The table of variants.

    Args:
        weights: Variant -> the address of its ImageNet file.
    """
    rows = []
    for name, (family, arch) in VARIANTS.items():
        with torch.device('meta'):
            network = family(arch).eval()
        trained = count_parameters(network)
        switch_to_deploy(network)
        rows.append(
            [
                name.replace(':', ' '),
                f'{millions(trained)}, {millions(count_parameters(network))}',
                macs(network),
                *('' if value is None else str(value) for value in family.top1[arch]),
                link(weights[name]),
            ]
        )
    header = ['backbone', 'parameters, M', 'MACs, G', 'top-1, %', 'distilled, %', 'weights']
    yield table(header, rows)


def latencies() -> Iterator[str]:
    """The table of measured latencies, if there are any."""
    if not LATENCIES.is_file():
        return
    measured = json.loads(LATENCIES.read_text())
    rows = {(row['name'], row['route']): row['ms'] for row in measured['rows']}
    names, routes = ([*dict.fromkeys(key)] for key in zip(*rows, strict=True))
    machine, settings = measured['machine'], measured['settings']
    command = measured['command'].replace(' --size', ' \\\n    --size')
    yield (
        '\n### Latency\n\n'
        f'Milliseconds for one image of {settings["size"][0]}x{settings["size"][1]} pixels by each '
        f'[route](performance.md#how-it-is-measured): medians of {settings["rounds"]} rounds on '
        f'{machine["processor"]}, {machine["threads"]} threads, torch {machine["versions"]["torch"]}. '
        'That machine is now and then slower by a third for a while: compare within a row.\n\n'
        f'```console\n{command}\n```\n\n'
    )
    yield table(
        ['', *routes],
        [
            [name.replace(':', ' '), *(f'{rows[name, route]:.1f}' if (name, route) in rows else '' for route in routes)]
            for name in names
        ],
    )


def models(folder: str, listed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table of a folder's recipes.

    Args:
        folder: A key of ``COMMANDS``.
        listed: The models of its metafile.
    """
    title, metrics, columns = COMMANDS[folder]
    config, weights = next((model['Config'], model['Weights']) for model in listed if 'Weights' in model)
    yield (
        f'\n## {title}\n\n'
        'Parameters are those of the whole model as it is trained. A row without figures is a recipe for which the\n'
        'authors published none. Any row is trained, tested and exported in the same way:\n\n'
        '```console\n'
        f'python tools/train.py {config}\n'
        f'python tools/test.py {config} \\\n    {weights} --eval {metrics} --fuse\n'
        f'python tools/export.py {config} \\\n    {weights} --to onnx\n'
        '```\n\n'
    )
    rows = []
    for model in listed:
        found = {name: value for result in model.get('Results', ()) for name, value in result['Metrics'].items()}
        length = model['Metadata']
        rows.append(
            [
                f'[`{model["Name"]}`](../{model["Config"]})',
                millions(length['Parameters']),
                f'{length["Epochs"]} epochs' if 'Epochs' in length else f'{length["Iterations"]:,} iterations',
                *(str(found.get(column, '')) for column in columns),
                link(model.get('Weights')),
            ]
        )
    yield table(['config', 'parameters, M', 'training', *columns, 'weights'], rows)


def page() -> str:
    """The whole of ``docs/model_zoo.md``."""
    listed = recipes()
    weights = {
        variant(model['Name']): pretrained(ROOT / model['Config']) for entries in listed.values() for model in entries
    }
    parts = [INTRODUCTION, *backbones(weights), *latencies()]
    for folder, entries in listed.items():
        parts += models(folder, entries)
    return ''.join(parts)


if __name__ == '__main__':
    if sys.argv[1:]:
        take_latencies(Path(sys.argv[1]))
    PAGE.write_text(page())
