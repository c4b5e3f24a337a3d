"""What a refusal tells to do is done to the letter, and then the model trains as frozen by hand; or
the refusal says that nothing helps.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from progtuning_kernels import UnsupportedModelError
from progtuning_kernels.families import FAMILIES

_SOURCE = Path(__file__).parent.parent / "benchmarks" / "architectures.py"
_SPEC = importlib.util.spec_from_file_location("architectures", _SOURCE)
architectures = importlib.util.module_from_spec(_SPEC)
sys.modules["architectures"] = architectures
_SPEC.loader.exec_module(architectures)

WIDTH = 4


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """A table of families that the test may add to."""
    monkeypatch.setattr("progtuning_kernels.families.FAMILIES", table := dict(FAMILIES))
    for user in ("layout", "cures"):
        monkeypatch.setattr(f"progtuning_kernels.{user}.FAMILIES", table)
    return table


def _layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden, context=0.0):
        return hidden + self.scale * torch.tanh(self.inner(hidden + context))


def _layers(number: int = 3) -> nn.ModuleList:
    return nn.ModuleList(_Layer() for _ in range(number))


class _Model(nn.Module):
    """Embeddings, then what a trap makes of it, then the head; returns its output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.make()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # (B, C) -> (B, C)
        return {"out": self.run(x)}


class LateEmbedding(_Model):
    def make(self):
        self.layers, self.out = _layers(), nn.Linear(WIDTH, WIDTH)
        self.embed = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class EarlyHead(_Model):
    def make(self):
        self.embed, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = _layers()

    run = LateEmbedding.run


class Configured(EarlyHead):
    """With a config that says nothing of its type."""

    def make(self):
        super().make()
        self.config = SimpleNamespace(hidden_size=WIDTH)


class SomeParts(_Model):
    """One part of a child without forward is embeddings, the other head."""

    def make(self):
        self.around = nn.Module()
        self.around.first, self.around.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = _layers()

    def run(self, x):
        x = self.around.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.around.last(x)


class _Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.norm, self.inner.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner.out(x)


class PartOfTheHead(_Model):
    """The head's own norm is taken of the input."""

    def make(self):
        self.embed, self.layers, self.head = nn.Linear(WIDTH, WIDTH), _layers(), _Head()

    def run(self, x):
        x = self.head.inner.norm(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class BareParameter(_Model):
    """Registered beside a base model, and so taken for head."""

    base_model_prefix = "base"

    def make(self):
        self.base = nn.Module()
        self.base.embed, self.base.layers = nn.Linear(WIDTH, WIDTH), _layers()
        self.shift, self.out = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.base.embed(x) + self.shift
        for layer in self.base.layers:
            x = layer(x)
        return self.out(x)


class EarlyAndLate(_Model):
    """One norm before the blocks and after them."""

    def make(self):
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers, self.out = _layers(), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.norm(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


class LateAndEarly(EarlyAndLate):
    def make(self):
        super().make()
        norm = self.norm
        del self.norm
        self.norm = norm


class InTheMiddle(_Model):
    """A projection between two blocks, registered before all of them."""

    def make(self):
        self.embed, self.middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers, self.out = _layers(4), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            x = layer(self.middle(x) if i == 2 else x)
        return self.out(x)


class InTheMiddleLate(InTheMiddle):
    def make(self):
        super().make()
        middle = self.middle
        del self.middle
        self.middle = middle


class OtherOrder(_Model):
    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers(4)

    def run(self, x):
        x = self.embed(x)
        for i in (2, 0, 3, 1):
            x = self.layers[i](x)
        return x


class _Marked(_Layer):
    gradient_checkpointing = False


def _marked(number: int = 3) -> nn.ModuleList:
    return nn.ModuleList(_Marked() for _ in range(number))


class ReaderFirst(_Model):
    """The stack that reads the other is registered first, with its norm, and the other's last."""

    def make(self):
        self.readers, self.final = _marked(2), nn.LayerNorm(WIDTH)
        self.embed, self.writers = nn.Linear(WIDTH, WIDTH), _marked(3)
        self.between = nn.LayerNorm(WIDTH)

    def run(self, x):
        x = self.embed(x)
        for layer in self.writers:
            x = layer(x)
        x, context = x * 0.5, self.between(x)
        for layer in self.readers:
            x = layer(x, context)
        return self.final(x)


class SideBySide(_Model):
    """Two stacks that read each other at every depth."""

    def make(self):
        self.embed, self.left, self.right = nn.Linear(WIDTH, WIDTH), _marked(), _marked()

    def run(self, x):
        left = right = self.embed(x)
        for one, other in zip(self.left, self.right, strict=True):
            left = one(left, right)
            right = other(right, left)
        return left + right


class Towers(_Model):
    def make(self):
        self.left, self.right = (nn.ModuleDict({"layers": _layers()}) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        left = right = x
        for one, other in zip(self.left["layers"], self.right["layers"], strict=True):
            left, right = one(left), other(right)
        return self.out(left * right)


class Attributes(_Model):
    """Layers held one by one."""

    def make(self):
        self.embed, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer1, self.layer2, self.layer3 = _Layer(), _Layer(), _Layer()

    def run(self, x):
        return self.out(self.layer3(self.layer2(self.layer1(self.embed(x)))))


class Sequences(_Model):
    """Stages that are sequences, as those of a ResNet."""

    def make(self):
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.stage1 = nn.Sequential(_Layer(), _Layer())
        self.stage2 = nn.Sequential(_Layer(), _Layer())
        self.out = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        return self.out(self.stage2(self.stage1(self.stem(x))))


class NamedLayers(_Model):
    def make(self):
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleDict({"low-1": _Layer(), "high-2": _Layer()})
        self.out = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return self.out(x)


class Whole(nn.Sequential):
    """The model itself is a sequence."""

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh(), _Layer(), _Layer())

    def forward(self, x):
        return {"out": super().forward(x)}


class Mixed(_Model):
    """A small list beside the layers, which stand in a sequence of several kinds."""

    def make(self):
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), _Layer(), nn.Tanh(), _Layer())
        self.heads = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)])

    def run(self, x):
        x = self.body(x)
        return self.heads[0](x) + self.heads[1](x)


