"""What only a GPU can show: no host sync in the step, the same numbers as on CPU, autocast."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    backend,
    patch_model,
)
from progtuning_kernels.swaps.deferred_logits import defer

pytestmark = pytest.mark.gpu


def _parameters(device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(1,), (7, 9), (255,), (257,), (33, 125)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def _give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_step_equals_that_on_cpu(max_grad_norm):
    runs = {}
    for device in ("cpu", "cuda"):
        parameters = _parameters(device)
        optimizer = MaskedAdamW(
            parameters, lr=0.1, eps=1e-3, weight_decay=0.1, max_grad_norm=max_grad_norm
        )
        for seed in range(4):
            _give_gradients(parameters, seed)
            optimizer.step()
        runs[device] = [p.detach().cpu() for p in parameters]
    for p, q in zip(runs["cpu"], runs["cuda"], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_step_never_waits_for_the_device_and_skips_there():
    parameters = _parameters("cuda")
    optimizer = MaskedAdamW(parameters, lr=0.1, max_grad_norm=0.5)
    _give_gradients(parameters, 0)
    optimizer.step()  # the first one makes state and loads kernels
    before = [p.detach().clone() for p in parameters]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    _give_gradients(parameters, 1)
    parameters[2].grad[3] = float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, parameters, before))
    for p, moment in zip(parameters, moments, strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], moment)
        assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("clip_mode", [None, "exact", "previous_norm"])
def test_state_on_the_host_trains_as_state_on_the_gpu(clip_mode):
    """Blocks of 16 MiB: a copy takes longer than the launches after it."""
    runs = []
    for state_device in ("cpu", None):
        before = torch.cuda.memory_allocated()
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6))).cuda()
        optimizer = MaskedAdamW(
            model.named_parameters(),
            eps=1e-3,
            max_grad_norm=0.5,
            in_backward=clip_mode is not None,
            clip_mode=clip_mode or "exact",
            state_device=state_device,
        )
        for step in range(6):
            model[0].requires_grad_(step % 3 != 1)
            x = torch.randn(4, 2048, generator=torch.Generator().manual_seed(step)).cuda()
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([p.detach().cpu() for p in model.parameters()])
        weights = sum(p.nbytes for p in model.parameters())
        held = torch.cuda.memory_allocated() - before
        assert (held < 1.5 * weights) == (state_device == "cpu")
        del model, optimizer
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.captures
def test_triton_is_tried_once_and_never_in_a_capture(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "triton_trials", {})
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.zeros(8, device=device)

    def in_a_capture() -> str | None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            reason = backend.triton_reason(device)
            x.add_(1)
        return reason

    assert "before this capture" in in_a_capture()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert backend.triton_reason(device) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert in_a_capture() is None
    assert backend.triton_trials == {device.index: None}


@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "llama-causal-lm"])
def test_autocast_gradients_are_those_of_plain_freezing(name):
    gradients = []
    for patched in (False, True):
        model = tiny_model(name).cuda()
        inputs = {k: v.cuda() for k, v in tiny_inputs(name).items()}
        handle = patch_model(model, MilestoneSchedule({0: 2}))
        if not patched:  # the same flags without the patch
            flags = {n: p.requires_grad for n, p in model.named_parameters()}
            handle.unpatch()
            for n, p in model.named_parameters():
                p.requires_grad_(flags[n])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(**inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        if patched:
            handle.truncation_report().assert_truncated()
    assert gradients[0].keys() == gradients[1].keys()
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, rtol=1e-2, atol=1e-4)


def test_memory_falls_with_the_stages():
    model = tiny_model("bert-sequence").cuda()
    inputs = {k: v.cuda() for k, v in tiny_inputs("bert-sequence").items()}
    handle = patch_model(model, ProgressiveSchedule(4, 4))
    optimizer = MaskedAdamW(handle.param_groups(), max_grad_norm=1.0)
    held = []
    for _ in range(4):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.forwards.last = None
        held.append(torch.cuda.memory_allocated())
        handle.advance()
    assert held == sorted(set(held), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["bert-masked-lm", "gemma2-causal-lm", "gpt2-causal-lm", "modernbert-sequence"]
)
def test_swapped_kernels_train_as_the_original(name, dtype):
    losses = {}
    for kernels in ("off", "on"):
        model = tiny_model(name).to("cuda", dtype)
        handle = patch_model(model, MilestoneSchedule({0: 0, 5: 2}), kernels=kernels)
        assert (handle.kernel_report().swapped > 0) == (kernels == "on"), handle.kernel_report()
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=1.0)
        losses[kernels] = []
        for step in range(10):
            inputs = {k: v.cuda() for k, v in tiny_inputs(name, seed=step).items()}
            loss = model(**inputs).loss
            losses[kernels].append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert losses["on"] == pytest.approx(losses["off"], rel=tolerance)


def test_a_model_patched_on_the_cpu_is_swapped_when_it_has_moved():
    model = tiny_model("llama-causal-lm")
    handle = patch_model(model, MilestoneSchedule({0: 1}), kernels="on")
    assert handle.kernel_report().swapped == 0
    model.cuda()
    model(**{k: v.cuda() for k, v in tiny_inputs("llama-causal-lm").items()}).loss.backward()
    assert handle.kernel_report().swapped == 14


def test_small_models_keep_their_own_layer_norms():
    model = tiny_model("bert-sequence").cuda()
    handle = patch_model(model, MilestoneSchedule({0: 0}))
    because = {row.kind: row.because for row in handle.kernel_report().rows}
    assert "MB of its input on" in because["LayerNorm"]
    assert handle.state_dict()["call_costs"]["bytes_per_us"] > 0


def test_a_kept_launch_computes_what_tritons_own_does():
    pytest.importorskip("triton")
    from progtuning_kernels.ops import kept_launches, rms_norm

    memory = torch.randn(2, 40, 200, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(64, device="cuda", dtype=torch.bfloat16)
    inputs = [memory[0, :rows, start : start + 64] for rows in (1, 3, 40) for start in (0, 8, 9)]
    upstream = [torch.randn_like(x) for x in inputs]

    def run(x, dy):
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = rms_norm(*leaves, 1e-6, implementation="triton")
        return [y, *torch.autograd.grad(y, leaves, dy)]

    expected = []
    for x, dy in zip(inputs, upstream, strict=True):
        kept_launches.forget()
        expected.append(run(x, dy))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            found = [run(x, dy) for x, dy in zip(inputs, upstream, strict=True)]
        stream.synchronize()
        for theirs, ours in zip(expected, found, strict=True):
            assert all(map(torch.equal, theirs, ours))


def test_a_deferred_loss_takes_a_part_of_the_memory():
    peaks = {}
    for kernels in ("off", "on"):
        torch.cuda.empty_cache()
        head = nn.Linear(256, 32_000, bias=False, device="cuda", dtype=torch.bfloat16)
        hidden = torch.randn(16, 1024, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(32_000, (16 * 1024,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logits = head(hidden) if kernels == "off" else defer(hidden, head.weight, None)
        loss = nn.functional.cross_entropy(logits.float().view(-1, 32_000), labels)
        loss.backward()
        peaks[kernels] = torch.cuda.max_memory_allocated() - before
        del head, hidden, labels, logits, loss
    assert peaks["on"] < peaks["off"] / 4, peaks
