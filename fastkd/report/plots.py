"""The report's pictures, as PNG for papers and as SVG that takes on the page's colours."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot nothing but Agg and SVG is ever used
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .compression import Comparison, Made, pictures
from .estimates import short
from .records import Network, Row, Section, is_lsp, median, ratio

__all__ = ["Picture", "draw", "styles"]

INK = "#1b1b1e"  # in the SVG: the page's own text colour
GREY = "#858585"  # the student alone; readable on light and on dark
# Okabe and Ito's, told apart by colour-blind eyes, without those too pale on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
WIDTH = 7.0  # inches: a page's text width
SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
}

Style = dict[str, Any]
Value = Callable[[dict[str, Any]], "float | None"]
"""Of a look at the validation part, as in a history."""
End = tuple[str, Style, float, float]
"""Label and style of a line, and its last point."""


@dataclass(frozen=True)
class Picture:
    name: str
    """Of its file, without .png."""
    title: str
    caption: str
    svg: str
    png: bytes
    on_paper: bool = False
    """Its colours are made for a white ground, in dark mode too."""


def styles(sections: Sequence[Section | Comparison]) -> dict[str, Style]:
    """Colour and dashes of every row, by its label: the same in all pictures."""
    out: dict[str, Style] = {}
    count = 0
    rows: Iterator[Any] = (row for section in sections for row in section.rows)
    for row in rows:
        if row.label in out:
            continue
        if row.alone:
            out[row.label] = {"color": GREY, "linestyle": "-"}
        else:
            turn, index = divmod(count, len(PALETTE))
            out[row.label] = {"color": PALETTE[index], "linestyle": DASHES[turn % len(DASHES)]}
            count += 1
    return out


def draw(section: Section | Comparison, styles: dict[str, Style], prefix: str = "") -> list[Picture]:
    """All pictures for which the section has data.

    Args:
        prefix: of the file names.
    """
    out = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(SETTINGS)
        for name, title, (figure, caption, texts) in _made(section, styles):
            # Ids of clip paths are unique on the page and the same in every run.
            matplotlib.rcParams["svg.hashsalt"] = prefix + name
            out.append(
                Picture(
                    prefix + name,
                    title,
                    caption,
                    _svg(figure, title, texts),
                    _png(figure),
                    on_paper=name in ("features", "masks"),
                )
            )
    return out


def _made(section: Section | Comparison, styles: dict[str, Style]) -> Iterator[tuple[str, str, Made]]:
    if isinstance(section, Comparison):
        yield from pictures(section, styles)
        return
    for name, title, make in (
        ("validation", "Validation score over training", _validation),
        ("losses", "Training losses", _losses),
        ("lsp", "Local structure preserving loss per layer", _lsp),
        ("scores", "Test scores, seed by seed", _scores),
        ("features", "Distances between features on one shape", _features),
        ("cost", "Cost of a forward pass", _cost),
    ):
        made = make(section, styles)
        if made is not None:
            yield name, title, (*made, {})


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=300, facecolor="white")
    return file.getvalue()


def _svg(figure: Figure, title: str, texts: dict[str, list[str]]) -> str:
    """An element for an HTML page: no XML header, no name spaces, no fixed size, the text in its colour.

    Args:
        texts: by the gid of a collection, what is said over its points.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", dpi=200, transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?:figure|axes|axis|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend)_\d+"', "", text)
    for gid, said in texts.items():
        text = _told(text, gid, iter(said))
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    text = f'<svg {box[0]} role="img" aria-label="{title}">{body}'
    return re.sub(r"\n\s*\n+", "\n", text).replace(INK, "currentColor").strip()


def _told(text: str, gid: str, said: Iterator[str]) -> str:
    """Every point of the group gets a title, which a browser shows when it is hovered over."""
    start = text.index(f'<g id="{gid}">')
    end = text.index("</g>\n   </g>", start) if "</g>\n   </g>" in text[start:] else text.index("</g>", start)
    points = re.sub(
        r"(<use [^>]*?)/>", lambda use: f"{use[1]}><title>{escape(next(said))}</title></use>", text[start:end]
    )
    return text[:start] + points.replace(f' id="{gid}"', "") + text[end:]


# What the pictures share


@dataclass(frozen=True)
class _Curve:
    """Of a row: the epochs that all its seeds have, and there the median and the quartiles."""

    row: Row
    epochs: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3


