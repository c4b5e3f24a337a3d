"""Plans against real runs: parameters, operations, bytes and times of every stage."""

from __future__ import annotations

import copy
import json
import resource

import pytest
import torch
import transformers as hf
from tiny_models import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import progtuning_kernels.planner.calibration as calibration
import progtuning_kernels.planner.planning as planning
from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    RandomBlockSchedule,
    plan_training,
)
from progtuning_kernels.freezing.freezer import StageState
from progtuning_kernels.patch import patch_model
from progtuning_kernels.planner.calibration import UnitCosts

ROWS, TOKENS = 6, 24
SCHEDULES = {
    "progressive": ProgressiveSchedule(4, 8),
    "always": ProgressiveSchedule(2, 8, embeddings="always"),
    "head only": MilestoneSchedule({0: 0, 2: 3, 4: 4, 6: 1}).bind(8),
    "cyclic": CyclicBlockSchedule(1, 2).bind(8),
}


def _batch(
    model: torch.nn.Module, rows: int = ROWS, tokens: int = TOKENS
) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[1:, -5:] = 0
    labels = torch.arange(rows) % 3 if "Classification" in type(model).__name__ else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _plan(model, schedule, **options):
    return plan_training(model, schedule, batch_size=ROWS, seq_len=TOKENS, **options)


# one encoder, one decoder with tied weights, and two stacks under every schedule
@pytest.mark.parametrize(
    ("name", "dropout", "kind"),
    [
        *(("bert-sequence", True, kind) for kind in SCHEDULES),
        *(("gpt2-causal-lm", True, kind) for kind in SCHEDULES),
        *(("t5-seq2seq-lm", False, kind) for kind in SCHEDULES),
        *(("bert-masked-lm", False, kind) for kind in ("progressive", "head only")),
        *(("llama-causal-lm", False, kind) for kind in ("progressive", "head only")),
        *(("llama-sequence", False, kind) for kind in ("progressive", "head only")),
    ],
)
def test_stages_are_those_of_a_real_run(name, dropout, kind):
    model, schedule = tiny_model(name, dropout=dropout), SCHEDULES[kind]
    plan = _plan(model, schedule, device="cpu")
    batch = _batch(model)
    handle = patch_model(model, copy.deepcopy(schedule), kernels="off", packing="off")
    optimizer = MaskedAdamW(handle.param_groups())
    assert [s.steps for s in plan.stages] == [8 // len(plan.stages)] * len(plan.stages)
    for stage in plan.stages:
        handle.seek(stage.first_step)
        assert stage.boundary == handle.boundary
        assert stage.trainable_params == handle.active_params
        # of the CPU's attention kernels torch's counter sees but this one
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = model(**batch).loss
            forward = counter.get_total_flops()
            loss.backward()
        assert stage.forward_flops == pytest.approx(forward, rel=0.02)
        backward = counter.get_total_flops() - forward
        assert stage.backward_flops == pytest.approx(backward, rel=0.02)
        active = [p for p in model.parameters() if p.grad is not None]
        assert stage.gradient_bytes == sum(p.grad.nbytes for p in active)
        optimizer.step()
        state = sum(t.nbytes for p in active for t in optimizer.state[p].values())
        assert stage.state_bytes == state
        optimizer.zero_grad()
        model(**batch)
        measured = handle.truncation_report().activation_bytes
        assert stage.activation_bytes == pytest.approx(measured, rel=0.01)
    whole = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert {s.weight_bytes for s in plan.stages} == {whole}


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "llama-causal-lm"])
def test_checkpointing_is_planned_as_it_runs(name):
    model = tiny_model(name)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = _plan(model, SCHEDULES["progressive"], device="cpu")
    batch = _batch(model)
    handle = patch_model(model, ProgressiveSchedule(4, 8), kernels="off", packing="off")
    for stage in plan.stages:
        handle.seek(stage.first_step)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        assert stage.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
        measured = handle.truncation_report().activation_bytes
        assert stage.activation_bytes == pytest.approx(measured, rel=0.01)
    plain = _plan(tiny_model(name), SCHEDULES["progressive"], device="cpu")
    assert plain.stages[0].peak_bytes > plan.stages[0].peak_bytes
    remedies = {r.option: r.peak_bytes for r in plain.remedies}
    assert remedies["gradient checkpointing"] == plan.stages[0].peak_bytes


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("bert-sequence", False), ("llama-causal-lm", False), ("llama-causal-lm", True)],
)
def test_autocast_is_planned_as_it_runs(name, checkpointing):
    model = tiny_model(name)
    if checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": False})
    schedule, bf16 = ProgressiveSchedule(2, 4), torch.bfloat16
    plan = _plan(model, schedule, device="cpu", autocast=bf16)
    batch = _batch(model)
    handle = patch_model(model, schedule, kernels="off", packing="off")
    for stage in plan.stages:
        handle.seek(stage.first_step)
        with torch.autocast("cpu", bf16):
            model(**batch)
            measured = handle.truncation_report().activation_bytes
        assert stage.activation_bytes == pytest.approx(measured, rel=0.01)
    assert "autocast to bfloat16" in plan.title


