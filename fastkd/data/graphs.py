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
from .files import Arrays, Task, find, official, require

if TYPE_CHECKING:
    from torch_geometric.data import Data

__all__ = ["SETS", "load"]

PARTS = ("train", "val", "test")
_SPARSE_BELOW = 0.1  # share of entries that are not zero


# --- official formats -> the arrays of an npz ------------------------------------------------------


def _both_ways(edge_index: Tensor, n: int) -> np.ndarray:
    """int32 [2, E]: both directions, no self-loops, no duplicates."""
    from torch_geometric.utils import remove_self_loops, to_undirected

    return to_undirected(remove_self_loops(edge_index)[0], num_nodes=n).numpy().astype(np.int32)


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
    """Bags of words are told by their CSR parts; other features of such a set are standardised."""
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
    inductive = "graph_ptr" in arrays
    part_keys = tuple(f"{part}_{'graphs' if inductive else 'idx'}" for part in PARTS)
    require(arrays, ("edge_index", "y", *part_keys), source)
    multilabel = arrays["y"].ndim == 2
    y = torch.from_numpy(arrays["y"].astype(np.float32 if multilabel else np.int64))
    n = len(y)
    if not multilabel and (y.dim() != 1 or (n and int(y.min()) < 0)):
        raise ValueError(f"{source}: y must be [N] classes >= 0, or [N, L], got shape {tuple(y.shape)}")
    edges = torch.from_numpy(arrays["edge_index"].astype(np.int64))
    if edges.dim() != 2 or edges.shape[0] != 2 or (edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < n):
        raise ValueError(f"{source}: edge_index must be [2, E] with entries in [0, {n}), the length of y")

    parts = {part: torch.from_numpy(arrays[key].astype(np.int64)) for part, key in zip(PARTS, part_keys, strict=True)}
    of_node = None
    count = n
    if inductive:
        ptr = torch.from_numpy(arrays["graph_ptr"].astype(np.int64))
        count = len(ptr) - 1
        if int(ptr[0]) != 0 or int(ptr[-1]) != n:
            raise ValueError(f"{source}: graph_ptr must run from 0 to {n}, the length of y")
        of_node = torch.repeat_interleave(torch.arange(count), ptr.diff())
        if bool((of_node[edges[0]] != of_node[edges[1]]).any()):
            raise ValueError(f"{source}: edge_index joins nodes of two graphs")
    together = torch.cat(list(parts.values()))
    if together.numel() and not 0 <= int(together.min()) <= int(together.max()) < count:
        raise ValueError(f"{source}: {', '.join(part_keys)} must have entries in [0, {count})")
    if len(together.unique()) != len(together):
        raise ValueError(f"{source}: {', '.join(part_keys)} overlap")

    train = torch.zeros(n, dtype=torch.bool)
    if of_node is None:
        train[parts["train"]] = True
    else:
        train = torch.isin(of_node, parts["train"])
    x = _features(arrays, chosen, n, train, source)
    if of_node is None:
        masks = {part: _mask(n, nodes) for part, nodes in parts.items()}
        data = _data(x, y, edges, masks)
        graphs = {part: [data] for part in PARTS}
    else:

        def of_part(part: str) -> list[Data]:
            groups = [parts[part]] if chosen.union else [g[None] for g in parts[part]]
            return [_selected(x, y, edges, of_node, group, part) for group in groups]

        graphs = {part: of_part(part) for part in PARTS}
    classes = y.shape[1] if multilabel else int(y.max()) + 1
    return Task(
        name,
        "nodes",
        x.shape[1],
        classes,
        multilabel,
        inductive,
        graphs,
        f"{source}; split: {chosen.split}",
        known_counts=chosen.known_counts,
    )


def _mask(n: int, nodes: Tensor) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[nodes] = True
    return mask


def _features(arrays: Arrays, chosen: _Set, n: int, train: Tensor, source: str) -> Tensor:
    if chosen.x == "identity":
        return _csr(torch.arange(n + 1), torch.arange(n), torch.ones(n), (n, n))
    if "x_data" in arrays:
        require(arrays, ("x_data", "x_indices", "x_indptr", "x_shape"), source)
        values = torch.from_numpy(arrays["x_data"].astype(np.float32))
        indptr, indices = (torch.from_numpy(arrays[k].astype(np.int64)) for k in ("x_indptr", "x_indices"))
        shape = (int(arrays["x_shape"][0]), int(arrays["x_shape"][1]))
        if shape[0] != n or len(indptr) != n + 1:
            raise ValueError(f"{source}: x has {shape[0]} rows, but y has {n}")
        if chosen.binary:
            values = (values != 0).float()
        row = torch.repeat_interleave(torch.arange(n), indptr.diff())
        norm = torch.zeros(n).index_add_(0, row, values.abs() ** chosen.row_norm) ** (1 / chosen.row_norm)
        values /= norm.clamp(min=1e-12)[row]
        sparse = _csr(indptr, indices, values, shape)
        return sparse if len(values) < _SPARSE_BELOW * shape[0] * shape[1] else sparse.to_dense()
    require(arrays, ("x",), source)
    x = torch.from_numpy(arrays["x"].astype(np.float32))
    if x.dim() != 2 or x.shape[0] != n:
        raise ValueError(f"{source}: x must have shape [{n}, F] as y has {n} rows, got {tuple(x.shape)}")
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
