"""From a trained network to a smaller one that is measurably faster: search, fine-tuning, export, and the evidence."""

from __future__ import annotations

import importlib
from typing import Any

from .._text import installs

try:
    import pydantic  # noqa: F401
    import safetensors  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError(f"fastkd.compress needs {error.name}: {installs('compress')}") from error

_PLACES = {
    "CheckpointError": "..runtime.checkpoint",
    "CompressConfig": ".config",
    "ConfigError": "..lab.settings",
    "RankLost": "..runtime.world",
    "Stopped": "..runtime.stopping",
    "World": "..runtime.world",
    "compress": ".run",
    "load_config": ".config",
    "recipes": ".config",
}

__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Records and tables need neither networks nor data."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name], __name__), name)
