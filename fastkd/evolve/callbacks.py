"""What shows a search as it goes on: curves for TensorBoard, and a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..runtime.curves import Curves
from .result import Callback, Result

__all__ = ["TensorBoard", "progress_bar"]


class TensorBoard(Curves):
    """A callback that writes every number of the history as a scalar, by generation:
    ``evolve(evaluator, fitness, callback=TensorBoard("runs/first/tensorboard"))``.

    After a resume, one that is created for the same folder goes on with the same curves. Under torchrun, give it to
    rank 0 alone.

    Raises:
        ImportError: there is no tensorboard.
    """

    def __call__(self, result: Result) -> None:
        latest = result.history[-1]
        scalars = {
            name: value for name, value in latest.items() if name not in ("generation", "mask") and value is not None
        }
        self.write("evolution", result.generation, scalars)


@contextlib.contextmanager
def progress_bar(wanted: bool, name: str, generations: int, done: int) -> Iterator[Callback]:
    """A callback that moves a bar; where none is wanted, one that does nothing."""
    if not wanted:
        yield lambda result: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    ) as progress:
        task = progress.add_task(name, total=generations, completed=done, shown="")

        def update(result: Result) -> None:
            cost = ""
            if result.full_cost and result.best_cost is not None:
                cost = f", cost {result.best_cost / result.full_cost:.1%}"
            progress.update(
                task,
                completed=result.generation,
                shown=f"best {result.best_score:.4g} (quality {result.best_quality:.4g}{cost})",
            )

        yield update
