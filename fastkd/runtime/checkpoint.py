"""Files that are whole or absent: tensors in safetensors, everything else in JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from . import atomic, tensorfile

__all__ = ["Busy", "CheckpointError", "alone", "differences", "load", "read_json", "replace", "save", "write_json"]

_REMEDY = ": it is left as it is; delete it to start anew, or put a copy in its place"


class CheckpointError(RuntimeError):
    """A file of a run that cannot be read or written, or does not belong here."""


class Busy(CheckpointError):
    """Another process is at work in the folder."""


_held: set[Path] = set()


def _lock(folder: Path) -> int:
    """An open file that is locked as long as it is open: the folder itself, so that nothing is left in it; where a
    file system locks no folders (NFS), the file ``.lock`` in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be the folder of a run ({error})") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            raise
        except OSError:
            os.close(handle)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            warnings.warn(
                f"{folder}: its file system has no locks ({error}), so that nothing keeps a second process from the "
                "same run: start only one",
                RuntimeWarning,
                stacklevel=4,
            )
        return handle
    except BlockingIOError:
        os.close(handle)
        raise Busy(
            f"{folder}: another process is at work there. Wait for it, end it, or take another directory"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be the folder of a run ({error})") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder of a run, which is made if need be. The system lets go of what a process
    held that ended, however it ended. What this process holds already is free.

    Raises:
        Busy: another process holds it.
        CheckpointError: it cannot be made or opened.
    """
    folder = folder.resolve()
    if folder in _held:
        yield
        return
    handle = _lock(folder)
    _held.add(folder)
    try:
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


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file of a run: the one reader for all of them.

    Raises:
        CheckpointError: there is no such file, or it is damaged; the message names it and says what to do.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} where a finite number should be")

    try:
        content = json.loads(path.read_bytes().decode(), parse_constant=refuse)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of a mapping")
    except FileNotFoundError:
        raise CheckpointError(f"no file {path}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is damaged (nested too deep){_REMEDY}") from None
    except (OSError, ValueError) as error:  # not UTF-8 and not JSON are values, too
        raise CheckpointError(f"{path} is damaged ({error}){_REMEDY}") from None
    return content


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
        raise CheckpointError(f"{error}{_REMEDY}") from None
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
