"""Graphs with labelled nodes."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..graph import Graph
from .files import Arrays, DamagedFile, Task, find, integers, labels, numbers, official, pointers, require

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["SETS", "load"]

PARTS = ("train", "val", "test")
_SPARSE_BELOW = 0.1  # share of entries that are not zero


# --- official formats -> the arrays of an npz ------------------------------------------------------


def _both_ways(edge_index: Tensor, n: int) -> np.ndarray:
    """int32 [2, E]: both directions, no self-loops, no duplicates."""
    from torch_geometric.utils import remove_self_loops, to_undirected

    both: Tensor = to_undirected(remove_self_loops(edge_index)[0], num_nodes=n)
    return both.numpy().astype(np.int32)


def _bag(x: Tensor) -> Arrays:
    """Dense counts or weights as CSR parts."""
    rows, cols = np.nonzero(x.numpy())
    indptr = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(x)))))
    return {
        "x_data": x.numpy()[rows, cols],
        "x_indices": cols.astype(np.int32),
        "x_indptr": indptr.astype(np.int64),
        "x_shape": np.array(x.shape, np.int64),
    }


def _masked(data: Data) -> Arrays:
    return {f"{part}_idx": data[f"{part}_mask"].nonzero()[:, 0].numpy() for part in PARTS}


def _planetoid(name: str, folder: Path) -> Arrays:
    from torch_geometric.datasets import Planetoid

    data = official(Planetoid)(str(folder), name, force_reload=True)[0]
    return {
        **_bag(data.x),
        "y": data.y.numpy(),
        "edge_index": _both_ways(data.edge_index, len(data.y)),
        **_masked(data),
    }


def _drawn(y: np.ndarray) -> Arrays:
    """20 nodes of each class to train, 30 to validate, the rest to test; numpy's RandomState(0)."""
    rng = np.random.RandomState(0)
    of_class = [rng.permutation(np.flatnonzero(y == c)) for c in range(int(y.max()) + 1)]
    ends = ((0, 20), (20, 50), (50, None))
    return {
        f"{part}_idx": np.concatenate([nodes[a:b] for nodes in of_class])
        for part, (a, b) in zip(PARTS, ends, strict=True)
    }


def _gnn_benchmark(dataset: str, name: str, folder: Path) -> Arrays:
    from torch_geometric import datasets

    data = official(getattr(datasets, dataset))(str(folder), name, force_reload=True)[0]
    y = data.y.numpy()
    return {**_bag(data.x), "y": y, "edge_index": _both_ways(data.edge_index, len(y)), **_drawn(y)}


def _joined(graphs: dict[str, list[Data]]) -> Arrays:
    """Several graphs one after the other, with graph_ptr and the graphs of each part."""
    every = [data for part in PARTS for data in graphs[part]]
    sizes = np.array([len(data.y) for data in every])
    ptr = np.concatenate(([0], np.cumsum(sizes)))
    edges = [_both_ways(data.edge_index, n) + start for data, n, start in zip(every, sizes, ptr[:-1], strict=True)]
    bounds = np.cumsum([0, *(len(graphs[part]) for part in PARTS)])
    return {
        "x": torch.cat([data.x for data in every]).numpy(),
        "y": torch.cat([data.y for data in every]).numpy(),
        "edge_index": np.concatenate(edges, 1).astype(np.int32),
        "graph_ptr": ptr.astype(np.int64),
        **{f"{part}_graphs": np.arange(bounds[i], bounds[i + 1]) for i, part in enumerate(PARTS)},
    }


def _ppi(folder: Path) -> Arrays:
    from torch_geometric.datasets import PPI

    first = official(PPI)(str(folder), "train", force_reload=True)  # processes all three parts
    return _joined({"train": list(first), **{part: list(official(PPI)(str(folder), part)) for part in PARTS[1:]}})


