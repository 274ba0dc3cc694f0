"""Sparse products that know their transpose, attention that keeps one number per edge, and what is kept per graph.

No forward or backward pass here makes a tensor of size E x D.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from .._adjacency import GraphLike, as_graph
from .._ops import expand_rows
from ..graph import Graph
from ..kernels import Linear as DotProduct

__all__ = ["SLOPE", "Sparse", "aggregated", "attend", "for_heads", "full_precision", "linear", "mean", "normalised"]

T = TypeVar("T")

SLOPE = 0.2
"""Of the leaky ReLU in :func:`attend`."""

with warnings.catch_warnings():  # torch announces once that its sparse CSR is in beta; nobody need read it here
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


class Sparse:
    """A constant sparse matrix [rows, cols] that can be multiplied with a dense one, with gradient.

    Args:
        graph: its pattern; row = destination, column = source.
        values: [E], by slot of the graph.

    >>> import torch
    >>> from fastkd.models.sparse import Sparse
    >>> matrix = Sparse.of(torch.tensor([[0.0, 2.0], [1.0, 0.0]]).to_sparse_csr())
    >>> (matrix @ torch.tensor([[1.0], [10.0]])).tolist()
    [[20.0], [1.0]]
    """

    def __init__(self, graph: Graph, values: Tensor) -> None:
        self.graph, self.values = graph, values
        self._cast: dict[tuple[torch.dtype, bool], Tensor] = {}

    @classmethod
    def of(cls, x: Tensor) -> Sparse:
        """From torch.sparse_csr."""
        graph = Graph.from_csr(x.crow_indices(), x.col_indices(), x.shape[1])
        values = x.values().detach()
        if values.shape != (graph.num_edges,) or graph.num_dst != x.shape[0]:
            # The products below trust their arguments, and torch checks them only where asked to.
            raise ValueError(
                f"a sparse matrix of shape {tuple(x.shape)} with {graph.num_edges} entries must have as many values "
                f"and {x.shape[0] + 1} row pointers, got values {tuple(values.shape)} and {graph.num_dst + 1} pointers"
            )
        return cls(graph, values if graph.perm is None else values[graph.perm])

    def times(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Without gradient: x [cols, D] -> [rows, D], and with the transpose x [rows, D] -> [cols, D]."""
        g, key = self.graph, (x.dtype, transposed)
        if key not in self._cast:
            self._cast[key] = (self.values[g.t_perm] if transposed else self.values).to(x.dtype)
        if transposed:
            return _product(g.t_rowptr, g.t_col, self._cast[key], g.num_dst, x)
        return _product(g.rowptr, g.col, self._cast[key], g.num_src, x)

    def __matmul__(self, x: Tensor) -> Tensor:
        return _sparse_times_dense(full_precision(x), self)


