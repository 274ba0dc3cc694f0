"""A table of experiments: rows times seeds, the missing cells run in order, finished ones never touched.

A plan is a YAML file::

    experiments:
      coauthor:
        title: coauthor_cs, GCN to GCN
        recipe: coauthor_cs          # of fastkd distill, or a path; `compress:` instead for one of fastkd compress
        seeds: 5
        priority: 1                  # lower runs first
        base: {}                     # what differs from the recipe in all rows
        rows:                        # row -> what differs in this one
          student alone: {losses: {lsp: null}}
          lsp: {}

Beside it lie ``cells/<experiment>.jsonl``, the records (:mod:`fastkd.lab.cells`), and RESULTS.md, which is made of
them alone. Networks and searches that several cells need are kept in the work directory, which needs no keeping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from .._text import slug
from ..runtime import checkpoint
from ..runtime.world import usable
from . import settings
from .cells import Cells
from .record import Record, Row, Section
from .settings import ConfigError, Strict, merged

__all__ = ["Cell", "Experiment", "Plan", "measure", "run", "tables", "write_table"]

PAUSE, LONGEST = 1.0, 60.0  # seconds, until what another process was at work on is looked at again
WAITS = "waits for another process"
Kind = Literal["recipe", "compress"]
"""The key of a plan that names the recipe: of distillation, or of compression."""
KINDS: tuple[Kind, ...] = ("recipe", "compress")


@dataclass(frozen=True)
class Cell:
    experiment: Experiment
    row: str
    seed: int
    store: Cells
    config: Any

    @property
    def done(self) -> bool:
        return self.store.find(self.row, self.seed) is not None


class _Content(Strict):
    """An experiment as it is written."""

    title: str | None = None
    recipe: str | None = None
    compress: str | None = None
    seeds: int = Field(default=3, ge=1)
    priority: int = 1
    base: dict[str, Any] | None = None
    rows: dict[str, dict[str, Any] | None]
    note: str = ""


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    kind: Kind
    seeds: int
    priority: int
    rows: dict[str, Any]
    note: str
    store: Cells


class Plan:
    """A plan file, and its cells.

    Raises:
        ConfigError: the file is no plan, or a row is no configuration; says where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"no plan {self.path}")
        content = settings.read(self.path.parent, self.path)
        if not isinstance(content.get("experiments"), dict):
            raise ConfigError(f"{self.path} must hold a mapping 'experiments'")
        self.experiments = [self._experiment(str(name), e) for name, e in content["experiments"].items()]

    def _experiment(self, name: str, content: Any) -> Experiment:
        where = f"{self.path}: {name}"
        try:
            if not isinstance(content, dict):
                raise ConfigError(f"an experiment must be a mapping, got {type(content).__name__}")
            own = settings.load(_Content, self.path.parent, content)
            if (own.recipe is None) == (own.compress is None):
                raise ConfigError(
                    "one of recipe (of fastkd distill) and compress (of fastkd compress) is needed, got "
                    + ("neither" if own.recipe is None else "both")
                )
            kind: Kind = "compress" if own.recipe is None else "recipe"
            store = Cells(self.path.parent / "cells", name)
            config = _config(kind)
            recipe = str(own.compress if own.recipe is None else own.recipe)
            beside = self.path.parent / recipe
            base = merged(settings.read(config.RECIPES, beside if beside.is_file() else recipe), own.base or {})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        rows: dict[str, Any] = {}
        folders: dict[str, str] = {}
        for row, changes in own.rows.items():
            other = folders.setdefault(slug(row), row)
            if other != row:  # one would be shown with the records of the other
                raise ConfigError(
                    f"{where}, row {row!r}: its cells lie in the folder {slug(row)!r}, and so do those "
                    f"of row {other!r}: names must differ in more than case and punctuation"
                )
            try:
                rows[row] = config.load_config(merged(base, changes or {}))
            except ConfigError as error:
                raise ConfigError(f"{where}, row {row!r}: {error}") from None
        tables(kind)  # so that the records' type is known
        return Experiment(name, own.title or name, kind, own.seeds, own.priority, rows, own.note, store)

    def cells(self) -> Iterator[Cell]:
        """By priority; within one, every row's first seed before any row's second."""
        for experiment in sorted(self.experiments, key=lambda e: e.priority):
            for seed in range(experiment.seeds):
                for row, config in experiment.rows.items():
                    yield self._cell(experiment, row, seed, config)

    def missing(self, only: str | None = None) -> list[Cell]:
        """Cells that have not been run, of one experiment or of all.

        Raises:
            ConfigError: no such experiment.
        """
        _known(self, only)
        return [c for c in self.cells() if not c.done and only in (None, c.experiment.name)]

    def _cell(self, experiment: Experiment, row: str, seed: int, config: Any) -> Cell:
        return Cell(experiment, row, seed, experiment.store, config)

    def section(self, experiment: Experiment) -> Section[Record]:
        """The finished cells of every row, also of seeds beyond the plan's."""
        rows = [Row(row, experiment.store.row(row), experiment.seeds) for row in experiment.rows]
        return Section(experiment.name, experiment.title, rows, experiment.note.strip())


