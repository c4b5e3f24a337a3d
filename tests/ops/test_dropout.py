"""dropout on a CPU: the mask's statistics, what it is a function of, and models that drop."""

from __future__ import annotations

import copy
import ctypes
import math
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from csrc_builds import one_per_instruction_set
from proofs import enable_checkpointing
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, backend, patch_model
from progtuning_kernels.model.derived_classes import root_of
from progtuning_kernels.ops import dropout
from progtuning_kernels.ops.masked_update.low_precision import philox
from progtuning_kernels.swaps import cpu_dropout

native_only = pytest.mark.skipif(
    cpu_dropout.reason_against() is not None, reason=str(cpu_dropout.reason_against())
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# eight elements share a counter, 256 a run, 16,384 a piece that a thread takes
SIZES = (1, 7, 8, 9, 255, 256, 257, 16_383, 16_384, 16_385, 50_001)


def _mask(count: int, p: float) -> Tensor:
    """Of a new call: which elements are kept."""
    return dropout(torch.ones(count), p, implementation="native") != 0


def _limit(p: float) -> int:
    return round((1 - p) * 2**16)


# ---- the mask


@native_only
@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_as_many_are_kept_as_shall_be_in_every_place(p):
    count, calls, keep = 2**21, 2000, _limit(p) / 2**16
    torch.manual_seed(0)
    share = _mask(count, p).double().mean().item()
    assert abs(share - keep) < 5 * math.sqrt(keep * (1 - keep) / count)
    places = torch.stack([_mask(40, p) for _ in range(calls)]).double()  # (calls, places)
    spread = math.sqrt(keep * (1 - keep) / calls)
    assert (places.mean(0) - keep).abs().max() < 5 * spread + 5 / calls


@native_only
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_do_not_know_of_each_other(p):
    count = 2**20
    torch.manual_seed(1)
    kept = _mask(count, p).double() - (1 - p)
    for lag in (*range(1, 33), 255, 256, 257, 384, 4096, 16_384, 65_536):
        correlation = (kept[lag:] * kept[:-lag]).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / math.sqrt(count), lag
    # the eight that share a counter: every pattern as often as it should be
    eights = (kept > 0).view(-1, 8).long() @ (2 ** torch.arange(8))
    ones = torch.tensor([bin(i).count("1") for i in range(256)])
    expected = len(eights) * (1 - p) ** ones * p ** (8 - ones)
    common = expected > 20
    found = torch.bincount(eights, minlength=256)
    square = ((found - expected)[common] ** 2 / expected[common]).sum().item()
    free = int(common.sum()) - 1
    assert abs(square - free) < 5 * math.sqrt(2 * free)


@native_only
def test_calls_do_not_know_of_each_other():
    """Layers of one step and steps of one layer are calls, one after the other."""
    count, p = 2**17, 0.1
    torch.manual_seed(2)
    calls = torch.stack([_mask(count, p) for _ in range(24)]).double() - (1 - p)
    correlation = (calls @ calls.T) / count / (p * (1 - p))
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(count)
    # nor is one call another one, moved along
    for lag in (1, 8, 256, 16_384):
        moved = (calls[1:, lag:] * calls[:-1, :-lag]).mean(1) / (p * (1 - p))
        assert moved.abs().max() < 5 / math.sqrt(count)


@native_only
def test_the_mean_of_result_and_gradient_is_what_they_are_without():
    x, upstream, calls, p = torch.randn(500), torch.randn(500), 4000, 0.3
    torch.manual_seed(3)
    totals = torch.zeros(2, 500, dtype=torch.float64)
    for _ in range(calls):
        leaf = x.clone().requires_grad_()
        out = dropout(leaf, p)
        totals += torch.stack([out.detach(), *torch.autograd.grad(out, leaf, upstream)])
    spread = math.sqrt(p / (1 - p) / calls)
    for mean, truth in zip(totals / calls, (x, upstream), strict=True):
        assert ((mean - truth) / truth.abs()).abs().max() < 5 * spread


@native_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_backward_has_the_mask_of_forward_to_the_bit(dtype, p):
    scale = torch.tensor(2**16 / _limit(p), dtype=torch.float32)
    for size in SIZES:
        torch.manual_seed(size)
        x, upstream = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        x[x == 0] = upstream[upstream == 0] = 1
        leaf = x.clone().requires_grad_()
        state = torch.get_rng_state()
        out = dropout(leaf, p, implementation="native")
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        torch.set_rng_state(state)
        noise = _mask(size, p) * scale
        assert out.dtype is dtype
        assert torch.equal(out, (x.float() * noise).to(dtype))
        assert torch.equal(gradient, (upstream.float() * noise).to(dtype))


@native_only
def test_the_mask_is_philox_of_a_seed_that_torch_draws():
    count, p = 300_001, 0.3  # so many that some lie at the limit itself
    torch.manual_seed(4)
    seed = torch.randint(2**63 - 1, ())
    torch.manual_seed(4)
    eighths, zero = torch.arange((count + 7) // 8), torch.zeros((count + 7) // 8, dtype=torch.int64)
    words = torch.stack(philox(seed, (eighths, zero + (2 << 24), zero, zero)), 1)  # (eighths, 4)
    drawn = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], -1).flatten()[:count]
    assert (drawn == _limit(p)).any() and (drawn == _limit(p) - 1).any()
    assert torch.equal(_mask(count, p), drawn < _limit(p))


