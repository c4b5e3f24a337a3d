"""Recognises, by structure, modules that a freeze-aware op can run, and says how.

A name never tells what a module computes: how a norm casts and what an activation is are found by
trying them on numbers, and `checks.py` then compares the whole.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend
from ..model.rows import routes_of
from ..ops import activation, geglu, gelu, layer_norm, rms_norm, swiglu
from ..ops import norm as norms
from ..sharding import Sharding, is_sharded
from .deferred_logits import defer

HEAD = "language-model head and loss"
GATED_MLP = "gated MLP"
GELU = "GELU"
_PLAIN = (Tensor, nn.Parameter)
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(frozen=True)
class Swap:
    """How an op runs a module.

    Attributes:
        kind: what the module is, for the report.
        settings: all that `forward` depends on beside the module's own tensors.
        forward: (module, *inputs) -> output.
        inputs: number of positional inputs; called with others, the module runs its own forward.
        op: the op that runs it.
        width: elements of one row of the (first) input.
        growth: elements that the op handles for one of the input.
        inner: attributes of the modules that are bypassed.
        stand_ins: modules to put in for the check, which is then about the op alone.
    """

    kind: str
    settings: Hashable
    forward: Callable[..., Any]
    op: backend.Op
    width: int
    inputs: int = 1
    growth: float = 1.0
    inner: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()


class CannotSwap(Exception):
    """A module looks like one that an op runs, and is not; the message says why."""


def recognise(module: nn.Module) -> Swap | None:
    """The swap for a module; None for one that no op runs.

    Raises:
        CannotSwap: with the reason, in one line.
    """
    for find in (_layer_norm, _output_layer, _gated_mlp, _rms_norm, _written_out_gelu):
        swap = find(module)
        if swap is not None:
            return swap
    return None


def language_model_head(module: nn.Linear, sharding: Sharding | None = None) -> Swap:
    """The swap for a head over a vocabulary: see `deferred_logits.py`.

    Args:
        sharding: None where its weight is whole; else it may be gone when its forward is over.
    """
    own_class = type(module)

    def forward(self: nn.Linear, hidden: Tensor) -> Tensor:
        routes = routes_of(self)
        demanded = hidden.requires_grad or self.weight.requires_grad or routes
        kept = type(self.weight) in _PLAIN and (sharding is None or sharding.stays)
        if not (kept and torch.is_grad_enabled() and demanded and hidden.dim() > 1):
            return own_class.forward(self, hidden)
        shards = () if sharding is None else sharding.shards
        if not routes:
            return defer(hidden, self.weight, self.bias, shards)
        rows, weight, leaf = routes[0]
        return defer(hidden, weight.detach(), self.bias, shards, (leaf, rows.on(weight)[0]))

    return Swap(
        HEAD,
        own_class,
        forward,
        backend.OPS["linear_cross_entropy"],
        module.in_features,
        growth=module.out_features / module.in_features,
    )


def _is_layer_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward is nn.LayerNorm.forward
        and len(module.normalized_shape) == 1
    )


def _layer_norm(module: nn.Module) -> Swap | None:
    if not _is_layer_norm(module):
        return None

    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    return Swap("LayerNorm", None, forward, norms.LAYER_NORM, module.normalized_shape[0])


def _output_layer(module: nn.Module) -> Swap | None:
    """The swap for dense, dropout, and a LayerNorm of the sum with the residual, as in BERT."""
    children = dict(module.named_children())
    if set(children) != {"dense", "dropout", "LayerNorm"} or module._parameters:
        return None
    norm, dropout = children["LayerNorm"], children["dropout"]
    if not _is_layer_norm(norm) or type(dropout) is not nn.Dropout:
        return None
    norm_class = type(norm)

    def forward(self: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor:
        inner, drop = self.LayerNorm, self.dropout
        hidden = self.dense(hidden)
        if type(inner) is not norm_class:  # wrapped since, FSDP2 unshards it in its own forward
            return inner(drop(hidden) + residual)
        p = drop.p if drop.training else 0.0
        return layer_norm(hidden, inner.weight, inner.bias, inner.eps, residual=residual, dropout=p)

    return Swap(
        "dropout + residual + LayerNorm",
        norm_class,
        forward,
        norms.LAYER_NORM,
        norm.normalized_shape[0],
        inputs=2,
        inner=("dropout", "LayerNorm"),
        stand_ins=("dense",),
    )


def _rms_norm(module: nn.Module) -> Swap | None:
    names = [name for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)]
    if isinstance(module, nn.RMSNorm) and module.eps is None:
        names = ["eps"]
    parameters = module._parameters
    weight = parameters.get("weight")
    if len(names) != 1 or list(parameters) != ["weight"] or weight is None or weight.dim() != 1:
        return None
    if module._modules or module._buffers:
        return None
    name = names[0]
    for cast, offset in (("before_weight", 0.0), ("after_weight", 0.0), ("after_weight", 1.0)):
        if _same_norm(module, name, cast, offset):
            break
    else:
        raise CannotSwap("it is none of the known forms of RMSNorm")

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, _eps(self, name, x), cast=cast, offset=offset)

    settings = (name, cast, offset)
    return Swap("RMSNorm", settings, forward, norms.RMS_NORM, weight.numel())


def _eps(module: nn.Module, name: str, x: Tensor) -> float:
    eps = getattr(module, name)
    return torch.finfo(x.dtype).eps if eps is None else eps


def _same_norm(module: nn.Module, name: str, cast: norms.Cast, offset: float) -> bool:
    """Whether a copy in bfloat16, where the order of roundings shows, gives the op's numbers."""
    twin = copy.deepcopy(without_hooks(module)).to("cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    width = twin.weight.numel()
    x = torch.randn(64, width, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
    weight = torch.rand(width, generator=generator, dtype=torch.float32, device="cpu") + 0.5
    with torch.no_grad():
        twin.weight.copy_(weight)
        try:
            expected = type(module).forward(twin, x)
        except Exception as error:
            raise CannotSwap(f"its forward takes more than x: {backend.one_line(error)}") from None
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            raise CannotSwap("its forward returns more than the norm of x")
        form = norms.Norm(_eps(twin, name, x), False, offset, cast == "before_weight")
        found = norms.reference.normalise(x, twin.weight, None, form)
    # sums in another order move a few roundings, another order of roundings a third of them
    return (expected != found).float().mean().item() < 0.02


# gate, up and down; without up, gate makes both side by side
_GATED: tuple[tuple[str, str | None, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", None, "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("Wi", None, "Wo"),
    ("w1", "w3", "w2"),
)


# numbers that the gate and the result are multiplied by, as in Falcon-H1
_MULTIPLIERS = ("gate_multiplier", "down_multiplier")


def _multipliers(module: nn.Module) -> tuple[float, float]:
    of_gate, of_down = (getattr(module, name, 1.0) for name in _MULTIPLIERS)
    return of_gate, of_down


def _gated_mlp(module: nn.Module) -> Swap | None:
    """The swap for down(dropout(act(gate(x)) * up(x))), with or without multipliers."""
    children = dict(module.named_children())
    for names in _GATED:
        layers = [name for name in names if name is not None]
        if all(name in children for name in layers):
            break
    else:
        return None
    others = {name: child for name, child in children.items() if name not in layers}
    dropouts = [name for name, child in others.items() if type(child) is nn.Dropout]
    acts = [name for name in others if name not in dropouts]
    if module._parameters or len(acts) != 1 or len(dropouts) > 1:
        return None
    act, dropout = acts[0], dropouts[0] if dropouts else None
    kind = activation_kind(children[act])
    if kind is None:
        raise CannotSwap(f"no op for its activation {type(children[act]).__name__}")
    gate_name, up_name, down_name = names
    multipliers = _multipliers(module)
    if not all(isinstance(number, int | float) for number in multipliers):
        raise CannotSwap(f"its {' or '.join(_MULTIPLIERS)} is no number")
    if multipliers[0] != 1 and kind != "silu":
        raise CannotSwap("no op for a gate_multiplier with GELU")
    width, inside = (getattr(children[n], "in_features", None) for n in (gate_name, down_name))
    if width is None or inside is None:
        raise CannotSwap(f"its {gate_name} or {down_name} is no linear layer")

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        children = self._modules
        of_gate, of_down = _multipliers(self)
        gate = children[gate_name](x)
        if up_name is None:
            gate, up = gate.chunk(2, dim=-1)
        else:
            up = children[up_name](x)
        if kind == "silu":
            hidden = swiglu(gate, up, gate_multiplier=of_gate)
        else:
            hidden = geglu(gate, up, approximate=kind)
        if dropout is not None:
            hidden = children[dropout](hidden)
        down = children[down_name]
        dtype = getattr(getattr(down, "weight", None), "dtype", hidden.dtype)
        if dtype.is_floating_point and not torch.is_autocast_enabled(x.device.type):
            hidden = hidden.to(dtype)  # T5 keeps its last layer in float32
        hidden = down(hidden)
        return hidden if of_down == 1 else hidden * of_down

    return Swap(
        GATED_MLP,
        (names, act, dropout, kind, multipliers),
        forward,
        backend.OPS["swiglu" if kind == "silu" else "geglu"],
        width,
        growth=inside / width,
        inner=(act,),
    )


def _written_out_gelu(module: nn.Module) -> Swap | None:
    """The swap for a GELU written out in Python: up to eight operations, as many saved tensors."""
    if module._parameters or module._modules or "gelu" not in type(module).__name__.lower():
        return None
    kind = activation_kind(module)
    if kind not in ("none", "tanh"):
        return None

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return gelu(x, approximate=kind)

    return Swap(GELU, kind, forward, activation.GELU, 64)


def without_hooks(module: nn.Module) -> nn.Module:
    """The same parameters in modules of their own, which call nobody else's code; random numbers in
    the place of shards, which no rank can gather alone.
    """
    # FSDP2's class cannot be copied; copy.copy refuses a module with parametrizations
    cls = next(cls for cls in type(module).__mro__ if not hasattr(cls, "_get_fsdp_state"))
    twin = object.__new__(cls)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    states = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks")  # FSDP2 has some of its own
    twin.__dict__ |= module.__dict__ | {kind: OrderedDict() for kind in (*hooks, *states)}
    for name in [name for name in twin.__dict__ if name.startswith("__composable_api")]:
        del twin.__dict__[name]
    twin.__dict__["_parameters"] = {
        name: _random_like(p) if p is not None and is_sharded(p) else p
        for name, p in module._parameters.items()
    }
    twin.__dict__["_modules"] = {
        name: None if child is None else without_hooks(child)
        for name, child in module._modules.items()
    }
    return twin


def _random_like(shard: Tensor) -> nn.Parameter:
    """A parameter of the whole shape, of the size that linear layers have."""
    generator = torch.Generator(shard.device).manual_seed(1)
    whole = torch.randn(shard.shape, generator=generator, dtype=torch.float32, device=shard.device)
    return nn.Parameter((whole / shard.shape[-1] ** 0.5).to(shard.dtype), shard.requires_grad)


def activation_kind(module: nn.Module) -> activation.Kind | None:
    """Which activation of `ops.activation` a module computes, found by trying it."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float32, device="cpu")
    known = {"silu": F.silu(x), "none": F.gelu(x), "tanh": F.gelu(x, approximate="tanh")}
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
    except Exception:
        return None
    for kind, expected in known.items():
        # the two GELUs differ by 4.7e-4
        if isinstance(y, Tensor) and torch.allclose(y, expected, rtol=1e-5, atol=1e-6):
            return kind
    return None


def bypassed(module: nn.Module, names: Sequence[str]) -> str | None:
    """Why no op may take the place of the modules of these names; None if one may."""
    for name in names:
        child = module._modules[name]
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks:
            return f"a hook on its {name}"
        if "forward" in child.__dict__ or child._compiled_call_impl is not None:
            return f"its {name} has a forward of its own"
    return None
