"""What was measured, as pictures."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ...specs import Top1


def new_figure(title: str, panels: int, width: float = 7) -> tuple[Any, Any]:
    """An empty picture of panels side by side, each of the given width in inches."""
    from matplotlib.figure import Figure  # not pyplot, which would want to know of a screen

    figure = Figure(figsize=(width * panels, 5), layout='constrained')
    figure.suptitle(title)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


MARKERS = 'os^D'
"""Of the first, second, ... family of backbones."""


def draw_variants(path: Path, title: str, rows: Sequence[Mapping[str, Any]], top1: Mapping[str, Top1]) -> None:
    """Latency of each route at the smallest batch, against parameters and, where known, published accuracy."""
    batch = min(row['batch'] for row in rows)
    rows = [row for row in rows if row['batch'] == batch]
    fused_parameters = {
        name: min(row['parameters'] for row in rows if row['name'] == name and 'parameters' in row)
        for name in dict.fromkeys(row['name'] for row in rows)
    }
    panels = [('parameters of the fused backbone, M', {n: count / 1e6 for n, count in fused_parameters.items()})]
    if known := {name: top1[name] for name in fused_parameters if name in top1}:
        kinds = {name.partition(':')[0]: 'distilled' if best.distilled else 'plain' for name, best in known.items()}
        label = f'published ImageNet top-1, %\n({", ".join(map(" ".join, kinds.items()))})'
        panels.append((label, {name: best.distilled or best.plain for name, best in known.items()}))
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    figure, axes = new_figure(f'{title}, batch {batch}', len(panels))
    styles = {
        route: dict(color='black', linestyle=':') if route == 'roofline' else dict(color=colormaps['tab20'](index))
        for index, route in enumerate(dict.fromkeys(row['route'] for row in rows))
    }
    families = list(dict.fromkeys(row['name'].partition(':')[0] for row in rows))
    # Names of the first family stand left of its fastest route, those of others right of their slowest.
    sides = [(min, (-6, 3), 'right')] + [(max, (6, -9), 'left')] * (len(families) - 1)
    for axis, (label, values) in zip(axes, panels, strict=True):
        for family, (extreme, offset, side), marker in zip(families, sides, MARKERS, strict=False):
            of_family = [row for row in rows if row['name'].startswith(f'{family}:') and row['name'] in values]
            for route, style in styles.items():
                line = sorted((values[row['name']], row['ms']) for row in of_family if row['route'] == route)
                if line:
                    heights, latencies = zip(*line, strict=True)
                    axis.plot(latencies, heights, marker=marker, markersize=4, **style)
            for name in dict.fromkeys(row['name'] for row in of_family):
                place = extreme(row['ms'] for row in of_family if row['name'] == name), values[name]
                axis.annotate(name.partition(':')[2], place, offset, textcoords='offset points', ha=side)
        axis.set(xlabel='median latency, ms', ylabel=label, xscale='log')
        for of_ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            of_ticks('{x:g}')
        axis.tick_params(axis='x', which='both', labelrotation=45)
        axis.grid(alpha=0.3)
        axis.margins(x=0.08)
    kinds = [
        Line2D([], [], color='gray', marker=marker, label=name) for name, marker in zip(families, MARKERS, strict=False)
    ]
    kinds += [Line2D([], [], label=route, **style) for route, style in styles.items()]
    figure.legend(handles=kinds, loc='outside right upper')
    figure.savefig(path, dpi=120)


PANELS = {
    'ms': ('median time, ms (bars: quartiles)', 1),
    'elementwise_bytes': ('moved by elementwise operations, MiB', 2**20),
    'drawn': ("gradients' distance from float64, drawn", 1),
    'squares': ("gradients' distance from float64, squares of maps", 1),
    'saved_bytes': ('saved for backward, MiB', 2**20),
    'process_bytes': ('peak of the process, MiB', 2**20),
    'peak_bytes': ('peak of tensors, MiB', 2**20),
}
"""Field that is drawn as bars -> its label, and what one unit of it is."""


def draw_bars(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time and memory of each route side by side, with each one's ratio to the first."""
    panels = [field for field in PANELS if all(field in row for row in rows)]
    groups = list(dict.fromkeys((row['name'], row['batch']) for row in rows))
    routes = list(dict.fromkeys(row['route'] for row in rows))
    pitch = 0.8 / len(routes)
    figure, axes = new_figure(title, len(panels), 3 + 0.7 * len(groups) * len(routes))
    for axis, field in zip(axes, panels, strict=True):
        label, unit = PANELS[field]
        first = {(row['name'], row['batch']): row[field] for row in reversed(rows)}
        for index, route in enumerate(routes):
            of_route = [row for row in rows if row['route'] == route]
            values = [row[field] / unit for row in of_route]
            places = [
                groups.index((row['name'], row['batch'])) + (index - (len(routes) - 1) / 2) * pitch for row in of_route
            ]
            errors = None
            if field == 'ms':
                errors = [[abs(row['ms'] - row['quartiles_ms'][side]) for row in of_route] for side in (0, 1)]
            bars = axis.bar(places, values, 0.9 * pitch, yerr=errors, capsize=3, label=route)
            if index:
                ratios = [f'x{row[field] / first[row["name"], row["batch"]]:.2f}' for row in of_route]
                axis.bar_label(bars, ratios, padding=3)
        axis.set(ylabel=label)
        axis.set_xticks(range(len(groups)), [f'{name}, batch {batch}'.replace(' ', '\n', 1) for name, batch in groups])
        axis.margins(y=0.12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper')
    figure.savefig(path, dpi=120)


SIDES = (
    (1, 0, 'left', 'center'),
    (-1, 0, 'right', 'center'),
    (0, 1, 'center', 'bottom'),
    (0, -1, 'center', 'top'),
    (0.7, 0.7, 'left', 'bottom'),
    (0.7, -0.7, 'left', 'top'),
    (-0.7, 0.7, 'right', 'bottom'),
    (-0.7, -0.7, 'right', 'top'),
)
"""Where a label may stand beside its point: across and up, and which of its edges that is."""


def label_points(axis: Any, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each point's label beside it, where it covers no point and no other label, if there is such a place.

    Args:
        axis: Of a figure whose limits and size are final.
        points: Place in the axis's units, label and colour.
    """
    from matplotlib.transforms import Bbox

    radius = axis.figure.dpi / 15
    taken = [Bbox([place - radius, place + radius]) for place in axis.transData.transform([p[:2] for p in points])]
    for x, y, label, colour in points:
        text = axis.annotate(label, (x, y), (0, 0), textcoords='offset points', fontsize='small', color=colour)
        text.set_bbox(dict(facecolor='white', edgecolor='none', alpha=0.7, pad=0.5))
        for distance, (across, up, edge, side) in product((7, 14, 21), SIDES):
            text.xyann = distance * across, distance * up
            text.set(ha=edge, va=side)
            box = text.get_window_extent()
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)


def draw_road(path: Path, conditions: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy of each step against its latency, on the paper's phone and here; a step without one stands below."""
    figure, axes = new_figure('From MobileNetV3-L to RepViT', 2)
    known = [row for row in rows if row['top1'] is not None]
    floor = min(row['top1'] for row in known) - 1
    panels = {'phone_ms': "the paper's phone, an iPhone 12", 'ms': f'this machine: {conditions}'}
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        axis.plot([row[field] for row in known], [row['top1'] for row in known], color='lightgrey', zorder=0)
        points = []
        for number, row in enumerate(rows, 1):
            colour = f'C{number - 1}'
            height, face, note = (row['top1'], colour, '') if row in known else (floor, 'none', ' (accuracy not given)')
            axis.scatter(row[field], height, s=30, facecolor=face, edgecolor=colour, zorder=2)
            points.append((row[field], height, f'{number} {row["title"]}{note}', colour))
        axis.set(title=title, xlabel='latency, ms', ylabel="ImageNet top-1, % (the paper's)")
        axis.grid(alpha=0.3)
        axis.margins(x=0.15, y=0.12)
        figure.draw_without_rendering()
        label_points(axis, points)
    figure.savefig(path, dpi=120)
