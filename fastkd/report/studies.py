"""What the report knows of each study: its table, what its numbers say, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..compress import tables as of_compression
from ..compress.record import CompressRecord
from ..distill import tables as of_distillation
from ..distill.record import DistillRecord
from ..lab.record import Record
from ..lab.rows import Section
from ..lab.table import Table
from . import compression, distillation
from .plots import Drawing, Style

__all__ = ["Study", "study_of"]


class Study(NamedTuple):
    summary: Callable[[Section[Any]], str]
    table: Callable[[Section[Any]], Table]
    pictures: Callable[[Section[Any], dict[str, Style]], Iterator[Drawing]]
    """All for which the section has data."""


STUDIES: dict[type[Record], Study] = {
    DistillRecord: Study(of_distillation.summary, of_distillation.report, distillation.pictures),
    CompressRecord: Study(of_compression.summary, of_compression.report, compression.pictures),
}


def study_of(section: Section[Any]) -> Study:
    return STUDIES[type(section.records[0])]
