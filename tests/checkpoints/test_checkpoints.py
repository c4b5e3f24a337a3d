"""Checkpoints: a run goes on to the same bits."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from soak import differences
from torch import nn
from toy_runs import WIDTH, WORDS, Loop, Toy, masked_adamw, progressive, stopped

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    PrefixCache,
    RandomBlockSchedule,
    patch_model,
    release_frozen_state,
)
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.checkpoints import CheckpointError, load_checkpoint, save_checkpoint


def torch_adamw(handle: PatchHandle) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(handle.param_groups(lr=0.02, weight_decay=0.1))
    handle.on_change(lambda handle: release_frozen_state(optimizer))
    return optimizer


RUNS = {
    "progressive": (progressive, masked_adamw),
    "progressive, torch": (progressive, torch_adamw),
    # other units at step 0 than at the step that is loaded
    "random": (lambda: RandomBlockSchedule(2, 2, seed=1), masked_adamw),
    "random, bf16": (
        lambda: RandomBlockSchedule(2, 2, seed=1),
        lambda handle: masked_adamw(handle, state_dtype=torch.bfloat16),
    ),
    "cyclic, kept": (
        lambda: CyclicBlockSchedule(1, 3),
        lambda handle: masked_adamw(handle, on_freeze="keep"),
    ),
    "adaptive": (lambda: AdaptiveSchedule(3, percentile=60), masked_adamw),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("steps", [1, 4, 7, 9])
def test_a_run_goes_on_to_the_same_bits(name, steps, tmp_path):
    schedule, optimizer = RUNS[name]
    straight = Loop(schedule(), optimizer).seed().train(12)
    expected = straight.all()
    Loop(schedule(), optimizer).seed().train(steps).save(tmp_path)
    random.seed(99)  # as another process: torch's are those of a new model
    numpy.random.seed(99)
    resumed = Loop(schedule(), optimizer)
    resumed.load(tmp_path)
    assert resumed.handle.step == steps and len(resumed.losses) == steps
    assert differences(resumed.train(12 - steps).all(), expected) == []


def test_frozen_tensors_have_no_state_and_get_none(tmp_path):
    stopped(tmp_path, steps=7)
    saved = torch.load(tmp_path / "step-00000007.pt", weights_only=True)
    groups = Loop(progressive()).handle.param_groups()
    names = [name for group in groups for name in group["param_names"]]
    named = {names[i] for i in saved["state"]["optimizer"]["state"]}
    assert named and not any(n.startswith(("embeddings", "blocks.0", "blocks.1")) for n in named)
    resumed = Loop(progressive())
    resumed.load(tmp_path)
    parameters = dict(resumed.handle.model.named_parameters())
    assert {n for n, p in parameters.items() if p in resumed.optimizer.state} == named


def test_a_model_without_a_schedule(tmp_path):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Toy(dropout=0)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = build()
    for step in (1, 2):
        model(torch.arange(10)[None]).backward()
        optimizer.step()
        assert (
            save_checkpoint(tmp_path, model, optimizer, step=step).name == f"step-0000000{step}.pt"
        )
    other, others = build()
    assert load_checkpoint(tmp_path, other, others) == {}
    state = [(m.state_dict(), o.state_dict()) for m, o in ((model, optimizer), (other, others))]
    assert differences(*state) == []
    with pytest.raises(ValueError, match="needs step="):
        save_checkpoint(tmp_path, model, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, MaskedAdamW])
def test_weights_of_the_optimizer_that_the_model_does_not_hold(kind, tmp_path):
    def build(shape: tuple[int, ...] = (2,)):
        torch.manual_seed(0)
        handle = patch_model(Toy(dropout=0), progressive())
        scales = nn.Parameter(torch.zeros(shape))  # of two losses
        groups = handle.param_groups() + [{"params": [scales], "param_names": ["scales"]}]
        return handle, scales, kind(groups, lr=0.02)

    def train(run, steps: int):
        handle, scales, optimizer = run
        for _ in range(steps):
            loss = handle.model(torch.arange(20).view(4, 5).roll(handle.step))
            (loss * torch.exp(-scales) + scales).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        return run

    straight = train(build(), 8)
    begun = train(build(), 4)
    save_checkpoint(tmp_path, begun[0], begun[2])
    resumed = build()
    load_checkpoint(tmp_path, resumed[0], resumed[2])
    assert torch.equal(resumed[1], begun[1]) and begun[1].abs().min() > 0
    train(resumed, 4)
    states = [(m.model.state_dict(), s.detach(), o.state_dict()) for m, s, o in (resumed, straight)]
    assert differences(*states) == []
    other = build((1, 2))
    with pytest.raises(CheckpointError, match="from outside the model, .2. there"):
        load_checkpoint(tmp_path, other[0], other[2])
    assert not other[1].any()


class _Quantised(nn.Linear):
    """Writes its scale and a description beside its codes, and takes neither back, as the 4-bit
    layers of bitsandbytes do; the description has another length every time.
    """

    written = 0

    def __init__(self, width: int, seed: int) -> None:
        super().__init__(width, width)
        values = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
        self.scale = float(values.abs().max()) / 127
        self.weight = nn.Parameter((values / self.scale).to(torch.int8), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight * self.scale, self.bias)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _Quantised.written += 1
        destination[prefix + "weight.scale"] = torch.tensor([self.scale])
        destination[prefix + "weight.description"] = torch.zeros(_Quantised.written)


def _quantised(seed: int) -> tuple[PatchHandle, MaskedAdamW]:
    torch.manual_seed(0)
    model = Toy(dropout=0.0)
    for block in model.blocks:
        block.linear = _Quantised(WIDTH, seed)
    handle = patch_model(model, progressive())
    return handle, masked_adamw(handle)


def _steps(handle: PatchHandle, optimizer: MaskedAdamW, steps: int) -> list[float]:
    losses = []
    for step in range(handle.step, handle.step + steps):
        loss = handle.model(torch.arange(20).view(4, 5).roll(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        losses.append(loss.item())
    return losses


def test_keys_that_quantised_layers_write_for_themselves_are_not_in_the_way(tmp_path):
    handle, optimizer = _quantised(1)
    _steps(handle, optimizer, 5)
    save_checkpoint(tmp_path, handle, optimizer)
    expected = _steps(handle, optimizer, 4)
    handle, optimizer = _quantised(1)
    load_checkpoint(tmp_path, handle, optimizer)
    assert handle.model.blocks[0].linear.bias.any()  # what is trained is there
    assert _steps(handle, optimizer, 4) == expected


def test_weights_quantised_from_others_are_another_model(tmp_path):
    handle, optimizer = _quantised(1)
    _steps(handle, optimizer, 2)
    save_checkpoint(tmp_path, handle, optimizer)
    handle, optimizer = _quantised(2)
    before = {n: t.clone() for n, t in handle.model.state_dict().items() if "description" not in n}
    with pytest.raises(CheckpointError, match="blocks.0.linear.weight was quantised from other w"):
        load_checkpoint(tmp_path, handle, optimizer)
    now = {n: t for n, t in handle.model.state_dict().items() if "description" not in n}
    assert differences(now, before) == [] and handle.step == 0 and not optimizer.state


@pytest.fixture
def always_on(monkeypatch):
    """Toy blocks cost less than any cache."""
    monkeypatch.setattr(BreakEven, "verdict", lambda self, rows: None)


def cached(folder: Path | None, words: int = WORDS) -> tuple[PatchHandle, MaskedAdamW]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    cache = PrefixCache(1 << 20, device="cpu" if folder is None else "disk", path=folder)
    model = BertForSequenceClassification(config).train()
    handle = patch_model(model, MilestoneSchedule({1: 2}), cache=cache)
    return handle, MaskedAdamW(handle.param_groups(lr=0.1))


def cached_steps(handle: PatchHandle, optimizer: MaskedAdamW, steps: int) -> None:
    for _ in range(steps):
        rows = torch.arange(16).view(2, 8)
        handle.model(input_ids=rows, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()


def test_a_resumed_run_finds_the_rows_of_its_cache(tmp_path, always_on):
    handle, optimizer = cached(tmp_path / "cache")
    cached_steps(handle, optimizer, 4)  # step 1 trains all, step 2 stores two rows
    save_checkpoint(tmp_path / "saved", handle, optimizer)
    handle.unpatch()
    handle, optimizer = cached(tmp_path / "cache")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path / "saved", handle, optimizer) == {}
        cached_steps(handle, optimizer, 2)
    report = handle.cache_report()
    assert (report.hits, report.misses) == (4, 0) and report.served_steps == 1
    handle.unpatch()


def test_rows_that_a_resumed_run_cannot_reach_are_named(tmp_path, always_on):
    handle, optimizer = cached(tmp_path / "cache")
    cached_steps(handle, optimizer, 4)
    save_checkpoint(tmp_path / "saved", handle, optimizer)
    handle.unpatch()
    for folder, where in ((None, "in memory"), (tmp_path / "elsewhere", "elsewhere")):
        handle, optimizer = cached(folder)
        with pytest.warns(UserWarning, match=f"rows of the prefix cache are in .*{where}"):
            load_checkpoint(tmp_path / "saved", handle, optimizer)
        handle.unpatch()
    handle, optimizer = cached(tmp_path / "cache")
    load_checkpoint(tmp_path / "saved", handle, optimizer)
    handle.model.config.layer_norm_eps = 1e-3
    with pytest.warns(UserWarning, match="rows of another model, configuration or version"):
        cached_steps(handle, optimizer, 1)
    handle.unpatch()
