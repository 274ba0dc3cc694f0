"""Networks to distil, on PyTorch Geometric's layers, and a registry of them by name.

=================  =======================================  ====================================
name               class                                    called as
=================  =======================================  ====================================
``gat``            :class:`GAT`                             ``model(x, adj)`` -> logits [N, out]
``gat_teacher``    :func:`gat_teacher`: 3 layers of 256     same
``gat_student``    :func:`gat_student`: 5 layers of 68      same
``gcn``            :class:`GCN`                             same
``graphsage``      :class:`GraphSAGE`                       same
``mlp``            :class:`MLP`                             same; adj is not looked at
``dgcnn``          :class:`DGCNN`                           ``model(points)`` -> logits [B, out]
``dgcnn_teacher``  :func:`dgcnn_teacher`: 1.81 M            same
``dgcnn_student``  :func:`dgcnn_student`: 0.09 M            same
=================  =======================================  ====================================

Every model has ``layers`` (a ModuleList), ``dims`` (what each of them outputs) and ``hidden``. A hook
on ``layers.i`` sees, in all models, a matrix [rows, dims[i]]: the layer's output with bias and
residual (in DGCNN after batch normalisation and the maximum over neighbours), before any later
normalisation, the activation and dropout. Rows are nodes, or the B*P points of the clouds in order.
The last layer of a graph network gives the logits.

Convolutional networks are in :mod:`fastkd.models.cnn`, with a registry of their own: ``CNNS`` and
:func:`build_cnn`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

try:
    import torch_geometric  # noqa: F401
except ImportError as error:
    raise ImportError('fastkd.models needs torch-geometric: pip install "fastkd[distill]"') from error

from .cnn import CNNS, build_cnn, load_weights
from .dgcnn import DGCNN, dgcnn_student, dgcnn_teacher
from .gnn import GAT, GCN, MLP, GraphSAGE, gat_student, gat_teacher

__all__ = ["CNNS", "DGCNN", "GAT", "GCN", "MLP", "MODELS", "GraphSAGE", "build", "build_cnn", "dgcnn_student",
           "dgcnn_teacher", "gat_student", "gat_teacher", "load_weights"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "gat": GAT, "gat_teacher": gat_teacher, "gat_student": gat_student,
    "gcn": GCN, "graphsage": GraphSAGE, "mlp": MLP,
    "dgcnn": DGCNN, "dgcnn_teacher": dgcnn_teacher, "dgcnn_student": dgcnn_student,
}


def build(name: str, in_dim: int, out_dim: int, **hyperparameters: Any) -> nn.Module:
    """A new network.

    Args:
        name: one of ``MODELS``.
        in_dim: features per node or, for the networks on point clouds, 3.
        out_dim: classes or labels.
        hyperparameters: the class's other arguments.

    Raises:
        ValueError: unknown name or hyperparameter (the message lists the valid ones), or an invalid value.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}{_suggestion(name, MODELS)}")
    valid = list(inspect.signature(MODELS[name]).parameters)
    on_points = "in_dim" not in valid
    valid = [p for p in valid if p not in ("in_dim", "out_dim")]
    for key in hyperparameters:
        if key not in valid:
            raise ValueError(f"{name} has no hyperparameter {key!r}{_suggestion(key, valid)}: it has "
                             f"{', '.join(valid)}")
    if not on_points:
        return MODELS[name](in_dim, out_dim, **hyperparameters)
    if in_dim != 3:
        raise ValueError(f"in_dim must be 3 for {name}, which is made for points [B, P, 3], got {in_dim}")
    return MODELS[name](out_dim, **hyperparameters)


def _suggestion(given: str, valid: Any) -> str:
    close = difflib.get_close_matches(str(given), valid, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
