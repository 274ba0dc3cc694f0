"""Records of several seeds in rows, rows in sections, and what several seeds say of one number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .record import Record, Scores

__all__ = ["Estimate", "R", "Row", "Section"]

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""The 97.5 % quantiles of Student's t, from 1 degree of freedom on."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half its 95 % interval by Student's t; None of a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        n = len(values)
        if n < 2:
            return cls(values[0], None)
        quantile = T95[n - 2] if n - 2 < len(T95) else 1.96 + 2.5 / (n - 1)
        return cls(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(n))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")

    def overlaps(self, other: Estimate) -> bool | None:
        """Whether the intervals overlap; None if one is missing."""
        if self.half is None or other.half is None:
            return None
        return abs(self.mean - other.mean) <= self.half + other.half


R = TypeVar("R", bound=Record | Scores)


@dataclass
class Row(Generic[R]):
    """The records of one configuration, or their networks, by seed."""

    label: str
    records: list[R]
    planned: int | None = None
    """Seeds of the plan, if there is one."""
    reference: bool = False
    """What the others are compared with: teachers, full networks."""

    @property
    def test(self) -> Estimate:
        return self.estimate(lambda record: record.test)

    @property
    def val(self) -> Estimate:
        return self.estimate(lambda record: record.val)

    def estimate(self, value: Callable[[R], float]) -> Estimate:
        return Estimate.of(list(map(value, self.records)))

    def mean(self, value: Callable[[R], float]) -> float:
        return statistics.mean(map(value, self.records))

    def seeds(self, always: bool = False) -> str:
        """How many there are, and of how many.

        Args:
            always: also say of how many where all are there.
        """
        n, planned = len(self.records), self.planned
        return str(n) if planned is None or (n >= planned and not always) else f"{n} of {max(n, planned)}"

    @property
    def sample(self) -> str:
        """What its scores are, in words."""
        n = len(self.records)
        return "a single seed" if n == 1 else f"mean and 95 % interval of {n} seeds"


@dataclass
class Section(Generic[R]):
    """Rows that can be compared: of one experiment, or of one data set and reference."""

    name: str
    title: str
    rows: list[Row[R]]
    note: str = ""

    @property
    def done(self) -> list[Row[R]]:
        return [row for row in self.rows if row.records]

    @property
    def records(self) -> list[R]:
        return [record for row in self.rows for record in row.records]

    @property
    def best(self) -> Row[R]:
        """By the mean test score."""
        return max(self.done, key=lambda row: row.test.mean)
