"""Files that are whole or absent: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from . import atomic, tensorfile

__all__ = ["Busy", "CheckpointError", "alone", "differences", "load", "replace", "result", "save", "write_json"]


class CheckpointError(RuntimeError):
    """A file of a run that cannot be read or written, or does not belong here."""


class Busy(CheckpointError):
    """Another process is at work in the folder."""


_held: set[Path] = set()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder of a run, which is made if need be. Nothing is left in it, and the system
    lets go of what a process held that ended, however it ended. What this process holds already is free.

    Raises:
        Busy: another process holds it.
        CheckpointError: it cannot be made or opened.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be the folder of a run ({error})") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(
                f"{folder}: another process is at work there. Wait for it, end it, or take another directory"
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        _held.add(folder)
        yield
    finally:
        _held.discard(folder)
        os.close(handle)


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """:func:`fastkd.runtime.atomic.replace`.

    Raises:
        CheckpointError: the disk is full, or whatever else the system says.
    """
    kept = "the one from before is whole" if path.exists() else "there was none before"
    try:
        atomic.replace(path, write)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}); {kept}. When that is put right, the same "
            "command goes on from the last checkpoint"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A line per key: a record's history has thousands of numbers."""
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    replace(path, lambda p: p.write_text(f"{{{lines}}}\n"))


def result(path: Path, config: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The record of a finished run, if it is there.

    Raises:
        CheckpointError: it is of another configuration; lists the differences.
    """
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    if found := differences({**record["config"], "seed": record["seed"]}, {**config, "seed": seed}):
        raise CheckpointError(
            f"{path} holds the result of another configuration: " + "; ".join(found) + ". Take another directory"
        )
    return record


def save(path: Path, tensors: dict[str, Tensor], state: Any, previous: Path | None = None) -> None:
    """One file, so that tensors and state are always of the same moment: the JSON of `state` is the
    metadata of the safetensors file.

    Args:
        previous: where the file that was at `path` goes, once the new one is written.
    """
    text = json.dumps(state)

    def write(part: Path) -> None:
        tensorfile.write(part, tensors, text)
        if previous is not None and path.exists():
            path.replace(previous)

    replace(path, write)


def load(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the state of a file that :func:`save` wrote.

    Raises:
        CheckpointError: it is not there, damaged, or not one of these.
    """
    try:
        tensors, text = tensorfile.read(path)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except tensorfile.DamagedFile as error:
        raise CheckpointError(
            f"{error}: it is left as it is; delete it to start anew, or put a copy in its place"
        ) from None
    if text is None:
        raise CheckpointError(f"{path} was not written by fastkd: it has no state in its metadata")
    return tensors, json.loads(text)


def differences(theirs: Any, ours: Any, key: str = "", *, there: str = "there", here: str = "here") -> list[str]:
    """Of two nested mappings, in words."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        out = []
        for k in dict.fromkeys((*theirs, *ours)):
            out += differences(theirs.get(k), ours.get(k), f"{key}.{k}" if key else k, there=there, here=here)
        return out
    return [] if theirs == ours else [f"{key} is {theirs!r} {there} and {ours!r} {here}"]
