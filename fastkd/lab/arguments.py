"""Arguments of what a configuration names: a network, a loss, an algorithm.

Each is a function or class, and its signature and docstring are the one list of its arguments: their types, defaults
and meaning. Values beyond the types are checked by calling it, so that its own errors are the configuration's.
:func:`reference` lists all keys of a configuration.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from .._text import suggestion
from .settings import Strict, part_of, refusal, shown, unknown

__all__ = ["Choice", "Entry", "Key", "Maker", "Named", "Nested", "arguments", "reference", "refuse"]

REQUIRED = inspect.Parameter.empty
Problem = tuple[tuple[str, ...], str, object]
"""Where in a part of a configuration, what is wrong, the value."""


class Key(NamedTuple):
    """An argument."""

    type: Any
    default: Any
    text: str


class Entry(NamedTuple):
    """A key of a configuration in its reference."""

    key: str
    type: str
    default: str
    text: str
    of: str = ""
    """The names to which an argument belongs, such as "gcn, mlp"; empty for keys that are always there."""


@dataclass
class Maker:
    """What takes arguments.

    Attributes:
        keys: its arguments.
        make: called with the arguments to see whether they are valid; it must be quick and leave nothing behind.
            None: every value of the right type is.
        nested: arguments that are mappings, and what these hold.
        ignored: the arguments are without effect, and no part of the reference.
        known: what :attr:`make` said of arguments.
    """

    keys: Mapping[str, Key]
    make: Callable[..., object] | None = None
    nested: Mapping[str, Nested] = field(default_factory=dict)
    ignored: bool = False
    known: dict[str, str | None] = field(default_factory=dict)

    def problems(self, args: Mapping[str, Any], name: str, *at: str) -> list[Problem]:
        """What is wrong with arguments at a place in a configuration."""
        out: list[Problem] = []
        for key, value in args.items():
            if key not in self.keys:
                out.append((at, f"= {shown(args)}: {unknown(key, name, self.keys)}", args))
            elif not _fits(self.keys[key].type, value):
                out.append(((*at, key), f"must be {words(self.keys[key].type)}, got {shown(value)}", value))
        if out:
            return out
        for key, nested in self.nested.items():
            if args.get(key):
                inner = nested.of(args)
                if inner in nested.makers:
                    out += nested.makers[inner].problems(args[key], f"{key} of {inner}", *at, key)
        if not out and (wrong := self._wrong(args)) is not None:
            out.append((at, f"= {shown(args)}: {wrong}", args))
        return out

    def _wrong(self, args: Mapping[str, Any]) -> str | None:
        """What the maker itself says; asked once, since the rows of a plan repeat themselves."""
        if self.make is None:
            return None
        identity = json.dumps(args, sort_keys=True, default=repr)
        if identity not in self.known:
            try:
                self.make(**args)
                self.known[identity] = None
            except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
                self.known[identity] = (str(error).splitlines() or [type(error).__name__])[0]
        return self.known[identity]


@dataclass
class Nested:
    """A mapping among arguments, whose keys depend on another argument.

    Attributes:
        makers: by name.
        of: the name, for the arguments beside the mapping.
    """

    makers: Mapping[str, Maker]
    of: Callable[[Mapping[str, Any]], str]


class Named(Strict):
    """A part of a configuration with `args` that depend on a name, and are kept as they were given: a record and a
    checkpoint hold no defaults of them."""

    @classmethod
    def makers(cls) -> Mapping[str, Maker]:
        """What can be named."""
        raise NotImplementedError


class Choice(Named):
    """A part of a configuration that has its name in itself."""

    name: str
    """What is chosen."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""

    @classmethod
    def also(cls, name: str) -> bool:
        """Whether a name that is none of the makers' is valid, with arguments that are not known."""
        return False

    HINT: typing.ClassVar[str] = ""
    """What an error adds about other names."""

    @model_validator(mode="after")
    def _check(self) -> Choice:
        if self.also(self.name):
            return self
        makers = self.makers()
        if self.name not in makers:
            valid = f"{', '.join(makers)}, got {self.name!r}{suggestion(self.name, makers)}"
            refuse(type(self), [(("name",), f"must be one of {valid}{self.HINT}", self.name)])
        refuse(type(self), makers[self.name].problems(self.args, self.name, "args"))
        return self


