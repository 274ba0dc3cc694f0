"""Distilling graph networks: losses, feature taps, the trainer, runs from configurations."""

from __future__ import annotations

import importlib
from typing import Any

from .._text import installs

try:
    import pydantic  # noqa: F401
    import safetensors  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError(f"fastkd.distill needs {error.name}: {installs('distill')}") from error

_PLACES = {
    "CheckpointError": "..runtime.checkpoint",
    "ConfigError": ".config",
    "Distiller": ".trainer",
    "LossConfig": ".config",
    "ModelConfig": ".config",
    "NetworkConfig": ".config",
    "RankLost": "..runtime.world",
    "Result": ".trainer",
    "RunConfig": ".config",
    "Stopped": "..runtime.stopping",
    "Taps": ".taps",
    "TensorBoard": "..lab.tensorboard",
    "TrainConfig": ".config",
    "World": "..runtime.world",
    "load_config": ".config",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Records and tables need neither the trainer nor PyG."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name], __name__), name)
