"""What packing left out of a model's forwards, and why not more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..text_table import Table, as_html, as_text


@dataclass(frozen=True)
class PackingReport:
    """What packing left out, and why not more; `print` it.

    Attributes:
        stacks: for every stack of blocks, by its path, how it runs packed, or why it does not.
        packs: whether any stack does.
        batches: forwards since the model was patched that ran packed.
        places: B x T of these, summed up.
        tokens: N of these, summed up: what was computed.
        padded: forwards that ran padded, by reason.
    """

    stacks: Mapping[str, str]
    packs: bool
    batches: int
    places: int
    tokens: int
    padded: Mapping[str, int]

    @property
    def skipped_share(self) -> float:
        """Share of the places of packed batches that was left out."""
        return 1 - self.tokens / self.places if self.places else 0.0

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        parts: list[str | Table] = [
            f"packing: {path}: {text}" for path, text in self.stacks.items()
        ]
        if self.batches:
            forwards = "1 forward" if self.batches == 1 else f"{self.batches:,} forwards"
            parts.append(
                f"{forwards} ran packed, evaluation among them: {self.skipped_share:.0%} of "
                f"{self.places:,} places (rows x columns) were padding, and left out"
            )
        if self.padded:
            rows = [("forwards", "ran padded because")]
            rows += [(f"{count:,}", reason) for reason, count in self.padded.items()]
            parts.append(Table(rows, left=(1,)))
        return parts or ["packing: no forward yet"]
