"""Trains chosen rows of a tensor: a parameter of their own gets gradient, state and update.

The tensor itself is frozen and stays what modules compute with, so that a forward gives the bits
that it gave before. Its chosen rows are held a second time, as a leaf (k, d), by every module that
holds the tensor: `parameters()`, DDP and `fully_shard` find it there. A lookup and a product with
the tensor send their gradient to this leaf, and nothing of the tensor's size is made for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..sharding import forget, is_sharded, local_of
from .adapters import save_with_adapter
from .derived_classes import derive, root_of, without_derived_ancestors
from .families import UnsupportedModelError

_RECORDS = "_progtuning_rows"  # of a module: by the name of the tensor, what is known of its rows
_SUFFIX = "_rows"  # of the name under which they are held
_CURE = "call handle.unpatch() before that, and patch_model again after it"
_OF_PEFT = re.compile(r"\.(base_layer|modules_to_save\.[^.]+)$")  # what its layers wrap
_IDLE_STEPS = 8  # of an optimizer; a loss scale that is too large makes it skip the first few


class _Lookup(torch.autograd.Function):
    """`F.embedding`, with the gradient of some rows of the table."""

    @staticmethod
    def forward(ctx, tokens, table, rows, places, padding_idx):
        ctx.save_for_backward(tokens, places)
        ctx.rows, ctx.padding_idx = len(rows), padding_idx
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, upstream):
        tokens, places = ctx.saved_tensors
        found = places[tokens]  # of every token among the rows; their number where it is none
        if ctx.padding_idx >= 0:
            found = found.masked_fill(tokens == ctx.padding_idx, ctx.rows)
        dense = torch.ops.aten.embedding_dense_backward
        gradient = dense(upstream, found, ctx.rows + 1, ctx.rows, False)
        return None, None, gradient[:-1], None, None


class _Product(torch.autograd.Function):
    """`F.linear`, with the gradient of some rows of the weight."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, ids):
        ctx.save_for_backward(hidden, weight if ctx.needs_input_grad[0] else None, rows, ids)
        return F.linear(hidden, weight, bias).detach()  # no view: it may be written into

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, rows, ids = ctx.saved_tensors
        of_hidden, _, of_bias, of_rows, _ = ctx.needs_input_grad
        if of_hidden and torch.is_grad_enabled():  # create_graph: d_hidden depends on the rows
            weight = _Whole.apply(weight, rows, ids)
        flat = upstream.reshape(-1, upstream.shape[-1])  # (N, V)
        d_hidden = flat.mm(weight).view(hidden.shape) if of_hidden else None
        d_bias = flat.sum(dim=0) if of_bias else None
        d_rows = None
        if of_rows:
            d_rows = flat.index_select(1, ids).t().mm(hidden.reshape(-1, hidden.shape[-1]))
        return d_hidden, None, d_bias, d_rows, None


class _Whole(torch.autograd.Function):
    """The tensor, for code that computes with all of it: the rows get theirs of the gradient."""

    @staticmethod
    def forward(ctx, weight, rows, ids):
        ctx.save_for_backward(ids)
        return weight.detach()

    @staticmethod
    def backward(ctx, upstream):
        (ids,) = ctx.saved_tensors
        return None, upstream.index_select(0, ids), None