def test_autocast_leaves_weights_gradients_and_state_as_they_are():
    model, schedule = tiny_model("bert-sequence"), MilestoneSchedule({0: 2}).bind(1)
    plain, cast, packed = (
        _plan(model, schedule, device="cpu", **more).stages[0]
        for more in (
            {},
            {"autocast": torch.bfloat16},
            {"autocast": torch.bfloat16, "real_tokens": 0.001},
        )
    )
    for field in ("weight_bytes", "gradient_bytes", "state_bytes", "flops"):
        assert getattr(cast, field) == getattr(plain, field), field
    assert packed.activation_bytes < cast.activation_bytes < plain.activation_bytes
    assert cast.peak_bytes < plain.peak_bytes
    # the copies of weights that backward reads are as large without any token
    last = model.bert.encoder.layer[3]
    assert packed.activation_bytes > sum(2 * p.numel() for p in last.parameters() if p.ndim == 2)


def test_state_bytes_are_those_of_the_optimizer():
    sizes = {}
    for name, dtype in (("adamw", torch.float32), ("adamw-bf16", torch.bfloat16)):
        for masters in (False, True):
            model = tiny_model("bert-sequence").to(torch.bfloat16)
            options = dict(optimizer=name, master_weights=masters, dtype=torch.bfloat16)
            stage = _plan(model, ProgressiveSchedule(2, 4), **options).stages[0]
            optimizer = MaskedAdamW(model.parameters(), state_dtype=dtype, master_weights=masters)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            state = optimizer.state.values()
            assert stage.state_bytes == sum(t.nbytes for s in state for t in s.values())
            assert stage.gradient_bytes == 2 * stage.trainable_params
            sizes[name, masters] = stage.state_bytes
    assert sizes["adamw-bf16", False] < 0.51 * sizes["adamw", False]
    model = _meta(hf.BertForSequenceClassification, hf.BertConfig(num_hidden_layers=2))
    eight = plan_training(
        model, ProgressiveSchedule(2), batch_size=2, seq_len=8, optimizer="adamw-8bit"
    ).stages[0]
    assert eight.state_bytes == pytest.approx((2 + 8 / 256) * eight.trainable_params, rel=0.01)


def _meta(cls, config) -> torch.nn.Module:
    with torch.device("meta"):
        return cls(config)


