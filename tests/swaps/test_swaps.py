"""Freeze-aware ops in a model: what is swapped, that it trains as before, and the way back.

TRITON_INTERPRET counts only where it is set before triton is imported, so the functions named
check_* run in one process of their own. Without it dropout alone is swapped on a CPU: see
test_dropout.py.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from own_process import interpreted as own_process  # noqa: F401  (runs check_*)
from proofs import enable_checkpointing
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, patch_model
from progtuning_kernels.model.derived_classes import root_of
from progtuning_kernels.swaps import deferred_logits, model_swaps
from progtuning_kernels.swaps.deferred_logits import DeferredLogits, defer, materialise
from progtuning_kernels.swaps.kinds import CannotSwap, recognise

pytestmark = pytest.mark.usefixtures("padded")  # a trial of packing is slow in the interpreter

STEPS = 3
# Of the largest loss, and of the way that a tensor has come, after 3 steps at lr 3e-3.
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 2e-2
# It shifts all scores of a query alike: its gradient is rounding noise, AdamW's first steps are
# lr * sign(gradient), and two right implementations go in different directions.
KEY_BIAS = re.compile(r"(^|[._])(k|key|k_proj|k_lin)\.bias$")
KINDS = {
    "bert-sequence": {"LayerNorm": 1, "dropout + residual + LayerNorm": 8},
    "bert-masked-lm": {
        "LayerNorm": 2,
        "dropout + residual + LayerNorm": 8,
        "language-model head and loss": 1,
    },
    "llama-causal-lm": {"RMSNorm": 9, "gated MLP": 4, "language-model head and loss": 1},
    "gemma2-causal-lm": {"RMSNorm": 17, "gated MLP": 4, "language-model head and loss": 1},
    "gpt2-causal-lm": {"LayerNorm": 9, "GELU": 4, "language-model head and loss": 1},
    "modernbert-sequence": {"LayerNorm": 10, "gated MLP": 4},
    "phi3-causal-lm": {"RMSNorm": 9, "gated MLP": 4, "language-model head and loss": 1},
    "t5-seq2seq-lm": {"RMSNorm": 12, "language-model head and loss": 1},
    "vit-image": {"LayerNorm": 9},
}


def _one_per_family() -> list[str]:
    return list({name.rsplit("-", 1)[0]: name for name in reversed(MODELS)}.values())


def _short_inputs(name: str, step: int) -> dict[str, Any]:
    """One row of few tokens: the interpreter takes 6 ms a launch, and more by the row."""
    rows = 2 if name.endswith("contrastive") else 1
    tokens = 6 if name in ("t5-sequence", "bart-sequence") else 3  # they read the token at 5
    short = {}
    for key, value in tiny_inputs(name, seed=step).items():
        if isinstance(value, Tensor):
            is_text = value.dim() == 2 and key != "input_values"  # the other is sound
            value = (value[:rows, :tokens] if is_text else value[:rows]).contiguous()
        short[key] = value
    return short


def _train(model: nn.Module, name: str, kernels: str) -> list[float]:
    """Three stages: full, then ever less; losses."""
    schedule = MilestoneSchedule({0: 0, 1: 1, 2: 3})  # one inside either stack of T5
    losses = []
    with patch_model(model, schedule, kernels=kernels) as handle:
        optimizer = MaskedAdamW(handle.param_groups(lr=3e-3, weight_decay=0.1), max_grad_norm=1.0)
        for step in range(STEPS):
            loss = model(**_short_inputs(name, step)).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
    return losses


@pytest.mark.parametrize("name", _one_per_family())
def check_trains_as_before(name):
    start, plain, swapped = (tiny_model(name) for _ in range(3))
    expected = _train(plain, name, "off")
    found = _train(swapped, name, "auto")
    scale = max(map(abs, expected))
    assert found == pytest.approx(expected, abs=LOSS_TOLERANCE * scale), name
    begun = start.parameters()
    for (path, p), q, s in zip(plain.named_parameters(), swapped.parameters(), begun, strict=True):
        if KEY_BIAS.search(path):
            continue
        apart = ((p - q).norm() / (p - s).norm().clamp(min=1e-6)).item()
        assert apart <= WEIGHT_TOLERANCE, (path, apart)


@pytest.mark.parametrize("name", KINDS)
def check_what_is_swapped(name):
    report = patch_model(tiny_model(name), MilestoneSchedule({0: 1})).kernel_report()
    found: dict[str, int] = {}
    for row in report.rows:
        if row.swapped:
            found[row.kind] = found.get(row.kind, 0) + row.count
    assert found == KINDS[name], str(report)
    assert f"{sum(KINDS[name].values())} modules swapped" in report.summary()


def _t5_with_gates() -> nn.Module:
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(config)


def check_t5_with_gates():
    inputs = {k: v[:, :5].contiguous() for k, v in tiny_inputs("t5-seq2seq-lm").items()}
    model = _t5_with_gates()
    expected = model(**inputs).loss
    handle = patch_model(model, MilestoneSchedule({0: 1}))
    assert "gated MLP" in {row.kind for row in handle.kernel_report().rows if row.swapped}
    assert model(**inputs).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def check_t5_keeps_its_last_layer_in_float32():
    mlp = _t5_with_gates().encoder.block[0].layer[1].DenseReluDense.bfloat16()
    mlp.wo.float()  # as transformers loads it in half precision
    x = torch.randn(1, 3, 32).bfloat16()
    expected, found = mlp(x), recognise(mlp).forward(mlp, x)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def _falcon_h1(**options: Any) -> nn.Module:
    config = hf.FalconH1Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=97, pad_token_id=0, head_dim=8, mamba_d_ssm=32,
        mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4,
        **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.FalconH1ForCausalLM(config)


@pytest.mark.parametrize("bias", [False, True])
def check_falcon_h1_multiplies_gate_and_result(bias):
    tokens = torch.arange(3, 9)[None]
    model = _falcon_h1(mlp_multipliers=[0.7, 1.3], mlp_bias=bias)
    found = []
    for kernels in ("off", "on"):
        model.zero_grad()
        with patch_model(model, MilestoneSchedule({0: 1}), kernels=kernels) as handle:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            swapped = {row.kind: row.count for row in handle.kernel_report().rows if row.swapped}
        assert swapped.get("gated MLP", 0) == (2 if kernels == "on" else 0)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([loss.detach(), *gradients])
    assert len(found[0]) > 8
    for plain, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def check_multipliers_that_no_op_has():
    mlp = _falcon_h1(mlp_multipliers=[0.7, 1.3], hidden_act="gelu").model.layers[0].feed_forward
    with pytest.raises(CannotSwap, match="no op for a gate_multiplier with GELU"):
        recognise(mlp)
    mlp.gate_multiplier = torch.tensor(0.7)
    with pytest.raises(CannotSwap, match="gate_multiplier or down_multiplier is no number"):
        recognise(mlp)


def check_no_random_number_of_the_user_is_drawn():
    model = tiny_model("llama-causal-lm")
    before = torch.get_rng_state()
    handle = patch_model(model, MilestoneSchedule({0: 1}))
    assert any(row.kind == "language-model head and loss" for row in handle.kernel_report().rows)
    assert torch.equal(torch.get_rng_state(), before)


def check_every_module_is_itself_again():
    model = tiny_model("llama-causal-lm")
    classes = {path: type(m) for path, m in model.named_modules()}
    before = {path: dict(m.__dict__) for path, m in model.named_modules()}
    handle = patch_model(model, MilestoneSchedule({0: 1, 2: 3}))
    assert any(type(m) is not classes[path] for path, m in model.named_modules())
    model(**_short_inputs("llama-causal-lm", 0)).loss.backward()
    handle.advance()
    handle.seek(2)
    handle.unpatch()
    for path, module in model.named_modules():
        assert type(module) is classes[path], path
        now = dict(module.__dict__)
        assert now.keys() == before[path].keys(), path
        for key in ("_forward_pre_hooks", "_forward_hooks", "training"):
            assert now[key] == before[path][key], (path, key)


# XLM's embeddings are several modules, of which one is a LayerNorm: it is swapped and frozen
@pytest.mark.parametrize("name", ["bert-sequence", "xlm-sequence"])
def check_copies_are_ordinary_models(name):
    model = tiny_model(name)
    inputs = _short_inputs(name, 0)
    expected = model.eval()(**inputs).logits
    patch_model(model, MilestoneSchedule({0: 1}))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(m) is root_of(type(m)) for m in twin.modules())
        assert torch.equal(twin.eval()(**inputs).logits, expected)


class _OtherNorm(nn.Module):
    """Scales by a thousandth more than an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight * 1.01


