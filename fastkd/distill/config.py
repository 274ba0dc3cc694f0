"""What a run of distillation is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..lab import settings
from ..lab.settings import ConfigError, Strict

__all__ = ["ConfigError", "LossConfig", "ModelConfig", "RunConfig", "TrainConfig", "load_config", "recipes"]

RECIPES = Path(__file__).parent / "recipes"


class ModelConfig(Strict):
    name: str
    """One of ``fastkd.models.MODELS``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The model's own arguments."""


class TrainConfig(Strict):
    epochs: int = Field(default=200, ge=1)
    lr: float = Field(default=0.01, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the learning rate, over all epochs; cosine ends at 0."""
    eval_every: int = Field(default=1, ge=1)
    """Epochs between looks at the validation nodes."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many epochs without a better validation score; None: never."""
    batch_size: int | None = Field(default=None, ge=1)
    """Graphs, or shapes, per batch; None: all graphs at once, or 32 shapes."""
    neighbors: list[int] | None = None
    """Neighbours sampled per layer (PyG's NeighborLoader, batch_size seed nodes); None: whole graphs."""
    points: int | None = Field(default=None, ge=8)
    """Of every shape: a random choice of so many in training, the first ones otherwise; None: all."""
    augment: bool = True
    """Of shapes: random scale and translation."""
    amp: bool = False
    """bfloat16 autocast of the networks; the losses stay in float32."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""
    save_every: float = Field(default=10.0, ge=0)
    """Seconds between checkpoints; 0: after every epoch."""


class LossConfig(Strict):
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    student_layer: str | None = None
    """Module name at which the student's features are taken; None for losses of logits."""
    teacher_layer: str | None = None
    start: int = Field(default=0, ge=0)
    """First epoch in which it counts."""
    stop: int | None = Field(default=None, ge=1)
    """First epoch in which it does not count any more."""
    ramp: int = Field(default=0, ge=0)
    """Epochs, from start on, over which the weight grows linearly from 0."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The loss's own arguments (``fastkd.distill.losses``)."""


class NetworkConfig(Strict):
    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)


class RunConfig(Strict):
    data: str
    """One of ``fastkd.data.names()``."""
    teacher: NetworkConfig
    student: NetworkConfig
    task_weight: float = Field(default=1.0, ge=0)
    """Of the labels' own loss."""
    losses: dict[str, LossConfig] = Field(default_factory=dict)
    """By name, one of ``fastkd.distill.losses.LOSSES``."""
    teacher_seed: int = 0


def recipes() -> list[str]:
    """The configurations that come with the package."""
    return settings.recipes(RECIPES)


def load_config(source: str | Path | dict, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A run's configuration; arguments and errors as for :func:`fastkd.lab.settings.load`."""
    return settings.load(RunConfig, RECIPES, source, overrides)