class _Routing(TorchFunctionMode):
    """In the forward of a module: lookups in its tensors, and products with them, give a gradient
    to the rows that train. Any other use of the tensors gives none.
    """

    def __init__(self, routes: Sequence[tuple[Rows, Tensor, Tensor]]) -> None:
        super().__init__()
        self._routes = routes  # rows, the tensor and the leaf of each

    def __enter__(self) -> Any:
        for rows, *_ in self._routes:
            rows.routed_inside += 1
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for rows, *_ in self._routes:
            rows.routed_inside -= 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding:
            return self._lookup(*args, **kwargs)
        if func is F.linear:
            return self._product(*args, **kwargs)
        return func(*args, **kwargs)

    def _lookup(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        plain = max_norm is None and not (scale_grad_by_freq or sparse)
        for rows, table, leaf in self._routes if plain else ():
            if weight is table:
                return lookup(rows, input, table, leaf, padding_idx)
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for rows, own, leaf in self._routes:
            if weight is own:
                return product(input, own, bias, leaf, rows.on(own)[0])
        return F.linear(input, weight, bias)


def lookup(
    rows: Rows, tokens: Tensor, table: Tensor, leaf: Tensor, padding_idx: int | None
) -> Tensor:
    """`F.embedding(tokens, table)` with the gradient of `leaf`, the rows of table that train."""
    padding = -1 if padding_idx is None else padding_idx % len(table)
    _, places = rows.on(table)
    return _Lookup.apply(tokens, table.detach(), leaf, places, padding)


def product(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, ids: Tensor
) -> Tensor:
    """`F.linear(hidden, weight, bias)` with the gradient of `leaf`, the rows `ids` of weight."""
    kind, weight = hidden.device.type, weight.detach()
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and hidden.dtype != torch.float64:
        low = torch.get_autocast_dtype(kind)  # as autocast does, which a custom Function hides
        hidden, weight = hidden.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    return _Product.apply(hidden, weight, bias, leaf, ids)


class Rows:
    """The rows of one tensor that train.

    Attributes:
        name: the tensor's first qualified name when the model was patched.
        ids: (k,) int64, on the CPU, ascending.
        holders: the modules that hold the tensor, and their names for it.
        sharded: whether FSDP2 puts gathered tensors in the places of tensor and leaf in a forward.
        in_forward: whether a training forward of the model is under way.
        routed_inside: how many forwards of holders, which route by themselves, are under way.
    """

    def __init__(self, name: str, ids: Tensor, holders: Sequence[tuple[nn.Module, str]]) -> None:
        self.name, self.ids, self.holders = name, ids, holders
        self.sharded = self.in_forward = False
        self.routed_inside = 0
        self._wish = self.weight.requires_grad
        self._on: tuple[Tensor, Tensor] | None = None
        self._begun = self._ran = False  # a training forward: ever, and under the step at hand
        self._idle_steps: int | None = 0  # without an update; None once there was one
        with torch.no_grad():
            leaf = nn.Parameter(self.weight[ids.to(self.weight.device)].clone())
        for module, attribute in holders:
            module.__dict__.setdefault(_RECORDS, {})[attribute] = self
            module._parameters[attribute + _SUFFIX] = leaf
        self.derive_classes()
        self.hold()
        self._note()

    @property
    def weight(self) -> Tensor:
        """(V, d): the whole tensor, or what FSDP2 has put in its place."""
        module, attribute = self.holders[0]
        return module._parameters[attribute]

    @property
    def leaf(self) -> nn.Parameter:
        """(k, d): the rows that train, or what FSDP2 has put in their place."""
        module, attribute = self.holders[0]
        return module._parameters[attribute + _SUFFIX]

    @property
    def runs(self) -> list[list[int]]:
        """The ids as runs [first, last], for people and files."""
        runs: list[list[int]] = []
        for i in self.ids.tolist():
            if runs and i == runs[-1][1] + 1:
                runs[-1][1] = i
            else:
                runs.append([i, i])
        return runs

    def on(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """On the device of the tensor: ids, and (V,) the place of every row among those of the
        leaf, k for the others.
        """
        if self._on is None or self._on[1].shape != weight.shape[:1]:
            if self.ids[-1] >= len(weight):
                raise RuntimeError(f"{self.name} has lost rows that train: {_CURE}")
            places = torch.full((len(weight),), len(self.ids), dtype=torch.int64, device="cpu")
            places[self.ids] = torch.arange(len(self.ids), device="cpu")
            self._on = self.ids, places
        if self._on[0].device != weight.device:
            self._on = self._on[0].to(weight.device), self._on[1].to(weight.device)
        return self._on

    def derive_classes(self) -> None:
        """Put every holder into the class that routes gradients, if it is in none."""
        for module, _ in self.holders:
            if _layers.isdisjoint(type(module).__mro__):
                own = "forward" in module.__dict__  # as accelerate's hooks give it
                made = derive(type(module), ("rows", own), _members(type(module), own))
                _layers.add(made)
                module.__class__ = made

    def hold(self) -> None:
        """Keep the whole tensor frozen."""
        for weight in self._weights():
            if weight.requires_grad:
                weight.requires_grad_(False)
            if weight.grad is not None:
                weight.grad = None

    def show_uses(self) -> None:
        """Have autograd record uses of the tensor that give its rows no gradient, until `hold`."""
        if self.leaf.requires_grad:
            self.weight.requires_grad_(True)

    def begin_training(self) -> None:
        """Before a training forward. Before the first the rows are taken from the tensor: nothing
        has trained yet, and who gives new tokens a start may write past the version counters.
        """
        if not (self._begun or self.sharded or is_sharded(self.leaf)):
            self.follow_weight()
        self._begun = self._ran = self.in_forward = True

    def end_step(self, *, written: bool = False) -> None:
        """After the optimizer's step, which may write past the version counters, too, as may others
        who say that they have `written`. Under FSDP2 all ranks call this together.
        """
        ran, self._ran = self._ran, False
        if ran and self._idle_steps is not None and self.leaf.requires_grad:
            self._count_idle_step()
        self.synchronise(settle=ran or (written and self._begun))

    def synchronise(self, *, settle: bool = False) -> None:
        """Bring the tensor and the leaf together, whichever was written since the last time."""
        if is_sharded(self.leaf):
            if settle and self.leaf.requires_grad and torch.distributed.is_initialized():
                self._write_shards()
            return
        if self.sharded:
            return  # gathered for the moment; the forward has brought them together
        if leaf_moved := self.leaf._version != self._seen[0]:
            self._idle_steps = None
        weight_moved = not leaf_moved and self._versions() != self._seen
        if weight_moved and not self._stand():
            self.follow_weight()
        elif leaf_moved or weight_moved or (settle and self.leaf.requires_grad):
            self._write()

    @torch.no_grad()
    def follow_weight(self) -> None:
        """Take the rows from the tensor, which was written or loaded."""
        weight, leaf = self.weight, self.leaf
        if is_sharded(weight):
            weight = weight.full_tensor()
        values = weight.detach()[self.on(weight)[0]]
        if is_sharded(leaf):
            from torch.distributed.tensor import distribute_tensor

            sharding = leaf.device_mesh, leaf.placements
            values = distribute_tensor(values, *sharding, src_data_rank=None)
        if leaf.is_meta and not values.is_meta:
            leaf = nn.Parameter(values, requires_grad=leaf.requires_grad)
            for module, attribute in self.holders:
                module._parameters[attribute + _SUFFIX] = leaf
        else:
            leaf.copy_(values)
        self._note()

    @torch.no_grad()
    def write_gathered(self, weight: Tensor, leaf: Tensor) -> None:
        """Write the rows that FSDP2 has gathered into the tensor that it has gathered."""
        # the same values where a forward whose graph is alive has written them: no new version
        with torch.autograd._unsafe_preserve_version_counter(weight):
            weight.index_copy_(0, self.on(weight)[0], leaf.detach())

    def remove(self) -> None:
        """Leave every holder as it was found, with the rows as they are now."""
        wish = self._wish and self.leaf.requires_grad
        for module, attribute in self.holders:
            del module._parameters[attribute + _SUFFIX]
            del module.__dict__[_RECORDS][attribute]
            module._parameters[attribute].requires_grad_(wish)
            if not module.__dict__[_RECORDS]:
                del module.__dict__[_RECORDS]
                module.__class__ = root_of(without_derived_ancestors(type(module)))

    def _count_idle_step(self) -> None:
        self._idle_steps += 1
        if self._idle_steps < _IDLE_STEPS or is_sharded(self.leaf):
            return
        weight = self.weight
        unmoved = self.leaf._version == self._seen[0]
        if unmoved and torch.equal(self.leaf, weight[self.on(weight)[0]]):
            warnings.warn(
                f"the rows of {self.name} have not changed in {self._idle_steps} steps. Either the "
                "optimizer was made before patch_model, and does not hold them: make it from "
                "handle.param_groups(). Or a loss reads the weight outside the model's forward, "
                "which gives them no gradient: call the module instead",
                stacklevel=6,
            )
        self._idle_steps = None

    def _weights(self) -> Iterator[Tensor]:
        """The tensor; several where something has untied it."""
        yield from {
            id(t): t for m, name in self.holders if (t := m._parameters[name]) is not None
        }.values()

    def _versions(self) -> tuple[int, ...]:
        return self.leaf._version, *(weight._version for weight in self._weights())

    def _note(self) -> None:
        self._seen = self._versions()
        self._last = None if is_sharded(self.leaf) else self.leaf.detach().clone()

    def _stand(self) -> bool:
        """Whether the tensor, which was written, still has the rows of the last time: a loop may
        put all others back after a fused optimizer has written the leaf past its counter.
        """
        if self._last is None or self._last.is_meta:
            return False
        return all(torch.equal(w[self.on(w)[0]], self._last) for w in self._weights())

    @torch.no_grad()
    def _write(self) -> None:
        for weight in self._weights():
            weight.index_copy_(0, self.on(weight)[0], self.leaf.detach())
        self._note()

    @torch.no_grad()
    def _write_shards(self) -> None:
        """Write the rows of this rank's shard of the tensor; all ranks come here together."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        leaf = self.leaf.detach()
        whole = leaf.to(leaf.device_mesh.device_type).full_tensor()  # under CPUOffloadPolicy
        for weight in self._weights():
            sharding = weight.device_mesh, weight.placements
            (size, *_), (start, *_) = compute_local_shape_and_global_offset(weight.shape, *sharding)
            here = ((self.ids >= start) & (self.ids < start + size)).nonzero().squeeze(1)
            local = local_of(weight)
            into, own = self.ids[here] - start, whole[here.to(whole.device)]
            local.index_copy_(0, into.to(local.device), own.to(local))


_layers: set[type] = set()  # classes made here


def rows_of(module: nn.Module) -> Mapping[str, Rows]:
    """By the name of a tensor that the module holds: the rows of it that train."""
    return module.__dict__.get(_RECORDS, {})


def routes_of(module: nn.Module) -> list[tuple[Rows, Tensor, Tensor]]:
    """In a forward of the module: rows, tensor and leaf of every tensor of its own of which rows
    want a gradient.
    """
    routes = []
    for attribute, rows in rows_of(module).items():
        weight, leaf = module._parameters[attribute], module._parameters[attribute + _SUFFIX]
        if rows.sharded and not is_sharded(leaf):
            rows.write_gathered(weight, leaf)
        if torch.is_grad_enabled() and leaf.requires_grad:
            routes.append((rows, weight, leaf))
    return routes


def only_routes(cls: type) -> bool:
    """Whether a class differs from the one that it is derived from in its gradients alone."""
    return cls in _layers


def held_as_rows(owner: nn.Module, attribute: str) -> bool:
    """Whether a parameter holds the rows of another that train."""
    return attribute.endswith(_SUFFIX) and attribute.removesuffix(_SUFFIX) in rows_of(owner)


def trained_by_rows(owner: nn.Module, attribute: str) -> bool:
    """Whether rows of a parameter train, which are held a second time."""
    return attribute in rows_of(owner)


def _reader(base: type) -> Callable[[nn.Module, str], Any]:
    def read(self: nn.Module, name: str) -> Any:
        # by other code, such as TRL's loss, which is given the head's weight
        value, rows = base.__getattr__(self, name), rows_of(self).get(name)
        if rows is None or not rows.in_forward or rows.routed_inside:
            return value
        for rows, weight, leaf in routes_of(self):
            if weight is value and not is_sharded(leaf):
                return _Whole.apply(weight.detach(), leaf, rows.on(weight)[0])
        return value

    return read


def _members(base: type, own_forward: bool) -> dict[str, Any]:
    name = "__call__" if own_forward else "forward"
    run = getattr(base, name)

    def routed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        routes = routes_of(self)
        if not routes:
            return run(self, *args, **kwargs)
        with _Routing(routes):
            return run(self, *args, **kwargs)

    def save(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        for rows in rows_of(self).values():
            rows.synchronise()
        with _without_rows(self):
            base._save_to_state_dict(self, *args, **kwargs)

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch's checkpoints of shards add every parameter that a model has to what they load
        for name in self._parameters:
            if held_as_rows(self, name):
                state.pop(prefix + name, None)
        with _without_rows(self):
            base._load_from_state_dict(self, state, prefix, *args)
        for attribute, rows in rows_of(self).items():
            if prefix + attribute in state:
                rows.hold()
                rows.follow_weight()

    def state_of_a_copy(self: nn.Module) -> dict[str, Any]:
        for rows in rows_of(self).values():
            rows.synchronise()
        with _without_rows(self):
            state = base.__getstate__(self)
            state["_parameters"] = state["_parameters"].copy()
        state.pop(_RECORDS, None)
        return state

    return {
        name: routed,
        "__getattr__": _reader(base),
        "_save_to_state_dict": save,
        "_load_from_state_dict": load,
        "__getstate__": state_of_a_copy,
    }


@contextmanager
def _without_rows(module: nn.Module) -> Iterator[None]:
    held = module._parameters
    leaves = {name: held.pop(name) for name in [*held] if held_as_rows(module, name)}
    try:
        yield
    finally:
        held.update(leaves)


class TrainedRows:
    """The rows of one model that train, tensor by tensor.

    Args:
        wanted: ids by the name of a module or parameter, as `patch_model` takes them.
        outlives_patch: who made this removes it, after the model is unpatched.

    Raises:
        TypeError, ValueError, UnsupportedModelError: as `patch_model`.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Mapping[str, Any] | None = None,
        *,
        outlives_patch: bool = False,
    ) -> None:
        self.outlives_patch = outlives_patch
        self._model = model
        found = _find(model, wanted or {})
        save_with_adapter(model, [(name, m._parameters[a]) for name, _, ((m, a), *_) in found])
        self.of_tensors = [Rows(*one) for one in found]

    def hold(self) -> None:
        for rows in self.of_tensors:
            rows.hold()

    def synchronise(self) -> None:
        for rows in self.of_tensors:
            rows.synchronise()

    def begin_training(self) -> None:
        for rows in self.of_tensors:
            rows.begin_training()

    def end_forward(self) -> None:
        for rows in self.of_tensors:
            rows.in_forward = False

    def end_step(self, *, written: bool = False) -> None:
        for rows in self.of_tensors:
            rows.end_step(written=written)

    def show_uses(self) -> None:
        for rows in self.of_tensors:
            rows.show_uses()

    def follow_shards(self) -> None:
        """Go on after `fully_shard`, which has made classes and parameters of its own."""
        for rows in self.of_tensors:
            rows.sharded = True
            rows.derive_classes()

    def check(self) -> None:
        """Raise `RuntimeError` if a tensor whose rows train has left the model."""
        modules = set(self._model.modules())
        for rows in self.of_tensors:
            if not all(module in modules for module, _ in rows.holders):
                raise RuntimeError(f"{rows.name}, of which rows train, was replaced: {_CURE}")

    def state_dict(self) -> dict[str, list[list[int]]]:
        """By name of the tensor: runs of ids that train, first and last of each."""
        return {rows.name: rows.runs for rows in self.of_tensors}

    def load_state_dict(self, state: Mapping[str, list[list[int]]]) -> None:
        """Raise `ValueError` for the rows of another run."""
        here = self.state_dict()
        if state != here:
            raise ValueError(f"saved while these rows trained: {state}; in this run: {here}")

    def remove(self) -> None:
        for rows in self.of_tensors:
            forget(self._model, rows.leaf)
            rows.remove()
        self.of_tensors = []


def _find(
    model: nn.Module, wanted: Mapping[str, Any]
) -> list[tuple[str, Tensor, list[tuple[nn.Module, str]]]]:
    """Name, ids and holders of every tensor of which rows are named."""
    if not isinstance(wanted, Mapping):
        raise TypeError(f"rows maps names of tensors to row numbers, got {wanted!r}")
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}".lstrip(".")
                holders.setdefault(id(parameter), []).append((name, module, attribute))
    names = {place[0]: of for of, places in holders.items() for place in places}
    embeddings = [path for path, m in model.named_modules() if isinstance(m, nn.Embedding)]
    found: dict[int, tuple[str, Tensor]] = {}
    for key, ids in wanted.items():
        of = _parameter_named(key, names, embeddings)
        name, module, attribute = holders[of][0]
        weight = module._parameters[attribute]
        for _, owner, own in holders[of]:
            _refuse(name, owner, owner._parameters[own])
        chosen = _ids_of(key, ids, len(weight))
        if of in found and not torch.equal(found[of][1], chosen):
            raise ValueError(f"rows names two sets of rows of {name}: name it once")
        found[of] = name, chosen
    result = []
    for of, (name, ids) in found.items():
        distinct = {(id(m), a): (m, a) for _, m, a in holders[of]}
        result.append((name, ids, list(distinct.values())))
    return result


