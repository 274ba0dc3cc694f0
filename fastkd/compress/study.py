"""Compression as a study of the lab: the engine's view of a configuration and its runs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from rich.table import Table

import fastkd.compress as package

from ..evolve import TensorBoard
from ..lab.study import Options, Progress, Study
from . import tables as study_tables
from .config import CompressConfig
from .record import CompressRecord
from .run import measure_again

__all__ = ["STUDY", "Compression"]


class Compression(Study):
    """A network, trained or given, a search, and the smaller network."""

    command = "compress"
    shared = "compress"
    recipes = CompressConfig.RECIPES
    config = CompressConfig
    tables: ClassVar[ModuleType] = study_tables
    measures = True
    files = (
        "and per seed result.json, weights.safetensors (read by fastkd.population.load), model.onnx and model-int8.onnx"
    )

    def run(
        self, config: Any, seed: int, directory: Path, shared: Path, progress: Progress | None, options: Options
    ) -> dict[str, Any]:
        more: dict[str, Any] = {} if options.world is None else {"world": options.world}
        if options.trusted:
            more["trusted"] = options.trusted
        if options.tensorboard is not None and (options.world is None or options.world.rank == 0):
            more["callback"] = TensorBoard(options.tensorboard)
        record: dict[str, Any] = package.compress(
            config, seed, directory, shared=shared, progress=progress, device=options.device, **more
        )
        return record

    def table(self, records: list[dict[str, Any]]) -> Table:
        table = study_tables.before_and_after([CompressRecord.model_validate(record) for record in records])
        return table.terminal(box=None, pad_edge=False, padding=(0, 1), header_style="bold")  # 80 columns are enough

    def outline(self, content: dict[str, Any]) -> tuple[str, str]:
        budget = ", ".join(f"{share:.1%} of the {name}" for name, share in content.get("budget", {}).items())
        return content["model"]["name"], f"{budget} by {content['algorithm']['name']}"

    def measure(self, record: dict[str, Any], device: torch.device) -> dict[str, Any]:
        return measure_again(record, device)


STUDY = Compression()
