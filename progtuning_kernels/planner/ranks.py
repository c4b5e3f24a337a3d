"""What each of several ranks keeps, gathers and sends in a step; README.md has the rules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..freezing.decay_groups import decay_groups
from ..model.layout import Layout
from ..schedules.plan import check_choice, whole_number

Strategy = Literal["ddp", "fsdp2", "zero2"]
_REDUCE_BUCKET_SIZE = 500_000_000  # elements, as DeepSpeed has it by default


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to collectives in a step, and what of it goes over the wire.

    Attributes:
        reduced_bytes: of gradients that are reduced, with FSDP2's padding.
        gathered_bytes: of weights that are gathered, the rank's own part included: in forward, or
            under ZeRO-2 after the update.
        gathered_again_bytes: of those that FSDP2 gathers again in backward.
        sent_bytes: that the rank sends where every collective runs as a ring.
    """

    reduced_bytes: int
    gathered_bytes: int
    gathered_again_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class Ranks:
    """How many ranks train, and what spreads the model over them; None where there is one."""

    count: int = 1
    strategy: Strategy | None = None

    @property
    def cuts_gradients(self) -> bool:
        """Whether a rank keeps a part of the gradients only."""
        return self.strategy in ("fsdp2", "zero2")

    @property
    def kept_beside_state(self) -> bool:
        """Whether what the optimizer updates is kept beside the weights, in float32."""
        return self.strategy == "zero2"

    def updated(self, model: nn.Module) -> list[Tensor]:
        """What the optimizer of the first rank updates, as tensors of the right size and dtype."""
        active = [p for p in model.parameters() if p.requires_grad]
        if self.strategy == "zero2":
            device = active[0].device
            return [
                torch.empty(size // self.count, dtype=torch.float32, device=device)
                for size in self._flat_sizes(model)
            ]
        return [self._shard(p) for p in active]

    def weight_bytes(self, model: nn.Module) -> int:
        """Of parameters and buffers on the first rank."""
        parameters = [self._shard(p) for p in model.parameters()]
        if self.strategy == "zero2":  # what trains lies in flat tensors
            parameters = [p for p in parameters if not p.requires_grad]
        flat = self._flat_bytes(model) if self.strategy == "zero2" else 0
        return flat + sum(t.nbytes for t in (*parameters, *model.buffers()))

    def buffer_bytes(self, model: nn.Module, layout: Layout) -> int:
        """Of what communication keeps at a time: DDP's buckets; weights that FSDP2 has gathered,
        which are all outside the blocks, a block that computes and one on its way; or DeepSpeed's
        bucket.
        """
        active = [p for p in model.parameters() if p.requires_grad]
        if self.strategy == "ddp":
            return sum(p.nbytes for p in active)
        if self.strategy == "fsdp2":
            blocks, outside = self._gathered_bytes(model, layout)
            return outside + 2 * max(blocks)
        return _REDUCE_BUCKET_SIZE * active[0].element_size() if self.strategy == "zero2" else 0

    def traffic(self, model: nn.Module, layout: Layout, boundary: int) -> Traffic | None:
        """Of a step under the flags that the parameters have; None for one rank."""
        reduced = self._whole_bytes(p for p in model.parameters() if p.requires_grad)
        if self.strategy is None:
            return None
        if self.strategy == "fsdp2":
            blocks, outside = self._gathered_bytes(model, layout)
            gathered, again = outside + sum(blocks), sum(blocks[boundary:])
            return Traffic(reduced, gathered, again, self._ring_bytes(reduced + gathered + again))
        gathered = self._flat_bytes(model) if self.strategy == "zero2" else 0
        return Traffic(reduced, gathered, 0, self._ring_bytes(2 * reduced + gathered))

    def _ring_bytes(self, nbytes: int) -> int:
        return -(-nbytes * (self.count - 1) // self.count)

    def _shard(self, p: Tensor) -> Tensor:
        if self.strategy != "fsdp2":
            return p
        if not p.ndim:
            raise ValueError("fully_shard takes no scalar parameters: give it the shape (1,)")
        return p.new_empty((-(-len(p) // self.count), *p.shape[1:]))

    def _whole_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Of whole tensors, with the rows that pad FSDP2's to a multiple of the ranks."""
        times = self.count if self.strategy == "fsdp2" else 1
        return times * sum(self._shard(p).nbytes for p in parameters)

    def _gathered_bytes(self, model: nn.Module, layout: Layout) -> tuple[list[int], int]:
        """Of every block, and of all that is outside: `fully_shard` per block and around."""
        inside = [list(model.get_submodule(path).parameters()) for path in layout.block_paths]
        known = {id(p) for block in inside for p in block}
        outside = (p for p in model.parameters() if id(p) not in known)
        return [self._whole_bytes(block) for block in inside], self._whole_bytes(outside)

    def _flat_sizes(self, model: nn.Module) -> list[int]:
        """Elements of ZeRO's flat tensors, one a group of the optimizer, padded."""
        groups = decay_groups([p for p in model.parameters() if p.requires_grad], None)
        multiple = 2 * self.count
        sizes = (sum(p.numel() for p in group["params"]) for group in groups)
        return [-(-size // multiple) * multiple for size in sizes]

    def _flat_bytes(self, model: nn.Module) -> int:
        active = next(p for p in model.parameters() if p.requires_grad)
        return active.element_size() * sum(self._flat_sizes(model))


def ranks_of(count: int, strategy: Strategy | None) -> Ranks:
    """As `plan_training` takes them; `ValueError` for what does not fit, or `TypeError`."""
    count = whole_number("ranks", count, 1)
    if strategy is not None:
        check_choice("strategy", strategy, Strategy)
        if count == 1:
            raise ValueError(f"strategy {strategy!r} is for several ranks: give ranks, too")
    return Ranks(count, (strategy or "ddp") if count > 1 else None)
