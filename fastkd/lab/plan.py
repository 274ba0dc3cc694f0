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

Beside it lie ``cells/<experiment>/<row>/<seed>.json``, one record each, and RESULTS.md, which is made of
them alone. Networks and searches that several cells need are kept in the work directory, which needs no keeping.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ..evolve import hypervolume
from ..runtime import checkpoint
from ..runtime.world import usable
from . import settings
from .settings import ConfigError, Name, RowName, Strict, checked, merged

__all__ = ["Cell", "Experiment", "Plan", "interval", "mean_interval", "measure", "run", "write_table"]

PAUSE, LONGEST = 1.0, 60.0  # seconds, until what another process was at work on is looked at again
WAITS = "waits for another process"
Kind = Literal["recipe", "compress"]
"""The key of a plan that names the recipe: of distillation, or of compression."""


@dataclass(frozen=True)
class Cell:
    experiment: Experiment
    row: str
    seed: int
    file: Path
    config: Any

    @property
    def done(self) -> bool:
        return self.file.exists()

    def record(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())


class _Content(Strict):
    """An experiment as it is written."""

    title: str | None = None
    recipe: str | None = None
    compress: str | None = None
    seeds: int = Field(default=3, ge=1)
    priority: int = 1
    base: dict[str, Any] | None = None
    rows: dict[RowName, dict[str, Any] | None]
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
        self.experiments = [
            self._experiment(checked(Name, name, f"{path}: the name of an experiment"), e)
            for name, e in content["experiments"].items()
        ]

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
            config = _config(kind)
            recipe = str(own.compress if own.recipe is None else own.recipe)
            beside = self.path.parent / recipe
            base = merged(settings.read(config.RECIPES, beside if beside.is_file() else recipe), own.base or {})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        rows: dict[str, Any] = {}
        folders: dict[str, str] = {}
        for row, changes in own.rows.items():
            other = folders.setdefault(_slug(row), row)
            if other != row:  # one would be shown with the records of the other
                raise ConfigError(
                    f"{where}, row {row!r}: its cells lie in the folder {_slug(row)!r}, and so do those "
                    f"of row {other!r}: names must differ in more than case and punctuation"
                )
            try:
                rows[row] = config.load_config(merged(base, changes or {}))
            except ConfigError as error:
                raise ConfigError(f"{where}, row {row!r}: {error}") from None
        return Experiment(name, own.title or name, kind, own.seeds, own.priority, rows, own.note)

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
        file = self.path.parent / "cells" / experiment.name / _slug(row) / f"{seed}.json"
        return Cell(experiment, row, seed, file, config)

    def of(self, experiment: Experiment, row: str) -> list[Cell]:
        """Every finished cell of a row, also of seeds beyond the plan's."""
        folder = self.path.parent / "cells" / experiment.name / _slug(row)
        seeds = sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdigit())
        return [self._cell(experiment, row, seed, experiment.rows[row]) for seed in seeds]


def _config(kind: Kind) -> Any:
    """Each kind needs its own packages only."""
    if kind == "recipe":
        from ..distill import config as distillation

        return distillation
    from ..compress import config as compression

    return compression


def _slug(row: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", row.lower()).strip("-")


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
        directory = work / cell.experiment.name / _slug(cell.row) / str(cell.seed)
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
                checkpoint.write_json(cell.file, record)
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
        c
        for e in plan.experiments
        if e.kind == "compress" and only in (None, e.name)
        for row in e.rows
        for c in plan.of(e, row)
    ]
    for k, cell in enumerate(cells):
        checkpoint.write_json(cell.file, measure_again(cell.record(), device))
        if progress is not None:
            progress(k + 1, len(cells))
    write_table(plan)
    return len(cells)


def _known(plan: Plan, only: str | None) -> None:
    if only is not None and only not in [e.name for e in plan.experiments]:
        raise ConfigError(f"no experiment {only!r}: there are {', '.join(e.name for e in plan.experiments)}")


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
    kinds = {e.kind for e in plan.experiments}
    lines = ["# Results", ""]
    if "recipe" in kinds:
        lines += [
            "Made by `fastkd grid` from the records in `cells/`. Scores are in percent on the test "
            "part, mean ± half the 95 % interval (Student's t) over seeds; the epoch is chosen on the validation "
            "part, and so was everything that was tuned. A cell that has not been run is shown as such.",
            "",
        ]
    if "compress" in kinds:
        lines += [
            "Compressed networks, made by `fastkd grid` from the records in `cells/`: accuracy (or agreement "
            "with the full network, where that is said) in percent on the test part, mean ± half the 95 % "
            "interval (Student's t) over seeds; *recalibrated* is the smaller network with the full one's "
            "weights and batch-norm statistics of its own, *fine-tuned* is after training. *Fitness* is what the "
            "search took the recalibrated one for, on images of its own: the best of hundreds, it flatters. "
            "What is left of MACs and parameters is in percent of the full network's. *Faster* is its measured "
            "latency over the smaller one's, at a batch of 1 / 64. Evaluations are networks that the search "
            "looked at, on images apart from those of validation and test. *Hypervolume*, where a front was "
            "searched for: how much of the rectangle of score and MACs the front's networks dominate on test "
            "images, in percent; of uniform L1, those of 16 densities. A cell that has not been run is shown as "
            "such.",
            "",
        ]
    for experiment in sorted(plan.experiments, key=lambda e: e.priority):
        lines += [f"## {experiment.title}", ""]
        if experiment.note:
            lines += [experiment.note.strip(), ""]
        cells = {row: [c.record() for c in plan.of(experiment, row)] for row in experiment.rows}
        lines += _compressions(experiment, cells) if experiment.kind == "compress" else _students(experiment, cells)
        lines.append("")
    path = plan.path.parent / "RESULTS.md"
    checkpoint.replace(path, lambda p: p.write_text("\n".join(lines)))
    return path


