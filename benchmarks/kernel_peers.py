"""Other people's kernels, and how each is called with the benchmark's tensors.

The functions here return peers by name; `Peer.build` raises ImportError where the package is not
installed. Arguments are those of liger-kernel 0.8, cut-cross-entropy 25.1 and quack-kernels 0.6.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from progtuning_kernels.cli.provenance import installed_version

Call = Callable[..., Any]
PACKAGES = {"liger": "liger-kernel", "cce": "cut-cross-entropy", "quack": "quack-kernels"}


@dataclass(frozen=True)
class Peer:
    """Somebody else's kernels.

    Args:
        find: imports the package and returns its function, or a module of several.
        arrange: that, and the tensors by name -> what the function returns.
        computes: the gradients that it computes whatever is demanded.
        overwrites: its backward writes into inputs or upstream gradients.
    """

    find: Callable[[], Any]
    arrange: Call
    computes: tuple[str, ...] = ()
    overwrites: bool = False

    def build(self) -> Call:
        found = self.find()
        return lambda **tensors: self.arrange(found, **tensors)


def installed() -> dict[str, str | None]:
    """Versions of the packages; None: not installed."""
    return {package: installed_version(package) for package in PACKAGES.values()}


def _of(module: str, name: str | None = None) -> Callable[[], Any]:
    def find() -> Any:
        found = importlib.import_module(module)
        return found if name is None else getattr(found, name)

    return find


def _of_liger(name: str) -> Callable[[], Any]:
    return _of("liger_kernel.transformers.functional", name)


def _liger_always_computes(*weights: str) -> tuple[str, ...]:
    """Those of a norm's weights; from 0.8.5 on it computes what is demanded."""
    found = installed()["liger-kernel"] or "0"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    return () if numbers >= (0, 8, 5) else weights


def layer_norm(eps: float) -> dict[str, Peer]:
    def call(function, x, weight, bias, residual=None):
        return function(x if residual is None else x + residual, weight, bias, eps)

    computes = ("x", *_liger_always_computes("weight", "bias"))
    return {"liger": Peer(_of_liger("liger_layer_norm"), call, computes)}


def rms_norm(eps: float, offset: float, casting: str, *, residual: bool) -> dict[str, Peer]:
    """casting: liger's mode; quack rounds once, after the weight. residual: the sum is returned."""

    def liger(function, x, weight, residual=None):
        inputs = (x,) if residual is None else (x, residual)
        return function(*inputs, weight, eps, offset, casting)

    def quack(function, x, weight, residual=None):
        prenorm = residual is not None
        options = dict(residual=residual, eps=eps, prenorm=prenorm, weight_offset=offset)
        return function(x, weight, **options)

    inputs = ("x", "residual") if residual else ("x",)
    name = "liger_fused_add_rms_norm" if residual else "liger_rms_norm"
    computes = (*inputs, *_liger_always_computes("weight"))
    return {
        "liger": Peer(_of_liger(name), liger, computes, overwrites=True),
        "quack": Peer(_of("quack.rmsnorm", "rmsnorm"), quack, (*inputs, "weight")),
    }


def gated(name: str) -> dict[str, Peer]:
    """name: "swiglu" or "geglu", which is by tanh. quack has them inside of matmuls alone."""

    def call(function, gate, up):
        return function(gate, up)

    return {"liger": Peer(_of_liger(f"liger_{name}"), call, ("gate", "up"), overwrites=True)}


def linear_cross_entropy() -> dict[str, Peer]:
    def by_position(function, hidden, weight, labels):
        return function(hidden, weight, labels)

    def quack(module, hidden: Tensor, weight: Tensor, labels: Tensor):
        """As its `LinearCrossEntropy` chooses; tuning its matmuls would take minutes."""
        if weight.shape[0] % 8:
            return module.linear_cross_entropy_func(hidden, weight, None, labels)
        return module.chunked_linear_cross_entropy(hidden, weight, labels, tuned=False)

    name = "liger_fused_linear_cross_entropy"
    return {
        "liger": Peer(_of_liger(name), by_position, ("hidden",)),
        "cce": Peer(_of("cut_cross_entropy", "linear_cross_entropy"), by_position),
        "quack": Peer(_of("quack.linear_cross_entropy"), quack),
    }
