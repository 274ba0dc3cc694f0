"""Pictures of compression."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from matplotlib.ticker import MaxNLocator

from ..compress.record import CONTROLS, CompressRecord, Search
from ..compress.tables import Method, score
from ..lab.rows import Section
from .plots import DASHED, GREY, INK, PALETTE, RING, Drawing, Style, axes

__all__ = ["pictures"]

BLUE, RED, GREEN = PALETTE[:3]
FULL: Style = {"color": GREY, "linewidth": 0.8, "linestyle": DASHED}
LEGEND: Style = {"loc": "outside upper left", "ncols": 4, "handlelength": 1.5}
LETTER = 0.009  # of a label of 7 points, in axes of this width


def pictures(section: Section[CompressRecord], styles: dict[str, Style]) -> Iterator[Drawing]:
    """All for which the section has data."""
    method = _detailed(section)
    record = method.records[0]
    whose = f"{method.label}, seed {record.seed}"
    if len(section.done) > 1:
        yield _compared(section, styles)
    yield _front(record.search, whose)
    if record.search.history:
        yield _convergence(record.search, whose)
        yield _masks(record, whose)
    yield _layers(method)
    if any(r.compact.history for r in method.records):
        yield _tuning(section, method, styles)


def _detailed(section: Section[CompressRecord]) -> Method:
    """The method whose search is drawn: the best one that has one."""
    searched = [row for row in section.done if row.records[0].search.history] or section.done
    methods = [row for row in searched if row.records[0].search.algorithm not in CONTROLS] or searched
    return max(methods, key=lambda row: row.test.mean)


def _compared(section: Section[CompressRecord], styles: dict[str, Style]) -> Drawing:
    figure, [left, right] = axes(3.3, columns=2)
    for row in section.done:
        style = styles[row.label]
        # As the dashes, where there are more rows than colours.
        mark: Style = {"marker": "o" if style["linestyle"] == "-" else "s", "alpha": 0.8}
        for k, record in enumerate(row.records):
            front, full = record.search.front, record.search.full_cost
            points = sorted(zip(front.cost, front.quality, strict=True), key=lambda point: point[0])
            x, y = [100 * cost / full for cost, _ in points], [100 * quality for _, quality in points]
            left.plot(x, y, markersize=3, linewidth=1, label=row.label if k == 0 else None, **mark, **style)
            kept = [100 * record.left("macs")]
            right.plot(kept, [record.test], markersize=4, linestyle="", color=style["color"], **mark)
    search = section.records[0].search
    left.set(xlabel=f"{_cost(search)} left (%)", ylabel=f"{search.quality} on the fitness images (%)")
    right.set(xlabel="MACs left (%)", ylabel=f"{score(section)} (%)")
    for record in section.records:
        right.axhline(record.dense.test, **FULL)
    figure.legend(**LEGEND)
    caption = (
        "Left: the fronts that were found, a line per seed. Right: the networks that were taken, as they "
        "are at the end, a mark per seed; dashed: the full network."
    )
    return Drawing("methods", "Methods compared", figure, caption)


def _cost(search: Search) -> str:
    return {"macs": "MACs"}.get(search.cost, search.cost)


def _front(search: Search, whose: str) -> Drawing:
    figure, [ax] = axes(3.6)
    full, scale, ids = search.full_cost, 100 if search.share else 1, search.individuals.id or []
    cost = [100 * c / full for c in search.individuals.cost]
    quality = [scale * q for q in search.individuals.quality]

    def line(costs: Iterable[float], qualities: Iterable[float], label: str, **style: Any) -> None:
        points = sorted(zip(costs, qualities, strict=True))
        ax.plot([100 * c / full for c, _ in points], [scale * q for _, q in points], label=label, **style)

    ax.scatter(cost, quality, s=9, color=BLUE, alpha=0.45, linewidths=0, label="individuals", gid="points")
    line(search.front.cost, search.front.quality, "front", color=BLUE, linewidth=1.2)
    if tested := search.front.test:  # older records have none
        line(search.front.cost, tested, "front, on test images", color=BLUE, linewidth=1, linestyle=(0, (3, 2)))
    line(search.l1.cost, search.l1.quality, "uniform L1", color=GREY, marker="s", markersize=3, linewidth=1)
    ax.plot([100], [scale * search.full_quality], "D", color=INK, markersize=5, label="full network")
    if search.chosen in ids:
        at = ids.index(search.chosen)
        ax.plot([cost[at]], [quality[at]], "o", label="taken", **RING)
    ylabel = f"{search.quality} on the fitness images" + (" (%)" if search.share else "")
    ax.set(xlabel=f"{_cost(search)} left (%)", ylabel=ylabel, xlim=(0, 103))
    ax.legend(loc="lower right")
    caption = (
        f"{whose}: {len(cost):,} networks that were evaluated, those that no other one beats in both"
        + (", these also on test images, where selection does not flatter them" if tested else "")
        + ", and the same share of every layer's filters by their L1 norm. On the page, a disc tells its mask's "
        "name."
    )
    texts = [
        f"{name}: {search.quality} {q:.4g}{' %' if search.share else ''}, {c:.1f} % of the {_cost(search)}"
        for name, q, c in zip(ids, quality, cost, strict=True)
    ]
    return Drawing("front", "What the search looked at", figure, caption, texts)


def _convergence(search: Search, whose: str) -> Drawing:
    history = search.history
    volumes = [look.hypervolume for look in history if look.hypervolume is not None]
    of_volumes = len(volumes) == len(history)
    figure, panels = axes(2.5, columns=3 if of_volumes else 2)
    x = [look.generation for look in history]
    panels[0].plot(x, [look.best for look in history], color=BLUE, label="best so far")
    panels[0].plot(x, [look.mean for look in history], color=RED, linestyle=(0, (5, 1.5)), label="mean")
    panels[0].legend()
    panels[1].plot(x, [look.diversity for look in history], color=GREEN)
    panels[1].set_ylim(0, None)
    if of_volumes:
        panels[2].plot(x, volumes, color=BLUE)
    for ax, label in zip(panels, ("score", "diversity", "hypervolume"), strict=False):
        ax.set(xlabel="generation", ylabel=label)
    caption = f"{whose}. Diversity: how likely two individuals of a generation differ in a filter." + (
        " Hypervolume: of all that no other individual beats." if of_volumes else ""
    )
    return Drawing("convergence", "Convergence of the search", figure, caption)


def _masks(record: CompressRecord, whose: str) -> Drawing:
    layers = record.layers
    genes = sum(layer.size for layer in layers)
    rows = []
    for look in record.search.history:
        bits = bin(int(look.mask, 16))[2:].zfill(4 * len(look.mask))
        rows.append([int(bit) for bit in bits[:genes]])
    figure, [ax] = axes(min(5.0, 1.1 + 0.06 * len(rows)))
    extent = (0, genes, len(rows) + 0.5, 0.5)
    ax.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest", extent=extent)
    ends = [0, *itertools.accumulate(layer.size for layer in layers)]
    for end in ends[1:-1]:
        ax.axvline(end, color=RED, linewidth=0.6)
    named: list[tuple[float, float, str]] = []  # middle, half the text's width, text: no two overlap
    for a, b, layer in sorted(zip(ends, ends[1:], layers, strict=False), key=lambda each: each[0] - each[1]):
        middle, half = (a + b) / 2, genes * (len(layer.name) + 1) * LETTER / 2
        if all(abs(middle - other) > half + theirs for other, theirs, _ in named):
            named.append((middle, half, layer.name))
    ax.set_xticks([middle for middle, *_ in named], [name for *_, name in named], fontsize=7)
    ax.tick_params(axis="x", length=0)
    ax.grid(False)
    ax.set_ylabel("generation")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    caption = f"{whose}. A column per filter, dark where it is kept; lines part the layers."
    return Drawing("masks", "The best mask, generation by generation", figure, caption, on_paper=True)


def _layers(method: Method) -> Drawing:
    layers = method.records[0].layers
    kept = [statistics.mean(record.layers[k].kept for record in method.records) for k in range(len(layers))]
    figure, [ax] = axes(max(1.4, 0.6 + 0.19 * len(layers)))
    places, sizes = range(len(layers)), [layer.size for layer in layers]
    ax.barh(places, sizes, color=GREY, alpha=0.3, height=0.7)
    ax.barh(places, kept, color=BLUE, height=0.7)
    for y, size, k in zip(places, sizes, kept, strict=True):
        ax.text(size, y, f" {k:.3g} of {size}", va="center", fontsize=7)
    ax.set_yticks(places, [layer.name for layer in layers], fontsize=7)
    ax.set(xlabel="filters", xlim=(0, 1.15 * max(sizes)), ylim=(len(layers) - 0.5, -0.5))
    ax.grid(False, axis="y")
    n = len(method.records)
    several = f", mean of {n} seeds" if n > 1 else f", seed {method.records[0].seed}"
    caption = (
        f"{method.label}{several}. Layers that are added to each other keep the same filters and are one "
        "row, by the name of the first."
    )
    return Drawing("layers", "Filters that are kept", figure, caption)


def _tuning(section: Section[CompressRecord], method: Method, styles: dict[str, Style]) -> Drawing:
    figure, [left, right] = axes(2.8, columns=2)
    for ax, key, label in ((left, "val", "validation score (%)"), (right, "loss", "loss")):
        ax.set(xlabel="epoch", ylabel=label)
        for row in section.done:
            for k, record in enumerate(row.records):
                values = [(look.epoch + 1, getattr(look, key)) for look in record.compact.history]
                looks = [(epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]
                if looks:
                    x, y = zip(*looks, strict=True)
                    ax.plot(x, y, alpha=0.8, linewidth=1.2, label=row.label if k == 0 else None, **styles[row.label])
    for record in method.records:
        left.axhline(record.dense.val, **FULL)
    figure.legend(*left.get_legend_handles_labels(), **LEGEND)
    return Drawing("finetuning", "Fine-tuning", figure, "A line per seed; dashed: the full network.")
