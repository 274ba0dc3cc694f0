"""Whatever a user may pass as a graph: edges, sparse matrices of torch and of PyG."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .graph import Graph

__all__ = ["GraphLike", "SparseTensorLike", "as_graph"]


@runtime_checkable
class SparseTensorLike(Protocol):
    """What is read of torch_sparse's ``SparseTensor``, which PyG uses as ``adj_t``."""

    def csr(self) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def sparse_sizes(self) -> tuple[int, int]: ...


GraphLike = Graph | Tensor | SparseTensorLike
"""What :func:`fastkd.lsp_loss` takes as a graph."""


def as_graph(graph: GraphLike, num_src: int, num_dst: int) -> Graph:
    """Whatever a user may pass as a graph, as a :class:`Graph`.

    A strided tensor is an ``edge_index`` [2, E] (also PyG's ``EdgeIndex``). Sparse matrices follow
    PyG's ``adj_t``: shape [num_dst, num_src], entry (i, j) is the edge j -> i: a ``SparseTensor``
    (anything with ``csr()``), ``torch.sparse_csr``, ``sparse_csc`` or ``sparse_coo``. Their values, if any, must be 1.
    """
    if isinstance(graph, Graph):
        return graph
    if isinstance(graph, Tensor):
        return _from_tensor(graph, num_src, num_dst)
    if isinstance(graph, SparseTensorLike):
        rowptr, col, values = graph.csr()
        rows, cols = (int(n) for n in graph.sparse_sizes())
        return _from_compressed(rowptr, col, values, (rows, cols), (num_src, num_dst))
    hint = ""
    if hasattr(graph, "edge_index"):
        hint = ": pass its edge_index"
    elif hasattr(graph, "tocsr"):
        hint = ": pass Graph.from_csr(torch.from_numpy(m.indptr), torch.from_numpy(m.indices), m.shape[1]) of m.tocsr()"
    elif hasattr(graph, "__array__"):
        hint = ": pass torch.from_numpy(...)"
    elif isinstance(graph, (list, tuple)):
        hint = ": pass torch.stack((sources, destinations))" if len(graph) == 2 else ": pass torch.tensor(...)"
    raise TypeError(
        "graph must be a fastkd.Graph, an edge_index tensor [2, E], a sparse tensor or a "
        f"PyG SparseTensor, got {type(graph).__name__}{hint}"
    )


def _from_tensor(graph: Tensor, num_src: int, num_dst: int) -> Graph:
    sizes = (num_src, num_dst)
    if graph.layout == torch.strided:
        if graph.shape == (num_dst, num_src) and graph.shape[0] != 2:
            raise TypeError(
                f"graph is a dense matrix of {graph.dtype}: pass its entries that are not 0 as edges, "
                "Graph.from_edge_index(graph.nonzero().t().flip(0), (num_src, num_dst))"
            )
        # PyG's EdgeIndex is a subclass that would go on through every operation.
        plain = graph if type(graph) is Tensor or not hasattr(graph, "as_tensor") else graph.as_tensor()
        return Graph.from_edge_index(plain, sizes)
    if graph.dim() != 2:
        raise ValueError(f"a sparse graph must be a matrix, got shape {tuple(graph.shape)}")
    rows, cols = graph.shape
    if graph.layout == torch.sparse_csr:
        return _from_compressed(graph.crow_indices(), graph.col_indices(), graph.values(), (rows, cols), sizes)
    if graph.layout == torch.sparse_csc:
        _check_matrix((rows, cols), sizes, None)  # in the matrix's own words, before it is turned round
        turned = _from_compressed(
            graph.ccol_indices(), graph.row_indices(), graph.values(), (cols, rows), (num_dst, num_src)
        )
        return turned.reversed()
    if graph.layout == torch.sparse_coo:
        _check_matrix((rows, cols), sizes, graph._values())
        return Graph.from_edge_index(graph._indices().flip(0), sizes)
    raise TypeError(
        f"graph has layout {graph.layout}; supported are strided (edge_index), sparse_coo, sparse_csr and sparse_csc"
    )


def _from_compressed(
    rowptr: Tensor, col: Tensor, values: Tensor | None, shape: tuple[int, int], sizes: tuple[int, int]
) -> Graph:
    _check_matrix(shape, sizes, values)
    if rowptr.shape != (shape[0] + 1,):
        raise ValueError(
            f"the sparse graph has shape {shape}, and so must have {shape[0] + 1} row pointers, got {rowptr.numel()}"
        )
    return Graph.from_csr(rowptr, col, shape[1])


def _check_matrix(shape: tuple[int, int], sizes: tuple[int, int], values: Tensor | None) -> None:
    num_src, num_dst = sizes
    if shape != (num_dst, num_src):
        raise ValueError(
            f"the sparse graph has shape {shape}, but the features have "
            f"(num_dst, num_src) = ({num_dst}, {num_src}) rows"
        )
    if values is not None and bool((other := values != 1).any()):
        raise ValueError(
            f"the sparse graph must hold the value 1 for every edge, got {values[other][0].item()}: "
            "pass edge weights by themselves, to lsp_loss as edge_weight in the order of the matrix's entries"
        )