def _twitch(folder: Path) -> Arrays:
    from torch_geometric.datasets import Twitch

    countries = {"train": ["DE"], "val": ["EN"], "test": ["ES", "FR", "PT", "RU"]}
    return _joined(
        {part: [official(Twitch)(str(folder), c, force_reload=True)[0] for c in of] for part, of in countries.items()}
    )


def _tenths(count: int) -> dict[str, np.ndarray]:
    """A tenth of the graphs to validate, a tenth to test; numpy's RandomState(0)."""
    order, tenth = np.random.RandomState(0).permutation(count), max(1, round(count / 10))
    return dict(zip(PARTS, np.split(order, [count - 2 * tenth, count - tenth]), strict=True))


def _tu(name: str, folder: Path) -> Arrays:
    from torch_geometric.datasets import TUDataset

    dataset = official(TUDataset)(str(folder), name, use_node_attr=True, force_reload=True)
    attributes, labels = dataset.num_node_attributes, dataset.num_node_labels
    if not labels:
        raise ValueError(f"the TUDataset {name} has no node labels (no {name}_node_labels.txt)")
    graphs = []
    for data in dataset:
        x, n = data.x[:, :attributes], data.x.shape[0]
        if not attributes:
            degree = torch.bincount(data.edge_index[1], minlength=n).clamp(max=31)
            x = torch.nn.functional.one_hot(degree, 32).float()
        graphs.append(type(data)(x=x, y=data.x[:, attributes:].argmax(1), edge_index=data.edge_index))
    parts = _tenths(len(graphs))
    return _joined({part: [graphs[i] for i in sorted(of)] for part, of in parts.items()})


def _ogbn(name: str, folder: Path) -> Arrays:
    try:
        ogb = importlib.import_module("ogb.nodeproppred")
    except ImportError as error:
        raise ImportError(f"{name} is loaded by the package ogb: pip install ogb") from error
    dataset = ogb.NodePropPredDataset(name, root=str(folder))
    graph, y = dataset[0]
    split = dataset.get_idx_split()
    return {
        "x": graph["node_feat"],
        "y": y[:, 0],
        "edge_index": _both_ways(torch.from_numpy(graph["edge_index"]), graph["num_nodes"]),
        "train_idx": split["train"],
        "val_idx": split["valid"],
        "test_idx": split["test"],
    }


