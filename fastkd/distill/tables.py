"""Tables of distillation, and what their numbers say. They need neither networks nor data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .._text import joined
from ..lab.rows import Row, Section
from ..lab.table import Column, Table, short
from .record import Cost, DistillRecord, Network

__all__ = [
    "INTRODUCTION",
    "Students",
    "costs",
    "overview",
    "ratio",
    "report",
    "results",
    "summary",
    "teachers",
    "trained",
]

Students = Row[DistillRecord]
Networks = Row[Network]

INTRODUCTION = (
    "Made by `fastkd grid` from the records in `cells/`. Scores are in percent on the test "
    "part, mean ± half the 95 % interval (Student's t) over seeds; the epoch is chosen on the validation "
    "part, and so was everything that was tuned. A cell that has not been run is shown as such."
)
NOTE = (
    "Mean ± half the 95 % interval of the mean (Student's t over seeds); bold: the best "
    "student. Scores are accuracy, or micro-F1 where nodes have several labels, at the epoch best on the "
    "validation part. MACs and latency are of a forward pass over one batch of the test part, medians over "
    "seeds; MACs count dense products and convolutions alone. Peak memory is the largest of training, beyond "
    "what the process held before. Training seconds are a mean."
)


def teachers(section: Section[DistillRecord]) -> list[Networks]:
    """References: several if rows differ in their teachers. Records of equal scores share one teacher."""
    rows: dict[str, list[str]] = {}
    found: dict[str, dict[tuple[float, float], Network]] = {}
    for row in section.done:
        for record in row.records:
            key, teacher = record.of_teacher, record.teacher
            rows.setdefault(key, []).append(row.label)
            found.setdefault(key, {}).setdefault((teacher.test, teacher.val), teacher)
    return [
        Row(
            "teacher" if len(found) == 1 else f"teacher of {', '.join(dict.fromkeys(rows[key]))}",
            list(of.values()),
            reference=True,
        )
        for key, of in found.items()
    ]


def costs(of: Sequence[Network], cost: str) -> float | None:
    """The median over the networks for which it was measured."""
    if cost == "parameters":
        return statistics.median(network.parameters for network in of)
    values = [value for n in of if (value := getattr(n.cost or Cost(), cost)) is not None]
    return statistics.median(values) if values else None


def ratio(value: float) -> str:
    """How much smaller something is than the teacher's."""
    return f"1/{value:.3g}" if value >= 1 else f"{1 / value:.3g}×"


# --- tables ----------------------------------------------------------------------------------------


def _students(section: Section[DistillRecord]) -> list[Networks]:
    return [Row(row.label, [record.student for record in row.records], row.planned) for row in section.rows]


def _score(part: str) -> Callable[[Networks], str]:
    def cell(row: Networks) -> str:
        estimate = row.estimate(lambda network: getattr(network, part))
        return f"{estimate.mean:.2f}" if row.reference else str(estimate)

    return cell


def _seconds(row: Networks) -> float:
    return row.mean(lambda network: network.seconds)


def _peak(row: Networks) -> float | None:
    return max((n.peak_memory_mb for n in row.records if n.peak_memory_mb is not None), default=None)


LABEL: Column[Network] = Column("network", lambda row: row.label, always=True)
TEST = Column("test, %", _score("test"), missing="not yet run")
VAL = Column("validation, %", _score("val"))
PARAMETERS: Column[Network] = Column("parameters", lambda row: f"{row.records[0].parameters:,}")


def results(section: Section[DistillRecord]) -> Table:
    """For RESULTS.md."""
    teacher = [Row("teacher", [record.teacher], reference=True) for record in section.records[:1]]
    columns: list[Column[Network]] = [
        replace(LABEL, heading=None),
        TEST,
        VAL,
        Column("seeds", lambda row: row.seeds(always=True), always=True),
        PARAMETERS,
        Column("seconds", lambda row: f"{_seconds(row):.0f}"),
    ]
    return Table.of(columns, [*teacher, *_students(section)])


def overview(section: Section[DistillRecord]) -> Table:
    """For the terminal."""
    students = {row.label: row.records for row in _students(section)}
    return trained(section.title, section.records[0].teacher, students)


