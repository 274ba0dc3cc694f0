"""What a run of distillation is made of."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..kernels import Kernel
from ..lab.arguments import Choice, Maker, Named, Nested, arguments, refuse
from ..lab.settings import ConfigError, Configuration, Strict, among
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

TEXTS = {"sigma": "finite, > 0, in units of the distance.", "scale": '"sum" or "mean" over the features.'}


@functools.cache
def _networks() -> dict[str, Maker]:
    """By name, of ``fastkd.models.MODELS``."""
    from ..models import MODELS, build  # with PyTorch Geometric

    return {
        name: Maker(arguments(model, ("in_dim", "out_dim")), functools.partial(build, name, 3, 2))
        for name, model in MODELS.items()
    }


def _known_networks() -> Mapping[str, Maker]:
    try:
        return _networks()
    except ImportError:  # nothing can be trained, but the plan of what was trained be read
        return {}


@functools.cache
def _losses() -> dict[str, Maker]:
    """By name, of ``fastkd.distill.losses.LOSSES``."""
    dims = {"student_dim": 1, "teacher_dim": 1}
    out = {
        name: Maker(arguments(loss, dims), functools.partial(losses.build, name, **dims))
        for name, loss in losses.LOSSES.items()
    }
    kernels = [k for k in Kernel.__subclasses__() if k.__module__ == Kernel.__module__]
    constants = {kernel.name: Maker(arguments(kernel, (), TEXTS), kernel) for kernel in kernels}
    out["lsp"].nested = Nested("kernel_args", constants, _kernel)
    return out


def _kernel(args: Mapping[str, Any]) -> str:
    """The name of an LSP loss's kernel; empty where the loss itself cannot say."""
    try:
        return losses.LSP(kernel=args.get("kernel"), preset=args.get("preset")).criterion.kernel.name
    except (ValueError, TypeError):
        return ""


class ModelConfig(Choice):
    makers = staticmethod(_known_networks)

    name: str
    """One of ``fastkd.models.MODELS``."""


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
    makers = staticmethod(_losses)

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


class NetworkConfig(Strict):
    model: ModelConfig
    """The network."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Its training."""


LossName = Annotated[str, among(losses.LOSSES)]


class RunConfig(Configuration):
    RECIPES = Path(__file__).parent / "recipes"

    data: str
    """One of ``fastkd.data.names()``."""
    teacher: NetworkConfig
    """What is distilled."""
    student: NetworkConfig
    """What it is distilled into."""
    task_weight: float = Field(default=1.0, ge=0)
    """Of the labels' loss."""
    losses: dict[LossName, LossConfig] = Field(default_factory=dict)
    """By name, one of ``fastkd.distill.losses.LOSSES``."""
    teacher_seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the teacher's initial weights and training."""

    @field_validator("losses")
    @classmethod
    def _with_valid_arguments(cls, value: dict[str, LossConfig]) -> dict[str, LossConfig]:
        makers = _losses()
        refuse(cls, [p for name, loss in value.items() for p in makers[name].problems(loss.args, name, name, "args")])
        return value


load_config, recipes = RunConfig.load, RunConfig.recipes
