"""The graphs that are timed: real ones from $FASTKD_DATA, and generated ones of a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastkd import Graph

SEED = 2003_10477
SIGMA = 100.0  # the default of the RBF kernel


class Absent(Exception):
    """The case cannot be made here; the message says why."""


@dataclass(frozen=True)
class Spec:
    name: str
    student_dim: int
    teacher_dim: int
    edges: Callable[[torch.Generator], tuple[Tensor, int]]  # (edge_index [2, E], N)
    dtype: torch.dtype = torch.float32
    cuda_only: bool = False


@dataclass
class Case:
    name: str
    edge_index: Tensor  # [2, E] int64 in random order, as it might come from a file
    graph: Graph
    student: Tensor  # [N, Ds], a leaf that requires grad
    teacher: Tensor  # [N, Dt]

    @property
    def num_nodes(self) -> int:
        return self.student.shape[0]

    @property
    def num_edges(self) -> int:
        return self.graph.num_edges


def _real(name: str) -> Callable[[torch.Generator], tuple[Tensor, int]]:
    def edges(_: torch.Generator) -> tuple[Tensor, int]:
        if "FASTKD_DATA" not in os.environ:
            raise Absent(f"{name}: set FASTKD_DATA to the folder that holds graphs/{name}.npz")
        path = Path(os.environ["FASTKD_DATA"]) / "graphs" / f"{name}.npz"
        if not path.exists():
            raise Absent(f"{name}: no file {path}")
        with np.load(path) as file:
            edge_index = torch.from_numpy(file["edge_index"]).long()
            if "y" in file:
                nodes = len(file["y"])  # isolated nodes may come last
            else:
                nodes = int(edge_index.max()) + 1
        return edge_index, nodes

    return edges


def _random(nodes: int, edges: int, skew: float, symmetric: bool) -> Callable[[torch.Generator], tuple[Tensor, int]]:
    """Both ends of an edge drawn with probability ~ rank^-skew (0: uniform), no loops or doubles.

    The ranks are dealt to the nodes at random: a graph without locality, the hard case for caches.
    """

    def make(generator: torch.Generator) -> tuple[Tensor, int]:
        cdf = torch.arange(1, nodes + 1, dtype=torch.float64).pow_(-skew).cumsum_(0)
        cdf /= cdf[-1].clone()
        label = torch.randperm(nodes, generator=generator)
        wanted = edges // 2 if symmetric else edges
        keys = torch.empty(0, dtype=torch.int64)
        while keys.numel() < wanted:
            # Doubles are frequent between hubs: draw again until there are enough edges.
            size = int(1.05 * (wanted - keys.numel())) + 1024
            ends = torch.rand(2, size, dtype=torch.float64, generator=generator)
            a, b = label[torch.searchsorted(cdf, ends).clamp_(max=nodes - 1)]
            if symmetric:
                a, b = torch.minimum(a, b), torch.maximum(a, b)
            drawn = (a * nodes + b)[a != b]
            keys = torch.unique(torch.cat((keys, drawn)))
        keys = keys[torch.randperm(keys.numel(), generator=generator)[:wanted]]
        a, b = keys // nodes, keys % nodes
        if symmetric:
            a, b = torch.cat((a, b)), torch.cat((b, a))
        return torch.stack((a, b)), nodes

    return make


def _clouds(clouds: int, points: int, k: int) -> Callable[[torch.Generator], tuple[Tensor, int]]:
    def make(generator: torch.Generator) -> tuple[Tensor, int]:
        graph = Graph.from_knn(torch.rand(clouds, points, 3, generator=generator), k)
        return graph.edge_index, clouds * points

    return make


_REDDIT = _random(232_965, 114_615_892, 0.5, True)

SPECS = {
    spec.name: spec
    for spec in (
        Spec("cora", 64, 256, _real("cora")),
        Spec("amazon_photo", 64, 256, _real("amazon_photo")),
        Spec("coauthor_cs", 64, 256, _real("coauthor_cs")),
        Spec("twitch7", 64, 256, _real("twitch7")),
        Spec("point_cloud", 64, 64, _clouds(32, 1024, 20)),
        Spec("ppi_size", 136, 1024, _random(56_944, 1_587_264, 0.3, True)),
        Spec("arxiv_size", 128, 256, _random(169_343, 2_315_598, 0.5, True)),
        Spec("arxiv_directed", 128, 256, _random(169_343, 2_315_598, 0.5, False)),
        # Largest degree about 70,000.
        Spec("power_law", 64, 128, _random(1_000_000, 16_000_000, 0.7, True)),
        Spec("reddit_size", 256, 256, _REDDIT, cuda_only=True),
        Spec("reddit_size_bf16", 256, 256, _REDDIT, torch.bfloat16, cuda_only=True),
    )
}


def _features(nodes: int, dim: int, generator: torch.Generator) -> Tensor:
    """Random rows of length 5 to 15, whatever the width: squared distances of 50 to 450, which an
    RBF of sigma 100 maps to 0.1 ... 0.8, far from saturation at either end."""
    x = torch.randn(nodes, dim, generator=generator)
    length = 5 + 10 * torch.rand(nodes, 1, generator=generator)
    return x.mul_(length / dim**0.5)


def load(name: str, device: torch.device | str = "cpu") -> Case:
    """Makes a case. Raises Absent where it cannot be had."""
    spec, device = SPECS[name], torch.device(device)
    if spec.cuda_only and device.type != "cuda":
        raise Absent(f"{name}: only with --device cuda")
    generator = torch.Generator().manual_seed(SEED)
    edge_index, nodes = spec.edges(generator)
    shuffled = torch.randperm(edge_index.shape[1], generator=generator)
    edge_index = edge_index.long()[:, shuffled].to(device)
    student = _features(nodes, spec.student_dim, generator).to(device, spec.dtype)
    teacher = _features(nodes, spec.teacher_dim, generator).to(device, spec.dtype)
    graph = Graph.from_edge_index(edge_index, nodes)
    return Case(name, edge_index, graph, student.requires_grad_(), teacher)
