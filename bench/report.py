"""``python -m bench.report RESULTS.json`` writes RESULTS.md (tables) and RESULTS.png beside it.

Where RESULTS.json holds benchmarks of test_lsp.py and of test_population.py, the latter are in RESULTS_population.md
and .png.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

PEERS = ("fastkd", "gather", "torch_scatter", "compile", "composite", "composite_pairs")
STRONG = ("compile", "composite", "composite_pairs")
FORMS = {"full": "Teacher's features in every step", "cached": "Cached teacher"}
# Okabe and Ito's colours: told apart with any colour vision, and in grey.
COLOURS = {
    "fastkd": "#D55E00",
    "composite": "#0072B2",
    "composite_pairs": "#009E73",
    "compile": "#56B4E9",
    "torch_scatter": "#F0E442",
    "gather": "#999999",
}

Rows = dict[tuple[str, str, str], dict[str, Any]]  # case, form, peer -> benchmark


def steps(results: dict[str, Any]) -> Rows:
    return {
        (b["extra_info"]["case"], b["extra_info"]["form"], b["extra_info"]["peer"]): b
        for b in results["benchmarks"]
        if b["extra_info"].get("kind") == "step"
    }


def cases(rows: Rows) -> list[str]:
    return list(dict.fromkeys(case for case, _, _ in rows))


def spread(benchmark: dict[str, Any]) -> float:
    """Interquartile range over the median."""
    return benchmark["stats"]["iqr"] / benchmark["stats"]["median"]


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, digits - len(str(int(abs(value))))) if abs(value) >= 1 else digits - 1
    return f"{value:,.{decimals}f}"


def table(head: list[str], body: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def heading(results: dict[str, Any], rows: Rows) -> str:
    info = next(iter(rows.values()))["extra_info"]
    machine = results["machine_info"]
    cores = machine.get("cpu", {}).get("count")
    where = info["gpu"] if info["device"] == "cuda" else f"{info['cpu']}, {cores} cores"
    spreads = [spread(b) for b in rows.values()]
    return "\n".join(
        [
            f"# LSP loss and its gradient on {where}",
            "",
            f"{info['threads']} thread{'s' * (info['threads'] > 1)}, instruction set {info['isa']}, "
            f"{machine['system']}; fastkd {info['fastkd']} ({info['compiler']}), "
            f"torch {info['torch']}, Python {info['python']}; {results['datetime'][:10]}.",
            "",
            "RBF, KL(student\\|\\|teacher), mean over nodes. Times are medians; the interquartile "
            f"range is {statistics.median(spreads):.0%} of the median for the median benchmark, "
            f"{max(spreads):.0%} at worst. Ratios are time / fastkd's time, the two run in turns: "
            "above 1 fastkd is faster. Bound: reading the feature rows at this host's speed for random "
            "rows.",
        ]
    )


def ratio(rows: Rows, case: str, form: str, peer: str) -> tuple[float | None, str]:
    """The ratio, and what to print: the reason where there is none."""
    if (case, form, peer) in rows:
        value = rows[case, form, peer]["extra_info"]["ratio"]
        return value, f"{number(value)}x"
    for other in PEERS:
        if (case, form, other) in rows:
            return None, rows[case, form, other]["extra_info"]["absent"].get(peer, "–")
    return None, "–"


def times(rows: Rows, form: str) -> str:
    others = PEERS[1:]
    body = []
    for case in cases(rows):
        if (case, form, "fastkd") not in rows:
            continue
        fused = rows[case, form, "fastkd"]
        info, milliseconds = fused["extra_info"], 1e3 * fused["stats"]["median"]
        bound = info["bound_ms"][form]
        ratios = {peer: ratio(rows, case, form, peer) for peer in others}
        strong = {ratios[peer][0]: peer for peer in STRONG if ratios[peer][0]}
        # Without all of them measured, the best is not known.
        best = f"**{number(min(strong))}x** ({strong[min(strong)]})" if len(strong) == len(STRONG) else "–"
        body.append(
            [
                case,
                f"{info['N']:,}",
                f"{info['E']:,}",
                f"{info['student_dim']} / {info['teacher_dim']}",
                f"{number(milliseconds)} ± {spread(fused):.0%}",
                number(bound),
                f"{bound / milliseconds:.0%}",
                *(text for _, text in ratios.values()),
                best,
            ]
        )
    return table(
        ["case", "N", "E", "widths", "fastkd, ms", "bound, ms", "% of bound", *others, "against the best of them"], body
    )


def memory(rows: Rows) -> str:
    def megabytes(case: str, peer: str) -> str:
        row = rows.get((case, "full", peer))
        value = row["extra_info"].get("extra_peak_bytes") if row else None
        return number(None if value is None else value / 1e6)

    body = []
    for case in cases(rows):
        if (case, "full", "fastkd") not in rows:
            continue
        info = rows[case, "full", "fastkd"]["extra_info"]
        extra = info.get("extra_peak_bytes")
        both = None if extra is None else extra / (info["E"] + info["N"])
        body.append(
            [
                case,
                *(megabytes(case, peer) for peer in PEERS),
                number(info.get("extra_peak_per_edge")),
                number(info.get("extra_peak_per_node")),
                number(both),
            ]
        )
    return table(["case", *(f"{peer}, MB" for peer in PEERS), "fastkd, B / E", "B / N", "B / (E + N)"], body)


def graphs(rows: Rows) -> str:
    body = []
    for case in cases(rows):
        if (case, "full", "fastkd") not in rows:
            continue
        fused = rows[case, "full", "fastkd"]
        info, own = fused["extra_info"], fused["extra_info"]["bound_own_order_ms"]["full"]
        body.append(
            [
                case,
                "yes" if info["symmetric"] else "no",
                f"{info['max_degree']:,}",
                number(info["build_ms"]),
                number(info["E"] / info["build_ms"] / 1e3),
                *(number(info["gather_GBs"][side]) for side in ("student", "teacher")),
                number(own),
                f"{own / (1e3 * fused['stats']['median']):.0%}",
            ]
        )
    return table(
        [
            "case",
            "symmetric",
            "largest degree",
            "build, ms",
            "M edges / s",
            "student, GB/s",
            "teacher, GB/s",
            "bound in the graph's order, ms",
            "% of it",
        ],
        body,
    )


def overhead(results: dict[str, Any]) -> str:
    parts = [
        f"{1e6 * b['stats']['median']:.0f} µs ({b['extra_info']['form']})"
        for b in results["benchmarks"]
        if b["extra_info"].get("kind") == "overhead"
    ]
    return f"Forward and backward of a graph with two edges: {', '.join(parts) or 'not run'}."


def plot(rows: Rows, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    names = cases(rows)
    order = list(COLOURS)
    height = 0.8 / len(order)
    figure, panels = plt.subplots(
        1, len(FORMS), sharex=True, sharey=True, layout="constrained", figsize=(9.5, 0.9 + 0.72 * len(names))
    )
    for panel, (form, title) in zip(panels, FORMS.items(), strict=True):
        for k, peer in enumerate(order):
            here = [(y, rows[case, form, peer]) for y, case in enumerate(names) if (case, form, peer) in rows]
            where = [y + (k - (len(order) - 1) / 2) * height for y, _ in here]
            panel.barh(
                where,
                [1e3 * b["stats"]["median"] for _, b in here],
                height,
                label=peer,
                color=COLOURS[peer],
                edgecolor="white",
                linewidth=0.3,
            )
        bounds = [
            (y, rows[case, form, "fastkd"]["extra_info"]["bound_ms"][form])
            for y, case in enumerate(names)
            if (case, form, "fastkd") in rows
        ]
        for k, (y, bound) in enumerate(bounds):
            panel.plot(
                [bound, bound],
                [y - 0.42, y + 0.42],
                color="black",
                linewidth=1.6,
                solid_capstyle="butt",
                label=None if k else "bound: reading the rows",
            )
        for y, case in enumerate(names):
            for k, peer in enumerate(order):
                text = ratio(rows, case, form, peer)[1] if (case, form, peer) not in rows else "–"
                if text != "–":
                    panel.text(
                        0.01,
                        y + (k - (len(order) - 1) / 2) * height,
                        f"{peer} {text}",
                        transform=panel.get_yaxis_transform(),
                        va="center",
                        fontsize=6,
                    )
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("ms per step (loss and gradient)")
        panel.grid(axis="x", color="0.88", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    shortest = min(
        min(1e3 * b["stats"]["median"], b["extra_info"]["bound_ms"][form]) for (_, form, _), b in rows.items()
    )
    panels[0].set_xlim(left=shortest / 2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(path: Path) -> None:
    from . import population_report

    results = json.loads(path.read_text())
    rows = steps(results)
    populations = population_report.write(results, path.with_stem(f"{path.stem}_population") if rows else path)
    if rows:
        write(results, rows, path)
    elif not populations:
        raise SystemExit(f"{path} holds no step of test_lsp.py and nothing of test_population.py")


def write(results: dict[str, Any], rows: Rows, path: Path) -> None:
    parts = [heading(results, rows)]
    parts += [f"## {title}\n\n{times(rows, form)}" for form, title in FORMS.items()]
    parts += [
        "## Peak memory of a step, beyond inputs and gradient\n\nTeacher's features in every step.\n\n" + memory(rows),
        "## Graphs\n\nBuilt from edges in random order. Speed at which random rows are read; bound "
        "and percentage for rows in the order of the graph's edges, teacher's features in every "
        "step.\n\n" + graphs(rows),
        "## Overhead of a call\n\n" + overhead(results),
        f"![Times]({path.stem}.png)",
    ]
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