def test_parts_of_the_peak_and_what_lowers_it():
    model = tiny_model("bert-sequence")
    plan = _plan(model, ProgressiveSchedule(4, 8), memory_bytes=1 << 40)
    assert plan.peak_stage == 0 and plan.fits and plan.peak_bytes == plan.stages[0].peak_bytes
    for field in ("gradient_bytes", "state_bytes", "activation_bytes", "peak_bytes"):
        sizes = [getattr(s, field) for s in plan.stages]
        assert sizes == sorted(set(sizes), reverse=True), field
    for s in plan.stages:
        floor = s.weight_bytes + s.state_bytes + max(s.gradient_bytes, s.activation_bytes)
        assert floor <= s.peak_bytes <= floor + s.gradient_bytes + s.activation_bytes
    remedies = {r.option: r.peak_bytes for r in plan.remedies}
    assert list(remedies.values()) == sorted(remedies.values())
    assert remedies['embeddings="never"'] < plan.peak_bytes
    bf16 = _plan(model, ProgressiveSchedule(4, 8), optimizer="adamw-bf16")
    assert remedies["bf16 moments"] == bf16.peak_bytes
    assert "8-bit state" not in remedies  # every tensor is too small for it
    never = _plan(model, ProgressiveSchedule(4, 8, embeddings="never"))
    assert remedies['embeddings="never"'] == never.peak_bytes
    text = str(plan)
    assert "the peak is stage 1" in text and "not the peak" in text
    small = _plan(model, ProgressiveSchedule(4, 8), memory_bytes=plan.peak_bytes - 1)
    assert small.fits is False and "does NOT fit in" in str(small)
    json.dumps(plan.to_dict())


def _wide(layers: int) -> torch.nn.Module:
    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=512, vocab_size=97)
    return _meta(hf.BertForSequenceClassification, hf.BertConfig(**sizes, num_hidden_layers=layers))


def test_gradients_that_are_alive_are_those_of_the_clip_mode_and_of_the_state_device():
    # few tokens and many weights, so that the peak is made of gradients
    model, schedule = _wide(5), ProgressiveSchedule(1, 2)
    plans = [
        plan_training(model, schedule, batch_size=1, seq_len=4, device="cuda", **more)
        for more in (
            {},
            dict(in_backward=True, clip_mode="exact"),
            dict(in_backward=True, clip_mode="previous_norm"),
            dict(in_backward=True, state_device="cpu"),
        )
    ]
    kept, exact, alone, moved = (plan.full for plan in plans)
    block = 4 * sum(p.numel() for p in model.bert.encoder.layer[0].parameters())
    assert exact.gradient_bytes == kept.gradient_bytes > 5 * block
    assert exact.peak_bytes == kept.peak_bytes > alone.peak_bytes + 3 * block
    assert (alone.gradient_bytes, moved.gradient_bytes) == (block, 3 * block)
    assert moved.state_bytes == 0 and moved.host.state_bytes == alone.state_bytes
    more = moved.peak_bytes - (alone.peak_bytes - alone.state_bytes)
    assert more == pytest.approx(2 * block, rel=0.1)
    remedies = {r.option: r.peak_bytes for r in plans[0].remedies}
    assert remedies["in_backward (without exact clipping)"] == alone.peak_bytes
    assert "in backward" in plans[2].title and "in_backward" not in str(plans[2])


def test_options_that_fit_together_are_found_where_none_fits_alone():
    model, schedule = _wide(3), ProgressiveSchedule(1, 2)
    options = dict(batch_size=4, seq_len=16, device="cuda")
    plain = plan_training(model, schedule, **options, memory_bytes=1)
    assert "it takes a smaller model, shorter rows, or more ranks (fsdp2)" in str(plain)
    least = min(plain.remedies, key=lambda r: r.peak_bytes)
    assert "gradient checkpointing" in least.option and "a micro-batch of 1" in least.option
    memory = min(r.peak_bytes for r in plain.remedies if "," not in r.option) - 1
    plan = plan_training(model, schedule, **options, memory_bytes=memory)
    (cure,) = (r for r in plan.remedies if "," in r.option)
    assert cure.option == (
        "gradient checkpointing, 8-bit state, in_backward (without exact clipping)"
    )
    assert least.peak_bytes < cure.peak_bytes <= memory and "none of them" not in str(plan)
    planning.switch_checkpointing_on(model)
    options |= dict(optimizer="adamw-8bit", in_backward=True)
    cured = plan_training(model, schedule, **options, memory_bytes=memory)
    assert cured.fits and cured.peak_bytes == cure.peak_bytes


