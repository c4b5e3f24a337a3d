"""CPU tensors that tell Python that they lie on a GPU, and a list of what the host waits for.

Every branch for a GPU is then taken, with real values and real autograd. `PretendCuda` is a
context: `pretend.put(...)` says which tensors lie on the GPU, and what is computed from them does,
too. `pretend.events` lists reads of such a tensor by the host, and copies of the host's memory to
it.

Traps that are avoided, and limits:

- Where a tensor lies is kept with its memory, so that views, `.data` and parameters agree, and an
  address that is used again means nothing.
- `.to`, `.cpu()` and `.cuda()` copy, as they do between devices; torch's CPU would hand the same
  tensor out.
- Memory that torch asks for inside a function or in backward lies on the GPU if an input of that
  function does, and in every backward. What asks for a device there, inside torch, is told the
  truth: the CPU.
- `Tensor.backward` is a function of torch, too, inside which a mode is off: it is switched on again
  for what runs in backward. Operations that autograd calls there are functions of Python again.
- Tensors of the host and of the GPU in one operation raise, as on a GPU.
- Code behind another library's cache (`functools.cache`) may remember that there was a GPU:
  transformers' is cleared at both ends.
- Autograd runs in this thread, a GPU's in one of its own. Nothing waits, nothing runs in any order
  but the program's, and `torch.autocast("cuda")` casts nothing.
"""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

import progtuning_kernels

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
H200 = {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 140 << 30}
L2_BYTES = 60 << 20
STREAM = 7  # a raw handle

# "read": the host waits for a value. "pageable": a copy of memory that is not pinned, for which the
# host waits, too. "pinned": a copy that the host does not wait for. "awaited": it does.
Kind = Literal["read", "pageable", "pinned", "awaited"]

_TORCH = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_paths()["stdlib"]
_SUPPORT = str(Path(__file__).parent)
_OWNERS = {
    "ours": str(Path(progtuning_kernels.__file__).parent),
    "transformers": str(Path(transformers.__file__).parent),
}


class Event(NamedTuple):
    """Something that the host did with a tensor of the GPU.

    Attributes:
        owner: of the innermost line outside torch: "ours", "transformers" or "user".
        line: that line, as file:number.
        what: the operation.
    """

    kind: Kind
    what: str
    owner: str
    line: str


def _here() -> tuple[str, str]:
    """Owner and line of the innermost frame outside torch, the standard library and this folder."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        library = file.startswith(_STANDARD) and "site-packages" not in file
        if not library and not file.startswith((_TORCH, _SUPPORT, "<")):
            break
        frame = frame.f_back
    file = frame.f_code.co_filename
    owner = next((name for name, at in _OWNERS.items() if file.startswith(at)), "user")
    return owner, f"{file}:{frame.f_lineno}"


# A wrapper subclass, such as logits that are not computed yet, has no memory: it has this itself.
_PLACE = "_pretended_place"


def _holder(t: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        try:
            return t.untyped_storage()
        except (NotImplementedError, RuntimeError):  # of a sparse tensor, of a wrapper subclass
            return t


def _place(t: Tensor) -> str:
    return getattr(_holder(t), _PLACE, "host")


def _set_place(t: Tensor, place: str) -> None:
    setattr(_holder(t), _PLACE, place)


def on_gpu(t: Tensor) -> bool:
    """Whether the tensor lies on the GPU that is pretended."""
    return _place(t) == "gpu"


def _tensors(*values: Any) -> list[Tensor]:
    """Those in the containers that operations take and give; a pytree would take thrice as long."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


