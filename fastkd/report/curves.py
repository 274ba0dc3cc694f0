"""Pictures of distillation over the epochs of training: scores and losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..distill.record import DistillRecord, Look, is_lsp
from ..distill.tables import Students, teachers
from ..lab.rows import Section
from .plots import DASHED, INK, Drawing, Style, axes, name_of

__all__ = ["losses", "lsp", "validation"]

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


def validation(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
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


def losses(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
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


def lsp(section: Section[DistillRecord], styles: dict[str, Style]) -> Drawing | None:
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
