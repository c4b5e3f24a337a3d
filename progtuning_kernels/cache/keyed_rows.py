"""Finds the rows of one patched model by their content and by the weights that they came from."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..model.layout import Layout
from .content_keys import Rows
from .prefix_cache import PrefixCache
from .prefix_weights import PrefixWeights


class KeyedRows:
    """The stored rows of a model, by level.

    A level has a token, which stands for all weights below it and is part of every key: a hash of
    these where rows are on disk, for later runs, else a random number.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, weights: PrefixWeights, cache: PrefixCache
    ) -> None:
        self.store = cache.open()
        self.on_disk = cache.path is not None
        self._model = model
        self._layout = layout
        self._weights = weights
        self._cache = cache
        self._tokens: dict[int, bytes] = {}
        self._bound: str | None = None
        self._foreign: set[int] = set()  # levels with rows of an earlier process
        self._expected: str | None = None  # fingerprint that those should be bound to

    def unbound(self, level: int) -> bool:
        """Whether `bind_level` has anything to do."""
        below = (at for at in {level, *self.store.levels()} if at <= level)
        return self._bound is None or any(at not in self._tokens for at in below)

    def bind_level(self, level: int, others: Collection[int] = ()) -> None:
        """Tell the store whose rows it holds; only a folder on disk makes that expensive.

        Args:
            others: levels that another rank has rows of: all ranks make the same tokens, together.
        """
        if self._bound is None:
            config = getattr(self._model, "config", None)
            about = f"{type(self._model).__name__}{self._layout.block_paths}{config!r}".encode()
            # embeddings and block 0 are below every level: later stages keep what is stored
            weights = self._weights.fingerprint(1) if self.on_disk else os.urandom(64)
            self._bound = hashlib.blake2b(about + weights, digest_size=16).hexdigest()
            self.store.bind(self._bound)
            self._foreign = set(self.store.levels())
            if self._expected not in (None, self._bound):
                warnings.warn(
                    f"{self._cache.path} held rows of another model, configuration or version of "
                    "its weights: they were dropped",
                    stacklevel=6,
                )
            self._expected = None
        for at in sorted({level, *others, *self.store.levels()}):
            if at <= level and at not in self._tokens:
                token = self._weights.fingerprint(at) if self.on_disk else os.urandom(16)
                self._tokens[at] = token

    def known_levels(self) -> list[int]:
        """Levels whose rows fit the weights at hand, ascending."""
        return [at for at in self.store.levels() if at in self._tokens]

    def forget_level(self, level: int) -> None:
        self.store.drop(level)
        self._tokens.pop(level, None)
        self._foreign.discard(level)

    def forget_above(self, unit: int) -> None:
        """Forget what was computed from `unit`, and so all levels above it."""
        for level in {*self.store.levels(), *self._tokens}:
            if level > unit:
                self.forget_level(level)
        if unit <= 0:
            self._bound = None

    def contains(self, level: int, rows: Rows) -> list[bool]:
        return self.store.contains(level, rows.keys(self._tokens[level]))

    def read(
        self,
        level: int,
        rows: Rows,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """Rows in a batch, (B, *shape); None, and none of them is there, where one is lost."""
        keys = rows.keys(self._tokens[level])
        whole = (len(keys), *shape)
        try:
            return self.store.read(level, keys, whole, rows.spans, device=device, dtype=dtype)
        except KeyError:
            self.store.drop(level, keys)
            return None

    def write(self, level: int, rows: Rows, hidden: Tensor, *, hits: int) -> int:
        """Store the rows of a batch (B, T, C) that are not there; how many found no room."""
        keys = rows.keys(self._tokens[level])
        known = dict(zip(keys, self.store.contains(level, keys), strict=True))
        absent = list(known.values()).count(False)
        if not absent:
            return 0
        stored = self.store.write(level, keys, hidden, rows.spans)
        if stored < absent and level in self._foreign and not hits:
            # none was found in this stage: rows of another data set fill the folder
            self.store.drop(level)
            self._foreign.discard(level)
            stored += self.store.write(level, keys, hidden, rows.spans)
        return max(0, absent - stored)

    def drop(self, level: int, rows: Rows) -> None:
        self.store.drop(level, rows.keys(self._tokens[level]))

    def manifest(self) -> dict[str, str | None]:
        """Where rows are kept, and what for: for a checkpoint."""
        path = self._cache.path
        return {"path": None if path is None else os.fspath(path), "fingerprint": self._bound}

    def expect(self, manifest: dict[str, str | None]) -> None:
        """Take over the manifest of the run that this one continues; warn of rows out of reach."""
        there, here = manifest["path"], self._cache.path
        if there is None:
            return
        if here is not None and os.path.realpath(there) == os.path.realpath(here):
            self._expected = manifest["fingerprint"]
            return
        warnings.warn(
            f"the rows of the prefix cache are in {there}, this run's cache is "
            f"{'in memory' if here is None else f'in {os.fspath(here)}'}: rows are computed anew",
            stacklevel=3,
        )

    def close(self) -> None:
        self._cache.close(self.store)
