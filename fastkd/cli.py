"""The command line: ``fastkd info``, ``distill``, ``report``, ``grid`` and ``demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .config import show_config

app = typer.Typer(help="Fast, exact knowledge distillation for PyTorch.", no_args_is_help=False,
                  add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        info()


@app.command()
def info() -> None:
    """Print versions, CUDA support, instruction set and threads."""
    table = Table(title="fastkd", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in show_config().items():
        shown = " ".join(value) if isinstance(value, list) else {None: "-", True: "yes", False: "no"}.get(value, value)
        table.add_row(key, str(shown) or "-")
    Console().print(table)


class _Bars:
    """One bar per network that is trained, with the best validation score so far."""

    def __init__(self) -> None:
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=console)
        self.tasks: dict[str, Any] = {}
        self.shown = 0.0

    def __call__(self, what: str, epoch: int, epochs: int, latest: dict[str, Any]) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=epochs, shown="")
        if epoch < epochs and time.monotonic() - self.shown < 0.1:
            return  # drawing takes longer than an epoch of a small network
        self.shown = time.monotonic()
        shown = f"val {latest['val']:.2f} %" if latest else ""
        self.progress.update(self.tasks[what], completed=epoch, shown=shown)


def _fail(error: Exception) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
    raise typer.Exit(2)


@app.command()
def distill(
    recipe: str = typer.Argument(..., help="Name of a recipe (see `fastkd recipes`) or path to a YAML file."),
    settings: list[str] = typer.Option([], "--set", help="KEY=VALUE laid over it, e.g. losses.lsp.weight=100."),
    seeds: int = typer.Option(1, min=1, help="Students, with the seeds 0, 1, ..."),
    out: Path = typer.Option(None, help="Folder for all that is written; default runs/<recipe>."),
    resume: Path = typer.Option(None, help="Go on in this folder, with the configuration it was begun with."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:N."),
    teacher_only: bool = typer.Option(False, help="Train, or find, the teacher and stop."),
    tensorboard: bool = typer.Option(False, "--tensorboard", help="Write curves into the folder's tensorboard/."),
) -> None:
    """Train a teacher, if there is none yet, and distil it into students.

    On several processes: torchrun --nproc-per-node 2 -m fastkd distill RECIPE."""
    from . import data
    from .checkpoint import write_json
    from .distill import CheckpointError, ConfigError, RankLost, Stopped, TensorBoard, World, load_config, runs

    directory = resume or out or Path("runs") / Path(recipe).stem
    begun = directory / "config.json"

    def load() -> Any:
        if resume is None:
            return load_config(recipe, settings)
        if not begun.exists():
            raise ConfigError(f"--resume {resume}: there is no {begun}: the folder holds no run of fastkd distill")
        import json

        return load_config(json.loads(begun.read_text()), settings)

    try:
        curves = TensorBoard(directory / "tensorboard") if tensorboard else None
        world = World.from_environment(device)
        console.quiet = world.rank > 0
        config = world.first(load) if resume is not None else load()
        if resume is None and world.rank == 0:
            write_json(begun, config.model_dump())
        task = data.load(config.data)
        console.print(f"{task.name}: {task.source}", highlight=False)
        bars = _Bars()

        def progress(*latest: Any) -> None:
            bars(*latest)
            if curves is not None:
                curves(*latest)

        records = []
        with bars.progress:
            if teacher_only:
                _, record = runs.teacher_of(config, task, directory, progress, world.device, world)
            else:
                for seed in range(seeds):
                    records.append(runs.distil(config, seed, directory / f"seed{seed}", task=task, progress=progress,
                                               device=world.device, teachers=directory, world=world))
                record = records[0]["teacher"]
        console.print(_table(record, records, config))
        console.print(f"[bold]{directory}[/]: config.json, the teacher, and per seed result.json and "
                      f"weights.safetensors. `fastkd report {directory}` makes pictures of it.")
        world.close()
    except Stopped as stop:
        console.print(f"{stop}: fastkd distill {recipe} --resume {directory} --seeds {seeds}")
        raise typer.Exit(130) from None
    except (ConfigError, CheckpointError, RankLost, ValueError, OSError, ImportError) as error:
        _fail(error)


def _table(teacher: dict[str, Any], records: list[dict[str, Any]], config: Any) -> Table:
    from .distill.grid import mean_interval

    label = " + ".join(name for name, loss in config.losses.items() if loss.weight) or "labels alone"
    table = Table(title=f"{config.data}, test part")
    for heading in ("network", "test, %", "validation, %", "parameters", "seconds", "peak memory, MB"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    rows = [("teacher", [teacher])]
    if records:
        rows.append((f"student ({label})", [r["student"] for r in records]))
    for name, found in rows:
        peaks = [f["peak_memory_mb"] for f in found if f["peak_memory_mb"] is not None]
        table.add_row(name, mean_interval([f["test"] for f in found]), mean_interval([f["val"] for f in found]),
                      f"{found[0]['parameters']:,}", f"{sum(f['seconds'] for f in found) / len(found):.1f}",
                      f"{max(peaks):.0f}" if peaks else "-")
    return table


@app.command()
def recipes() -> None:
    """List the configurations that come with the package."""
    from .distill import load_config
    from .distill.config import recipes as names

    table = Table("recipe", "data", "teacher", "student", "losses")
    for name in names():
        config = load_config(name)
        table.add_row(name, config.data, config.teacher.model.name, config.student.model.name,
                      ", ".join(f"{k} x {c.weight:g}" for k, c in config.losses.items()))
    console.print(table)


@app.command()
def grid(
    plan: Path = typer.Argument(..., help="A plan file, such as results/plan.yaml."),
    only: str = typer.Option(None, help="One experiment of the plan."),
    limit: int = typer.Option(None, min=1, help="Run so many cells at most."),
    work: Path = typer.Option(Path("runs/grid"), help="Folder for checkpoints and teachers."),
    table: bool = typer.Option(False, "--table", help="Only write the table anew."),
) -> None:
    """Run the missing cells of a table of experiments; finished ones are never touched."""
    from .distill import CheckpointError, ConfigError, Stopped
    from .distill import grid as engine

    try:
        content = engine.Plan(plan)
        if table:
            console.print(str(engine.write_table(content)), highlight=False)
            return
        count = _run(content, work, only, limit)
        console.print(f"{count} cells run; {engine.write_table(content)}", highlight=False)
    except Stopped as stop:
        console.print(str(stop))
        raise typer.Exit(130) from None
    except (ConfigError, CheckpointError, ValueError, OSError, ImportError) as error:
        _fail(error)


def _run(plan: Any, work: Path, only: str | None = None, limit: int | None = None) -> int:
    """The missing cells of a plan, with bars; returns how many were run."""
    from .distill import grid as engine

    missing = sum(not c.done and (only is None or c.experiment == only) for c in plan.cells())
    bars = _Bars()
    with bars.progress:
        total = bars.progress.add_task("cells", total=min(missing, limit or missing), shown="")
        running: list[Any] = []

        def progress(cell: Any, what: str, epoch: int, epochs: int, latest: dict[str, Any]) -> None:
            if not running or running[-1] != cell:
                for shown in bars.tasks.values():
                    bars.progress.remove_task(shown)
                bars.tasks.clear()
                bars.progress.update(total, completed=len(running))
                running.append(cell)
            bars(f"{cell.experiment}, {cell.row}: {what}", epoch, epochs, latest)

        count = engine.run(plan, work, progress, only, limit)
        bars.progress.update(total, completed=count)
    return count


@app.command()
def report(directory: Path = typer.Argument(..., help="A folder of runs, or of results with cells/."),
           out: Path = typer.Option(None, help="Folder to write to; default the same.")) -> None:
    """Make report.html and pictures from saved results."""
    from . import report as reports

    try:
        console.print(str(reports.write(directory, out)), highlight=False)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


@app.command()
def demo(
    epochs: int = typer.Option(None, min=1, help="Epochs of training for each network; default as in the plan."),
    seeds: int = typer.Option(None, min=1, help="Students per row; default as in the plan."),
    out: Path = typer.Option(Path("runs/demo"), help="Folder for all that is written."),
) -> None:
    """Distil on scikit-learn's digits, as a static graph and as point clouds, and write a report."""
    try:
        from . import demo as demonstration
        from .distill import CheckpointError, ConfigError, Stopped
    except ImportError as error:
        _fail(error)
    try:
        plan = demonstration.prepare(out, epochs, seeds)
        _run(plan, out / "work")
        console.print(f"Report: [bold]{demonstration.finish(plan, console)}[/]", highlight=False)
    except Stopped as stop:
        console.print(str(stop))
        raise typer.Exit(130) from None
    except (ConfigError, CheckpointError, ValueError, OSError) as error:
        _fail(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
