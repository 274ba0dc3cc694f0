"""What a network sees at once: whole graphs, sampled neighbourhoods, or shapes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import Task, augment
from ..data.graphs import rows_of
from ..graph import Graph
from ..runtime.world import World
from .config import TrainConfig

__all__ = ["Batch", "batches", "check_sampler"]

SHAPES = 32  # per batch, unless said otherwise


@dataclass
class Batch:
    inputs: tuple[Any, ...]
    """What the networks are called with."""
    y: Tensor
    """[N] classes, or [N, L] for several labels."""
    masks: dict[str, Tensor] | None = None
    """[N] bool by part, where one graph holds all parts."""
    split: str = "train"
    graph: Graph | None = None
    """Of the nodes; None for shapes, whose networks make their own."""
    key: Hashable | None = None
    """Two batches of one key are the same: what the teacher says of them can be kept."""
    seeds: int | None = None
    """Only the first rows have all their neighbours, and only these count; None: all."""
    share: float | None = None
    """The part of a larger batch that this rank has, by rows; None: all of it."""

    def labelled(self, logits: Tensor, split: str | None = None) -> tuple[Tensor, Tensor]:
        """The rows that count for the labels, and their labels."""
        y = self.y
        if self.seeds is not None:
            return logits[: self.seeds], y[: self.seeds]
        if self.masks is not None:
            mask = self.masks[split or self.split]
            return logits[mask], y[mask]
        return logits, y


def batches(
    task: Task,
    split: str,
    train: TrainConfig,
    generator: torch.Generator | None,
    device: torch.device,
    graphs: dict[int, Batch],
    world: World | None = None,
) -> Iterator[Batch]:
    """The batches of a part; in random order, and augmented, with a generator. Of several ranks, each gets
    its share of every such batch; what is in order all ranks get.

    Whole graphs are kept in `graphs`, which is the caller's and goes with one task and one device.
    """
    world = world if world is not None and generator is not None else World()
    if task.kind == "shapes":
        return _shapes(task, split, train, generator, device, world)
    if train.neighbors is not None and generator is not None:
        return _neighbours(task, split, train, generator, device, world)
    if train.batch_size is not None and len(task.graphs[split]) > 1 and generator is not None:
        return _several(task, split, train.batch_size, generator, device, world)
    return (_whole(data, task, split, device, graphs) for data in task.graphs[split])


def _whole(data: Any, task: Task, split: str, device: torch.device, graphs: dict[int, Batch]) -> Batch:
    key = id(data)
    if key not in graphs:
        graph_data = data if device.type == "cpu" else data.clone().to(device)
        masks = None if task.inductive else {part: graph_data[f"{part}_mask"] for part in ("train", "val", "test")}
        graphs[key] = replace(_of_graph(graph_data, split), masks=masks, key=key)
    return replace(graphs[key], split=split)


def _of_graph(data: Any, split: str) -> Batch:
    graph = Graph.from_edge_index(data.edge_index, data.num_nodes)
    return Batch((data.x, data.adj_t), data.y, split=split, graph=graph)


def _shares(order: Tensor, size: int, world: World, least: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every batch of `size` the own rows, and all; batches without `least` rows for each rank are left out."""
    if size < least * world.size:
        raise ValueError(f"train.batch_size must be at least {least * world.size} for {world.size} ranks, got {size}")
    for rows in order.split(size):
        if len(rows) >= least * world.size:
            yield rows[world.rank :: world.size], rows


def _several(
    task: Task, split: str, size: int, generator: torch.Generator, device: torch.device, world: World
) -> Iterator[Batch]:
    """Some of many graphs, as one of several components."""
    from torch_geometric.data import Batch as Union
    from torch_geometric.loader import DataLoader

    graphs = task.graphs[split]
    if world.size == 1:
        for data in DataLoader(graphs, size, shuffle=True, generator=generator):
            yield _of_graph(data.to(device), split)
        return
    for part, rows in _shares(torch.randperm(len(graphs), generator=generator), size, world):
        data = Union.from_data_list([graphs[i] for i in part.tolist()])
        share = data.num_nodes / sum(graphs[i].num_nodes for i in rows.tolist())
        yield replace(_of_graph(data.to(device), split), share=share)