def full_precision(x: Tensor) -> Tensor:
    """Sparse products are in float32 or float64: under autocast, features arrive in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _product(rowptr: Tensor, col: Tensor, values: Tensor, cols: int, x: Tensor) -> Tensor:
    matrix = torch.sparse_csr_tensor(rowptr, col, values, (rowptr.shape[0] - 1, cols), check_invariants=False)
    # On the CPU it is torch's own kernel; without "sum" it would be MKL's, which is slower by half.
    reduce = ("sum",) if x.device.type == "cpu" else ()
    with torch.autocast(x.device.type, enabled=False):  # it would cast to bfloat16, which the product does not know
        return cast(Tensor, torch.sparse.mm(matrix, x.contiguous(), *reduce))


class _SparseTimesDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Sparse) -> Tensor:
        ctx.matrix = matrix
        return matrix.times(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix.times(grad, transposed=True), None


# torch declares no types for `apply`; these are the functions' real ones.
_sparse_times_dense: Callable[[Tensor, Sparse], Tensor] = _SparseTimesDense.apply


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, src: Tensor, dst: Tensor, graph: Graph) -> Tensor:
        row = expand_rows(graph.rowptr, graph.num_edges)
        raw = src[graph.col] + dst[row]
        a = F.leaky_relu(raw, SLOPE)
        # Every row has its self-loop: none is empty.
        a = (a - torch.segment_reduce(a, "max", offsets=graph.rowptr)[row]).exp_()
        a /= torch.segment_reduce(a, "sum", offsets=graph.rowptr)[row]
        out = _product(graph.rowptr, graph.col, a, graph.num_src, x)
        ctx.graph = graph
        ctx.save_for_backward(x, a, raw > 0)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        graph: Graph = ctx.graph
        x, a, positive = ctx.saved_tensors
        grad = grad.contiguous()
        row = expand_rows(graph.rowptr, graph.num_edges)
        d = torch.ops.fastkd.kernel_values(
            x, grad, graph.rowptr, graph.col, None, graph.num_src, *DotProduct().spec(x.shape[1])
        )
        d *= a
        d -= a * torch.segment_reduce(d, "sum", offsets=graph.rowptr)[row]
        d = torch.where(positive, d, SLOPE * d)
        d_dst = torch.segment_reduce(d, "sum", offsets=graph.rowptr)
        d_src = torch.segment_reduce(d[graph.t_perm], "sum", offsets=graph.t_rowptr)
        return _product(graph.t_rowptr, graph.t_col, a[graph.t_perm], graph.num_dst, grad), d_src, d_dst, None


attend: Callable[[Tensor, Tensor, Tensor, Graph], Tensor] = _Attention.apply
"""(x [N, C], src [N], dst [N], graph) -> out_i = sum_j a_ij x_j, with a_i = softmax_j(leaky_relu(src_j + dst_i))."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x [N, F] dense or torch.sparse_csr."""
    if x.layout == torch.strided:
        return F.linear(x, weight, bias)
    out = _once(x, ("features",), lambda: Sparse.of(x)) @ weight.t()
    return out if bias is None else out + bias


def aggregated(matrix: Sparse, x: Tensor, weight: Tensor) -> Tensor:
    """matrix x weight^T, with the sparse product on the narrower side."""
    if x.layout == torch.strided and weight.shape[1] < weight.shape[0]:
        return F.linear(matrix @ x, weight)
    return matrix @ linear(x, weight)


# --- what is computed once per graph, or once per sparse features, and kept as long as they live -----

_kept: MutableMapping[object, dict[tuple[Hashable, ...], Any]] = WeakIdKeyDictionary()


def _once(source: GraphLike, key: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
    if not isinstance(source, GraphLike):
        as_graph(source, 0, 0)  # says what is wrong with it; it may be nothing that can be referred to weakly
    if isinstance(source, Tensor) and not source.is_inference():
        key = (*key, source._version)  # another one once it is changed in place
    results: dict[tuple[Hashable, ...], T] = _kept.setdefault(source, {})
    if key not in results:
        results[key] = compute()
    return results[key]


def _with_loops(adj: GraphLike, n: int) -> Tensor:
    """[2, E], where every node has one self-loop."""
    edges = as_graph(adj, n, n).edge_index
    return torch.cat((edges[:, edges[0] != edges[1]], torch.arange(n, device=edges.device).expand(2, n)), 1)


def normalised(adj: GraphLike, n: int) -> Sparse:
    """D^-1/2 (A + I) D^-1/2 with the in-degrees D of A + I."""

    def compute() -> Sparse:
        graph = Graph.from_edge_index(_with_loops(adj, n), n)
        scale = graph.in_degree().double().rsqrt()
        return Sparse(graph, scale[expand_rows(graph.rowptr, graph.num_edges)] * scale[graph.col])

    return _once(adj, ("normalised", n), compute)


def mean(adj: GraphLike, n: int) -> Sparse:
    """The mean over in-neighbours; zero for nodes without any."""

    def compute() -> Sparse:
        graph = Graph.from_edge_index(as_graph(adj, n, n).edge_index, n)
        return Sparse(graph, graph.in_degree().double().reciprocal()[expand_rows(graph.rowptr, graph.num_edges)])

    return _once(adj, ("mean", n), compute)


def for_heads(adj: GraphLike, n: int, heads: int) -> Graph:
    """The graph with self-loops, once per head: node i of head h is i * heads + h.

    Attention with several heads is attention with one head on this graph, whose features
    [N * heads, C] are the heads' outputs [N, heads * C] seen another way.
    """

    def compute() -> Graph:
        edges = _with_loops(adj, n) * heads
        head = torch.arange(heads, device=edges.device)
        return Graph.from_edge_index((edges[:, :, None] + head).flatten(1), n * heads)

    return _once(adj, ("heads", n, heads), compute)