def test_the_rate_of_an_update_here_takes_the_place_of_the_stated_one(monkeypatch):
    model = tiny_model("bert-sequence")
    options = dict(state_device="cpu", device="cuda", pcie_gbps=2, host_gbps=1)
    stated = _plan(model, ProgressiveSchedule(1, 2), **options)
    assert "PCIe at 2 GB/s each way, host memory at 1 GB/s" in str(stated)
    monkeypatch.setattr(calibration, "_UPDATED", 4096)
    timed = _plan(model, ProgressiveSchedule(1, 2), **options, calibrate=True)
    assert "(an update, timed here)" in str(timed)
    a, b = stated.full.host, timed.full.host
    assert b.update_bytes == a.update_bytes and b.update_s not in (0, a.update_s)
    assert b.to_host_s == a.to_host_s == a.to_host_bytes / 2e9
    assert a.after_backward_s == a.update_s and a.beside_backward_s == 0
    here = _plan(model, ProgressiveSchedule(1, 2), state_device="cpu", device="cpu")
    assert here.full.host is None and here.full.state_bytes == a.state_bytes
    assert "changes nothing where the device is a CPU" in str(here)


def test_the_run_is_what_its_stages_make_of_it():
    model = tiny_model("llama-causal-lm")
    plan = _plan(model, MilestoneSchedule({0: 0, 2: 3}), steps=8)
    assert [(s.first_step, s.steps) for s in plan.stages] == [(0, 2), (2, 6)]
    ratio = plan.stages[1].flops / plan.full.flops
    assert plan.stages[0].step_ratio == pytest.approx(1) and ratio < 0.8
    assert plan.run_ratio == pytest.approx((2 + 6 * ratio) / 8)
    assert plan.cached_run_ratio is None
    equal = _plan(model, ProgressiveSchedule(4))
    assert len({s.steps for s in equal.stages}) == 1 and "no length yet" in str(equal)
    always = _plan(model, ProgressiveSchedule(4, 8, embeddings="always"))
    assert always.run_ratio > equal.run_ratio


def test_cached_rows_and_steps_without_prefix():
    model = tiny_model("bert-sequence")
    for cache, token in ((True, 4 * 32), (PrefixCache(1, dtype=torch.bfloat16), 2 * 32)):
        plan = _plan(model, ProgressiveSchedule(4, 8), cache=cache)
        assert [s.cache_bytes_per_sample for s in plan.stages] == [None] + 3 * [TOKENS * token]
    first, *later = plan.stages
    assert first.cached_step_ratio is None
    assert all(s.cached_step_ratio < s.step_ratio for s in later)
    # boundary 2 of 4: half of the blocks' forward is left, and the head's
    half = plan.full.forward_flops / 2 + later[1].backward_flops
    assert later[1].cached_step_ratio == pytest.approx(half / plan.full.flops, rel=0.01)
    assert plan.cached_run_ratio < plan.run_ratio and "once the cache holds" in str(plan)


@pytest.mark.parametrize("name", ["bert-sequence", "t5-seq2seq-lm", "llama-causal-lm"])
def test_real_tokens_scale_blocks_and_nothing_else(name):
    model, share = tiny_model(name), 0.25
    padded = _plan(model, ProgressiveSchedule(2, 4), device="cpu", cache=True)
    packed = _plan(model, ProgressiveSchedule(2, 4), device="cpu", cache=True, real_tokens=share)
    assert packed.full == padded.full and "25% of the places" in str(packed)
    head = 2 * ROWS * TOKENS * 97 * 32 if name.endswith("-lm") else 0  # the language model's
    rows = 2 * ROWS * (32 * 32 + 32 * 3) if name == "bert-sequence" else 0  # pooler and classes
    for one, other in zip(padded.stages, packed.stages, strict=True):
        inside = one.forward_flops - head - rows
        # between linear layers alone and attention alone
        low, high = (head + rows + part * inside for part in (share**1.5, share))
        assert low < other.forward_flops <= high
        assert 0.9 < other.forward_flops / high
        low, high = (f * (one.backward_flops - 2 * (head + rows)) for f in (share**1.5, share))
        assert low <= other.backward_flops - 2 * (head + rows) <= high
        assert other.activation_bytes < one.activation_bytes
        assert other.peak_bytes < one.peak_bytes
        floor = other.weight_bytes + other.state_bytes
        assert other.peak_bytes >= floor + max(other.gradient_bytes, other.activation_bytes)
        for field in ("weight_bytes", "gradient_bytes", "state_bytes", "trainable_params"):
            assert getattr(one, field) == getattr(other, field)
    one, other = padded.stages[1], packed.stages[1]
    assert other.cache_bytes_per_sample == share * one.cache_bytes_per_sample
    assert other.step_ratio < one.step_ratio and other.cached_step_ratio < other.step_ratio
    assert padded == _plan(
        model, ProgressiveSchedule(2, 4), device="cpu", cache=True, real_tokens=1.0
    )


