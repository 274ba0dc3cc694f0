"""Tables of compression, and what their numbers say. They need neither networks nor data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._text import joined, plural
from ..evolve import hypervolume
from ..lab.record import Scores
from ..lab.rows import Row, Section
from ..lab.table import Cell, Column, Table, short
from .record import BATCHES, CompressRecord, Full, Search

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


def _with_full(section: Section[CompressRecord]) -> list[Method]:
    """Before the rows, the reference: each seed's full network, once."""
    found = {record.seed: record.of_full() for record in section.records}
    return [*([Row("full network", list(found.values()), reference=True)] if found else []), *section.rows]


# --- methods ---------------------------------------------------------------------------------------


def _both(text: Callable[[str], str]) -> str:
    """Of both batches."""
    return " / ".join(map(text, BATCHES))


def _faster(row: Method, batch: str, digits: int = 2) -> str:
    return f"{row.mean(lambda record: record.faster(batch)):.{digits}f}x"


def _less(row: Method, cost: str) -> str:
    return f"{row.mean(lambda record: 1 / record.left(cost)):.2f}x"


def _column(
    heading: str, cell: Callable[[Method], Cell], full: Callable[[Full], str] = lambda dense: ""
) -> Column[CompressRecord]:
    """Of methods; of the full network it says something else, or nothing."""
    return Column(heading, lambda row: full(row.records[0].dense) if row.reference else cell(row))


def _left(cost: str) -> Callable[[Method], Cell]:
    """Percent of the full network's."""
    return lambda row: f"{row.mean(lambda record: 100 * record.left(cost)):.1f}"


LABEL: Column[CompressRecord] = Column("", lambda row: row.label, always=True)
TEST: Column[CompressRecord] = Column("test", lambda row: str(row.test), missing="not yet run")
UNTRAINED = replace(TEST, cell=lambda row: str(row.estimate(lambda record: record.untrained.test)))
VAL: Column[CompressRecord] = Column("validation, %", lambda row: str(row.val))
PARAMETERS = _column("parameters, %", _left("parameters"), lambda full: f"{full.parameters:,}")
FASTER = _column("faster", lambda row: _both(lambda batch: _faster(row, batch)))
EVALUATIONS = _column("evaluations", lambda row: f"{row.mean(lambda record: record.search.evaluations):,.0f}")


def _scores(section: Section[CompressRecord], before: str, after: str, alone: str) -> list[Column[CompressRecord]]:
    """Before and after fine-tuning; alone, if no network was fine-tuned."""
    if not any("finetuned" in record.compact.stages for record in section.records):
        return [replace(TEST, heading=alone)]
    return [replace(UNTRAINED, heading=before), replace(TEST, heading=after, missing=None)]


def results(section: Section[CompressRecord]) -> Table:
    """For RESULTS.md."""
    records = section.records
    what = "agreement" if any(record.score == "agreement" for record in records) else "test"
    columns = [
        LABEL,
        *_scores(section, f"{what} recalibrated, %", f"{what} fine-tuned, %", f"{what}, %"),
        _column("fitness", lambda row: str(row.estimate(lambda record: _chosen_by(record.search)))),
        VAL,
        Column("seeds", lambda row: row.seeds(always=True), always=True),
        _column("MACs, %", _left("macs"), lambda full: f"{full.macs / 1e6:.2f} M"),
        PARAMETERS,
        FASTER,
        EVALUATIONS,
        _column("search, s", lambda row: f"{row.mean(lambda record: record.search.seconds):.0f}"),
    ]
    if any(record.search.algorithm.startswith("nsga2") for record in records):
        columns.append(_column("hypervolume", lambda row: str(row.estimate(lambda record: _volume(record.search)))))
    return Table.of(columns, _with_full(section))


def overview(section: Section[CompressRecord]) -> Table:
    """For the terminal."""
    columns: list[Column[CompressRecord]] = [
        replace(LABEL, heading="network"),
        Column("parameters", lambda row: f"{row.mean(lambda record: record.compact.parameters):,.0f}"),
        replace(TEST, heading="test accuracy, %", missing="not run"),
        Column("MACs, M", lambda row: f"{row.mean(lambda record: record.compact.macs) / 1e6:.2f}"),
        Column("faster", lambda row: _both(lambda batch: _faster(row, batch, 1))),
    ]
    return Table.of(columns, _with_full(section), title=section.title)


