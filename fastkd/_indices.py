"""Checks of what graphs are made of: indices, numbers of nodes, and the widths that hold them."""

from __future__ import annotations

import contextlib
import operator
from typing import cast

import torch
from torch import Tensor

from ._checks import is_integer

__all__ = [
    "INT32_MAX",
    "check_indices",
    "check_place",
    "cloud_sizes",
    "inferred",
    "is_wide",
    "node_count",
    "node_counts",
]

INT32_MAX = 2**31 - 1
INDICES = (torch.int32, torch.int64)
# A graph may have more nodes than this only if it has an edge for every so many of them, or if the number is passed.
MOST_INFERRED, PER_EDGE = 2**24, 16


def check_indices(name: str, x: object) -> None:
    """A dense tensor of int32 or int64 that holds values."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in INDICES:
        hint = "" if x.numel() else " (an empty one, too, needs dtype=torch.int64)"
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}{hint}")
    check_place(name, x)


def check_place(name: str, x: Tensor) -> None:
    """A dense tensor that holds values."""
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    if x.device.type == "meta":
        raise ValueError(f"{name} must be on a device that holds values, cpu or cuda, got meta")


def node_count(name: str, value: object) -> int:
    """A number of nodes; numpy's and torch's integers count as well, and symbolic ones while compiling."""
    if isinstance(value, torch.SymInt):
        return cast(int, value)
    if not is_integer(value) and not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            value = operator.index(value)  # type: ignore[arg-type]  # it is an int already, or a TypeError
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    count = cast(int, value)
    if not 0 <= count <= INT32_MAX:
        raise ValueError(f"{name} must be in [0, 2**31), got {count}")
    return count


def node_counts(num_nodes: object) -> tuple[int, int]:
    """(num_src, num_dst) of an int or a pair."""
    if not isinstance(num_nodes, tuple):
        count = node_count("num_nodes", num_nodes)
        return count, count
    if len(num_nodes) != 2:
        raise TypeError(f"num_nodes must be an int, (num_src, num_dst) or None, got {num_nodes!r}")
    return node_count("num_nodes[0]", num_nodes[0]), node_count("num_nodes[1]", num_nodes[1])


def inferred(argument: str, name: str, indices: Tensor, edges: int) -> int:
    """One more than the largest index, refused where so few edges can hardly have as many nodes."""
    nodes = int(indices.max()) + 1 if indices.numel() else 0
    if nodes > INT32_MAX:
        raise IndexError(f"{name} holds the index {nodes - 1}, but nodes are numbered below 2**31 - 1")
    if nodes > max(MOST_INFERRED, PER_EDGE * edges):
        raise ValueError(
            f"{argument} must be passed where {name} has {edges} edges and its largest index is {nodes - 1}: "
            f"{nodes} nodes take {8 * nodes / 1e9:.1f} GB and more"
        )
    return max(nodes, 0)  # negative indices are refused later, with their places


def is_wide(index_dtype: torch.dtype | None, edges: int) -> bool:
    """Whether a graph of so many edges has, or is to have, int64 indices."""
    if index_dtype is None:
        return edges > INT32_MAX
    if index_dtype not in INDICES:
        raise TypeError(f"index_dtype must be torch.int32 or torch.int64, got {index_dtype}")
    if index_dtype == torch.int32 and edges > INT32_MAX:
        raise ValueError(f"index_dtype must be torch.int64 for {edges} edges")
    return index_dtype == torch.int64


def cloud_sizes(x: Tensor, batch: object) -> list[int]:
    """How many points of x [N, D] each cloud has that has any; batch [N] numbers the points' clouds."""
    if not isinstance(batch, Tensor) or batch.dtype not in INDICES:
        described = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"batch must be an int32 or int64 tensor, got {described}")
    check_place("batch", batch)
    if batch.shape != x.shape[:1]:
        raise ValueError(f"batch must have shape [{x.shape[0]}], got {tuple(batch.shape)}")
    if batch.numel() and (int(batch[0]) < 0 or bool((batch[1:] < batch[:-1]).any())):
        raise ValueError("batch must be ascending and not negative")
    _, counts = torch.unique_consecutive(batch, return_counts=True)
    return [int(n) for n in counts]
