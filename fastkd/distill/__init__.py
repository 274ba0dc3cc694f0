"""Distilling graph networks: losses, feature taps, the trainer, runs from configurations."""

try:
    import pydantic  # noqa: F401
    import safetensors  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    raise ImportError(f'fastkd.distill needs {error.name}: pip install "fastkd[distill]"') from error

from ..lab.tensorboard import TensorBoard
from ..runtime.checkpoint import CheckpointError
from ..runtime.stopping import Stopped
from ..runtime.world import RankLost, World
from .config import ConfigError, LossConfig, ModelConfig, NetworkConfig, RunConfig, TrainConfig, load_config
from .taps import Taps
from .trainer import Distiller, Result

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Distiller",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "RankLost",
    "Result",
    "RunConfig",
    "Stopped",
    "Taps",
    "TensorBoard",
    "TrainConfig",
    "World",
    "load_config",
]
