"""Notices when the prefix is not the function any more that its stored outputs came from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..model.forward_hooks import ForwardHooks
from ..model.layout import EMBEDDINGS, Layout
from ..packing import runs_padded
from ..sharding import fsdp_records, is_sharded, local_of
from .prefix_inputs import Place

_PLAIN = (bool, int, float, str)
_MOST_COPIED_BYTES = 1 << 20


class PrefixWeights:
    """Watches embeddings and blocks below a level.

    Looked at before every forward, which costs 0.1 ms for four blocks of BERT: the version counter
    and address of every tensor, the modules' modes, and what PEFT notes about merged adapters. Only
    writes through `tensor.data` leave none of these traces. Where there is a process group, a
    buffer that is written with the bytes that it holds is as it was: DDP broadcasts buffers before
    every forward, and in torch 2.10 their versions count that.

    FSDP2 writes what it has gathered in every forward: of its parameters the shard is looked at,
    whatever the module holds at the moment.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self._modules: list[tuple[int, list[nn.Module]]] = []  # by watched unit
        around = [model.get_submodule(path) for path in layout.containers]
        configs = {id(c): c for m in around if hasattr(c := getattr(m, "config", None), "__dict__")}
        self._around = [vars(carrier) for carrier in (*around, *configs.values())]
        self._inside: list[dict[str, Any]] = []  # attributes of watched modules
        self._seen: list[tuple[Any, ...]] = []
        self._held: list[torch.Tensor] = []  # alive, so that no address or id is used twice
        self._places: list[tuple[Place, torch.Tensor, tuple[int, ...]]] = []
        self._records: dict[tuple[int, str], Any] = {}  # of FSDP2
        # in a process group: buffers, what they held, and at which version
        self._copies: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._rewritten: dict[int, int] = {}  # by id of a buffer: writes of the bytes it held

    def watch(self, level: int) -> None:
        """Take the state of the units below block `level` for the one to compare with."""
        self._modules = []
        for unit in range(EMBEDDINGS, level):
            roots = map(self._model.get_submodule, self._layout.module_paths(unit))
            modules = dict.fromkeys(module for root in roots for module in root.modules())
            self._modules.append((unit, list(modules)))
        self._records = fsdp_records(self._model)
        self._inside = [vars(module) for _, modules in self._modules for module in modules]
        self._seen = [self._state(modules) for _, modules in self._modules]
        self._held = [tensor for _, tensor in self._named(level)]
        inside = (own["_buffers"].values() for own in self._inside)
        self._copies.clear()
        self._copy(*itertools.chain(*inside), *(tensor for _, tensor, _ in self._places))

    def watch_place(self, place: Place) -> bool:
        """Watch, at every level, a tensor that the prefix reads elsewhere; False if it is known."""
        held, key = place
        if any(other is held and name == key for (other, name), _, _ in self._places):
            return False
        kept = self._kept(held, key)
        self._places.append((place, kept, self._trace(kept)))
        self._copy(kept)
        return True

    def _copy(self, *tensors: torch.Tensor | None) -> None:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            for t in tensors:
                if t is not None and not is_sharded(t) and t.nbytes <= _MOST_COPIED_BYTES:
                    version, _ = self._trace(t)
                    self._copies.append((t, t.detach().clone(), version))

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """Those of the watched units, on this rank."""
        return [local_of(tensor.detach()) for tensor in self._held]

    @property
    def gathered(self) -> Sequence[torch.Tensor]:
        """What FSDP2 has made of shards of the watched units; it is written in every forward."""
        watched = {id(tensor) for tensor in self._held}
        whole = [
            getattr(record, "_unsharded_param", None)
            for record in self._records.values()
            if id(record.sharded_param) in watched
        ]
        return [tensor for tensor in whole if tensor is not None]

    def lowest_change(self) -> tuple[int, str] | None:
        """Lowest watched unit that is not as it was, and what changed; None when all are."""
        for tensor, copy, version in self._copies:
            writes = tensor._version - version
            if writes != self._rewritten.get(id(tensor), 0) and torch.equal(tensor, copy):
                self._rewritten[id(tensor)] = writes
        for (held, key), tensor, state in self._places:
            if self._kept(held, key) is not tensor or self._trace(tensor) != state:
                self._places.clear()  # found again, if it is still read
                return EMBEDDINGS, key
        for (unit, modules), seen in zip(self._modules, self._seen, strict=True):
            if self._state(modules) != seen:
                return unit, self._layout.unit_label(unit)
        return None

    def settings(self) -> list[tuple[str, Any]]:
        """Numbers, strings and flags of the model, of what leads to its blocks, of configs and of
        watched modules, and the hooks and forwards that these have of their own: whether the prefix
        reads one of them cannot be seen, that one has changed can.
        """
        plain = [
            (name, value)
            for carrier in (*self._around, *self._inside)
            for name, value in carrier.items()
            if type(value) in _PLAIN and name != "training"
        ]
        for own in self._inside:
            forward = own.get("forward")
            if _of_one_forward(forward):
                forward = None
            both = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
            hooks = [id(hook) for hook in both if not (runs_padded(hook) or _of_one_forward(hook))]
            if hooks or forward is not None:
                plain.append(("hooks", (*hooks, id(forward))))
        return plain

    def hooked(self) -> str | None:
        """Class of a watched module with a forward hook of the user's; None where there is none."""
        for _, modules in self._modules:
            for module in modules:
                for hook in module._forward_hooks.values():
                    # transformers' own, for hidden states, get what they want from the stand-ins;
                    # FSDP2's reshard what a module that is left out has not gathered
                    source = getattr(hook, "__module__", None) or ""
                    own = source.startswith(("transformers.", "torch.distributed."))
                    if not own and not runs_padded(hook):
                        return type(module).__name__
        return None

    def held_inside(self) -> dict[Any, torch.Tensor]:
        """Tensors among the attributes of watched modules, by owner and name."""
        return _held_by(self._inside)

    def held_around(self) -> dict[Any, torch.Tensor]:
        """The same of the model and what leads to its blocks."""
        return _held_by(self._around)

    def adapters(self) -> bytes:
        """Which adapters are in use: switching one off and on again gives the old function back."""
        used = [
            (own["_disable_adapters"], own.get("_active_adapter"))
            for own in self._inside
            if "_disable_adapters" in own
        ]
        return repr(used).encode() if used else b""

    def trainable(self, level: int) -> str | None:
        """Name of a parameter below `level` that requires grad."""
        return next((name for name, t in self._named(level) if t.requires_grad), None)

    def fingerprint(self, level: int) -> bytes:
        """Digest of 64 bytes of all tensors below block `level`, and of those read elsewhere; all
        ranks of a sharded model come to this together.
        """
        digest = hashlib.blake2b()
        places = [(key, tensor) for (_, key), tensor, _ in self._places]
        for name, tensor in (*self._named(level), *places):
            tensor = tensor.detach()
            tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
            digest.update(f"{name}:{tensor.dtype}{tuple(tensor.shape)};".encode())
            if tensor.numel():
                flat = tensor.cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy())
        return digest.digest()

    def _named(self, level: int) -> Iterator[tuple[str, torch.Tensor]]:
        for unit in range(EMBEDDINGS, level):
            for path in self._layout.module_paths(unit):
                module = self._model.get_submodule(path)
                for name, parameter in module.named_parameters(path):
                    owner = self._model.get_submodule(name.rpartition(".")[0])
                    kept = self._kept(owner._parameters, name.rpartition(".")[2])
                    yield name, parameter if kept is None else kept
                yield from module.named_buffers(path)

    def _kept(self, held: Any, key: str) -> torch.Tensor | None:
        """What a module holds at `held[key]`, or the shard that this was gathered from."""
        record = self._records.get((id(held), key))
        return held.get(key) if record is None else record.sharded_param

    def _trace(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """What a write to a tensor changes: of a shard, through its `DTensor` or past it."""
        if not is_sharded(tensor):
            version = tensor._version - self._rewritten.get(id(tensor), 0)
            return version, tensor.data_ptr()
        with torch.no_grad():
            local = tensor.to_local()
        return tensor._version, local._version, local.data_ptr()

    def _state(self, modules: list[nn.Module]) -> tuple[Any, ...]:
        state: list[Any] = []
        for module in modules:
            own = module.__dict__
            state.append(own["training"])
            for tensors in (own["_parameters"], own["_buffers"]):
                for name in tensors:
                    if (tensor := self._kept(tensors, name)) is not None:
                        state += (id(tensor), *self._trace(tensor))
            state += map(id, own["_modules"].values())
            if "merged_adapters" in own:  # PEFT merges through `weight.data`
                state.append(repr((own["merged_adapters"], own.get("scaling"))))
        return tuple(state)


def _held_by(carriers: list[dict[str, Any]]) -> dict[Any, torch.Tensor]:
    return {
        (id(own), name): value
        for own in carriers
        for name, value in own.items()
        if isinstance(value, torch.Tensor)
    }


def _of_one_forward(function: Any) -> bool:
    """Whether it is there for a single forward, which is proved or counted."""
    return isinstance(getattr(function, "__self__", None), ForwardHooks)
