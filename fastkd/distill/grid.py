"""A table of experiments: rows times seeds, the missing cells run in order, finished ones never touched.

A plan is a YAML file::

    experiments:
      coauthor:
        title: coauthor_cs, GCN to GCN
        recipe: coauthor_cs          # of the package, or a path
        seeds: 5
        priority: 1                  # lower runs first
        rows:                        # row -> what differs from the recipe
          student alone: {losses: {lsp: null}}
          lsp: {}

Beside it lie ``cells/<experiment>/<row>/<seed>.json``, one record each, and RESULTS.md, which is made of
them alone. Trained teachers are kept in the work directory, which needs no keeping.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import checkpoint
from ..data import load as load_data
from ..settings import ConfigError, merged
from . import runs
from .config import RECIPES, RunConfig, load_config

__all__ = ["Cell", "Plan", "interval", "run", "write_table"]


@dataclass(frozen=True)
class Cell:
    experiment: str
    row: str
    seed: int
    file: Path
    config: RunConfig

    @property
    def done(self) -> bool:
        return self.file.exists()

    def record(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    seeds: int
    priority: int
    rows: dict[str, RunConfig]
    note: str


class Plan:
    """A plan file, and its cells.

    Raises:
        ConfigError: the file is no plan, or a row is no configuration; says where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise ConfigError(f"no plan {self.path}")
        content = yaml.safe_load(self.path.read_text())
        if not isinstance(content, dict) or not isinstance(content.get("experiments"), dict):
            raise ConfigError(f"{self.path} must hold a mapping 'experiments'")
        self.experiments = [self._experiment(name, e) for name, e in content["experiments"].items()]

    def _experiment(self, name: str, content: dict[str, Any]) -> Experiment:
        valid = {"title", "recipe", "seeds", "priority", "rows", "base", "note"}
        unknown = set(content) - valid
        if unknown:
            raise ConfigError(f"{self.path}: {name}: unknown keys {', '.join(sorted(unknown))}; valid are "
                              f"{', '.join(sorted(valid))}")
        recipe = str(content["recipe"])
        path = RECIPES / f"{recipe}.yaml"
        if not path.exists():
            path = self.path.parent / recipe
        if not path.exists():
            raise ConfigError(f"{self.path}: {name}: no recipe {recipe!r}")
        base = merged(yaml.safe_load(path.read_text()), content.get("base") or {})
        rows = {}
        for row, changes in content["rows"].items():
            try:
                rows[row] = load_config(merged(base, changes or {}))
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {name}, row {row!r}: {error}") from None
        return Experiment(name, content.get("title", name), int(content.get("seeds", 3)),
                          int(content.get("priority", 1)), rows, content.get("note", ""))

    def cells(self) -> Iterator[Cell]:
        """By priority; within one, every row's first seed before any row's second."""
        for experiment in sorted(self.experiments, key=lambda e: e.priority):
            for seed in range(experiment.seeds):
                for row, config in experiment.rows.items():
                    yield self._cell(experiment, row, seed, config)

    def _cell(self, experiment: Experiment, row: str, seed: int, config: RunConfig) -> Cell:
        file = self.path.parent / "cells" / experiment.name / _slug(row) / f"{seed}.json"
        return Cell(experiment.name, row, seed, file, config)

    def of(self, experiment: Experiment, row: str) -> list[Cell]:
        """Every finished cell of a row, also of seeds beyond the plan's."""
        folder = self.path.parent / "cells" / experiment.name / _slug(row)
        seeds = sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit())
        return [self._cell(experiment, row, seed, experiment.rows[row]) for seed in seeds]


def _slug(row: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")


def run(plan: Plan, work: Path, progress: Callable[[Cell, str, int, int, dict[str, Any]], None] | None = None,
        only: str | None = None, limit: int | None = None) -> int:
    """Runs the missing cells; returns how many. Can be stopped and called again at any moment.

    Args:
        work: for checkpoints and teachers.
        only: an experiment's name; None: all.
        limit: of cells.
    """
    if only is not None and only not in [e.name for e in plan.experiments]:
        raise ConfigError(f"no experiment {only!r}: there are {', '.join(e.name for e in plan.experiments)}")
    tasks: dict[str, Any] = {}
    count = 0
    for cell in plan.cells():
        if cell.done or (only is not None and cell.experiment != only):
            continue
        if limit is not None and count >= limit:
            break
        if cell.config.data not in tasks:
            tasks = {cell.config.data: load_data(cell.config.data)}  # one at a time is kept
        directory = work / cell.experiment / _slug(cell.row) / str(cell.seed)
        told = None if progress is None else (lambda *a, cell=cell: progress(cell, *a))
        record = runs.distil(cell.config, cell.seed, directory, task=tasks[cell.config.data], progress=told,
                             teachers=work / "teachers")
        checkpoint.write_json(cell.file, record)
        write_table(plan)
        count += 1
    return count


def interval(values: list[float]) -> float | None:
    """Half the 95 % interval of the mean, by Student's t; None for a single value."""
    n = len(values)
    if n < 2:
        return None
    t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
    quantile = t[n - 2] if n - 2 < len(t) else 1.96 + 2.5 / (n - 1)
    return quantile * statistics.stdev(values) / math.sqrt(n)


def mean_interval(values: list[float]) -> str:
    half = interval(values)
    return f"{statistics.mean(values):.2f}" + ("" if half is None else f" ± {half:.2f}")


def write_table(plan: Plan) -> Path:
    """RESULTS.md beside the plan, from the cells alone."""
    lines = ["# Results", "", "Made by `fastkd grid` from the records in `cells/`. Scores are in percent on the test "
             "part, mean ± half the 95 % interval (Student's t) over seeds; the epoch is chosen on the validation "
             "part, and so was everything that was tuned. A cell that has not been run is shown as such.", ""]
    for experiment in sorted(plan.experiments, key=lambda e: e.priority):
        lines += [f"## {experiment.title}", ""]
        if experiment.note:
            lines += [experiment.note.strip(), ""]
        cells = {row: plan.of(experiment, row) for row in experiment.rows}
        teacher = next((c.record()["teacher"] for found in cells.values() for c in found), None)
        lines += ["| | test, % | validation, % | seeds | parameters | seconds |", "|---|---:|---:|---:|---:|---:|"]
        if teacher is not None:
            lines.append(f"| teacher | {teacher['test']:.2f} | {teacher['val']:.2f} | 1 | {teacher['parameters']:,} | "
                         f"{teacher['seconds']:.0f} |")
        for row, found in cells.items():
            if not found:
                lines.append(f"| {row} | not yet run | | 0 of {experiment.seeds} | | |")
                continue
            students = [c.record()["student"] for c in found]
            test, val = (mean_interval([s[key] for s in students]) for key in ("test", "val"))
            lines.append(
                f"| {row} | {test} | {val} | "
                f"{len(students)} of {max(experiment.seeds, len(students))} | {students[0]['parameters']:,} | "
                f"{statistics.mean(s['seconds'] for s in students):.0f} |")
        lines.append("")
    path = plan.path.parent / "RESULTS.md"
    checkpoint.replace(path, lambda p: p.write_text("\n".join(lines)))
    return path
