"""The command line: ``fastkd info``, ``distill``, ``compress``, ``report``, ``grid`` and ``demo``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .config import show_config

app = typer.Typer(
    help="Fast, exact knowledge distillation for PyTorch.",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
    """One bar per network that is trained, with its latest validation score, and per search, with the best so far."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
        )
        self.tasks: dict[str, Any] = {}
        self.shown = 0.0

    def __call__(self, what: str, epoch: int, epochs: int, latest: dict[str, Any]) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=epochs, shown="")
        if epoch < epochs and time.monotonic() - self.shown < 0.1:
            return  # drawing takes longer than an epoch of a small network
        self.shown = time.monotonic()
        shown = f"val {latest['val']:.2f} %" if "val" in latest else ""
        if "generation" in latest:
            shown = f"best {latest['best']:.4g}, {latest['evaluations']:,} evaluated"
        self.progress.update(self.tasks[what], completed=epoch, shown=shown)


def _begin(file: Path, config: Any) -> None:
    """Keeps the configuration for --resume; never that of a run in place of another's."""
    from .runtime.checkpoint import CheckpointError, differences, write_json

    own, folder = config.model_dump(mode="json"), file.parent
    seeds = [*folder.glob("seed*/result.json"), *folder.glob("seed*/*.safetensors")]
    if file.exists() and seeds and (found := differences(json.loads(file.read_text()), own)):
        raise CheckpointError(
            f"{folder} holds a run of another configuration: "
            + "; ".join(found)
            + f". Take another --out, or go on with that one: --resume {folder}"
        )
    write_json(file, own)


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
    from .distill import CheckpointError, ConfigError, RankLost, Stopped, TensorBoard, World, load_config, runs

    directory = resume or out or Path("runs") / Path(recipe).stem
    begun = directory / "config.json"

    def load() -> Any:
        if resume is None:
            return load_config(recipe, settings)
        if not begun.exists():
            raise ConfigError(f"--resume {resume}: there is no {begun}: the folder holds no run of fastkd distill")
        return load_config(json.loads(begun.read_text()), settings)

    try:
        curves = TensorBoard(directory / "tensorboard") if tensorboard else None
        world = World.from_environment(device)
        console.quiet = world.rank > 0
        config = world.first(load) if resume is not None else load()
        if resume is None:
            world.first(lambda: _begin(begun, config))
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
                    records.append(
                        runs.distil(
                            config,
                            seed,
                            directory / f"seed{seed}",
                            task=task,
                            progress=progress,
                            device=world.device,
                            teachers=directory,
                            world=world,
                        )
                    )
                record = records[0]["teacher"]
        console.print(_table(record, records, config))
        console.print(
            f"[bold]{directory}[/]: config.json, the teacher, and per seed result.json and "
            f"weights.safetensors. `fastkd report {directory}` makes pictures of it."
        )
        world.close()
    except Stopped as stop:
        console.print(f"{stop}: fastkd distill {recipe} --resume {directory} --seeds {seeds}")
        raise typer.Exit(130) from None
    except (ConfigError, CheckpointError, RankLost, ValueError, OSError, ImportError) as error:
        _fail(error)


def _table(teacher: dict[str, Any], records: list[dict[str, Any]], config: Any) -> Table:
    from .distill.record import Network
    from .distill.tables import trained

    label = " + ".join(name for name, loss in config.losses.items() if loss.weight) or "labels alone"
    students = {f"student ({label})": [Network.model_validate(r["student"]) for r in records]} if records else {}
    return trained(f"{config.data}, test part", Network.model_validate(teacher), students).terminal()


