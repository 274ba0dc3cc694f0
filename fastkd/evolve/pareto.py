"""Fronts of several objectives, all minimised: Deb et al., "A fast and elitist multiobjective genetic
algorithm: NSGA-II", IEEE Transactions on Evolutionary Computation 6(2), 2002."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["crowding_distance", "hypervolume", "nondominated", "nondominated_sort", "survivors"]

BLOCK = 1 << 24  # comparisons at once


def nondominated_sort(objectives: Tensor) -> Tensor:
    """int64 [P]: the front of each individual, 0 for those that no other dominates.

    Equal individuals are in the same front. For two objectives memory is O(P), and time O(P log P) and O(P) for each
    front; for more, memory is P^2 bytes.

    >>> nondominated_sort(torch.tensor([[0.0, 2.0], [1.0, 1.0], [1.0, 2.0]]))
    tensor([0, 0, 1])

    Args:
        objectives: float [P, K], minimised.
    """
    _check(objectives)
    distinct, inverse = _distinct(objectives)
    if objectives.shape[1] == 1:
        return inverse
    front = torch.full((len(distinct),), -1, dtype=torch.int64, device=objectives.device)
    left, k = torch.arange(len(distinct), device=objectives.device), 0
    if objectives.shape[1] == 2:
        while len(left):  # who comes earlier is no worse in the first objective
            y = distinct[left, 1]
            first = torch.cat((y.new_ones(1, dtype=torch.bool), y[1:] < y.cummin(0).values[:-1]))
            front[left[first]] = k
            left, k = left[~first], k + 1
        return front[inverse]
    rows = max(1, BLOCK // max(distinct.numel(), 1))
    worse = torch.cat([(distinct <= some[:, None]).all(2) for some in torch.split(distinct, rows)])  # [who, than whom]
    while len(left):
        first = worse[left][:, left].sum(1) == 1  # dominated by none but itself
        front[left[first]] = k
        left, k = left[~first], k + 1
    return front[inverse]


def nondominated(objectives: Tensor) -> Tensor:
    """int64 [F], ascending: those that no other dominates, one of each that are equal (the first).

    >>> nondominated(torch.tensor([[1.0, 2.0], [0.0, 2.0], [1.0, 1.0], [1.0, 1.0]]))
    tensor([1, 2])

    Args:
        objectives: float [P, K], minimised.
    """
    _check(objectives)
    distinct, inverse = _distinct(objectives)
    rows = torch.arange(len(objectives), device=objectives.device)
    first = torch.full((len(distinct),), len(objectives), dtype=torch.int64, device=objectives.device)
    first.scatter_reduce_(0, inverse, rows, "amin")
    if objectives.shape[1] == 2 and len(distinct):
        y = distinct[:, 1]
        return first[torch.cat((y.new_ones(1, dtype=torch.bool), y[1:] < y.cummin(0).values[:-1]))].sort().values
    return first[nondominated_sort(distinct) == 0].sort().values


def crowding_distance(objectives: Tensor, front: Tensor) -> Tensor:
    """float64 [P]: how far the neighbours in the own front are apart, summed over objectives, each relative to the
    front's extent; inf at the ends. Of equal values the one that comes first counts as the smaller.

    >>> points = torch.tensor([[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]])
    >>> crowding_distance(points, nondominated_sort(points))
    tensor([inf, 2., inf], dtype=torch.float64)

    Args:
        objectives: float [P, K].
        front: int64 [P], from :func:`nondominated_sort`.
    """
    _check(objectives)
    out = torch.zeros(len(objectives), dtype=torch.float64, device=objectives.device)
    if not len(objectives):
        return out
    fronts = int(front.max()) + 1
    inf = out.new_full((1,), torch.inf)
    for x in objectives.double().unbind(1):
        order = x.argsort(stable=True)
        order = order[front[order].argsort(stable=True)]  # by front, then by value
        f, y = front[order], x[order]
        low, high = (
            out.new_zeros(fronts).scatter_reduce_(0, f, y, how, include_self=False) for how in ("amin", "amax")
        )
        extent = (high - low)[f]
        new = f[1:] != f[:-1]
        edge = torch.cat((new.new_ones(1), new)) | torch.cat((new, new.new_ones(1)))
        apart = torch.cat((inf, y[2:] - y[:-2], inf))[: len(y)]
        apart = torch.where(extent > 0, apart / extent.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        out[order] += torch.where(edge, torch.inf, apart)
    return out


def survivors(objectives: Tensor, count: int, duplicate: Tensor | None = None) -> Tensor:
    """int64 [count]: the best by front, and within the last one by crowding distance, equal ones in order.

    Args:
        objectives: float [P, K].
        duplicate: bool [P], these come after all others.
    """
    front = nondominated_sort(objectives)
    if duplicate is not None:
        front = torch.where(duplicate, front + int(front.max()) + 1, front)
    order = crowding_distance(objectives, front).argsort(descending=True, stable=True)
    return order[front[order].argsort(stable=True)][:count]


def hypervolume(objectives: Tensor, reference: Sequence[float] | Tensor) -> float:
    """The exact area that two minimised objectives dominate, up to the reference point; those beyond it count nothing.

    >>> hypervolume(torch.tensor([[0.25, 0.5]]), (1, 1))
    0.375

    Args:
        objectives: float [P, 2]; may be empty.
        reference: two numbers.
    """
    _check(objectives)
    if objectives.shape[1] != 2:
        raise ValueError(f"hypervolume is for 2 objectives, got {objectives.shape[1]}")
    point = torch.as_tensor(reference, dtype=torch.float64, device=objectives.device)
    inside = objectives.double()[(objectives < point).all(1)]
    if not len(inside):
        return 0.0
    x, y = inside[nondominated(inside)].unbind(1)
    order = x.argsort()
    x, y = x[order], y[order]  # x ascends, y descends
    return float(((point[0] - x) * (torch.cat((point[1:], y[:-1])) - y)).sum())


def _distinct(objectives: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows in lexicographic order, and which of them each row is."""
    distinct: Tensor
    inverse: Tensor
    distinct, inverse = torch.unique(objectives, dim=0, return_inverse=True)
    return distinct, inverse


def _check(objectives: Tensor) -> None:
    if not isinstance(objectives, Tensor) or not objectives.is_floating_point():
        raise TypeError(
            "objectives must be a floating-point tensor, got "
            f"{objectives.dtype if isinstance(objectives, Tensor) else type(objectives).__name__}"
        )
    if objectives.dim() != 2 or objectives.shape[1] < 1:
        raise ValueError(f"objectives must have shape [P, K], got {list(objectives.shape)}")
    if bool(objectives.isnan().any()):
        raise ValueError(f"objectives[{int(objectives.isnan().any(1).nonzero()[0])}] is nan")
