"""What the kernels' benchmark computes: operations, their demands, and the bytes they have to move.

Norms and activations move bytes: `Operation.units` counts what any implementation has to move, in
activations. The loss is bound by its 1 to 3 matmuls: `floor_flop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import kernel_peers
import torch
import torch.nn.functional as F
from kernel_peers import Call, Peer
from torch import Tensor

from progtuning_kernels import ops
from progtuning_kernels.ops import activation, norm

EPS, DROPOUT, IGNORED = 1e-6, 0.1, -100
ROW_TENSORS = ("x", "residual", "gate", "up", "hidden", "labels")


class Shape(NamedTuple):
    """rows x width; vocabulary: of the loss, else 0."""

    rows: int
    width: int
    vocabulary: int = 0

    def __str__(self) -> str:
        return " x ".join(f"{size:,}" for size in self if size)


@dataclass(frozen=True)
class Operation:
    """What everybody computes. Calls take the tensors by name.

    Args:
        draw: shape, dtype, generator -> the tensors.
        results: names of what a call returns.
        demands: title -> names of the tensors whose gradients are demanded.
        eager: plain torch, as the models have it.
        ours: an implementation's name, or None -> the call.
        units: demanded -> elements that have to move, in rows x width of activations.
        truth: what the gate asks in fp64; eager if None. With `kept`, the dropout's mask.
        gate_options: keywords of all calls in the gate.
    """

    name: str
    draw: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Tensor]]
    results: tuple[str, ...]
    demands: dict[str, tuple[str, ...]]
    eager: Call
    ours: Callable[[str | None], Call]
    units: Callable[[Collection[str], Shape], float]
    peers: dict[str, Peer] = field(default_factory=dict)
    truth: Call | None = None
    gate_options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_loss(self) -> bool:
        return self.results == ("loss",)


def draw_normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _draw(rows: str, parameters: str) -> Callable[..., dict[str, Tensor]]:
    """Row tensors at a distance from 0, so that the gate sees which of them dropout keeps."""

    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        tensors = {}
        for name in rows.split():
            drawn = draw_normal(generator, dtype, shape.rows, shape.width)
            tensors[name] = drawn + 0.25 * drawn.sign()
        for name in parameters.split():
            tensors[name] = 0.1 * draw_normal(generator, dtype, shape.width) + (name == "weight")
        return tensors

    return draw


def _norm_units(
    *, residual: bool = False, returned: bool = False, dropout: bool = False
) -> Callable[[Collection[str], Shape], float]:
    """In activations. returned: the sum x + residual is a result, and has a gradient of its own."""

    def units(demanded: Collection[str], shape: Shape) -> float:
        moved = 2.0 + residual + returned  # forward: x, residual -> y, sum
        if not demanded:
            return moved
        moved += 1  # the upstream gradient
        if set(demanded) != {"bias"}:
            # the sum again; not returned, it is written once more, or both its terms are read
            moved += 1 + (residual and not returned)
        if "x" in demanded or "residual" in demanded:
            moved += 1 + returned  # dx, to which the sum's own upstream gradient is added
            # without dropout the gradient of the residual is that of x
            moved += dropout and "x" in demanded and "residual" in demanded
        return moved

    return units


def _activation_units(gated: bool) -> Callable[[Collection[str], Shape], float]:
    def units(demanded: Collection[str], shape: Shape) -> float:
        moved = 2.0 + gated  # forward: the inputs -> y
        if demanded:
            moved += 2 + sum(name in ("x", "gate", "up") for name in demanded)  # y's, x's, written
            moved += gated and "gate" in demanded  # dgate needs up, dup does not
        return moved

    return units


def _loss_units(demanded: Collection[str], shape: Shape) -> float:
    """hidden and weight in, what is demanded out: logits need not be stored by anybody."""
    heads = shape.vocabulary / shape.rows  # of weight, in activations
    return 1 + heads + ("hidden" in demanded) + heads * ("weight" in demanded)


def floor_flop(demanded: Collection[str], shape: Shape) -> float:
    """Of the loss: a matmul for the logits, and one per gradient."""
    return 2.0 * math.prod(shape) * (1 + len(demanded)) if shape.vocabulary else 0.0


def _layer_norms() -> Iterator[Operation]:
    settings = norm.Norm(EPS, center=True)

    def plain(x, weight, bias):
        return norm.reference.normalise(x, weight, bias, settings)

    def with_residual(x, residual, weight, bias):
        return norm.reference.normalise(x + residual, weight, bias, settings)

    def with_dropout(x, residual, weight, bias, return_sum=False):
        h = F.dropout(x, DROPOUT) + residual
        y = norm.reference.normalise(h, weight, bias, settings)
        return (y, h) if return_sum else y

    def truth_of_dropout(x, residual, weight, bias, kept, return_sum):
        h = x * kept / (1 - DROPOUT) + residual
        return norm.reference.normalise(h, weight, bias, settings), h

    def ours(**more: Any) -> Callable[[str | None], Call]:
        def build(implementation: str | None) -> Call:
            def call(x, weight, bias, **options):
                options |= more
                return ops.layer_norm(
                    x, weight, bias, EPS, implementation=implementation, **options
                )

            return call

        return build

    parameters = ("weight", "bias")
    peers = kernel_peers.layer_norm(EPS)
    demands = {
        "forward only": (),
        "dx only": ("x",),
        "all": ("x", *parameters),
        "parameters only": parameters,
    }
    # the post-norm of an encoder; the residual is an activation, too
    added = demands | {"dx only": ("x", "residual"), "all": ("x", "residual", *parameters)}
    draw, draw_both = _draw("x", "weight bias"), _draw("x residual", "weight bias")
    yield Operation(
        *("layer_norm", draw, ("y",), demands, plain, ours(), _norm_units(), peers),
    )
    units = _norm_units(residual=True)
    yield Operation(
        *("layer_norm, residual", draw_both, ("y",), added, with_residual, ours(), units, peers),
    )
    units = _norm_units(residual=True, dropout=True)
    yield Operation(
        *("layer_norm, dropout and residual", draw_both, ("y",), added, with_dropout),
        *(ours(dropout=DROPOUT), units),
        truth=truth_of_dropout,
        gate_options={"return_sum": True},
    )


def _rms_norms() -> Iterator[Operation]:
    kinds = {  # settings of ours, liger's casting mode
        "rms_norm": (dict(cast="before_weight"), "llama"),
        "rms_norm, weight before cast": (dict(cast="after_weight"), "gemma"),
        "rms_norm, Gemma": (dict(cast="after_weight", offset=1.0), "gemma"),
    }
    for name, (options, casting) in kinds.items():
        offset = options.get("offset", 0.0)
        settings = norm.Norm(EPS, False, offset, cast_first=options["cast"] == "before_weight")

        def plain(x, weight, settings=settings):
            return norm.reference.normalise(x, weight, None, settings)

        def with_residual(x, residual, weight, settings=settings):
            h = x + residual
            return norm.reference.normalise(h, weight, None, settings), h

        def ours(options: dict[str, Any]) -> Callable[[str | None], Call]:
            def build(implementation: str | None) -> Call:
                def call(x, weight, **more):
                    more |= options
                    return ops.rms_norm(x, weight, EPS, implementation=implementation, **more)

                return call

            return build

        demands = {
            "forward only": (),
            "dx only": ("x",),
            "all": ("x", "weight"),
            "parameters only": ("weight",),
        }
        yield Operation(
            *(name, _draw("x", "weight"), ("y",), demands, plain, ours(options), _norm_units()),
            kernel_peers.rms_norm(EPS, offset, casting, residual=False),
        )
        # the pre-norm of a decoder, which goes on with the sum as well
        demands = demands | {"dx only": ("x", "residual"), "all": ("x", "residual", "weight")}
        yield Operation(
            *(f"{name}, residual", _draw("x residual", "weight"), ("y", "h"), demands),
            *(with_residual, ours(options | {"return_sum": True})),
            _norm_units(residual=True, returned=True),
            kernel_peers.rms_norm(EPS, offset, casting, residual=True),
        )


def _activations() -> Iterator[Operation]:
    def eager(kind: activation.Kind) -> Call:
        def call(x=None, bias=None, gate=None, up=None):
            return activation.reference.forward(
                activation.Inputs(gate if x is None else x, bias, up), kind
            )

        return call

    def ours(name: str, **options: Any) -> Callable[[str | None], Call]:
        def build(implementation: str | None) -> Call:
            function = getattr(ops, name)
            return lambda **t: function(**t, **options, implementation=implementation)

        return build

    both = ("gate", "up")
    gated = {"forward only": (), "all": both, "gate only": ("gate",), "up only": ("up",)}
    x_alone = {"forward only": (), "all": ("x",)}
    with_bias = {
        "forward only": (),
        "dx only": ("x",),
        "all": ("x", "bias"),
        "parameters only": ("bias",),
    }
    yield Operation(
        *("swiglu", _draw("gate up", ""), ("y",), gated, eager("silu"), ours("swiglu")),
        *(_activation_units(True), kernel_peers.gated("swiglu")),
    )
    tanh = dict(approximate="tanh")
    yield Operation(
        *("geglu, tanh", _draw("gate up", ""), ("y",), gated, eager("tanh"), ours("geglu", **tanh)),
        *(_activation_units(True), kernel_peers.gated("geglu")),
    )
    for kind, options in (("none", {}), ("tanh", tanh)):
        title = "erf" if kind == "none" else kind
        yield Operation(
            *(f"bias_gelu, {title}", _draw("x", "bias"), ("y",), with_bias, eager(kind)),
            *(ours("bias_gelu", **options), _activation_units(False)),
        )
        yield Operation(
            *(f"gelu, {title}", _draw("x", ""), ("y",), x_alone, eager(kind)),
            *(ours("gelu", **options), _activation_units(False)),
        )


def _loss() -> Operation:
    def draw(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        rows, width, vocabulary = shape
        weight = draw_normal(generator, dtype, vocabulary, width).mul_(width**-0.5)
        labels = torch.randint(vocabulary, (rows,), generator=generator, device=generator.device)
        hidden = draw_normal(generator, dtype, rows, width)
        return {"hidden": hidden, "weight": weight, "labels": labels}

    def eager(hidden, weight, labels):
        """As transformers: logits in the model's dtype, and their copy in float32."""
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)

    def ours(implementation: str | None) -> Call:
        return lambda **t: ops.linear_cross_entropy(**t, implementation=implementation)

    demands = {
        "forward only": (),
        "all": ("hidden", "weight"),
        "hidden only": ("hidden",),
        "head only": ("weight",),
    }
    return Operation(
        *("linear_cross_entropy", draw, ("loss",), demands, eager, ours, _loss_units),
        kernel_peers.linear_cross_entropy(),
    )


