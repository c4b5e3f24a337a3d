"""State on the host: what lies where, and what moves in a step, with `state_device="cpu"`.

Bytes per element of an active tensor of another device than the CPU; p is 2 for bfloat16, 4 for
float32 weights:

- device: the weight (p), and the gradient (p) until it is on its way. Under `in_backward`, in which
  backward waits for a place on the host, gradients of three blocks are alive at most: of the block
  at hand and of two that are under way; otherwise those of all blocks.
- host, for as long as the tensor is active: moments (8 in float32, 4 in bfloat16, 2 + 8/256 in 8
  bits), a master where there is one (4), `step` (4 per tensor), and a copy of the weight (p), which
  is what the kernel updates, or writes beside a master, and what goes back.
- host, staging of gradients: two buffers that blocks take in turn, of the sizes
  `max(block_bytes[0::2])` and `max(block_bytes[1::2])`; with `in_backward` and exact clipping one
  per block, since all gradients wait for their norm. Blocks are those of `block_of`, of the active
  tensors, in the order of the groups; a block's bytes are those of its gradients, each rounded up
  to a multiple of 64.
- a step moves, for tensors that have a gradient: the gradient to the host (p), the new weight back
  (p), and 4 bytes per norm (one per block and dtype under `in_backward`, one per dtype otherwise;
  none without clipping and with `nonfinite="ignore"`, or where gradients wait on the host, which
  takes their norm). The first step of a tensor, and the next one after its weight was written from
  outside, fetches the weight as well (p), and makes the master of another copy of it.

Only what travels is pinned: the copy of the weight and the staging. torch's allocator rounds each
pinned tensor up to a power of two; `host_report` counts what was asked for. State is never read by
a device, and lies in ordinary memory, which has no such waste and no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.masked_norm import masked_norm
from ..ops.masked_update.bucket import Hyper, alike, in_memory_order
from ..ops.masked_update.grad_decision import GradDecision
from ..sharding import is_sharded
from .active_buckets import ActiveBucket, BucketTable, Member, launches, refuse_sparse

Pairs = list[tuple[Tensor, Tensor]]  # target and source of a copy, of one shape and dtype
_ALIGNMENT = 64  # bytes, of a gradient in its staging buffer


class Copies(Protocol):
    """How tensors get to the host and back; `StreamCopies`, and a slow one in tests."""

    def is_away(self, t: Tensor) -> bool:
        """Whether the tensor is of another device than the host."""
        ...

    def memory_like(self, t: Tensor) -> Tensor:
        """Memory of the host of a tensor's shape, dtype and order, for copies."""
        ...

    def to_host(self, pairs: Pairs) -> Callable[[], None]:
        """Queue copies after what the device was told so far; the host calls the result before it
        reads them.
        """
        ...

    def to_device(self, pairs: Pairs) -> None:
        """Queue copies that the device may begin at once."""
        ...

    def follow_device(self) -> None:
        """Have later copies to the device wait for what it was told so far."""
        ...

    def join(self) -> None:
        """Have the device wait for all copies to it before what it is told next."""
        ...


