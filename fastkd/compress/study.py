"""Compression as a study of the lab: the engine's view of a configuration and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import fastkd.compress as package

from ..evolve import TensorBoard
from ..lab.study import Options, Progress, Study
from .config import RECIPES, CompressConfig
from .run import measure_again

__all__ = ["STUDY", "Compression"]


class Compression(Study):
    """A network, trained or given, a search, and the smaller network."""

    command = "compress"
    shared = "compress"
    recipes = RECIPES
    config = CompressConfig
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
        return package.compress(
            config, seed, directory, shared=shared, progress=progress, device=options.device, **more
        )

    def table(self, records: list[dict[str, Any]]) -> Table:
        return _before_and_after(records)

    def outline(self, content: dict[str, Any]) -> tuple[str, str]:
        budget = ", ".join(f"{share:.1%} of the {name}" for name, share in content.get("budget", {}).items())
        return content["model"]["name"], f"{budget} by {content['algorithm']['name']}"

    def measure(self, record: dict[str, Any], device: torch.device) -> dict[str, Any] | None:
        return measure_again(record, device)


def _before_and_after(records: list[dict[str, Any]]) -> Table:
    """Means over seeds."""
    from ..lab.plan import mean_interval

    first, agreement = records[0], records[0]["score"] == "agreement"
    config = first["config"]
    left = ", ".join(f"{share:.1%} of the {name}" for name, share in config["budget"].items()) or "no budget"
    threads = first["environment"]["threads"]
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 1),
        header_style="bold",  # 80 columns are enough
        title=f"{config['model']['name']} on {config['data']}, {config['algorithm']['name']}, {left}",
        caption=f"Latency, with {threads} thread{'s' if threads > 1 else ''}, and peak memory at a batch of "
        "1 / 64." + (" Agreement is with the full network." if agreement else ""),
    )
    score = "agreement, %" if agreement else "test, %"
    for heading in ("network", score, "parameters", "MACs, M", "file, kB", "latency, ms", "memory, MB"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=heading == "network")

    def both(costs: Any, digits: int) -> str:
        return "" if costs is None else " / ".join(f"{x:.{digits}f}" for x in costs.values())

    def row(name: str, of: Any, costs: Any, measured: bool = True) -> None:
        tests = mean_interval([of(r)["test"] for r in records])
        c = costs(first)
        table.add_row(
            name,
            tests,
            *((f"{c['parameters']:,}", f"{c['macs'] / 1e6:.2f}") if "macs" in c else ("", "")),
            *(
                (f"{c['bytes'] / 1000:,.0f}", both(c["latency_ms"], 2), both(c.get("peak_memory_mb"), 2))
                if measured
                else ("", "", "")
            ),
        )

    row("full", lambda r: r["dense"], lambda r: r["dense"])
    names = {"masked": "smaller", "recalibrated": "recalibrated", "finetuned": "fine-tuned"}
    stages = list(first["compact"]["stages"])
    for stage in stages:
        row(
            names[stage],
            lambda r, stage=stage: r["compact"]["stages"][stage],
            lambda r: r["compact"],
            stage == stages[-1],
        )
    if first["int8"] is not None:
        row("int8", lambda r: r["int8"], lambda r: r["int8"])
    return table


STUDY = Compression()