Records = dict[str, list[dict[str, Any]]]
"""By row."""


def _students(experiment: Experiment, cells: Records) -> Iterator[str]:
    teacher = next((r["teacher"] for found in cells.values() for r in found), None)
    yield "| | test, % | validation, % | seeds | parameters | seconds |"
    yield "|---|---:|---:|---:|---:|---:|"
    if teacher is not None:
        yield (
            f"| teacher | {teacher['test']:.2f} | {teacher['val']:.2f} | 1 | {teacher['parameters']:,} | "
            f"{teacher['seconds']:.0f} |"
        )
    for row, found in cells.items():
        if not found:
            yield f"| {row} | not yet run | | 0 of {experiment.seeds} | | |"
            continue
        students = [r["student"] for r in found]
        test, val = (mean_interval([s[key] for s in students]) for key in ("test", "val"))
        yield (
            f"| {row} | {test} | {val} | {len(students)} of {max(experiment.seeds, len(students))} | "
            f"{students[0]['parameters']:,} | {statistics.mean(s['seconds'] for s in students):.0f} |"
        )


def _compressions(experiment: Experiment, cells: Records) -> Iterator[str]:
    records = [r for found in cells.values() for r in found]
    tuned = any("finetuned" in r["compact"]["stages"] for r in records)
    fronts = any(r["search"]["algorithm"].startswith("nsga2") for r in records)
    score = "agreement" if any(r["score"] == "agreement" for r in records) else "test"
    headings = [
        "",
        *([f"{score} recalibrated, %", f"{score} fine-tuned, %"] if tuned else [f"{score}, %"]),
        "fitness",
        "validation, %",
        "seeds",
        "MACs, %",
        "parameters, %",
        "faster",
        "evaluations",
        "search, s",
        *(["hypervolume"] if fronts else []),
    ]
    yield "| " + " | ".join(headings) + " |"
    yield "|---|" + "---:|" * (len(headings) - 1)
    if records:
        dense = {r["seed"]: r["dense"] for r in records}.values()
        tests = mean_interval([d["test"] for d in dense])
        yield (
            "| "
            + " | ".join(
                [
                    "full network",
                    *([tests, tests] if tuned else [tests]),
                    "",
                    mean_interval([d["val"] for d in dense]),
                    str(len(dense)),
                    f"{records[0]['dense']['macs'] / 1e6:.2f} M",
                    f"{records[0]['dense']['parameters']:,}",
                    "",
                    "",
                    "",
                    *[""] * fronts,
                ]
            )
            + " |"
        )
    for row, found in cells.items():
        if not found:
            left = " |" * (1 + tuned), f" | 0 of {experiment.seeds} |", " |" * (5 + fronts)
            yield f"| {row} | not yet run |" + "".join(left)
            continue
        small = [r["compact"] for r in found]
        # What the search found, before any training.
        before = [next(c["stages"][k]["test"] for k in ("recalibrated", "masked") if k in c["stages"]) for c in small]
        share = {
            k: statistics.mean(100 * r["compact"][k] / r["dense"][k] for r in found) for k in ("macs", "parameters")
        }
        faster = [
            statistics.mean(r["dense"]["latency_ms"][b] / r["compact"]["latency_ms"][b] for r in found)
            for b in ("1", "64")
        ]
        yield (
            "| "
            + " | ".join(
                [
                    row,
                    mean_interval(before),
                    *([mean_interval([c["test"] for c in small])] if tuned else []),
                    mean_interval([_chosen_by(r["search"]) for r in found]),
                    mean_interval([c["val"] for c in small]),
                    f"{len(found)} of {max(experiment.seeds, len(found))}",
                    f"{share['macs']:.1f}",
                    f"{share['parameters']:.1f}",
                    f"{faster[0]:.2f}x / {faster[1]:.2f}x",
                    f"{statistics.mean(r['search']['evaluations'] for r in found):,.0f}",
                    f"{statistics.mean(r['search']['seconds'] for r in found):.0f}",
                    *([mean_interval([_volume(r["search"]) for r in found])] if fronts else []),
                ]
            )
            + " |"
        )


def _chosen_by(search: dict[str, Any]) -> float:
    """What the network that was taken had on the images of the search; percent, where it is a share."""
    own = search["individuals"]
    quality = own["quality"][own["id"].index(search["chosen"])]
    return 100 * quality if search["quality"] in ("accuracy", "agreement") else quality


def _volume(search: dict[str, Any]) -> float:
    """Percent of the rectangle of quality and cost that a front dominates on test images. Of uniform L1: its ladder,
    as far as the budget allows."""
    front, full = search["front"], search["full_cost"]
    points = list(zip(front["test"], front["cost"], strict=True))
    if search["algorithm"] == "l1":
        points += [
            (q, c) for q, c in zip(search["l1"]["test"], search["l1"]["cost"], strict=True) if c <= max(front["cost"])
        ]
    return 100 * hypervolume(torch.tensor([(-q, c / full) for q, c in points], dtype=torch.float64), (0.0, 1.0))