def test_real_tokens_are_planned_as_they_run():
    """Wide blocks and short rows, so that attention, of which groups leave less, says little."""
    sizes = dict(hidden_size=256, num_attention_heads=2, intermediate_size=1024, vocab_size=97)
    drops = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = hf.BertConfig(**sizes, **drops, num_hidden_layers=4)
    model = hf.BertForSequenceClassification(config)
    batch = _batch(model) | {"labels": torch.arange(ROWS) % 2}
    batch["attention_mask"][2:, 8:] = 0
    share = batch["attention_mask"].float().mean().item()
    plan = _plan(model, ProgressiveSchedule(2, 4), device="cpu", real_tokens=share)
    with patch_model(model, ProgressiveSchedule(2, 4), kernels="off", packing="on") as handle:
        model(**batch)  # it is tried first
        for stage in plan.stages:
            handle.seek(stage.first_step)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                loss = model(**batch).loss
                forward = counter.get_total_flops()
                loss.backward()
            assert handle.packing_report().packs
            assert stage.forward_flops == pytest.approx(forward, rel=0.05)
            assert stage.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_memory_of_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("its kernels are asked for, not assumed")
    sizes = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=97)
    model = _meta(hf.BertForSequenceClassification, hf.BertConfig(**sizes, num_hidden_layers=2))
    options = dict(batch_size=4, seq_len=128, dtype=torch.bfloat16)
    cpu, gpu, flash = (
        plan_training(model, ProgressiveSchedule(2, 4), **options, **more)
        for more in (
            dict(device="cpu"),
            dict(device="cuda"),
            dict(device="cuda", padding=False),
        )
    )
    # on a CPU dropout takes the unfused kernel, which keeps the scores: (B, heads, T, T)
    scores = 4 * 2 * 128 * 128 * 2
    assert cpu.full.activation_bytes > gpu.full.activation_bytes + 2 * 2 * scores
    assert "math" in str(cpu) and "efficient (assumed" in str(gpu) and "flash (ass" in str(flash)
    assert flash.full.activation_bytes < gpu.full.activation_bytes
    assert gpu.full.flops == pytest.approx(cpu.full.flops, rel=0.06)  # scores twice


