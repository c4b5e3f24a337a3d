"""What each of several ranks keeps, gathers and sends in a step; README.md has the rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from ..model.layout import Layout
from ..schedules.plan import check_choice

Strategy = Literal["ddp", "fsdp2"]


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to collectives in a step, and what of it goes over the wire.

    Attributes:
        reduced_bytes: of gradients that are reduced, with the padding of shards.
        gathered_bytes: of weights that are gathered in forward, the rank's own shard included.
        gathered_again_bytes: the same in backward.
        sent_bytes: that the rank sends where every collective runs as a ring.
    """

    reduced_bytes: int
    gathered_bytes: int
    gathered_again_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class Ranks:
    """How many ranks train, and what spreads the model over them."""

    count: int = 1
    strategy: Strategy = "ddp"

    @property
    def shards(self) -> bool:
        """Whether weights, and with them gradients and state, are cut into shards."""
        return self.count > 1 and self.strategy == "fsdp2"

    @property
    def bucket_copies(self) -> int:
        """Copies of gradients beside the gradients, in DDP's buckets."""
        return int(self.count > 1 and self.strategy == "ddp")

    def shard(self, p: Tensor) -> Tensor:
        """What the first rank keeps of a parameter, as an empty tensor on its device."""
        if not self.shards:
            return p.detach()
        if not p.ndim:
            raise ValueError("fully_shard takes no scalar parameters: give it the shape (1,)")
        return p.new_empty((-(-len(p) // self.count), *p.shape[1:]))

    def gathered_peak_bytes(self, model: nn.Module, layout: Layout) -> int:
        """Of gathered weights at a time: what is outside the blocks, one that computes, and one
        that is on its way.
        """
        if not self.shards:
            return 0
        blocks, outside = self._by_module(model, layout)
        return outside + 2 * max(blocks)

    def traffic(self, model: nn.Module, layout: Layout, boundary: int) -> Traffic | None:
        """Of a step under the flags that the parameters have; None for one rank."""
        if self.count == 1:
            return None
        reduced = self._whole_bytes(p for p in model.parameters() if p.requires_grad)
        if not self.shards:
            return Traffic(reduced, 0, 0, self._over_a_ring(2 * reduced))
        blocks, outside = self._by_module(model, layout)
        gathered, again = outside + sum(blocks), sum(blocks[boundary:])
        sent = self._over_a_ring(reduced + gathered + again)
        return Traffic(reduced, gathered, again, sent)

    def _over_a_ring(self, nbytes: int) -> int:
        return -(-nbytes * (self.count - 1) // self.count)

    def _whole_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Of whole tensors, with the rows that pad them to a multiple of the ranks."""
        return sum(self.shard(p).nbytes * (self.count if self.shards else 1) for p in parameters)

    def _by_module(self, model: nn.Module, layout: Layout) -> tuple[list[int], int]:
        """Bytes of every block, and of all that is outside: `fully_shard` per block and around."""
        inside = [list(model.get_submodule(path).parameters()) for path in layout.block_paths]
        known = {id(p) for block in inside for p in block}
        outside = (p for p in model.parameters() if id(p) not in known)
        return [self._whole_bytes(block) for block in inside], self._whole_bytes(outside)


def ranks_of(count: int, strategy: Strategy | None) -> Ranks:
    """As `plan_training` takes them; `ValueError` where they do not fit."""
    if count < 1:
        raise ValueError(f"ranks={count} must be positive")
    if strategy is None:
        return Ranks(count)
    check_choice("strategy", strategy, Strategy)
    if count == 1:
        raise ValueError(f"strategy={strategy!r} is for several ranks: give ranks=")
    return Ranks(count, strategy)
