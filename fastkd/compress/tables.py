"""Tables of compression, and what their numbers say. They need neither networks nor data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .._text import joined, plural
from ..evolve import hypervolume
from ..lab.estimate import Estimate
from ..lab.record import Row, Section
from ..lab.table import Cell, Column, Table, short
from .record import BATCHES, CompressRecord, Costs, Full, Int8, Scores, Search, Small

__all__ = ["INTRODUCTION", "Method", "before_and_after", "overview", "report", "results", "score", "summary"]

Method = Row[CompressRecord]

INTRODUCTION = (
    "Compressed networks, made by `fastkd grid` from the records in `cells/`: accuracy (or agreement "
    "with the full network, where that is said) in percent on the test part, mean ± half the 95 % "
    "interval (Student's t) over seeds; *recalibrated* is the smaller network with the full one's "
    "weights and batch-norm statistics of its own, *fine-tuned* is after training. *Fitness* is what the "
    "search took the recalibrated one for, on images of its own: the best of hundreds, it flatters. "
    "What is left of MACs and parameters is in percent of the full network's. *Faster* is its measured "
    "latency over the smaller one's, at a batch of 1 / 64. Evaluations are networks that the search "
    "looked at, on images apart from those of validation and test. *Hypervolume*, where a front was "
    "searched for: how much of the rectangle of score and MACs the front's networks dominate on test "
    "images, in percent; of uniform L1, those of 16 densities. A cell that has not been run is shown as "
    "such."
)
METHODS_NOTE = (
    "Mean ± half the 95 % interval of the mean (Student's t over seeds); bold: the best. "
    "Parameters and MACs: what is left of the full network's. Faster: the full network's measured latency over "
    "the smaller one's. Evaluations: different networks that the search looked at, on images apart from those "
    "of validation and test."
)
STAGES_NOTE = (
    "Scores: mean ± half the 95 % interval over seeds. Latency: medians of forward passes, the "
    "full and the smaller network in turn. File: weights and statistics in safetensors; of int8 the ONNX "
    "file. Peak memory: of the results of operations that are alive at once."
)


def score(section: Section[CompressRecord]) -> str:
    return "agreement with the full network" if section.records[0].score == "agreement" else "test accuracy"


def _full_network(section: Section[CompressRecord]) -> list[Method]:
    """The reference: each seed's full network, once."""
    found = {record.seed: record for record in section.records}.values()
    return [Row("full network", list(found), reference=True)] if found else []


# --- methods ---------------------------------------------------------------------------------------


def _networks(row: Method) -> Sequence[Full | Small]:
    return [record.dense if row.reference else record.compact for record in row.records]


def _score(part: str) -> Callable[[Method], Cell]:
    return lambda row: str(Estimate.of([getattr(network, part) for network in _networks(row)]))


def _untrained(row: Method) -> Cell:
    return str(row.estimate(lambda record: record.dense.test if row.reference else record.untrained.test))


def _own(value: Callable[[CompressRecord], float], text: Callable[[float], str]) -> Callable[[Method], Cell]:
    """A mean over seeds of what a full network does not have."""
    return lambda row: "" if row.reference else text(statistics.mean(map(value, row.records)))


def _left(cost: str, full: Callable[[Full], str]) -> Callable[[Method], Cell]:
    """Percent of the full network's; of that itself a text."""
    left = _own(lambda record: 100 * record.left(cost), lambda mean: f"{mean:.1f}")
    return lambda row: full(row.records[0].dense) if row.reference else left(row)


def _faster(row: Method, digits: int = 2) -> str:
    """At both batches, mean over seeds."""
    pairs = list(zip(row.records, _networks(row), strict=True))
    means = [statistics.mean(r.dense.latency_ms[b] / network.latency_ms[b] for r, network in pairs) for b in BATCHES]
    return " / ".join(f"{mean:.{digits}f}x" for mean in means)


LABEL: Column[Method] = Column("", lambda row: row.label, left=True, always=True)
VAL = Column("validation, %", _score("val"))
PARAMETERS = Column("parameters, %", _left("parameters", lambda full: f"{full.parameters:,}"))
FASTER: Column[Method] = Column("faster", lambda row: "" if row.reference else _faster(row))
EVALUATIONS = Column("evaluations", _own(lambda record: record.search.evaluations, lambda mean: f"{mean:,.0f}"))


def _scores(section: Section[CompressRecord], before: str, after: str, alone: str) -> list[Column[Method]]:
    """Before and after fine-tuning; alone, if no network was fine-tuned."""
    if not any("finetuned" in record.compact.stages for record in section.records):
        return [Column(alone, _score("test"), missing="not yet run")]
    return [Column(before, _untrained, missing="not yet run"), Column(after, _score("test"))]


