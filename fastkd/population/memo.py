"""What is known of masks, so that none is measured twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import distinct

__all__ = ["Memo", "Stats"]

Remember = Callable[[slice, Tensor], None]
"""Takes float64 [n, columns] of some rows of what was to be measured."""


@dataclass
class Stats:
    """Counts of individuals since construction."""

    asked: int = 0
    computed: int = 0
    remembered: int = 0
    """Found in the memo."""
    duplicates: int = 0
    """Equal to another one of the same call."""


class Memo:
    """Values of masks in a context (what they were measured by and on), in the order in which they were measured.

    >>> memo = Memo(1)
    >>> measure = lambda masks, remember: remember(slice(0, len(masks)), masks.sum(1, dtype=torch.float64)[:, None])
    >>> memo.recall(torch.tensor([[True, True], [False, True], [True, True]]), measure)
    tensor([[2.],
            [1.],
            [2.]], dtype=torch.float64)
    >>> len(memo)
    2

    Args:
        columns: numbers per mask.
        stats: where individuals are counted.
    """

    def __init__(self, columns: int, stats: Stats | None = None) -> None:
        self.stats = Stats() if stats is None else stats
        self._row: dict[bytes, int] = {}  # digest of a mask, then the context -> row of values
        self.values = torch.empty(0, columns, dtype=torch.float64)
        """float64 [n, columns], on the CPU."""

    def __len__(self) -> int:
        return len(self._row)

    @property
    def keys(self) -> list[bytes]:
        """Of each row of `values`: the digest of the mask (16 bytes), then the context."""
        return list(self._row)

    def restore(self, keys: Iterable[bytes], values: Tensor) -> None:
        """Takes the keys and values of another one in place of its own."""
        self._row, self.values = {key: row for row, key in enumerate(keys)}, values

    def recall(self, masks: Tensor, measure: Callable[[Tensor, Remember], None], context: bytes = b"") -> Tensor:
        """float64 [P, columns], on the CPU, of masks bool [P, genes].

        Args:
            measure: called with those masks that are not known, each once and in the order of their genes, if there
                are any. It hands over the values of one slice of these rows after the other; what was handed over is
                known, even if `measure` then fails.
            context: of the same length for every call.
        """
        digests, first, inverse = distinct(masks)
        keys = [digest + context for digest in digests]
        new = [k for k, key in enumerate(keys) if key not in self._row]
        self.stats.asked += len(masks)
        self.stats.duplicates += len(masks) - len(keys)
        self.stats.remembered += len(keys) - len(new)

        def remember(rows: slice, values: Tensor) -> None:
            start = len(self.values)
            self.values = torch.cat((self.values, values))
            self._row.update((keys[k], start + i) for i, k in enumerate(new[rows]))
            self.stats.computed += len(values)

        if new:
            measure(masks[first[new].to(masks.device)], remember)
        return self.values[torch.tensor([self._row[key] for key in keys])[inverse]]
