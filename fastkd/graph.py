"""Graphs as compressed rows by destination, the form that every kernel reads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import _ops
from ._checks import integer
from ._indices import INT32_MAX, check_indices, check_place, cloud_sizes, inferred, is_wide, node_count, node_counts
from ._knn import neighbours

__all__ = ["Graph"]


class Graph:
    """A directed graph, stored by destination: row ``i`` lists the sources ``j`` of its in-edges.

    Make one with :meth:`from_edge_index`, :meth:`from_csr` or :meth:`from_knn`; it is immutable.
    Build it once and reuse it: the transpose and, for symmetric patterns, the index of every edge's
    reverse are computed when it is made, so that the loss itself never waits for the device.

    Attributes:
        rowptr: [num_dst + 1], int32 (int64 for graphs of 2^31 edges or more, or on request).
        col: [E] of rowptr's dtype, the source of every edge, ascending within a row.
        perm: [E] or None. Slot -> position of the edge in the ``edge_index`` it came from; per-edge
            arguments such as ``edge_weight`` are in that order. None: the slots' own order.
        reverse: [E] or None. For a symmetric pattern, the slot of the reverse of every edge.
        num_src, num_dst, num_edges: int. ``num_src != num_dst`` makes the graph bipartite.
        max_degree: int, the largest in-degree (-1 if the graph was made while compiling).

    >>> import torch
    >>> from fastkd import Graph
    >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]]))
    >>> graph
    Graph(num_nodes=3, num_edges=4, symmetric=False, device='cpu')
    >>> graph.rowptr.tolist(), graph.col.tolist()
    ([0, 1, 3, 4], [2, 0, 2, 1])
    """

    rowptr: Tensor
    col: Tensor
    perm: Tensor | None
    reverse: Tensor | None
    t_rowptr: Tensor
    t_col: Tensor
    t_perm: Tensor
    num_src: int
    num_dst: int

    def __init__(
        self,
        rowptr: Tensor,
        col: Tensor,
        num_src: int,
        perm: Tensor | None,
        *,
        transpose: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        # Trusts its arguments: the class methods check.
        self._fingerprint: int | None = None
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # Autograd refuses to keep tensors of inference mode, and a graph outlives it.
            with torch.inference_mode(False):
                self._fill(rowptr.clone(), col.clone(), num_src, None if perm is None else perm.clone(), None)
        else:
            self._fill(rowptr, col, num_src, perm, transpose)

    def _fill(
        self,
        rowptr: Tensor,
        col: Tensor,
        num_src: int,
        perm: Tensor | None,
        transpose: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        self.rowptr = rowptr
        self.col = col
        self.num_src = num_src
        self.num_dst = rowptr.shape[0] - 1
        self.perm = perm
        self.t_rowptr, self.t_col, self.t_perm = transpose or _ops.csr_transpose(rowptr, col, num_src)
        self.reverse = None
        # Both are sorted: the pattern is symmetric if it equals its transpose, and then the slot an
        # edge has in the transpose is the slot of its reverse. Under compilation nothing may depend
        # on values; the general path is always right.
        if num_src == self.num_dst and not torch.compiler.is_compiling():
            if torch.equal(rowptr, self.t_rowptr) and torch.equal(col, self.t_col):
                self.reverse = self.t_perm
                self.t_rowptr, self.t_col = rowptr.view(-1), col.view(-1)  # free the copies
        # On a CUDA graph these wait for the device: here, and not in the loss.
        self.max_degree = self.max_incident = -1
        if not torch.compiler.is_compiling():
            arriving, leaving = self.in_degree(), self.out_degree()
            self.max_degree = int(arriving.max()) if arriving.numel() else 0
            most = arriving
            if self.reverse is None:
                most = arriving + leaving if num_src == self.num_dst else torch.cat((arriving, leaving))
            self.max_incident = int(most.max()) if most.numel() else 0

    # --- construction ---------------------------------------------------------------------------

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_nodes: int | tuple[int, int] | None = None,
        flow: Literal["source_to_target", "target_to_source"] = "source_to_target",
        *,
        index_dtype: torch.dtype | None = None,
    ) -> Graph:
        """A graph from unsorted edges.

        Args:
            edge_index: int32 or int64 [2, E]; row 0 is the source j and row 1 the destination i of
                every edge j -> i (with ``flow="target_to_source"``, the other way round).
            num_nodes: an int in [0, 2^31), ``(num_src, num_dst)`` for a bipartite block, or None for one
                more than the largest index. It must be passed where that is above 2^24 and above 16 per edge:
                memory is taken for every node, 8 bytes and more, and such an index is mostly a mistake.
            flow: PyG's ``flow``. The softmax of the loss runs over the in-edges of a destination.
            index_dtype: torch.int32 or torch.int64; None takes int32 where it suffices.

        Raises:
            IndexError: an index is negative or not below the number of nodes.
            TypeError, ValueError: wrong dtype, shape, flow or number of nodes.

        >>> import torch
        >>> from fastkd import Graph
        >>> Graph.from_edge_index(torch.tensor([[0, 1, 4], [1, 0, 1]]), (5, 2))
        Graph(num_src=5, num_dst=2, num_edges=3, symmetric=False, device='cpu')
        """
        check_indices("edge_index", edge_index)
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            hint = " (pass its transpose)" if edge_index.dim() == 2 and edge_index.shape[1] == 2 else ""
            raise ValueError(f"edge_index must have shape [2, E], got {tuple(edge_index.shape)}{hint}")
        if flow not in ("source_to_target", "target_to_source"):
            raise ValueError(f"flow must be 'source_to_target' or 'target_to_source', got {flow!r}")
        src, dst = edge_index[0], edge_index[1]
        if flow == "target_to_source":
            src, dst = dst, src
        if num_nodes is None:
            num_nodes = inferred("num_nodes", "edge_index", edge_index, edge_index.shape[1])
        num_src, num_dst = node_counts(num_nodes)
        wide = is_wide(index_dtype, edge_index.shape[1])
        rowptr, col, perm = _ops.csr_from_coo(src, dst, num_src, num_dst, wide)
        return cls(rowptr, col, num_src, perm)

    @classmethod
    def from_csr(cls, rowptr: Tensor, col: Tensor, num_src: int | None = None) -> Graph:
        """A graph from compressed rows: row i lists the sources of the in-edges of i.

        Args:
            rowptr: int32 or int64 [num_dst + 1], from 0 to E, never decreasing.
            col: int32 or int64 [E]; the columns of a row may be in any order.
            num_src: number of sources, in [0, 2^31); None means num_dst, or more where col needs it (but
                not 2^24 and 16 per edge more, as in :meth:`from_edge_index`).

        Raises:
            IndexError: a column is negative or not below num_src.
            TypeError, ValueError: wrong dtype, shape, device or number, or rowptr is not as said above.

        >>> import torch
        >>> from fastkd import Graph
        >>> Graph.from_csr(torch.tensor([0, 2, 3]), torch.tensor([1, 0, 0])).edge_index.tolist()
        [[1, 0, 0], [0, 0, 1]]
        """
        for name, x in (("rowptr", rowptr), ("col", col)):
            check_indices(name, x)
            if x.dim() != 1:
                raise ValueError(f"{name} must be a vector, got shape {tuple(x.shape)}")
        if rowptr.device != col.device:
            raise ValueError(f"rowptr is on {rowptr.device}, but col is on {col.device}")
        if rowptr.shape[0] < 1 or int(rowptr[0]) != 0:
            raise ValueError("rowptr must have num_dst + 1 >= 1 elements and start at 0")
        edges = col.shape[0]
        if int(rowptr[-1]) != edges:
            raise ValueError(f"rowptr must end at E = {edges} (the length of col), got {int(rowptr[-1])}")
        # Compared, not subtracted, which may wrap: then every entry is in [0, E].
        if bool((falls := rowptr[1:] < rowptr[:-1]).any()):
            i = int(falls.nonzero()[0])
            raise ValueError(
                f"rowptr must not decrease, got rowptr[{i}] = {int(rowptr[i])} and "
                f"rowptr[{i + 1}] = {int(rowptr[i + 1])}"
            )
        num_dst = rowptr.shape[0] - 1
        if num_src is None:
            num_src = max(num_dst, inferred("num_src", "col", col, max(edges, num_dst)))
        num_src = node_count("num_src", num_src)
        if bool((outside := (col < 0) | (col >= num_src)).any()):
            edge = int(outside.nonzero()[0])
            raise IndexError(
                f"col[{edge}] = {int(col[edge])} (source of edge {edge}) is out of range: "
                f"valid indices are in [0, {num_src})"
            )
        dst = _ops.expand_rows(rowptr, edges)
        graph = cls.from_edge_index(torch.stack((col.long(), dst)), (num_src, num_dst))
        perm = graph.perm
        assert perm is not None
        if torch.equal(perm, torch.arange(edges, dtype=perm.dtype, device=perm.device)):
            graph.perm = None
        return graph

    @classmethod
    def from_knn(cls, x: Tensor, k: int, batch: Tensor | None = None, *, loop: bool = False) -> Graph:
        """Every point's k nearest neighbours as its in-edges.

        Distances are Euclidean, from matrix products of centred features; of points at (almost)
        the same distance either may be taken. No gradient flows through the choice.

        Args:
            x: [N, D] points, or [B, n, D] for B clouds of n points each; any floating-point dtype.
            k: neighbours per point, >= 1. A cloud of fewer points gives what it has.
            batch: int32 or int64 [N], ascending: the cloud of every point, as in PyG. None: one cloud.
            loop: whether a point may be its own neighbour (as in DGCNN).

        Raises:
            TypeError, ValueError: wrong dtype, shape or order, or x is not finite.

        >>> import torch
        >>> from fastkd import Graph
        >>> Graph.from_knn(torch.tensor([[0.0], [1.0], [5.0]]), 1).edge_index.tolist()
        [[1, 0, 1], [0, 1, 2]]
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"x must be a floating-point tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
            )
        check_place("x", x)
        integer("k", k, 1)
        if x.dim() not in (2, 3):
            raise ValueError(f"x must have shape [N, D] or [B, n, D], got {tuple(x.shape)}")
        x = x.detach()
        if x.dim() == 3:
            if batch is not None:
                raise ValueError("batch must be None where x has shape [B, n, D]")
            sizes = [x.shape[1]] * x.shape[0]
            x = x.flatten(0, 1)
        else:
            sizes = [x.shape[0]] if batch is None else cloud_sizes(x, batch)
        n = node_count("the number of points in x", x.shape[0])
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x must be finite, got NaN or infinity")
        rowptr, col = neighbours(x, sizes, k, loop)
        dtype = torch.int64 if is_wide(None, col.shape[0]) else torch.int32
        return cls(rowptr.to(dtype), col.to(dtype), n, None)

    # --- what it is -----------------------------------------------------------------------------

    @property
    def num_edges(self) -> int:
        return self.col.shape[0]

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def is_symmetric(self) -> bool:
        """Whether every edge has its reverse, equally often."""
        return self.reverse is not None

    def in_degree(self) -> Tensor:
        """[num_dst], the number of in-edges of every destination."""
        return self.rowptr[1:] - self.rowptr[:-1]

    def out_degree(self) -> Tensor:
        """[num_src], the number of out-edges of every source."""
        return self.t_rowptr[1:] - self.t_rowptr[:-1]

    def degree_stats(self) -> dict[str, float]:
        """Smallest, mean and largest in-degree, and how many destinations have no in-edge."""
        degree = self.in_degree()
        if not degree.numel():
            return {"min": 0, "mean": 0.0, "max": 0, "isolated": 0}
        return {
            "min": int(degree.min()),
            "mean": self.num_edges / self.num_dst,
            "max": int(degree.max()),
            "isolated": int((degree == 0).sum()),
        }

    @property
    def edge_index(self) -> Tensor:
        """int64 [2, E] (source, destination), in the order of per-edge arguments."""
        slots = torch.stack((self.col.long(), _ops.expand_rows(self.rowptr, self.num_edges)))
        if self.perm is None:
            return slots
        out = torch.empty_like(slots)
        out[:, self.perm.long()] = slots
        return out

    @property
    def fingerprint(self) -> int:
        """A number that tells patterns apart; equal for equal patterns on any device."""
        if self._fingerprint is None:
            # Wrapping arithmetic modulo 2^64, independent of the order of summation.
            weights = torch.arange(1, self.num_edges + 1, device=self.device) * 0x9E3779B97F4A7C1
            edges = (weights ^ (self.col.long() * 0x2545F4914F6CDD1D)) * 0x5851F42D4C957F2D
            rows = torch.arange(1, self.num_dst + 2, device=self.device) * 0x14057B7EF767814F
            self._fingerprint = int(edges.sum() + (rows * (self.rowptr.long() + 1)).sum()) ^ self.num_src
        return self._fingerprint

    def __repr__(self) -> str:
        nodes = (
            f"num_nodes={self.num_dst}"
            if self.num_src == self.num_dst
            else f"num_src={self.num_src}, num_dst={self.num_dst}"
        )
        return f"Graph({nodes}, num_edges={self.num_edges}, symmetric={self.is_symmetric}, device={str(self.device)!r})"

    # --- what can be made of it -----------------------------------------------------------------

    def reversed(self) -> Graph:
        """Every edge turned round; per-edge arguments keep their order."""
        perm = self.t_perm if self.perm is None else self.perm[self.t_perm.long()]
        inverse = torch.empty_like(self.t_perm)
        inverse[self.t_perm.long()] = torch.arange(self.num_edges, dtype=inverse.dtype, device=inverse.device)
        return Graph(self.t_rowptr, self.t_col, self.num_dst, perm, transpose=(self.rowptr, self.col, inverse))

    def union(self, other: Graph) -> Graph:
        """The edges of either graph, each once; per-edge arguments follow the new ``edge_index``.

        Args:
            other: a graph of the same sizes on the same device.

        >>> import torch
        >>> from fastkd import Graph
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]))
        >>> graph.union(graph.reversed()).edge_index.tolist()
        [[1, 0, 2, 1], [0, 1, 1, 2]]
        """
        if not isinstance(other, Graph):
            raise TypeError(f"other must be a fastkd.Graph, got {type(other).__name__}")
        if (self.num_src, self.num_dst) != (other.num_src, other.num_dst):
            raise ValueError(
                f"a union needs graphs of one size, got (num_src, num_dst) = "
                f"({self.num_src}, {self.num_dst}) and ({other.num_src}, {other.num_dst})"
            )
        if self.device != other.device:
            raise ValueError(f"a union needs graphs on one device, got {self.device} and {other.device}")
        a, b = self, other
        wide = a.col.dtype == torch.int64 or b.col.dtype == torch.int64 or a.num_edges + b.num_edges > INT32_MAX
        dtype = torch.int64 if wide else torch.int32
        rowptr, col = _ops.csr_union(
            a.rowptr.to(dtype), a.col.to(dtype), b.rowptr.to(dtype), b.col.to(dtype), self.num_src
        )
        return Graph(rowptr, col, self.num_src, None)

    def repeat(self, copies: int) -> Graph:
        """Disjoint copies of the graph as one graph, as for several individuals on the same nodes.

        Source j of copy c is c * num_src + j, and destination i is c * num_dst + i; per-edge arguments are those
        of the copies one after the other, as :meth:`torch.Tensor.repeat` makes them.

        Args:
            copies: >= 0, and few enough for less than 2^31 sources and destinations.

        >>> import torch
        >>> from fastkd import Graph
        >>> Graph.from_edge_index(torch.tensor([[1], [0]]), 2).repeat(3).edge_index.tolist()
        [[1, 3, 5], [0, 2, 4]]
        """
        most = INT32_MAX // max(self.num_src, self.num_dst, 1)
        if integer("copies", copies, 0) > most:
            raise ValueError(f"copies must be at most {most} for {self}: nodes are numbered below 2**31, got {copies}")
        edges = self.num_edges
        wide = self.col.dtype == torch.int64 or edges * copies > INT32_MAX
        dtype = torch.int64 if wide else torch.int32
        copy = torch.arange(copies, dtype=dtype, device=self.device)[:, None]

        def ends(pointers: Tensor) -> Tensor:
            return torch.cat((copy.new_zeros(1), (pointers[1:].to(dtype) + copy * edges).flatten()))

        def shifted(indices: Tensor, by: int) -> Tensor:
            return (indices.to(dtype) + copy * by).flatten()

        perm = None if self.perm is None else shifted(self.perm, edges)
        transpose = ends(self.t_rowptr), shifted(self.t_col, self.num_dst), shifted(self.t_perm, edges)
        return Graph(
            ends(self.rowptr), shifted(self.col, self.num_src), copies * self.num_src, perm, transpose=transpose
        )

    def coalesce(self) -> Graph:
        """Duplicate edges merged into one; per-edge arguments follow the new ``edge_index``."""
        return self.union(self)

    def without_self_loops(self) -> Graph:
        """The edges j -> i with j != i; per-edge arguments follow the new ``edge_index``."""
        row = _ops.expand_rows(self.rowptr, self.num_edges)
        keep = row != self.col
        rowptr = torch.zeros_like(self.rowptr)
        kept = torch.cumsum(keep, 0)
        ends = self.rowptr[1:].long()
        padded = torch.cat((kept.new_zeros(1), kept))
        rowptr[1:] = padded[ends].to(rowptr.dtype)
        return Graph(rowptr, self.col[keep], self.num_src, None)

    def to(self, device: torch.device | str) -> Graph:
        """The graph on another device (itself, if it is there)."""
        if torch.empty(0, device=device).device == self.device:
            return self
        out = Graph.__new__(Graph)
        with torch.inference_mode(False):  # as in __init__
            for name, value in self.__dict__.items():
                setattr(out, name, value.to(device) if isinstance(value, Tensor) else value)
        return out