def test_a_llama_of_8_billion_parameters_fits_in_24_gb_with_its_state_on_the_host():
    config = hf.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, of the tests before too
    model = _meta(hf.LlamaForCausalLM, config)
    planning.switch_checkpointing_on(model)
    plan = plan_training(
        model,
        ProgressiveSchedule(1, 1000),
        batch_size=1,
        seq_len=2048,
        dtype=torch.bfloat16,
        optimizer="adamw-8bit",
        state_device="cpu",
        in_backward=True,
        memory_bytes=24 * 10**9,
        device="cuda",
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # weights: 16e6
    params = 8_030_261_248
    assert plan.full.trainable_params == params
    matrices = 2 * 2048 * (params - 128256 * 4096)
    attention = 32 * 4 * 2048**2 * 4096
    assert plan.full.forward_flops == pytest.approx(matrices + attention, rel=0.001)
    weights, checkpoints, logits = 2 * params, 32 * 2048 * 4096 * 2, 3 * 2048 * 128256 * 4
    assert plan.peak_bytes == pytest.approx(weights + checkpoints + logits, rel=0.01)
    parts = {part.what: part.nbytes for part in plan.full.peak_parts}
    assert parts["weights"] == pytest.approx(weights, rel=1e-6)  # and the rotary embedding's
    assert parts["3 x float32 (2048, 128256)"] == logits
    assert sum(parts.values()) == plan.peak_bytes and plan.fits
    host = plan.full.host
    assert host.weight_bytes == host.to_device_bytes == weights
    # 2 bytes of gradient, 2 x (2 + 8 / 256) of moments, 2 x 2 of weights
    assert host.update_bytes == pytest.approx((2 + 2 * (2 + 8 / 256) + 4) * params, rel=1e-3)
    assert (host.to_host_s, host.update_s) == pytest.approx(
        (weights / 25e9, host.update_bytes / 40e9), rel=1e-6
    )
    text = " ".join(str(plan).split())
    assert "which fits in 22.35 GiB" in text and "adamw-8bit on the host" in text
    assert f"{plan.full.backward_flops / host.update_s / 1e12:.1f} TFLOP/s" in text
    assert f"takes {host.host_bytes / 2**30:.2f} GiB of host memory" in text


def test_a_step_is_the_sum_of_its_units():
    costs = UnitCosts(
        embeddings=1e3,
        embeddings_frozen=1e2,
        block=20.0,
        block_lowest=15.0,
        block_frozen=7.0,
        block_between=11.0,
        head=3.0,
        update=0.5,
    )
    full = StageState(0, frozenset({-1, 0, 1, 2, 3, 4}), 8)
    assert costs.step_s(full, 4) == 1e3 + 4 * 20 + 3 + 4
    upper = StageState(2, frozenset({2, 3, 4}), 4)
    assert costs.step_s(upper, 4) == 1e2 + 2 * 7 + 15 + 20 + 3 + 2
    assert costs.step_s(upper, 4, cached=True) == 15 + 20 + 3 + 2
    half = costs.with_real_tokens(0.5)
    assert half.step_s(upper, 4) == 1e2 + (2 * 7 + 15 + 20) / 2 + 3 + 2
    assert costs.step_s(StageState(1, frozenset({1, 3}), 2), 4) == 1e2 + 7 + 15 + 11 + 20 + 3 + 1
    assert costs.step_s(StageState(0, frozenset({-1, 3}), 2), 4) == 1e3 + 3 * 11 + 20 + 3 + 1
    assert costs.step_s(StageState(4, frozenset({4}), 2), 4) == 1e2 + 4 * 7 + 3 + 1


def test_calibrated_times_are_composed_of_measured_units(monkeypatch):
    """Of given times: measured ones change with what else the machine does."""
    costs = UnitCosts(
        embeddings=2,
        embeddings_frozen=1,
        block=10,
        block_lowest=8,
        block_frozen=3,
        block_between=0,
        head=5,
        update=0,
    )
    monkeypatch.setattr(planning, "measure_units", lambda *_, **__: costs)
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=200)
    model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_hidden_layers=6))
    plan = plan_training(model, ProgressiveSchedule(3, 6), batch_size=4, seq_len=8, calibrate=True)
    assert plan.calibrated and " ms" in str(plan).splitlines()[3]
    full, lower, upper = 5 + 2 + 6 * 10, 5 + 1 + 2 * 3 + 8 + 3 * 10, 5 + 1 + 4 * 3 + 8 + 10
    expected = [1, lower / full, upper / full]
    assert [stage.step_ratio for stage in plan.stages] == pytest.approx(expected)


def test_units_are_measured():
    sizes = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=200)
    model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_hidden_layers=6))
    plan = plan_training(model, ProgressiveSchedule(3, 6), batch_size=4, seq_len=8, calibrate=True)
    assert plan.calibrated and all(stage.step_ms > 0 for stage in plan.stages)


def test_models_that_cannot_be_calibrated_are_planned_by_operations(monkeypatch):
    plan = _plan(tiny_model("t5-seq2seq-lm"), ProgressiveSchedule(2, 4), calibrate=True)
    assert not plan.calibrated and "not calibrated: it takes one stack" in str(plan)
    assert plan.stages[1].step_ms is None and 0 < plan.stages[1].step_ratio < 1


