"""Rows in a file, which a later process finds again.

A folder holds `rows` (the bytes of the rows, side by side), `index` (a header, then one record of
48 bytes for each row written or dropped, in that order) and `lock` (one process at a time). A row
is written before its record, and its space is used again after the record of its drop; so a process
may be killed at any byte:

- a record carries a CRC-32 of itself that starts from the header's. The index counts up to the
  first record that is cut short or damaged: what it says up to there was true once.
- what was true once need not be any more: space may have been used again since. A record holds
  the CRC-32 of its row's bytes beside level, key and format, and every read checks it: 0.75 ms for
  3 MiB, 4.2 GB/s, where BLAKE2b takes 3.4 ms.
- an index of another version, fingerprint or stored dtype is replaced by an empty one.

Rows are read and written by `preadv` and `pwrite`, not through a mapping: a full disk, a file cut
short by somebody else or a bad sector is then an error, where a mapping gives SIGBUS, which kills
the training. Nothing is synchronised to the device: after a loss of power, checksums tell what is
left.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from .free_space import FreeSpace
from .row_codec import DTYPES, RowFormat

_MAGIC = b"progrows"
_VERSION = 1
_HEADER = struct.Struct("<8sI16s16s")  # magic, version, fingerprint, stored dtype
_RECORD = struct.Struct("<HHI16sQIII")  # kind, dtype, level, key, offset, tokens, width, CRC-32
_CRC = struct.Struct("<I")  # follows the header and every record
RECORD_BYTES = _RECORD.size + _CRC.size  # 48
_WRITTEN, _DROPPED = 1, 2


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One row on disk. `offset` is in bytes, `checksum` the CRC-32 of its bytes."""

    level: int
    key: bytes
    format: RowFormat
    tokens: int
    offset: int
    checksum: int = 0

    @property
    def nbytes(self) -> int:
        return self.tokens * self.format.token_bytes


class DiskUnavailable(Exception):
    """The folder cannot be used by this process; the message says why."""


