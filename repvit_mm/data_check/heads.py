"""Whether a model's heads are made for the classes of the data."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OTHER_CLASSES = ('backbone', 'init_cfg', 'semantic_head', 'rpn_head')
"""Parts of a model that count classes of their own."""


def parts_with(key: str, model: Any, name: str = 'model') -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts of a model's config that have a setting, each with its name."""
    if isinstance(model, Mapping):
        if key in model:
            yield name, model
        for part, inner in model.items():
            if part not in OTHER_CLASSES:
                yield from parts_with(key, inner, f'{name}.{part}')
    elif isinstance(model, Sequence) and not isinstance(model, str):
        for index, inner in enumerate(model):
            yield from parts_with(key, inner, f'{name}.{index}')


def segmentation_heads(model: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The decode and auxiliary heads of a segmentor's config, each with its name."""
    found = []
    for name in ('decode_head', 'auxiliary_head'):
        heads = model.get(name) or []
        if isinstance(heads, Mapping):
            found.append((f'model.{name}', heads))
        else:
            found += [(f'model.{name}.{index}', head) for index, head in enumerate(heads)]
    return found


def wrong_heads(model: Mapping[str, Any], classes: int) -> dict[str, int]:
    """Setting -> its number, for each head whose number of classes is not that of the data."""
    numbers = {f'{name}.num_classes': part['num_classes'] for name, part in parts_with('num_classes', model)}
    for name, part in parts_with('num_things_classes', model):  # MaskFormer's family counts in two parts
        numbers.pop(f'{name}.num_classes', None)
        setting = f'{name}.num_things_classes + num_stuff_classes'
        numbers[setting] = part['num_things_classes'] + part.get('num_stuff_classes', 0)
    return {setting: number for setting, number in numbers.items() if number != classes}
