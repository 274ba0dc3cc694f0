"""The networks to distil by name; see :mod:`fastkd.models`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .._text import suggestion
from .dgcnn import DGCNN, dgcnn_student, dgcnn_teacher
from .gnn import GAT, GCN, MLP, GraphSAGE, gat_student, gat_teacher

__all__ = [
    "DGCNN",
    "GAT",
    "GCN",
    "MLP",
    "MODELS",
    "GraphSAGE",
    "build",
    "dgcnn_student",
    "dgcnn_teacher",
    "gat_student",
    "gat_teacher",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "gat": GAT,
    "gat_teacher": gat_teacher,
    "gat_student": gat_student,
    "gcn": GCN,
    "graphsage": GraphSAGE,
    "mlp": MLP,
    "dgcnn": DGCNN,
    "dgcnn_teacher": dgcnn_teacher,
    "dgcnn_student": dgcnn_student,
}


def build(name: str, in_dim: int, out_dim: int, **hyperparameters: Any) -> nn.Module:
    """A new network.

    Args:
        name: one of ``MODELS``.
        in_dim: features per node or, for the networks on point clouds, 3.
        out_dim: classes or labels.
        hyperparameters: the class's other arguments.

    Raises:
        TypeError, ValueError: unknown name or hyperparameter (the message lists the valid ones), or an invalid value.

    >>> from fastkd import models
    >>> models.build("gat", 50, 121, hidden=8, heads=[2, 2]).dims
    [16, 121]
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}{suggestion(name, MODELS)}")
    valid = list(inspect.signature(MODELS[name]).parameters)
    on_points = "in_dim" not in valid
    valid = [p for p in valid if p not in ("in_dim", "out_dim")]
    for key in hyperparameters:
        if key not in valid:
            raise ValueError(f"{name} has no hyperparameter {key!r}{suggestion(key, valid)}: it has {', '.join(valid)}")
    if not on_points:
        return MODELS[name](in_dim, out_dim, **hyperparameters)
    if in_dim != 3:
        raise ValueError(f"in_dim must be 3 for {name}, which is made for points [B, P, 3], got {in_dim}")
    return MODELS[name](out_dim, **hyperparameters)
