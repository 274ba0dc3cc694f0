"""Records of runs: what was run, on what, and what it reached; read, and checked.

A run writes its record in full, as ``result.json``. A study adds its own type, a subclass of :class:`Record`, which is
found by the record's kind.
"""

from __future__ import annotations

import json
import math
import reprlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

__all__ = [
    "LOOKS",
    "DamagedError",
    "Part",
    "Record",
    "Scores",
    "UnknownSchemaError",
    "columns",
    "decode",
    "looks",
    "read",
]

SCHEMA = 1
REMEDY = "delete it and run the same command again, or put a copy in its place"
Json = dict[str, Any]


class DamagedError(ValueError):
    """What should be a record is none; the message says why."""


class UnknownSchemaError(ValueError):
    """A record of another version of fastkd: no damage, so never left out in silence."""


class Part(BaseModel):
    """A part of a record: all numbers are finite, and what is not declared is kept as it is."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Scores(Part):
    """Of a network, in percent, by part of the data."""

    test: float
    val: float


class Record(Part):
    """What all studies have in common."""

    KIND: ClassVar[str | None]
    """How records of this type call themselves; None: by no name, as those of distillation do."""
    TYPES: ClassVar[dict[str | None, type[Record]]] = {}

    schema_: int = Field(alias="schema")
    kind: str | None = None
    seed: int
    config: Json
    environment: Json = Field(default_factory=dict)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        Record.TYPES[cls.KIND] = cls

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Json) -> Json:
        """A record that is made here is of this version and of its type's kind."""
        return {"schema": SCHEMA, **({} if cls.KIND is None else {"kind": cls.KIND}), **content}

    @model_validator(mode="after")
    def _configured(self) -> Record:
        """What is taken from a configuration later is looked at here, so that later nothing is missing."""
        try:
            _ = self.group, self.label, self.title, self.plain
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"config is not one of a run ({type(error).__name__}: {error})") from None
        return self

    @property
    @abstractmethod
    def group(self) -> tuple[str, str]:
        """Of those that can be compared: data, and whatever else must be the same."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Of its row, where nothing else names it."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Of its section."""

    @property
    @abstractmethod
    def plain(self) -> bool:
        """Whether it is what the others are compared with; drawn in grey."""

    @property
    @abstractmethod
    def network(self) -> Scores:
        """The one that was sought: the student, or the smaller network."""

    @property
    def test(self) -> float:
        return self.network.test

    @property
    def val(self) -> float:
        return self.network.val

    def content(self) -> Json:
        """In full, as in result.json."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @abstractmethod
    def shortened(self, beside: Sequence[Record] = ()) -> Json:
        """What tables and pictures need, as it is kept with hundreds of others; `parse` takes it, too.

        Args:
            beside: records of the same row that are kept already.
        """

    @staticmethod
    def parse(content: Json, name: object = "this") -> Record:
        """The record of the content of a JSON file, of the type that its kind names.

        Args:
            name: of the file, for messages.

        Raises:
            DamagedError: something is missing, or of another type; says what.
            UnknownSchemaError: it was written by another version.
        """
        if "schema" not in content:
            raise DamagedError("no schema")
        if content["schema"] != SCHEMA:
            raise UnknownSchemaError(
                f"{name} is a record of schema {reprlib.repr(content['schema'])}, and this version of fastkd knows "
                f"{SCHEMA}: take the version that wrote it, or a newer one"
            )
        kind = content.get("kind")
        if (kind is not None and not isinstance(kind, str)) or kind not in Record.TYPES:
            raise DamagedError(f"kind = {reprlib.repr(kind)} is that of no study")
        try:
            return Record.TYPES[kind].model_validate(content)
        except ValidationError as error:
            raise DamagedError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"no {key}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key} = {reprlib.repr(first['input'])}: {message}" if key else message


def decode(text: bytes) -> Json:
    """The mapping that is written in a JSON file, or on a line of one.

    Raises:
        DamagedError: it is empty, cut, not UTF-8, no mapping or nested too deep.
    """
    if not text.strip():
        raise DamagedError("it is empty")
    try:
        content = json.loads(text.decode())
    except RecursionError:
        raise DamagedError("it is nested too deep") from None
    except ValueError as error:  # not UTF-8 and not JSON are values, too
        raise DamagedError(str(error)) from None
    if not isinstance(content, dict):
        raise DamagedError(f"a {type(content).__name__} instead of a mapping")
    return content


def read(file: Path) -> Record:
    """The record of a result.json.

    Raises:
        DamagedError: it is no whole record.
        UnknownSchemaError: it was written by another version.
    """
    try:
        text = file.read_bytes()
    except OSError as error:
        raise DamagedError(str(error)) from None
    return Record.parse(decode(text), file)


# --- mappings as columns -------------------------------------------------------------------------


def columns(looks: Sequence[Json], keys: Iterable[str]) -> Json:
    """A history as columns, with numbers of six digits: ``{"epoch": [0, 1], "terms": {"kd": [0.5, 0.25]}}``. Of a
    mapping, every key is a column; what a look does not have, and what is not finite, is null."""
    out: Json = {}
    for key in keys:
        values = [look.get(key) for look in looks]
        if any(isinstance(value, dict) for value in values):
            mappings = [value or {} for value in values]
            out[key] = columns(mappings, dict.fromkeys(name for mapping in mappings for name in mapping))
        elif any(value is not None for value in values):
            out[key] = [rounded(value) for value in values]
    return out


def looks(content: Any) -> Any:
    """The inverse of :func:`columns`; anything else is left as it is, for the checks to judge."""
    if not isinstance(content, dict):
        return content
    flat = {key: looks(column) if isinstance(column, dict) else column for key, column in content.items()}
    if not all(isinstance(column, list) for column in flat.values()):
        return content
    lengths = {len(column) for column in flat.values() if column}
    if len(lengths) > 1:
        raise ValueError(f"columns of different lengths: {', '.join(map(str, sorted(lengths)))}")
    return [
        {key: column[k] for key, column in flat.items() if column and column[k] is not None}
        for k in range(max(lengths, default=0))
    ]


LOOKS = BeforeValidator(looks)
"""Of a history: its looks one by one, or in columns."""


def rounded(value: Any) -> Any:
    """Six digits of a number, more than a picture shows; None where it is not finite."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
