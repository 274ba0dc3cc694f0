"""The demonstration: distillation and compression on scikit-learn's digits, and a report.

Static: the digits are the nodes of a graph, every digit has its nearest neighbours as in-edges; a wide
graph network teaches a narrow one. Dynamic: every digit is a cloud of its bright pixels; a DGCNN teaches
a smaller one, over the union of the neighbourhoods that both see. Compression: a LeNet that reads them
loses most of its filters. It is the experiment table of ``demo.yaml``, run by the same engine as any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from . import report
from .lab import plan as grid
from .lab import settings

PLAN = Path(__file__).parent / "demo.yaml"


def prepare(directory: Path, epochs: int | None = None, seeds: int | None = None) -> grid.Plan:
    """The plan in a folder of its own, where its cells and the report go; cells that are there stay."""
    content = settings.parse_file(PLAN)
    for experiment in content["experiments"].values():
        if seeds is not None:
            experiment["seeds"] = seeds
        if epochs is not None:
            train = {"train": {"epochs": epochs}}
            shorter: dict[str, Any] = {"teacher": train, "student": train}
            if "compress" in experiment:
                shorter = {**train, "finetune": {"epochs": epochs}}
            experiment["base"] = settings.merged(experiment.get("base", {}), shorter)
    text = yaml.safe_dump(content, sort_keys=False, width=120)
    file = directory / "plan.yaml"
    if file.exists() and file.read_text() != text:
        raise settings.ConfigError(
            f"{file} is another demo (other epochs or seeds, or another version of fastkd): "
            f"delete {directory}, or choose another folder with --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return grid.Plan(file)


def finish(plan: grid.Plan, console: Console) -> Path:
    """Prints the tables; returns the report's path."""
    for experiment in plan.experiments:
        section = experiment.section()
        if section.done:
            console.print(experiment.study.tables.overview(section).terminal())
    console.print(
        "± is half the 95 % interval of the mean over seeds; the epoch is chosen on the validation part; "
        "seconds are per network; memory is what training took beyond what the process held before. "
        "Faster: the full network's latency over the smaller one's, at a batch of 1 / 64."
    )
    return report.write(plan.path.parent)
