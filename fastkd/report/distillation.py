"""Pictures of distillation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..distill.record import DistillRecord, Look, Network, ShapePicture, is_lsp
from ..distill.tables import Students, costs, ratio, teachers
from ..lab.rows import Section
from ..lab.table import short
from .plots import DASHED, GREY, INK, RING, WIDTH, Drawing, Style, axes, name_of

__all__ = ["pictures"]

COSTS = {
    "parameters": "parameters",
    "MACs (M)": "mmacs",
    "latency (ms)": "latency_ms",
    "peak memory (MB)": "peak_memory_mb",
}
Value = Callable[[Look], "float | None"]
End = tuple[str, Style, float, float]
"""Label and style of a line, and its last point."""


@dataclass(frozen=True)
class Curve:
    """Of a row: the epochs that all its seeds have, and there the median and the quartiles."""

    row: Students
    epochs: list[int]
    low: Sequence[float]
    middle: Sequence[float]
    high: Sequence[float]


def pictures(section: Section[DistillRecord], styles: dict[str, Style]) -> Iterator[Drawing]:
    """All for which the section has data."""
    for draw in (_validation, _losses, _lsp, _scores, _features, _cost):
        drawing = draw(section, styles)
        if drawing is not None:
            yield drawing


# --- over the epochs of training ---------------------------------------------------------------------


def _validation(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
    curves = _curves(section.done, lambda look: look.val)
    if not curves:
        return None
    height = max(3.2, 0.2 * (len(curves) + 1) + 0.8)
    figure, [ax] = axes(height)
    ends = _plot(ax, curves, styles)
    # The rise would take most of the axis, which is for the second half of training.
    shown = [
        y
        for c in curves
        for epoch, *values in zip(c.epochs, c.low, c.high, strict=True)
        if epoch >= c.epochs[-1] / 2
        for y in values
    ]
    style: Style = {"color": INK, "linestyle": DASHED}
    last = max(c.epochs[-1] for c in curves)
    for reference in teachers(section):
        scores = [network.val for network in reference.records]
        for score in scores:
            ax.axhline(score, linewidth=1, **style)
        shown += scores
        ends.append((reference.label, style, last, scores[0]))
    reach = max(shown) - min(shown) or 1.0
    bottom = min(shown) - 0.3 * reach
    ax.set(xlabel="epoch", ylabel="validation score (%)", xlim=(0, None), ylim=(bottom, max(shown) + 0.05 * reach))
    _label(ax, ends, height - 0.6)
    caption = _bands(section.done) + " Dashed: the teacher at its selected epoch."
    if any(len({record.student.epochs for record in row.records}) > 1 for row in section.done):
        caption += " A line ends where the first of its seeds stopped."
    if any(min(c.low) < bottom for c in curves):
        caption += " The first epochs lie below the axis."
    return Drawing("validation", "Validation score over training", figure, caption)


def _losses(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
    names = dict.fromkeys(
        name for record in section.records for look in record.student.history for name in look.terms if not is_lsp(name)
    )
    panels = {"task (labels)" if name == "task" else name: _curves(section.done, _term(name)) for name in names}
    panels["weighted sum"] = _curves(section.done, lambda look: look.loss)
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, places = axes(1.9 * lines + 0.5, lines, columns)
    for ax, (name, curves) in zip(places, panels.items(), strict=False):
        _plot(ax, curves, styles, log=True)
        ax.set(title=name, xlabel="epoch")
    for ax in places[len(panels) :]:
        ax.set_visible(False)
    for ax in places[::columns]:
        ax.set_ylabel("loss")
    figure.align_ylabels()
    handles = [Line2D([], [], label=name_of(row.label), **styles[row.label]) for row in section.done]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), handlelength=2.2)
    caption = (
        f"{_bands(section.done)} Means over the training batches of an epoch, without weights; last the "
        "weighted sum that is minimised" + (", LSP included." if any(r.lsp for r in section.records) else ".")
    )
    return Drawing("losses", "Training losses", figure, caption)


def _lsp(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
    layers: dict[tuple[str, ...], list[Curve]] = {}
    for row in section.done:
        for name, loss in row.records[0].losses.items():
            if is_lsp(name):
                key = (str(loss.get("student_layer")), str(loss.get("teacher_layer")), name)
                layers.setdefault(key, []).extend(_curves([row], _term(name)))
    layers = {key: curves for key, curves in sorted(layers.items()) if curves}
    if not layers:
        return None
    height = 1.9 if len(layers) > 1 else 2.6
    figure, panels = axes(height * len(layers), len(layers), sharex=True)
    for ax, ((student, teacher, name), curves) in zip(panels, layers.items(), strict=True):
        ends = _plot(ax, curves, styles, log=True)
        title = f"student {student}, teacher {teacher}" + ("" if name == "lsp" else f" ({name})")
        ax.set(title=title, ylabel="LSP loss")
        _label(ax, ends, height - 0.6)
    panels[-1].set_xlabel("epoch")
    figure.align_ylabels()
    caption = (
        f"{_bands([c.row for curves in layers.values() for c in curves])} Divergence of the student's "
        "distribution over a node's neighbours from the teacher's, mean over nodes, without its weight. "
        "Rows without this loss have no record of it."
    )
    return Drawing("lsp", "Local structure preserving loss per layer", figure, caption)


def _term(name: str) -> Value:
    return lambda look: look.terms.get(name)


def _curves(rows: list[Students], value: Value) -> list[Curve]:
    """Of the rows that have the value."""
    out = []
    for row in rows:
        series = [
            {look.epoch: y for look in record.student.history if (y := value(look)) is not None}
            for record in row.records
        ]
        series = [s for s in series if s]
        if epochs := sorted(set.intersection(*map(set, series))) if series else []:
            low, middle, high = zip(*(_quartiles([s[epoch] for s in series]) for epoch in epochs), strict=True)
            out.append(Curve(row, epochs, low, middle, high))
    return out


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3


def _plot(ax: Axes, curves: list[Curve], styles: dict[str, Style], log: bool = False) -> list[End]:
    """A line per row, with a band for the middle half of the seeds.

    Args:
        log: on a logarithmic axis, if the values span so much that they are not seen on another.
    """
    for c in curves:
        style = styles[c.row.label]
        if len(c.row.records) > 1:
            ax.fill_between(c.epochs, c.low, c.high, color=style["color"], alpha=0.15, linewidth=0)
        ax.plot(c.epochs, c.middle, marker="o" if len(c.epochs) == 1 else None, markersize=3, **style)
    means = [y for c in curves for y in c.middle]
    if log and min(means) > 0 and max(means) > 20 * min(means):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3) if max(means) < 100 * min(means) else (1,)))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    ax.margins(x=0.01)
    return [(c.row.label, styles[c.row.label], c.epochs[-1], c.middle[-1]) for c in curves]


def _label(ax: Axes, ends: list[End], height: float) -> None:
    """Names beside the ends of the lines, pushed apart where they would lie over each other.

    Args:
        height: of the axes in inches, about.
    """
    scale = math.log if ax.get_yscale() == "log" else float
    low, high = map(scale, ax.get_ylim())
    line = 0.145 / height
    ends = sorted(ends, key=lambda end: scale(end[3]))
    places = [min(max((scale(y) - low) / (high - low), 0.0), 1.0) for *_, y in ends]
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = line - (places[i + 1] - places[i])
            if overlap > 0:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    last = max((x for _, _, x, _ in ends), default=0)
    for place, (label, style, x, y) in zip(places, ends, strict=True):
        if x < last:  # so that what leads to the name is not taken for the line
            ax.plot([x], [y], "o", markersize=3, color=style["color"])
            style = {**style, "linestyle": (0, (1, 3))}
        ax.annotate(
            "",
            (x, y),
            (1.04, place),
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 1, **style},
        )
        ax.text(1.05, place, name_of(label), transform=ax.transAxes, va="center", fontsize=8)


def _bands(rows: list[Students]) -> str:
    counts = sorted({len(row.records) for row in rows})
    if counts == [1]:
        return "One seed per row."
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"Lines: median of {several} seeds; bands: the middle half of them."


# --- scores ----------------------------------------------------------------------------------------


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
