"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["replace"]

SUFFIX = ".part"


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside the file, waits for the disk, then takes its place: what was there before stays whole whatever
    happens on the way, and nothing else is left behind.

    A process that is killed leaves a folder ``.NAME.xxxxxxxx.part``, which the next writer of the same file removes.

    Args:
        write: called with a path of the same name, in a folder of its own. It may write other files there, which
            are removed.

    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     replace(Path(folder, "a.txt"), lambda part: part.write_text("whole"))
    ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
    [('a.txt', 'whole')]
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    with _workshop(path) as folder:
        part = folder / path.name
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)


@contextlib.contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A new folder beside the file, locked as long as this process lives: the system lets go of the lock of a process
    that is killed. It is a folder since a writer may put a new file in place of another, which would have no lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=SUFFIX))
        lock = _locked(folder, needed=False)
        if lock is not None:
            break  # else another writer took the new folder for an abandoned one
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Removes what writers of the same file left that were killed."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.????????{SUFFIX}"):
        lock = _locked(folder, needed=True)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path, needed: bool) -> int | None:
    """A handle that holds the lock of a folder until it is closed; None if another process holds it, or the folder is
    gone. Some network file systems have no locks: then the handle without one, or None if it is needed."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there = os.path.samestat(os.fstat(handle), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        there = False
    except OSError:
        there = not needed
    if there:
        return handle
    os.close(handle)
    return None
