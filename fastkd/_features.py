"""What a loss over a graph is given besides the graph: features of its nodes, weights of its edges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .graph import Graph

__all__ = ["check_finite_features", "pair_of", "sizes_of", "weights_of"]


def pair_of(name: str, features: Any) -> tuple[Tensor, Tensor | None]:
    """(x_src, x_dst), with None for x_dst where one tensor serves both ends."""
    if isinstance(features, (tuple, list)):
        if len(features) != 2:
            raise ValueError(f"{name} must be a tensor or a pair (x_src, x_dst), got {len(features)} items")
        parts = tuple(features)
    else:
        parts = (features,)
    for x in parts:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor or a pair (x_src, x_dst), got {type(x).__name__}")
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [N, D], got {tuple(x.shape)}")
    if len(parts) == 1 or parts[0] is parts[1]:
        return parts[0], None
    return parts[0], parts[1]


def sizes_of(src: Tensor, dst: Tensor | None) -> tuple[int, int]:
    """(num_src, num_dst)"""
    return src.shape[0], (src if dst is None else dst).shape[0]


def weights_of(weight: Any, graph: Graph, dtype: torch.dtype) -> Tensor:
    """edge_weight in the order of the graph's slots."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"edge_weight must be a tensor, got {type(weight).__name__}")
    if weight.shape != (graph.num_edges,):
        raise ValueError(f"edge_weight must have shape [{graph.num_edges}] (one per edge), got {tuple(weight.shape)}")
    if weight.device != graph.device:
        raise ValueError(f"edge_weight is on {weight.device}, but the graph is on {graph.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "edge_weight must not require grad: the loss has no gradient for it; pass edge_weight.detach()"
        )
    if weight.is_complex():
        raise TypeError(f"edge_weight must be real, got {weight.dtype}")
    # On a device this would wait for it; there a negative weight counts as 0, like log of it as -inf.
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~(weight >= 0) | ~torch.isfinite(weight)
        if bool(bad.any()):
            edge = int(bad.nonzero()[0])
            raise ValueError(f"edge_weight[{edge}] = {float(weight[edge])}: weights must be finite and in [0, inf)")
    weights: Tensor = weight.detach().to(dtype)
    return weights if graph.perm is None else weights[graph.perm.long()]


def check_finite_features(**sides: tuple[Tensor | None, Tensor | None]) -> None:
    """Raises ValueError for the first feature that is infinite or no number; sides are named pairs (x_src, x_dst)."""
    for name, pair in sides.items():
        for x in pair:
            if x is not None and not bool(torch.isfinite(x).all()):
                i, d = (int(v) for v in (~torch.isfinite(x)).nonzero()[0])
                raise ValueError(f"{name}[{i}, {d}] = {float(x[i, d])}: features must be finite")
