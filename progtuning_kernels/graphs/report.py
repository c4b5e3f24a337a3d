"""What was captured of a model's training forwards, and why not more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..text_table import Table, as_html, as_text


@dataclass(frozen=True)
class GraphReport:
    """What was captured, and why not more; `print` it.

    Attributes:
        state: whether training forwards are captured, or why none is.
        captured: kinds of calls (shapes, dtypes) that the stage at hand has captured.
        replays: forwards that were replayed whole since the model was patched.
        block_replays: forwards of blocks that were replayed, in others.
        nbytes: what graphs, gradients and copies of arguments of the stage keep.
        eager: training forwards that ran eagerly, by reason.
    """

    state: str
    captured: int
    replays: int
    block_replays: int
    nbytes: int
    eager: Mapping[str, int]

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        parts: list[str | Table] = [f"graphs: {self.state}"]
        if self.captured or self.replays or self.block_replays:
            kinds = "1 kind of call" if self.captured == 1 else f"{self.captured} kinds of calls"
            parts.append(
                f"{kinds} captured in this stage, which keep {self.nbytes / 2**20:,.1f} MiB; "
                f"{self.replays:,} forwards were replayed whole"
                + f", {self.block_replays:,} of blocks"
                * bool(self.block_replays)
            )
        if self.eager:
            rows = [("forwards", "ran eagerly because")]
            rows += [(f"{count:,}", reason) for reason, count in self.eager.items()]
            parts.append(Table(rows, left=(1,)))
        return parts
