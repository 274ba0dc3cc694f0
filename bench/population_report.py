"""The tables and the picture of the benchmarks of test_population.py; see report.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .report import number, table

Benchmark = dict[str, Any]  # extra_info

# Okabe and Ito's colours, as in report.py.
SIDES = {
    "sequential": ("sequential loop", "#0072B2"),
    "dense": ("dense batch", "#56B4E9"),
    "compact": ("compact loop", "#009E73"),
    "vmap": ("vmap", "#CC79A7"),
}
OTHERS = [side for side in SIDES if side != "sequential"]


def of(results: dict[str, Any], kind: str) -> list[Benchmark]:
    return [b["extra_info"] for b in results["benchmarks"] if b["extra_info"].get("kind") == kind]


def ratios(b: Benchmark, side: str) -> list[float]:
    return [theirs / ours for theirs, ours in zip(b["seconds"][side], b["seconds"]["fastkd"], strict=True)]


def better(b: Benchmark, side: str) -> str:
    """`side` in the memory format that suits it."""
    forms = [s for s in (side, f"{side}_last") if s in b["seconds"]]
    return min(forms, key=lambda s: statistics.median(b["seconds"][s]))


def against(b: Benchmark, side: str) -> float | None:
    return None if side in b["absent"] else statistics.median(ratios(b, better(b, side)))


def best(b: Benchmark) -> float | None:
    """The best of the sides but the sequential loop."""
    return min((r for side in OTHERS if (r := against(b, side)) is not None), default=None)


def per_layer(b: Benchmark) -> list[float]:
    """Seconds of one layer of fastkd in each round, between others like it where that was measured."""
    ours = b["seconds"]["fastkd"]
    if "alone" not in b["seconds"]:
        return ours
    return [(row - one) / (b["depth"] - 1) for row, one in zip(ours, b["seconds"]["alone"], strict=True)]


def of_gemm(b: Benchmark, taken: list[float], macs: int) -> float:
    """Multiplications per second over those of the square product of the same round."""
    return statistics.median(macs / t / (b["gemm_macs"] / g) for t, g in zip(taken, b["seconds"]["gemm"], strict=True))


def heading(results: dict[str, Any], info: Benchmark) -> str:
    cores = results["machine_info"].get("cpu", {}).get("count")
    where = info["gpu"] if info["device"] == "cuda" else f"{info['cpu']}, {cores} cores"
    return (
        f"# Populations of masked networks on {where}\n\n{info['threads']} threads, instruction set {info['isa']}; "
        f"fastkd {info['fastkd']} ({info['compiler']}), torch {info['torch']}, Python {info['python']}; "
        f"{results['datetime'][:10]}."
    )


def networks(rows: list[Benchmark]) -> str:
    def ratio(b: Benchmark, side: str) -> str:
        if side in b["absent"]:
            return b["absent"][side]
        r = ratios(b, better(b, side))
        return f"{number(statistics.median(r), 2)}x ({number(min(r), 2)}–{number(max(r), 2)})"

    body = []
    for b in rows:
        asked = ", ".join(f"{value:g}x" for value in b["asked"] if value)
        ours, top = b["seconds"]["fastkd"], best(b)
        body.append(
            [
                f"{label(b, rows)} (P={b['population']}, N={b['images']})",
                number(1e3 * statistics.median(ours)),
                *(ratio(b, side) for side in SIDES),
                "–" if top is None else f"**{number(top, 2)}x**",
                asked,
                number(b["macs"] / statistics.median(ours) / 1e9),
                f"{of_gemm(b, ours, b['macs']):.0%}",
            ]
        )
    rounds = [len(b["seconds"]["fastkd"]) for b in rows]
    gemm = [b["gemm_macs"] / statistics.median(b["seconds"]["gemm"]) / 1e9 for b in rows]
    return (
        "Random masks of density 0.5; all logits. Times are medians; the other columns are the time of that side over "
        f"fastkd's, medians (and range) of {min(rounds)} to {max(rounds)} rounds, in each of which all sides run in "
        "turn. *Asked*: of the sequential loop, of the best of the others. *GMAC/s* counts the multiplications of the "
        "compact networks; *of GEMM* is that rate over a product of 1024 x 1024 matrices in the same round "
        f"({number(min(gemm))} to {number(max(gemm))}).\n\n"
        + table(
            [
                "case",
                "fastkd, ms",
                *(title for title, _ in SIDES.values()),
                "best of the others",
                "target",
                "GMAC/s",
                "of GEMM",
            ],
            body,
        )
    )


def converging(b: Benchmark) -> str:
    def gain(part: slice) -> str:
        return f"{number(sum(b['seconds']['alone'][part]) / sum(b['seconds']['fastkd'][part]))}x"

    count, c = len(b["seconds"]["fastkd"]), b["counts"]
    third = max(1, count // 3)
    return (
        f"ResNet-20 with published weights, {b['images']} images of CIFAR-10's validation part, {count} generations "
        f"of {b['size']} from a genetic algorithm; {sum(c['new']) / sum(c['asked']):.0%} of the individuals were new. "
        "Memo and shared beginnings, against every individual by itself in the same executor: "
        f"**{gain(slice(None))}** (first third of the generations {gain(slice(third))}, last "
        f"{gain(slice(count - third, None))}; target {b['asked']}x); in multiplications "
        f"{number(sum(c['macs']) / max(1, sum(c['shared_macs'])))}x."
    )


def layers(rows: list[Benchmark]) -> str:
    body = []
    for b in rows:
        ours, torch = per_layer(b), better(b, "torch")
        rate = lambda taken: number(b["macs"] / statistics.median(taken) / 1e9)
        ratio = statistics.median(t / o for t, o in zip(b["seconds"][torch], ours, strict=True))
        body.append(
            [
                label(b, rows, f"{b['layer']}, {b['size']}x{b['size']}, N={b['images']}"),
                str(b["kept"]),
                rate(ours),
                f"{number(of_gemm(b, ours, b['macs']))}x",
                f"{b['asked']}x" if b["asked"] else "",
                rate(b["seconds"]["alone"]) if "alone" in b["seconds"] else "–",
                rate(b["seconds"][torch]),
                "channels_last" if torch.endswith("_last") else "contiguous",
                f"{number(ratio)}x",
            ]
        )
        if "dense" in b["seconds"]:
            dense = better(b, "dense")
            body[-1].append(f"{of_gemm(b, ours, b['macs']) / of_gemm(b, b['seconds'][dense], b['dense_macs']):.0%}")
    head = [
        "layer",
        "kept",
        "fastkd, GMAC/s",
        "over GEMM",
        "target",
        "with its ends",
        "torch, GMAC/s",
        "its format",
        "torch's time / fastkd's",
    ]
    if any("dense" in b["seconds"] for b in rows):
        head.append("of torch's rate, dense")
        body = [row + [""] * (len(head) - len(row)) for row in body]
    return (
        "Two individuals that keep half of the channels each, before and after; stride 1, no bias. *fastkd* is a layer "
        "between others like it, where activations stay compact; *with its ends* adds what is paid once per network: "
        "gathering the kept channels from a dense tensor, and writing a dense result. *torch* convolves the compact "
        "tensors, made beforehand, in the faster format.\n\n" + table(head, body)
    )


def label(b: Benchmark, rows: list[Benchmark], name: str | None = None) -> str:
    name = b["case"] if name is None else name
    return name if len({r["dtype"] for r in rows}) == 1 else f"{name}, {b['dtype']}"


def plot(results: dict[str, Any], path: Path) -> bool:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases, single = of(results, "population") + of(results, "converging"), of(results, "layer")
    drawn = [draw for draw, rows in ((draw_networks, cases), (draw_layers, single)) if rows]
    if not drawn:
        return False
    size = 5.5 * len(drawn), max(3.0, 0.8 * len(cases) + 1.5, 0.16 * len(single) + 1.5)
    figure, panels = plt.subplots(1, len(drawn), squeeze=False, layout="constrained", figsize=size)
    for draw, panel in zip(drawn, panels[0], strict=True):
        draw(panel, results)
        panel.grid(axis="x", color="0.88", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3)
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return True


def draw_networks(panel: Any, results: dict[str, Any]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cases, height = of(results, "population"), 0.8 / len(SIDES)
    names = [label(b, cases) for b in cases]
    marks: list[tuple[float | None, float, float]] = []  # the target, over which bars

    def bar(y: float, value: float | None, text: str, colour: str, title: str | None) -> None:
        panel.barh(y, (value or 1) - 1, height, left=1, color=colour, edgecolor="white", linewidth=0.3, label=title)
        panel.text(
            max(value or 1, 1) * 1.04,
            y,
            text,
            va="center",
            fontsize=7,
            zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )

    for y, b in enumerate(cases):
        for k, (side, (title, colour)) in enumerate(SIDES.items()):
            value = against(b, side)
            text = b["absent"][side] if value is None else f"{number(value, 2)}x"
            bar(y + (k + 0.5) * height - 0.4, value, text, colour, None if y else title)
        marks += [(b["asked"][0], y - 0.4, y - 0.4 + height), (b["asked"][1], y - 0.4 + height, y + 0.4)]
    for b in of(results, "converging"):
        y, gain = len(names), sum(b["seconds"]["alone"]) / sum(b["seconds"]["fastkd"])
        names.append("converging\nResNet-20")
        bar(y, gain, f"{number(gain, 2)}x", "#999999", "each by itself, in fastkd")
        marks.append((b["asked"], y - height / 2, y + height / 2))
    for k, (x, low, high) in enumerate(mark for mark in marks if mark[0]):
        panel.plot(
            [x, x],
            [low, high],
            color="black",
            linewidth=2,
            solid_capstyle="butt",
            zorder=4,
            label=None if k else "target",
        )
    panel.axvline(1, color="#D55E00", linewidth=1.6, label="fastkd")
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    low, high = min(low, 0.93), high * 1.4  # room for the line at 1 and the text
    panel.set_xlim(low, high)
    steps = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    panel.xaxis.set_major_locator(FixedLocator([x for x in steps if low <= x <= high]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_title("Time over fastkd's", fontsize=10)


def draw_layers(panel: Any, results: dict[str, Any]) -> None:
    rows = of(results, "layer")
    for y, b in enumerate(rows):
        ours, torch = (of_gemm(b, taken, b["macs"]) for taken in (per_layer(b), b["seconds"][better(b, "torch")]))
        panel.plot([ours, torch], [y, y], color="0.7", linewidth=1, zorder=1)
        panel.plot(
            torch, y, "o", color="#0072B2", markersize=4, label=None if y else "torch's convolution, compact tensors"
        )
        panel.plot(ours, y, "o", color="#D55E00", markersize=4, label=None if y else "fastkd")
    for k, (y, b) in enumerate((y, b) for y, b in enumerate(rows) if b["asked"]):
        panel.plot(
            [b["asked"]] * 2,
            [y - 0.4, y + 0.4],
            color="black",
            linewidth=2,
            solid_capstyle="butt",
            label=None if k else "target of fastkd",
        )
    panel.set_yticks(
        range(len(rows)),
        [label(b, rows, f"{b['layer']}, {b['size']}x{b['size']}, keeps {b['kept']}") for b in rows],
        fontsize=6,
    )
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_title("A layer: multiplications per second over a square GEMM's", fontsize=10)


def write(results: dict[str, Any], path: Path) -> bool:
    """PATH.md and PATH.png; False where results hold no benchmark of populations."""
    cases, single, traced = of(results, "population"), of(results, "layer"), of(results, "trace")
    every = [*cases, *of(results, "converging"), *single, *traced]
    if not every:
        return False
    parts = [heading(results, every[0])]
    if cases:
        parts.append(networks(cases))
    parts += [f"## A population that converges\n\n{converging(b)}" for b in of(results, "converging")]
    if single:
        parts.append(f"## Single layers: fastkd's kernel and torch's convolution\n\n{layers(single)}")
    for b in traced:
        taken = number(statistics.median(b["seconds"]["fastkd"]))
        parts.append(f"## Tracing\n\n{b['network']}: {taken} s (target: under {b['asked']} s).")
    if plot(results, path.with_suffix(".png")):
        parts.insert(1, f"![Time over fastkd's; single layers]({path.stem}.png)")
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    return True
