"""What several seeds say of one number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Estimate"]

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
