"""What the commands of all studies share: bars, errors in one line, and the folder of a run."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # the list of commands needs none of it
    from ..runtime.world import World
    from .study import Study

__all__ = ["Bars", "Session", "console", "guarded", "say", "session"]

P = ParamSpec("P")
T = TypeVar("T")
console = Console()


def say(text: str) -> None:
    """Prints a line as it is: names are no markup, and a command can be copied whole."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def guarded(command: Callable[P, T]) -> Callable[P, T]:
    """A command that ends in one line, whatever is wrong: 130 where it was stopped, else 2. FASTKD_TRACEBACK=1 shows
    where an error comes from."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as stop:  # Stopped says where to go on
            say(str(stop) or "interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("FASTKD_TRACEBACK"):
                raise
            text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            if not isinstance(error, _expected()):
                text = f"{type(error).__name__}: {text} (not foreseen: FASTKD_TRACEBACK=1 shows where it comes from)"
            stderr = Console(stderr=True, soft_wrap=True)
            stderr.print(f"[bold red]error:[/] {escape(text or type(error).__name__)}", highlight=False)
            raise typer.Exit(2) from None

    return run


def _expected() -> tuple[type[Exception], ...]:
    """Errors whose message says what is wrong and what to do."""
    from ..runtime.checkpoint import CheckpointError
    from ..runtime.world import RankLost

    return (CheckpointError, RankLost, ValueError, TypeError, OSError, ImportError, ArithmeticError)


class Bars:
    """One bar per network that is trained, with its latest validation score, and per search, with the best so far."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._drawn = 0.0

    def __call__(self, what: str, done: int, total: int, latest: dict[str, Any]) -> None:
        if what not in self._tasks:
            self._tasks[what] = self.progress.add_task(what, total=total, shown="")
        if done < total and time.monotonic() - self._drawn < 0.1:
            return  # drawing takes longer than an epoch of a small network
        self._drawn = time.monotonic()
        shown = f"val {latest['val']:.2f} %" if "val" in latest else ""
        if "generation" in latest:
            shown = f"best {latest['best']:.4g}, {latest['evaluations']:,} evaluated"
        self.progress.update(self._tasks[what], completed=done, shown=shown)

    def clear(self) -> None:
        """Takes all bars away."""
        for task in self._tasks.values():
            self.progress.remove_task(task)
        self._tasks.clear()


@dataclass
class Session:
    """A command's run in its folder, which it holds."""

    study: Study
    config: Any
    directory: Path
    world: World
    bars: Bars
    curves: Callable[..., None] | None
    trusted: Collection[str]

    def progress(self, what: str, done: int, total: int, latest: dict[str, Any]) -> None:
        """Draws the bars, and writes the curves."""
        self.bars(what, done, total, latest)
        if self.curves is not None:
            self.curves(what, done, total, latest)

    def records(self, seeds: int) -> list[dict[str, Any]]:
        """A run per seed, from 0 on."""
        from .study import Options

        def run(seed: int) -> dict[str, Any]:
            def progress(what: str, done: int, total: int, latest: dict[str, Any]) -> None:
                name = what if seeds == 1 or self.study.names_seeds else f"{what}, seed {seed}"
                self.progress(name, done, total, latest)

            folder = self.directory / f"seed{seed}"
            tensorboard = None if self.curves is None else folder / "tensorboard"
            options = Options(self.world.device, self.world, self.trusted, tensorboard)
            return self.study.run(self.config, seed, folder, self.directory, progress, options)

        with self.bars.progress:
            return [run(seed) for seed in range(seeds)]

    def show(self, table: Table) -> None:
        """Prints a table, and where everything is."""
        console.print(table)
        report = shlex.join(["fastkd", "report", str(self.directory)])
        say(f"{self.directory}: config.json, {self.study.files}. `{report}` draws it.")


