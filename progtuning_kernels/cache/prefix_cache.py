"""`PrefixCache`: how much to keep of the prefix's outputs, where, and in which precision."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..text_table import text_table
from .row_codec import CodecError
from .row_store import RowStore

CacheDevice = Literal["auto", "cuda", "cpu", "disk"]


class PrefixCache:
    """Keeps what the frozen prefix computes for a sample, so that later epochs read it instead.

    Units below the boundary are a fixed function of the sample (frozen, in eval mode). Their
    outputs, the boundary activations, are stored row by row without padding, and a batch whose rows
    are all there runs neither embeddings nor prefix blocks. Samples are recognised by content; the
    data loader needs nothing.

        handle = patch_model(model, schedule, cache=PrefixCache(8 << 30))

    Args:
        max_bytes: budget over all tiers; what does not fit is computed as before.
        device: where rows are kept: "cuda", "cpu", "disk", or "auto" for the fastest that has room.
        dtype: precision of stored rows: None keeps that of the activations (losses and weights are
            then those of a run without cache), `torch.bfloat16`, or "8bit".
        path: folder on disk, whose rows a later run with the same prefix weights finds again.
        id_column: name of a model argument with one identifier per row (integers in a tensor, or
            strings); it replaces the hash of the content and is taken out before the model sees it.
            The Trainer lets it through with `remove_unused_columns=False` only.

    Raises:
        ValueError: `max_bytes` is not positive, or what `RowStore` refuses.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        device: CacheDevice = "auto",
        dtype: torch.dtype | Literal["8bit"] | None = None,
        path: str | os.PathLike[str] | None = None,
        id_column: str | None = None,
    ) -> None:
        if not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes must be a number of bytes, 1 or more, got {max_bytes!r}")
        self.max_bytes = max_bytes
        self.device: CacheDevice = device
        self.dtype = dtype
        self.path = path
        self.id_column = id_column
        self._in_use = False

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self.max_bytes}, device={self.device!r}, dtype={self.dtype}, "
            f"path={self.path!r}, id_column={self.id_column!r})"
        )

    def open(self) -> RowStore:
        """The store, for one patched model at a time.

        Raises:
            ValueError: another model has it.
        """
        if self._in_use:
            raise ValueError("this PrefixCache serves another patched model: make one per model")
        store = RowStore(self.max_bytes, device=self.device, dtype=self.dtype, path=self.path)
        self._in_use = True
        return store

    def close(self, store: RowStore) -> None:
        store.close()
        self._in_use = False


def automatic_cache() -> PrefixCache:
    """A quarter of the CPU memory that is free now."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return PrefixCache(max(1, free // 4))


@dataclass(frozen=True)
class CacheReport:
    """What the cache did in the stage at hand. `print(report)` shows it as a table.

    Attributes:
        state: "on", "off" (it would not pay) or "bypassed" (it cannot be used in this stage).
        reason: why it is not on; "" where it is.
        bypasses: reasons for which single forwards ran without it, with their numbers.
        level: block whose input is stored.
        rows: stored rows by level.
        nbytes: bytes in use.
        nbytes_by_tier: the same, by tier.
        hits, misses: rows of training forwards that were there, and that were not.
        served_steps: forwards that ran without the prefix.
        prefix_ms, read_ms: median cost of computing and of reading one row; None before measured.
        codec_error: what the precision that rows are stored in has changed; None where nothing.
    """

    state: Literal["on", "off", "bypassed"]
    reason: str
    level: int
    rows: Mapping[int, int]
    nbytes: int
    nbytes_by_tier: Mapping[str, int]
    hits: int
    misses: int
    served_steps: int
    prefix_ms: float | None
    read_ms: float | None
    codec_error: CodecError | None
    bypasses: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line."""
        if self.state != "on":
            return f"cache: {self.state} ({self.reason})"
        return (
            f"cache: on at block {self.level}, {sum(self.rows.values()):,} rows, "
            f"{self.nbytes:,} bytes; {self.hits:,} hits, {self.misses:,} misses, "
            f"{self.served_steps:,} forwards without prefix"
        )

    def __str__(self) -> str:
        def ms(value: float | None) -> str:
            return "-" if value is None else f"{value:.4f}"

        error = self.codec_error
        lines = [
            ("state", self.state + (f": {self.reason}" if self.reason else "")),
            ("level", str(self.level)),
            *((f"rows at block {level}", f"{n:,}") for level, n in self.rows.items()),
            *((f"bytes ({tier})", f"{n:,}") for tier, n in self.nbytes_by_tier.items() if n),
            ("hits (rows)", f"{self.hits:,}"),
            ("misses (rows)", f"{self.misses:,}"),
            ("served forwards", f"{self.served_steps:,}"),
            ("prefix (ms/row)", ms(self.prefix_ms)),
            ("read (ms/row)", ms(self.read_ms)),
            ("codec error (rms)", "-" if error is None else f"{error.rms:.2e}"),
            *((f"bypassed {n:,} times", reason) for reason, n in self.bypasses.items()),
            *(("warning", text) for text in self.warnings),
        ]
        return "\n".join(text_table(lines, left=(0, 1)))
