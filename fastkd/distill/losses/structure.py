"""The local structure preserving loss as one of the losses."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..._text import listed
from ...graph import Graph
from ...kernels import Kernel
from ...lsp import Divergence, LSPLoss, TeacherStructure, teacher_structure
from .base import DistillationLoss, flag, one_of

__all__ = ["LSP"]


class LSP(DistillationLoss):
    """Local structure preserving loss (Yang et al. 2020, arXiv:2003.10477): :class:`fastkd.LSPLoss`.

    Args:
        kernel: a name or :class:`fastkd.kernels.Kernel`; None means "rbf", or the preset's own.
        kernel_args: constants of the kernel to change, such as ``{"sigma": 10.0, "scale": "mean"}``.
        divergence: None means "student||teacher". None with a preset.
        reduction: "mean", "mean_active", "mean_edges" or "sum"; None means "mean". None with a preset.
        preset: "paper", "distillgcn" or "efficient_gnns", see :meth:`fastkd.LSPLoss.preset`.
        graph: with a ``teacher_graph``, compare over the union of both graphs ("union"), or over the
            student's own only ("student").
        shuffle: the control: compare over the wrong graph of :meth:`shuffled`.
    """

    name = "lsp"

    def __init__(
        self,
        *,
        kernel: str | Kernel | None = None,
        kernel_args: dict[str, Any] | None = None,
        divergence: Divergence | None = None,
        reduction: Literal["mean", "mean_active", "mean_edges", "sum"] | None = None,
        preset: Literal["paper", "distillgcn", "efficient_gnns"] | None = None,
        graph: Literal["student", "union"] = "union",
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        one_of("graph", graph, ("student", "union"))
        if reduction is not None:
            one_of("reduction", reduction, ("mean", "mean_active", "mean_edges", "sum"))
        if preset is None:
            self.criterion = LSPLoss(
                "rbf" if kernel is None else kernel,
                divergence=divergence or "student||teacher",
                reduction=reduction or "mean",
            )
        else:
            for argument, value in (("divergence", divergence), ("reduction", reduction)):
                if value is not None:
                    raise ValueError(f"{argument} must be None with preset={preset!r}, got {value!r}")
            if isinstance(kernel, Kernel):
                raise ValueError(f"kernel must be a name or None with preset={preset!r}, got {kernel!r}")
            self.criterion = LSPLoss.preset(preset, kernel)
        if kernel_args:
            changed = _with_constants(self.criterion.kernel, kernel_args)
            self.criterion.kernel = self.criterion.teacher_kernel = changed
        self.graph = graph
        self.shuffle = flag("shuffle", shuffle)
        if shuffle:
            # In the state_dict, so that a resumed run goes on with the same wrong graph.
            self.shuffle_seed: Tensor
            self.register_buffer("shuffle_seed", torch.tensor(-1))
            self._shuffled: WeakKeyDictionary[Graph, Graph] = WeakKeyDictionary()

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TeacherStructure,
        graph: Graph | None = None,
        generator: torch.Generator | None = None,
        teacher_graph: Graph | None = None,
    ) -> Tensor:
        """As :meth:`DistillationLoss.forward`; a TeacherStructure must be of the graph compared over."""
        if not isinstance(graph, Graph):
            raise TypeError(f"graph must be a fastkd.Graph for lsp, got {type(graph).__name__}")
        if self.graph == "student" or teacher_graph is graph:
            teacher_graph = None
        if self.shuffle:
            if isinstance(teacher, TeacherStructure) and teacher.graph is graph:
                raise ValueError(
                    "teacher must be features with shuffle=True, or a TeacherStructure of "
                    "shuffled(graph), got one of the graph itself"
                )
            graph = self.shuffled(graph if teacher_graph is None else graph.union(teacher_graph), generator)
            teacher_graph = None
        loss: Tensor = self.criterion(student, teacher, graph, teacher_graph=teacher_graph)
        return loss

    def prepare(
        self, teacher: Tensor, graph: Graph | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TeacherStructure:
        assert graph is not None
        return teacher_structure(
            teacher, self.shuffled(graph, generator) if self.shuffle else graph, self.criterion.teacher_kernel
        )

    def shuffled(self, graph: Graph, generator: torch.Generator | None = None) -> Graph:
        """A wrong graph with as many in-edges and out-edges at every node: the sources permuted among
        all edges. Self-loops and repeated edges may arise.

        The generator is used once in the life of the loss; from then on a graph of the same edges
        has the same wrong graph, also after a state_dict is loaded.
        """
        found = self._shuffled.get(graph)
        if found is None:
            if self.shuffle_seed < 0:
                device = None if generator is None else generator.device
                self.shuffle_seed.copy_(torch.randint(2**62, (), generator=generator, device=device))
            fixed = torch.Generator().manual_seed(int(self.shuffle_seed))
            order = torch.randperm(graph.num_edges, generator=fixed).to(graph.device)
            found = self._shuffled[graph] = Graph.from_csr(graph.rowptr, graph.col[order], graph.num_src)
        return found


def _with_constants(kernel: Kernel, constants: dict[str, Any]) -> Kernel:
    known = [f.name for f in fields(kernel)]
    for constant in constants:
        if constant not in known:
            raise ValueError(f"kernel_args must be of {listed(known)} for kernel {kernel.name!r}, got {constant!r}")
    return replace(kernel, **constants)
