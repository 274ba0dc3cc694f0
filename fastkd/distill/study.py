"""Distillation as a study of the lab: the engine's view of a configuration and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ..data import Task
from ..data import load as load_data
from ..lab.study import Options, Progress, Study
from ..runtime.world import World
from . import runs
from .config import RECIPES, RunConfig

__all__ = ["STUDY", "Distillation"]


class Distillation(Study):
    """A teacher, trained once, and students that are distilled from it."""

    command = "distill"
    shared = "teachers"
    recipes = RECIPES
    config = RunConfig
    files = "the teacher, and per seed result.json and weights.safetensors"
    names_seeds = True

    def __init__(self) -> None:
        self._task: tuple[str, Task] | None = None  # one at a time is kept

    def task(self, name: str) -> Task:
        """The data set of that name."""
        if self._task is None or self._task[0] != name:
            self._task = None  # before the next one is loaded
            self._task = name, load_data(name)
        return self._task[1]

    def run(
        self, config: Any, seed: int, directory: Path, shared: Path, progress: Progress | None, options: Options
    ) -> dict[str, Any]:
        return runs.distil(
            config,
            seed,
            directory,
            task=self.task(config.data),
            progress=progress,
            device=options.device if options.world is None else options.world.device,
            teachers=shared,
            world=options.world,
        )

    def teacher(self, config: RunConfig, directory: Path, progress: Progress, world: World) -> dict[str, Any]:
        """The record of the teacher alone."""
        return runs.teacher_of(config, self.task(config.data), directory, progress, world.device, world)[1]

    def table(self, records: list[dict[str, Any]]) -> Table:
        return _table(records[0]["teacher"], records, RunConfig.model_validate(records[0]["config"]))

    def teacher_table(self, config: RunConfig, record: dict[str, Any]) -> Table:
        return _table(record, [], config)

    def describe(self, config: Any) -> str:
        task = self.task(config.data)
        return f"{task.name}: {task.source}"

    def outline(self, content: dict[str, Any]) -> tuple[str, str]:
        networks = f"{content['teacher']['model']['name']} to {content['student']['model']['name']}"
        return networks, ", ".join(f"{name} x {loss['weight']:g}" for name, loss in content["losses"].items())


def _table(teacher: dict[str, Any], records: list[dict[str, Any]], config: Any) -> Table:
    from ..lab.plan import mean_interval

    label = " + ".join(name for name, loss in config.losses.items() if loss.weight) or "labels alone"
    table = Table(title=f"{config.data}, test part")
    for heading in ("network", "test, %", "validation, %", "parameters", "seconds", "peak memory, MB"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    rows = [("teacher", [teacher])]
    if records:
        rows.append((f"student ({label})", [r["student"] for r in records]))
    for name, found in rows:
        peaks = [f["peak_memory_mb"] for f in found if f["peak_memory_mb"] is not None]
        table.add_row(
            name,
            mean_interval([f["test"] for f in found]),
            mean_interval([f["val"] for f in found]),
            f"{found[0]['parameters']:,}",
            f"{sum(f['seconds'] for f in found) / len(found):.1f}",
            f"{max(peaks):.0f}" if peaks else "-",
        )
    return table


STUDY = Distillation()
