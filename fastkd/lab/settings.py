"""Configurations in YAML: recipes of the package or own files, with values laid over them and errors that list
what is valid."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .._text import suggestion

__all__ = ["ConfigError", "Strict", "load", "merged", "read", "recipes"]

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, its value and what is valid."""


class Strict(BaseModel):
    """A part of a configuration: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def recipes(folder: Path) -> list[str]:
    """Names of the configurations in a folder of the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(
    model: type[Model], folder: Path, source: str | Path | dict, overrides: list[str] | tuple[str, ...] = ()
) -> Model:
    """A run's configuration.

    Args:
        folder: of the recipes.
        source: the name of a recipe, a path to a YAML file, or the content of one.
        overrides: ``"losses.lsp.weight=100"`` and the like; values are YAML.

    Raises:
        ConfigError: unknown recipe or key, or an invalid value; the message lists what is valid.
    """
    content = _copy(source if isinstance(source, dict) else read(folder, source))
    for override in overrides:
        _override(content, override)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, e) for e in error.errors())) from None


def read(folder: Path, source: str | Path) -> dict[str, Any]:
    """The content of a recipe in `folder`, or of a YAML file.

    Raises:
        ConfigError: there is none, or it is no mapping.
    """
    path = folder / f"{source}.yaml"
    if not path.exists():
        path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"no recipe or file {str(source)!r}: recipes are {', '.join(recipes(folder))}"
            + suggestion(str(source), recipes(folder))
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


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


def _explain(model: type[BaseModel], error: Any) -> str:
    loc = [str(part) for part in error["loc"]]
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        valid = _keys(model, loc[:-1])
        return (
            f"unknown key {key!r}{suggestion(loc[-1], valid)}: valid keys"
            f"{' of ' + '.'.join(loc[:-1]) if loc[:-1] else ''} are {', '.join(valid)}"
        )
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