class DiskTier:
    """The rows of one folder.

    Args:
        path: the folder; it is made where it is missing.
        stored: name of the dtype that is asked for; rows of another one are not used.
        aligned: space that a row of that many bytes takes.
        warn: called with a kind and a text when something went wrong.

    Raises:
        DiskUnavailable: the folder cannot be written to, or another process has it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        stored: str,
        *,
        aligned: Callable[[int], int],
        warn: Callable[[str, str], None],
    ) -> None:
        self._folder = Path(path)
        self._stored = stored.encode()
        self._aligned = aligned
        self._warn = warn
        self._pid = os.getpid()
        self._files: dict[str, int] = {}
        self._seed = 0
        self._stopped = False
        self._space = FreeSpace()
        self._checked: set[int] = set()  # offsets of rows whose checksum was found right
        self.allocated = 0  # bytes up to the end of the last row
        self.used = 0  # bytes of rows
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in ("lock", "rows"):
                flags = os.O_RDWR | os.O_CREAT
                self._files[name] = os.open(self._folder / name, flags, 0o666)
                if name == "lock":
                    self._lock()
        except DiskUnavailable:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise DiskUnavailable(f"cannot write there ({error})") from error

    def bind(self, fingerprint: str, max_bytes: int) -> list[StoredRow]:
        """Find the rows that were stored under this fingerprint.

        Args:
            max_bytes: rows that lie beyond it are dropped.

        Raises:
            DiskUnavailable: the index cannot be written.
        """
        if self._forked():
            raise DiskUnavailable("it belongs to the process that this one was forked from")
        header = self._header(fingerprint)
        self._seed = zlib.crc32(header)
        self._stopped = False
        self._space, self._checked = FreeSpace(), set()
        try:
            found = self._replay(header, max_bytes)
            self._replace_index(header, found)
            end = max((row.offset + self._aligned(row.nbytes) for row in found), default=0)
            # what lies behind belongs to nobody; space is counted in whole units of alignment
            os.ftruncate(self._files["rows"], end)
        except OSError as error:
            raise DiskUnavailable(f"cannot write there ({error})") from error
        self.allocated, self.used = end, 0
        free = 0
        for row in sorted(found, key=lambda row: row.offset):
            if row.offset > free:
                self._space.give(free, row.offset - free)
            free = row.offset + self._aligned(row.nbytes)
            self.used += free - row.offset
        return found

    def take(self, nbytes: int, left: int) -> int | None:
        """The offset of `nbytes` bytes, None if there is no room or nothing is written any more.

        Args:
            left: bytes by which the file may grow.
        """
        if self._stopped or self._forked():
            return None
        offset = self._space.take(nbytes)
        if offset is None:
            hole = self._space.hole_before(self.allocated)
            if nbytes - hole > left:
                return None
            offset = self.allocated - hole
            if hole:
                self._space.remove(offset)
            self.allocated = offset + nbytes
        self.used += nbytes
        return offset

    def give(self, offset: int, nbytes: int) -> None:
        """Take back what `take` gave, for a row that has no record."""
        self.used -= nbytes
        self._checked.discard(offset)
        start = self._space.give(offset, nbytes)
        if start + self._space.hole_at(start) == self.allocated:
            self._space.remove(start)
            self.allocated = start

    def append(
        self, rows: Sequence[StoredRow], contents: Sequence[memoryview]
    ) -> list[StoredRow] | None:
        """Write rows to the offsets that `take` gave them.

        Args:
            contents: bytes of each row.

        Returns:
            The rows with their checksums; None where nothing was stored.
        """
        if self._stopped or self._forked():
            return None
        written = []
        try:
            for row, content in zip(rows, contents, strict=True):
                _write(self._files["rows"], content, row.offset)
                written.append(replace(row, checksum=zlib.crc32(content)))
            self._log(_WRITTEN, written)
        except OSError as error:
            self._stop(error)
            return None
        return written

    def drop(self, rows: Sequence[StoredRow]) -> None:
        """Forget rows that `append` or `bind` returned; their space may be used again."""
        if self._forked():
            return
        try:
            if not self._stopped:
                self._log(_DROPPED, rows)
            for row in rows:
                self.give(row.offset, self._aligned(row.nbytes))
            os.ftruncate(self._files["rows"], self.allocated)
        except OSError as error:
            self._stop(error)

    def read(self, row: StoredRow, target: memoryview) -> bool:
        """Read a row's bytes to `target`; False if they are not what was written."""
        if self._forked():
            return False
        try:
            whole = os.preadv(self._files["rows"], [target], row.offset) == row.nbytes
        except OSError:
            whole = False
        if whole and zlib.crc32(target) == row.checksum:
            self._checked.add(row.offset)
            return True
        self._warn_damaged()
        return False

    def intact(self, row: StoredRow) -> bool:
        """Whether the bytes are what was written; looked up once per row."""
        if row.offset in self._checked and not self._forked():
            return True
        return self.read(row, memoryview(bytearray(row.nbytes)))

    def page_in(self, row: StoredRow) -> None:
        """Have the kernel read a row ahead."""
        try:
            file = self._files["rows"]
            os.posix_fadvise(file, row.offset, row.nbytes, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # a hint

    def close(self) -> None:
        """Let other processes have the folder. A fork's copy of the lock goes with the fork."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _lock(self) -> None:
        try:
            import fcntl  # not on every system, and importing this package never fails
        except ImportError as error:
            raise DiskUnavailable("this system has no file locks") from error
        try:
            fcntl.flock(self._files["lock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DiskUnavailable("another process, or another store, uses it") from error

    def _forked(self) -> bool:
        """Whether this is a fork (a data loader's worker): parent and child would share offsets."""
        return os.getpid() != self._pid

    def _stop(self, error: OSError) -> None:
        self._stopped = True
        text = f"{self._folder}: no more rows are written ({error}); those there are still read"
        self._warn("stopped", text)

    def _header(self, fingerprint: str) -> bytes:
        digest = blake2b(fingerprint.encode(), digest_size=16).digest()
        fields = _HEADER.pack(_MAGIC, _VERSION, digest, self._stored)
        return fields + _CRC.pack(zlib.crc32(fields))

    def _record(self, kind: int, row: StoredRow) -> bytes:
        code, width = DTYPES.index(row.format.dtype), row.format.width
        place = (row.level, row.key, row.offset, row.tokens, width, row.checksum)
        fields = _RECORD.pack(kind, code, *place)
        return fields + _CRC.pack(zlib.crc32(fields, self._seed))

    def _log(self, kind: int, rows: Sequence[StoredRow]) -> None:
        _write(self._files["index"], b"".join(self._record(kind, row) for row in rows))

    def _replay(self, header: bytes, max_bytes: int) -> list[StoredRow]:
        """The rows that the index names, as far as it and the file of rows go."""
        try:
            index = (self._folder / "index").read_bytes()
        except FileNotFoundError:
            return []
        found: dict[tuple[int, bytes], StoredRow] = {}
        damaged = False
        if index[: len(header)] != header:
            fields, crc = index[: _HEADER.size], index[_HEADER.size : len(header)]
            damaged = crc != _CRC.pack(zlib.crc32(fields))
        else:
            for at in range(len(header), len(index) - RECORD_BYTES + 1, RECORD_BYTES):
                fields = index[at : at + _RECORD.size]
                (crc,) = _CRC.unpack_from(index, at + _RECORD.size)
                if zlib.crc32(fields, self._seed) != crc:
                    damaged = True
                    break
                kind, code, level, key, offset, tokens, width, checksum = _RECORD.unpack(fields)
                found.pop((level, key), None)
                if kind == _WRITTEN:
                    row_format = RowFormat(DTYPES[code], width)
                    row = StoredRow(level, key, row_format, tokens, offset, checksum)
                    found[level, key] = row
        size = os.fstat(self._files["rows"]).st_size
        # a row without tokens is there even if nothing was ever written at its offset
        ends = ((row, row.offset + row.nbytes if row.nbytes else 0) for row in found.values())
        whole = [row for row, end in ends if end <= size]
        if damaged or len(whole) < len(found):
            self._warn_damaged()
        return [row for row in whole if row.offset + self._aligned(row.nbytes) <= max_bytes]

    def _replace_index(self, header: bytes, rows: Sequence[StoredRow]) -> None:
        """An index of these rows and nothing else; after a kill it is the old one or this one."""
        new, index = self._folder / "index.new", self._folder / "index"
        new.write_bytes(header + b"".join(self._record(_WRITTEN, row) for row in rows))
        os.replace(new, index)
        if "index" in self._files:
            os.close(self._files.pop("index"))
        self._files["index"] = os.open(index, os.O_WRONLY | os.O_APPEND)

    def _warn_damaged(self) -> None:
        self._warn("damaged", f"{self._folder}: rows that are damaged are computed anew")


def _write(file: int, content: memoryview | bytes, offset: int | None = None) -> None:
    """Write all of `content` at `offset`, or at the end of a file opened for appending."""
    content = memoryview(content)
    while content:
        if offset is None:
            done = os.write(file, content)
        else:
            done = os.pwrite(file, content, offset)
            offset += done
        content = content[done:]
