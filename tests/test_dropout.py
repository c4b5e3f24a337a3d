"""dropout on a CPU: torch's own bits, from torch's own random numbers, and the model's too."""

from __future__ import annotations

import copy
import ctypes
import math
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from csrc_builds import one_per_instruction_set
from proofs import enable_checkpointing
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, backend, patch_model
from progtuning_kernels.model.derived_classes import root_of
from progtuning_kernels.ops import dropout
from progtuning_kernels.swaps import cpu_dropout

op = sys.modules["progtuning_kernels.ops.dropout"]
# the reason is there where the extension was not built, or torch draws in a way not known yet
native_only = pytest.mark.skipif(
    cpu_dropout.reason_against() is not None, reason=str(cpu_dropout.reason_against())
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one byte and its neighbours, a block of the generator (312 numbers) and its neighbours, pieces of
# 16,384 that threads take
SIZES = (1, 7, 8, 9, 311, 312, 313, 5000, 16_384, 16_385, 50_001)


def _results(run: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Result, gradient, and what the generator gives next."""
    x = x.clone().requires_grad_()
    out = run(x)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    return [out.detach(), gradient, torch.get_rng_state(), torch.rand(3)]


@native_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_bits_gradients_and_generator_are_those_of_torch(dtype, p):
    for size in SIZES:
        for drawn in (0, 1, 623):  # an odd number splits the pair for a number
            x, upstream = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
            found = []
            for run in (F.dropout, lambda x, p: dropout(x, p, implementation="native")):
                torch.manual_seed(size)
                torch.randint(9, (drawn,))
                found.append(_results(lambda x, run=run: run(x, p), x, upstream))
            for ours, theirs in zip(*found, strict=True):
                assert torch.equal(ours, theirs), (size, drawn)


@native_only
def test_shapes_specials_and_every_element_written():
    x = torch.randn(3, 5, 7)
    x[0] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, 1e-45])
    poison = torch.full_like(x, math.nan)  # most likely what the next allocation finds
    del poison
    for seed in range(4):
        torch.manual_seed(seed)
        expected = F.dropout(x, 0.4)
        torch.manual_seed(seed)
        found = dropout(x, 0.4)
        assert found.shape == x.shape
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))  # -0 and NaN, too


def test_what_drops_nothing_or_all_of_it():
    x = torch.randn(10)
    state = torch.get_rng_state()
    assert dropout(x, 0.3, training=False) is x
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros(10))
    assert dropout(x[:0], 0.3).shape == (0,)
    assert torch.equal(torch.get_rng_state(), state)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p must be between 0 and 1"):
            dropout(x, p)


@native_only
@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.randn(6, 4).double(), "no native kernel for torch.float64"),
        (torch.randn(6, 4).t(), "not contiguous"),
        (torch.randn(6, 4, device="meta"), "one kernel on meta"),
    ],
)
def test_the_rest_runs_plain_torch(x, why):
    with pytest.raises(RuntimeError, match=why):
        dropout(x, 0.5, implementation="native")
    found = []
    for run in (F.dropout, dropout):
        torch.manual_seed(0)
        found.append(run(x, 0.5))
    assert found[0].is_meta or torch.equal(*found)


@native_only
def test_an_unknown_generator_and_functorch_run_plain_torch(monkeypatch):
    with pytest.raises(RuntimeError, match="no plain tensor"):
        torch.func.grad(lambda x: dropout(x, 0.5, implementation="native").sum())(torch.ones(4))
    torch.manual_seed(0)
    assert torch.func.grad(lambda x: dropout(x, 0.5).sum())(torch.ones(40)).unique().numel() == 2
    monkeypatch.setattr(op, "_random_source", lambda: None)
    with pytest.raises(RuntimeError, match="unknown generator"):
        dropout(torch.ones(4), 0.5, implementation="native")
    assert "unknown generator" in cpu_dropout.reason_against()
    handle = patch_model(_dropping("bert-sequence"), MilestoneSchedule({0: 0}))
    assert "unknown generator" in str(handle.kernel_report())
    assert not handle.kernel_report().swapped


@pytest.mark.skipif(
    backend.native_reason(torch.device("cpu")) is not None, reason="no native extension"
)
def test_the_way_to_draw_is_found_where_it_is_known():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "AuthenticAMD" not in cpuinfo.read_text():
        pytest.skip("a processor on which it has not been seen")
    assert op._random_source() == backend.native_extension().random_sources["mt19937"]


@native_only
def test_compiled_code_keeps_torchs():
    code = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        code.append(str(graph.graph))
        return graph.forward

    torch.compile(lambda x: dropout(x, 0.5), backend=backend, fullgraph=True)(torch.ones(9))
    assert "dropout" in code[0] and "progtuning" not in code[0]


@native_only
def test_in_place_stays_in_place():
    model = _dropping("bert-sequence")
    module = model.bert.embeddings.dropout
    module.inplace = True
    with patch_model(model, MilestoneSchedule({0: 0}), kernels="on"):
        assert type(module) is not nn.Dropout
        x = torch.ones(2, 50)
        assert module(x) is x and x.unique().numel() == 2


@native_only
def test_differentiated_twice():
    x = torch.randn(30, dtype=torch.float32, requires_grad=True)
    found = []
    for run in (F.dropout, dropout):
        torch.manual_seed(0)
        (first,) = torch.autograd.grad((run(x, 0.5) ** 3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


@native_only
def test_a_bit_per_element_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.nbytes) or t, lambda t: t
    ):
        dropout(torch.ones(8001, requires_grad=True), 0.5)
        assert saved == [1001]
        F.dropout(torch.ones(8001, requires_grad=True), 0.5)
        assert sum(saved[1:]) == 4 * 8001


@native_only
def test_a_state_that_is_none_is_refused():
    generator = torch.Generator()
    state, bits = generator.get_state(), torch.zeros(1, dtype=torch.uint8)
    call = backend.native_extension().bernoulli_bits_cpu
    good = [state.data_ptr(), state.numel(), 0, 8, 0.5, bits.data_ptr(), 1]
    call(*good)
    for place, bad, why in (
        (1, 5000, "no state"),
        (3, -1, "no room"),
        (4, 1.0, "keep"),
        (5, 0, "no room"),
        (6, 0, "num_threads"),
    ):
        with pytest.raises(ValueError, match=why):
            call(*[bad if i == place else value for i, value in enumerate(good)])
    state.fill_(255)
    with pytest.raises(ValueError, match="no state"):
        call(*good)


class _Words:
    """The generator of torch by numpy's implementation, of a fresh state."""

    def __init__(self, seed: int) -> None:
        state = torch.Generator().manual_seed(seed).get_state()
        words = state[24 : 24 + 8 * 624].view(torch.int64).numpy().astype(np.uint32)
        self._random = np.random.RandomState()
        self._random.set_state(("MT19937", words, 624))

    def draw(self, count: int) -> list[int]:
        return self._random.randint(0, 2**32, size=count, dtype=np.uint64).tolist()


def _by_hand(source: str, words: _Words, count: int, keep: float) -> list[bool]:
    """Bernoulli numbers in plain Python."""
    if source == "mt19937":
        drawn = words.draw(2 * count)
        pairs = zip(drawn[::2], drawn[1::2], strict=True)
        return [((a << 32 | b) % 2**53) / 2**53 < keep for a, b in pairs]
    modulus, numbers = 2**31 - 1, []
    x = words.draw(1)[0] % modulus or 1
    for _ in range(count):
        numbers.append(x / modulus < keep)
        x = x * 1132489760 % modulus
    return numbers


@native_only
@pytest.mark.parametrize("source", ["mt19937", "mcg31"])
def test_both_ways_to_draw(source):
    """torch takes one of them on any one processor; both are right, for any number of threads."""
    code, threads = backend.native_extension().random_sources[source], torch.get_num_threads()
    try:
        for count in (1, 9, 16_383, 16_385, 40_000):
            for keep in (0.9, 0.5, 0.001):
                words = _Words(count)
                expected = torch.tensor(_by_hand(source, words, count, keep))
                following = [word % 1000 for word in words.draw(3)]
                for threads_here in (1, 2, 3):
                    torch.set_num_threads(threads_here)
                    generator = torch.Generator().manual_seed(count)
                    bits = op._bits(generator, code, count, keep)
                    found = ((bits[:, None] >> torch.arange(8)) & 1).flatten()
                    assert torch.equal(found[:count].bool(), expected)
                    assert not found[count:].any()
                    assert torch.randint(1000, (3,), generator=generator).tolist() == following
    finally:
        torch.set_num_threads(threads)


SHIM = """
#include "launchers.h"
using namespace progtuning;
extern "C" bool bits(void* state, int source, int64_t n, double keep, uint8_t* out) {
  return bernoulli_bits_cpu(state, static_cast<RandomSource>(source), n, keep, out, 1);
}
extern "C" bool product(const void* x, const uint8_t* bits, float scale, int64_t n, int dtype,
                        void* out) {
  return masked_product_cpu(x, bits, scale, n, static_cast<DType>(dtype), out, 1);
}
"""


@native_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_instruction_sets_do_not_change_the_bits(tmp_path):
    count, pointer = 20_001, ctypes.c_void_p
    for isa, library in one_per_instruction_set(tmp_path, SHIM, "dropout_cpu.cpp"):
        draw, product = library.bits, library.product
        draw.argtypes = [pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_double, pointer]
        product.argtypes = [pointer, pointer, ctypes.c_float, ctypes.c_int64, ctypes.c_int, pointer]
        for code in backend.native_extension().random_sources.values():
            generator = torch.Generator().manual_seed(1)
            state, bits = generator.get_state(), torch.empty((count + 7) // 8, dtype=torch.uint8)
            assert draw(state.data_ptr(), code, count, 0.7, bits.data_ptr())
            assert torch.equal(bits, op._bits(generator, code, count, 0.7)), isa
            assert torch.equal(state, generator.get_state()), isa
        for dtype in DTYPES:
            x = torch.randn(count).to(dtype)
            out = torch.full_like(x, math.nan)
            kind = backend.dtype_code(dtype)
            assert product(x.data_ptr(), bits.data_ptr(), 1.25, count, kind, out.data_ptr())
            assert torch.equal(out, op._MaskedProduct.apply(x, bits, 1.25)), (isa, dtype)


# ---- attention


def _qkv(*, key_heads: int = 4, width: int = 8, tokens: int = 11) -> list[Tensor]:
    shapes = [(2, 4, 9, width), (2, key_heads, tokens, width), (2, key_heads, tokens, width)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _mask(dtype: torch.dtype = torch.bool) -> Tensor:
    mask = torch.rand(2, 1, 9, 11) < 0.7
    mask[1, 0, 2] = False  # a query that sees nothing
    if dtype is torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)


ATTENTIONS: dict[str, Callable[[], tuple[list[Tensor], dict[str, Any]]]] = {
    "plain": lambda: (_qkv(), {}),
    "bool mask": lambda: (_qkv(), {"attn_mask": _mask()}),
    "float mask": lambda: (_qkv(), {"attn_mask": _mask(torch.float32)}),
    "causal": lambda: (_qkv(), {"is_causal": True}),
    "scaled": lambda: (_qkv(), {"scale": 0.3, "attn_mask": _mask()}),
    "negative scale": lambda: (_qkv(), {"scale": -0.3}),
    "grouped": lambda: (_qkv(key_heads=2), {"enable_gqa": True, "attn_mask": _mask()}),
    "odd width": lambda: (_qkv(width=5), {"attn_mask": _mask()}),
}


@native_only
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_has_the_bits_of_torch(name, monkeypatch):
    inputs, options = ATTENTIONS[name]()
    upstream = torch.randn(2, 4, 9, inputs[2].size(-1))
    calls, found = [], []
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: calls.append(p) or dropout(x, p))
    for run in (F.scaled_dot_product_attention, cpu_dropout.attention):
        torch.manual_seed(0)
        out = run(*inputs, dropout_p=0.3, **options)
        gradients = torch.autograd.grad(out, inputs, upstream)
        found.append([out, *gradients, torch.get_rng_state()])
    assert calls == [0.3]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@native_only
def test_attention_of_other_kinds_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: pytest.fail("ours ran"))
    inputs = _qkv()
    cpu_dropout.attention(*inputs, dropout_p=0.0)
    cpu_dropout.attention(*[x.bfloat16() for x in inputs], dropout_p=0.3)
    cpu_dropout.attention(*inputs, dropout_p=0.3, from_bytes=4 * 2 * 4 * 9 * 11 + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cpu_dropout.attention(*inputs, dropout_p=0.3)
    with pytest.raises(RuntimeError, match="is_causal"):
        cpu_dropout.attention(*inputs, attn_mask=_mask(), dropout_p=0.3, is_causal=True)


# ---- models


def _dropping(name: str, p: float = 0.2) -> nn.Module:
    """A tiny model that drops wherever its kind can."""
    model = tiny_model(name).train()
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = p
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, float):
                setattr(module, key, p)
    return model


def _one_step(model: nn.Module, name: str) -> list[Tensor | None]:
    torch.manual_seed(1)
    loss = model(**tiny_inputs(name, seed=0)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), torch.get_rng_state()]