def report(section: Section[CompressRecord]) -> Table:
    """For the page: methods side by side, or the stages of one."""
    if len(section.rows) == 1:
        return _stages(section.rows[0])
    columns = [
        LABEL,
        *_scores(section, "recalibrated, %", "fine-tuned, %", f"{score(section)}, %"),
        VAL,
        Column("seeds", Row[CompressRecord].seeds, always=True),
        PARAMETERS,
        _column("MACs, %", _left("macs"), lambda full: f"{full.macs / 1e6:,.2f} M"),
        replace(FASTER, heading="faster, 1 / 64 images"),
        EVALUATIONS,
        _column("search, s", lambda row: short(row.mean(lambda record: record.search.seconds))),
    ]
    return Table.of(columns, _with_full(section), section.best.label, note=METHODS_NOTE)


def _chosen_by(search: Search) -> float:
    """What the network that was taken had on the images of the search; percent, where it is a share."""
    individuals = search.individuals
    quality = individuals.quality[(individuals.id or []).index(search.chosen)]
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


def _stage_rows(records: Sequence[CompressRecord], names: dict[str, str], counted: bool) -> list[Row[Scores]]:
    """From the full network to int8; of every network, what is shown.

    Args:
        names: of the stages; where there is none, its own.
        counted: parameters and multiplications of all stages are shown, not the last one's alone.
    """
    small = [record.compact for record in records]
    *before, last = small[0].stages
    rows = [Row[Scores]("full", [record.dense for record in records], reference=True)]
    for stage in before:
        scores = [network.stages[stage].model_dump() for network in small]
        if counted:
            for network, of in zip(small, scores, strict=True):
                of |= {"parameters": network.parameters, "macs": network.macs}
        rows.append(Row(names.get(stage, stage), [Scores.model_validate(of) for of in scores]))
    rows.append(Row(names.get(last, last), [*small]))
    int8 = [record.int8 for record in records if record.int8 is not None]
    return [*rows, Row(names["int8"], [*int8])] if len(int8) == len(records) else rows


def _stage_columns(what: str, latency: str, memory: str) -> list[Column[Scores]]:
    def values(row: Row[Scores], key: str) -> list[Any]:
        return [value for network in row.records if (value := getattr(network, key, None)) is not None]

    def counted(key: str, scale: float, digits: int = 0) -> Callable[[Row[Scores]], Cell]:
        return lambda row: f"{statistics.mean(of) / scale:,.{digits}f}" if (of := values(row, key)) else ""

    def measured(key: str) -> Callable[[Row[Scores]], Cell]:
        return lambda row: (
            _both(lambda b: f"{statistics.median(v[b] for v in of):.2f}") if (of := values(row, key)) else ""
        )

    return [
        Column("network", lambda row: row.label),
        Column(what, lambda row: str(row.test)),
        Column("validation, %", lambda row: str(row.val)),
        Column("parameters", counted("parameters", 1)),
        Column("MACs, M", counted("macs", 1e6, 2)),
        Column("file, kB", counted("bytes", 1000)),
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
    columns = _stage_columns(what, "latency, ms, 1 / 64 images", "peak memory, MB, 1 / 64")
    rows = _stage_rows(records, names, counted=False)
    last = list(records[0].compact.stages)[-1]
    table = Table.of(columns, rows, best=names.get(last, last), note=STAGES_NOTE)
    fewer = [_less(method, cost) for cost in ("parameters", "macs", "bytes")]
    faster = _both(lambda batch: _faster(method, batch))
    memory = _both(lambda b: f"{method.mean(lambda r: r.dense.peak_memory_mb[b] / r.compact.peak_memory_mb[b]):.2f}x")
    table.lines.append(("", ["less, or faster", "", "", *fewer, faster, memory]))
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
        _stage_rows(records, names, counted=True),
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
        full = _with_full(section)[0]
        out = [f"The full network reaches {full.test.mean:.2f} % on the test part with {size}"]
    else:
        out = [
            "Scores are the share of images for which the smaller network's class is the full network's, which "
            f"has {size}"
        ]
    what = f"Best of {len(rows)} methods is {best.label}, with" if len(rows) > 1 else "The smaller one reaches"
    out.append(
        f"{what} {best.test} % ({best.sample}), with {_less(best, 'parameters')} fewer parameters and "
        f"{_less(best, 'macs')} fewer multiply-adds; it is {_faster(best, '1')} faster for one image and "
        f"{_faster(best, '64')} for 64."
    )
    if len(rows) > 1:
        others = [row for row in rows if row is not best]
        unlike = [row.label for row in others if row.test.overlaps(best.test) is False]
        near = [row.label for row in others if row.test.overlaps(best.test)]
        if unlike:
            out.append(f"Its 95 % interval is separated from {joined(unlike)}.")
        if near:
            out.append(f"It overlaps with {joined(near)}: there, the difference may be chance.")
        if not unlike and not near:
            out.append("Without several seeds of each nothing can be said about chance.")
    return " ".join(out)
