"""The command line: ``fastkd info``, ``distill``, ``compress``, ``recipes``, ``grid``, ``report`` and ``demo``.

Every command imports what it needs itself, so that the list of commands is there at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from .lab.command import Bars, console, guarded, say, session

app = typer.Typer(
    help="Fast, exact knowledge distillation for PyTorch.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[str, typer.Argument(help="Name of a recipe (see `fastkd recipes`) or path to a YAML file.")]
Changes = Annotated[list[str], typer.Option("--set", help="KEY=VALUE laid over it, e.g. student.train.epochs=100.")]
Seeds = Annotated[int, typer.Option(min=1, help="Runs, with the seeds 0, 1, ...")]
Out = Annotated[Path | None, typer.Option(help="Folder for all that is written; default runs/<command>/<recipe>.")]
Resume = Annotated[Path | None, typer.Option(help="Go on in this folder, with the configuration it was begun with.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Curves = Annotated[bool, typer.Option("--tensorboard", help="Write curves into the folder's tensorboard/.")]


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"fastkd {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        info()


@app.command()
@guarded
def info() -> None:
    """Print versions, CUDA support, instruction set and threads."""
    from .config import show_config

    table = Table(title="fastkd", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for key, value in show_config().items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        table.add_row(key, " ".join(value) or "-" if isinstance(value, list) else "-" if value is None else str(value))
    console.print(table)


@app.command()
@guarded
def distill(
    recipe: Recipe,
    settings: Changes = [],  # noqa: B006
    seeds: Seeds = 1,
    out: Out = None,
    resume: Resume = None,
    device: Device = "cpu",
    teacher_only: Annotated[bool, typer.Option(help="Train, or find, the teacher and stop.")] = False,
    tensorboard: Curves = False,
) -> None:
    """Train a teacher, if there is none yet, and distil it into students.

    On several processes: torchrun --nproc-per-node 2 -m fastkd distill RECIPE."""
    with session(
        "recipe", recipe, settings, seeds=seeds, out=out, resume=resume, device=device, tensorboard=tensorboard
    ) as run:
        if teacher_only:
            from .distill.study import STUDY

            with run.bars.progress:
                teacher = STUDY.teacher(run.config, run.directory, run.progress, run.world)
            run.show(STUDY.teacher_table(run.config, teacher))
        else:
            run.show(run.study.table(run.records(seeds)))


@app.command()
@guarded
def compress(
    recipe: Recipe,
    settings: Changes = [],  # noqa: B006
    budget: Annotated[
        list[str],
        typer.Option(
            help="COST=FRACTION that may be left, in place of the recipe's: macs=0.4; macs, parameters or filters."
        ),
    ] = [],  # noqa: B006
    weights: Annotated[str | None, typer.Option(help="The full network's: an .npz or .safetensors file.")] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="ecs, ga, ga-widths, nsga2, ...; or a control: l1, torch-pruning.")
    ] = None,
    seeds: Seeds = 1,
    out: Out = None,
    resume: Resume = None,
    device: Device = "cpu",
    tensorboard: Curves = False,
) -> None:
    """Search for a smaller network, fine-tune it, export it, and measure what is gained.

    Your own network and images: fastkd compress digits --set model.name=MODULE:FUNCTION --set data=FILE.npz
    --weights FILE.safetensors. On several processes: torchrun --nproc-per-node 2 -m fastkd compress RECIPE."""
    changes = [
        *settings,
        *([f"weights={json.dumps(weights)}"] if weights else []),
        *([f"algorithm.name={algorithm}"] if algorithm else []),
        *(["budget={}"] if budget else []),
        *(f"budget.{b}" for b in budget),
    ]
    with session(
        "compress", recipe, changes, seeds=seeds, out=out, resume=resume, device=device, tensorboard=tensorboard
    ) as run:
        run.show(run.study.table(run.records(seeds)))


@app.command()
@guarded
def recipes() -> None:
    """List the configurations that come with the package."""
    from .lab.settings import read
    from .lab.study import STUDIES, study

    for key in STUDIES:
        kind = study(key)
        table = Table(title=f"fastkd {kind.command}", title_justify="left")
        for heading in ("recipe", "data", "networks", "what"):
            table.add_column(heading)
        for path in sorted(kind.recipes.glob("*.yaml")):
            content = read(kind.recipes, path.stem)
            table.add_row(path.stem, content["data"], *kind.outline(content))
        console.print(table)


@app.command()
@guarded
def grid(
    plan: Annotated[Path, typer.Argument(help="A plan file, such as results/plan.yaml.")],
    only: Annotated[str | None, typer.Option(help="One experiment of the plan.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Run so many cells at most.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and teachers.")] = Path("runs/grid"),
    table: Annotated[bool, typer.Option("--table", help="Only write the table anew.")] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run no cell; measure latency and memory of the networks of finished ones anew, all on this machine. "
            "Let nothing else run.",
        ),
    ] = False,
    device: Device = "cpu",
) -> None:
    """Run the missing cells of a table of experiments; of finished ones, --measure alone changes the timings.

    Started several times with the same --work, the processes share the cells."""
    from .lab import plan as engine

    content = engine.Plan(plan)
    if table:
        say(str(engine.write_table(content)))
    elif measure:
        with Progress(console=console) as bars:
            task = bars.add_task("measured", total=None)
            count = engine.measure(
                content, lambda done, total: bars.update(task, completed=done, total=total), only, device
            )
        say(f"{count} cells measured; {content.path.parent / 'RESULTS.md'}")
    else:
        count = run_plan(content, work, only, limit, device)
        say(f"{count} cells run; {engine.write_table(content)}")


def run_plan(plan: Any, work: Path, only: str | None = None, limit: int | None = None, device: str = "cpu") -> int:
    """The missing cells of a plan, with bars; returns how many were run."""
    from .lab import plan as engine

    missing = len(plan.missing(only))
    bars, latest_cell = Bars(), None
    with bars.progress:
        total = bars.progress.add_task("cells", total=min(missing, limit or missing), shown="")

        def progress(cell: Any, what: str, done: int, steps: int, latest: dict[str, Any]) -> None:
            nonlocal latest_cell
            bars.progress.update(total, shown=what if what == engine.WAITS else "")
            if what == engine.WAITS:
                return
            if cell != latest_cell:
                bars.clear()
                bars.progress.update(total, completed=missing - len(plan.missing(only)))  # others may run some too
                latest_cell = cell
            bars(f"{cell.experiment.name}, {cell.row}: {what}", done, steps, latest)

        count = engine.run(plan, work, progress, only, limit, device)
        bars.progress.update(total, completed=count)
    return count


@app.command()
@guarded
def report(
    directory: Annotated[Path, typer.Argument(help="A folder of runs, or of results with cells/.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default the same.")] = None,
) -> None:
    """Make report.html and pictures from saved results."""
    from . import report as reports

    say(str(reports.write(directory, out)))


@app.command()
@guarded
def demo(
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of training for each network; default as in the plan.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Students per row; default as in the plan.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for all that is written.")] = Path("runs/demo"),
) -> None:
    """Distil and compress on scikit-learn's digits, and write a report."""
    from . import demo as demonstration

    plan = demonstration.prepare(out, epochs, seeds)
    run_plan(plan, out / "work")
    say(f"Report: {demonstration.finish(plan, console)}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