def _curves(rows: list[Row], value: Value) -> list[_Curve]:
    """Of the rows that have the value."""
    out = []
    for row in rows:
        series = [
            {look["epoch"]: y for look in run.student.history if (y := value(look)) is not None} for run in row.runs
        ]
        series = [s for s in series if s]
        if epochs := sorted(set.intersection(*map(set, series))) if series else []:
            columns = [[s[epoch] for s in series] for epoch in epochs]
            low, middle, high = zip(*(_quartiles(c) for c in columns), strict=True)
            out.append(_Curve(row, epochs, list(middle), list(low), list(high)))
    return out


def _plot(ax: Axes, curves: list[_Curve], styles: dict[str, Style], log: bool = False) -> list[End]:
    """A line per row, with a band for the middle half of the seeds.

    Args:
        log: on a logarithmic axis, if the values span so much that they are not seen on another.
    """
    for c in curves:
        style = styles[c.row.label]
        if len(c.row.runs) > 1:
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
        ax.text(1.05, place, _name(label), transform=ax.transAxes, va="center", fontsize=8)


def _name(label: str) -> str:
    """Never so long that it leaves no room for what it names, and never a formula."""
    return (label if len(label) <= 28 else f"{label[:17]}…{label[-10:]}").replace("$", r"\$")


def _legend(figure: Figure, rows: list[Row], styles: dict[str, Style]) -> None:
    handles = [Line2D([], [], label=_name(row.label), **styles[row.label]) for row in rows]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), handlelength=2.2)


def _seeds(rows: list[Row]) -> str:
    counts = sorted({len(row.runs) for row in rows})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{several} seed{'' if counts == [1] else 's'}"


def _bands(rows: list[Row]) -> str:
    if all(len(row.runs) == 1 for row in rows):
        return "One seed per row."
    return f"Lines: median of {_seeds(rows)}; bands: the middle half of them."


# The pictures


def _validation(section: Section, styles: dict[str, Style]) -> tuple[Figure, str] | None:
    curves = _curves(section.done, lambda look: look["val"])
    if not curves:
        return None
    height = max(3.2, 0.2 * (len(curves) + 1) + 0.8)
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.subplots()
    ends = _plot(ax, curves, styles)
    # The rise would take most of the axis: it is made for the second half of training.
    shown = [
        y
        for c in curves
        for epoch, *values in zip(c.epochs, c.low, c.high, strict=True)
        if epoch >= c.epochs[-1] / 2
        for y in values
    ]
    style: Style = {"color": INK, "linestyle": (0, (2, 2))}
    last = max(c.epochs[-1] for c in curves)
    for label, networks in section.teachers().items():
        for network in networks:
            ax.axhline(network.val, linewidth=1, **style)
        shown += [network.val for network in networks]
        ends.append((label, style, last, networks[0].val))
    reach = max(shown) - min(shown) or 1.0
    bottom = min(shown) - 0.3 * reach
    ax.set_ylim(bottom, max(shown) + 0.05 * reach)
    ax.set_xlim(0, None)
    ax.set_xlabel("epoch")
    ax.set_ylabel("validation score (%)")
    _label(ax, ends, height - 0.6)
    caption = _bands(section.done) + " Dashed: the teacher at its selected epoch."
    if any(len({run.student.epochs for run in row.runs}) > 1 for row in section.done):
        caption += " A line ends where the first of its seeds stopped."
    if any(min(c.low) < bottom for c in curves):
        caption += " The first epochs lie below the axis."
    return figure, caption


def _losses(section: Section, styles: dict[str, Style]) -> tuple[Figure, str] | None:
    names = dict.fromkeys(
        name
        for row in section.done
        for run in row.runs
        for look in run.student.history
        for name in look["terms"]
        if not is_lsp(name)
    )
    panels = {"task (labels)" if name == "task" else name: _curves(section.done, _term(name)) for name in names}
    panels["weighted sum"] = _curves(section.done, lambda look: look["loss"])
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH, 1.9 * lines + 0.5))
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax, (name, curves) in zip(axes.flat, panels.items(), strict=False):
        _plot(ax, curves, styles, log=True)
        ax.set_title(name)
        ax.set_xlabel("epoch")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss")
    figure.align_ylabels()
    _legend(figure, section.done, styles)
    return figure, (
        f"{_bands(section.done)} Means over the training batches of an epoch, without weights; last the "
        "weighted sum that is minimised" + (", LSP included." if any(r.lsp for r in section.done) else ".")
    )