def trained(title: str, teacher: Network, students: Mapping[str, Sequence[Network]]) -> Table:
    """For the terminal: a teacher, and its students by their labels."""
    columns: list[Column[Network]] = [
        LABEL,
        replace(TEST, missing="not run"),
        VAL,
        PARAMETERS,
        Column("seconds", lambda row: f"{_seconds(row):.1f}"),
        Column("peak memory, MB", lambda row: "-" if (peak := _peak(row)) is None else f"{peak:.0f}"),
    ]
    rows = [Row("teacher", [teacher]), *(Row(label, list(networks)) for label, networks in students.items())]
    return Table.of(columns, rows, title=title)


def report(section: Section[DistillRecord]) -> Table:
    """For the page."""
    columns: list[Column[Network]] = [
        replace(LABEL, heading=None),
        replace(TEST, heading="test,\xa0%"),
        replace(VAL, heading="validation,\xa0%"),
        Column("seeds", Row[Network].seeds, always=True),
        PARAMETERS,
        Column("MACs,\xa0M", lambda row: short(costs(row.records, "mmacs"))),
        Column("latency,\xa0ms", lambda row: short(costs(row.records, "latency_ms"))),
        Column("peak memory,\xa0MB", lambda row: short(_peak(row))),
        Column("training,\xa0s", lambda row: short(_seconds(row))),
    ]
    return Table.of(columns, [*teachers(section), *_students(section)], section.best.label, note=NOTE)


# --- words -----------------------------------------------------------------------------------------


def summary(section: Section[DistillRecord]) -> str:
    """What the numbers say, and what they do not."""
    rows, best = section.done, section.best
    alone = next((row for row in rows if row.records[0].plain), None)
    out = [*_teacher(section), *_compared(rows, best, alone)]
    near = [row.label for row in rows if row not in (best, alone) and row.test.overlaps(best.test)]
    if near and best is not alone:
        out.append(f"The interval of {best.label} also overlaps with {joined(near)}.")
    if len(rows) > 1:
        chosen = max(rows, key=lambda row: row.val.mean)
        out.append(
            f"{best.label} is also the best by validation score."
            if chosen is best
            else f"By validation score the best is {chosen.label}, with {chosen.test} % on the test part."
        )
    return " ".join(out)


def _teacher(section: Section[DistillRecord]) -> list[str]:
    teacher, *others = teachers(section)
    if others:
        return []
    parameters = teacher.records[0].parameters
    sizes = sorted({row.records[0].student.parameters for row in section.done})
    size = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    share = f" ({ratio(parameters / sizes[0])} of the teacher's)" if len(sizes) == 1 else ""
    return [
        f"The teacher reaches {teacher.test.mean:.2f} % on the test part with "
        f"{parameters:,} parameters; the students have {size}{share}."
    ]


def _compared(rows: list[Students], best: Students, alone: Students | None) -> list[str]:
    """The best row and the student alone."""
    if alone is None:
        return [f"{_result(best, 'The best row')}. There is no run of the student alone to compare it with."]
    if len(rows) == 1:
        return [f"{_result(alone, 'The student')}. There is no distilled student to compare it with."]
    if best is alone:
        second = max((row for row in rows if row is not alone), key=lambda row: row.test.mean)
        return [
            f"No distilled student is better on average than {alone.label} ({alone.test} %); next is "
            f"{second.label} with {second.test} %. {_verdict(second, alone)}"
        ]
    difference = best.test.mean - alone.test.mean
    out = [
        f"{_result(best, f'Best of {len(rows)} rows')}, {difference:.2f} points above {alone.label} "
        f"({alone.test} %). {_verdict(best, alone)}"
    ]
    several = [row for row in rows if row.test.half is not None and row is not alone]
    if best.test.half is None and alone.test.half is not None and several:
        sure = max(several, key=lambda row: row.test.mean)
        out.append(f"Of the rows with several seeds, {_result(sure, 'the best')}. {_verdict(sure, alone)}")
    return out


def _result(row: Students, what: str) -> str:
    return f"{what} is {row.label} with {row.test} % ({row.sample})"


def _verdict(a: Students, b: Students) -> str:
    return {
        None: "With a single seed there is no interval, so nothing can be said about chance.",
        True: "The two 95 % intervals overlap: the difference may be chance.",
        False: "The two 95 % intervals are separated.",
    }[a.test.overlaps(b.test)]
