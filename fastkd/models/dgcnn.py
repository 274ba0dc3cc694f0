"""DGCNN (arXiv:1801.07829): convolutions over the edges of nearest-neighbour graphs that every layer
makes anew in its own input's space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._checks import integer
from ..graph import Graph
from .gnn import check_dropout
from .sparse import Sparse, full_precision

__all__ = ["DGCNN", "EdgeConv", "dgcnn_student", "dgcnn_teacher"]

_SLOPE = 0.2
_MOMENTUM = 0.1  # of the running statistics, as in nn.BatchNorm1d


def neighbour_max(x: Tensor, graph: Graph) -> Tensor:
    """The maximum over every node's k in-neighbours; x [N, C] -> [N, C]."""
    if x.device.type == "cpu":  # three times as fast as the other
        pattern = torch.sparse_csr_tensor(
            graph.rowptr,
            graph.col,
            torch.ones(graph.num_edges, dtype=x.dtype),
            (graph.num_dst, graph.num_src),
            check_invariants=False,
        )
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, torch.sparse.mm(pattern, x, "amax"))
    return _gathered_max(x, graph.col.view(graph.num_dst, -1).long())


class _GatheredMax(torch.autograd.Function):
    """x [N, C], neighbours [N, k] -> [N, C]. The backward pass of plain indexing would sort N * k indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbours: Tensor) -> Tensor:
        out, which = x[neighbours].max(1)
        ctx.save_for_backward(neighbours.gather(1, which))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(grad).scatter_add_(0, ctx.saved_tensors[0], grad), None


# torch declares no types for `apply`.
_gathered_max: Callable[[Tensor, Tensor], Tensor] = _GatheredMax.apply


class EdgeConv(nn.Module):
    """max_j BN(W1 x_i + W2 (x_j - x_i)) over the in-neighbours j; the activation comes after it.

    The result is that of a linear layer, batch normalisation and LeakyReLU on every edge before the
    maximum (less the LeakyReLU, which increases and so may come after it), but nothing is computed per
    edge: the linear part splits into u_i + v_j; the maximum over j needs v alone (where the
    normalisation's weight is negative, the minimum); mean and variance over the edges follow from
    u, v and the sums of v over neighbours.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        self.lin = nn.Linear(2 * in_dim, out_dim, bias=False)
        self.norm = nn.BatchNorm1d(out_dim)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """x [N, in_dim] and a graph of k in-edges for every node -> [N, out_dim]."""
        first, second = torch.split(self.lin.weight, self.in_dim, 1)
        u, v = torch.split(full_precision(F.linear(x, torch.cat((first - second, second)))), self.out_dim, 1)
        mean, var = self._batch_statistics(u, v, graph) if self.training else self._running()
        sign = torch.where(self.norm.weight < 0, -1.0, 1.0).detach()
        highest = sign * neighbour_max(sign * v, graph)
        return (u + highest - mean) * (self.norm.weight * torch.rsqrt(var + self.norm.eps)) + self.norm.bias

    def _batch_statistics(self, u: Tensor, v: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance [C] of u_i + v_j over all edges j -> i; notes them as BN does."""
        edges = graph.num_edges
        share = graph.out_degree().to(v.dtype)[:, None] / edges
        u_mean, v_mean = u.mean(0), (share * v).sum(0)
        u, v = u - u_mean, v - v_mean  # centred, so that the squares do not cancel
        sums = Sparse(graph, torch.ones(edges, dtype=v.dtype, device=v.device)) @ v
        mean = u_mean + v_mean
        var = (u * u).mean(0) + (share * v * v).sum(0) + 2 / edges * (u * sums).sum(0)
        with torch.no_grad():
            for running, new in zip(self._running(), (mean, var * (edges / max(edges - 1, 1))), strict=True):
                running.lerp_(new, _MOMENTUM)
        return mean, var

    def _running(self) -> tuple[Tensor, Tensor]:
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        return mean, var


class DGCNN(nn.Module):
    """Classifies point clouds: edge convolutions, their outputs concatenated, an embedding, maximum
    and mean over the points, a head of linear layers.

    Args:
        out_dim: classes.
        k: neighbours of every point in every layer's graph, itself among them; at most the points there are.
        widths: of the edge convolutions.
        emb: width of the embedding before pooling.
        head: widths of the hidden linear layers after pooling.
        dropout: in the head, in [0, 1).

    Attributes:
        layers: ModuleList of :class:`EdgeConv`; a hook on ``layers.i`` sees [B*P, widths[i]] after the
            maximum over neighbours and before LeakyReLU.
        dims: [int], ``widths``; hidden: the same.
        graphs: [fastkd.Graph], of every layer in the last forward pass, over the B*P points; its input's
            k nearest neighbours, each cloud by itself.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.

    >>> import torch
    >>> from fastkd.models import DGCNN
    >>> model = DGCNN(out_dim=5, k=3, widths=(4, 8), emb=16, head=()).eval()
    >>> model(torch.randn(2, 10, 3)).shape, model.graph("layers.1").num_edges
    (torch.Size([2, 5]), 60)
    """

    def __init__(
        self,
        out_dim: int,
        k: int = 20,
        widths: Sequence[int] = (64, 64, 128, 256),
        emb: int = 1024,
        head: Sequence[int] = (512, 256),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        counts = [("out_dim", out_dim), ("k", k), ("emb", emb)]
        for name, values in (("widths", widths), ("head", head)):
            if not isinstance(values, Sequence) or (name == "widths" and not len(values)):
                raise ValueError(f"{name} must list the width of each layer, got {values!r}")
            counts += [(f"{name}[{i}]", w) for i, w in enumerate(values)]
        for name, value in counts:
            integer(name, value, 1)
        check_dropout(dropout)
        self.k, self.dims, self.dropout = k, list(widths), dropout
        self.hidden = self.dims
        self.layers = nn.ModuleList(EdgeConv(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.emb = nn.Sequential(nn.Linear(sum(widths), emb, bias=False), nn.BatchNorm1d(emb), nn.LeakyReLU(_SLOPE))
        parts: list[nn.Module] = []
        width = 2 * emb
        for w in head:
            parts += [nn.Linear(width, w, bias=False), nn.BatchNorm1d(w), nn.LeakyReLU(_SLOPE), nn.Dropout(dropout)]
            width = w
        self.head = nn.Sequential(*parts, nn.Linear(width, out_dim))
        self.graphs: list[Graph] = []

    def forward(self, points: Tensor) -> Tensor:
        """points [B, P, 3] -> logits [B, out_dim]."""
        if points.dim() != 3 or points.shape[2] != 3:
            raise ValueError(f"points must have shape [B, P, 3], got {tuple(points.shape)}")
        clouds, size, _ = points.shape
        x = points.reshape(-1, 3)
        self.graphs = []
        features = []
        for layer in self.layers:
            self.graphs.append(Graph.from_knn(x.view(clouds, size, -1), self.k, loop=True))
            x = F.leaky_relu(layer(x, self.graphs[-1]), _SLOPE)
            features.append(x)
        x = self.emb(torch.cat(features, 1)).view(clouds, size, -1)
        logits: Tensor = self.head(torch.cat((x.max(1).values, x.mean(1)), 1))
        return logits

    def graph(self, layer: int | str) -> Graph:
        """The graph over the B*P points that a layer used in the last forward pass: 2 or ``"layers.2"``."""
        names = [f"layers.{i}" for i in range(len(self.layers))]
        if isinstance(layer, int) and 0 <= layer < len(names):
            layer = names[layer]
        if layer not in names:
            raise ValueError(f"layer must be one of {', '.join(names)} or its number, got {layer!r}")
        if not self.graphs:
            raise RuntimeError("graph() tells of the last forward pass, and there was none yet")
        return self.graphs[names.index(layer)]


def dgcnn_teacher(
    out_dim: int,
    k: int = 20,
    widths: Sequence[int] = (64, 64, 128, 256),
    emb: int = 1024,
    head: Sequence[int] = (512, 256),
    dropout: float = 0.5,
) -> DGCNN:
    """The published DGCNN: 1,809,320 parameters for 40 classes."""
    return DGCNN(out_dim, k, widths, emb, head, dropout)


def dgcnn_student(
    out_dim: int,
    k: int = 10,
    widths: Sequence[int] = (32, 32, 64, 128),
    emb: int = 128,
    head: Sequence[int] = (128,),
    dropout: float = 0.5,
) -> DGCNN:
    """A DGCNN of the size of the student in arXiv:2003.10477, about 0.1 M: 94,440 parameters for 40
    classes, half the neighbours. The student's exact widths are not known; these are ours."""
    return DGCNN(out_dim, k, widths, emb, head, dropout)