def results(section: Section[CompressRecord]) -> Table:
    """For RESULTS.md."""
    records = section.records
    fronts = any(record.search.algorithm.startswith("nsga2") for record in records)
    what = "agreement" if any(record.score == "agreement" for record in records) else "test"
    columns: list[Column[Method]] = [
        LABEL,
        *_scores(section, f"{what} recalibrated, %", f"{what} fine-tuned, %", f"{what}, %"),
        Column("fitness", lambda row: "" if row.reference else str(row.estimate(lambda r: _chosen_by(r.search)))),
        VAL,
        Column("seeds", lambda row: row.seeds(always=True), always=True),
        Column("MACs, %", _left("macs", lambda full: f"{full.macs / 1e6:.2f} M")),
        PARAMETERS,
        FASTER,
        EVALUATIONS,
        Column("search, s", _own(lambda record: record.search.seconds, lambda mean: f"{mean:.0f}")),
    ]
    if fronts:
        volume: Callable[[Method], Cell] = lambda row: str(row.estimate(lambda record: _volume(record.search)))
        columns.append(Column("hypervolume", lambda row: "" if row.reference else volume(row)))
    return Table.of(columns, [*_full_network(section), *section.rows], empty=lambda row: not row.records)


def overview(section: Section[CompressRecord]) -> Table:
    """For the terminal."""
    columns: list[Column[Method]] = [
        replace(LABEL, heading="network"),
        Column("parameters", lambda row: f"{statistics.mean(n.parameters for n in _networks(row)):,.0f}"),
        Column("test accuracy, %", _score("test"), missing="not run"),
        Column("MACs, M", lambda row: f"{statistics.mean(n.macs for n in _networks(row)) / 1e6:.2f}"),
        Column("faster", lambda row: _faster(row, 1)),
    ]
    rows = [*_full_network(section), *section.rows]
    return Table.of(columns, rows, empty=lambda row: not row.records, title=section.title)


def report(section: Section[CompressRecord]) -> Table:
    """For the page: methods side by side, or the stages of one."""
    if len(section.rows) == 1:
        return _stages(section.done[0])
    best = section.best
    columns: list[Column[Method]] = [
        LABEL,
        *_scores(section, "recalibrated, %", "fine-tuned, %", f"{score(section)}, %"),
        VAL,
        Column("seeds", Row.seeds, always=True),
        PARAMETERS,
        Column("MACs, %", _left("macs", lambda full: f"{full.macs / 1e6:,.2f} M")),
        replace(FASTER, heading="faster, 1 / 64 images"),
        EVALUATIONS,
        Column("search, s", _own(lambda record: record.search.seconds, short)),
    ]
    return Table.of(
        columns,
        [*_full_network(section), *section.rows],
        kind=lambda row: "teacher" if row.reference else "best" if row is best else "",
        empty=lambda row: not row.records,
        note=METHODS_NOTE,
    )


def _chosen_by(search: Search) -> float:
    """What the network that was taken had on the images of the search; percent, where it is a share."""
    quality = search.individuals.quality[(search.individuals.id or []).index(search.chosen)]
    return 100 * quality if search.share else quality


def _volume(search: Search) -> float:
    """Percent of the rectangle of quality and cost that a front dominates on test images. Of uniform L1: its ladder,
    as far as the budget allows."""
    front, full = search.front, search.full_cost
    points = list(zip(front.test or [], front.cost, strict=True))
    if search.algorithm == "l1":
        ladder = zip(search.l1.test or [], search.l1.cost, strict=True)
        points += [(quality, cost) for quality, cost in ladder if cost <= max(front.cost)]
    return 100 * hypervolume(torch.tensor([(-q, c / full) for q, c in points], dtype=torch.float64), (0.0, 1.0))


# --- stages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A network on the way to the smaller one: of every seed its scores, and what is shown of its costs."""

    label: str
    scores: Sequence[Scores]
    counted: Sequence[Costs] = ()
    measured: Sequence[Costs | Int8] = ()
    """File, latency and memory."""
    last: bool = False


def _all_stages(records: Sequence[CompressRecord], names: dict[str, str], counted: bool) -> list[Stage]:
    """From the full network to int8.

    Args:
        names: of the stages; where there is none, its own.
        counted: parameters and multiplications of all stages are shown, not the last one's alone.
    """
    dense, small = [record.dense for record in records], [record.compact for record in records]
    out = [Stage("full", dense, dense, dense)]
    for stage in small[0].stages:
        last = stage == list(small[0].stages)[-1]
        scores = [network.stages[stage] for network in small]
        out.append(
            Stage(names.get(stage, stage), scores, small if counted or last else (), small if last else (), last)
        )
    int8 = [record.int8 for record in records if record.int8 is not None]
    return [*out, Stage(names["int8"], int8, (), int8)] if len(int8) == len(records) else out


