"""Which modules of a model run a freeze-aware op, which keep their own forward, and why."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import backend
from ..model.derived_classes import base_of, derive, root_of
from ..model.layout import Layout
from ..sharding import Sharding, fsdp_groups, fsdp_records
from ..text_table import Table, as_html, as_text
from . import checks, cpu_dropout
from .call_costs import CallCosts
from .kinds import GELU, HEAD, CannotSwap, Swap, bypassed, language_model_head, recognise

Kernels = Literal["auto", "on", "off"]

# Of logits. Deferring them saves memory, not time, and a short loss is not worth the machinery.
_LEAST_LOGITS_BYTES = 64 * 2**20

_FREED = (
    "fully_shard frees its weight when a forward ends: pass reshard_after_forward=False to the "
    "call that shards it"
)


@dataclass(frozen=True)
class KernelRow:
    """Modules of one class that are all swapped, or all kept for one reason.

    Attributes:
        kind: such as "RMSNorm".
        module_class: name of the class.
        count: number of modules.
        example: path of the first.
        swapped: whether an op runs them.
        because: from which size on an op runs them, or why none does.
    """

    kind: str
    module_class: str
    count: int
    example: str
    swapped: bool
    because: str


@dataclass(frozen=True)
class KernelReport:
    """Which modules run freeze-aware ops; `print` it.

    Attributes:
        rows: one per kind, class and reason; empty where nothing was considered.
        nothing: why no module was considered, None where some were.
    """

    rows: tuple[KernelRow, ...]
    nothing: str | None = None

    @property
    def swapped(self) -> int:
        """Number of modules that run a freeze-aware op."""
        return sum(row.count for row in self.rows if row.swapped)

    def summary(self) -> str:
        """One line."""
        if self.nothing is not None:
            return f"kernels: nothing is swapped: {self.nothing}"
        kept = sum(row.count for row in self.rows if not row.swapped)
        return f"kernels: {self.swapped} modules swapped, {kept} keep their own forward"

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        if not self.rows:
            return [self.summary()]
        cells = [("kind", "class", "modules", "first", "swapped", "because")]
        for row in self.rows:
            swapped = "yes" if row.swapped else "no"
            first = (row.kind, row.module_class, str(row.count), row.example)
            cells.append((*first, swapped, row.because))
        return [Table(cells, left=range(6))]


class _Verdict(NamedTuple):
    """Whether modules of one class, settings, shapes and dtypes are swapped, and why."""

    made: type | None  # the class that runs the op
    because: str


# paths of modules by kind, class name, whether they are swapped, and why
_Groups = dict[tuple[str, str, bool, str], list[str]]


def _report(groups: _Groups, nothing: str = "no module of a kind that an op runs") -> KernelReport:
    rows = [
        KernelRow(kind, name, len(paths), paths[0], swapped, because)
        for (kind, name, swapped, because), paths in groups.items()
    ]
    return KernelReport(tuple(rows), None if rows else nothing)


class KernelSwaps:
    """The swaps of one model.

    Args:
        model: the model that `layout` describes.
        kernels: "auto" swaps where it pays, which each call decides by the bytes at hand; "on"
            swaps for any size, which captured graphs want; "off" never.
        costs: what the modules' calls cost; empty at first.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        kernels: Kernels,
        costs: CallCosts | None = None,
    ) -> None:
        self._model = model
        self._layout = layout
        self._kernels = kernels
        self._costs = costs or CallCosts()
        self._device: torch.device | None = None
        self._verdicts: dict[Hashable, _Verdict] = {}
        self._swapped: list[nn.Module] = []
        self.report = KernelReport((), "no device was looked at")

    def install_swaps(self, device: torch.device) -> None:
        """Swap for this type of device, unless the last call was for the same."""
        if self._device is not None and self._device.type == device.type:
            return
        self.remove_swaps()
        self._device = device
        nothing = _reason_for_nothing(self._kernels, device)
        if nothing is not None:
            self.report = KernelReport((), nothing)
        elif device.type == "cpu" and backend.triton_reason(device) is not None:
            self.report = self._swap_dropout()
        else:
            self.report = self._swap_all(device)

    @property
    def weighs_calls(self) -> bool:
        """Whether what calls cost decides from which size on ops run."""
        return self._kernels == "auto" and self._device is not None and self._device.type != "cpu"

    def state_dict(self) -> dict[str, Any]:
        """What was measured to choose sizes: numbers by name; empty where nothing was."""
        return self._costs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Choose by what another run, or rank, has measured; whether swaps are to be made anew."""
        before = self._costs.state_dict()
        self._costs.load_state_dict(state)
        if self._costs.state_dict() == before:
            return False
        self._verdicts.clear()
        return self._device is not None

    def remove_swaps(self) -> None:
        """Give every swapped module its own class back."""
        for module in self._swapped:
            base = base_of(type(module))
            if base is not None:
                module.__class__ = base
        self._swapped.clear()
        self._device = None

    def _swap_dropout(self) -> KernelReport:
        """Swap dropout, and attention that drops: on a CPU no other op of ours runs."""
        from_bytes = 0 if self._kernels == "on" else cpu_dropout.FROM_BYTES
        because = "at any size"
        if from_bytes:
            because = (
                f"from {from_bytes // 1024} KiB a call on: below that it costs more than it saves"
            )
        groups: _Groups = defaultdict(list)
        for kind, path, module in list(cpu_dropout.dropping(self._model, self._layout)):
            base, against = type(module), _own_forward(module)
            groups[kind, base.__name__, against is None, against or because].append(path)
            if against is None:
                members = cpu_dropout.members(base, from_bytes)
                module.__class__ = derive(base, ("dropout", from_bytes), members)
                self._swapped.append(module)
        return _report(groups, "on a CPU dropout alone has an op of ours, and no module drops")

    def _swap_all(self, device: torch.device) -> KernelReport:
        groups: _Groups = defaultdict(list)
        for path, module, kind, swap in list(self._candidates()):
            made, because = None, swap
            if isinstance(swap, Swap):
                made, because = self._judge(module, swap, device)
            groups[kind, type(module).__name__, made is not None, because].append(path)
            if made is not None:
                module.__class__ = made
                self._swapped.append(module)
        return _report(groups)

    def _candidates(self) -> Iterator[tuple[str, nn.Module, str, Swap | str]]:
        """Path, module, kind, and swap or reason against one, of all but parts of a swapped one."""
        bypassed_ids: set[int] = set()
        heads = {id(module) for module in self._heads()}
        records = fsdp_records(self._model)
        for path, module in self._model.named_modules():
            if id(module) in bypassed_ids:
                continue
            try:
                if id(module) in heads:
                    sharding = Sharding.of(module, self._model)
                    swap = language_model_head(module, sharding)
                    if sharding is not None and not sharding.may_stay(self._model):
                        yield path, module, swap.kind, _FREED
                        continue
                else:
                    swap = recognise(module)
            except CannotSwap as error:
                yield path, module, type(module).__name__, str(error)
                continue
            if swap is None:
                continue
            reason = _reason_against(module, swap, records)
            if reason is None:
                bypassed_ids |= {id(module._modules[name]) for name in swap.inner}
            yield path, module, swap.kind, swap if reason is None else reason

    def _heads(self) -> Iterator[nn.Module]:
        """Linear layers of the head with as many outputs as the vocabulary has words."""
        config = getattr(self._model, "config", None)
        configs = [config, getattr(config, "text_config", None), getattr(config, "decoder", None)]
        sizes = {getattr(c, "vocab_size", None) for c in configs} - {None}
        for path in self._layout.module_paths(self._layout.head):
            for module in self._model.get_submodule(path).modules():
                plain = root_of(type(module)) is nn.Linear or fsdp_groups(module)
                if plain and getattr(module, "out_features", None) in sizes:
                    yield module

    def _judge(self, module: nn.Module, swap: Swap, device: torch.device) -> _Verdict:
        key = (type(module), swap.kind, swap.settings, *_signature(module))
        if key not in self._verdicts:
            self._verdicts[key] = self._examine(module, swap, device)
        return self._verdicts[key]

    def _examine(self, module: nn.Module, swap: Swap, device: torch.device) -> _Verdict:
        parameters = chain(module.parameters(), self._model.parameters())
        dtype = next((p.dtype for p in parameters if p.dtype in checks.TOLERANCE), None)
        if dtype is None:
            return _Verdict(None, "no parameter of a dtype that the op computes in")
        sample = [torch.empty(2, swap.width, dtype=dtype, device=device), None, None]
        try:
            chosen = backend.select(swap.op, sample)
        except RuntimeError as error:
            return _Verdict(None, backend.one_line(error))
        if chosen is swap.op.reference:
            return _Verdict(None, "the op would run its reference, which is the module's own code")
        differs = checks.difference(module, swap, device, dtype)
        if differs is not None:
            return _Verdict(None, differs)
        if swap.kind == GELU and checks.kernel_calls(module, swap, device, dtype) == 1:
            return _Verdict(None, "torch's own is one kernel, too, that moves the same bytes")
        try:
            from_bytes, because = self._from_bytes(module, swap, device, dtype)
        except Exception as error:
            return _Verdict(None, f"its calls were not timed: {backend.one_line(error)}")
        key = (swap.kind, swap.settings, from_bytes)
        return _Verdict(
            derive(type(module), key, _members(type(module), swap, from_bytes)), because
        )

    def _from_bytes(
        self, module: nn.Module, swap: Swap, device: torch.device, dtype: torch.dtype
    ) -> tuple[int, str]:
        """Bytes of the module's input from which on it runs the op, and why from there on."""
        # the interpreter is there to run the kernels; on a CPU it has no launch to weigh
        if not self.weighs_calls:
            return 0, "at any size"
        if swap.kind == HEAD:
            from_bytes = int(_LEAST_LOGITS_BYTES / swap.growth)
            why = f"below that its logits are less than {_LEAST_LOGITS_BYTES >> 20} MiB"
        else:
            name = f"{swap.kind}, {type(module).__name__}, {swap.width}, {dtype}"
            with checks.apart(device):
                cost = self._costs.cost(name, *checks.calls(module, swap, device, dtype))
            from_bytes = int(self._costs.from_bytes(cost, device) / swap.growth)
            why = (
                f"forward and backward take {cost.op_us:.0f} us of CPU time, its own code takes "
                f"{cost.own_us:.0f} us"
            )
        start = f"from {from_bytes / 1e6:.1f} MB of its input on" if from_bytes else "at any size"
        return from_bytes, f"{start}: {why}"


