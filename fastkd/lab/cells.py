"""The records of experiments: of each a file ``cells/<experiment>.jsonl``, a line per record with its row and seed.

Records are shortened to what tables and pictures need (:meth:`fastkd.lab.record.Record.shortened`): ::

    {"row": "KD + LSP", "schema": 1, "seed": 0, "config": {...}, "student": {..., "history": {"epoch": [0, 1]}}}

A line is appended whole, under a lock. Of two of the same row and seed the later one counts. Records of older versions,
``cells/<experiment>/<row>/<seed>.json``, are read beside it, and written to it when they change.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from .._text import slug
from ..runtime import checkpoint
from . import record as records
from .record import DamagedError, Record
from .settings import ConfigError

__all__ = ["Cells", "experiments"]

PATIENCE = 60.0  # seconds, for other processes that append
Key = tuple[str, int]
"""The slug of a row, and a seed."""


def experiments(folder: Path) -> list[str]:
    """The names of those that have records in a folder ``cells``."""
    names = {file.stem for file in folder.glob("*.jsonl")} | {file.parts[-3] for file in folder.glob("*/*/*.json")}
    return sorted(names)


class Cells:
    """The records of one experiment.

    Args:
        folder: ``cells``, beside the plan.

    Raises:
        ConfigError: the experiment's name cannot be that of a file.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        if not re.fullmatch(r"[^./\\\s][^/\\\0-\x1f]*", experiment):
            raise ConfigError(
                "an experiment's name is that of a file: without '/' and '\\', not empty, and beginning with neither a "
                f"space nor a full stop, got {experiment!r}"
            )
        self.folder = folder
        self.file = folder / f"{experiment}.jsonl"
        self.older = folder / experiment
        self._notices: list[str] = []
        self._names: dict[str, str] = {}
        self._found: dict[Key, Record] = {}
        self._old: tuple[dict[Key, Record], list[str]] | None = None
        self._stamp: tuple[int, int, int] | None = None

    @property
    def notices(self) -> list[str]:
        """What is left out, and why."""
        self._read()
        return self._notices

    def rows(self) -> dict[str, list[Record]]:
        """The records of every row, by seed, under the slug of its name."""
        found, rows = self._read(), dict[str, list[Record]]()
        for name, seed in sorted(found):
            rows.setdefault(name, []).append(found[name, seed])
        return rows

    def row(self, name: str) -> list[Record]:
        """By seed, also of seeds beyond the plan's."""
        return self.rows().get(slug(name), [])

    def name(self, row: str) -> str:
        """Of the row with this slug, as it was when its last record was written."""
        self._read()
        return self._names.get(row, row.replace("-", " "))

    def find(self, row: str, seed: int) -> Record | None:
        return self._read().get((slug(row), seed))

    def append(self, row: str, record: Record) -> None:
        """Writes a record, shortened, at the end.

        Raises:
            CheckpointError: it cannot be written; or another process holds the folder.
        """
        line = self._line(row, record)
        with _alone(self.folder), _writing(self.file), open(self.file, "a+b") as file:
            file.seek(0)
            before = file.read()
            kept, _ = _split(before)
            file.truncate(len(kept))  # without what a crash has left
            file.write((b"" if not kept or kept.endswith(b"\n") else b"\n") + line)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, row: str, record: Record) -> None:
        """Writes a record in the place of the one of the same row and seed. The file is exchanged as a whole.

        Raises:
            CheckpointError: as for :meth:`append`.
        """
        key, line, lines, put = (slug(row), record.seed), self._line(row, record), list[bytes](), False
        with _alone(self.folder):
            kept, _ = _split(self.file.read_bytes() if self.file.exists() else b"")
            for before in filter(None, kept.split(b"\n")):
                if _key(before) != key:
                    lines.append(before + b"\n")
                elif not put:
                    lines.append(line)
                    put = True
            text = b"".join(lines if put else [*lines, line])
            checkpoint.replace(self.file, lambda path: path.write_bytes(text))

    def _line(self, row: str, record: Record) -> bytes:
        content = {"row": row, **record.shortened(self.row(row))}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    def _read(self) -> dict[Key, Record]:
        if self._old is None:
            self._old = self._of_older()
        try:
            stat = self.file.stat()
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        except FileNotFoundError:
            stamp = None
        if stamp != self._stamp or not self._found:
            known = set(self._notices)
            found, notices = ({}, []) if stamp is None else self._of_lines()
            self._found, self._stamp = {**self._old[0], **found}, stamp
            self._notices = [*self._old[1], *notices]
            for notice in self._notices:
                if notice not in known:
                    warnings.warn(notice, stacklevel=4)
        return self._found

    def _of_lines(self) -> tuple[dict[Key, Record], list[str]]:
        found, notices = dict[Key, Record](), list[str]()
        kept, cut = _split(self.file.read_bytes())
        for number, line in enumerate(kept.split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                content = records.decode(line)
                row = content.pop("row", None)
                if not isinstance(row, str):
                    raise DamagedError("no row")
                record = Record.parse(content, f"{self.file}, line {number},")
            except DamagedError as error:
                notices.append(left_out(f"{self.file}, line {number},", error, "delete the line and run it again"))
                continue
            found[slug(row), record.seed] = record
            self._names[slug(row)] = row
        if cut:
            notices.append(
                f"{self.file}: its last line is left out: it was cut, as by a crash. The next record takes its place."
            )
        return found, notices

    def _of_older(self) -> tuple[dict[Key, Record], list[str]]:
        found, notices = dict[Key, Record](), list[str]()
        for file in sorted(self.older.glob("*/*.json")):
            if not file.stem.isdigit():
                continue
            try:
                found[file.parent.name, int(file.stem)] = records.read(file)
            except DamagedError as error:
                notices.append(left_out(str(file), error))
        return found, notices


def left_out(name: str, error: DamagedError, remedy: str = records.REMEDY) -> str:
    return f"{name} is left out: it is no whole record ({error}); {remedy}."


def _key(line: bytes) -> Key | None:
    try:
        content = records.decode(line)
        return slug(content["row"]), content["seed"]
    except (DamagedError, KeyError, TypeError, AttributeError):
        return None


def _split(text: bytes) -> tuple[bytes, bytes]:
    """Whole lines, and what is left of a last one that was cut."""
    end = text.rfind(b"\n") + 1
    try:
        if text[end:].strip():
            records.decode(text[end:])  # an editor may drop the last line's end
            return text, b""
    except DamagedError:
        pass
    return text[:end], text[end:]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for processes that write at the same time."""
    until = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(checkpoint.alone(folder))
                break
            except checkpoint.Busy:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise checkpoint.CheckpointError(
            f"{file} could not be written ({error}); its lines from before are whole. When that is put right, the same "
            "command goes on"
        ) from error