def _stage_columns(what: str, latency: str, memory: str) -> list[Column[Stage]]:
    def counted(key: str, scale: float, digits: int) -> Callable[[Stage], Cell]:
        return lambda s: (
            f"{statistics.mean(getattr(c, key) for c in s.counted) / scale:,.{digits}f}" if s.counted else ""
        )

    def measured(key: str) -> Callable[[Stage], Cell]:
        def cell(stage: Stage) -> Cell:
            values = [value for costs in stage.measured if (value := getattr(costs, key, None)) is not None]
            return " / ".join(f"{statistics.median(v[b] for v in values):.2f}" for b in BATCHES) if values else ""

        return cell

    return [
        Column("network", lambda stage: stage.label, left=True, whole=True),
        Column(what, lambda stage: str(Estimate.of([s.test for s in stage.scores]))),
        Column("validation, %", lambda stage: str(Estimate.of([s.val for s in stage.scores]))),
        Column("parameters", counted("parameters", 1, 0)),
        Column("MACs, M", counted("macs", 1e6, 2)),
        Column(
            "file, kB", lambda s: f"{statistics.mean(c.bytes for c in s.measured) / 1000:,.0f}" if s.measured else ""
        ),
        Column(latency, measured("latency_ms")),
        Column(memory, measured("peak_memory_mb")),
    ]


def _stages(method: Method) -> Table:
    """Before and after: means over seeds."""
    records = method.records
    what = "agreement, %" if records[0].score == "agreement" else "test, %"
    names = {
        "masked": "smaller, as found",
        "recalibrated": "statistics recalibrated",
        "finetuned": "fine-tuned",
        "int8": "int8, onnxruntime",
    }
    table = Table.of(
        _stage_columns(what, "latency, ms, 1 / 64 images", "peak memory, MB, 1 / 64"),
        _all_stages(records, names, counted=False),
        kind=lambda stage: "teacher" if stage.label == "full" else "best" if stage.last else "",
        note=STAGES_NOTE,
    )
    gains = [f"{statistics.mean(1 / r.left(cost) for r in records):.2f}x" for cost in ("parameters", "macs", "bytes")]
    memory = [
        statistics.mean(r.dense.peak_memory_mb[b] / r.compact.peak_memory_mb[b] for r in records) for b in BATCHES
    ]
    less = " / ".join(f"{mean:.2f}x" for mean in memory)
    table.lines.append(("", ["less, or faster", "", "", *gains, _faster(method), less]))
    return table


def before_and_after(records: Sequence[CompressRecord]) -> Table:
    """For the terminal, 80 columns wide."""
    first, agreement = records[0], records[0].score == "agreement"
    config, threads = first.config, first.environment["threads"]
    left = ", ".join(f"{share:.1%} of the {name}" for name, share in config["budget"].items()) or "no budget"
    names = {"masked": "smaller", "recalibrated": "recalibrated", "finetuned": "fine-tuned", "int8": "int8"}
    columns = _stage_columns("agreement, %" if agreement else "test, %", "latency, ms", "memory, MB")
    return Table.of(
        [column for column in columns if column.heading != "validation, %"],
        _all_stages(records, names, counted=True),
        title=f"{config['model']['name']} on {config['data']}, {config['algorithm']['name']}, {left}",
        note=f"Latency, with {plural(threads, 'thread')}, and peak memory at a batch of 1 / 64."
        + (" Agreement is with the full network." if agreement else ""),
    )


# --- words -----------------------------------------------------------------------------------------


def summary(section: Section[CompressRecord]) -> str:
    """What the numbers say, and what they do not."""
    rows, first, best = section.done, section.records[0], section.best
    size = f"{first.dense.parameters:,} parameters and {first.dense.macs / 1e6:,.2f} M multiply-adds per image."
    if first.score == "accuracy":
        dense = statistics.mean({record.seed: record.dense.test for record in section.records}.values())
        out = [f"The full network reaches {dense:.2f} % on the test part with {size}"]
    else:
        out = [
            "Scores are the share of images for which the smaller network's class is the full network's, which "
            f"has {size}"
        ]
    fewer, less = (statistics.mean(1 / r.left(cost) for r in best.records) for cost in ("parameters", "macs"))
    one, many = (statistics.mean(r.faster(batch) for r in best.records) for batch in BATCHES)
    n = len(best.records)
    how = "a single seed" if n == 1 else f"mean and 95 % interval of {n} seeds"
    what = f"Best of {len(rows)} methods is {best.label}, with" if len(rows) > 1 else "The smaller one reaches"
    out.append(
        f"{what} {best.test} % ({how}), with {fewer:.2f}x fewer parameters and {less:.2f}x fewer multiply-adds; it is "
        f"{one:.2f}x faster for one image and {many:.2f}x for 64."
    )
    if len(rows) > 1:
        unlike = [row.label for row in rows if row is not best and row.test.overlaps(best.test) is False]
        near = [row.label for row in rows if row is not best and row.test.overlaps(best.test)]
        if unlike:
            out.append(f"Its 95 % interval is separated from {joined(unlike)}.")
        if near:
            out.append(f"It overlaps with {joined(near)}: there, the difference may be chance.")
        if not unlike and not near:
            out.append("Without several seeds of each nothing can be said about chance.")
    return " ".join(out)
