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
:func:`build_cnn`. They are there without PyTorch Geometric, which is imported with the first of the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .._text import installs
from .cnn import CNNS, build_cnn, load_weights

if TYPE_CHECKING:
    from .registry import (
        DGCNN,
        GAT,
        GCN,
        MLP,
        MODELS,
        GraphSAGE,
        build,
        dgcnn_student,
        dgcnn_teacher,
        gat_student,
        gat_teacher,
    )

__all__ = [
    "CNNS",
    "DGCNN",
    "GAT",
    "GCN",
    "MLP",
    "MODELS",
    "GraphSAGE",
    "build",
    "build_cnn",
    "dgcnn_student",
    "dgcnn_teacher",
    "gat_student",
    "gat_teacher",
    "load_weights",
]


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:  # type checkers would take any name for one of these

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import torch_geometric  # noqa: F401
        except ImportError as error:
            raise ImportError(f"fastkd.models.{name} needs torch-geometric: {installs('distill')}") from error
        return getattr(importlib.import_module(".registry", __name__), name)