def test_planning_leaves_the_model_alone():
    model = tiny_model("bert-sequence").eval()
    model.bert.embeddings.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    schedule = ProgressiveSchedule(2)
    plan = _plan(model, schedule)
    assert torch.equal(torch.get_rng_state(), state) and schedule.total_steps is None
    assert not model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    # what the user has frozen stays frozen
    assert plan.full.trainable_params == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_own_modules_take_their_inputs():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inlet = torch.nn.Linear(8, 16)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, x):
            x = self.inlet(x)
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    inputs = {"x": torch.randn(5, 3, 8)}
    options = dict(batch_size=5, seq_len=3)
    plan = plan_training(Own(), ProgressiveSchedule(2, 4), **options, inputs=inputs)
    assert plan.stages[1].backward_flops == 2 * (2 * 15 * 16 * 16) + 2 * 15 * 16 * 16
    with pytest.raises(ValueError, match=r"does not take input_ids: give its arguments as inputs"):
        plan_training(Own(), ProgressiveSchedule(2, 4), **options)


class _Asking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, input_ids):
        return self.layers[1](self.layers[0](torch.ones(int(input_ids.max()), 4)))


def test_refusals():
    model = tiny_model("bert-sequence")
    schedule = ProgressiveSchedule(2, 4)
    for error, match, call in (
        (TypeError, r'torch.device\("meta"\)', lambda: _plan(model.config, schedule)),
        (ValueError, "optimizer must be", lambda: _plan(model, schedule, optimizer="sgd")),
        (ValueError, "more than the 4 blocks", lambda: _plan(model, ProgressiveSchedule(5, 9))),
        (ValueError, "give steps=", lambda: _plan(model, MilestoneSchedule({}))),
        (ValueError, "while it trains", lambda: _plan(model, AdaptiveSchedule(5), steps=9)),
        (
            ValueError,
            "must be positive",
            lambda: plan_training(model, schedule, batch_size=0, seq_len=1),
        ),
        (ValueError, "frozen_mode must be", lambda: _plan(model, schedule, frozen_mode="off")),
        (ValueError, "ranks must be 1 or more", lambda: _plan(model, schedule, ranks=2.5)),
        (ValueError, "tied must be", lambda: _plan(model, schedule, tied="head")),
        (ValueError, "total_steps must be 1", lambda: _plan(model, schedule, steps=0)),
        (TypeError, "not its class", lambda: _plan(model, ProgressiveSchedule)),
        (ValueError, "real_tokens=0 must", lambda: _plan(model, schedule, real_tokens=0)),
        (ValueError, "real_tokens=1.1 must", lambda: _plan(model, schedule, real_tokens=1.1)),
        (
            ValueError,
            "real_tokens=0.5 leaves padding out, and there is none",
            lambda: _plan(model, schedule, real_tokens=0.5, padding=False),
        ),
        (
            ValueError,
            "of weights in float32",
            lambda: _plan(model, schedule, autocast=torch.bfloat16, dtype=torch.bfloat16),
        ),
        (ValueError, "for in_backward=True", lambda: _plan(model, schedule, clip_mode="exact")),
        (ValueError, "must be None or 'cpu'", lambda: _plan(model, schedule, state_device="gpu")),
        (
            ValueError,
            "is planned for one rank: leave ranks=2 out",
            lambda: _plan(model, schedule, state_device="cpu", ranks=2),
        ),
        (ValueError, "pcie_gbps=0", lambda: _plan(model, schedule, pcie_gbps=0)),
        (ValueError, "without data", lambda: _plan(_Asking(), ProgressiveSchedule(2, 4))),
    ):
        with pytest.raises(error, match=match):
            call()
    with pytest.raises(ValueError, match="more than the 1 that a table holds: give fewer steps="):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(planning, "_MOST_PLANS", 1)
            _plan(model, RandomBlockSchedule(1, 1), steps=50)
    for patched in (MilestoneSchedule({0: 2}), MilestoneSchedule({})):  # one freezes nothing
        with patch_model(model, patched, kernels="off"):
            with pytest.raises(ValueError, match="plan before"):
                _plan(model, schedule)
