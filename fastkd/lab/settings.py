"""Configurations in YAML: recipes of the package or files of the user, with values laid over them and errors that list
what is valid."""

from __future__ import annotations

import copy
import reprlib
import typing
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from .._text import slug, suggestion
from .reader import ConfigError, parse, parse_file

__all__ = [
    "ConfigError",
    "Configuration",
    "RowName",
    "Strict",
    "among",
    "choices",
    "folder_name",
    "merged",
    "parse",
    "parse_file",
    "read",
    "refusal",
    "shown",
    "unknown",
    "validated",
]

Model = TypeVar("Model", bound=BaseModel)
_Configuration = TypeVar("_Configuration", bound="Configuration")


class Strict(BaseModel):
    """A part of a configuration: unknown keys are errors, and so are numbers that are infinite or none."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """True and False are no numbers."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise refusal(f"must be neither true nor false, got {str(value).lower()}")
        return value


class Configuration(Strict):
    """All keys of a study; configurations that come with the package are its recipes."""

    RECIPES: ClassVar[Path]
    """Their folder."""

    @classmethod
    def recipes(cls) -> list[str]:
        """The names of the configurations that come with the package."""
        return _recipes(cls.RECIPES)

    @classmethod
    def load(
        cls: type[_Configuration], source: str | Path | dict[str, Any], overrides: Iterable[str] = ()
    ) -> _Configuration:
        """A configuration.

        Args:
            source: the name of a recipe, a path to a YAML file, or the content of one.
            overrides: ``"losses.lsp.weight=100"`` and the like; values are YAML.

        Raises:
            ConfigError: unknown recipe or key, or an invalid value; the message lists what is valid.
        """
        content = copy.deepcopy(source) if isinstance(source, dict) else read(cls.RECIPES, source)
        for override in overrides:
            _override(content, override)
        return validated(cls, content)


def validated(model: type[Model], content: dict[str, Any]) -> Model:
    """A part of a configuration of its content; errors as for :meth:`Configuration.load`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_explained(error, model)) from None


def _recipes(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read(folder: Path, source: str | Path) -> dict[str, Any]:
    """The content of a recipe in `folder`, or of a YAML file.

    Raises:
        ConfigError: there is none, or it is no mapping; or as for :func:`fastkd.lab.reader.parse_file`.
    """
    path = folder / f"{source}.yaml"
    if not path.exists():
        path = Path(source)
    if not path.is_file():
        raise ConfigError(
            f"no recipe or file {str(source)!r}: recipes are {', '.join(_recipes(folder))}"
            + suggestion(source, _recipes(folder))
        )
    content = parse_file(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def merged(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """content with changes laid over it, mapping by mapping. A None removes the key."""
    out = copy.deepcopy(content)
    for key, value in changes.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict):
            below = out.get(key)
            out[key] = merged(below if isinstance(below, dict) else {}, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


# --- kinds of text ------------------------------------------------------------------------------------


def among(valid: Collection[str]) -> AfterValidator:
    """The check of keys that are free but for being of the valid ones."""

    def check(value: str) -> str:
        if value not in valid:
            raise refusal(f"must be of {choices(valid, value)}")
        return value

    return AfterValidator(check)


def _row(value: str) -> str:
    if not slug(value) or len(value) > 200:
        raise refusal(f"must have a letter a-z or a digit, and at most 200 characters; got {shown(value)}")
    return value


RowName = Annotated[str, AfterValidator(_row)]
"""What becomes the name of a folder by :func:`fastkd._text.slug`."""


def folder_name(value: str, what: str) -> str:
    """What becomes the name of a file or folder as it is.

    Raises:
        ConfigError: it cannot; the message begins with `what`.
    """
    if not value or value[0] in ". " or len(value) > 100 or not all(c.isalnum() or c in "_-. +,=()" for c in value):
        raise ConfigError(
            f"{what} must be the name of a folder: letters, digits, spaces and _ - . + , = ( ), at most 100 of them, "
            f"and neither a full stop nor a space first; got {shown(value)}"
        )
    return value


# --- what is wrong ------------------------------------------------------------------------------------


def refusal(message: str) -> PydanticCustomError:
    """An error of a validator: what is wrong, to be read after the key, such as "must be odd, got 2"."""
    return PydanticCustomError("refused", message)


def choices(valid: Collection[str], value: object) -> str:
    """What follows "must be one of" in a message: what is valid, the value, and what was meant."""
    return f"{', '.join(valid)}, got {shown(value)}{suggestion(value, valid)}"


def unknown(key: str, parent: str, valid: Collection[str]) -> str:
    """The message for a key that is none of the valid ones."""
    meant, of = suggestion(key.rpartition(".")[2], valid), f" of {parent}" if parent else ""
    return f"unknown key {key!r}{meant}: valid keys{of} are {', '.join(valid) or 'none'}"


def shown(value: object) -> str:
    """A value in a message, which must stay one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxdict = short.maxlist = 10
    text = short.repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _explained(error: ValidationError, model: type[BaseModel]) -> str:
    """One line: every key that is wrong, its value and what is valid."""
    out = []
    for e in error.errors():
        loc = [str(part) for part in e["loc"]]
        if loc[-1:] == ["[key]"]:  # what is wrong with a key is said of the mapping
            del loc[-2:]
        key, value = ".".join(loc), e["input"]
        match e["type"]:
            case "refused":
                out.append(f"{key} {e['msg']}")
            case "extra_forbidden":
                out.append(unknown(key, ".".join(loc[:-1]), _keys(model, loc[:-1])))
            case "missing":
                out.append(f"missing key {key!r}")
            case "literal_error":
                valid = [word.strip("'") for word in e["ctx"]["expected"].replace(" or ", ", ").split(", ")]
                out.append(f"{key} must be one of {choices(valid, value)}")
            case _:
                out.append(f"{key} = {shown(value)}: {e['msg']}")
    return "; ".join(out)


def _keys(model: type[BaseModel], loc: list[str]) -> list[str]:
    """The valid keys of the model at a place inside another."""
    kind: Any = model
    for part in loc:  # in a dictionary, it is a name
        kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else kind.model_fields[part].annotation
    return list(kind.model_fields)


def part_of(kind: Any) -> type[BaseModel] | None:
    """The model in an annotation, or of the values of a dictionary; None: there is none."""
    if typing.get_origin(kind) is dict:
        kind = typing.get_args(kind)[1]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"an override must be KEY=VALUE, such as losses.lsp.weight=100, got {shown(override)}")
    *parents, last = key.strip().split(".")
    at = content
    for part in parents:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise ConfigError(f"{shown(override)}: {shown(part)} is a value, not a group of keys")
    at[last] = parse(value, f"the value of {shown(override)}")
