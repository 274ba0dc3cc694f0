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
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from .settings import Strict, choices, part_of, refusal, shown, unknown

__all__ = ["Choice", "Entry", "Key", "Maker", "Makers", "Named", "Nested", "arguments", "reference", "refuse"]

Problem = tuple[tuple[str, ...], str, object]
"""Where in a part of a configuration, what is wrong, the value."""


class Key(NamedTuple):
    """An argument."""

    type: Any
    default: Any
    text: str


@dataclass
class Maker:
    """What takes arguments.

    Attributes:
        keys: its arguments.
        make: called with the arguments to see whether they are valid; it must be quick and leave nothing behind.
            None: the arguments are without effect, and no part of the reference.
        nested: an argument that is a mapping, and what that holds.
        known: what :attr:`make` said of arguments.
    """

    keys: Mapping[str, Key]
    make: Callable[..., object] | None
    nested: Nested | None = None
    known: dict[str, str | None] = field(default_factory=dict)

    def problems(self, args: Mapping[str, Any], name: str, *at: str) -> list[Problem]:
        """What is wrong with arguments at a place in a configuration."""
        out: list[Problem] = []
        for key, value in args.items():
            if key not in self.keys:
                out.append((at, f"= {shown(args)}: {unknown(key, name, self.keys)}", args))
            elif not _fits(self.keys[key].type, value):
                out.append(((*at, key), f"must be {words(self.keys[key].type)}, got {shown(value)}", value))
        if not out and self.nested is not None:
            key, makers, of = self.nested
            if args.get(key) and (inner := of(args)) in makers:
                out = makers[inner].problems(args[key], f"{key} of {inner}", *at, key)
        if not out and (wrong := self._wrong(args)) is not None:
            out = [(at, f"= {shown(args)}: {wrong}", args)]
        return out

    def _wrong(self, args: Mapping[str, Any]) -> str | None:
        """What the maker itself says; asked once, since the rows of a plan repeat themselves."""
        if self.make is None:
            return None
        identity = json.dumps(args, sort_keys=True, default=repr)
        if identity not in self.known:
            wrong = None
            try:
                with torch.device("meta"):  # no memory, no random numbers
                    self.make(**args)
            except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
                wrong = str(error).partition("\n")[0] or type(error).__name__
            self.known[identity] = wrong
        return self.known[identity]


class Nested(NamedTuple):
    """An argument that is a mapping, whose keys depend on the arguments beside it."""

    key: str
    makers: Mapping[str, Maker]
    of: Callable[[Mapping[str, Any]], str]
    """Which of the makers it is, for the arguments; another text: none is known."""


Makers = Callable[[], Mapping[str, Maker]]


class Named(Strict):
    """A part of a configuration with `args` that depend on a name, and are kept as they were given: a record and a
    checkpoint hold no defaults of them."""

    makers: ClassVar[Makers]
    """What can be named."""


class Choice(Named):
    """A part of a configuration that has its name in itself."""

    name: str
    """What is chosen."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Its arguments."""

    modules: ClassVar[bool] = False
    """Whether a name may also be ``module:function``, with arguments that are not known."""

    @model_validator(mode="after")
    def _check(self) -> Choice:
        makers = type(self).makers()
        if self.name in makers:
            refuse(type(self), makers[self.name].problems(self.args, self.name, "args"))
        elif makers and not (self.modules and ":" in self.name):  # without makers, a package is missing
            hint = "; your own is module:function, such as nets:small" if self.modules else ""
            refuse(type(self), [(("name",), f"must be one of {choices(makers, self.name)}{hint}", self.name)])
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
        if not text.startswith("as for :class:"):
            out |= dict.fromkeys(names.split(", "), " ".join(text.split()))
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
    if origin in (dict, Mapping):
        return "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        return f"a list of {words(inner[0]).removeprefix('an ').removeprefix('a ')}s"
    return PLAIN[kind]


# In the words of YAML.
PLAIN = {int: "an integer", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}


# --- the reference ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A key of a configuration in its reference."""

    key: str
    type: str
    default: str
    text: str
    of: str = ""
    """The names to which an argument belongs, such as "gcn, mlp"; empty for keys that are always there."""


def reference(model: type[BaseModel], prefix: str = "") -> list[Entry]:
    """All keys of a configuration, in order; those of arguments once for all names that share them."""
    out: list[Entry] = []
    for name, info in model.model_fields.items():
        part, key, text = part_of(info.annotation), f"{prefix}{name}", " ".join((info.description or "").split())
        default = "required" if info.is_required() else _default(info.get_default(call_default_factory=True))
        if part is None:
            out.append(Entry(key, words(info.annotation), default, text))
        else:
            out.append(Entry(key, "a group of keys", default if info.is_required() else "", text))
            out += reference(part, f"{key}.<name>." if typing.get_origin(info.annotation) is dict else f"{key}.")
        if name == "args" and issubclass(model, Named):
            out += _of_makers(model.makers(), key)
    return out


def _of_makers(makers: Mapping[str, Maker], prefix: str, within: str = "") -> list[Entry]:
    names: dict[Entry, list[str]] = {}
    nested: list[Entry] = []
    for name, maker in makers.items():
        if maker.make is None:
            continue
        for key, (kind, default, text) in maker.keys.items():
            shared = Entry(f"{prefix}.{key}", words(kind), _default(default), text)
            names.setdefault(shared, []).append(within + name)
        if maker.nested is not None:
            nested += _of_makers(maker.nested.makers, f"{prefix}.{maker.nested.key}", f"{within}{name} with ")
    return [entry._replace(of=", ".join(of)) for entry, of in names.items()] + nested


def _default(value: Any) -> str:
    return "required" if value is inspect.Parameter.empty else json.dumps(value, default=str)
