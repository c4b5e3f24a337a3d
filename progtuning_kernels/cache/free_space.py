"""Which bytes of an address space are free: best fit, neighbouring holes merged."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeSpace:
    """Holes of an address space in bytes.

    Best fit matters at a change of stage: a sample has as many tokens at the new level as at the
    one that is dropped, so that its row finds a hole of exactly its size.
    """

    def __init__(self) -> None:
        self._holes: list[tuple[int, int]] = []  # (bytes, start), sorted
        self._bytes: dict[int, int] = {}  # by start
        self._start: dict[int, int] = {}  # by end

    def take(self, nbytes: int) -> int | None:
        """The start of `nbytes` bytes that are free no more; None if no hole is that large."""
        at = bisect_left(self._holes, (nbytes, -1))
        if at == len(self._holes):
            return None
        size, start = self._holes[at]
        self.remove(start)
        if size > nbytes:
            self._add(start + nbytes, size - nbytes)
        return start

    def give(self, start: int, nbytes: int) -> int:
        """Free `nbytes` bytes from `start`; the start of the hole that they are now part of."""
        end = start + nbytes
        if end in self._bytes:
            nbytes += self.remove(end)
        if start in self._start:
            before = self._start[start]
            nbytes += self.remove(before)
            start = before
        self._add(start, nbytes)
        return start

    def remove(self, start: int) -> int:
        """Take the whole hole that begins at `start`; its bytes."""
        nbytes = self._bytes.pop(start)
        del self._start[start + nbytes]
        del self._holes[bisect_left(self._holes, (nbytes, start))]
        return nbytes

    def hole_at(self, start: int) -> int:
        """Bytes of the hole that begins at `start`, 0 if none does."""
        return self._bytes.get(start, 0)

    def hole_before(self, end: int) -> int:
        """Bytes of the hole that ends at `end`, 0 if none does."""
        return end - self._start.get(end, end)

    def _add(self, start: int, nbytes: int) -> None:
        self._bytes[start] = nbytes
        self._start[start + nbytes] = start
        insort(self._holes, (nbytes, start))
