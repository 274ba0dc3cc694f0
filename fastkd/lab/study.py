"""What a study is to the engine: a configuration, and what is computed of it.

A study is a subclass of :class:`Study` in a module of its own, whose name stands in :data:`STUDIES`. From that come its
command (`fastkd distill`), its recipes, its place in plans (`fastkd grid`), checkpoints and records.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from rich.table import Table

from ..runtime.checkpoint import differences
from ..runtime.world import World
from .settings import Configuration

__all__ = ["STUDIES", "Options", "Progress", "Study", "study"]

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Called as a run goes on: what is done, steps of it, all its steps, the latest record."""

STUDIES = {"recipe": "fastkd.distill.study", "compress": "fastkd.compress.study"}
"""Module of every study, by the key under which an experiment of a plan names its recipe."""


@dataclass(frozen=True)
class Options:
    """What a run may need beside its configuration."""

    device: torch.device | str = "cpu"
    world: World | None = None
    """The processes that compute together; None: this one alone."""
    trusted: Collection[str] = ()
    """Names of a user's own networks that were given on the command line."""
    tensorboard: Path | None = None
    """Where curves beyond those of `progress` go; None: there are none."""


class Study(ABC):
    """One kind of experiment.

    Attributes:
        command: of the command line, and the folder below ``runs/``.
        shared: the folder of a grid's work directory in which what cells share is kept.
        recipes: the folder of the configurations that come with the package.
        config: the model of a configuration.
        files: in words, what a run's folder holds beside config.json.
        names_seeds: whether its progress says of which seed it is.
        tables: the module with INTRODUCTION, results(section) and overview(section), for RESULTS.md and the terminal.
        measures: whether its networks can be measured anew.
    """

    command: ClassVar[str]
    shared: ClassVar[str]
    recipes: ClassVar[Path]
    config: ClassVar[type[Configuration]]
    files: ClassVar[str]
    names_seeds: ClassVar[bool] = False
    tables: ClassVar[ModuleType]
    measures: ClassVar[bool] = False

    def load(self, source: str | Path | dict[str, Any], overrides: Collection[str] = ()) -> Any:
        """A configuration; arguments and errors as for :meth:`fastkd.lab.settings.Configuration.load`."""
        return self.config.load(source, overrides)

    @abstractmethod
    def run(
        self, config: Any, seed: int, directory: Path, shared: Path, progress: Progress | None, options: Options
    ) -> dict[str, Any]:
        """The record of one run; what is in the directory already is taken as it is."""

    @abstractmethod
    def table(self, records: list[dict[str, Any]]) -> Table:
        """What the command shows at its end, of the records of all seeds."""

    def describe(self, config: Any) -> str:
        """A line that the command shows at its beginning; empty: none."""
        return ""

    @abstractmethod
    def outline(self, content: dict[str, Any]) -> tuple[str, str]:
        """The networks of a recipe, and what is done with them; for the list of recipes."""

    def effective(self, content: dict[str, Any]) -> dict[str, Any]:
        """A configuration without what changes nothing."""
        return content

    def same(self, content: dict[str, Any], config: BaseModel) -> bool:
        """Whether a record's configuration is this one: as it was written, or read by this version."""
        ours = self.effective(json.loads(json.dumps(config.model_dump())))
        if not differences(self.effective(content), ours):
            return True
        try:
            theirs = self.load(content).model_dump()
        except ValueError:
            return False
        return not differences(self.effective(json.loads(json.dumps(theirs))), ours)

    def measure(self, record: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The record with its networks measured anew."""
        raise NotImplementedError(f"fastkd {self.command} measures nothing")


def study(key: str) -> Study:
    """The study of a plan's key. Its module is imported here: each needs packages of its own."""
    found: Study = import_module(STUDIES[key]).STUDY
    return found
