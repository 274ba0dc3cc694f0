"""Graphs as compressed rows by destination, the form that every kernel reads."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
from torch import Tensor

from . import _ops

__all__ = ["Graph", "as_graph"]

_INT32_MAX = 2**31 - 1


class Graph:
    """A directed graph, stored by destination: row ``i`` lists the sources ``j`` of its in-edges.

    Make one with :meth:`from_edge_index`, :meth:`from_csr` or :meth:`from_knn`; it is immutable.
    Build it once and reuse it: the transpose and, for symmetric patterns, the index of every edge's
    reverse are computed when it is made, so that the loss itself never waits for the device.

    Attributes:
        rowptr: [num_dst + 1], int32 (int64 for graphs of 2^31 edges or nodes, or on request).
        col: [E], the source of every edge, ascending within a row.
        perm: [E] or None. Slot -> position of the edge in the ``edge_index`` it came from; per-edge
            arguments such as ``edge_weight`` are in that order. None: the slots' own order.
        reverse: [E] or None. For a symmetric pattern, the slot of the reverse of every edge.
        num_src, num_dst, num_edges: int. ``num_src != num_dst`` makes the graph bipartite.
        max_degree: int, the largest in-degree (-1 if the graph was made while compiling).
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
        self._fingerprint: int | None = None

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
            num_nodes: an int, ``(num_src, num_dst)`` for a bipartite block, or None for one more
                than the largest index.
            flow: PyG's ``flow``. The softmax of the loss runs over the in-edges of a destination.
            index_dtype: torch.int32 or torch.int64; None takes int32 where it suffices.

        Raises:
            IndexError: an index is negative or not below the number of nodes.
            TypeError, ValueError: wrong dtype, shape or flow.
        """
        if not isinstance(edge_index, Tensor):
            raise TypeError(f"edge_index must be a tensor, got {type(edge_index).__name__}")
        if edge_index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"edge_index must be int32 or int64, got {edge_index.dtype}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index must have shape [2, E], got {tuple(edge_index.shape)}")
        if flow not in ("source_to_target", "target_to_source"):
            raise ValueError(f"flow must be 'source_to_target' or 'target_to_source', got {flow!r}")
        src, dst = edge_index[0], edge_index[1]
        if flow == "target_to_source":
            src, dst = dst, src
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if edge_index.numel() else 0
        num_src, num_dst = _sizes(num_nodes)
        wide = _is_wide(index_dtype, edge_index.shape[1], num_src, num_dst)
        rowptr, col, perm = _ops.csr_from_coo(src, dst, num_src, num_dst, wide)
        return cls(rowptr, col, num_src, perm)

    @classmethod
    def from_csr(cls, rowptr: Tensor, col: Tensor, num_src: int | None = None) -> Graph:
        """A graph from compressed rows: row i lists the sources of the in-edges of i.

        Args:
            rowptr: int32 or int64 [num_dst + 1], from 0 to E, never decreasing.
            col: int32 or int64 [E]; the columns of a row may be in any order.
            num_src: number of sources; None means num_dst, or more where col needs it.
        """
        for name, x in (("rowptr", rowptr), ("col", col)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
            if x.dim() != 1:
                raise ValueError(f"{name} must be a vector, got shape {tuple(x.shape)}")
        if rowptr.device != col.device:
            raise ValueError(f"rowptr is on {rowptr.device}, but col is on {col.device}")
        if rowptr.shape[0] < 1 or int(rowptr[0]) != 0:
            raise ValueError("rowptr must have num_dst + 1 >= 1 elements and start at 0")
        edges = col.shape[0]
        if int(rowptr[-1]) != edges:
            raise ValueError(f"rowptr must end at E = {edges} (the length of col), got {int(rowptr[-1])}")
        degree = rowptr[1:] - rowptr[:-1]
        if degree.numel() and int(degree.min()) < 0:
            i = int((degree < 0).nonzero()[0])
            raise ValueError(
                f"rowptr must not decrease, got rowptr[{i}] = {int(rowptr[i])} and "
                f"rowptr[{i + 1}] = {int(rowptr[i + 1])}"
            )
        num_dst = rowptr.shape[0] - 1
        if num_src is None:
            num_src = max(num_dst, int(col.max()) + 1 if edges else 0)
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
            x: [N, D] points, or [B, n, D] for B clouds of n points each.
            k: neighbours per point, >= 1. A cloud of fewer points gives what it has.
            batch: int64 [N], ascending: the cloud of every point, as in PyG. None: one cloud.
            loop: whether a point may be its own neighbour (as in DGCNN).
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {_described(x)}")
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k must be an int, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        x = x.detach()
        if x.dim() == 3:
            if batch is not None:
                raise ValueError("batch must be None where x has shape [B, n, D]")
            sizes = [x.shape[1]] * x.shape[0]
            x = x.reshape(-1, x.shape[2])
        elif x.dim() == 2:
            sizes = _cloud_sizes(x, batch)
        else:
            raise ValueError(f"x must have shape [N, D] or [B, n, D], got {tuple(x.shape)}")
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x must be finite, got NaN or infinity")
        cols, counts, start = [], [], 0
        for size, run in itertools.groupby(sizes):
            clouds = len(list(run))
            near = min(k, size if loop else size - 1)
            points = x[start : start + clouds * size].view(clouds, size, x.shape[1])
            first = start + size * torch.arange(clouds, device=x.device)
            cols.append((_nearest(points, near, loop) + first[:, None, None]).flatten())
            counts.append(torch.full((clouds * size,), near, dtype=torch.int64, device=x.device))
            start += clouds * size
        n = x.shape[0]
        rowptr = torch.zeros(n + 1, dtype=torch.int64, device=x.device)
        if n:
            torch.cumsum(torch.cat(counts), 0, out=rowptr[1:])
        col = torch.cat(cols) if cols else rowptr.new_empty(0)
        dtype = torch.int64 if _is_wide(None, col.shape[0], n, n) else torch.int32
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
        """The edges of either graph, each once."""
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
        wide = a.col.dtype == torch.int64 or b.col.dtype == torch.int64 or a.num_edges + b.num_edges > _INT32_MAX
        dtype = torch.int64 if wide else torch.int32
        rowptr, col = _ops.csr_union(
            a.rowptr.to(dtype), a.col.to(dtype), b.rowptr.to(dtype), b.col.to(dtype), self.num_src
        )
        return Graph(rowptr, col, self.num_src, None)

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
        out.__dict__.update(
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.__dict__.items()}
        )
        return out


def as_graph(graph: Any, num_src: int, num_dst: int) -> Graph:
    """A :class:`Graph` from anything that stands for one.

    A Graph; an ``edge_index`` [2, E] or PyG's ``EdgeIndex`` (source, destination); a sparse matrix
    in the sense of PyG's ``adj_t``, in which an entry (i, j) is the edge j -> i: a ``SparseTensor``
    (anything with ``csr()``), ``torch.sparse_csr``, ``sparse_csc`` or ``sparse_coo``.
    """
    if isinstance(graph, Graph):
        return graph
    if isinstance(graph, Tensor):
        if graph.layout == torch.strided:
            plain = graph if type(graph) is Tensor or not hasattr(graph, "as_tensor") else graph.as_tensor()
            return Graph.from_edge_index(plain, (num_src, num_dst))
        if graph.dim() != 2:
            raise ValueError(f"a sparse graph must be a matrix, got shape {tuple(graph.shape)}")
        _check_matrix_size(tuple(graph.shape), num_src, num_dst)
        if graph.layout == torch.sparse_csr:
            return Graph.from_csr(graph.crow_indices(), graph.col_indices(), graph.shape[1])
        if graph.layout == torch.sparse_csc:
            by_src = Graph.from_csr(graph.ccol_indices(), graph.row_indices(), graph.shape[0])
            return by_src.reversed()
        if graph.layout == torch.sparse_coo:
            indices = graph._indices()
            return Graph.from_edge_index(indices.flip(0), (num_src, num_dst))
        raise TypeError(
            f"graph has layout {graph.layout}; supported are strided (edge_index), "
            "sparse_coo, sparse_csr and sparse_csc"
        )
    if hasattr(graph, "csr") and hasattr(graph, "sparse_sizes"):
        rowptr, col, _ = graph.csr()
        sizes = tuple(int(n) for n in graph.sparse_sizes())
        _check_matrix_size(sizes, num_src, num_dst)
        return Graph.from_csr(rowptr, col, sizes[1])
    raise TypeError(
        "graph must be a fastkd.Graph, an edge_index tensor [2, E], a sparse tensor or a "
        f"PyG SparseTensor, got {type(graph).__name__}"
    )


def _check_matrix_size(shape: tuple[int, ...], num_src: int, num_dst: int) -> None:
    if shape != (num_dst, num_src):
        raise ValueError(
            f"the sparse graph has shape {shape}, but the features have "
            f"(num_dst, num_src) = ({num_dst}, {num_src}) rows"
        )


def _sizes(num_nodes: Any) -> tuple[int, int]:
    pair = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in pair):
        raise TypeError(f"num_nodes must be an int, (num_src, num_dst) or None, got {num_nodes!r}")
    for n in pair:
        if not isinstance(n, torch.SymInt) and not 0 <= n < 2**31:
            raise ValueError(f"num_nodes must be in [0, 2**31), got {num_nodes!r}")
    return pair


def _is_wide(index_dtype: torch.dtype | None, edges: int, num_src: int, num_dst: int) -> bool:
    if index_dtype is None:
        return edges > _INT32_MAX
    if index_dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index_dtype must be torch.int32 or torch.int64, got {index_dtype}")
    if index_dtype == torch.int32 and edges > _INT32_MAX:
        raise ValueError(f"index_dtype must be torch.int64 for {edges} edges")
    return index_dtype == torch.int64


def _described(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _cloud_sizes(x: Tensor, batch: Tensor | None) -> list[int]:
    if batch is None:
        return [x.shape[0]] if x.shape[0] else []
    if not isinstance(batch, Tensor) or batch.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"batch must be an int32 or int64 tensor, got {_described(batch)}")
    if batch.shape != x.shape[:1]:
        raise ValueError(f"batch must have shape [{x.shape[0]}], got {tuple(batch.shape)}")
    if batch.numel() and (int(batch[0]) < 0 or bool((batch[1:] < batch[:-1]).any())):
        raise ValueError("batch must be ascending and not negative")
    return [int(n) for n in torch.bincount(batch) if n > 0]


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