@app.command()
def compress(
    recipe: str = typer.Argument(..., help="Name of a recipe (see `fastkd recipes`) or path to a YAML file."),
    settings: list[str] = typer.Option([], "--set", help="KEY=VALUE laid over it, e.g. fitness.images=500."),
    budget: list[str] = typer.Option(
        [], help="COST=FRACTION that may be left, in place of the recipe's: macs=0.4; macs, parameters or filters."
    ),
    weights: str = typer.Option(None, help="The full network's: an .npz or .safetensors file."),
    algorithm: str = typer.Option(None, help="ecs, ga, ga-widths, nsga2, ...; or a control: l1, torch-pruning."),
    seeds: int = typer.Option(1, min=1, help="Networks, with the seeds 0, 1, ..."),
    out: Path = typer.Option(None, help="Folder for all that is written; default runs/<recipe>."),
    resume: Path = typer.Option(None, help="Go on in this folder, with the configuration it was begun with."),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:N."),
    tensorboard: bool = typer.Option(False, "--tensorboard", help="Write curves into the folder's tensorboard/."),
) -> None:
    """Search for a smaller network, fine-tune it, export it, and measure what is gained.

    Your own network and images: fastkd compress digits --set model.name=MODULE:FUNCTION --set data=FILE.npz
    --weights FILE.safetensors. On several processes: torchrun --nproc-per-node 2 -m fastkd compress RECIPE."""
    try:
        from . import compress as engine
        from .compress.record import CompressRecord
        from .compress.tables import before_and_after
        from .evolve import TensorBoard
        from .runtime.curves import Curves
    except ImportError as error:
        _fail(error)
    directory = resume or out or Path("runs") / Path(recipe).stem
    begun = directory / "config.json"
    changes = [
        *settings,
        *([f"weights={json.dumps(weights)}"] if weights else []),
        *([f"algorithm.name={algorithm}"] if algorithm else []),
        *(["budget={}"] if budget else []),
        *(f"budget.{b}" for b in budget),
    ]

    def load() -> Any:
        if resume is None:
            return engine.load_config(recipe, changes)
        if not begun.exists():
            raise engine.ConfigError(
                f"--resume {resume}: there is no {begun}: the folder holds no run of fastkd compress"
            )
        return engine.load_config(json.loads(begun.read_text()), changes)

    try:
        curves = Curves(directory / "tensorboard") if tensorboard else None
        world = engine.World.from_environment(device)
        console.quiet = world.rank > 0
        config = world.first(load)
        if resume is None:
            world.first(lambda: _begin(begun, config))
        bars = _Bars()

        def progress(seed: int, what: str, done: int, total: int, latest: dict[str, Any]) -> None:
            name = what if seeds == 1 else f"{what}, seed {seed}"
            bars(name, done, total, latest)
            if curves is not None and "epoch" in latest:
                curves.write(name, latest["epoch"], {key: latest[key] for key in ("loss", "val", "lr")})

        records = []
        with bars.progress:
            for seed in range(seeds):
                folder = directory / f"seed{seed}"
                records.append(
                    engine.compress(
                        config,
                        seed,
                        folder,
                        shared=directory,
                        device=world.device,
                        world=world,
                        progress=lambda *latest, seed=seed: progress(seed, *latest),
                        callback=TensorBoard(folder / "tensorboard") if tensorboard and world.rank == 0 else None,
                    )
                )
        table = before_and_after([CompressRecord.model_validate(record) for record in records])
        console.print(table.terminal(box=None, pad_edge=False, padding=(0, 1), header_style="bold"))
        console.print(
            f"[bold]{directory}[/]: config.json, and per seed result.json, weights.safetensors (read by "
            "fastkd.population.load), model.onnx and model-int8.onnx. "
            f"`fastkd report {directory}` draws the search."
        )
        world.close()
    except engine.Stopped as stop:
        console.print(f"{stop}: fastkd compress {recipe} --resume {directory} --seeds {seeds}")
        raise typer.Exit(130) from None
    except (
        engine.ConfigError,
        engine.CheckpointError,
        engine.RankLost,
        ValueError,
        TypeError,
        OSError,
        ImportError,
        ArithmeticError,
    ) as error:
        _fail(error)