def _equal(ours: list[Tensor | None], theirs: list[Tensor | None]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


ONE_PER_FAMILY = list({name.rsplit("-", 1)[0]: name for name in reversed(MODELS)}.values())
NOTHING_TO_SWAP = {"fsmt-seq2seq-lm"}  # drops by a function, in attention of its own


@native_only
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_family_trains_bit_for_bit_as_without(name):
    found = []
    for kernels in ("off", "on"):
        model = _dropping(name)
        with patch_model(model, MilestoneSchedule({0: 0}), kernels=kernels) as handle:
            found.append(_one_step(model, name))
            swapped = handle.kernel_report().swapped
    assert bool(swapped) == (name not in NOTHING_TO_SWAP)
    assert _equal(*found)
    assert all(type(m) is root_of(type(m)) for m in model.modules())


@native_only
def test_whole_run_with_checkpointing_and_stages():
    found = []
    for kernels in ("off", "on"):
        model = _dropping("bert-sequence")
        enable_checkpointing(model)
        losses = []
        with patch_model(model, MilestoneSchedule({0: 0, 3: 2}), kernels=kernels) as handle:
            optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=1.0)
            torch.manual_seed(3)
            for step in range(6):
                loss = model(**tiny_inputs("bert-sequence", seed=step)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                handle.advance()
                losses.append(loss.detach())
        found.append([*losses, *(p.detach() for p in model.parameters())])
    assert _equal(*found)


@native_only
def test_the_report_says_what_and_from_which_size_on(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: calls.append(p) or dropout(x, p))
    model = _dropping("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 0}))
    rows = {row.kind: row for row in handle.kernel_report().rows}
    assert rows.keys() == {"dropout", "attention with dropout"}
    assert rows["attention with dropout"].count == handle.num_blocks
    assert all(row.swapped and "64 KiB" in row.because for row in rows.values())
    _one_step(model, "bert-sequence")
    assert not calls  # tiny tensors keep torch's
    handle.unpatch()
    handle = patch_model(model, MilestoneSchedule({0: 0}), kernels="on")
    assert "at any size" in str(handle.kernel_report())
    _one_step(model, "bert-sequence")
    # embeddings, in every block attention and two more, the pooled output
    assert len(calls) == 2 + 3 * handle.num_blocks
    calls.clear()
    model.eval()
    model(**tiny_inputs("bert-sequence", seed=0))
    assert not calls


@native_only
def test_frozen_blocks_drop_nothing_and_those_above_do(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: calls.append(p) or dropout(x, p))
    model = _dropping("bert-sequence")
    with patch_model(model, MilestoneSchedule({0: 3}), kernels="on") as handle:
        _one_step(model, "bert-sequence")
        assert len(calls) == 3 * (handle.num_blocks - 3) + 1


@native_only
def test_copies_and_pickles_are_the_originals():
    model = _dropping("bert-sequence")
    with patch_model(model, MilestoneSchedule({0: 0}), kernels="on"):
        for twin in (copy.deepcopy(model.bert), pickle.loads(pickle.dumps(model.bert))):
            assert all(type(m) is root_of(type(m)) for m in twin.modules())


@native_only
def test_modules_with_a_forward_of_their_own_keep_it():
    model = _dropping("bert-sequence")
    module = model.bert.encoder.layer[1].attention.self
    module.forward = type(module).forward.__get__(module)
    with patch_model(model, MilestoneSchedule({0: 0}), kernels="on") as handle:
        assert type(module) is root_of(type(module))
        kept = [row for row in handle.kernel_report().rows if not row.swapped]
        assert [(row.count, row.kind) for row in kept] == [(1, "attention with dropout")]
        assert "forward of its own" in kept[0].because


@native_only
def test_attention_that_differs_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_dropout, "attention_differs", lambda: "it is another")
    model = _dropping("bert-sequence")
    with patch_model(model, MilestoneSchedule({0: 0}), kernels="on") as handle:
        swapped = {row.kind: row.swapped for row in handle.kernel_report().rows}
        assert swapped == {"dropout": True, "attention with dropout": False}
    monkeypatch.undo()
    cpu_dropout.attention_differs.cache_clear()
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: F.dropout(x, p / 2))
    assert "in another way" in cpu_dropout.attention_differs()
    cpu_dropout.attention_differs.cache_clear()


@native_only
def test_the_variable_that_forces_a_backend(monkeypatch):
    model = _dropping("bert-sequence")
    for forced, why in (("reference", "=reference"), ("triton", "=triton")):
        monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, forced)
        with patch_model(model, MilestoneSchedule({0: 0})) as handle:
            assert not handle.kernel_report().swapped
            assert why in str(handle.kernel_report())
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "native")
    with patch_model(model, MilestoneSchedule({0: 0})) as handle:
        assert handle.kernel_report().swapped


@native_only
def test_compiled_blocks_keep_torchs_dropout():
    model = _dropping("bert-sequence")
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with patch_model(model, MilestoneSchedule({0: 0}), kernels="on"):
        model.bert.encoder.layer[0].compile(backend=backend, fullgraph=True)
        _one_step(model, "bert-sequence")
    assert graphs
    code = "".join(str(graph.graph) for graph in graphs)
    assert "dropout" in code and "progtuning" not in code