class PretendCuda:
    """The context; not to be nested.

    Attributes:
        events: what the host did, in order; clear it before what is to be looked at.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._watching = True
        # of the function of torch that runs; None: torch's own backward
        self.inputs: tuple[Any, ...] | None = ()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PretendCuda:
        _forget_transformers_answers()
        self._stack.callback(_forget_transformers_answers)
        for target, name, value in _stand_ins(self):
            self._stack.enter_context(mock.patch.object(target, name, value, create=True))
        self._stack.enter_context(_Operations(self))
        functions = self._stack.enter_context(_Functions(self))
        run = torch.autograd._engine_run_backward
        self._stack.enter_context(
            mock.patch.object(torch.autograd, "_engine_run_backward", functions.around(run))
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def put(self, values: Any) -> Any:
        """Lay modules, and tensors in any containers, on the GPU, without an event; the same."""
        if isinstance(values, nn.Module):
            values_of = [*values.parameters(), *values.buffers()]
        else:
            values_of = _tensors(values)
        for t in values_of:
            _set_place(t, "gpu")
        return values

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """A context whose events are not listed."""
        before, self._watching = self._watching, False
        try:
            yield
        finally:
            self._watching = before

    def note(self, kind: Kind, what: str) -> None:
        if self._watching:
            self.events.append(Event(kind, what, *_here()))

    def lines(self, kind: Kind, owner: str | None = None) -> Counter[str]:
        """How often each line did it."""
        return Counter(
            event.line
            for event in self.events
            if event.kind == kind and owner in (None, event.owner)
        )

    def note_copy(self, source: Tensor, what: str, *, non_blocking: bool) -> None:
        """A copy of the host's memory to the GPU."""
        if _place(source) != "pinned":
            self.note("pageable", what)
        else:
            self.note("pinned" if non_blocking else "awaited", what)


def _forget_transformers_answers() -> None:
    for function in vars(transformers.utils.import_utils).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


