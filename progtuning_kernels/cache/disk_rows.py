"""Rows in one SQLite file, which a later process finds again; README.md says why SQLite, how fast.

A transaction holds a batch of rows, so that a process may be killed at any byte. Nothing is
synchronised to the device: after a loss of power, checksums of records and of contents tell what is
left. They start from the file's purpose, its fingerprint and dtype; a content's is looked at in
every read. A file that SQLite cannot read is replaced by an empty one.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_VERSION = 2
# a dtype's number on disk is its place here: append only
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# UnicodeDecodeError: the damage is in a name that SQLite's message shows
_ERRORS = (sqlite3.Error, UnicodeDecodeError)
_LARGEST_ROW = 10**9 - 1024  # bytes; SQLite takes no value of more
_SETTINGS = (
    "page_size = 16384",  # files are 1.01 to 1.07 times their rows, of 18 to 196 KB; 4096: slow
    "locking_mode = EXCLUSIVE",
    "journal_mode = TRUNCATE",
    "synchronous = OFF",
    "cell_size_check = ON",
)
_TABLES = (
    "purpose (text)",
    "records (number INTEGER PRIMARY KEY, level, key, dtype, tokens, width, checksum, own)",
    "contents (number INTEGER PRIMARY KEY, content)",
)


@dataclass(frozen=True, slots=True)
class DiskRow:
    """One row on disk, as its record says; `number` finds it."""

    number: int
    level: int
    key: bytes
    dtype: torch.dtype
    shape: tuple[int, int]  # (tokens, C)
    checksum: int  # CRC-32 of its content

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


class DiskUnavailable(Exception):
    """The folder cannot be used by this process; the message says why."""


class DiskRows:
    """The rows of one folder, which is made where it is missing.

    Args:
        stored: name of the dtype that is asked for; rows of another one are not used.
        warn: called with a text when something went wrong.

    Attributes:
        used: bytes of rows; the file is at most a tenth larger, and keeps the space of rows that
            were dropped for others.

    Raises:
        DiskUnavailable: the folder cannot be written to, is in use, or of an earlier version.
    """

    def __init__(
        self, path: str | os.PathLike[str], stored: str, warn: Callable[[str], None]
    ) -> None:
        self._folder = Path(path)
        self._stored = stored
        self._warn = warn
        self._pid = os.getpid()
        self._file: sqlite3.Connection | None = None
        self._there: set[int] = set()  # numbers of rows
        self._next = 0  # number of the next row; none is used twice
        self._seed = 0
        self._stopped = False
        self.used = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if (self._folder / "index").exists():
                raise DiskUnavailable(
                    "its rows are those of an earlier version: delete the folder, or name another"
                )
            try:
                self._open()
            except _ERRORS as error:
                if "locked" in str(error):
                    raise DiskUnavailable("another process, or another store, uses it") from error
                self._start_anew()
        except (OSError, *_ERRORS) as error:
            self.close()
            raise DiskUnavailable(f"cannot write there ({error})") from error

    def bind(self, fingerprint: str, max_bytes: int) -> list[DiskRow]:
        """Find the rows that were stored under this fingerprint, up to `max_bytes`; drop others."""
        if self._forked():
            raise DiskUnavailable("it belongs to the process that this one was forked from")
        purpose = f"{_VERSION} {self._stored} {fingerprint}"
        self._seed = zlib.crc32(purpose.encode())
        self._stopped = False
        try:
            try:
                return self._find(purpose, max_bytes)
            except _ERRORS:
                self._start_anew()
                return self._find(purpose, max_bytes)
        except (OSError, *_ERRORS) as error:
            raise DiskUnavailable(f"cannot write there ({error})") from error

    def write(self, level: int, rows: Mapping[bytes, Tensor]) -> list[DiskRow]:
        """Write rows, (tokens, C) on the CPU each; none is there after an error."""
        rows = {key: row for key, row in rows.items() if row.nbytes <= _LARGEST_ROW}
        if self._stopped or self._forked() or not rows:
            return []
        made, contents, records = [], [], []
        for number, (key, row) in enumerate(rows.items(), self._next):
            content = memoryview(row.flatten().view(torch.uint8).numpy())
            checksum = zlib.crc32(content, self._seed)
            made.append(DiskRow(number, level, key, row.dtype, tuple(row.shape), checksum))
            contents.append((number, content))
            record = [number, level, key, DTYPES.index(row.dtype), *row.shape, checksum]
            records.append((*record, self._own_checksum(record)))
        self._next += len(made)
        try:
            with self._file:
                self._file.executemany("INSERT INTO contents VALUES (?, ?)", contents)
                self._file.executemany(
                    "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?, ?)", records
                )
        except _ERRORS as error:
            self._fail(error)
            return []
        self._there.update(row.number for row in made)
        self.used += sum(row.nbytes for row in made)
        return made

    def drop(self, rows: Sequence[DiskRow]) -> None:
        """Forget rows that `write` or `bind` returned; their space is used again."""
        rows = [row for row in rows if row.number in self._there]
        if self._forked() or not rows:
            return
        self._there.difference_update(row.number for row in rows)
        self.used -= sum(row.nbytes for row in rows)
        if not self._stopped:
            try:
                self._delete([row.number for row in rows])
            except _ERRORS as error:
                self._fail(error)

    def read(self, row: DiskRow, target: Tensor) -> bool:
        """Copy a row to `target`, (tokens, C) on the CPU; False if it is not what was written."""
        if self._forked():
            return False
        query = "SELECT content FROM contents WHERE number = ?"
        try:
            (content,) = self._file.execute(query, (row.number,)).fetchone() or (None,)
        except _ERRORS:
            content = None
        if isinstance(content, bytes) and zlib.crc32(content, self._seed) == row.checksum:
            memoryview(target.view(-1).view(torch.uint8).numpy())[:] = content
            return True
        self._warn_damaged()
        return False

    def close(self) -> None:
        """Let other processes have the folder; a fork leaves it to its parent."""
        if self._file is not None and not self._forked():
            self._file.close()
            self._file = None

    def _open(self) -> None:
        # one thread at a time uses it, not always the same one
        path = self._folder / "rows.sqlite"
        self._file = sqlite3.connect(path, timeout=0, check_same_thread=False)
        for setting in _SETTINGS:
            self._file.execute(f"PRAGMA {setting}")
        with self._file:
            self._file.execute("BEGIN EXCLUSIVE")
            for table in _TABLES:
                self._file.execute(f"CREATE TABLE IF NOT EXISTS {table}")
        found = self._file.execute("SELECT sql FROM sqlite_master ORDER BY rowid").fetchall()
        if found != [(f"CREATE TABLE {table}",) for table in _TABLES]:
            raise sqlite3.DatabaseError("its tables are others")

    def _start_anew(self) -> None:
        self._warn_damaged()
        self.close()
        self._there.clear()
        self.used = 0
        for name in ("rows.sqlite", "rows.sqlite-journal"):
            (self._folder / name).unlink(missing_ok=True)
        self._open()

    def _find(self, purpose: str, max_bytes: int) -> list[DiskRow]:
        """The rows that the records name, where they were written for this purpose."""
        self._there.clear()
        self.used = 0
        if self._file.execute("SELECT text FROM purpose").fetchall() != [(purpose,)]:
            with self._file:
                for table in ("purpose", "records", "contents"):
                    self._file.execute(f"DELETE FROM {table}")
                self._file.execute("INSERT INTO purpose VALUES (?)", (purpose,))
        found: dict[tuple[int, bytes], DiskRow] = {}
        unfit = []
        for *record, own in self._file.execute("SELECT * FROM records").fetchall():
            number, level, key, dtype, *shape, checksum = record
            row = None
            if own == self._own_checksum(record):
                row = DiskRow(number, level, key, DTYPES[dtype], tuple(shape), checksum)
            if row is None or (level, key) in found or self.used + row.nbytes > max_bytes:
                unfit.append(number)
                continue
            found[level, key] = row
            self._next = max(self._next, number + 1)
            self._there.add(number)
            self.used += row.nbytes
        self._delete(unfit)
        return list(found.values())

    def _delete(self, numbers: Sequence[int]) -> None:
        with self._file:
            for table in ("records", "contents"):
                query = f"DELETE FROM {table} WHERE number = ?"
                self._file.executemany(query, [(number,) for number in numbers])
        if not self._there:  # the only moment at which giving the space back copies nothing
            self._file.execute("VACUUM")

    def _own_checksum(self, record: list[int | bytes]) -> int:
        return zlib.crc32(repr(record).encode(), self._seed)

    def _forked(self) -> bool:
        """Whether this is a fork (a data loader's worker): SQLite serves one process alone."""
        return os.getpid() != self._pid

    def _fail(self, error: Exception) -> None:
        """A full disk ends writing; a file that SQLite cannot read is replaced."""
        if not isinstance(error, sqlite3.OperationalError):
            try:
                return self._start_anew()
            except (OSError, *_ERRORS) as another:
                error = another
        self._stopped = True
        self._warn(
            f"{self._folder}: no more rows are written ({error}); those there are still read"
        )

    def _warn_damaged(self) -> None:
        self._warn(f"{self._folder}: rows that are damaged are computed anew")
