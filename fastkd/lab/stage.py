"""A stage of a study: its result is taken where it is there; else its folder is held, and the result is computed by one
run at a time and written at once, whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..runtime import checkpoint
from ..runtime.checkpoint import CheckpointError, differences
from ..runtime.world import World

__all__ = ["finished", "some", "stage", "trained_network"]

T = TypeVar("T")
Json = dict[str, Any]


def stage(world: World, folder: Path, find: Callable[[], T | None], compute: Callable[[], T]) -> T:
    """What `find` sees in the folder, on rank 0; where it sees nothing, what `compute` gives on all ranks, which writes
    what `find` will see.

    Raises:
        Busy: another run is at work in the folder.
    """
    found = world.first(find)
    if found is None:
        with world.alone(folder):
            found = world.first(find)  # another run may just have ended
            if found is None:
                found = compute()
    return found


def finished(file: Path, config: Json, seed: int) -> Json | None:
    """The record of a finished run, if it is there.

    Raises:
        CheckpointError: it is of another configuration (the message says what differs), or damaged.
    """
    if not file.exists():
        return None
    record = checkpoint.read_json(file)
    theirs = {**_mapping(record.get("config")), "seed": record.get("seed")}
    if found := differences(theirs, {**config, "seed": seed}):
        raise CheckpointError(
            f"{file} holds the result of another configuration: {some(found)}. Take another directory"
        )
    return record


def trained_network(
    folder: Path, model: nn.Module, train: Callable[[], Json], world: World, temporary: str = "checkpoint.safetensors"
) -> Json:
    """Gives the model the weights of a training that several runs need, and returns its record; the network is trained
    only where the folder does not hold it.

    Args:
        train: trains the model and returns the record.
        temporary: the file of the folder that is not needed any more once the network is trained.
    """
    weights = folder / "weights.safetensors"

    def compute() -> tuple[Any, Any]:
        record = train()

        def write() -> tuple[Any, Any]:
            checkpoint.save(weights, model.state_dict(), record)
            (folder / temporary).unlink(missing_ok=True)
            return checkpoint.load(weights)

        return world.first(write)

    record: Json
    tensors, record = stage(world, folder, lambda: checkpoint.load(weights) if weights.exists() else None, compute)
    model.load_state_dict(tensors)
    return record


def some(found: list[str], most: int = 3) -> str:
    """The first differences, and how many more there are."""
    rest = len(found) - most
    return "; ".join(found[:most]) + (f"; and {rest} more" if rest > 0 else "")


def _mapping(x: Any) -> Json:
    return x if isinstance(x, dict) else {}
