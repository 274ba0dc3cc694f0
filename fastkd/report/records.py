"""Saved results below a folder, read into sections of rows of records."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from .._text import slug
from ..lab import record as lab
from ..lab import settings
from ..lab.cells import Cells, experiments, left_out
from ..lab.record import DamagedError, Record
from ..lab.rows import Row, Section
from . import studies  # noqa: F401  # so that the types of all records are known

__all__ = ["Saved", "read"]

D = TypeVar("D")


@dataclass
class Saved:
    name: str
    sections: list[Section[Any]]
    notices: list[str] = field(default_factory=list)
    """What the reader must know: files left out, cells not yet run."""


def read(directory: str | Path) -> Saved:
    """All results below a folder; see :func:`fastkd.report.write`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    saved = Saved(directory.resolve().name, [])
    if names := experiments(directory / "cells"):
        _from_cells(saved, directory, names)
    else:
        _from_runs(saved, directory)
    if not saved.sections:
        raise ValueError(
            f"{directory} holds no results: looked for result.json at any depth, which fastkd distill "
            "and fastkd compress write, and for cells/<experiment>.jsonl, which fastkd grid writes (of older versions: "
            f"cells/<experiment>/<row>/<seed>.json); {len(saved.notices)} records could not be read"
        )
    return saved


def _from_runs(saved: Saved, directory: Path) -> None:
    """A section per data set and reference, a row per folder above seed<k>."""
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for file in sorted(directory.rglob("result.json")):
        try:
            record = lab.read(file)
        except DamagedError as error:
            saved.notices.append(left_out(file.relative_to(directory).as_posix(), error))
            warnings.warn(left_out(f"{file}", error), stacklevel=4)
            continue
        parts = list(file.relative_to(directory).parent.parts)
        if parts and re.fullmatch(r"(seed)?\d+", parts[-1]):
            parts.pop()
        groups.setdefault(record.group, {}).setdefault("/".join(parts) or record.label, []).append(record)
    names: dict[str, int] = {}
    for (data, _), rows in sorted(groups.items(), key=lambda item: item[0]):
        names[data] = names.get(data, 0) + 1
        name = slug(data) + (f"-{names[data]}" if names[data] > 1 else "")
        title = next(iter(rows.values()))[0].title
        above = zip(*(label.split("/")[:-1] for label in rows), strict=False)
        shared = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, above)))  # folders of all rows
        split = [row for label, of in rows.items() for row in _rows("/".join(label.split("/")[shared:]), of, saved)]
        saved.sections.append(Section(name, title, sorted(split, key=_by_name)))


def _from_cells(saved: Saved, directory: Path, names: Sequence[str]) -> None:
    """A section per experiment; titles, names and order of rows from the plan, if it lies there."""
    plans = _plans(directory, saved)
    for name in (*(name for name in plans if name in names), *(name for name in names if name not in plans)):
        plan, cells = plans.get(name, {}), Cells(directory / "cells", name)
        found = cells.rows()
        saved.notices += [notice.removeprefix(f"{directory}/") for notice in cells.notices]
        if not found:
            continue
        kind = type(next(iter(found.values()))[0])
        if any(type(record) is not kind for of in found.values() for record in of):
            saved.notices.append(f"{name}: its records are of two studies; those of the second are left out.")
            found = {row: [record for record in of if type(record) is kind] for row, of in found.items()}
        rows_of_plan: dict[Any, Any] = _get(plan, "rows", {})
        labels = {slug(str(label)): str(label) for label in rows_of_plan}
        rows: list[Row[Record]] = []
        for row in (*labels, *sorted(set(found) - set(labels))):
            label = labels.get(row, cells.name(row))
            split = _rows(label, found.get(row, []), saved) or [Row[Record](label, [])]
            rows += [replace(r, planned=_get(plan, "seeds", 3)) for r in split] if row in labels else split
        if not plan:
            rows.sort(key=_by_name)
        saved.sections.append(Section(name, _get(plan, "title", "") or name, rows, _get(plan, "note", "").strip()))
    if missing := [name for name in plans if name not in names]:
        saved.notices.append(f"Not yet run: {', '.join(missing)}.")


def _by_name(row: Row[Record]) -> tuple[bool, list[str | int]]:
    """The plain one first; numbers in names by their values."""
    plain = bool(row.records) and row.records[0].plain
    return not plain, [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", row.label)]


def _rows(label: str, records: list[Record], saved: Saved) -> list[Row[Record]]:
    """One, or several if the records differ in their configurations: no mean is taken over those."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(record.config, sort_keys=True), []).append(record)
    if len(groups) > 1:
        saved.notices.append(f"Row {label}: its runs have {len(groups)} configurations, each shown as a row.")
    for group in groups.values():
        if len({record.seed for record in group}) < len(group):
            saved.notices.append(f"Row {label}: a seed is there more than once, so its interval is too narrow.")
    return [
        Row(label if len(groups) == 1 else f"{label} (configuration {i})", sorted(group, key=lambda r: r.seed))
        for i, group in enumerate(groups.values(), 1)
    ]


def _plans(directory: Path, saved: Saved) -> dict[str, dict[str, Any]]:
    """The experiments of all plan files beside cells/, by priority."""
    out: dict[str, dict[str, Any]] = {}
    for file in sorted(directory.glob("*.yaml")):
        try:
            content = settings.read(directory, file)
        except (OSError, settings.ConfigError) as error:
            saved.notices.append(f"{file.name} is no plan, so titles and names of rows in it are not known ({error}).")
            continue
        found: dict[Any, Any] = _get(content, "experiments", {})
        out |= {str(name): plan for name, plan in found.items() if isinstance(plan, dict)}
    return dict(sorted(out.items(), key=lambda item: _get(item[1], "priority", 1)))


def _get(content: Any, key: str, default: D) -> D:
    """Of a plan, which nobody has checked: the default where there is nothing of its type."""
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, type(default)) else default
