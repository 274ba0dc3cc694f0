"""What all losses share: the call, the choice of rows, and checks."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._checks import is_integer, is_number
from ..._text import listed
from ...graph import Graph
from ...lsp import TeacherStructure

__all__ = [
    "DistillationLoss",
    "cosines",
    "flag",
    "integer",
    "number",
    "of_width",
    "one_of",
    "projected",
    "sample",
    "unit",
]


class DistillationLoss(nn.Module):
    """Base class: subclasses write :meth:`compare`.

    Attributes:
        name: the name in :data:`LOSSES`.
        uses: what student and teacher are: the models' "logits", or the "features" of a layer.
        rowwise: whether it is a mean over nodes that looks at each one alone, so that several processes
            can share the nodes.
        max_nodes: the most nodes that are compared in one call, or None for all.
    """

    name: ClassVar[str]
    uses: ClassVar[Literal["logits", "features"]] = "features"
    rowwise: ClassVar[bool] = False
    max_nodes: int | None = None

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TeacherStructure,
        graph: Graph | None = None,
        generator: torch.Generator | None = None,
        teacher_graph: Graph | None = None,
    ) -> Tensor:
        """The loss, a scalar in float32 (float64 if either side is float64).

        Args:
            student: [N, Ds], the gradient flows to it.
            teacher: [N, Dt], detached; for :class:`LSP` also a :class:`fastkd.TeacherStructure`.
            graph: the student's graph; only :class:`LSP` looks at it.
            generator: draws the nodes where N > max_nodes; None takes torch's global one.
            teacher_graph: the teacher's own graph, where it differs; only :class:`LSP` looks at it.
        """
        for side, x in (("student", student), ("teacher", teacher)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                got = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{side} must be a floating-point tensor [N, D], got {got}")
            if x.dim() != 2 or not x.shape[0]:
                raise ValueError(f"{side} must have shape [N, D] with N >= 1, got {tuple(x.shape)}")
        assert isinstance(teacher, Tensor)
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"student and teacher must have the same nodes, got {student.shape[0]} and {teacher.shape[0]} rows"
            )
        teacher = teacher.detach()
        if self.max_nodes is not None:
            student, teacher = sample(self.max_nodes, generator, student, teacher)
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        with torch.autocast(student.device.type, enabled=False):  # it would multiply in half precision
            return self.compare(student.to(dtype), teacher.to(dtype), generator)

    def prepare(
        self, teacher: Tensor, graph: Graph | None = None, generator: torch.Generator | None = None
    ) -> Tensor | TeacherStructure:
        """What :meth:`forward` may be given in place of the same teacher features on the same graph, so
        that the teacher's share of the work is done once."""
        return teacher

    def compare(self, student: Tensor, teacher: Tensor, generator: torch.Generator | None) -> Tensor:
        """The loss of student [n, Ds] and teacher [n, Dt], n <= max_nodes, of one dtype."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        arguments = inspect.signature(type(self)).parameters
        return ", ".join(f"{a}={getattr(self, a)!r}" for a in arguments if hasattr(self, a))


def sample(most: int, generator: torch.Generator | None, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same ``most`` rows of both, drawn without replacement; all rows where there are no more."""
    n = student.shape[0]
    if n <= most:
        return student, teacher
    device = None if generator is None else generator.device
    rows = torch.randperm(n, generator=generator, device=device)[:most].to(student.device)
    return student[rows], teacher[rows]


def unit(x: Tensor) -> Tensor:
    """x / ||x|| over the last dimension. Vectors of (nearly) 0 become 0 with gradient 0: a ReLU makes
    such rows, and F.normalize has a gradient of 1e12 there."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.div(x, norm.masked_fill(norm < 1e-12, torch.inf))


def cosines(z: Tensor) -> Tensor:
    """[n, n] cosines of the rows of z [n, D]."""
    z = unit(z)
    return z @ z.T


def projected(linear: nn.Linear, x: Tensor, side: str) -> Tensor:
    """linear(x) in x's precision."""
    of_width(linear.in_features, x, side)
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def of_width(expected: int, x: Tensor, side: str = "teacher") -> Tensor:
    """x, if its width is the expected one."""
    if x.shape[1] != expected:
        raise ValueError(f"{side} must have shape [N, {expected}] ({side}_dim), got {tuple(x.shape)}")
    return x


# --- checks: a wrong value is a ValueError, whatever its type ------------------------------------------


def number(argument: str, value: Any, low: float | None = None) -> float:
    """A finite number > 0, or >= low."""
    finite = is_number(value) and math.isfinite(value)
    if not finite or (value <= 0 if low is None else value < low):
        interval = "(0, inf)" if low is None else f"[{low:g}, inf)"
        raise ValueError(f"{argument} must be a number in {interval}, got {value!r}")
    return float(value)


def integer(argument: str, value: Any, low: int) -> int:
    """An int >= low."""
    if not is_integer(value) or value < low:
        raise ValueError(f"{argument} must be an int >= {low}, got {value!r}")
    return int(value)


def flag(argument: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{argument} must be True or False, got {value!r}")
    return value


def one_of(argument: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of the names."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {listed(choices)}, got {value!r}")
