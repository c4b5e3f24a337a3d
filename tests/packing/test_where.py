"""Packed forwards where people train: the run is that of the padded model, and it did pack."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from proofs import enable_checkpointing
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, PatchHandle, patch_model

BERT, LLAMA, GPT2 = "bert-sequence", "llama-causal-lm", "gpt2-causal-lm"
# losses, and weights that every update makes differ by no more than a step of Adam's eps allows
CLOSE = dict(rtol=1e-5, atol=1e-5)


def batch(name: str, step: int) -> dict[str, Any]:
    """Three rows, of 11, 9 and 7 tokens, or cut to fewer columns at odd steps."""
    inputs = tiny_inputs(name, seed=step)
    if step % 2:
        inputs = {k: v[:, :10].contiguous() if v.ndim == 2 else v for k, v in inputs.items()}
    return inputs


def masked_adamw(handle: PatchHandle, **options: Any) -> torch.optim.Optimizer:
    return MaskedAdamW(handle.param_groups(), **{"lr": 1e-2, "eps": 1e-3, **options})


class Run:
    """Steps of one model under a schedule, boundaries 0, 2, 3."""

    def __init__(self, packing: str, model: nn.Module, **options: Any) -> None:
        self.model = model
        self.handle = patch_model(
            model, MilestoneSchedule({0: 0, 2: 2, 4: 3}), packing=packing, **options
        )
        self.losses: list[float] = []

    def train(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int = 6,
        around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        called: nn.Module | None = None,
        before: Callable[[nn.Module, int], None] = lambda model, step: None,
        make: Callable[[str, int], dict[str, Any]] = batch,
    ) -> Run:
        called = called or self.model
        for step in range(steps):
            before(called, step)
            with around():
                loss = called(**make(name, step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.handle.advance()
            self.losses.append(loss.item())
        return self

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    @property
    def packed(self) -> int:
        return self.handle.packing_report().batches


def compare(make: Callable[[str], Run], *, close: dict[str, float] = CLOSE, packed: int = 6) -> Run:
    """Both runs, which have to be the same; the packed one."""
    run, expected = make("on"), make("off")
    report = run.handle.packing_report()
    assert report.batches >= packed, report
    assert expected.packed == 0
    assert run.losses == pytest.approx(expected.losses, rel=close["rtol"], abs=close["atol"])
    found, weights = run.weights, expected.weights
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, **close, msg=lambda m, n=name: f"{n}: {m}")
    return run


@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("name", [BERT, LLAMA])
def test_adapters(name, patched_first):
    def make(packing: str) -> Run:
        model = tiny_model(name)
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        if patched_first:
            run = Run(packing, model)
            called = peft.get_peft_model(model, config)
        else:
            called = peft.get_peft_model(model, config)
            run = Run(packing, called)
        optimizer = MaskedAdamW(called.parameters(), lr=1e-2, eps=1e-3)
        return run.train(name, optimizer, called=called)

    compare(make)


@pytest.mark.filterwarnings("ignore:base_model.*came into the model while it was trained")
def test_adapters_are_switched_and_added():
    def turn(model: nn.Module, step: int) -> None:
        if step == 4:
            torch.manual_seed(9)
            model.add_adapter("third", peft.LoraConfig(target_modules=["up_proj"]))
        model.set_adapter(["default", "other", "default", "other", "third", "third"][step])
        if step == 3:
            with model.disable_adapter(), torch.no_grad():
                model(**batch(LLAMA, step), use_cache=False)

    def make(packing: str) -> Run:
        torch.manual_seed(3)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model(LLAMA), config)
        model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
        run = Run(packing, model)
        optimizer = MaskedAdamW(model.parameters(), lr=1e-2, eps=1e-3)
        return run.train(LLAMA, optimizer, before=turn)

    run = compare(make)
    assert run.packed == 7


def test_autocast():
    def around() -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16)

    def make(packing: str) -> Run:
        run = Run(packing, tiny_model(BERT))
        return run.train(BERT, masked_adamw(run.handle), around=around)

    # weights move by at most 6 steps of 1e-2; a gradient near zero may have either sign in bf16
    compare(make, close=dict(rtol=2e-2, atol=5e-3))


def test_the_protocol_of_a_gradient_scaler():
    def make(packing: str) -> Run:
        run = Run(packing, tiny_model(BERT))
        optimizer = masked_adamw(run.handle, max_grad_norm=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(6):
            loss = run.model(**batch(BERT, step)).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.handle.advance()
            run.losses.append(loss.item())
        return run

    compare(make)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [BERT, LLAMA, "t5-seq2seq-lm"])
@pytest.mark.filterwarnings("ignore:gradient checkpointing with use_reentrant=True")
def test_checkpointing(name, reentrant):
    def make(packing: str) -> Run:
        model = tiny_model(name)
        model.config.use_cache = False
        enable_checkpointing(model, use_reentrant=reentrant)
        run = Run(packing, model)
        return run.train(name, masked_adamw(run.handle))

    compare(make)


@pytest.mark.parametrize(
    "options", [{"in_backward": True}, {"state_dtype": "8bit"}, {"state_dtype": torch.bfloat16}]
)
def test_masked_adamw(options):
    def make(packing: str) -> Run:
        run = Run(packing, tiny_model(BERT))
        return run.train(BERT, masked_adamw(run.handle, **options))

    # moments of 8 and of 16 bits round a last bit of a gradient up or down by 1/256 of a step
    coarse = dict(rtol=1e-4, atol=1e-4)
    compare(make, close=CLOSE if "in_backward" in options else coarse)


def test_accumulation():
    def make(packing: str) -> Run:
        run = Run(packing, tiny_model(BERT))
        optimizer = masked_adamw(run.handle)
        for step in range(6):
            for micro in range(2):
                loss = run.model(**batch(BERT, 2 * step + micro)).loss / 2
                loss.backward()
                run.losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            run.handle.advance()
        return run

    compare(make, packed=12)


@pytest.mark.parametrize("tied", ["frozen", "head_only"])
@pytest.mark.parametrize("name", ["bert-masked-lm", GPT2])
def test_tied_weights(name, tied):
    def make(packing: str) -> Run:
        run = Run(packing, tiny_model(name), tied=tied)
        return run.train(name, masked_adamw(run.handle))

    compare(make)


def test_a_resumed_run_packs_and_refuses_as_the_first():
    for name in (BERT, "deberta-v2-conv-sequence"):
        first = Run("on", tiny_model(name))
        optimizer = masked_adamw(first.handle)
        first.train(name, optimizer, steps=3)
        states = first.handle.state_dict(), optimizer.state_dict(), first.weights
        saved = copy.deepcopy(states)
        first.train(name, optimizer, steps=2)
        run = Run("on", tiny_model(name))
        with torch.no_grad():
            for n, p in run.model.named_parameters():
                p.copy_(saved[2][n])
        run.handle.load_state_dict(saved[0])
        optimizer = masked_adamw(run.handle)
        optimizer.load_state_dict(saved[1])
        run.train(name, optimizer, steps=2)
        assert run.losses == first.losses[3:]
        assert all(torch.equal(w, first.weights[n]) for n, w in run.weights.items())
        assert run.handle.packing_report().stacks == first.handle.packing_report().stacks
        assert (run.packed == 2) == (name == BERT)


def test_what_a_saved_run_has_left_padded_stays_padded():
    saved = Run("on", tiny_model(BERT)).handle.state_dict()
    saved["padded"] = {"bert.encoder.layer": "another machine has found so"}
    run = Run("on", tiny_model(BERT))
    run.handle.load_state_dict(saved)
    run.train(BERT, masked_adamw(run.handle), steps=2)
    assert run.packed == 0
    assert "another machine has found so" in str(run.handle.packing_report())