def _lsp(section: Section, styles: dict[str, Style]) -> tuple[Figure, str] | None:
    layers: dict[tuple[str, ...], list[_Curve]] = {}
    for row in section.done:
        for name, loss in row.runs[0].losses.items():
            if is_lsp(name):
                key = (str(loss.get("student_layer")), str(loss.get("teacher_layer")), name)
                layers.setdefault(key, []).extend(_curves([row], _term(name)))
    layers = {key: curves for key, curves in sorted(layers.items()) if curves}
    if not layers:
        return None
    height = 1.9 if len(layers) > 1 else 2.6
    figure = Figure(figsize=(WIDTH, height * len(layers)))
    axes = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
    for ax, ((student, teacher, name), curves) in zip(axes, layers.items(), strict=True):
        ends = _plot(ax, curves, styles, log=True)
        ax.set_title(f"student {student}, teacher {teacher}" + ("" if name == "lsp" else f" ({name})"))
        ax.set_ylabel("LSP loss")
        _label(ax, ends, height - 0.6)
    axes[-1].set_xlabel("epoch")
    figure.align_ylabels()
    return figure, (
        f"{_bands([c.row for curves in layers.values() for c in curves])} Divergence of the student's "
        "distribution over a node's neighbours from the teacher's, mean over nodes, without its weight. "
        "Rows without this loss have no record of it."
    )


def _term(name: str) -> Value:
    return lambda look: look["terms"].get(name)


