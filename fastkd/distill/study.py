"""Distillation as a study of the lab: the engine's view of a configuration and its runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from rich.table import Table

from ..data import Task
from ..data import load as load_data
from ..lab.study import Options, Progress, Study
from ..runtime.world import World
from . import runs
from . import tables as study_tables
from .config import RunConfig
from .record import DistillRecord, Network

__all__ = ["STUDY", "Distillation"]


class Distillation(Study):
    """A teacher, trained once, and students that are distilled from it."""

    command = "distill"
    shared = "teachers"
    recipes = RunConfig.RECIPES
    config = RunConfig
    files = "the teacher, and per seed result.json and weights.safetensors"
    names_seeds = True
    tables: ClassVar[ModuleType] = study_tables

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

    def effective(self, content: dict[str, Any]) -> dict[str, Any]:
        losses = content.get("losses") or {}
        return {**content, "losses": {name: loss for name, loss in losses.items() if loss.get("weight", 1)}}

    def table(self, records: list[dict[str, Any]]) -> Table:
        typed = [DistillRecord.model_validate(record) for record in records]
        label = " + ".join(typed[0].losses) or "labels alone"
        networks = {f"student ({label})": [record.student for record in typed]}
        return study_tables.trained(f"{typed[0].config['data']}, test part", typed[0].teacher, networks).terminal()

    def teacher_table(self, config: RunConfig, record: dict[str, Any]) -> Table:
        """What the command shows of the teacher alone."""
        return study_tables.trained(f"{config.data}, test part", Network.model_validate(record), {}).terminal()

    def describe(self, config: Any) -> str:
        task = self.task(config.data)
        return f"{task.name}: {task.source}"

    def outline(self, content: dict[str, Any]) -> tuple[str, str]:
        networks = f"{content['teacher']['model']['name']} to {content['student']['model']['name']}"
        return networks, ", ".join(f"{name} x {loss['weight']:g}" for name, loss in content["losses"].items())


STUDY = Distillation()
