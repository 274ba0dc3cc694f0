"""Nearest neighbours among points of one or several clouds, in plain torch; :meth:`fastkd.Graph.from_knn` checks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["neighbours"]


def neighbours(x: Tensor, sizes: list[int], k: int, loop: bool) -> tuple[Tensor, Tensor]:
    """Compressed rows of the k nearest neighbours of every point in its own cloud.

    Args:
        x: [N, D] float32 or float64, cloud after cloud.
        sizes: the points of each cloud, N together.
        k: neighbours per point, >= 1; a smaller cloud gives what it has.
        loop: whether a point may be its own neighbour.

    Returns:
        rowptr int64 [N + 1] and col int64 [E], ascending within a row.
    """
    cols, counts, start = [], [], 0
    for size, run in itertools.groupby(sizes):
        clouds = len(list(run))
        near = max(0, min(k, size if loop else size - 1))
        points = x[start : start + clouds * size].view(clouds, size, x.shape[1])
        first = start + size * torch.arange(clouds, device=x.device)
        cols.append((_nearest(points, near, loop) + first[:, None, None]).flatten())
        counts.append(torch.full((clouds * size,), near, dtype=torch.int64, device=x.device))
        start += clouds * size
    rowptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    if start:
        torch.cumsum(torch.cat(counts), 0, out=rowptr[1:])
    return rowptr, torch.cat(cols) if cols else rowptr.new_empty(0)


def _nearest(x: Tensor, k: int, loop: bool) -> Tensor:
    """[B, n, k] indices of the nearest rows in the same cloud of x [B, n, D], ascending within a row."""
    clouds, n, _ = x.shape
    if k < 1:
        return torch.empty(clouds, n, 0, dtype=torch.int64, device=x.device)
    x = x - x.mean(1, keepdim=True)  # keeps the differences of squares small
    squares = (x * x).sum(2)[:, None]
    rows = max(1, min(n, (1 << 24) // n))  # of a large cloud, as many as 64 MB of distances hold
    together = max(1, (1 << 20) // (rows * n))  # of small clouds, as many as stay in the cache
    out = torch.empty(clouds, n, k, dtype=torch.int64, device=x.device)
    for c in range(0, clouds, together):
        cloud, square = x[c : c + together], squares[c : c + together]
        for r in range(0, n, rows):
            part = cloud[:, r : r + rows]
            distance = torch.baddbmm(square, part, cloud.mT, alpha=-2)  # less |row|^2, equal in a row
            if not loop:
                distance.diagonal(r, 1, 2).fill_(torch.inf)
            out[c : c + together, r : r + rows] = distance.topk(k, 2, largest=False, sorted=False).indices
    return out.sort(2).values
