"""The images on which a population is evaluated."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime import fingerprint

__all__ = ["Batches", "Data", "images_of", "listed"]

Batches = Iterable[Any]
"""Of images x [N, C, ...], or of pairs (x, labels int64 [N])."""


class Data:
    """Batches as one row of images, with or without labels.

    Attributes:
        x: the batches, each [N, C, ...].
        y: int64 [images], on the CPU, or None.
        images: how many there are.
    """

    def __init__(self, x: Sequence[Tensor], y: Tensor | None = None) -> None:
        if not x:
            raise ValueError("batches must have at least one batch, got none")
        self.x, self.y = [t.contiguous() for t in x], y
        self._ends = list(itertools.accumulate(len(t) for t in x))
        self.images = self._ends[-1]

    @classmethod
    def labelled(cls, batches: Batches, check: Callable[..., Tensor], classes: int) -> Data:
        """Of pairs (x, y) with labels in [0, classes - 1]; `check` gives an x that can be used, or raises."""
        xs, ys = [], []
        for k, batch in enumerate(listed(batches)):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"batches[{k}] must be a pair (x, y), got {type(batch).__name__}")
            x, y = check(batch[0], f"x of batches[{k}]"), batch[1]
            if not isinstance(y, Tensor) or y.dtype != torch.int64:
                raise TypeError(
                    f"y of batches[{k}] must be a torch.int64 tensor, got "
                    f"{y.dtype if isinstance(y, Tensor) else type(y).__name__}"
                )
            if y.shape != x.shape[:1]:
                raise ValueError(f"y of batches[{k}] must have shape [{len(x)}] as x has images, got {list(y.shape)}")
            low, high = y.min().item(), y.max().item()
            if low < 0 or high >= classes:
                raise ValueError(f"y of batches[{k}] must be in [0, {classes - 1}], got {low if low < 0 else high}")
            xs.append(x)
            ys.append(y.cpu())
        return cls(xs, torch.cat(ys) if ys else None)

    def pieces(self, most: int) -> Iterator[tuple[slice, Tensor]]:
        """(which images, the images), at most so many and about equally many."""
        count = -(-self.images // most)
        for k in range(count):
            a, b = self.images * k // count, self.images * (k + 1) // count
            parts = []
            i, at = bisect.bisect_right(self._ends, a), a
            while at < b:
                start, end = self._ends[i] - len(self.x[i]), min(self._ends[i], b)
                parts.append(self.x[i][at - start : end - start])
                i, at = i + 1, end
            yield slice(a, b), parts[0] if len(parts) == 1 else torch.cat(parts)

    def fingerprint(self) -> str:
        """Of images and labels, however they are cut into batches."""
        return fingerprint.of_tensors(*self.x, *(() if self.y is None else (self.y,)))


def listed(batches: Any) -> Iterable[Any]:
    """A tensor, or one pair of images and labels, is one batch."""
    one_pair = (
        isinstance(batches, tuple)
        and len(batches) == 2
        and all(isinstance(part, Tensor) for part in batches)
        and batches[1].dim() == 1
    )
    if isinstance(batches, Tensor) or one_pair:
        return [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable, got {type(batches).__name__}")
    return batches


def images_of(batches: Batches, check: Callable[..., Tensor]) -> Iterator[Tensor]:
    """The images of each batch; labels are not looked at."""
    for k, batch in enumerate(listed(batches)):
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        yield check(x, f"x of batches[{k}]")
