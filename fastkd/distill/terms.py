"""The terms of a distillation: what both networks give for a batch, and the losses that compare it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import Graph
from ..runtime.world import World
from . import losses
from .batches import Batch
from .config import LossConfig
from .distributed import LSPPart
from .losses import DistillationLoss
from .taps import Taps

__all__ = ["DistillationTerms"]

Call = Callable[[nn.Module, Batch], Tensor]
"""Runs a network on a batch and gives its logits [N, C]."""


class DistillationTerms:
    """The losses of a distillation between two networks, whose inner features are taken by hooks.

    What the teacher gives for a static graph, and what a loss makes of that alone, is computed once.

    Args:
        configs: the losses by name, each with a weight above 0.
        call: how a network is run.
        batch: gives some batch, on which both networks run once, so that the widths of their features are known.

    Raises:
        ValueError: a loss or a layer that does not exist, or networks on different nodes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        configs: dict[str, LossConfig],
        call: Call,
        batch: Callable[[], Batch],
        world: World,
        generator: torch.Generator,
    ) -> None:
        self.student, self.teacher, self.configs = student, teacher, configs
        self._call, self.world, self.generator = call, world, generator
        self.student_taps = Taps(student, self._layers("student"), "student")
        self.teacher_taps = Taps(teacher or nn.Module(), self._layers("teacher"), "teacher")
        self._teacher_outputs: dict[Hashable, dict[str, Any]] = {}  # of static graphs
        self._prepared: dict[tuple[str, Hashable], Any] = {}
        try:
            self.losses = self._build(batch)
        except BaseException:
            self.close()
            raise

    def _layers(self, side: str) -> list[str]:
        names = [getattr(config, f"{side}_layer") for config in self.configs.values()]
        return list(dict.fromkeys(name for name in names if name))

    def _build(self, batch: Callable[[], Batch]) -> nn.ModuleDict:
        kinds = {name: losses.kind(name) for name in self.configs}
        on_features = [name for name, kind in kinds.items() if kind.uses == "features"]
        for name in on_features:
            for side, model in (("student", self.student), ("teacher", self.teacher)):
                if model is not None and getattr(self.configs[name], f"{side}_layer") is None:
                    known = ", ".join(n for n, _ in model.named_modules() if n)
                    raise ValueError(
                        f"losses.{name}.{side}_layer is missing: the loss {name!r} compares features, and the {side} "
                        f"has the layers {known}"
                    )
        widths: dict[str, tuple[int, int]] = {}
        if self.teacher is not None and on_features:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                example = batch()
                self.student.eval()  # batch normalisation learns nothing from this
                self._call(self.student, example)
                self._call(self.teacher, example)
            for name in on_features:
                config = self.configs[name]
                s, t = self.student_taps[config.student_layer], self.teacher_taps[config.teacher_layer]
                if len(s) != len(t):
                    raise ValueError(
                        f"losses.{name}: the student's {config.student_layer!r} has {len(s)} rows, the teacher's "
                        f"{config.teacher_layer!r} {len(t)}: both must be on the same nodes"
                    )
                widths[name] = (s.shape[1], t.shape[1])
        modules: dict[str, nn.Module] = {}
        for name, config in self.configs.items():
            student_dim, teacher_dim = widths.get(name, (None, None))
            modules[name] = losses.build(name, student_dim=student_dim, teacher_dim=teacher_dim, **config.args)
        return nn.ModuleDict(modules)

    def weight(self, name: str, epoch: int) -> float:
        """The weight of a loss in an epoch, by its schedule."""
        c = self.configs[name]
        if epoch < c.start or (c.stop is not None and epoch >= c.stop):
            return 0.0
        return c.weight * min(1.0, (epoch - c.start + 1) / c.ramp) if c.ramp else c.weight

    def __call__(self, batch: Batch, logits: Tensor, weights: dict[str, float]) -> dict[str, Tensor]:
        """The terms of the losses that `weights` names, each without its weight; of several ranks, this one's part.

        Args:
            logits: of the student, whose forward pass over the batch has just filled its taps.
        """
        teacher = self.teacher_outputs(batch) if weights else {}
        terms: dict[str, Tensor] = {}
        for name in weights:
            loss = self.losses[name]
            assert isinstance(loss, DistillationLoss)
            if loss.uses == "logits":
                rows = slice(batch.seeds)
                terms[name] = self._part(loss, batch, logits[rows], teacher["logits"][rows])
            else:
                terms[name] = self._feature_term(name, loss, batch, teacher)
        self.student_taps.clear()
        return terms

    def teacher_outputs(self, batch: Batch) -> dict[str, Any]:
        """What the teacher gives: "logits", features by layer, and "graphs" by layer."""
        if batch.key is not None and batch.key in self._teacher_outputs:
            return self._teacher_outputs[batch.key]
        assert self.teacher is not None  # without one there are no losses
        out: dict[str, Any] = {}
        on_logits = any(isinstance(loss, DistillationLoss) and loss.uses == "logits" for loss in self.losses.values())
        self.teacher_taps.clear()
        with torch.no_grad():
            with contextlib.nullcontext() if on_logits else self.teacher_taps.stopping():
                out["logits"] = self._call(self.teacher, batch)
            layers = self._layers("teacher")
            out |= {layer: self.teacher_taps[layer].detach() for layer in layers}
            out["graphs"] = {layer: batch.graph or _graph_of(self.teacher, layer) for layer in layers}
        self.teacher_taps.clear()
        if batch.key is not None:
            self._teacher_outputs[batch.key] = out
        return out

    def _feature_term(self, name: str, loss: DistillationLoss, batch: Batch, teacher: dict[str, Any]) -> Tensor:
        config = self.configs[name]
        assert config.student_layer is not None and config.teacher_layer is not None  # the constructor has seen to it
        s: Any = self.student_taps[config.student_layer].float()
        t: Any = teacher[config.teacher_layer]
        graph, teacher_graph = batch.graph, None
        if graph is None:
            graph = _graph_of(self.student, config.student_layer)
            teacher_graph = teacher["graphs"][config.teacher_layer]
        if batch.seeds is not None:
            # Only the first rows have all their in-edges: these are the destinations.
            n = batch.seeds
            s, t = ((s, s[:n]), (t, t[:n])) if isinstance(loss, losses.LSP) else (s[:n], t[:n])
        elif batch.key is not None:  # what depends on the teacher alone is done once
            key = (name, batch.key)
            if key not in self._prepared:
                if isinstance(loss, losses.LSP) and self.world.size > 1:
                    rows = self.world.range(graph.num_dst)
                    self._prepared[key] = LSPPart(loss, t, graph, rows, self.generator)
                else:
                    self._prepared[key] = loss.prepare(t, graph, self.generator)
            t = self._prepared[key]
            if isinstance(t, LSPPart):
                return t(s)
        return self._part(loss, batch, s, t, graph, teacher_graph)

    def _part(
        self,
        loss: DistillationLoss,
        batch: Batch,
        student: Any,
        teacher: Any,
        graph: Graph | None = None,
        teacher_graph: Graph | None = None,
    ) -> Tensor:
        """A loss; where every rank has the full batch, this rank's part of it."""
        generator = self.generator
        if batch.share is not None and loss.max_nodes is not None:
            generator = self.world.own_generator(generator)  # ranks draw from different numbers of rows

        def call(s: Any, t: Any) -> Tensor:
            value: Tensor = loss(s, t, graph, generator, teacher_graph)
            return value

        if self.world.size == 1 or batch.share is not None:
            return call(student, teacher)
        if loss.rowwise:
            return self.world.part_of_mean(call, student, teacher)
        return call(student, teacher) / self.world.size

    def close(self) -> None:
        """Takes the hooks off both networks."""
        self.student_taps.remove()
        self.teacher_taps.remove()


def _graph_of(model: nn.Module, layer: str) -> Graph:
    """The graph that a dynamic model made for a layer in its last forward pass."""
    make = getattr(model, "graph", None)
    if not callable(make):
        raise ValueError(
            f"{type(model).__name__} makes no graphs of its own and the task has none: a loss over neighbourhoods "
            "needs model.graph(layer), as in fastkd.models.DGCNN"
        )
    graph: Graph = make(layer)
    return graph