def _scores(section: Section, styles: dict[str, Style]) -> tuple[Figure, str] | None:
    rows = section.done
    figure = Figure(figsize=(WIDTH, 0.34 * len(rows) + 1.0))
    ax = figure.subplots()
    ends = []
    for y, row in enumerate(rows):
        color, estimate, values = styles[row.label]["color"], row.test, [run.student.test for run in row.runs]
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
    for label, networks in section.teachers().items():
        for network in networks:
            if not low - reach <= network.test <= high + reach:
                beyond.append(f"{label} {network.test:.2f} %")
                continue
            ends.append(network.test)
            ax.axvline(network.test, color=INK, linewidth=1, linestyle=(0, (2, 2)))
            ax.annotate(
                label,
                (network.test, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
    ax.set_xlim(min(ends) - 0.05 * reach, max(ends) + 0.05 * reach)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [_name(row.label) for row in rows], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("test score (%)")
    caption = "Diamonds: mean, with the 95 % interval (Student's t over seeds); discs: the seeds."
    if beyond:
        caption += f" Beyond the axis: {', '.join(beyond)}."
    return figure, caption


def _features(section: Section, styles: dict[str, Style]) -> tuple[Figure, str] | None:
    """The paper's: near and far from one point in feature space, for teacher and students."""
    chosen = {lsp: _pictured([row for row in section.done if row.lsp == lsp]) for lsp in (True, False)}
    with_lsp, without = chosen[True], chosen[False]
    found = with_lsp or without
    if found is None:
        return None
    if without and without[1]["points"] != found[1]["points"]:
        without = None  # another shape shows nothing beside this one
    panels = [("teacher", found[1], "teacher")]
    panels += [("student with LSP", with_lsp[1], "student")] if with_lsp else []
    panels += [("student without LSP" if with_lsp else "student", without[1], "student")] if without else []

    points, at = found[1]["points"], int(found[1]["at"])
    x, y, depth = _seen(points, *_view(points))
    order = sorted(range(len(points)), key=lambda i: depth[i])  # the nearest last, and larger
    far, near = depth[order[0]], depth[order[-1]]
    size = min(26.0, max(3.0, 4500 / len(points)))
    sizes = [size * (0.6 + 0.8 * (depth[i] - far) / (near - far or 1.0)) for i in order]
    colors = matplotlib.colors.ListedColormap(matplotlib.colormaps["viridis"](range(0, 240)))  # without the palest
    side = WIDTH / 3
    shape = (max(y) - min(y)) / (max(x) - min(x) or 1.0)
    figure = Figure(figsize=(side * len(panels), side * min(max(shape, 0.5), 1.3) + 0.95))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, picture, network) in zip(axes, panels, strict=True):
        scattered = ax.scatter(
            [x[i] for i in order],
            [y[i] for i in order],
            c=[picture[network][i] for i in order],
            cmap=colors,
            vmin=0,
            vmax=1,
            s=sizes,
            linewidths=0,
            rasterized=True,
        )
        ax.plot(
            [x[at]], [y[at]], "o", markersize=9, markerfacecolor="none", markeredgecolor=PALETTE[1], markeredgewidth=1.8
        )
        ax.set_aspect("equal")
        ax.set_axis_off()
        ax.set_title(f"{title}\n{picture.get(f'{network}_layer', '')}".strip(), loc="center")
    bar = figure.colorbar(scattered, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_label("feature distance to the ringed point (1: the farthest)")
    bar.outline.set_visible(False)
    who = " and ".join(f"{row.label} (seed {seed})" for row, _, seed in (c for c in (with_lsp, without) if c))
    caption = (
        "One shape of the test part, its points coloured by the distance of their features to those of the "
        f"ringed point, at the layers named above. Students: {who}."
    )
    if len({picture.get("student_layer") for _, picture, network in panels if network == "student"}) > 1:
        caption += " The students' layers are not the same."
    return figure, caption


def _pictured(rows: list[Row]) -> tuple[Row, dict[str, Any], int] | None:
    """Of the row with the fewest losses, the first seed that has a picture."""
    for row in sorted(rows, key=lambda row: len(row.runs[0].losses)):
        for run in row.runs:
            if run.picture is not None:
                return row, run.picture, run.seed
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


def _cost(section: Section, styles: dict[str, Style]) -> tuple[Figure, str] | None:
    teachers = section.teachers()
    networks: list[tuple[str, str, list[Network]]] = [(label, INK, found) for label, found in teachers.items()]
    students: dict[tuple, list[Row]] = {}
    for row in section.done:
        first = row.runs[0].student
        students.setdefault((first.parameters, first.cost["mmacs"]), []).append(row)
    for rows in students.values():
        label = "student" if len(students) == 1 else _name(rows[0].label)
        if len(students) > 1 and len(rows) > 1:
            label += f"\nand {len(rows) - 1} more row{'s' if len(rows) > 2 else ''}"
        color = styles[rows[0].label]["color"] if len(rows) == 1 else GREY
        networks.append((label, color, [run.student for row in rows for run in row.runs]))
    costs = {
        "parameters": "parameters",
        "MACs (M)": "mmacs",
        "latency (ms)": "latency_ms",
        "peak memory (MB)": "peak_memory_mb",
    }
    quantities = [
        (name, values) for name, key in costs.items() if any(values := [median(found, key) for _, _, found in networks])
    ]
    if not quantities:
        return None
    figure = Figure(figsize=(WIDTH, 0.36 * len(networks) + 0.75))
    axes = figure.subplots(1, len(quantities), squeeze=False, sharey=True)[0]
    for ax, (name, values) in zip(axes, quantities, strict=True):
        for y, ((_, color, _), value) in enumerate(zip(networks, values, strict=True)):
            if value is None:
                ax.text(0, y, " not measured", va="center", fontsize=8)
                continue
            ax.barh(y, value, height=0.55, color=color)
            text = f" {short(value)}"
            if len(teachers) == 1 and y > 0 and values[0] and value > 0:
                text += f" ({ratio(values[0] / value)})"
            ax.text(value, y, text, va="center", fontsize=8)
        ax.set_xlim(0, 1.75 * max(v for v in values if v is not None))
        ax.set_title(name)
        ax.set_xticks([])
        ax.grid(False)
        ax.spines["bottom"].set_visible(False)
        ax.set_yticks(range(len(networks)), [label for label, _, _ in networks], fontsize=9)
        ax.tick_params(axis="y", length=0)
    axes[0].set_ylim(len(networks) - 0.5, -0.5)
    threads = sorted({int(n.cost["threads"]) for _, _, found in networks for n in found if n.cost["threads"]})
    return figure, (
        "Over one batch of the test part; medians over runs"
        + (f"; threads: {' or '.join(map(str, threads))}" if threads else "")
        + ". In brackets: the share of the teacher's. MACs (multiply-adds) are those of dense "
        "products and convolutions; sparse products are not counted. Peak memory is that beyond what was "
        "held before; on the CPU, what the process reuses is not seen."
    )