_GETS_DEVICE = Tensor.device.__get__
_IS_CUDA, _IS_CPU = Tensor.is_cuda.__get__, Tensor.is_cpu.__get__
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
# handlers of tensors and parameters, which do nothing
_PLAIN = (Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
_BY_INDEX = {Tensor.__getitem__, Tensor.__setitem__}
_TO_NUMPY = {Tensor.numpy, Tensor.__array__}


def _is_gpu(device: Any) -> bool:
    if device is None or isinstance(device, bool):
        return False
    return isinstance(device, int) or torch.device(device).type == "cuda"


class _Functions(TorchFunctionMode):
    """Devices, and what torch does without an operation."""

    def __init__(self, pretend: PretendCuda) -> None:
        super().__init__()
        self._pretend = pretend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if types and torch._C._is_torch_function_enabled():
            for kind in types:
                own = kind.__torch_function__
                if getattr(own, "__func__", own) not in _PLAIN:
                    with self:  # it asks for devices, too
                        return own(func, types, args, kwargs)
        first = args[0] if args else None
        if func == _GETS_DEVICE:  # made anew at every access
            return GPU if on_gpu(first) else func(*args)
        if func in (_IS_CUDA, _IS_CPU):
            return on_gpu(first) == (func == _IS_CUDA)
        if func in (Tensor.get_device, torch.get_device):
            return 0 if on_gpu(first) else -1
        if func is Tensor.record_stream:
            return None
        if func is Tensor.is_pinned:
            return _place(first) == "pinned"
        if func is Tensor.pin_memory:
            return self._placed(first.clone(), "pinned")
        if func in _TO_NUMPY and on_gpu(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
        if func is Tensor.tolist and on_gpu(first):
            self._pretend.note("read", "tolist")
            return func(*args)
        if func is Tensor.__deepcopy__:
            return self._placed(func(*args, **kwargs), _place(first))
        if func is Tensor.cpu:
            return self._moved(first, False, copy=False)
        if func is Tensor.cuda:
            blocks = not (kwargs.get("non_blocking") or args[2:])
            return self._moved(first, True, copy=False, non_blocking=not blocks)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        return self._elsewhere(func, args, kwargs)

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` in this mode, whether it is on or not."""

        def call(*args: Any, **kwargs: Any) -> Any:
            on = self in _get_current_function_mode_stack()
            with contextlib.nullcontext() if on else self, self._inside(None):
                return run(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def _inside(self, inputs: tuple[Any, ...] | None) -> Iterator[None]:
        before, self._pretend.inputs = self._pretend.inputs, inputs
        try:
            yield
        finally:
            self._pretend.inputs = before

    def _placed(self, t: Tensor, place: str) -> Tensor:
        _set_place(t, place)
        return t

    def _elsewhere(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A function that may be told where its result is to lie."""
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if func is Tensor.new_tensor and device is None:
            device = GPU if on_gpu(args[0]) else CPU
        if device is None:
            pretend, inputs = self._pretend, self._pretend.inputs
            # an index that is a list is made on the host
            pretend.inputs = () if func in _BY_INDEX else (args, kwargs)
            try:
                found = func(*args, **kwargs)
            finally:
                pretend.inputs = inputs
            return self._placed(found, "pinned") if pinned else found
        if torch.device(device).type in ("cpu", "cuda"):
            kwargs["device"] = CPU
        found = func(*args, **kwargs)
        if not isinstance(found, Tensor) or found.is_meta:
            return found
        place = "gpu" if _is_gpu(device) else "pinned" if pinned else "host"
        if func in _FROM_DATA:
            given = args[1] if func is Tensor.new_tensor else args[0]
            was_on_gpu = isinstance(given, Tensor) and on_gpu(given)
            if isinstance(given, Tensor):
                found = found.clone() if found is given else found
            if place == "gpu" and not was_on_gpu:
                self._pretend.note("pageable", f"{func.__name__}(data, device=cuda)")
            elif place != "gpu" and was_on_gpu:
                self._pretend.note("read", f"{func.__name__}(tensor of the GPU, device=cpu)")
        return self._placed(found, place)

    def _to(self, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = ("device", "dtype", "non_blocking", "copy")
        if args and isinstance(args[0], Tensor):
            given = {"device": GPU if on_gpu(args[0]) else CPU, "dtype": args[0].dtype}
            given |= dict(zip(names[2:], args[1:], strict=False))
        elif args and isinstance(args[0], torch.dtype):
            given = dict(zip(names[1:], args, strict=False))
        else:
            given = dict(zip(names, args, strict=False))
        given |= kwargs
        if "other" in given:
            other = given.pop("other")
            given |= {"device": GPU if on_gpu(other) else CPU, "dtype": other.dtype}
        device = given.pop("device", None)
        if device is not None and not isinstance(device, int):
            if torch.device(device).type not in ("cpu", "cuda"):
                return t.to(device=device, **given)
        target = on_gpu(t) if device is None else _is_gpu(device)
        return self._moved(t, target, **given)

    def _moved(
        self,
        t: Tensor,
        to_gpu: bool,
        *,
        copy: bool = False,
        non_blocking: bool = False,
        **options: Any,
    ) -> Tensor:
        if on_gpu(t) == to_gpu:
            return t.to(copy=copy, **options) if copy or options else t
        if to_gpu:
            self._pretend.note_copy(t, "to(cuda)", non_blocking=non_blocking)
        else:
            self._pretend.note("read", "to(cpu)")
        return self._placed(t.to(copy=True, **options), "gpu" if to_gpu else "host")


class _Operations(TorchDispatchMode):
    """Where results lie, and what reads values or copies memory."""

    # the host waits for a value, or for the number of elements of the result
    _READS = frozenset(
        "_local_scalar_dense equal nonzero masked_select _unique _unique2 unique_dim "
        "unique_consecutive unique_dim_consecutive bincount is_nonzero".split()
    )
    _MIXES = frozenset(("copy_", "_foreach_copy_", "index", "index_put_", "_index_put_impl_"))

    def __init__(self, pretend: PretendCuda) -> None:
        super().__init__()
        self._pretend = pretend

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = _tensors(args, kwargs)
        places = [on_gpu(t) for t in given]
        anywhere = any(places)
        if anywhere:
            self._look(name, args, kwargs, given, places)
        elif not given:
            inputs = self._pretend.inputs
            anywhere = inputs is None or any(map(on_gpu, _tensors(inputs)))
        with torch._C.DisableTorchFunction():  # of backward, where no function of Python is above
            found = func(*args, **kwargs)
        if anywhere and not (name == "copy_" and not places[0]):  # which may be of the host
            for t in _tensors(found):
                if all(t is not old for old in given) and not hasattr(_holder(t), _PLACE):
                    _set_place(t, "gpu")
        return found

    def _look(
        self, name: str, args: Any, kwargs: Any, given: list[Tensor], places: list[bool]
    ) -> None:
        if name in self._READS and places[0]:
            self._pretend.note("read", name)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._pretend.note("read", "repeat_interleave without output_size")
        elif name in ("index", "index_put_", "_index_put_impl_"):
            self._look_at_index(name, args)
        elif name == "copy_":
            self._look_at_copy(args[0], args[1], bool(kwargs.get("non_blocking") or args[2:3]))
        elif name == "_foreach_copy_":
            for target, source in zip(args[0], args[1], strict=True):
                self._look_at_copy(target, source, bool(kwargs.get("non_blocking") or args[2:3]))
        if name not in self._MIXES and not all(places):
            wrong = [t for t, here in zip(given, places, strict=True) if not here and t.ndim]
            if wrong:
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, but found at least "
                    f"two devices, cuda:0 and cpu (a tensor of shape {tuple(wrong[0].shape)})"
                )

    def _look_at_copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        if on_gpu(target) and not on_gpu(source):
            self._pretend.note_copy(source, "copy_ to the GPU", non_blocking=non_blocking)
        elif on_gpu(source) and not on_gpu(target):
            waits = not non_blocking or _place(target) != "pinned"
            self._pretend.note("read" if waits else "pinned", "copy_ to the host")

    def _look_at_index(self, name: str, args: Any) -> None:
        if not on_gpu(args[0]):
            return
        # one value of the host fills what a mask covers, and nothing is counted
        fills = name != "index" and args[2].numel() == 1 and not on_gpu(args[2])
        for index in args[1]:
            if index is None:
                continue
            if not on_gpu(index):
                self._pretend.note("pageable", f"{name} by an index of the host")
            elif index.dtype in (torch.bool, torch.uint8) and not fills:
                self._pretend.note("read", f"{name} by a mask")


class _Event:
    """Passes at once."""

    def __init__(self, pretend: PretendCuda) -> None:
        self._pretend = pretend

    def record(self, *args: Any) -> None:
        pass

    wait = record

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self._pretend.note("read", "Event.synchronize")

    def elapsed_time(self, other: _Event) -> float:
        return 1.0


class _Stream:
    device, cuda_stream = GPU, STREAM

    def __init__(self, pretend: PretendCuda) -> None:
        self._pretend = pretend

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event(self._pretend)

    def synchronize(self) -> None:
        self._pretend.note("read", "Stream.synchronize")


class _Generator(torch.Generator):
    """Draws on the CPU, whatever device it is of."""

    _device = CPU

    def __new__(cls, device: Any = CPU) -> _Generator:
        made = super().__new__(cls, CPU)
        made._device = GPU if _is_gpu(device) else CPU
        return made

    @property
    def device(self) -> torch.device:
        return self._device


class _Graph:
    """What runs under its capture runs once; a replay does nothing."""

    def replay(self) -> None:
        pass

    reset = replay


def _stand_ins(pretend: PretendCuda) -> list[tuple[Any, str, Any]]:
    """What torch.cuda would say of one H200."""
    properties = SimpleNamespace(
        name="pretended H200", warp_size=32, L2_cache_size=L2_BYTES, **H200
    )
    free = (100 << 30, H200["total_memory"])
    captures: list[Any] = []  # those that are under way

    @contextlib.contextmanager
    def graph(
        graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        captures.append(graph)
        try:
            yield
        finally:
            captures.pop()

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **options: True,
        "is_current_stream_capturing": lambda: bool(captures),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(pretend),
        "default_stream": lambda device=None: _Stream(pretend),
        "Stream": lambda *args, **options: _Stream(pretend),
        "Event": lambda *args, **options: _Event(pretend),
        "synchronize": lambda device=None: pretend.note("read", "torch.cuda.synchronize"),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: free,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,
        "max_memory_reserved": lambda device=None: 1,
        "CUDAGraph": _Graph,
        "graph": graph,
        "memory_snapshot": list,
        "graph_pool_handle": lambda: (0, 0),
        "set_sync_debug_mode": lambda mode: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
    }
    wrapped = Tensor._make_wrapper_subclass

    def make_wrapper_subclass(cls: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        made = wrapped(cls, *args, device=CPU if _is_gpu(device) else device, **options)
        if _is_gpu(device):
            _set_place(made, "gpu")
        return made

    return [
        *((torch.cuda, name, answer) for name, answer in answers.items()),
        (torch, "Generator", _Generator),
        (torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM),
        (Tensor, "_make_wrapper_subclass", staticmethod(make_wrapper_subclass)),
    ]
