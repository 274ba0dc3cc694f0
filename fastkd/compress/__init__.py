"""From a trained network to a smaller one that is measurably faster: search, fine-tuning, export, and the evidence."""

try:
    import pydantic  # noqa: F401
    import safetensors  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError(f'fastkd.compress needs {error.name}: pip install "fastkd[compress]"') from error

from ..lab.settings import ConfigError
from ..runtime.checkpoint import CheckpointError
from ..runtime.stopping import Stopped
from ..runtime.world import RankLost, World
from .config import CompressConfig, load_config, recipes
from .run import compress

__all__ = [
    "CheckpointError",
    "CompressConfig",
    "ConfigError",
    "RankLost",
    "Stopped",
    "World",
    "compress",
    "load_config",
    "recipes",
]