@app.command()
def recipes() -> None:
    """List the configurations that come with the package."""
    from .lab.settings import read

    for command in ("distill", "compress"):
        folder = Path(__file__).parent / command / "recipes"
        table = Table(title=f"fastkd {command}", title_justify="left")
        for heading in ("recipe", "data", "networks", "what"):
            table.add_column(heading)
        for path in sorted(folder.glob("*.yaml")):
            content = read(folder, path.stem)
            if command == "distill":
                networks = f"{content['teacher']['model']['name']} to {content['student']['model']['name']}"
                what = ", ".join(f"{k} x {loss['weight']:g}" for k, loss in content["losses"].items())
            else:
                networks = content["model"]["name"]
                what = ", ".join(f"{share:.1%} of the {name}" for name, share in content.get("budget", {}).items())
                what += f" by {content['algorithm']['name']}"
            table.add_row(path.stem, content["data"], networks, what)
        console.print(table)


@app.command()
def grid(
    plan: Path = typer.Argument(..., help="A plan file, such as results/plan.yaml."),
    only: str = typer.Option(None, help="One experiment of the plan."),
    limit: int = typer.Option(None, min=1, help="Run so many cells at most."),
    work: Path = typer.Option(Path("runs/grid"), help="Folder for checkpoints and teachers."),
    table: bool = typer.Option(False, "--table", help="Only write the table anew."),
    measure: bool = typer.Option(
        False,
        "--measure",
        help="Run no cell; measure latency and memory of the networks of "
        "finished ones anew, all on this machine. Let nothing else "
        "run.",
    ),
    device: str = typer.Option("cpu", help="cpu, cuda or cuda:N."),
) -> None:
    """Run the missing cells of a table of experiments; of finished ones, --measure alone changes the timings.

    Started several times with the same --work, the processes share the cells."""
    from .lab import plan as engine
    from .lab.settings import ConfigError
    from .runtime.checkpoint import CheckpointError
    from .runtime.stopping import Stopped

    try:
        content = engine.Plan(plan)
        if table:
            console.print(str(engine.write_table(content)), highlight=False)
            return
        if measure:
            with Progress(console=console) as bars:
                task = bars.add_task("measured", total=None)
                count = engine.measure(
                    content, lambda done, total: bars.update(task, completed=done, total=total), only, device
                )
            console.print(f"{count} cells measured; {content.path.parent / 'RESULTS.md'}", highlight=False)
            return
        count = _run(content, work, only, limit, device)
        console.print(f"{count} cells run; {engine.write_table(content)}", highlight=False)
    except Stopped as stop:
        console.print(str(stop))
        raise typer.Exit(130) from None
    except (ConfigError, CheckpointError, ValueError, OSError, ImportError) as error:
        _fail(error)


def _run(plan: Any, work: Path, only: str | None = None, limit: int | None = None, device: str = "cpu") -> int:
    """The missing cells of a plan, with bars; returns how many were run."""
    from .lab import plan as engine

    missing = len(plan.missing(only))
    bars, latest_cell = _Bars(), None
    with bars.progress:
        total = bars.progress.add_task("cells", total=min(missing, limit or missing), shown="")

        def progress(cell: Any, what: str, epoch: int, epochs: int, latest: dict[str, Any]) -> None:
            nonlocal latest_cell
            bars.progress.update(total, shown=what if what == engine.WAITS else "")
            if what == engine.WAITS:
                return
            if cell != latest_cell:
                for shown in bars.tasks.values():
                    bars.progress.remove_task(shown)
                bars.tasks.clear()
                bars.progress.update(total, completed=missing - len(plan.missing(only)))  # others may run some too
                latest_cell = cell
            bars(f"{cell.experiment.name}, {cell.row}: {what}", epoch, epochs, latest)

        count = engine.run(plan, work, progress, only, limit, device)
        bars.progress.update(total, completed=count)
    return count


@app.command()
def report(
    directory: Path = typer.Argument(..., help="A folder of runs, or of results with cells/."),
    out: Path = typer.Option(None, help="Folder to write to; default the same."),
) -> None:
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
    """Distil and compress on scikit-learn's digits, and write a report."""
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
    except (ConfigError, CheckpointError, ValueError, OSError, ImportError) as error:
        _fail(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