class _OtherMLP(nn.Module):
    """Has the parts of a gated MLP, and adds where that multiplies."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 8), nn.Linear(width, 8)
        self.down_proj, self.act_fn = nn.Linear(8, width), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class _Block(nn.Module):
    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class _Model(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([make(), make()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.embeddings(x)
        for block in self.blocks:
            x = block(x)
        return x


def _reasons(model: nn.Module) -> dict[str, str]:
    report = patch_model(model, MilestoneSchedule({0: 1})).kernel_report()
    return {row.module_class: row.because for row in report.rows if not row.swapped}


def check_a_module_that_differs_keeps_its_own_forward():
    model = _Model(lambda: _Block(_OtherNorm(8), _OtherMLP(8)))
    reasons = _reasons(model)
    assert "none of the known forms" in reasons["_OtherNorm"]
    assert "differs by" in reasons["_OtherMLP"]
    assert all(type(m) is root_of(type(m)) for m in model.blocks[1].modules())


def check_what_must_not_be_bypassed():
    model = tiny_model("llama-causal-lm")
    norm = model.model.norm
    norm.forward = norm.forward
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
    report = patch_model(model, MilestoneSchedule({0: 1})).kernel_report()
    because = {row.example: row.because for row in report.rows if not row.swapped}
    assert "forward of its own" in because["model.norm"]
    assert "a hook on its act_fn" in because["model.layers.0.mlp"]
    assert type(model.model.layers[0].mlp) is hf.models.llama.modeling_llama.LlamaMLP
    assert type(model.model.layers[1].mlp) is not hf.models.llama.modeling_llama.LlamaMLP


def check_frozen_blocks_save_nothing_and_move_back():
    model = tiny_model("llama-causal-lm")
    inputs = _short_inputs("llama-causal-lm", 0)
    handle = patch_model(model, MilestoneSchedule({0: 4}))
    model(**inputs)
    report = handle.truncation_report()
    report.assert_truncated()
    assert all(unit.saved_bytes == 0 for unit in report.prefix)
    assert "modules swapped" in str(report)


def check_holds_less_than_the_original():
    held = {}
    for kernels in ("off", "auto"):
        model = tiny_model("llama-causal-lm")
        with patch_model(model, MilestoneSchedule({0: 0}), kernels=kernels) as handle:
            model(**tiny_inputs("llama-causal-lm"))
            held[kernels] = handle.truncation_report()
    assert held["auto"].activation_bytes < 0.85 * held["off"].activation_bytes
    assert held["auto"].nodes < held["off"].nodes


def check_checkpointing_and_autocast():
    for prepare in (enable_checkpointing, lambda model: None):
        losses = {}
        for kernels in ("off", "auto"):
            model = tiny_model("llama-causal-lm")
            prepare(model)
            with patch_model(model, MilestoneSchedule({0: 2}), kernels=kernels):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(**_short_inputs("llama-causal-lm", 0)).loss
                loss.backward()
                gradient = model.model.layers[3].mlp.down_proj.weight.grad
                losses[kernels] = (loss.item(), gradient.norm().item())
        assert losses["auto"] == pytest.approx(losses["off"], rel=2e-2)


def check_bert_with_dropout_is_a_fixed_function_of_the_seed():
    model = tiny_model("bert-sequence", dropout=True)
    inputs = _short_inputs("bert-sequence", 0)
    patch_model(model, MilestoneSchedule({0: 0}))
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(model(**inputs).loss.item())
    assert drawn[0] == drawn[1] != drawn[2]


# what Dynamo does to any tensor that is not a leaf
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def check_compiled_blocks_keep_their_own_code():
    model = tiny_model("llama-causal-lm")
    model.config.use_cache = False
    inputs = _short_inputs("llama-causal-lm", 0)
    expected = model(**inputs).loss.item()
    patch_model(model, MilestoneSchedule({0: 1}))
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for block in model.model.layers:
        block.compile(backend=backend, fullgraph=True)
    assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
    assert graphs and not any("progtuning" in str(g.graph) for g in graphs)


def check_a_model_that_moves_is_swapped_anew(monkeypatch):
    model = tiny_model("llama-causal-lm")
    answers = {"cpu": "not yet"}
    real = model_swaps.backend.triton_reason
    monkeypatch.setattr(
        model_swaps.backend,
        "triton_reason",
        lambda d, *dtypes: answers.get(d.type) or real(d, *dtypes),
    )
    handle = patch_model(model, MilestoneSchedule({0: 1}))
    assert handle.kernel_report().swapped == 0
    answers.clear()
    handle.freezer._device_type = "elsewhere"  # as if it had been patched there
    model(**_short_inputs("llama-causal-lm", 0))
    assert handle.kernel_report().swapped == 14
    assert type(model.model.layers[0]) is not hf.models.llama.modeling_llama.LlamaDecoderLayer
    handle.unpatch()
    assert all(type(m) is root_of(type(m)) for m in model.modules())


def test_on_a_cpu_nothing_is_swapped_that_drops_nothing_and_the_report_says_so():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 0}))
    report = handle.kernel_report()
    assert report.swapped == 0 and not report.rows
    assert "no module drops" in str(report)
    assert "nothing is swapped" in str(handle.truncation_report())
    assert all(type(m) is root_of(type(m)) for m in model.modules())


def test_off_and_unknown():
    model = tiny_model("bert-sequence")
    with patch_model(model, MilestoneSchedule({0: 0}), kernels="off") as handle:
        assert 'kernels="off"' in handle.kernel_report().summary()
    with pytest.raises(ValueError, match="kernels must be"):
        patch_model(model, MilestoneSchedule({0: 0}), kernels="all")


def test_small_inputs_keep_the_original():
    calls = []

    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("original")
            return 2 * x

    def run(self: nn.Module, x: Tensor) -> Tensor:
        calls.append("op")
        return 2 * x

    swap = model_swaps.Swap("Double", None, run, None, 4)
    module = Double()
    members = model_swaps._members(Double, swap, 100)
    module.__class__ = type("Swapped", (Double,), members)
    module(torch.ones(6, 4))  # 96 bytes
    module(torch.ones(7, 4))
    with torch.no_grad():
        module(x=torch.ones(7, 4))
    assert calls == ["original", "op", "original"]


VOCABULARY, WIDTH = 23, 8


@contextmanager
def _head(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, requires_grad=True)
    bias = torch.randn(VOCABULARY, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, 5))
    labels[0, 1] = -100
    yield hidden, weight, bias, labels


def _transformers_loss(logits: Tensor, labels: Tensor) -> Tensor:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(logits, labels, VOCABULARY, num_items_in_batch=torch.tensor(7))


def _by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    shifted = logits[..., :-1, :].contiguous()
    flat = shifted.view(-1, shifted.size(-1))
    return F.cross_entropy(flat, labels[..., 1:].reshape(-1), label_smoothing=0.1)


def _capped(logits: Tensor, labels: Tensor) -> Tensor:
    logits = torch.tanh(logits / 5.0) * 5.0
    return nn.CrossEntropyLoss()(logits.reshape(-1, VOCABULARY), labels.reshape(-1))


def _rows_by_mask(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 1, VOCABULARY).to(logits.dtype)
    chosen = labels != -100
    return F.cross_entropy(logits[chosen].float(), labels[chosen], weight.float(), reduction="sum")


def _two_slices(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, 1], labels[:, 1] % VOCABULARY)


def _per_token(logits: Tensor, labels: Tensor) -> Tensor:
    rows = F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), reduction="none")
    return (rows * torch.linspace(0.2, 1, len(rows)).to(rows.dtype)).sum()


LOSSES = (_transformers_loss, _by_hand, _capped, _rows_by_mask, _two_slices, _per_token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_never_see_logits(loss, dtype, monkeypatch):
    def refuse(deferred: DeferredLogits) -> None:
        raise AssertionError("they are computed")

    monkeypatch.setattr(deferred_logits, "materialise", refuse)
    with _head(dtype) as (hidden, weight, bias, labels):
        expected = loss(F.linear(hidden, weight, bias), labels)
        found = loss(defer(hidden, weight, bias), labels)
        assert type(found) is Tensor and found.dtype == expected.dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert found.item() == pytest.approx(expected.item(), rel=tolerance)
        leaves = (hidden, weight, bias)
        pairs = zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
        )
        for mine, plain in pairs:
            assert (mine - plain).abs().max() <= tolerance * plain.abs().max()


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -(logits.softmax(-1) * F.log_softmax(logits, dim=-1)).sum()


def _one_word(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[..., 3].sum() + logits[0, 1, 2]


def _scaled(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((logits * 0.5).view(-1, VOCABULARY), labels.view(-1))


def _capped_halfway(logits: Tensor, labels: Tensor) -> Tensor:
    return (torch.tanh(logits / 5.0) * 4.0).sum()


def _capped_for_two_thirds(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(logits / 5.0).view(-1, VOCABULARY), labels.view(-1))


def _per_row(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").square().sum()


def _probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    target = torch.full((10, VOCABULARY), 1 / VOCABULARY, dtype=logits.dtype)
    return F.cross_entropy(logits.view(-1, VOCABULARY), target)


@pytest.mark.parametrize(
    "use",
    [
        _entropy,
        _one_word,
        _scaled,
        _capped_halfway,
        _capped_for_two_thirds,
        _per_row,
        _probabilities,
    ],
)
def test_any_other_use_computes_them(use):
    with _head(torch.float32) as (hidden, weight, bias, labels):
        plain = F.linear(hidden, weight, bias)
        deferred = defer(hidden, weight, bias)
        expected, found = use(plain, labels), use(deferred, labels)
        assert torch.equal(found, expected)
        leaves = (hidden, weight, bias)
        pairs = zip(
            torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
        )
        assert all(torch.equal(mine, plain) for mine, plain in pairs)


def test_looking_at_them():
    with _head(torch.float32) as (hidden, weight, bias, _):
        plain = F.linear(hidden, weight, bias)
        logits = defer(hidden, weight, bias)
        assert (logits.shape, logits.dtype, logits.device) == (
            plain.shape,
            plain.dtype,
            plain.device,
        )
        assert logits.requires_grad and isinstance(logits, Tensor) and len(logits) == 2
        assert torch.equal(logits.argmax(-1), plain.argmax(-1))
        assert torch.equal(copy.deepcopy(logits.detach()), plain.detach())
        assert (logits.detach().numpy() == plain.detach().numpy()).all()
        assert str(logits.detach()) == str(plain.detach())
        with torch.no_grad():
            looked = defer(hidden, weight, bias)
            assert not (looked + 0).requires_grad
        assert (looked + 0).requires_grad  # what was computed without a graph is not kept


def test_logits_of_an_updated_head_are_refused():
    with _head(torch.float32) as (hidden, weight, bias, labels):
        logits = defer(hidden, weight, bias)
        with torch.no_grad():
            weight.mul_(0.5)
        with pytest.raises(RuntimeError, match=r"before optimizer.step\(\)"):
            logits.argmax(-1)
        with pytest.raises(RuntimeError, match=r"before optimizer.step\(\)"):
            F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))


def test_logits_follow_autocast():
    with _head(torch.float32) as (hidden, weight, bias, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = F.linear(hidden, weight, bias)
            logits = defer(hidden, weight, bias)
            assert logits.dtype == expected.dtype == torch.bfloat16
            plain_loss = _transformers_loss(expected, labels)
            loss = _transformers_loss(logits, labels)
        assert logits._logits is None and loss.dtype == plain_loss.dtype
        assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
        assert torch.equal(materialise(logits), expected)
        assert isinstance(logits, DeferredLogits)