@native_only
def test_a_mask_is_a_function_of_the_generator():
    x, found = torch.randn(50_000), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            found.append(torch.stack([dropout(x, 0.1), dropout(x, 0.1), torch.rand(50_000)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    first, second, _ = found[0]
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    assert not torch.equal(dropout(x, 0.1), first)
    # whatever the order of x in memory
    torch.manual_seed(5)
    assert torch.equal(dropout(x.view(100, 500).t().contiguous().t(), 0.1).flatten(), first)


@native_only
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_computed_again_has_the_same_mask(use_reentrant):
    x = torch.randn(3000)
    found = []
    for again in (False, True):
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()

        def run(h: Tensor) -> Tensor:
            return dropout(dropout(h.sin(), 0.2).exp(), 0.3)

        out = checkpoint(run, leaf, use_reentrant=use_reentrant) if again else run(leaf)
        torch.rand(5)  # something else draws before backward
        out.square().sum().backward()
        found.append([out.detach(), leaf.grad, torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@native_only
def test_shapes_specials_and_every_element_written():
    x = torch.randn(3, 5, 7)
    x[0] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e38, 1e-45])
    poison = torch.full_like(x, math.nan)  # most likely what the next allocation finds
    del poison
    for seed in range(4):
        torch.manual_seed(seed)
        found = dropout(x, 0.4)
        torch.manual_seed(seed)
        noise = _mask(x.numel(), 0.4).view_as(x) * torch.tensor(2**16 / _limit(0.4))
        assert found.shape == x.shape
        assert torch.equal(found.view(torch.int32), (x * noise).view(torch.int32))  # -0, NaN, too


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
    ("x", "p", "why"),
    [
        (torch.randn(6, 4).double(), 0.5, "no native kernel for torch.float64"),
        (torch.randn(6, 4, device="meta"), 0.5, "one kernel on meta"),
        (torch.randn(6, 4), 0.0009, None),  # 16 bits are too few for it
        (torch.randn(6, 4), 0.9991, None),
    ],
)
def test_the_rest_runs_plain_torch(x, p, why):
    if why is not None:
        with pytest.raises(RuntimeError, match=why):
            dropout(x, p, implementation="native")
    found = []
    for run in (F.dropout, dropout):
        torch.manual_seed(0)
        found.append(run(x, p))
    assert found[0].is_meta or torch.equal(*found)


@native_only
def test_functorch_runs_plain_torch():
    with pytest.raises(RuntimeError, match="no plain tensor"):
        torch.func.grad(lambda x: dropout(x, 0.5, implementation="native").sum())(torch.ones(4))
    assert torch.func.grad(lambda x: dropout(x, 0.5).sum())(torch.ones(40)).unique().numel() == 2


@native_only
def test_compiled_code_keeps_torchs():
    code = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        code.append(str(graph.graph))
        return graph.forward

    torch.compile(lambda x: dropout(x, 0.5), backend=backend, fullgraph=True)(torch.ones(9))
    assert "dropout" in code[0] and "progtuning" not in code[0]


@native_only
def test_differentiated_twice():
    x = torch.randn(300, dtype=torch.float32, requires_grad=True)
    torch.manual_seed(0)
    out = dropout(x, 0.5)
    (first,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    noise = (out != 0) * 2.0
    torch.testing.assert_close(first, 3 * x.square() * noise**3)
    torch.testing.assert_close(second, 36 * x**3 * noise**6)


@native_only
def test_nothing_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(torch.ones(8001, requires_grad=True), 0.5)
        assert not saved
        F.dropout(torch.ones(8001, requires_grad=True), 0.5)
        assert saved


@native_only
def test_launches_that_make_no_sense_are_refused():
    x = torch.ones(8)
    call = backend.native_extension().dropout_cpu
    good = [x.data_ptr(), 1, 2**15, 8, backend.dtype_code(x.dtype), x.data_ptr(), 1]
    call(*good)
    for place, bad, why in (
        (0, 0, "no storage"),
        (2, 0, "limit"),
        (2, 2**16, "limit"),
        (3, -1, "negative size"),
        (4, backend.dtype_code(torch.float64), "no CPU kernel"),
        (5, 0, "no storage"),
        (6, 0, "num_threads"),
    ):
        with pytest.raises(ValueError, match=why):
            call(*[bad if i == place else value for i, value in enumerate(good)])


SHIM = """
#include "launchers.h"
extern "C" bool drop(const void* x, uint64_t seed, uint32_t limit, int64_t n, int dtype,
                     void* out) {
  return progtuning::dropout_cpu(x, seed, limit, n, static_cast<progtuning::DType>(dtype), out, 1);
}
"""


@native_only
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_instruction_sets_do_not_change_the_bits(tmp_path):
    count, pointer, limit = 20_001, ctypes.c_void_p, 40_000
    seed = 2**63 - 12_345
    for isa, library in one_per_instruction_set(tmp_path, SHIM, "dropout_cpu.cpp"):
        drop = library.drop
        drop.argtypes = [pointer, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int64, ctypes.c_int]
        drop.argtypes += [pointer]
        for dtype in DTYPES:
            x, kind = torch.randn(count).to(dtype), backend.dtype_code(dtype)
            alone, built = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
            assert drop(x.data_ptr(), seed, limit, count, kind, alone.data_ptr())
            backend.native_extension().dropout_cpu(
                x.data_ptr(), seed, limit, count, kind, built.data_ptr(), 1
            )
            assert torch.equal(alone, built), (isa, dtype)


# ---- attention


def _qkv(*, key_heads: int = 4, width: int = 8, tokens: int = 11) -> list[Tensor]:
    shapes = [(2, 4, 9, width), (2, key_heads, tokens, width), (2, key_heads, tokens, width)]
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def _seen(dtype: torch.dtype = torch.bool) -> Tensor:
    mask = torch.rand(2, 1, 9, 11) < 0.7
    mask[1, 0, 2] = False  # a query that sees nothing
    if dtype is torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)


ATTENTIONS: dict[str, Callable[[], tuple[list[Tensor], dict[str, Any]]]] = {
    "plain": lambda: (_qkv(), {}),
    "bool mask": lambda: (_qkv(), {"attn_mask": _seen()}),
    "float mask": lambda: (_qkv(), {"attn_mask": _seen(torch.float32)}),
    "causal": lambda: (_qkv(), {"is_causal": True}),
    "scaled": lambda: (_qkv(), {"scale": 0.3, "attn_mask": _seen()}),
    "negative scale": lambda: (_qkv(), {"scale": -0.3}),
    "grouped": lambda: (_qkv(key_heads=2), {"enable_gqa": True, "attn_mask": _seen()}),
    "odd width": lambda: (_qkv(width=5), {"attn_mask": _seen()}),
}


@pytest.fixture
def calls(monkeypatch) -> list[float]:
    """The p of every call of our dropout."""
    found: list[float] = []
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: found.append(p) or dropout(x, p))
    return found


@pytest.fixture
def masks_of_torch(monkeypatch) -> list[float]:
    """Our dropout draws torch's masks, so that all else can be compared; the p of its calls."""
    found: list[float] = []
    monkeypatch.setattr(cpu_dropout, "dropout", lambda x, p: found.append(p) or F.dropout(x, p))
    return found


@native_only
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_torchs_but_for_the_mask(name, masks_of_torch):
    inputs, options = ATTENTIONS[name]()
    upstream = torch.randn(2, 4, 9, inputs[2].size(-1))
    found = []
    for run in (F.scaled_dot_product_attention, cpu_dropout.attention):
        torch.manual_seed(0)
        with sdpa_kernel(SDPBackend.MATH):
            out = run(*inputs, dropout_p=0.3, **options)
        gradients = torch.autograd.grad(out, inputs, upstream)
        found.append([out, *gradients, torch.rand(3)])
    assert masks_of_torch == [0.3]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@native_only
def test_attention_of_other_kinds_is_left_to_torch(calls):
    inputs = _qkv()
    cpu_dropout.attention(*inputs, dropout_p=0.0)
    cpu_dropout.attention(*[x.bfloat16() for x in inputs], dropout_p=0.3)
    cpu_dropout.attention(*inputs, dropout_p=0.3, from_bytes=4 * 2 * 4 * 9 * 11 + 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cpu_dropout.attention(*inputs, dropout_p=0.3)
    with pytest.raises(RuntimeError, match="is_causal"):
        cpu_dropout.attention(*inputs, attn_mask=_seen(), dropout_p=0.3, is_causal=True)
    assert not calls


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
    return [loss.detach(), *(p.grad for p in model.parameters()), torch.rand(3)]


ONE_PER_FAMILY = list({name.rsplit("-", 1)[0]: name for name in reversed(MODELS)}.values())
NOTHING_TO_SWAP = {"fsmt-seq2seq-lm"}  # drops by a function, in attention of its own


@native_only
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_family_trains_as_without_but_for_the_masks(name, masks_of_torch):
    found = []
    for kernels in ("off", "on"):
        model = _dropping(name)
        with patch_model(model, MilestoneSchedule({0: 0}), kernels=kernels) as handle:
            found.append(_one_step(model, name))
            swapped = handle.kernel_report().swapped
    assert bool(swapped) == bool(masks_of_torch) == (name not in NOTHING_TO_SWAP)
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(type(m) is root_of(type(m)) for m in model.modules())


def _run(name: str, *, checkpointing: bool = False, stop: int | None = None) -> list[Tensor]:
    """Losses and weights of six steps with our masks; resumed at a step, from what it left."""
    model = _dropping(name)
    if checkpointing:
        enable_checkpointing(model)
    torch.manual_seed(3)
    losses, state = [], None
    for steps in [range(6)] if stop is None else [range(stop), range(stop, 6)]:
        with patch_model(model, MilestoneSchedule({0: 0, 3: 2}), kernels="on") as handle:
            optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=1.0)
            if state is not None:
                model.load_state_dict(state[0])
                handle.load_state_dict(state[1])
                optimizer.load_state_dict(state[2])
                torch.set_rng_state(state[3])
            for step in steps:
                loss = model(**tiny_inputs(name, seed=step)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                handle.advance()
                losses.append(loss.detach())
            state = copy.deepcopy([model.state_dict(), handle.state_dict(), optimizer.state_dict()])
            state.append(torch.get_rng_state())
            last = model
        model = _dropping(name)
        if checkpointing:
            enable_checkpointing(model)
        torch.rand(9)  # another process has drawn otherwise
    return [*losses, *(p.detach() for p in last.parameters())]


@native_only
def test_a_run_is_the_same_again_checkpointed_and_resumed():
    first = _run("bert-sequence")
    for options in ({}, {"checkpointing": True}, {"stop": 2}, {"stop": 4}):
        again = _run("bert-sequence", **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), options


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 16) -> (B, 2)
        return self.head(self.encoder(x).mean(1))


@native_only
def test_torchs_own_encoder_drops_by_ours(calls):
    model, x = _Encoder().train(), torch.randn(2, 5, 16)
    with patch_model(model, MilestoneSchedule({0: 1}), kernels="on") as handle:
        assert {(r.kind, r.count) for r in handle.kernel_report().rows} == {("dropout", 12)}
        model(x).sum().backward()
        assert len(calls) == 9  # of three layers that train


@pytest.mark.usefixtures("padded")
@native_only
def test_the_report_says_what_and_from_which_size_on(calls):
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


@pytest.mark.usefixtures("padded")
@native_only
def test_frozen_blocks_drop_nothing_and_those_above_do(calls):
    model = _dropping("bert-sequence")
    with patch_model(model, MilestoneSchedule({0: 3}), kernels="on") as handle:
        _one_step(model, "bert-sequence")
        assert len(calls) == 3 * (handle.num_blocks - 3) + 1


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
def test_the_variable_that_forces_abackend(monkeypatch):
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