@contextlib.contextmanager
def session(
    key: str,
    recipe: str,
    changes: list[str],
    *,
    seeds: int,
    out: Path | None,
    resume: Path | None,
    device: str,
    tensorboard: bool,
) -> Iterator[Session]:
    """The folder of a run, ready and held; a stop inside says how to go on.

    Args:
        key: of the study in :data:`fastkd.lab.study.STUDIES`.
        changes: KEY=VALUE over the recipe, or over the configuration of the folder that is gone on with.
    """
    from ..runtime.stopping import Stopped
    from ..runtime.world import World
    from .settings import ConfigError
    from .study import study as study_of
    from .tensorboard import TensorBoard

    study = study_of(key)
    if resume is not None and out is not None:
        raise ConfigError(f"--resume {resume} goes on in that folder: leave out --out {out}")
    directory = resume or out or Path("runs") / study.command / Path(recipe).stem
    world = World.from_environment(device)
    console.quiet = world.rank > 0
    curves = TensorBoard(directory / "tensorboard") if tensorboard else None
    config = world.first(
        lambda: study.load(recipe, changes) if resume is None else _begun(study, recipe, resume, changes)
    )
    trusted = [change.partition("=")[2] for change in changes if change.startswith("model.name=")]
    try:
        with world.alone(directory):
            if resume is None:
                world.first(lambda: _begin(study, recipe, directory, config))
            if words := study.describe(config):
                say(words)
            yield Session(study, config, directory, world, Bars(), curves, trusted)
    except Stopped as stop:
        command = ["fastkd", study.command, recipe, "--resume", str(directory), "--seeds", str(seeds)]
        raise Stopped(f"{stop}: {shlex.join(command)}") from None
    world.close()


def _begin(study: Study, recipe: str, directory: Path, config: Any) -> None:
    """Keeps the configuration for --resume; never that of a run in place of another's."""
    from ..runtime.checkpoint import CheckpointError, differences, read_json, write_json
    from .stage import some

    file, content = directory / "config.json", config.model_dump(mode="json")
    begun = [*directory.glob("seed*/result.json"), *directory.glob("seed*/*.safetensors")]
    if file.exists() and begun:
        theirs = read_json(file)
        made_by = _made_by(theirs)
        if made_by["command"] not in (study.command, None):
            raise CheckpointError(
                f"{directory} holds a run of fastkd {made_by['command']}, and this is fastkd {study.command}: take "
                "another --out"
            )
        if found := differences(theirs, content):
            raise CheckpointError(
                f"{directory} holds a run of another configuration: {some(found)}. Take another --out, or go on with "
                f"that one: --resume {shlex.quote(str(directory))}"
            )
    write_json(file, {**content, "made_by": {"command": study.command, "recipe": recipe}})


def _begun(study: Study, recipe: str, directory: Path, changes: list[str]) -> Any:
    """The configuration that a run was begun with."""
    from ..runtime.checkpoint import read_json
    from .settings import ConfigError

    file = directory / "config.json"
    if not file.exists():
        raise ConfigError(
            f"--resume {directory}: there is no {file}: the folder holds no run of fastkd {study.command}"
        )
    content = read_json(file)
    made_by = _made_by(content)
    if made_by["command"] not in (study.command, None):
        raise ConfigError(
            f"--resume {directory}: the folder holds a run of fastkd {made_by['command']}, and this is fastkd "
            f"{study.command}"
        )
    theirs = made_by["recipe"]
    if theirs is not None and Path(theirs).stem != Path(recipe).stem:
        raise ConfigError(f"--resume {directory}: that run was begun with the recipe {theirs!r}, got {recipe!r}")
    return study.load(content, changes)


def _made_by(content: dict[str, Any]) -> dict[str, str | None]:
    """Takes command and recipe from the content of a config.json; of folders of 0.1, the command by the keys."""
    found = content.pop("made_by", None)
    if isinstance(found, dict):
        return {"command": found.get("command"), "recipe": found.get("recipe")}
    command = "distill" if "teacher" in content else "compress" if "model" in content else None
    return {"command": command, "recipe": None}
