"""Pictures of distillation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import matplotlib

from ..distill.record import DistillRecord, Network, ShapePicture
from ..distill.tables import Students, costs, ratio, teachers
from ..lab.rows import Section
from ..lab.table import short
from . import curves
from .plots import DASHED, GREY, INK, RING, WIDTH, Drawing, Style, axes, name_of

__all__ = ["pictures"]

COSTS = {
    "parameters": "parameters",
    "MACs (M)": "mmacs",
    "latency (ms)": "latency_ms",
    "peak memory (MB)": "peak_memory_mb",
}


def pictures(section: Section[DistillRecord], styles: dict[str, Style]) -> Iterator[Drawing]:
    """All for which the section has data."""
    for draw in (curves.validation, curves.losses, curves.lsp, _scores, _features, _cost):
        drawing = draw(section, styles)
        if drawing is not None:
            yield drawing


def _scores(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing:
    rows = section.done
    figure, [ax] = axes(0.34 * len(rows) + 1.0)
    ends = []
    for y, row in enumerate(rows):
        color, estimate, values = styles[row.label]["color"], row.test, [record.test for record in row.records]
        ends += values
        if estimate.half is not None:
            low, high = estimate.mean - estimate.half, estimate.mean + estimate.half
            ax.plot([low, high], [y - 0.16] * 2, color=color, linewidth=2.2, solid_capstyle="butt")
            ends += [low, high]
        ax.plot([estimate.mean], [y - 0.16], "D", color=color, markersize=5)
        ax.plot(values, [y + 0.16] * len(values), "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
    reach = max(ends) - min(ends) or 1.0
    low, high = min(ends), max(ends)
    beyond = []
    for reference in teachers(section):
        for network in reference.records:
            if not low - reach <= network.test <= high + reach:
                beyond.append(f"{reference.label} {network.test:.2f} %")
                continue
            ends.append(network.test)
            ax.axvline(network.test, color=INK, linewidth=1, linestyle=DASHED)
            ax.annotate(
                reference.label,
                (network.test, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    ax.set(xlabel="test score (%)", ylim=(len(rows) - 0.5, -0.5))
    ax.set_xlim(min(ends) - 0.05 * reach, max(ends) + 0.05 * reach)
    ax.set_yticks(range(len(rows)), [name_of(row.label) for row in rows], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    caption = "Diamonds: mean, with the 95 % interval (Student's t over seeds); discs: the seeds."
    if beyond:
        caption += f" Beyond the axis: {', '.join(beyond)}."
    return Drawing("scores", "Test scores, seed by seed", figure, caption)


# --- features on a shape ---------------------------------------------------------------------------


def _features(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
    """The paper's: near and far from one point in feature space, for teacher and students."""
    with_lsp, without = (_pictured([row for row in section.done if row.records[0].lsp is lsp]) for lsp in (True, False))
    found = with_lsp or without
    if found is None:
        return None
    shape = found[1]
    if without and without[1].points != shape.points:
        without = None  # another shape shows nothing beside this one
    panels = [("teacher", shape.teacher, shape.teacher_layer)]
    students = [c for c in (with_lsp, without) if c is not None]
    for chosen in students:
        title = "student with LSP" if chosen is with_lsp else "student without LSP" if with_lsp else "student"
        panels.append((title, chosen[1].student, chosen[1].student_layer))

    x, y, depth = _seen(shape.points, *_view(shape.points))
    order = sorted(range(len(depth)), key=lambda i: depth[i])  # the nearest last, and larger
    far, near = depth[order[0]], depth[order[-1]]
    size = min(26.0, max(3.0, 4500 / len(depth)))
    sizes = [size * (0.6 + 0.8 * (depth[i] - far) / (near - far or 1.0)) for i in order]
    colors = matplotlib.colors.ListedColormap(matplotlib.colormaps["viridis"](range(0, 240)))  # without the palest
    side = WIDTH / 3
    tall = (max(y) - min(y)) / (max(x) - min(x) or 1.0)
    height = side * min(max(tall, 0.5), 1.3) + 0.95
    figure, clouds = axes(height, columns=len(panels), width=side * len(panels))
    for ax, (title, distances, layer) in zip(clouds, panels, strict=True):
        across, up, shade = ([column[i] for i in order] for column in (x, y, distances))
        scattered = ax.scatter(across, up, c=shade, cmap=colors, vmin=0, vmax=1, s=sizes, linewidths=0, rasterized=True)
        ax.plot([x[shape.at]], [y[shape.at]], "o", **RING)
        ax.set_aspect("equal")
        ax.set_axis_off()
        ax.set_title(f"{title}\n{layer}".strip(), loc="center")
    bar = figure.colorbar(scattered, ax=clouds, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("feature distance to the ringed point (1: the farthest)")
    bar.outline.set_visible(False)
    who = " and ".join(f"{row.label} (seed {seed})" for row, _, seed in students)
    caption = (
        "One shape of the test part, its points coloured by the distance of their features to those of the "
        f"ringed point, at the layers named above. Students: {who}."
    )
    if len({picture.student_layer for _, picture, _ in students}) > 1:
        caption += " The students' layers are not the same."
    return Drawing("features", "Distances between features on one shape", figure, caption, on_paper=True)


def _pictured(rows: list[Students]) -> tuple[Students, ShapePicture, int] | None:
    """Of the row with the fewest losses, the first seed that has a picture."""
    for row in sorted(rows, key=lambda row: len(row.records[0].losses)):
        for record in row.records:
            if record.picture is not None:
                return row, record.picture, record.seed
    return None


def _seen(points: list[list[float]], elevation: float, azimuth: float) -> list[list[float]]:
    """Right, up and towards the eye, of every point, from a direction in degrees (z up, no perspective)."""
    e, a = math.radians(elevation), math.radians(azimuth)
    axes = (
        (-math.sin(a), math.cos(a), 0.0),
        (-math.cos(a) * math.sin(e), -math.sin(a) * math.sin(e), math.cos(e)),
        (math.cos(a) * math.cos(e), math.sin(a) * math.cos(e), math.sin(e)),
    )
    return [[sum(u * v for u, v in zip(axis, point, strict=True)) for point in points] for axis in axes]


def _view(points: list[list[float]]) -> tuple[float, float]:
    """Elevation and azimuth. A flat cloud is looked at from its broad side, and so is an image's, with
    brightness as its third coordinate and hence few values of it; any other from a corner."""
    columns = list(zip(*points, strict=True))
    spans = [max(c) - min(c) for c in columns]
    x, y, z = (len(set(c)) for c in columns)
    thin = min(range(3), key=lambda i: spans[i])
    if 3 * z < min(x, y):
        thin = 2
    elif spans[thin] > 0.5 * sorted(spans)[1]:
        return 20, -60
    return ((10, -10), (10, -80), (80, -90))[thin]


# --- costs -----------------------------------------------------------------------------------------


def _cost(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
    references = teachers(section)
    bars = [(row.label, INK, row.records) for row in references] + _sizes(section, styles)
    quantities = [
        (name, values) for name, key in COSTS.items() if any(values := [costs(found, key) for _, _, found in bars])
    ]
    if not quantities:
        return None
    figure, panels = axes(0.36 * len(bars) + 0.75, columns=len(quantities), sharey=True)
    for ax, (name, values) in zip(panels, quantities, strict=True):
        for y, ((_, color, _), value) in enumerate(zip(bars, values, strict=True)):
            if value is None:
                ax.text(0, y, " not measured", va="center", fontsize=8)
                continue
            ax.barh(y, value, height=0.55, color=color)
            text = f" {short(value)}"
            if len(references) == 1 and y > 0 and values[0] and value > 0:
                text += f" ({ratio(values[0] / value)})"
            ax.text(value, y, text, va="center", fontsize=8)
        ax.set(title=name, xlim=(0, 1.75 * max(v for v in values if v is not None)), xticks=[])
        ax.grid(False)
        ax.spines["bottom"].set_visible(False)
        ax.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=9)
        ax.tick_params(axis="y", length=0)
    panels[0].set_ylim(len(bars) - 0.5, -0.5)
    threads = sorted({n.cost.threads for _, _, found in bars for n in found if n.cost and n.cost.threads})
    caption = (
        "Over one batch of the test part; medians over runs"
        + (f"; threads: {' or '.join(map(str, threads))}" if threads else "")
        + ". In brackets: the share of the teacher's. MACs (multiply-adds) are those of dense "
        "products and convolutions; sparse products are not counted. Peak memory is that beyond what was "
        "held before; on the CPU, what the process reuses is not seen."
    )
    return Drawing("cost", "Cost of a forward pass", figure, caption)


def _sizes(section: Section[DistillRecord], styles: dict[str, Style]) -> list[tuple[str, str, list[Network]]]:
    """Students of the same size are one bar: label, colour, networks."""
    sizes: dict[tuple[float | None, ...], list[Students]] = {}
    for row in section.done:
        first = row.records[0].student
        sizes.setdefault((first.parameters, first.cost.mmacs if first.cost else None), []).append(row)
    out = []
    for rows in sizes.values():
        label = "student" if len(sizes) == 1 else name_of(rows[0].label)
        if len(sizes) > 1 and len(rows) > 1:
            label += f"\nand {len(rows) - 1} more row{'s' if len(rows) > 2 else ''}"
        color = styles[rows[0].label]["color"] if len(rows) == 1 else GREY
        out.append((label, color, [record.student for row in rows for record in row.records]))
    return out
