"""Which masks are allowed: costs by the number of filters in each group, and the repair of masks to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._checks import integer, is_number
from ..population import GeneSpace
from ..population.space import COSTS
from .ranking import group_norm

__all__ = ["Limits", "largest"]

BLOCK = 1 << 22  # genes worked on at once
STEPS = 256  # of densities that are tried
HALVINGS = 40  # of the interval of a factor


class _Removal(NamedTuple):
    """The weakest filters of every group come first, by their place in the group relative to its size, so that all
    groups shrink alike. Within the group: ascending l1, equal ones by number."""

    order: Tensor
    """int64 [genes]: from the first that is removed to the last."""
    by: Tensor
    """int64 [genes]: group by group, the weakest first."""
    back: Tensor
    """int64 [genes]: the inverse of `by`."""
    among: Tensor
    """int32 [genes + 1, groups]: how many of a group are among the first t of the order."""


class Limits:
    """Which masks are allowed: at least so many filters per group, and at most such costs.

    A budget is stated here and nowhere else. One of these serves a search, what it starts from, its controls and what
    is reported of it.

    >>> import fastkd.population, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> space = fastkd.population.trace(model, torch.zeros(1, 1, 6, 6))
    >>> limits = Limits(space, {"macs": 0.5})
    >>> masks = limits.repair(space.ones(2))
    >>> masks.sum(1), limits.within(limits.counts(masks))
    (tensor([2, 2]), tensor([True, True]))

    Args:
        budget: cost -> fraction of the full network's, in (0, 1]. Costs are "macs", "parameters", "filters"; all
            that are given must hold.
        k_min: filters (genes) that every group keeps, or all where it has fewer.
        fill: searches over widths spend all of the budget; not so where a smaller cost is worth something.

    Attributes:
        budget: cost -> how much of it is allowed, in its own unit.
        full: cost -> how much the full network takes.
        sizes, least: int64 [groups], how many filters each group has, and keeps at least.

    Raises:
        ValueError: an unknown cost, a fraction out of range, or one that no mask can meet: the message says the
            least that is possible.
    """

    def __init__(
        self, space: GeneSpace, budget: Mapping[str, float] | None = None, k_min: int = 1, *, fill: bool = True
    ) -> None:
        self.space, self.k_min, self.fill = space, integer("k_min", k_min, 1), fill
        self.sizes = torch.tensor([g.size for g in space.groups], dtype=torch.int64)
        self._ends = torch.cat((torch.zeros(1, dtype=torch.int64), self.sizes.cumsum(0)))
        # Channels are linear in the number of filters per group; float64 is exact and has BLAS.
        groups = len(self.sizes)
        one = torch.zeros(groups + 1, space.num_genes, dtype=torch.bool)
        one[torch.arange(groups), self._ends[:-1]] = True
        channels = space.channels(one)
        self._kept = channels[-1].double()
        self._per_filter = channels[:-1].double() - self._kept
        self.full = {name: int(self.costs(self.sizes[None], name)) for name in COSTS}
        every = torch.ones(1, space.num_genes, dtype=torch.bool)
        assert torch.equal(space.channels(every), self._channels(self.sizes[None]))

        self.least = self.sizes.clamp(max=k_min)
        self.fractions, self.budget = dict(budget or {}), dict[str, int]()
        for name, fraction in self.fractions.items():
            if name not in COSTS:
                raise ValueError(f"budget must be of {', '.join(COSTS)}, got {name!r}")
            if not is_number(fraction):
                raise TypeError(f"budget[{name!r}] must be a number, got {fraction!r}")
            if not 0 < fraction <= 1:
                raise ValueError(
                    f"budget[{name!r}] must be in (0, 1], a fraction of the full network's, got {fraction}"
                )
            self.budget[name] = math.floor(Fraction(str(fraction)) * self.full[name])  # 0.1 means a tenth
            least = int(self.costs(self.least[None], name))
            if least > self.budget[name]:
                up = math.ceil(least / self.full[name] * 1e4) / 1e4
                raise ValueError(
                    f"budget[{name!r}] = {fraction} ({self.budget[name]:,} of {self.full[name]:,}) can be met by no "
                    f"mask: with k_min = {k_min} in every group the least possible is {least:,}, a fraction of {up:g}"
                )

    def identity(self) -> dict[str, Any]:
        """For JSON."""
        return {"budget": self.fractions, "k_min": self.k_min}

    # --- costs -------------------------------------------------------------------------------------

    def counts(self, masks: Tensor) -> Tensor:
        """int64 [P, groups]: filters that are on, of masks bool [P, genes]."""
        if not len(self.sizes):
            return torch.zeros(len(masks), 0, dtype=torch.int64, device=masks.device)
        if masks.device.type == "cpu":
            rows, out = masks.contiguous().view(torch.uint8).numpy(), np.empty((len(masks), len(self.sizes)), np.int64)
            step = max(1, BLOCK // (8 * self.space.num_genes))
            for first in range(0, len(rows), step):  # reduceat makes int64 of all that it is given
                np.add.reduceat(
                    rows[first : first + step],
                    self._ends[:-1].numpy(),
                    axis=1,
                    dtype=np.int64,
                    out=out[first : first + step],
                )
            return torch.from_numpy(out)
        return torch.stack([x.sum(1) for x in torch.split(masks, self.sizes.tolist(), 1)], 1)

    def costs(self, counts: Tensor, name: str) -> Tensor:
        """int64 [P], given filters per group int64 [P, groups]."""
        return self.space.cost(name, self._channels(counts))

    def _channels(self, counts: Tensor) -> Tensor:
        return (counts.double() @ self._per_filter.to(counts.device) + self._kept.to(counts.device)).long()

    def within(self, counts: Tensor) -> Tensor:
        """bool [P]: whether all budgets hold."""
        ok = torch.ones(len(counts), dtype=torch.bool, device=counts.device)
        for name, limit in self.budget.items():
            ok &= self.costs(counts, name) <= limit
        return ok

    # --- widths ------------------------------------------------------------------------------------

    @cached_property
    def by_norm(self) -> Tensor:
        """int64 [genes]: places within groups by :func:`group_norm`, 0 for the largest, equal ones by number."""
        norm, place = group_norm(self.space)[0], torch.empty(self.space.num_genes, dtype=torch.int64)
        for g in self.space.groups:
            largest_first = norm[g.start : g.start + g.size].argsort(descending=True, stable=True)
            place[g.start + largest_first] = torch.arange(g.size)
        return place

    def widest(self, counts: Tensor) -> Tensor:
        """bool [P, genes]: of every group so many filters, int64 [P, groups], those of largest norm."""
        place, counts = self.by_norm.int().to(counts.device), counts.int()
        out = torch.empty(len(counts), len(place), dtype=torch.bool, device=counts.device)
        for k, g in enumerate(self.space.groups):
            torch.lt(place[g.start : g.start + g.size], counts[:, k : k + 1], out=out[:, g.start : g.start + g.size])
        return out

    def scaled(self, widths: Tensor, up: bool = False) -> Tensor:
        """Filters per group, int64 [P, groups], within the limits: `widths`, which need not be whole, times one factor
        for each individual, rounded, then at least k_min and at most all.

        The factor is the largest one up to 1 with which every budget holds; with `up` and a budget, the largest one.
        """
        device, w = widths.device, widths.double().clamp(min=1e-3)
        least, sizes = self.least.to(device), self.sizes.to(device)
        low = torch.zeros(len(w), 1, dtype=torch.float64, device=device)
        high = (sizes / w).amax(1, keepdim=True) if up and self.budget and w.shape[1] else torch.ones_like(low)

        def times(factor: Tensor) -> Tensor:
            return (w * factor + 0.5).floor().minimum(sizes).maximum(least).long()

        low = torch.where(self.within(times(high))[:, None], high, low)
        for _ in range(HALVINGS):
            if bool((low == high).all()):
                break
            middle = (low + high) / 2
            ok = self.within(times(middle))[:, None]
            low, high = torch.where(ok, middle, low), torch.where(ok, high, middle)
        return times(low)

    # --- repair ------------------------------------------------------------------------------------

    @cached_property
    def _removal(self) -> _Removal:
        by = torch.empty(self.space.num_genes, dtype=torch.int64)
        place = torch.empty(self.space.num_genes, dtype=torch.float64)
        for start, size in zip(self._ends.tolist(), self.sizes.tolist(), strict=False):
            by[start : start + size] = start + self.space.l1[start : start + size].argsort(stable=True)
            place[start : start + size] = (torch.arange(size) + 0.5) / size
        order = by[place.argsort(stable=True)]
        groups = len(self.sizes)
        of_group = torch.repeat_interleave(torch.arange(groups), self.sizes)
        first = torch.nn.functional.one_hot(of_group[order], max(groups, 1)).int().cumsum(0, dtype=torch.int32)
        among = torch.cat((first[:1] * 0, first)) if len(first) else torch.zeros(1, groups, dtype=torch.int32)
        return _Removal(order, by, by.argsort(), among)

    @property
    def order(self) -> Tensor:
        """int64 [genes]: what a repair removes first. It is of the weights at its first use."""
        return self._removal.order

    def repair(self, masks: Tensor) -> Tensor:
        """The masks bool [P, genes], changed where they are not allowed, and there no further than that.

        First every group gets its strongest (largest l1) filters back until it has k_min. Then filters are removed in
        the order of `order`, those that are off or among the last k_min of their group passed over, until every budget
        holds. Deterministic, and allowed masks stay as they are. Returns the argument itself if all are.
        """
        counts = self.counts(masks)
        wrong = (~self.within(counts) | (counts < self.least.to(counts.device)).any(1)).nonzero()[:, 0]
        if not len(wrong):
            return masks
        out = masks.clone()
        for rows in torch.split(wrong, max(1, BLOCK // max(self.space.num_genes, 1))):
            out[rows] = self._repaired(masks[rows])
        return out

    def _repaired(self, masks: Tensor) -> Tensor:
        device = masks.device
        ends, least = self._ends.to(device), self.least.to(device)
        _, by, back, among = (x.to(device) for x in self._removal)
        group = torch.repeat_interleave(torch.arange(len(self.sizes)), self.sizes).to(device)
        on = masks.index_select(1, by)
        before = self._before(on)
        total = (before[:, ends[1:]] - before[:, ends[:-1]]).long()
        if bool((total < least).any()):
            # From the strong end: how many of the group that are off come at or after each place.
            place = torch.arange(len(by), device=device)
            off_after = (ends[1:][group] - place) - (before[:, ends[1:]][:, group] - before[:, :-1])
            on |= off_after <= (least - total).clamp(min=0)[:, group]
            before = self._before(on)
        start = before[:, ends[:-1]].long()
        total = before[:, ends[1:]].long() - start
        spare = (total - least).clamp(min=0)

        def removed(first: Tensor) -> Tensor:
            """int64 [P, groups], when the first ones [P] of the order are passed through."""
            upto = ends[:-1] + among[first].long()
            return (before.gather(1, upto).long() - start).minimum(spare)

        low = torch.zeros(len(masks), dtype=torch.int64, device=device)
        high = torch.full_like(low, len(by))
        while bool((low < high).any()):  # the fewest with which the budgets hold
            middle = (low + high) // 2
            ok = self.within(total - removed(middle))
            high, low = torch.where(ok, middle, high), torch.where(ok, low, middle + 1)
        # The weakest so many of each group go.
        stays = before[:, :-1] >= (start + removed(high)).to(before.dtype).index_select(1, group)
        return stays.bitwise_and_(on).index_select(1, back)

    @staticmethod
    def _before(on: Tensor) -> Tensor:
        """[P, genes + 1]: how many are on before each place of the flat string."""
        dtype = torch.int16 if on.shape[1] < 2**15 else torch.int32
        out = torch.zeros(len(on), on.shape[1] + 1, dtype=dtype, device=on.device)
        torch.cumsum(on, 1, dtype=dtype, out=out[:, 1:])
        return out


def largest(limits: Limits, ladder: Callable[[float], Tensor]) -> float:
    """The largest density, in steps, with which a ladder's mask, bool [1, genes], holds the budget; 0 if none does."""
    low, high = 0, STEPS
    while low < high:
        middle = (low + high + 1) // 2
        if bool(limits.within(limits.counts(ladder(middle / STEPS)))[0]):
            low = middle
        else:
            high = middle - 1
    return low / STEPS
