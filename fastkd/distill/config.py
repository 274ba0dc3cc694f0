"""What a run is made of: strict models of the YAML files, with errors that list what is valid."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["ConfigError", "LossConfig", "ModelConfig", "RunConfig", "TrainConfig", "load_config", "recipes"]

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, its value and what is valid."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelConfig(_Strict):
    name: str
    """One of ``fastkd.models.MODELS``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """The model's own arguments."""


class TrainConfig(_Strict):
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


class LossConfig(_Strict):
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


class NetworkConfig(_Strict):
    model: ModelConfig
    train: TrainConfig = Field(default_factory=TrainConfig)


class RunConfig(_Strict):
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
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_config(source: str | Path | dict, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """A run's configuration.

    Args:
        source: the name of a recipe, a path to a YAML file, or the content of one.
        overrides: ``"losses.lsp.weight=100"`` and the like; values are YAML.

    Raises:
        ConfigError: unknown recipe or key, or an invalid value; the message lists what is valid.
    """
    if isinstance(source, dict):
        content: Any = source
    else:
        path = RECIPES / f"{source}.yaml"
        if not path.exists():
            path = Path(source)
        if not path.exists():
            raise ConfigError(f"no recipe or file {str(source)!r}: recipes are {', '.join(recipes())}"
                              + _suggestion(str(source), recipes()))
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} must hold a mapping, got {type(content).__name__}")
    content = _copy(content)
    for override in overrides:
        _override(content, override)
    return _validated(RunConfig, content)


def merged(content: dict, changes: dict) -> dict:
    """content with changes laid over it, mapping by mapping. A None removes the key."""
    out = _copy(content)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = _copy(value)
    return out


def _copy(x: Any) -> Any:
    return {k: _copy(v) for k, v in x.items()} if isinstance(x, dict) else x


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"an override must be KEY=VALUE, such as losses.lsp.weight=100, got {override!r}")
    *parents, last = key.strip().split(".")
    at = content
    for part in parents:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{override!r}: {part!r} is a value, not a group of keys")
    try:
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not YAML: {error}") from None


def _validated(model: type[BaseModel], content: dict) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, e) for e in error.errors())) from None


def _explain(model: type[BaseModel], error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        valid = _keys(model, loc[:-1])
        return (f"unknown key {key!r}{_suggestion(loc[-1], valid)}: valid keys"
                f"{' of ' + '.'.join(loc[:-1]) if loc[:-1] else ''} are {', '.join(valid)}")
    if error["type"] == "missing":
        return f"missing key {key!r}"
    return f"{key} = {error['input']!r}: {error['msg']}"


def _keys(model: type[BaseModel], loc: list[str]) -> list[str]:
    """The valid keys of the model at a place inside another."""
    for part in loc:
        kinds = [model.model_fields[part].annotation] if part in model.model_fields else []
        found = None
        while kinds and found is None:
            kind = kinds.pop()
            origin = typing.get_origin(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found = kind
            elif origin is dict:  # its own keys are free: a loss's name
                inner = typing.get_args(kind)[1]
                return _keys_of(inner)
            elif origin in (typing.Union, types.UnionType):
                kinds.extend(typing.get_args(kind))
        if found is None:
            return []
        model = found
    return _keys_of(model)


def _keys_of(kind: Any) -> list[str]:
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _suggestion(word: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(word, valid, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
