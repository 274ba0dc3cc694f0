"""The records of experiments: of each a file ``cells/<experiment>.jsonl``, a line per record with its row and seed.

Records are shortened to what tables and pictures need (:meth:`fastkd.lab.record.Record.shortened`): ::

    {"row": "KD + LSP", "schema": 1, "seed": 0, "config": {...}, "student": {..., "history": {"epoch": [0, 1]}}}

The file is exchanged as a whole, under a lock. Of two lines of the same row and seed the later one counts. Records of
older versions, ``cells/<experiment>/<row>/<seed>.json``, are read beside it, and written to it when they change.
"""

from __future__ import annotations

import contextlib
import json
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
        self._stamp: tuple[int, ...] | None = None  # of the file when it was read last

    @property
    def notices(self) -> list[str]:
        """What is left out, and why."""
        self._read()
        return self._notices

    def rows(self) -> dict[str, list[Record]]:
        """The records of every row, by seed, under the slug of its name."""
        rows: dict[str, list[Record]] = {}
        for (name, _), record in sorted(self._read().items(), key=lambda item: item[0]):
            rows.setdefault(name, []).append(record)
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
        with _alone(self.folder):
            self._write([*self._lines()[0], line])

    def replace(self, row: str, record: Record) -> None:
        """Writes a record in the place of the one of the same row and seed.

        Raises:
            CheckpointError: as for :meth:`append`.
        """
        key, line = (slug(row), record.seed), self._line(row, record)
        with _alone(self.folder):
            lines, _ = self._lines()
            place = next((k for k, other in enumerate(lines) if _key(other) == key), len(lines))
            self._write([*lines[:place], line, *(other for other in lines[place:] if _key(other) != key)])

    def _line(self, row: str, record: Record) -> bytes:
        content = {"row": row, **record.shortened(self.row(row))}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()

    def _lines(self) -> tuple[list[bytes], bool]:
        """Lines of the file, and whether a last one was left out that was cut."""
        *lines, last = self.file.read_bytes().split(b"\n") if self.file.exists() else [b""]
        try:
            if last.strip():
                records.decode(last)  # an editor may drop the last line's end
                return [*lines, last], False
        except DamagedError:
            pass
        return lines, bool(last)

    def _write(self, lines: list[bytes]) -> None:
        text = b"".join(line + b"\n" for line in lines)
        checkpoint.replace(self.file, lambda path: path.write_bytes(text))

    def _read(self) -> dict[Key, Record]:
        """What is there; read anew if the file is another one than before."""
        stat = self.file.stat() if self.file.exists() else None
        stamp = () if stat is None else (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if stamp != self._stamp:
            known = self._notices
            self._found, self._names, self._notices = {}, {}, []
            self._read_older()
            self._read_lines()
            self._stamp = stamp  # not before: a record of another version is refused every time
            for notice in self._notices:
                if notice not in known:
                    warnings.warn(notice, stacklevel=4)
        return self._found

    def _read_lines(self) -> None:
        lines, cut = self._lines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{self.file}, line {number},"
            try:
                content = records.decode(line)
                row = content.pop("row", None)
                if not isinstance(row, str):
                    raise DamagedError("no row")
                record = Record.parse(content, where)
            except DamagedError as error:
                self._notices.append(left_out(where, error, "delete the line and run it again"))
                continue
            self._found[slug(row), record.seed] = record
            self._names[slug(row)] = row
        if cut:
            self._notices.append(
                f"{self.file}: its last line is left out: it was cut, as by a crash. The next record takes its place."
            )

    def _read_older(self) -> None:
        for file in sorted(self.older.glob("*/*.json")):
            if not file.stem.isdigit():
                continue
            try:
                self._found[file.parent.name, int(file.stem)] = records.read(file)
            except DamagedError as error:
                self._notices.append(left_out(str(file), error))


def left_out(name: str, error: DamagedError, remedy: str = records.REMEDY) -> str:
    return f"{name} is left out: it is no whole record ({error}); {remedy}."


def _key(line: bytes) -> Key | None:
    try:
        content = records.decode(line)
        return slug(content["row"]), content["seed"]
    except (DamagedError, KeyError, TypeError, AttributeError):
        return None


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