def _neighbours(
    task: Task, split: str, train: TrainConfig, generator: torch.Generator, device: torch.device, world: World
) -> Iterator[Batch]:
    """Seed nodes with sampled neighbourhoods: the seeds come first, and only they are destinations of
    the local structure, since only they have their neighbours with them."""
    from torch_geometric.data import Data
    from torch_geometric.loader import NeighborLoader

    for data in task.graphs[split]:
        # PyG's loaders know neither sparse features nor a torch.sparse_csr adj_t: they get the edges alone.
        edges = Data(edge_index=data.edge_index, num_nodes=data.num_nodes)
        nodes = None if task.inductive else data[f"{split}_mask"]
        if world.size > 1:
            nodes = torch.arange(data.num_nodes) if nodes is None else nodes.nonzero()[:, 0]
            sample = NeighborLoader(edges, train.neighbors, input_nodes=nodes)
            order = torch.randperm(len(nodes), generator=generator)
            for part, rows in _shares(order, train.batch_size or 1024, world):
                yield replace(of_neighbours(sample(part), data, split, device), share=len(part) / len(rows))
            continue
        # Its workers draw from torch's global generator.
        loader = NeighborLoader(
            edges, train.neighbors, input_nodes=nodes, batch_size=train.batch_size or 1024, shuffle=True
        )
        for part in loader:
            yield of_neighbours(part, data, split, device)


def of_neighbours(part: Any, data: Any, split: str, device: torch.device) -> Batch:
    """From what PyG's neighbour loaders give: part.batch_size seeds, then the others; part.n_id in `data`."""
    seeds = int(part.batch_size)
    edges = part.edge_index.to(device)
    graph = Graph.from_edge_index(edges[:, edges[1] < seeds], (len(part.n_id), seeds))
    x, y = (rows_of(a, part.n_id).to(device) for a in (data.x, data.y))
    return Batch((x, edges), y, None, split, graph, seeds=seeds)


def check_sampler(train: TrainConfig) -> None:
    """Raises ImportError where PyG cannot sample neighbours, which it would say in the first batch alone."""
    from torch_geometric import typing

    if train.neighbors is not None and not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        version = torch.__version__.split("+")[0]
        raise ImportError(
            f"train.neighbors = {train.neighbors} needs pyg-lib (or torch-sparse), with which PyG "
            "samples neighbours: pip install pyg-lib -f "
            f"https://data.pyg.org/whl/torch-{version}+cpu.html, or +cu126 and so on; "
            "train.neighbors = null takes whole graphs"
        )


def _shapes(
    task: Task, split: str, train: TrainConfig, generator: torch.Generator | None, device: torch.device, world: World
) -> Iterator[Batch]:
    points, labels = task.points[split], task.labels[split]
    shapes, most = points.shape[:2]
    order = torch.arange(shapes) if generator is None else torch.randperm(shapes, generator=generator)
    least = 1 if generator is None else 2  # batch normalisation has nothing to do with a single shape
    for part, rows in _shares(order, train.batch_size or SHAPES, world, least):
        chosen = points[rows]
        if train.points is not None and train.points < most:
            some = torch.arange(most) if generator is None else torch.randperm(most, generator=generator)
            chosen = chosen[:, some[: train.points]]
        if generator is not None and train.augment:
            chosen = augment(chosen, generator)
        # Drawn for all shapes, then shared: the generator stays the same on all ranks.
        inputs = (chosen[world.rank :: world.size].to(device),)
        share = len(part) / len(rows) if world.size > 1 else None
        yield Batch(inputs, labels[part].to(device), split=split, share=share)
