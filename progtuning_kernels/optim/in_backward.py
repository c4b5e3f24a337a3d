"""Updates inside backward: one call per block as soon as its last gradient is there.

Without clipping, norm and update are per block: a bad block is skipped, not the whole step.
`clip_mode="previous_norm"` clips every block by the norm of the last good step, "per_block" by its
own: approximations, which change what is trained. "exact", the default, needs every gradient before
the first update: everything then happens in `step()`, as without in_backward (norms taken inside
backward cost 1.29 times the step of 200 tensors of 64 x 256, and gained nothing at 768 x 3072).

With `state_device="cpu"` gradients leave the device as blocks are complete, and wait on the host
where clipping is "exact". The updates of the other modes run there while backward goes on, and
backward ends when they have.

Accumulation keeps all gradients until the last micro-batch, whose backward then updates.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import Variable

from ..ops.masked_norm import masked_norm
from ..ops.masked_update.grad_decision import GradDecision
from ..sharding import is_sharded
from .active_buckets import BucketTable, Member

ClipMode = Literal["exact", "previous_norm", "per_block"]


def block_of(member: Member) -> str:
    """The block a parameter is updated with: its name up to the first number, or its parent's name.

    "encoder.layer.3.attention" is of "encoder.layer.3"; one without a name is updated on its own.
    """
    if member.name is None:
        return member.label
    around = member.name.split(".")[:-1]
    numbers = [i for i, part in enumerate(around, 1) if part.isdigit()]
    inner = [i for i in numbers if i > 1]  # in "0.3.weight" the whole list has no name: "0.3"
    return ".".join(around[: (inner or numbers or [len(around)])[0]])


def refuse_distributed(members: Iterable[Member], *, needs_norm: bool) -> None:
    """Raise `RuntimeError` where a gradient is not the whole one when its hook runs."""
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized()
    several = several and distributed.get_world_size() > 1
    for member in members:
        sharded = is_sharded(member.parameter)
        if several and not sharded:
            raise RuntimeError(
                f"in_backward=True: the gradient of {member.label} is this rank's own; "
                "DistributedDataParallel reduces it after the hooks have run. Use "
                "in_backward=False, or FSDP2 (fully_shard)"
            )
        if sharded and needs_norm:
            raise RuntimeError(
                "in_backward=True with sharded parameters: the norm of a block would need a "
                "reduction inside backward. Use nonfinite='ignore' without clipping, or "
                "clip_mode='exact'"
            )


def block_tables(members: Iterable[Member]) -> list[BucketTable]:
    """One table for the members of each block, in order."""
    blocks: dict[str, list[Member]] = {}
    for member in members:
        blocks.setdefault(block_of(member), []).append(member)
    return [BucketTable(same) for same in blocks.values()]


class _Block:
    def __init__(self, table: BucketTable) -> None:
        self.table = table
        self.ready: set[int] = set()  # indices of those whose gradient has come in this backward


class BackwardHooks:
    """The hooks of one optimizer, for the parameters that are active.

    `begin`, called at the first gradient of a backward, says whether this one updates; `update`
    updates a block, and gives up its gradients; `finish` waits at the end for updates that run
    elsewhere.
    """

    def __init__(
        self,
        begin: Callable[[], bool],
        update: Callable[[BucketTable], GradDecision | None],
        finish: Callable[[], list[GradDecision]],
    ) -> None:
        self._begin, self._update, self._finish = begin, update, finish
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._blocks: list[_Block] = []
        self._places: dict[Tensor, tuple[_Block, Member]] = {}
        self._graph_task: int | None = None  # of the backward whose end is awaited
        self._decisions: list[GradDecision] = []  # of the blocks updated in this step
        self._done: set[int] = set()  # indices of the parameters updated in this step
        self._one_at_a_time = threading.Lock()  # backward has a thread for each GPU

    def install_hooks(self, members: Sequence[Member]) -> None:
        """Hook these parameters, and no others."""
        for handle in self._handles:
            handle.remove()
        self.arrange_blocks(members)
        own = weakref.ref(self)  # the hooks of a dropped optimizer do nothing

        def hook(p: Tensor) -> None:
            if (hooks := own()) is not None:
                with hooks._one_at_a_time:
                    hooks._gradient_is_there(p)

        self._handles = [p.register_post_accumulate_grad_hook(hook) for p in self._places]

    def arrange_blocks(self, members: Sequence[Member]) -> None:
        """Put these parameters into blocks; hooks, which cannot change in backward, stay."""
        self._blocks = [_Block(table) for table in block_tables(members)]
        self._places = {
            m.parameter: (block, m) for block in self._blocks for m in block.table.members
        }

    @property
    def tables(self) -> list[BucketTable]:
        """Of the blocks."""
        return [block.table for block in self._blocks]

    def _gradient_is_there(self, p: Tensor) -> None:
        if self._graph_task is None:
            if not self._begin():
                return
            self._graph_task = torch._C._current_graph_task_id()
            Variable._execution_engine.queue_callback(self._end_of_backward)
        elif self._graph_task != torch._C._current_graph_task_id():
            self._graph_task = None
            raise RuntimeError(
                "in_backward=True: one backward runs inside another (re-entrant checkpointing): a "
                "gradient could grow after its update. Use use_reentrant=False"
            )
        if p not in self._places:
            return
        block, member = self._places[p]
        if member.index in self._done:
            raise RuntimeError(
                f"in_backward=True: {member.label} has been updated already in this step. Call "
                "step() after every backward, and wrap all but the last micro-batch in "
                "optimizer.accumulate()"
            )
        block.ready.add(member.index)
        if len(block.ready) == len(block.table.members):
            self._complete(block)

    def _end_of_backward(self) -> None:
        self._graph_task = None
        for block in self._blocks:
            if block.ready:  # some of its parameters had no gradient in this backward
                self._complete(block)
        self._decisions += self._finish()

    def _complete(self, block: _Block) -> None:
        block.ready.clear()
        self._done |= {m.index for m in block.table.members if m.parameter.grad is not None}
        decision = self._update(block.table)
        if decision is not None:  # else it comes later, or another hook has taken the gradients
            self._decisions.append(decision)

    def forget_backward(self, dropped: Set[int] = frozenset()) -> None:
        """Drop what a backward that broke off has left.

        Args:
            dropped: indices of parameters whose gradients were kept, and are no more.
        """
        self._graph_task = None
        self._done -= dropped
        self._decisions += self._finish()
        for block in self._blocks:
            block.ready.clear()

    def end_of_step(self) -> tuple[Tensor | None, Tensor | None]:
        """Norm of the step's gradients, and whether a block was skipped, as far as blocks know."""
        self.forget_backward()
        norms = [decision.norm for decision in self._decisions]
        found = [decision.found_inf for decision in self._decisions]
        self._decisions, self._done = [], set()
        norms, found = _known(norms), _known(found)
        return masked_norm(norms) if norms else None, torch.stack(found).amax() if found else None


def _known(values: list[Tensor | None]) -> list[Tensor]:
    """The values that are not None, on the device of the first."""
    known = [value for value in values if value is not None]
    return [value.to(known[0].device) for value in known]
