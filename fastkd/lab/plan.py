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
from typing import Any

import torch
from pydantic import Field

from .._text import slug
from ..runtime import checkpoint
from ..runtime.world import usable
from . import settings
from .cells import Cells
from .record import Record
from .rows import Row, Section
from .settings import ConfigError, RowName, Strict, folder_name, merged
from .study import STUDIES, Options, Study, study

__all__ = ["Cell", "Experiment", "Plan", "measure", "run", "write_table"]

PAUSE, LONGEST = 1.0, 60.0  # seconds, until what another process was at work on is looked at again
WAITS = "waits for another process"


class _Content(Strict):
    """An experiment as it is written."""

    title: str | None = None
    """Of its table; None: the experiment's name."""
    recipe: str | None = None
    """A recipe of fastkd distill, or a path to a YAML file."""
    compress: str | None = None
    """A recipe of fastkd compress, or a path to a YAML file."""
    seeds: int = Field(default=3, ge=1)
    """Runs of every row, with the seeds 0, 1, ..."""
    priority: int = 1
    """Lower runs first."""
    base: dict[str, Any] | None = None
    """What differs from the recipe in all rows."""
    rows: dict[RowName, dict[str, Any] | None] = Field(min_length=1)
    """What differs in each row, by its name."""
    note: str = ""
    """A paragraph above its table."""


@dataclass(frozen=True)
class Experiment:
    """One table: configurations by row, and their records."""

    name: str
    title: str
    kind: str
    """The key that names its study, of :data:`fastkd.lab.study.STUDIES`."""
    seeds: int
    priority: int
    rows: dict[str, Any]
    note: str
    store: Cells

    @property
    def study(self) -> Study:
        return study(self.kind)

    def records(self, row: str) -> list[Record]:
        """Those of the row's configuration, also of seeds beyond the plan's; others are of an earlier plan."""
        return [record for record in self.store.row(row) if self.study.same(record.config, self.rows[row])]

    def section(self) -> Section[Record]:
        """What is finished, for tables."""
        rows = [Row(row, self.records(row), self.seeds) for row in self.rows]
        return Section(self.name, self.title, rows, self.note.strip())


@dataclass(frozen=True)
class Cell:
    """A row and a seed."""

    experiment: Experiment
    row: str
    seed: int

    @property
    def config(self) -> Any:
        return self.experiment.rows[self.row]

    @property
    def done(self) -> bool:
        """Whether there is a record of it, and of its configuration as the plan has it now."""
        record = self.experiment.store.find(self.row, self.seed)
        return record is not None and self.experiment.study.same(record.config, self.config)