def _digits() -> Arrays:
    """Every digit has its 8 nearest neighbours as in-edges, and those have it; 20 of each class, drawn
    with seed 0, are for training, and 500 of the others for validation."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits are scikit-learn's: pip install scikit-learn") from error
    digits = load_digits()
    x, y = torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
    near = Graph.from_knn(x, 8)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train = torch.cat([order[y[order] == c][:20] for c in range(10)])
    rest = order[~torch.isin(order, train)]
    arrays = {
        "x": x,
        "y": y,
        "edge_index": near.union(near.reversed()).edge_index,
        "train_idx": train,
        "val_idx": rest[:500],
        "test_idx": rest[500:],
    }
    return {key: value.numpy() for key, value in arrays.items()}


# --- the data sets --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Set:
    split: str
    fetch: Callable[[Path], Arrays] | None = None
    x: Literal["bag", "standard", "plain", "identity"] = "bag"
    """A bag of words where the file has its CSR parts, else standardised; as published; no features."""
    row_norm: Literal[1, 2] = 2
    """Every bag is divided by its sum (1) or its length (2)."""
    binary: bool = False
    """Counts are set to 1."""
    union: bool = False
    """The graphs of a part become one."""
    known_counts: bool = False
    """See Task."""


_PER_CLASS = "20 / 30 / rest per class"
_PROTEINS = "80 / 10 / 10 % of the graphs, one union per part"

SETS: dict[str, _Set] = {
    "digits": _Set("20 per class / 500 / rest, seed 0", x="plain"),
    **{name: _Set("public", partial(_planetoid, name), row_norm=1) for name in ("cora", "citeseer", "pubmed")},
    "amazon_photo": _Set(_PER_CLASS, partial(_gnn_benchmark, "Amazon", "photo")),
    "coauthor_cs": _Set(_PER_CLASS, partial(_gnn_benchmark, "Coauthor", "cs"), binary=True),
    "proteins_inductive": _Set(_PROTEINS, partial(_tu, "PROTEINS_full"), "standard", union=True),
    "twitch7": _Set("DE / ENGB / the other countries", _twitch),
    "hs_ppi_node2vec": _Set("60 / 20 / 20 %", None, "identity", known_counts=True),
    "ppi": _Set("20 / 2 / 2 graphs", _ppi, "plain"),
    "ogbn-arxiv": _Set("by year, ogb's", partial(_ogbn, "ogbn-arxiv"), "plain"),
    "ogbn-products": _Set("by sales, ogb's", partial(_ogbn, "ogbn-products"), "plain"),
}


def load(name: str, root: str | Path | None) -> Task:
    chosen = SETS.get(name)
    if chosen is None:  # tu:<NAME>
        chosen = _Set(_PROTEINS, partial(_tu, name[3:]), "standard", union=True)
    if name == "digits":
        arrays, source = _digits(), "scikit-learn"
    else:
        hint = f"Make {name}.npz with edge_index, y and train_idx, val_idx, test_idx, and set FASTKD_DATA to its folder"
        arrays, source = find(name, (name.replace(":", "_"),), root, chosen.fetch, hint)
    return to_task(name, chosen, arrays, source)


def to_task(name: str, chosen: _Set, arrays: Arrays, source: str) -> Task:
    """The task that the arrays of an npz are; ValueError names what is wrong in them."""
    inductive = "graph_ptr" in arrays
    part_keys = tuple(f"{part}_{'graphs' if inductive else 'idx'}" for part in PARTS)
    require(arrays, ("edge_index", "y", *part_keys), source)
    y, classes = _targets(arrays, source)
    n = len(y)
    edges = integers(arrays, "edge_index", (2, "E"), n, source)
    of_node, count = None, n
    if inductive:
        ptr = pointers(arrays, "graph_ptr", "graphs + 1", n, source)
        count = len(ptr) - 1
        of_node = torch.repeat_interleave(torch.arange(count), ptr.diff())
        if bool((of_node[edges[0]] != of_node[edges[1]]).any()):
            raise DamagedFile(f"{source}: edge_index joins nodes of two graphs")
    parts = {part: integers(arrays, key, ("n",), count, source) for part, key in zip(PARTS, part_keys, strict=True)}
    for part, key in zip(PARTS, part_keys, strict=True):
        nodes = parts[part] if of_node is None else torch.isin(of_node, parts[part]).nonzero()
        if not len(nodes):
            raise DamagedFile(f"{source}: {key} must hold one or more with nodes, got none")
    together = torch.cat(list(parts.values()))
    if len(np.unique(together.numpy())) != len(together):
        raise DamagedFile(f"{source}: {', '.join(part_keys)} overlap")

    train = _mask(n, parts["train"]) if of_node is None else torch.isin(of_node, parts["train"])
    x = _features(arrays, chosen, n, train, source)
    if of_node is None:
        data = _data(x, y, edges, {part: _mask(n, nodes) for part, nodes in parts.items()})
        graphs = {part: [data] for part in PARTS}
    else:
        graphs = {}
        for part, numbers_of_graphs in parts.items():
            groups = [numbers_of_graphs] if chosen.union and len(numbers_of_graphs) else numbers_of_graphs[:, None]
            graphs[part] = [_selected(x, y, edges, of_node, group, part) for group in groups]
    return Task(
        name,
        "nodes",
        x.shape[1],
        classes,
        y.dim() == 2,
        inductive,
        graphs,
        f"{source}; split: {chosen.split}",
        known_counts=chosen.known_counts,
    )


def _targets(arrays: Arrays, source: str) -> tuple[Tensor, int]:
    """Classes int64 [N] or labels float32 [N, L], and how many classes or labels there are."""
    if arrays["y"].ndim != 2:
        y = labels(arrays, "y", "N", source)
        return y, int(y.max()) + 1
    y = numbers(arrays, "y", ("N", "L"), source)
    if not y.numel() or bool(((y != 0) & (y != 1)).any()):
        raise DamagedFile(f"{source}: y must be 0 or 1 for each of N nodes and L labels, got shape {tuple(y.shape)}")
    return y, y.shape[1]


def _mask(n: int, nodes: Tensor) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[nodes] = True
    return mask


def _features(arrays: Arrays, chosen: _Set, n: int, train: Tensor, source: str) -> Tensor:
    if chosen.x == "identity":
        return _csr(torch.arange(n + 1), torch.arange(n), torch.ones(n), (n, n))
    if "x_data" in arrays:
        require(arrays, ("x_data", "x_indices", "x_indptr", "x_shape"), source)
        entries = arrays["x_data"].size
        values = numbers(arrays, "x_data", (entries,), source)
        rows, width = integers(arrays, "x_shape", (2,), 2**31, source, least=1).tolist()
        if rows != n:
            raise DamagedFile(f"{source}: x has {rows} rows, but y has {n}")
        indptr = pointers(arrays, "x_indptr", n + 1, entries, source)
        indices = integers(arrays, "x_indices", (entries,), width, source)
        if chosen.binary:
            values = (values != 0).float()
        row = torch.repeat_interleave(torch.arange(n), indptr.diff())
        norm = torch.zeros(n).index_add_(0, row, values.abs() ** chosen.row_norm) ** (1 / chosen.row_norm)
        values /= norm.clamp(min=1e-12)[row]
        sparse = _csr(indptr, indices, values, (n, width))
        return sparse if entries < _SPARSE_BELOW * n * width else sparse.to_dense()
    x = numbers(arrays, "x", (n, "F"), source)
    if not x.shape[1]:
        raise DamagedFile(f"{source}: x must have one feature or more per node, got shape {tuple(x.shape)}")
    if chosen.x == "plain":
        return x
    deviation, mean = torch.std_mean(x[train], 0, correction=0)
    return (x - mean) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch announces that its sparse CSR is in beta
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(crow, col, values, shape)


def _data(x: Tensor, y: Tensor, edges: Tensor, masks: dict[str, Tensor], **more: Any) -> Data:
    n = len(y)
    graph = Graph.from_edge_index(edges, n)
    adj_t = _csr(graph.rowptr.long(), graph.col.long(), torch.ones(graph.num_edges), (n, n))
    from torch_geometric.data import Data

    return Data(x=x, y=y, edge_index=edges, adj_t=adj_t, **{f"{part}_mask": m for part, m in masks.items()}, **more)


def _selected(x: Tensor, y: Tensor, edges: Tensor, of_node: Tensor, group: Tensor, part: str) -> Data:
    """Some of the graphs as one; batch [N] numbers them."""
    chosen = torch.isin(of_node, group)
    new = torch.cumsum(chosen, 0) - 1
    kept = new[edges[:, chosen[edges[0]]]]
    rows = chosen.nonzero()[:, 0]
    x = rows_of(x, rows)
    masks = {p: torch.full((len(rows),), p == part) for p in PARTS}
    batch = torch.unique(of_node[rows], return_inverse=True)[1]
    return _data(x, y[rows], kept, masks, batch=batch)


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of a dense or torch.sparse_csr matrix."""
    if x.layout == torch.strided:
        return x[rows]
    length = x.crow_indices().diff()[rows]
    ends = torch.cumsum(length, 0)
    first = torch.repeat_interleave(x.crow_indices()[rows] - (ends - length), length)
    slots = first + torch.arange(int(length.sum()))
    crow = torch.cat((torch.zeros(1, dtype=torch.int64), ends))
    return _csr(crow, x.col_indices()[slots], x.values()[slots], (len(rows), x.shape[1]))
