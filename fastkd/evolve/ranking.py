"""Masks of the filters that are largest by a norm: l1 within every layer, or a norm over the whole network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..population import GeneSpace

__all__ = ["global_norm", "group_norm", "strongest", "uniform_l1"]


def uniform_l1(space: GeneSpace, density: float | Tensor, k_min: int = 1) -> Tensor:
    """The same fraction of every group, those of largest l1: the control of Li et al., "Pruning Filters for Efficient
    ConvNets", arXiv:1608.08710.

    At a budget: ``Limits(space, {"macs": 0.4}).repair(space.ones(1))`` removes in the same order, to the budget.

    >>> import fastkd.population, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> space = fastkd.population.trace(model, torch.zeros(1, 1, 6, 6))
    >>> uniform_l1(space, torch.tensor([0.5, 1.0])).sum(1)
    tensor([2, 4])

    Args:
        density: in [0, 1], or float [D].
        k_min: filters that every group keeps, or all where it has fewer.

    Returns:
        bool [D, genes], round(density * size) of each group, ties up.
    """
    d = _densities(density)
    out = torch.zeros(len(d), space.num_genes, dtype=torch.bool)
    for g in space.groups:
        keep = (d * g.size + 0.5).floor().clamp(min=min(k_min, g.size))
        strongest = space.l1[g.start : g.start + g.size].argsort(descending=True, stable=True)
        out[:, g.start + strongest] = torch.arange(g.size) < keep
    return out


def global_norm(space: GeneSpace, density: float | Tensor, k_min: int = 1, *, coupled: float = 0.0) -> Tensor:
    """The filters of largest norm in the whole network, so that some layers lose more than others: the group norm by
    which DepGraph ranks, Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv:2301.12900.

    A gene's norm is the mean, over the weights of convolutions, linear layers and batch normalisation that go with it
    (as their output and as their input), of the sum of squares, relative to the mean of its group. Unlike that
    package's, it also ranks the filters that an option-A shortcut couples.

    >>> import fastkd.population, torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> space = fastkd.population.trace(model, torch.zeros(1, 1, 6, 6))
    >>> global_norm(space, torch.tensor([0.25, 1.0])).sum(1)
    tensor([1, 4])

    Args:
        density: in [0, 1], or float [D].
        k_min: filters that every group keeps, or all where it has fewer.
        coupled: the norm is multiplied by how many weights go with the gene, to this power: at 1 the channels of
            shortcuts, on which many layers depend, stay until little else is left; at 0, as in DepGraph, it does not
            count.

    Returns:
        bool [D, genes], the round(density * genes) largest, ties up, and what k_min adds.
    """
    if not coupled >= 0:
        raise ValueError(f"coupled must be at least 0, got {coupled}")
    norm, count = group_norm(space)
    return strongest(space, norm * count**coupled, density, k_min)


def strongest(space: GeneSpace, norm: Tensor, density: float | Tensor, k_min: int = 1) -> Tensor:
    """As :func:`global_norm`, by norms float64 [genes] that are known."""
    d = _densities(density)
    place = torch.empty(space.num_genes, dtype=torch.int64)
    place[norm.argsort(descending=True, stable=True)] = torch.arange(space.num_genes)
    out = place < (d * space.num_genes + 0.5).floor()
    for g in space.groups:
        first = norm[g.start : g.start + g.size].argsort(descending=True, stable=True)[:k_min]
        out[:, g.start + first] = True
    return out


def _densities(density: float | Tensor) -> Tensor:
    """float64 [D, 1]"""
    d = torch.as_tensor(density, dtype=torch.float64).reshape(-1, 1)
    if not bool(((d >= 0) & (d <= 1)).all()):
        raise ValueError(f"density must be in [0, 1], got {density}")
    return d


def group_norm(space: GeneSpace) -> tuple[Tensor, Tensor]:
    """The norms of :func:`global_norm`, and how many weights go with each gene; both float64 [genes]. Reads all weights
    of the network."""
    total, count = (torch.zeros(space.num_genes, dtype=torch.float64) for _ in range(2))

    def add(value: int, squares: Tensor) -> None:
        """Sums of squares [channels] of one side of a module."""
        genes = space.values[value].genes
        on = genes >= 0
        # A channel may be there several times, as after flattening: they are one.
        total.index_add_(0, genes[on], squares.cpu()[on])
        count[torch.unique(genes[on])] += 1

    for op in space.ops:
        weight = getattr(op.module, "weight", None)
        if weight is None or op.kind not in ("conv", "linear", "batch_norm"):
            continue
        squares = weight.detach().double().square()
        add(op.output, squares.flatten(1).sum(1) if squares.dim() > 1 else squares)
        if op.kind != "batch_norm" and not op.depthwise:  # whose filters are its channels
            groups = op.module.groups if isinstance(op.module, nn.Conv2d) else 1
            squares = squares.flatten(2).sum(2) if squares.dim() > 2 else squares  # [out, in / groups]
            add(op.inputs[0], squares.reshape(groups, -1, squares.shape[1]).sum(1).flatten())
    norm = total / count.clamp(min=1)
    for g in space.groups:
        part = norm[g.start : g.start + g.size]
        part /= part.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return norm, count
