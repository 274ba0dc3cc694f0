"""Losses that bring a student's node features or logits to a teacher's.

All share one call, ``loss(student, teacher, graph, generator, teacher_graph)``, so that a trainer need
not know which one it has; :func:`build` makes them by name. The weight of a loss, and the schedule
of the weight, belong to the trainer. "efficient-gnns" below is the code of arXiv:2111.04964.
"""

from __future__ import annotations

import inspect
from typing import Any

from ..._text import listed, suggestion
from .base import DistillationLoss
from .nodes import KD, FitNet
from .relations import GCRD, PKT, RKD, AttentionTransfer, RepresentationMatching, SimilarityPreserving
from .structure import LSP

__all__ = [
    "GCRD",
    "KD",
    "LOSSES",
    "LSP",
    "PKT",
    "RKD",
    "AttentionTransfer",
    "DistillationLoss",
    "FitNet",
    "RepresentationMatching",
    "SimilarityPreserving",
    "build",
    "kind",
]


LOSSES: dict[str, type[DistillationLoss]] = {
    loss.name: loss
    for loss in (LSP, KD, FitNet, AttentionTransfer, RKD, SimilarityPreserving, PKT, GCRD, RepresentationMatching)
}


def kind(name: str) -> type[DistillationLoss]:
    """The class of that name in :data:`LOSSES`."""
    if name not in LOSSES:
        raise ValueError(f"name must be one of {listed(LOSSES)}, got {name!r}{suggestion(name, LOSSES)}")
    return LOSSES[name]


def build(
    name: str, *, student_dim: int | None = None, teacher_dim: int | None = None, **hyperparameters: Any
) -> DistillationLoss:
    """The loss of that name in :data:`LOSSES`.

    Args:
        student_dim, teacher_dim: the widths of what it compares. Needed by the losses that project,
            and ignored by the others.
        hyperparameters: of the loss's class.
    """
    loss = kind(name)
    valid = set(inspect.signature(loss).parameters)
    dims = {"student_dim": student_dim, "teacher_dim": teacher_dim}
    if dims.keys() <= valid:
        for argument, value in dims.items():
            if value is None:
                raise ValueError(f"{argument} must be given for loss {name!r}, which projects the features")
        hyperparameters.update(dims)
    known = sorted(valid - dims.keys())
    for argument in hyperparameters:
        if argument not in valid:
            raise TypeError(
                f"loss {name!r} has no hyperparameter {argument!r}{suggestion(argument, known)}; "
                f"it has {listed(known) or 'none'}"
            )
    return loss(**hyperparameters)
