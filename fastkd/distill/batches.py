"""What a network sees at once: whole graphs, sampled neighbourhoods, or shapes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data import Task, augment
from ..graph import Graph
from .config import TrainConfig

__all__ = ["Batch", "batches"]

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

    def labelled(self, logits: Tensor, split: str | None = None) -> tuple[Tensor, Tensor]:
        """The rows that count for the labels, and their labels."""
        y = self.y
        if self.seeds is not None:
            return logits[:self.seeds], y[:self.seeds]
        if self.masks is not None:
            mask = self.masks[split or self.split]
            return logits[mask], y[mask]
        return logits, y


def batches(task: Task, split: str, train: TrainConfig, generator: torch.Generator | None,
            device: torch.device, whole: dict[int, Batch]) -> Iterator[Batch]:
    """The batches of a part; in random order, and augmented, with a generator.

    Whole graphs are kept in `whole`, which is the caller's and goes with one task and one device.
    """
    if task.kind == "shapes":
        return _shapes(task, split, train, generator, device)
    if train.neighbors is not None and generator is not None:
        return _neighbours(task, split, train, generator, device)
    if train.batch_size is not None and len(task.graphs[split]) > 1 and generator is not None:
        return _several(task, split, train.batch_size, generator, device)
    return (_whole(data, task, split, device, whole) for data in task.graphs[split])


def _whole(data: Any, task: Task, split: str, device: torch.device, whole: dict[int, Batch]) -> Batch:
    key = id(data)
    if key not in whole:
        own = data if device.type == "cpu" else data.clone().to(device)
        masks = None if task.inductive else {part: own[f"{part}_mask"] for part in ("train", "val", "test")}
        graph = Graph.from_edge_index(own.edge_index, own.num_nodes)
        whole[key] = Batch((own.x, own.adj_t), own.y, masks, graph=graph, key=key)
    return replace(whole[key], split=split)


def _several(task: Task, split: str, size: int, generator: torch.Generator, device: torch.device) -> Iterator[Batch]:
    """Some of many graphs, as one of several components."""
    from torch_geometric.loader import DataLoader

    for data in DataLoader(task.graphs[split], size, shuffle=True, generator=generator):
        data = data.to(device)
        yield Batch((data.x, data.adj_t), data.y, None, split, Graph.from_edge_index(data.edge_index, data.num_nodes))


def _neighbours(task: Task, split: str, train: TrainConfig, generator: torch.Generator,
                device: torch.device) -> Iterator[Batch]:
    """Seed nodes with sampled neighbourhoods: the seeds come first, and only they are destinations of
    the local structure, since only they have their neighbours with them."""
    from torch_geometric.loader import NeighborLoader

    for data in task.graphs[split]:
        nodes = None if task.inductive else data[f"{split}_mask"]
        # Its workers draw from torch's global generator.
        loader = NeighborLoader(data, train.neighbors, input_nodes=nodes, batch_size=train.batch_size or 1024,
                                shuffle=True)
        for part in loader:
            yield of_neighbours(part.to(device), split)


def of_neighbours(data: Any, split: str) -> Batch:
    """From what PyG's neighbour loaders give: data.batch_size seeds, then the others."""
    seeds = int(data.batch_size)
    keep = data.edge_index[1] < seeds
    graph = Graph.from_edge_index(data.edge_index[:, keep], (data.num_nodes, seeds))
    return Batch((data.x, data.edge_index), data.y, None, split, graph, seeds=seeds)


def _shapes(task: Task, split: str, train: TrainConfig, generator: torch.Generator | None,
            device: torch.device) -> Iterator[Batch]:
    points, labels = task.points[split], task.labels[split]
    size = train.batch_size or SHAPES
    order = torch.arange(len(points)) if generator is None else torch.randperm(len(points), generator=generator)
    for rows in order.split(size):
        if generator is not None and len(rows) < 2:
            continue  # batch normalisation has nothing to do with a single shape
        chosen = points[rows]
        if train.points is not None and train.points < points.shape[1]:
            some = torch.arange(train.points) if generator is None else torch.randperm(
                points.shape[1], generator=generator)[:train.points]
            chosen = chosen[:, some]
        if generator is not None and train.augment:
            chosen = augment(chosen, generator)
        yield Batch((chosen.to(device),), labels[rows].to(device), None, split)
