"""A captured graph on a CPU: operations are recorded with their memory, and run on it again.

It stands in for `torch.cuda.CUDAGraph` behind the seam of `graphs/pools.py`, and is as strict:

- What happens while it records leaves no trace: memory from outside that was written to, and the
  random state, are put back, and what was computed is NaN until the first replay.
- It refuses what a capture refuses: reads of values by the host, tensors made from the host's data,
  numbers of a generator that is not torch's own.
- Recordings of one pool share memory. What nothing held when a recording began may lie under it: it
  is NaN from every replay of that recording on.
- Sizes, addresses and numbers are baked in. Memory from outside that nothing holds any more is NaN
  in a replay; `numbers` is for comparing two recordings.
- A replay writes without new versions, as a GPU does behind autograd's back.

Operations are those of torch's dispatcher. Native launches of ours, which get addresses, are
refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from progtuning_kernels import backend

READS = frozenset(
    "_local_scalar_dense equal nonzero masked_select _unique _unique2 unique_dim "
    "unique_consecutive unique_dim_consecutive bincount is_nonzero".split()
)


_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}


_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


def _has_mask(indices: Any) -> bool:
    """Whether the number of places depends on values."""
    return any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(indices))


class CaptureError(RuntimeError):
    """What a capture of a GPU refuses."""


class Operation(NamedTuple):
    """One call; tensors are aliases, which keep memory but are nobody else's."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: Any

    @property
    def numbers(self) -> list[int | float | bool]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, int | float)]


class Recording(TorchDispatchMode):
    """Operations of one `pool.recording()`, as its context yields them."""

    def __init__(self, pool: RecorderPool) -> None:
        super().__init__()
        self._pool = pool
        self.operations: list[Operation] = []
        self.replays = 0
        self.made: dict[int, Tensor] = {}  # memory of this recording, by storage
        self.outside: dict[int, Tensor] = {}  # memory that it only uses
        self._constants: set[int] = set()
        self._below: list[Tensor] = []  # the pool's, which a replay may overwrite
        self.freed: list[Tensor] = []  # what nothing held any more when it ended
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # memory from outside, and its values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS or (name in _BY_INDEX and _has_mask(args[1])):
            raise CaptureError(f"the host reads a value of the device: {func}")
        if any(isinstance(leaf, torch.Generator) for leaf in pytree.tree_leaves((args, kwargs))):
            raise CaptureError(f"random numbers of a generator of the program's own: {func}")
        given = {_key(t): t for t in _tensors((args, kwargs))}
        for t in _written(func, args, kwargs):
            if _key(t) not in self.made and _key(t) not in self._before:
                self._before[_key(t)] = _whole(t), _whole(t).clone()
        kept = _aliases((args, kwargs))
        found = func(*args, **kwargs)
        for key, t in given.items():
            if name == "lift_fresh":  # of a number that is written to a place: a constant
                self._constants.add(key)
            if key not in self.made and key not in self._constants:
                self.outside.setdefault(key, _whole(t))
        for t in _tensors(found):
            if _key(t) not in given:
                self.made.setdefault(_key(t), _whole(t))
        self.operations.append(Operation(func, *kept, _aliases(found)))
        return found

    def begin(self) -> None:
        self._below = self._pool.released()

    def end(self) -> None:
        for whole, values in self._before.values():
            whole.copy_(values)
        self._before.clear()
        for whole in self.made.values():
            _spoil(whole)

    def replay(self) -> None:
        """Run it again, on the same memory."""
        for whole in (*self._below, *self._pool.gone(self.outside), *self.made.values()):
            _spoil(whole)
        written = [
            t
            for op in self.operations
            for t in (*_written(op.func, op.args, op.kwargs), *_tensors(op.found))
        ]
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),  # what it casts was recorded
            torch.autograd._unsafe_preserve_version_counter(tuple(written)),
        ):
            for operation in self.operations:
                _repeat(operation)
        for whole in self.freed:  # later operations of the same may lie there
            _spoil(whole)
        self.replays += 1

    def numbers(self) -> list[tuple[str, list[int | float | bool]]]:
        """The host's numbers that are baked in, by operation."""
        return [(str(op.func), op.numbers) for op in self.operations]


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _whole(t: Tensor) -> Tensor:
    """All of the memory behind a tensor, with no version of the tensor's."""
    dtype = t.dtype if t.is_floating_point() else torch.uint8
    return torch.empty(0, dtype=dtype).set_(t.untyped_storage())


def _spoil(whole: Tensor) -> None:
    # not just any integer: a backward is recorded with what the forward's memory is by then
    whole.fill_(torch.nan if whole.is_floating_point() else 0)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _aliases(values: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, values)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Arguments that an operation writes to."""
    written = []
    if func.overloadpacket.__name__ == "native_batch_norm" and args[5]:
        written += _tensors(args[3:5])  # running statistics, of which the schema says nothing
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += _tensors(kwargs.get(argument.name, args[i] if i < len(args) else None))
    return written


def _repeat(operation: Operation) -> None:
    func, args, kwargs, found = operation
    if func.is_view:
        return
    for old, new in zip(_tensors(found), _tensors(func(*args, **kwargs)), strict=True):
        if _key(old) != _key(new):
            old.copy_(new)


class _NoData(TorchFunctionMode):
    """Refuses tensors of the host's data, which come to a GPU by a copy of pageable memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FROM_DATA and not isinstance(args[-1], Tensor):
            raise CaptureError(f"a tensor is made from the host's data: {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Refusing:
    """The native extension, whose launches are refused."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_cpu"):
            return getattr(self._extension, name)
        raise CaptureError(f"a native launch on the CPU: {name}")


class RecorderPool:
    """Stands in for `CudaPool`.

    Attributes:
        recordings: all of them, in order.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.recordings: list[Recording] = []

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        recording, random_state = Recording(self), torch.get_rng_state()
        recording.begin()
        native = backend.native_extension()
        refusing = None if native is None else _Refusing(native)
        with (
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
            mock.patch.object(backend, "native_extension", lambda: refusing),
        ):
            try:
                with _NoData(), recording:
                    yield recording
            finally:
                torch.set_rng_state(random_state)
                recording.end()
        self.recordings.append(recording)
        recording.freed = self.released()

    @property
    def nbytes(self) -> int:
        held = {key: t for r in self.recordings for key, t in r.made.items()}
        return sum(t.untyped_storage().nbytes() for t in held.values())

    def _own(self) -> Counter[int]:
        """How many tensors on each storage are recordings' alone."""
        own: Counter[int] = Counter()
        for r in self.recordings:
            own.update(r.made.keys())
            own.update(r.outside.keys())
            for op in r.operations:
                own.update(map(_key, _tensors((op.args, op.kwargs, op.found))))
        return own

    def released(self) -> list[Tensor]:
        """Memory of recordings that nothing else holds: another one's may lie under it."""
        own = self._own()
        made = {key: t for r in self.recordings for key, t in r.made.items()}
        return [t for key, t in made.items() if _holders(t) <= own[key]]

    def gone(self, outside: dict[int, Tensor]) -> list[Tensor]:
        """Memory from outside that nothing holds any more."""
        own = self._own()
        made = {key for r in self.recordings for key in r.made}
        return [t for key, t in outside.items() if key not in made and _holders(t) <= own[key]]


def _holders(t: Tensor) -> int:
    """Tensors on a storage, as far as it counts them: one more is Python's own handle of it."""
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata) - 1
