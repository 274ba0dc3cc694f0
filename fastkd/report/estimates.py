"""Numbers of records, and what is said of several."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

__all__ = ["Estimate", "number", "short"]

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and half its 95 % interval; None of a single seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: list[float]) -> Estimate:
        # By Student's t, as fastkd.lab.plan has it; importing that would load networks and data sets.
        n = len(values)
        if n < 2:
            return cls(values[0], None)
        quantile = T95[n - 2] if n - 2 < len(T95) else 1.96 + 2.5 / (n - 1)
        return cls(statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(n))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")

    def overlaps(self, other: Estimate) -> bool | None:
        """Whether the intervals do; None if one is missing."""
        if self.half is None or other.half is None:
            return None
        return abs(self.mean - other.mean) <= self.half + other.half


def number(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        raise ValueError(f"{x!r} where a finite number should be")
    return float(x)


def short(value: float) -> str:
    """Three digits; thousands in full."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
