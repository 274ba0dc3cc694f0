"""Tables of distillation, and what their numbers say. They need neither networks nor data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .._text import joined
from ..lab.estimate import Estimate
from ..lab.record import Row, Section
from ..lab.table import Column, Table, short
from .record import Cost, DistillRecord, Network

__all__ = [
    "INTRODUCTION",
    "Students",
    "costs",
    "networks",
    "overview",
    "ratio",
    "report",
    "results",
    "summary",
    "teachers",
    "trained",
]

Students = Row[DistillRecord]

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


def networks(row: Students) -> list[Network]:
    """A row's students; of a reference, the teachers."""
    return [record.teacher if row.reference else record.student for record in row.records]


def teachers(section: Section[DistillRecord]) -> list[Students]:
    """References: several if rows differ in their teachers. Records of equal scores share one teacher."""
    rows: dict[str, dict[str, None]] = {}
    found: dict[str, dict[tuple[float, float], DistillRecord]] = {}
    for row in section.done:
        for record in row.records:
            key, teacher = record.of_teacher, record.teacher
            rows.setdefault(key, {})[row.label] = None
            found.setdefault(key, {}).setdefault((teacher.test, teacher.val), record)
    return [
        Row("teacher" if len(found) == 1 else f"teacher of {', '.join(rows[key])}", list(of.values()), reference=True)
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


# --- columns ---------------------------------------------------------------------------------------


def _score(part: str) -> Callable[[Students], str]:
    def cell(row: Students) -> str:
        if row.reference:
            return f"{statistics.mean(getattr(network, part) for network in networks(row)):.2f}"
        return str(getattr(row, part))

    return cell


def _seconds(of: Sequence[Network]) -> float:
    return statistics.mean(network.seconds for network in of)


def _peak(of: Sequence[Network]) -> float | None:
    return max((n.peak_memory_mb for n in of if n.peak_memory_mb is not None), default=None)


LABEL: Column[Students] = Column("network", lambda row: row.label, left=True, always=True)
TEST = Column("test, %", _score("test"), missing="not yet run")
VAL = Column("validation, %", _score("val"))
PARAMETERS: Column[Students] = Column("parameters", lambda row: f"{networks(row)[0].parameters:,}")


def results(section: Section[DistillRecord]) -> Table:
    """For RESULTS.md."""
    first = [Row("teacher", section.records[:1], reference=True)] if section.records else []
    seeds: Column[Students] = Column("seeds", lambda row: row.seeds(always=True), always=True)
    seconds: Column[Students] = Column("seconds", lambda row: f"{_seconds(networks(row)):.0f}")
    columns = [replace(LABEL, heading=None), TEST, VAL, seeds, PARAMETERS, seconds]
    return Table.of(columns, [*first, *section.rows], empty=lambda row: not row.records)


def overview(section: Section[DistillRecord]) -> Table:
    """For the terminal."""
    rows = {row.label: networks(row) for row in section.rows}
    return trained(section.title, section.records[0].teacher, rows)


def trained(title: str, teacher: Network, students: Mapping[str, Sequence[Network]]) -> Table:
    """For the terminal: a teacher, and its students by their labels."""
    Line = tuple[str, Sequence[Network]]
    columns: list[Column[Line]] = [
        Column("network", lambda line: line[0], left=True, always=True),
        Column("test, %", lambda line: str(Estimate.of([n.test for n in line[1]])), missing="not run"),
        Column("validation, %", lambda line: str(Estimate.of([n.val for n in line[1]]))),
        Column("parameters", lambda line: f"{line[1][0].parameters:,}"),
        Column("seconds", lambda line: f"{_seconds(line[1]):.1f}"),
        Column("peak memory, MB", lambda line: "-" if (peak := _peak(line[1])) is None else f"{peak:.0f}"),
    ]
    lines: list[Line] = [("teacher", [teacher]), *students.items()]
    return Table.of(columns, lines, empty=lambda line: not line[1], title=title)


def report(section: Section[DistillRecord]) -> Table:
    """For the page."""
    best = section.best
    columns: list[Column[Students]] = [
        replace(LABEL, heading=None),
        TEST,
        VAL,
        Column("seeds", Row.seeds, always=True),
        PARAMETERS,
        Column("MACs, M", lambda row: short(costs(networks(row), "mmacs"))),
        Column("latency, ms", lambda row: short(costs(networks(row), "latency_ms"))),
        Column("peak memory, MB", lambda row: short(_peak(networks(row)))),
        Column("training, s", lambda row: short(_seconds(networks(row)))),
    ]
    return Table.of(
        [replace(c, heading=c.heading and c.heading.replace(", ", ",\xa0")) for c in columns],
        [*teachers(section), *section.rows],
        kind=lambda row: "teacher" if row.reference else "best" if row is best else "",
        empty=lambda row: not row.records,
        note=NOTE,
    )


# --- words -----------------------------------------------------------------------------------------


def summary(section: Section[DistillRecord]) -> str:
    """What the numbers say, and what they do not."""
    rows, best = section.done, section.best
    alone = next((row for row in rows if row.plain), None)
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
    references = teachers(section)
    if len(references) > 1:
        return []
    of = networks(references[0])
    sizes = sorted({row.records[0].student.parameters for row in section.done})
    size = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    share = f" ({ratio(of[0].parameters / sizes[0])} of the teacher's)" if len(sizes) == 1 else ""
    return [
        f"The teacher reaches {statistics.mean(n.test for n in of):.2f} % on the test part with "
        f"{of[0].parameters:,} parameters; the students have {size}{share}."
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
    n = len(row.records)
    how = "a single seed" if n == 1 else f"mean and 95 % interval of {n} seeds"
    return f"{what} is {row.label} with {row.test} % ({how})"


def _verdict(a: Students, b: Students) -> str:
    overlap = a.test.overlaps(b.test)
    if overlap is None:
        return "With a single seed there is no interval, so nothing can be said about chance."
    return (
        "The two 95 % intervals overlap: the difference may be chance."
        if overlap
        else "The two 95 % intervals are separated."
    )
