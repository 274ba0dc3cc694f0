"""The one reader of YAML: recipes, plans and the values of overrides.

It takes the part of YAML that a configuration needs, so that no file can hang it or mean something else than it shows:
numbers are YAML 1.2's (``1e-3`` is one, ``1:30`` and ``010`` are none), keys are text, and there are no anchors,
aliases and tags, no repeated keys and no dates. As values, ``yes``, ``no``, ``on`` and ``off`` mean true and false, as
in YAML 1.1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ConfigError", "parse", "parse_file"]

LARGEST = 1_000_000  # bytes of a file
DEEPEST = 30  # levels of nesting
INTEGER = r"[-+]?(?:0|[1-9][0-9_]{0,40}|0x[0-9a-fA-F]{1,16}|0o[0-7]{1,20})"  # one too long to be meant is text
FLOAT = r"""[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?
           |[-+]?[0-9]+[eE][-+]?[0-9]+
           |[-+]?\.(?:inf|Inf|INF)
           |\.(?:nan|NaN|NAN)"""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key, its value and what is valid."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _Refused(event, "anchors and aliases (&, *) are not allowed: write the value where it belongs")
        if event.tag is not None:
            raise _Refused(event, f"tags such as {event.tag!r} are not allowed")
        if self.depth == DEEPEST:
            raise _Refused(event, f"more than {DEEPEST} levels of nesting")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused(key, "a key must be a single word or text")
            if key.value in out:
                raise _Refused(key, f"the key {key.value!r} is there twice")
            out[key.value] = self.construct_object(value, deep=True)
        return out


class _Refused(Exception):
    """YAML, but no configuration."""

    def __init__(self, where: Any, problem: str) -> None:
        super().__init__(f"line {where.start_mark.line + 1}: {problem}")


# Which plain text is which type, by its first character: of YAML 1.1 only true, false and null are kept.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in kinds if tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null")]
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^{INTEGER}$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{FLOAT})$", re.X), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 0))
_Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))


def parse(text: str, where: str) -> Any:
    """The value of a text in YAML.

    Args:
        where: what the text is of, with which a message begins.

    Raises:
        ConfigError: the text is no YAML, or what this module does not take; one line, with the line of the text.
    """
    if len(text) > LARGEST:
        raise ConfigError(f"{where} must have at most {LARGEST:,} characters, got {len(text):,}")
    try:
        return yaml.load(text, _Loader)
    except _Refused as error:
        raise ConfigError(f"{where}, {error}") from None
    except yaml.error.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"{where} is not YAML{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML has no place for
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def parse_file(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: as for :func:`parse`; or the file is too large, or no text in UTF-8.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ConfigError(f"{path} must have at most {LARGEST:,} bytes")
    try:
        return parse(content.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not YAML: it is no text in UTF-8 ({error.reason} at byte {error.start})"
        ) from None