class Plan:
    """A plan file, and its cells.

    Raises:
        ConfigError: the file is no plan, or a row is no configuration; says where.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"no plan {self.path}")
        content = settings.read(self.path.parent, self.path).get("experiments")
        if not isinstance(content, dict):
            raise ConfigError(f"{self.path} must hold a mapping 'experiments'")
        if not content:
            raise ConfigError(f"{self.path} holds no experiment")
        where = f"{path}: the name of an experiment"
        self.experiments = [self._experiment(folder_name(name, where), e) for name, e in content.items()]

    def _experiment(self, name: str, content: Any) -> Experiment:
        where = f"{self.path}: {name}"
        try:
            if not isinstance(content, dict):
                raise ConfigError(f"an experiment must be a mapping, got {type(content).__name__}")
            written = settings.validated(_Content, content)
            kinds = [key for key in STUDIES if getattr(written, key) is not None]
            if len(kinds) != 1:
                raise ConfigError(
                    "one of recipe (of fastkd distill) and compress (of fastkd compress) is needed, got "
                    + ("both" if kinds else "neither")
                )
            kind = study(kinds[0])
            store = Cells(self.path.parent / "cells", name)
            recipe = str(getattr(written, kinds[0]))
            beside = self.path.parent / recipe
            base = merged(settings.read(kind.recipes, beside if beside.is_file() else recipe), written.base or {})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        rows: dict[str, Any] = {}
        folders: dict[str, str] = {}
        for row, changes in written.rows.items():
            other = folders.setdefault(slug(row), row)
            if other != row:  # one would be shown with the records of the other
                raise ConfigError(
                    f"{where}, row {row!r}: its cells lie in the folder {slug(row)!r}, and so do those "
                    f"of row {other!r}: names must differ in more than case and punctuation"
                )
            try:
                rows[row] = kind.load(merged(base, changes or {}))
            except ConfigError as error:
                raise ConfigError(f"{where}, row {row!r}: {error}") from None
        return Experiment(
            name, written.title or name, kinds[0], written.seeds, written.priority, rows, written.note, store
        )

    def chosen(self, only: str | None = None) -> list[Experiment]:
        """The experiment of that name, or all, by priority.

        Raises:
            ConfigError: no such experiment.
        """
        names = [e.name for e in self.experiments]
        if only is not None and only not in names:
            raise ConfigError(f"no experiment {only!r}: there are {', '.join(names)}")
        return sorted((e for e in self.experiments if only in (None, e.name)), key=lambda e: e.priority)

    def cells(self, only: str | None = None) -> Iterator[Cell]:
        """By priority; within one, every row's first seed before any row's second."""
        for experiment in self.chosen(only):
            for seed in range(experiment.seeds):
                for row in experiment.rows:
                    yield Cell(experiment, row, seed)

    def missing(self, only: str | None = None) -> list[Cell]:
        """Cells that have not been run, of one experiment or of all."""
        return [cell for cell in self.cells(only) if not cell.done]


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
    options = Options(usable(device))
    count, left, busy, pause = 0, plan.missing(only), list[Cell](), PAUSE
    while (left or busy) and count != limit:
        if not left:
            time.sleep(pause)
            left, busy, pause = busy, [], min(2 * pause, LONGEST)
        cell = left.pop(0)

        def report(what: str, done: int, total: int, latest: dict[str, Any], cell: Cell = cell) -> None:
            if progress is not None:
                progress(cell, what, done, total, latest)

        try:
            if not _run(cell, work, report, options):
                continue
        except checkpoint.Busy:
            busy.append(cell)
            report(WAITS, 0, 1, {})
            continue
        except (ValueError, TypeError, ArithmeticError, FileNotFoundError) as error:
            raise ConfigError(
                f"{plan.path}: {cell.experiment.name}, row {cell.row!r}, seed {cell.seed}: {error}"
            ) from error
        write_table(plan)
        count += 1
        left, busy, pause = busy + left, [], PAUSE
    return count


def _run(cell: Cell, work: Path, report: Callable[..., None], options: Options) -> bool:
    """Whether the cell was run, and not meanwhile by another process."""
    kind = cell.experiment.study
    directory = work / cell.experiment.name / slug(cell.row) / str(cell.seed)
    with checkpoint.alone(directory):
        if cell.done:
            return False
        record = kind.run(cell.config, cell.seed, directory, work / kind.shared, report, options)
        cell.experiment.store.append(cell.row, Record.parse(record))
    return True


def measure(
    plan: Plan,
    progress: Callable[[int, int], None] | None = None,
    only: str | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Measures the networks of finished cells anew, all on one device of this machine; returns how many. Studies that
    measure nothing are left out.

    For when nothing else runs: what was measured beside other work, or on several machines, is not comparable. All
    else in the records stays.

    Raises:
        ConfigError: no such experiment.
        ValueError: no such device.
    """
    device = usable(device)
    found = [
        (e, row, record) for e in plan.chosen(only) if e.study.measures for row in e.rows for record in e.records(row)
    ]
    for k, (experiment, row, record) in enumerate(found):
        experiment.store.replace(row, Record.parse(experiment.study.measure(record.content(), device)))
        if progress is not None:
            progress(k + 1, len(found))
    write_table(plan)
    return len(found)


def write_table(plan: Plan) -> Path:
    """RESULTS.md beside the plan, from the cells alone."""
    experiments = plan.chosen()
    lines = ["# Results", ""]
    for key in STUDIES:
        if any(e.kind == key for e in experiments):
            lines += [study(key).tables.INTRODUCTION, ""]
    for experiment in experiments:
        section = experiment.section()
        lines += [f"## {section.title}", ""]
        if section.note:
            lines += [section.note, ""]
        lines += [*experiment.study.tables.results(section).markdown(), ""]
    path = plan.path.parent / "RESULTS.md"
    checkpoint.replace(path, lambda p: p.write_text("\n".join(lines)))
    return path