def operations() -> list[Operation]:
    """In order of importance, the loss first."""
    rms, layer = list(_rms_norms()), list(_layer_norms())
    others = [*rms[2:], *_activations()]
    return [_loss(), *rms[:2], *layer, *others]


@dataclass(frozen=True)
class Case:
    operation: Operation
    shape: Shape
    dtype: torch.dtype
    demand: str

    @property
    def demanded(self) -> tuple[str, ...]:
        return self.operation.demands[self.demand]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operation.name}, {self.demand}, {self.shape} {dtype}"


def cases(device: torch.device) -> list[Case]:
    """In order of importance, for runs on a budget: one case of every operation comes first."""
    low, float32 = torch.bfloat16, torch.float32
    loss, *others = operations()
    if device.type == "cpu":
        # small enough that a call is Python's time and not the arithmetic
        levels = [[(loss, Shape(8, 64, 256), low), *((o, Shape(8, 64), low) for o in others)]]
    else:
        losses = [Shape(8192, 2048, 128_256), Shape(4096, 768, 30_522)]
        levels = [
            [(o, Shape(rows, width), dtype) for o in others if dtype == low or "norm" in o.name]
            for dtype, rows in ((low, 8192), (low, 65_536), (float32, 8192), (float32, 65_536))
            for width in (4096, 768, 2048, 8192)
        ]
        for level, shape in zip(levels, losses, strict=False):
            level.insert(0, (loss, shape, low))
    found = []
    for level in levels:
        ranked = [(o, shape, dtype, _by_importance(o.demands)) for o, shape, dtype in level]
        for rank in range(max(len(demands) for *_, demands in ranked)):
            found += [Case(*of, demands[rank]) for *of, demands in ranked if rank < len(demands)]
    return found


def _by_importance(demands: Collection[str]) -> list[str]:
    """Frozen weights first, then every gradient, then what half a plan demands."""
    order = ("dx only", "all", "hidden only", "forward only")
    return sorted(demands, key=lambda d: order.index(d) if d in order else len(order))