class OnlyLinears(_Model):
    def make(self):
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        return self.second(torch.tanh(self.first(x)))


class SharedInside(_Model):
    """All blocks hold one module."""

    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()
        for layer in self.layers:
            layer.inner = self.layers[0].inner
        self.out = nn.Linear(WIDTH, WIDTH)

    run = LateEmbedding.run


class SharedTensor(_Model):
    """Two blocks hold one tensor."""

    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()
        self.layers[2].inner.weight = self.layers[0].inner.weight
        self.out = nn.Linear(WIDTH, WIDTH)

    run = LateEmbedding.run


class Twice(_Model):
    """One module as two blocks."""

    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()
        self.layers.append(self.layers[0])

    def run(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Loop(_Model):
    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()

    def run(self, x):
        x = self.embed(x)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return x


class OneLinear(_Model):
    def make(self):
        self.only = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        return self.only(x)


CURED = [
    LateEmbedding,
    EarlyHead,
    Configured,
    SomeParts,
    PartOfTheHead,
    BareParameter,
    EarlyAndLate,
    LateAndEarly,
    InTheMiddle,
    InTheMiddleLate,
    OtherOrder,
    ReaderFirst,
    SideBySide,
    Towers,
    Attributes,
    Sequences,
    NamedLayers,
    Whole,
    Mixed,
    OnlyLinears,
    SharedInside,
    SharedTensor,
]


def _followed(build: type[_Model]) -> dict:
    inputs = {"x": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))}

    def attempt(blocks):
        try:
            return {"status": "proved", **architectures.prove(build, lambda _: inputs, blocks)}
        except UnsupportedModelError as error:
            assert "\n" not in str(error)
            return {"status": "refused", "reason": str(error)}

    return architectures.cured(attempt)


@pytest.mark.parametrize("build", CURED)
def test_the_cure_works(build):
    row = _followed(build)
    assert row["status"] == "refused" and row["cure"] == "works", row
    assert row["cured"]["boundaries"] >= 1


@pytest.mark.parametrize("build", [Twice, Loop, OneLinear])
def test_where_there_is_no_cure_it_says_so(build):
    row = _followed(build)
    assert row["cure"] == "none" and not row["cures"], row
