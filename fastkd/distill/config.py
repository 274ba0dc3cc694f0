"""What a run of distillation is made of."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from .._text import suggestion
from ..kernels import Kernel
from ..lab import settings
from ..lab.arguments import Choice, Maker, Named, Nested, Problem, arguments, refuse
from ..lab.settings import ConfigError, Strict
from . import losses

__all__ = [
    "ConfigError",
    "LossConfig",
    "ModelConfig",
    "NetworkConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "recipes",
]

RECIPES = Path(__file__).parent / "recipes"
TEXTS = {"sigma": "finite, > 0, in units of the distance.", "scale": '"sum" or "mean" over the features.'}


@functools.cache
def _networks() -> dict[str, Maker]:
    """By name, of ``fastkd.models.MODELS``."""
    from ..models import MODELS, build  # with PyTorch Geometric

    def make(name: str) -> Callable[..., nn.Module]:
        def network(**args: Any) -> nn.Module:
            with torch.device("meta"):  # no memory, no random numbers
                return build(name, 3, 2, **args)

        return network

    return {name: Maker(arguments(f, ("in_dim", "out_dim")), make(name)) for name, f in MODELS.items()}


@functools.cache
def _losses() -> dict[str, Maker]:
    """By name, of ``fastkd.distill.losses.LOSSES``."""
    dims = {"student_dim": 1, "teacher_dim": 1}

    def make(name: str) -> Callable[..., nn.Module]:
        def loss(**args: Any) -> nn.Module:
            with torch.device("meta"):
                return losses.build(name, **dims, **args)

        return loss

    out = {name: Maker(arguments(loss, dims), make(name)) for name, loss in losses.LOSSES.items()}
    constants = {
        k.name: Maker(arguments(k, (), TEXTS)) for k in Kernel.__subclasses__() if k.__module__ == Kernel.__module__
    }
    out["lsp"].nested = {"kernel_args": Nested(constants, _kernel)}
    return out


def _kernel(args: Mapping[str, Any]) -> str:
    """The name of an LSP loss's kernel; empty where the loss itself cannot say."""
    try:
        return losses.LSP(kernel=args.get("kernel"), preset=args.get("preset")).criterion.kernel.name
    except (ValueError, TypeError):
        return ""


class ModelConfig(Choice):
    name: str
    """One of ``fastkd.models.MODELS``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The model's arguments."""

    @classmethod
    def makers(cls) -> Mapping[str, Maker]:
        return _networks()

    @classmethod
    def also(cls, name: str) -> bool:
        try:
            cls.makers()
            return False
        except ImportError:  # nothing can be trained, but the plan of what was trained be read
            return True


class TrainConfig(Strict):
    epochs: int = Field(default=200, ge=1)
    """Passes over the training part."""
    lr: float = Field(default=0.01, gt=0, le=1e20)
    """Learning rate."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Of the optimizer."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """torch's optimizer of that name."""
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
    neighbors: list[Annotated[int, Field(ge=-1)]] | None = None
    """Neighbours sampled per layer (PyG's NeighborLoader, batch_size seed nodes), -1: all; None: whole graphs."""
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


class LossConfig(Named):
    weight: float = Field(default=1.0, ge=0)
    """Of the loss beside the others; with 0 it is left out."""
    student_layer: str | None = None
    """Module name at which the student's features are taken; None for losses of logits."""
    teacher_layer: str | None = None
    """Module name at which the teacher's features are taken; None for losses of logits."""
    start: int = Field(default=0, ge=0)
    """First epoch in which it counts."""
    stop: int | None = Field(default=None, ge=1)
    """First epoch in which it does not count any more."""
    ramp: int = Field(default=0, ge=0)
    """Epochs, from start on, over which the weight grows linearly from 0."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The loss's arguments (``fastkd.distill.losses``)."""

    @classmethod
    def makers(cls) -> Mapping[str, Maker]:
        return _losses()


class NetworkConfig(Strict):
    model: ModelConfig
    """The network."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Its training."""


class RunConfig(Strict):
    data: str
    """One of ``fastkd.data.names()``."""
    teacher: NetworkConfig
    """What is distilled."""
    student: NetworkConfig
    """What it is distilled into."""
    task_weight: float = Field(default=1.0, ge=0)
    """Of the labels' loss."""
    losses: dict[str, LossConfig] = Field(default_factory=dict)
    """By name, one of ``fastkd.distill.losses.LOSSES``."""
    teacher_seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the teacher's initial weights and training."""

    @field_validator("losses")
    @classmethod
    def _of_known_losses(cls, value: dict[str, LossConfig]) -> dict[str, LossConfig]:
        makers, problems = LossConfig.makers(), list[Problem]()
        for name, loss in value.items():
            if name in makers:
                problems += makers[name].problems(loss.args, name, name, "args")
            else:
                valid = f"{', '.join(makers)}, got {settings.shown(name)}{suggestion(name, makers)}"
                problems.append(((), f"must be of {valid}", name))
        refuse(cls, problems)
        return value


def recipes() -> list[str]:
    """The configurations that come with the package."""
    return settings.recipes(RECIPES)


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A run's configuration; arguments and errors as for :func:`fastkd.lab.settings.load`."""
    return settings.load(RunConfig, RECIPES, source, overrides)