def _parameter_named(key: Any, names: Mapping[str, int], embeddings: Sequence[str]) -> int:
    """The parameter of this name or ending, or the `weight` of such a module; its id.

    `embeddings` are proposed where there is none.
    """
    matches: dict[int, str] = {}
    for name, of in names.items():
        module, _, attribute = name.rpartition(".")
        plain = _OF_PEFT.sub("", module)
        if name == key or (attribute == "weight" and key in (module, plain)):
            return of
        ends = [name, module, plain] if attribute == "weight" else [name]
        if any(f".{end}".endswith(f".{key}") for end in ends):
            matches.setdefault(of, name)
    if len(matches) == 1:
        return next(iter(matches))
    if matches:
        several = ", ".join([*matches.values()][:3])
        raise ValueError(
            f"rows: {len(matches)} names end in {key!r}, such as {several}: write more of the one "
            "that is meant"
        )
    raise ValueError(
        f"rows: the model has no parameter {key!r}, and no module of that name with a weight; its "
        f"embeddings are {', '.join(embeddings) or 'none'}"
    )


def _refuse(name: str, module: nn.Module, weight: Tensor) -> None:
    """Raise `UnsupportedModelError` for a tensor of which no rows can train."""
    if is_sharded(weight):
        raise UnsupportedModelError(
            f"rows: {name} is sharded already: call patch_model before fully_shard"
        )
    if hasattr(weight, "_hp_mapping"):  # None on ranks whose slice has nothing of it
        raise UnsupportedModelError(
            f"rows: {name} is in DeepSpeed's partitions already: call patch_model before "
            "deepspeed.initialize, and give it handle.param_groups()"
        )
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"rows: {name} is no matrix of floating-point numbers, but {weight.dtype} "
            f"{[*weight.shape]}: train it as a whole, without rows"
        )
    for option, off in (("max_norm", None), ("sparse", False), ("scale_grad_by_freq", False)):
        if isinstance(module, nn.Embedding) and getattr(module, option) != off:
            raise UnsupportedModelError(
                f"rows: the embedding of {name} has {option}={getattr(module, option)}, which no "
                f"lookup of rows follows: set it to {off}"
            )


def _ids_of(key: str, wanted: Any, size: int) -> Tensor:
    """The ids (k,), ascending; `ValueError` for anything but distinct rows of the tensor."""
    problem = None
    try:
        values = wanted.tolist() if isinstance(wanted, Tensor) else list(wanted)
        if any(isinstance(v, bool) for v in values):
            raise TypeError("a bool is no row number")
        values = sorted(map(index, values))
    except TypeError as error:
        problem, values = str(error), []
    if problem is None:
        if not values:
            problem = "there are none"
        elif values[0] < 0 or values[-1] >= size:
            problem = f"{values[0] if values[0] < 0 else values[-1]} is out of range"
        elif len(set(values)) < len(values):
            problem = f"{next(a for a, b in pairwise(values) if a == b)} is there twice"
    if problem is not None:
        raise ValueError(
            f"rows[{key!r}] must be distinct whole numbers from 0 to {size - 1}: {problem}"
        )
    return torch.tensor(values, dtype=torch.int64, device="cpu")