def _config(kind: Kind) -> Any:
    """Each kind needs its own packages only."""
    if kind == "recipe":
        from ..distill import config as distillation

        return distillation
    from ..compress import config as compression

    return compression


def tables(kind: Kind) -> Any:
    """The module with a study's tables, and the type of its records."""
    if kind == "recipe":
        from ..distill import tables as distillation

        return distillation
    from ..compress import tables as compression

    return compression


def run(
    plan: Plan,
    work: Path,
    progress: Callable[[Cell, str, int, int, dict[str, Any]], None] | None = None,
    only: str | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Runs the missing cells; returns how many. Can be stopped and called again at any moment.

    Several processes may run one plan at a time, with the same `work`: each takes cells that no other one is at work
    on, and waits when there are none, until all are done.

    Args:
        work: for checkpoints, and for what cells share.
        progress: called as cells go on; of one that another process is at work on, with :data:`WAITS`.
        only: an experiment's name; None: all.
        limit: of cells.
        device: cpu, cuda or cuda:N.

    Raises:
        ConfigError: no such experiment; or a cell that cannot be run: says which and why.
        ValueError: no such device.
        CheckpointError, Stopped: as for a single run.
    """
    device = usable(device)
    tasks: dict[str, Any] = {}
    count, left, busy, pause = 0, plan.missing(only), list[Cell](), PAUSE
    while (left or busy) and count != limit:
        if not left:
            time.sleep(pause)
            left, busy, pause = busy, [], min(2 * pause, LONGEST)
        cell = left.pop(0)
        directory = work / cell.experiment.name / slug(cell.row) / str(cell.seed)
        told = None if progress is None else (lambda *a, cell=cell: progress(cell, *a))
        try:
            with checkpoint.alone(directory):
                if cell.done:  # by another process
                    continue
                if cell.experiment.kind == "compress":
                    from ..compress import compress

                    record = compress(
                        cell.config, cell.seed, directory, shared=work / "compress", progress=told, device=device
                    )
                else:
                    from ..data import load
                    from ..distill import runs

                    if cell.config.data not in tasks:
                        tasks = {cell.config.data: load(cell.config.data)}  # one at a time is kept
                    record = runs.distil(
                        cell.config,
                        cell.seed,
                        directory,
                        task=tasks[cell.config.data],
                        progress=told,
                        device=device,
                        teachers=work / "teachers",
                    )
                cell.store.append(cell.row, Record.parse(record))
        except checkpoint.Busy:
            busy.append(cell)
            if told is not None:
                told(WAITS, 0, 1, {})
            continue
        except (ValueError, TypeError, ArithmeticError, FileNotFoundError) as error:
            raise ConfigError(
                f"{plan.path}: {cell.experiment.name}, row {cell.row!r}, seed {cell.seed}: {error}"
            ) from error
        write_table(plan)
        count += 1
        left, busy, pause = busy + left, [], PAUSE
    return count


def measure(
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
    only: str | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Measures the networks of finished cells of compression anew, all on one device of this machine; returns how many.

    For when nothing else runs: what was measured beside other work, or on several machines, is not comparable. All
    else in the records stays.

    Raises:
        ConfigError: no such experiment.
        ValueError: no such device.
    """
    from ..compress.run import measure_again

    device = usable(device)
    _known(plan, only)
    cells = [
        (e.store, row, record)
        for e in plan.experiments
        if e.kind == "compress" and only in (None, e.name)
        for row in e.rows
        for record in e.store.row(row)
    ]
    for k, (store, row, record) in enumerate(cells):
        store.replace(row, Record.parse(measure_again(record.content(), device)))
        if progress is not None:
            progress(k + 1, len(cells))
    write_table(plan)
    return len(cells)


def _known(plan: Plan, only: str | None) -> None:
    if only is not None and only not in [e.name for e in plan.experiments]:
        raise ConfigError(f"no experiment {only!r}: there are {', '.join(e.name for e in plan.experiments)}")


def write_table(plan: Plan) -> Path:
    """RESULTS.md beside the plan, from the cells alone."""
    experiments = sorted(plan.experiments, key=lambda e: e.priority)
    lines = ["# Results", ""]
    for kind in KINDS:
        if any(e.kind == kind for e in experiments):
            lines += [tables(kind).INTRODUCTION, ""]
    for experiment in experiments:
        section = plan.section(experiment)
        lines += [f"## {section.title}", ""]
        if section.note:
            lines += [section.note, ""]
        lines += [*tables(experiment.kind).results(section).markdown(), ""]
    path = plan.path.parent / "RESULTS.md"
    checkpoint.replace(path, lambda p: p.write_text("\n".join(lines)))
    return path
