"""Of compressed networks: records, tables, words and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .estimates import Estimate, number, short

__all__ = ["Comparison", "Compressed", "Method", "parse", "pictures", "summary", "tables"]

STAGES = {"masked": "smaller, as found", "recalibrated": "statistics recalibrated", "finetuned": "fine-tuned"}
COSTS = ("parameters", "macs", "bytes")
CONTROLS = ("l1", "torch-pruning", "random", "random-widths")
GREY = "#858585"
BLUE, RED, GREEN = "#0072b2", "#d55e00", "#009e73"
WIDTH = 7.0
LETTER = 0.009  # of a label of 7 points, in axes of this width
Made = tuple[Figure, str, dict[str, list[str]]]
"""A picture, its caption, and what is said over the points of its collections, by gid."""


@dataclass(frozen=True)
class Compressed:
    """One record of `fastkd compress`, whole."""

    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    content: dict[str, Any]

    @property
    def dense(self) -> dict[str, Any]:
        return self.content["dense"]

    @property
    def small(self) -> dict[str, Any]:
        return self.content["compact"]

    @property
    def search(self) -> dict[str, Any]:
        return self.content["search"]

    @property
    def untrained(self) -> dict[str, float]:
        """Scores of what the search found, before any training."""
        stages = self.small["stages"]
        return stages.get("recalibrated") or stages["masked"]

    @property
    def group(self) -> tuple[str, str]:
        """Of those that can be compared: data, and the full network."""
        model = self.config["model"]
        return self.config["data"], f"compressed {model['name']} {model.get('args')}"

    @property
    def label(self) -> str:
        return self.config["algorithm"]["name"]

    @property
    def title(self) -> str:
        return f"{self.config['data']}, {self.config['model']['name']} made smaller"

    def left(self, cost: str) -> float:
        return self.small[cost] / self.dense[cost]

    def faster(self, batch: str) -> float:
        return self.dense["latency_ms"][batch] / self.small["latency_ms"][batch]


@dataclass
class Method:
    """The runs of one configuration, by seed."""

    label: str
    runs: list[Compressed]
    planned: int | None = None

    @property
    def alone(self) -> bool:
        """The plainest control, drawn in grey."""
        return bool(self.runs) and self.runs[0].search["algorithm"] == "l1"

    @property
    def test(self) -> Estimate:
        return Estimate.of([run.small["test"] for run in self.runs])

    @property
    def untrained(self) -> Estimate:
        return Estimate.of([run.untrained["test"] for run in self.runs])


@dataclass
class Comparison:
    """Methods that can be compared: of one experiment, or of one network and data set."""

    name: str
    title: str
    rows: list[Method]
    note: str = ""

    @property
    def done(self) -> list[Method]:
        return [row for row in self.rows if row.runs]

    @property
    def tuned(self) -> bool:
        return any("finetuned" in run.small["stages"] for row in self.done for run in row.runs)

    @property
    def score(self) -> str:
        first = self.done[0].runs[0].content["score"]
        return "agreement with the full network" if first == "agreement" else "test accuracy"

    @property
    def detailed(self) -> Method:
        """The method whose search is drawn: the best one that has one."""
        searched = [row for row in self.done if row.runs[0].search["history"]] or self.done
        own = [row for row in searched if row.runs[0].search["algorithm"] not in CONTROLS] or searched
        return max(own, key=lambda row: row.test.mean)


def parse(content: dict[str, Any]) -> Compressed:
    """Looks at all that is drawn later.

    Raises:
        KeyError, TypeError, ValueError: something is missing, or no number.
    """
    run = Compressed(int(content["seed"]), content["config"], dict(content.get("environment") or {}), content)
    _ = run.config["data"], run.config["model"]["name"], run.config["algorithm"]["name"], content["score"]
    for network in (run.dense, run.small):
        for key in ("test", "val", *COSTS):
            number(network[key])
        for key in ("latency_ms", "peak_memory_mb"):
            for batch in ("1", "64"):
                number(network[key][batch])
    for stage in run.small["stages"].values():
        number(stage["test"]), number(stage["val"])
    for layer in content["layers"]:
        number(layer["size"]), number(layer["kept"])
    search = run.search
    for kind in ("individuals", "front", "l1"):
        columns = [search[kind][key] for key in ("quality", "cost", "test") if key in search[kind] or key != "test"]
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"search.{kind} has columns of different lengths")
        for x in (x for column in columns for x in column):
            number(x)
    number(search["full_quality"]), number(search["full_cost"]), number(search["evaluations"])
    genes = sum(layer["size"] for layer in content["layers"])
    for look in search["history"]:
        for key in ("generation", "best", "mean", "diversity"):
            number(look[key])
        if len(bytes.fromhex(look["mask"])) != -(-genes // 8):
            raise ValueError(f"a mask that does not have {genes} genes")
    return run


# Words and tables


def summary(section: Comparison) -> str:
    rows, out = section.done, []
    first = rows[0].runs[0]
    dense = statistics.mean({run.seed: run.dense["test"] for row in rows for run in row.runs}.values())
    if first.content["score"] == "accuracy":
        out.append(
            f"The full network reaches {dense:.2f} % on the test part with {first.dense['parameters']:,} "
            f"parameters and {first.dense['macs'] / 1e6:,.2f} M multiply-adds per image."
        )
    else:
        out.append(
            "Scores are the share of images for which the smaller network's class is the full network's, which "
            f"has {first.dense['parameters']:,} parameters and {first.dense['macs'] / 1e6:,.2f} M multiply-adds "
            "per image."
        )
    best = max(rows, key=lambda row: row.test.mean)
    gains = {cost: statistics.mean(1 / run.left(cost) for run in best.runs) for cost in ("parameters", "macs")}
    faster = [statistics.mean(run.faster(batch) for run in best.runs) for batch in ("1", "64")]
    n = len(best.runs)
    how = "a single seed" if n == 1 else f"mean and 95 % interval of {n} seeds"
    what = f"Best of {len(rows)} methods is {best.label}, with" if len(rows) > 1 else "The smaller one reaches"
    out.append(
        f"{what} {best.test} % ({how}), with {gains['parameters']:.2f}x fewer parameters and "
        f"{gains['macs']:.2f}x fewer multiply-adds; it is {faster[0]:.2f}x faster for one image and "
        f"{faster[1]:.2f}x for 64."
    )
    if len(rows) > 1:
        unlike = [row.label for row in rows if row is not best and row.test.overlaps(best.test) is False]
        near = [row.label for row in rows if row is not best and row.test.overlaps(best.test)]
        if unlike:
            out.append(f"Its 95 % interval is separated from {_and(unlike)}.")
        if near:
            out.append(f"It overlaps with {_and(near)}: there, the difference may be chance.")
        if not unlike and not near:
            out.append("Without several seeds of each nothing can be said about chance.")
    return " ".join(out)


def tables(section: Comparison) -> Iterator[str]:
    if len(section.rows) > 1:
        yield from _methods(section)
    else:
        yield from _stages(section.done[0])


def _methods(section: Comparison) -> Iterator[str]:
    tuned = section.tuned
    yield _head(
        "",
        *([f"{section.score}, %"] if not tuned else ["recalibrated, %", "fine-tuned, %"]),
        "validation, %",
        "seeds",
        "parameters, %",
        "MACs, %",
        "faster, 1 / 64 images",
        "evaluations",
        "search, s",
    )
    dense = list({run.seed: run.dense for row in section.done for run in row.runs}.values())
    test = str(Estimate.of([d["test"] for d in dense]))
    yield _line(
        "teacher",
        "full network",
        *([test, test] if tuned else [test]),
        str(Estimate.of([d["val"] for d in dense])),
        str(len(dense)),
        f"{dense[0]['parameters']:,}",
        f"{dense[0]['macs'] / 1e6:,.2f} M",
        "",
        "",
        "",
    )
    best = max(section.done, key=lambda row: row.test.mean)
    for row in section.rows:
        n = len(row.runs)
        if not n:
            yield _line("", row.label, "not yet run", *([""] if tuned else []), "", f"0 of {row.planned}", *[""] * 5)
            continue
        seeds = f"{n} of {row.planned}" if row.planned is not None and n < row.planned else str(n)
        mean = {cost: statistics.mean(100 * run.left(cost) for run in row.runs) for cost in COSTS}
        yield _line(
            "best" if row is best else "",
            row.label,
            *([str(row.untrained), str(row.test)] if tuned else [str(row.test)]),
            str(Estimate.of([run.small["val"] for run in row.runs])),
            seeds,
            f"{mean['parameters']:.1f}",
            f"{mean['macs']:.1f}",
            " / ".join(f"{statistics.mean(r.faster(b) for r in row.runs):.2f}x" for b in ("1", "64")),
            f"{statistics.mean(run.search['evaluations'] for run in row.runs):,.0f}",
            short(statistics.mean(run.search["seconds"] for run in row.runs)),
        )
    yield "</tbody></table></div>"
    yield (
        '<p class="small">Mean ± half the 95 % interval of the mean (Student\'s t over seeds); bold: the best. '
        "Parameters and MACs: what is left of the full network's. Faster: the full network's measured latency over "
        "the smaller one's. Evaluations: different networks that the search looked at, on images apart from those "
        "of validation and test.</p>"
    )


def _stages(method: Method) -> Iterator[str]:
    """Before and after: means over seeds."""
    runs, first = method.runs, method.runs[0]
    agreement = first.content["score"] == "agreement"
    yield _head(
        "network",
        "agreement, %" if agreement else "test, %",
        "validation, %",
        "parameters",
        "MACs, M",
        "file, kB",
        "latency, ms, 1 / 64 images",
        "peak memory, MB, 1 / 64",
    )

    def costs(network: str, digits: int = 2) -> list[str]:
        own = [run.content[network] for run in runs]
        out = [
            f"{statistics.mean(x['parameters'] for x in own):,.0f}" if "parameters" in own[0] else "",
            f"{statistics.mean(x['macs'] for x in own) / 1e6:,.2f}" if "macs" in own[0] else "",
            f"{statistics.mean(x['bytes'] for x in own) / 1000:,.0f}",
        ]
        for key in ("latency_ms", "peak_memory_mb"):
            out.append(
                " / ".join(f"{statistics.median(x[key][b] for x in own):.{digits}f}" for b in ("1", "64"))
                if key in own[0]
                else ""
            )
        return out

    def scores(of: list[dict[str, Any]]) -> list[str]:
        return [str(Estimate.of([x[part] for x in of])) for part in ("test", "val")]

    yield _line("teacher", "full", *scores([run.dense for run in runs]), *costs("dense"))
    stages = list(first.small["stages"])
    for stage in stages:
        own = costs("compact") if stage == stages[-1] else [""] * 5
        yield _line(
            "best" if stage == stages[-1] else "",
            STAGES.get(stage, stage),
            *scores([run.small["stages"][stage] for run in runs]),
            *own,
        )
    if all(run.content.get("int8") for run in runs):
        yield _line("", "int8, onnxruntime", *scores([run.content["int8"] for run in runs]), *costs("int8"))
    gains = [f"{statistics.mean(1 / run.left(cost) for run in runs):.2f}x" for cost in COSTS]
    faster = " / ".join(f"{statistics.mean(run.faster(b) for run in runs):.2f}x" for b in ("1", "64"))
    memory = " / ".join(
        f"{statistics.mean(run.dense['peak_memory_mb'][b] / run.small['peak_memory_mb'][b] for run in runs):.2f}x"
        for b in ("1", "64")
    )
    yield _line("", "less, or faster", "", "", *gains, faster, memory)
    yield "</tbody></table></div>"
    yield (
        '<p class="small">Scores: mean ± half the 95 % interval over seeds. Latency: medians of forward passes, the '
        "full and the smaller network in turn. File: weights and statistics in safetensors; of int8 the ONNX "
        "file. Peak memory: of the results of operations that are alive at once.</p>"
    )


def _head(*headings: str) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in headings)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>'


def _line(kind: str, *values: str) -> str:
    return (f'<tr class="{kind}">' if kind else "<tr>") + "".join(f"<td>{escape(v)}</td>" for v in values) + "</tr>"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Pictures


def pictures(section: Comparison, styles: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, Made]]:
    """Name, title and what is made of it."""
    method = section.detailed
    run = method.runs[0]
    whose = f"{method.label}, seed {run.seed}"
    if len(section.done) > 1:
        yield "methods", "Methods compared", _compared(section, styles)
    yield "front", "What the search looked at", _front(run, whose)
    if run.search["history"]:
        yield "convergence", "Convergence of the search", _convergence(run, whose)
        yield "masks", "The best mask, generation by generation", _masks(run, whose)
    yield "layers", "Filters that are kept", _layers(method)
    if any(r.small["history"] for r in method.runs):
        yield "finetuning", "Fine-tuning", _tuning(section, styles)


def _compared(section: Comparison, styles: dict[str, dict[str, Any]]) -> Made:
    figure = Figure(figsize=(WIDTH, 3.3))
    left, right = figure.subplots(1, 2)
    for row in section.done:
        style = styles[row.label]
        marker = "o" if style["linestyle"] == "-" else "s"  # as the dashes, where there are more rows than colours
        for k, run in enumerate(row.runs):
            front, full = run.search["front"], run.search["full_cost"]
            order = sorted(range(len(front["cost"])), key=lambda i: front["cost"][i])
            x, y = (
                [(100 * v[i] / (full if key == "cost" else 1)) for i in order]
                for key, v in (("cost", front["cost"]), ("quality", front["quality"]))
            )
            left.plot(
                x, y, marker=marker, markersize=3, alpha=0.8, label=row.label if k == 0 else None, linewidth=1, **style
            )
            right.plot(
                [100 * run.left("macs")], [run.small["test"]], marker, markersize=4, alpha=0.8, color=style["color"]
            )
    first = section.done[0].runs[0]
    left.set_xlabel(f"{_cost(first)} left (%)")
    left.set_ylabel(f"{first.search['quality']} on the fitness images (%)")
    right.set_xlabel("MACs left (%)")
    right.set_ylabel(f"{section.score} (%)")
    for run in (run for row in section.done for run in row.runs):
        right.axhline(run.dense["test"], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    figure.legend(loc="outside upper left", ncols=4, handlelength=1.5)
    return (
        figure,
        (
            "Left: the fronts that were found, a line per seed. Right: the networks that were taken, as they "
            "are at the end, a mark per seed; dashed: the full network."
        ),
        {},
    )


def _cost(run: Compressed) -> str:
    return {"macs": "MACs"}.get(run.search["cost"], run.search["cost"])


def _front(run: Compressed, whose: str) -> Made:
    search = run.search
    figure = Figure(figsize=(WIDTH, 3.6))
    ax = figure.subplots()
    full, own = search["full_cost"], search["individuals"]
    cost = [100 * c / full for c in own["cost"]]
    accuracy = search["quality"] in ("accuracy", "agreement")
    scale = 100 if accuracy else 1
    quality = [scale * q for q in own["quality"]]
    texts = [
        f"{name}: {search['quality']} {q:.4g}{' %' if accuracy else ''}, {c:.1f} % of the {_cost(run)}"
        for name, q, c in zip(own["id"], quality, cost, strict=True)
    ]
    ax.scatter(cost, quality, s=9, color=BLUE, alpha=0.45, linewidths=0, label="individuals", gid="individuals")
    front = sorted(zip(search["front"]["cost"], search["front"]["quality"], strict=True))
    ax.plot([100 * c / full for c, _ in front], [scale * q for _, q in front], color=BLUE, linewidth=1.2, label="front")
    if tested := search["front"].get("test"):  # older records have none
        points = sorted(zip(search["front"]["cost"], tested, strict=True))
        ax.plot(
            [100 * c / full for c, _ in points],
            [scale * q for _, q in points],
            color=BLUE,
            linewidth=1,
            linestyle=(0, (3, 2)),
            label="front, on test images",
        )
    ladder = sorted(zip(search["l1"]["cost"], search["l1"]["quality"], strict=True))
    ax.plot(
        [100 * c / full for c, _ in ladder],
        [scale * q for _, q in ladder],
        color=GREY,
        marker="s",
        markersize=3,
        linewidth=1,
        label="uniform L1",
    )
    ax.plot([100], [scale * search["full_quality"]], "D", color="#1b1b1e", markersize=5, label="full network")
    at = own["id"].index(search["chosen"]) if search["chosen"] in own["id"] else None
    if at is not None:
        ax.plot(
            [cost[at]],
            [quality[at]],
            "o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=RED,
            markeredgewidth=1.8,
            label="taken",
        )
    ax.set_xlabel(f"{_cost(run)} left (%)")
    ax.set_ylabel(f"{search['quality']} on the fitness images" + (" (%)" if accuracy else ""))
    ax.set_xlim(0, 103)
    ax.legend(loc="lower right")
    caption = (
        f"{whose}: {len(cost):,} networks that were evaluated, those that no other one beats in both"
        + (", these also on test images, where selection does not flatter them" if tested else "")
        + ", and the same share of every layer's filters by their L1 norm. On the page, a disc tells its mask's "
        "name."
    )
    return figure, caption, {"individuals": texts}


def _convergence(run: Compressed, whose: str) -> Made:
    history = run.search["history"]
    volumes = [look.get("hypervolume") for look in history]
    panels = 2 + all(v is not None for v in volumes)
    figure = Figure(figsize=(WIDTH, 2.5))
    axes = figure.subplots(1, panels)
    x = [look["generation"] for look in history]
    axes[0].plot(x, [look["best"] for look in history], color=BLUE, label="best so far")
    axes[0].plot(x, [look["mean"] for look in history], color=RED, linestyle=(0, (5, 1.5)), label="mean")
    axes[0].set_ylabel("score")
    axes[0].legend()
    axes[1].plot(x, [look["diversity"] for look in history], color=GREEN)
    axes[1].set_ylabel("diversity")
    axes[1].set_ylim(0, None)
    if panels == 3:
        axes[2].plot(x, volumes, color=BLUE)
        axes[2].set_ylabel("hypervolume")
    for ax in axes:
        ax.set_xlabel("generation")
    return (
        figure,
        (
            f"{whose}. Diversity: how likely two individuals of a generation differ in a filter."
            + (" Hypervolume: of all that no other individual beats." if panels == 3 else "")
        ),
        {},
    )


def _masks(run: Compressed, whose: str) -> Made:
    layers, history = run.content["layers"], run.search["history"]
    genes = sum(layer["size"] for layer in layers)
    rows = []
    for look in history:
        bits = bin(int(look["mask"], 16))[2:].zfill(4 * len(look["mask"]))
        rows.append([int(bit) for bit in bits[:genes]])
    figure = Figure(figsize=(WIDTH, min(5.0, 1.1 + 0.06 * len(rows))))
    ax = figure.subplots()
    ax.imshow(
        rows,
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1.3,
        interpolation="nearest",
        extent=(0, genes, len(rows) + 0.5, 0.5),
    )
    ends = [0]
    for layer in layers:
        ends.append(ends[-1] + layer["size"])
    for end in ends[1:-1]:
        ax.axvline(end, color=RED, linewidth=0.6)
    named: list[tuple[float, float, str]] = []  # middle, half the text's width, text: no two overlap
    for a, b, layer in sorted(zip(ends, ends[1:], layers, strict=False), key=lambda each: each[0] - each[1]):
        middle, half = (a + b) / 2, genes * (len(layer["name"]) + 1) * LETTER / 2
        if all(abs(middle - other) > half + theirs for other, theirs, _ in named):
            named.append((middle, half, layer["name"]))
    ax.set_xticks([middle for middle, *_ in named], [name for *_, name in named], fontsize=7)
    ax.tick_params(axis="x", length=0)
    ax.grid(False)
    ax.set_ylabel("generation")
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, f"{whose}. A column per filter, dark where it is kept; lines part the layers.", {}


def _layers(method: Method) -> Made:
    layers = method.runs[0].content["layers"]
    kept = [statistics.mean(run.content["layers"][k]["kept"] for run in method.runs) for k in range(len(layers))]
    height = 0.6 + 0.19 * len(layers)
    figure = Figure(figsize=(WIDTH, max(1.4, height)))
    ax = figure.subplots()
    places = range(len(layers))
    ax.barh(places, [layer["size"] for layer in layers], color=GREY, alpha=0.3, height=0.7)
    ax.barh(places, kept, color=BLUE, height=0.7)
    for y, (layer, k) in enumerate(zip(layers, kept, strict=True)):
        ax.text(layer["size"], y, f" {k:.3g} of {layer['size']}", va="center", fontsize=7)
    ax.set_yticks(places, [layer["name"] for layer in layers], fontsize=7)
    ax.set_ylim(len(layers) - 0.5, -0.5)
    ax.set_xlim(0, 1.15 * max(layer["size"] for layer in layers))
    ax.set_xlabel("filters")
    ax.grid(False, axis="y")
    several = f", mean of {len(method.runs)} seeds" if len(method.runs) > 1 else f", seed {method.runs[0].seed}"
    return (
        figure,
        (
            f"{method.label}{several}. Layers that are added to each other keep the same filters and are one "
            "row, by the name of the first."
        ),
        {},
    )


def _tuning(section: Comparison, styles: dict[str, dict[str, Any]]) -> Made:
    figure = Figure(figsize=(WIDTH, 2.8))
    axes: Any = figure.subplots(1, 2)
    names = (("val", "validation score (%)"), ("loss", "loss"))
    for ax, (key, label) in zip(axes, names, strict=True):
        _tuned(ax, section, styles, key)
        ax.set_xlabel("epoch")
        ax.set_ylabel(label)
    for run in section.detailed.runs:
        axes[0].axhline(run.dense["val"], color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, handlelength=1.5)
    return figure, "A line per seed; dashed: the full network.", {}


def _tuned(ax: Axes, section: Comparison, styles: dict[str, dict[str, Any]], key: str) -> None:
    for row in section.done:
        for k, run in enumerate(row.runs):
            looks = [(look["epoch"] + 1, look[key]) for look in run.small["history"] if math.isfinite(look[key])]
            if looks:
                x, y = zip(*looks, strict=True)
                ax.plot(x, y, alpha=0.8, linewidth=1.2, label=row.label if k == 0 else None, **styles[row.label])