def refuse(model: type[BaseModel], problems: Sequence[Problem]) -> None:
    """Raises them, of a part of a configuration, if there are any."""
    if problems:
        details = [InitErrorDetails(type=refusal(text), loc=at, input=value) for at, text, value in problems]
        raise ValidationError.from_exception_data(model.__name__, details)


# --- signatures and docstrings ------------------------------------------------------------------------


def arguments(
    function: Callable[..., object], skip: Collection[str] = (), texts: Mapping[str, str] | None = None
) -> dict[str, Key]:
    """The arguments of a function, a class, or a partial of one.

    Args:
        skip: arguments that are no part of a configuration.
        texts: descriptions of arguments that the docstring does not describe.
    """
    inner = function.func if isinstance(function, functools.partial) else function
    hints, described = _hints(inner), {**(texts or {}), **_described(inner)}
    return {
        name: Key(hints[name], parameter.default, described.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in skip
    }


def _hints(function: Any) -> dict[str, Any]:
    return typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)


def _described(function: Any) -> dict[str, str]:
    """By argument, from "Args:" of its docstring, of the class that it returns, or of one to which it refers by "as for
    :class:`X`"."""
    out: dict[str, str] = {}
    doc = inspect.getdoc(function) or ""
    others = [vars(sys.modules[function.__module__]).get(name) for name in re.findall(r"as for :class:`(\w+)`", doc)]
    for other in [_hints(function).get("return"), *others]:
        if inspect.isclass(other) and other is not function:
            out |= _described(other)
    section = re.search(r"^Args:\n((?: +.*\n?|\n)*)", doc, re.M)
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M):
        for name in names.split(", "):
            if not text.startswith("as for :class:"):
                out[name] = " ".join(text.split())
    return out


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _fits(kind: Any, value: object) -> bool:
    try:
        _adapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def words(kind: Any) -> str:
    """A type in a message or a reference."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return words(inner[0])
    if origin is Literal:
        return " or ".join(repr(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words(k) for k in inner if k in PLAIN or typing.get_origin(k) is not None)
    if origin in (dict, Mapping) or kind is dict:
        return "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {words(inner[0]).removeprefix('an ').removeprefix('a ')}s"
    return PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


# In the words of YAML.
PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


# --- the reference ------------------------------------------------------------------------------------


def reference(model: type[BaseModel], prefix: str = "") -> list[Entry]:
    """All keys of a configuration, in order; those of arguments once for all names that share them."""
    out: list[Entry] = []
    for name, info in model.model_fields.items():
        kind, key, text = part_of(info.annotation), f"{prefix}{name}", " ".join((info.description or "").split())
        default = "required" if info.is_required() else _default(info.get_default(call_default_factory=True))
        if kind is None:
            out.append(Entry(key, words(info.annotation), default, text))
        else:
            out.append(Entry(key, "a group of keys", default if info.is_required() else "", text))
            named = typing.get_origin(kind) is dict
            below = part_of(typing.get_args(kind)[1]) if named else kind
            out += reference(below, f"{key}.<name>." if named else f"{key}.")
        if name == "args" and issubclass(model, Named):
            out += _of_makers(model.makers(), key)
    return out


def _of_makers(makers: Mapping[str, Maker], prefix: str, within: str = "") -> list[Entry]:
    names: dict[tuple[str, str, str, str], list[str]] = {}
    nested: list[Entry] = []
    for name, maker in makers.items():
        if maker.ignored:
            continue
        for key, (kind, default, text) in maker.keys.items():
            row = (f"{prefix}.{key}", words(kind), "required" if default is REQUIRED else _default(default), text)
            names.setdefault(row, []).append(within + name)
        for key, inner in maker.nested.items():
            nested += _of_makers(inner.makers, f"{prefix}.{key}", f"{within}{name} with ")
    return [Entry(*row, ", ".join(of)) for row, of in names.items()] + nested


def _default(value: Any) -> str:
    return json.dumps(value, default=str)