class StreamCopies:
    """Copies between GPUs and pinned memory, on two streams of their own for each GPU."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def is_away(self, t: Tensor) -> bool:
        return t.device.type == "cuda"

    def memory_like(self, t: Tensor) -> Tensor:
        try:
            return torch.empty_like(t, device="cpu", pin_memory=True)
        except RuntimeError:  # more than the system lets a process pin: copies then wait
            return torch.empty_like(t, device="cpu")

    def to_host(self, pairs: Pairs) -> Callable[[], None]:
        events = []
        for device in {source.device for _, source in pairs}:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
            stream, _ = self._streams[device]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for target, source in pairs:
                    if source.device == device:
                        target.copy_(source, non_blocking=True)
                # a thread that waits sleeps: its core is the kernel's
                events.append(stream.record_event(torch.cuda.Event(blocking=True)))
        sources = [source for _, source in pairs]  # not to be freed while they are read

        def arrived() -> None:
            for event in events:
                event.synchronize()
            sources.clear()

        return arrived

    def to_device(self, pairs: Pairs) -> None:
        for device in {target.device for target, _ in pairs}:
            with torch.cuda.stream(self._streams[device][1]):
                for target, source in pairs:
                    if target.device == device:
                        target.copy_(source, non_blocking=True)

    def follow_device(self) -> None:
        for device, (_, stream) in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))

    def join(self) -> None:
        for device, (_, stream) in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)


@dataclass
class _Weight:
    """The copy of a weight, and the address and version of the weight that it equals."""

    copy: Tensor
    address: int = 0
    version: int = -1

    def equals(self, p: Tensor) -> bool:
        return (self.address, self.version) == (p.data_ptr(), p._version)

    def equals_now(self, p: Tensor) -> None:
        self.address, self.version = p.data_ptr(), p._version


class Work(NamedTuple):
    """Gradients of one block on their way.

    Attributes:
        table: the block.
        staged: the gradients on the host, by parameter.
        norms: of them, 0-dim on the host, one per device and dtype.
        arrived: to be called before any of these is read.
        slot: index of the staging buffer.
    """

    table: BucketTable
    staged: dict[Tensor, Tensor]
    norms: list[Tensor]
    arrived: Callable[[], None]
    slot: int


@dataclass(frozen=True)
class HostReport:
    """What `state_device="cpu"` keeps and moves, in bytes.

    Attributes:
        state_bytes: moments, masters and step counters, on the host.
        weight_bytes: copies of the active weights, on the host.
        staging_bytes: of gradients, on the host.
        gradient_bytes_to_host: in the last step, as the following ones.
        weight_bytes_to_device: the new weights.
        weight_bytes_to_host: of tensors that are new, or were written from outside.
        number_bytes_to_host: norms, and a GradScaler's or a rate's numbers.
    """

    state_bytes: int = 0
    weight_bytes: int = 0
    staging_bytes: int = 0
    gradient_bytes_to_host: int = 0
    weight_bytes_to_device: int = 0
    weight_bytes_to_host: int = 0
    number_bytes_to_host: int = 0


class HostState:
    """Copies, staging and the thread that updates, of one optimizer.

    Attributes:
        copies: between the devices and the host.
        tables: the blocks, as `arrange` was given them.
        kept: blocks whose gradients wait for their norm.
        moved: bytes of this step, by the names of `HostReport`.
    """

    def __init__(self) -> None:
        self.copies: Copies = StreamCopies()
        self.tables: list[BucketTable] = []
        self.kept: list[Work] = []
        self.moved: dict[str, int] = {}
        self._last_moved: dict[str, int] = {}
        self._weights: dict[Tensor, _Weight] = {}
        self._all_at_once = False  # whether each block has a slot of its own
        self._buffers: dict[int, Tensor] = {}
        self._busy: dict[int, Future] = {}  # by slot
        self._running: list[tuple[Work, Future]] = []
        self._worker: ThreadPoolExecutor | None = None

    def covers(self, members: Iterable[Member]) -> bool:
        """Whether any of them is of another device; `ValueError` for what cannot be."""
        parameters = [member.parameter for member in members]
        if not any(map(self.copies.is_away, parameters)):
            for device in {p.device for p in parameters}:
                if device.type not in ("cpu", "meta"):
                    raise ValueError(
                        f"state_device='cpu' is for parameters on a GPU of CUDA, not on {device}: "
                        "leave it out"
                    )
            return False
        if any(map(is_sharded, parameters)):
            raise ValueError(
                "state_device='cpu' is not for shards on a GPU: leave it and in_backward out, and "
                "give fully_shard offload_policy=CPUOffloadPolicy(), which keeps shards, gradients "
                "and state on the host (norms then need init_process_group('cpu:gloo,cuda:nccl'))"
            )
        return True

    def arrange(self, tables: Sequence[BucketTable]) -> None:
        """Take these blocks from now on, and give up what others had.

        Args:
            tables: the active members of each block.
        """
        wait([future for _, future in self._running])  # of a backward that broke off
        self.tables = list(tables)
        active = {member.parameter for table in tables for member in table.members}
        self._weights = {p: weight for p, weight in self._weights.items() if p in active}
        buffers = self._buffers.items()
        self._buffers = {i: one for i, one in buffers if one.nbytes == self._slot_bytes(i)}

    def copy_of(self, p: Tensor) -> Tensor:
        """What the kernel updates in a parameter's place: itself, where it is of the host."""
        if not self.copies.is_away(p):
            return p.detach()
        weight = self._weights.get(p)
        if weight is None or _form(weight.copy) != _form(torch.empty_like(p, device="meta")):
            weight = self._weights[p] = _Weight(self.copies.memory_like(p.detach()))
        return weight.copy

    @property
    def _slots(self) -> int:
        return max(1, len(self.tables)) if self._all_at_once else 2

    def _staging(self, table: BucketTable, *, all_at_once: bool) -> tuple[int, Tensor]:
        """The slot of a block, free, and its buffer."""
        if self._all_at_once != all_at_once:
            wait([future for _, future in self._running])
            self._all_at_once, self._buffers, self._busy = all_at_once, {}, {}
        place = next(i for i, other in enumerate(self.tables) if other is table)
        slot = place % self._slots
        if slot in self._busy:
            wait([self._busy.pop(slot)])
        if any(work.slot == slot for work in self.kept):  # its gradients wait in this buffer
            self._buffers.pop(slot, None)
        needed = self._gradient_bytes(table)
        if slot not in self._buffers or self._buffers[slot].nbytes < needed:
            like = torch.empty(self._slot_bytes(slot), dtype=torch.uint8, device="meta")
            self._buffers[slot] = self.copies.memory_like(like)
        return slot, self._buffers[slot]

    def _slot_bytes(self, slot: int) -> int:
        return max(map(self._gradient_bytes, self.tables[slot :: self._slots]), default=0)

    def _gradient_bytes(self, table: BucketTable) -> int:
        parameters = (member.parameter for member in table.members)
        return sum(_padded(p.nbytes) for p in parameters if self.copies.is_away(p))

    def keep(self, table: BucketTable) -> None:
        """`send` a block whose gradients wait for their norm."""
        for work in self.kept[-2:-1]:
            work.arrived()  # or else gradients pile up where copies are slower than backward
        self.kept.append(self.send(table, takes_norm=False, all_at_once=True))

    def send(self, table: BucketTable, *, takes_norm: bool, all_at_once: bool = False) -> Work:
        """Queue the gradients of a block; it waits until there is room for them.

        Args:
            table: one of `tables`.
            takes_norm: take the norms of these gradients on their devices.
            all_at_once: the gradients of all blocks are to wait on the host.
        """
        slot, buffer = self._staging(table, all_at_once=all_at_once)
        grads = grads_of(table.members)
        pairs: Pairs = []
        staged, at = {}, 0
        for p, grad in grads.items():
            if not self.copies.is_away(p):
                staged[p] = grad
                continue
            copy = self.copy_of(p)
            flat = buffer[at : at + grad.nbytes].view(grad.dtype)
            staged[p] = flat.as_strided(copy.shape, copy.stride())
            pairs.append((staged[p], grad))
            self._count("gradient_bytes_to_host", grad)
            at += _padded(grad.nbytes)
        norms = norms_of(table.members, grads) if takes_norm else []
        norms = self._queue_numbers(norms, pairs)
        return Work(table, staged, norms, self.copies.to_host(pairs), slot)

    def _queue_numbers(self, numbers: Sequence[Tensor], pairs: Pairs) -> list[Tensor]:
        """Where numbers will be on the host; those of the host are copied at once."""
        found = []
        for number in numbers:
            if self.copies.is_away(number):
                target = self.copies.memory_like(number)
                pairs.append((target, number))
                self._count("number_bytes_to_host", number)
            else:
                target = number.clone()
            found.append(target)
        return found

    def fetch(self, numbers: Sequence[Tensor]) -> list[Tensor]:
        """0-dim tensors on the host; it waits for them."""
        pairs: Pairs = []
        found = self._queue_numbers(numbers, pairs)
        self.copies.to_host(pairs)()
        return found

    def submit(
        self,
        work: Work,
        buckets: Sequence[ActiveBucket],
        hypers: Sequence[Sequence[Hyper]],
        decide: Callable[[Sequence[Tensor]], GradDecision],
        seed: int,
    ) -> None:
        """Have the thread update when all is there, and send the new weights back.

        Args:
            work: what `send` has queued.
            buckets: of the block, with `copy_of` its parameters in their places.
            hypers: per bucket.
            decide: called there with the norms.
            seed: of the random numbers.
        """
        pairs: Pairs = []
        back: Pairs = []
        for bucket in buckets:
            for p, copy in zip(bucket.parameters, bucket.bucket.params, strict=True):
                if p not in work.staged or not self.copies.is_away(p):
                    continue
                weight = self._weights.get(p)
                if weight is None or weight.copy is not copy or not weight.equals(p):
                    self._weights[p] = _Weight(copy)
                    pairs.append((copy, p.detach()))
                    self._count("weight_bytes_to_host", p)
                back.append((p.detach(), copy))
                self._count("weight_bytes_to_device", p)
        rates = [h.lr for some in hypers for h in some if isinstance(h.lr, Tensor)]
        sent = iter(self._queue_numbers(rates, pairs))
        hypers = [
            [h._replace(lr=next(sent)) if isinstance(h.lr, Tensor) else h for h in some]
            for some in hypers
        ]
        arrived = self.copies.to_host(pairs)

        @torch.no_grad()
        def update() -> GradDecision:
            work.arrived()
            arrived()
            decision = decide(work.norms)
            for bucket, some in zip(buckets, hypers, strict=True):
                bucket.follow_parameters()
                bucket.bucket.update(
                    [work.staged.get(p) for p in bucket.parameters],
                    some,
                    grad_factor=decision.grad_factor,
                    found_inf=decision.found_inf,
                    seed=seed,
                )
            self.copies.to_device(back)
            return decision

        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "progtuning-host-state")
        future = self._worker.submit(update)
        self._running.append((work, future))
        self._busy[work.slot] = future

    def take_kept(self) -> list[Work]:
        """What was kept, arrived; gradients of tensors that have frozen since are left out, and
        those of a later backward are added.
        """
        kept, self.kept = self.kept, []
        found: dict[Tensor, Tensor] = {}
        for work in kept:
            work.arrived()
            for p in list(work.staged):
                if not p.requires_grad or p in found:
                    grad = work.staged.pop(p)
                    if p in found:
                        found[p].add_(grad)
            found.update(work.staged)
        return [work for work in kept if work.staged]

    def forget_kept(self) -> set[int]:
        """Drop what was kept: the indices of its parameters."""
        kept, self.kept = self.kept, []
        return {m.index for work in kept for m in work.table.members if m.parameter in work.staged}

    def join(self) -> list[GradDecision]:
        """Wait for the thread, and have the device wait for its weights; raise what went wrong."""
        running, self._running = self._running, []
        self._busy = {}
        wait([future for _, future in running])
        self.copies.join()
        for work, future in running:
            for p in work.staged.keys() & self._weights.keys():
                if future.exception() is None:
                    self._weights[p].equals_now(p)
                else:
                    del self._weights[p]
        return [future.result() for _, future in running]

    def end_of_step(self) -> None:
        self._last_moved, self.moved = self.moved, {}

    def report(self, state_bytes: int) -> HostReport:
        weights = sum(weight.copy.nbytes for weight in self._weights.values())
        staging = sum(buffer.nbytes for buffer in self._buffers.values())
        return HostReport(state_bytes, weights, staging, **self._last_moved)

    def _count(self, name: str, t: Tensor) -> None:
        self.moved[name] = self.moved.get(name, 0) + t.nbytes


def grads_of(members: Iterable[Member]) -> dict[Tensor, Tensor]:
    """The gradients of this moment in their parameters' dtype and order of memory."""
    found = {}
    for p in (member.parameter for member in members):
        refuse_sparse([p.grad])
        if p.grad is not None:
            found[p] = alike(p.grad, p.detach())
    return found


def norms_of(members: Sequence[Member], grads: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """Norms of what `grads_of` gives for some of them, one per device and dtype."""
    found = []
    for part in launches(members):
        if present := [grads[m.parameter] for m in part if m.parameter in grads]:
            found.append(masked_norm([in_memory_order(grad) for grad in present]))
    return found


def _form(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