def _reason_for_nothing(kernels: Kernels, device: torch.device) -> str | None:
    if kernels == "off":
        return 'kernels="off"'
    forced = os.environ.get(backend.ENVIRONMENT_VARIABLE)
    if forced == "reference":
        return f"{backend.ENVIRONMENT_VARIABLE}=reference, which is the model's own code"
    reason = backend.triton_reason(device)
    if reason is None or device.type != "cpu":
        return reason
    against = cpu_dropout.reason_against()
    return against and f"on a CPU dropout alone has an op of ours, and it cannot run: {against}"


def _own_forward(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "it has a forward of its own, as accelerate and kernel hubs give it"
    return None


def _reason_against(
    module: nn.Module, swap: Swap, records: Mapping[tuple[int, str], Any]
) -> str | None:
    if (own := _own_forward(module)) is not None:
        return own
    if module._compiled_call_impl is not None:
        return "it is compiled"
    held = ((part._parameters, name) for part in module.modules() for name in part._parameters)
    for parameters, name in held:
        parameter, record = parameters[name], records.get((id(parameters), name))
        if parameter is None:
            continue
        # a shard of FSDP2 alone is a plain tensor in the module's forward
        gathered = record is not None and not record.is_dtensor
        if not gathered and type(parameter) not in (Tensor, nn.Parameter):
            return f"its parameters are of type {type(parameter).__name__}"
        if parameter.is_meta:
            return "its parameters are on the meta device"
    return bypassed(module, swap.inner)


def _signature(module: nn.Module) -> Iterator[Hashable]:
    """Classes, shapes and dtypes inside a module, which decide with its settings if a swap fits."""
    for part in module.modules():
        yield type(part)
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield name, tuple(parameter.shape), parameter.dtype


def _members(base: type, swap: Swap, from_bytes: int) -> dict[str, Callable[..., Any]]:
    run, inputs = swap.forward, swap.inputs

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # compiled code keeps the original, which the compiler fuses with its neighbours
        if kwargs or len(args) != inputs or torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        x = args[0]
        if x.numel() * x.element_size() < from_bytes:
            return base.forward(self, *args)
        return run(self, *args)

    return {"forward": forward}
