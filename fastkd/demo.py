"""The demonstration: distillation and compression on scikit-learn's digits, and a report.

Static: the digits are the nodes of a graph, every digit has its nearest neighbours as in-edges; a wide
graph network teaches a narrow one. Dynamic: every digit is a cloud of its bright pixels; a DGCNN teaches
a smaller one, over the union of the neighbourhoods that both see. Compression: a LeNet that reads them
loses most of its filters. It is the experiment table of ``demo.yaml``, run by the same engine as any other.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

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
    own = directory / "plan.yaml"
    if own.exists() and own.read_text() != text:
        raise settings.ConfigError(
            f"{own} is another demo (other epochs or seeds, or another version of fastkd): "
            f"delete {directory}, or choose another folder with --out"
        )
    directory.mkdir(parents=True, exist_ok=True)
    own.write_text(text)
    return grid.Plan(own)


def finish(plan: grid.Plan, console: Console) -> Path:
    """Prints the tables; returns the report's path."""
    for experiment in plan.experiments:
        cells = {row: [c.record() for c in plan.of(experiment, row)] for row in experiment.rows}
        if not any(cells.values()):
            continue
        table = (
            _compressions(experiment.title, cells)
            if experiment.kind == "compress"
            else _students(experiment.title, cells)
        )
        console.print(table)
    console.print(
        "± is half the 95 % interval of the mean over seeds; the epoch is chosen on the validation part; "
        "seconds are per network; memory is what training took beyond what the process held before. "
        "Faster: the full network's latency over the smaller one's, at a batch of 1 / 64."
    )
    return report.write(plan.path.parent)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    return table


def _students(title: str, cells: grid.Records) -> Table:
    table = _table(title, "network", "parameters", "test accuracy, %", "seconds", "peak memory, MB")
    teacher = next(r["teacher"] for records in cells.values() for r in records)
    rows = {"teacher": [teacher], **{row: [r["student"] for r in records] for row, records in cells.items()}}
    for name, found in rows.items():
        if not found:
            table.add_row(name, "", "not run", "", "")
            continue
        peaks = [f["peak_memory_mb"] for f in found if f["peak_memory_mb"] is not None]
        table.add_row(
            name,
            f"{found[0]['parameters']:,}",
            grid.mean_interval([f["test"] for f in found]),
            f"{sum(f['seconds'] for f in found) / len(found):.1f}",
            f"{max(peaks):.0f}" if peaks else "-",
        )
    return table


def _compressions(title: str, cells: grid.Records) -> Table:
    table = _table(title, "network", "parameters", "test accuracy, %", "MACs, M", "faster")
    dense = [r["dense"] for r in next(records for records in cells.values() if records)]
    rows = {
        "full network": [(d, d) for d in dense],
        **{row: [(r["dense"], r["compact"]) for r in records] for row, records in cells.items()},
    }
    for name, found in rows.items():
        if not found:
            table.add_row(name, "", "not run", "", "")
            continue
        parameters, macs = (statistics.mean(c[key] for _, c in found) for key in ("parameters", "macs"))
        faster = [statistics.mean(d["latency_ms"][b] / c["latency_ms"][b] for d, c in found) for b in ("1", "64")]
        table.add_row(
            name,
            f"{parameters:,.0f}",
            grid.mean_interval([c["test"] for _, c in found]),
            f"{macs / 1e6:.2f}",
            f"{faster[0]:.1f}x / {faster[1]:.1f}x",
        )
    return table
