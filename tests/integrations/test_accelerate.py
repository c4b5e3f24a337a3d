"""Accelerate in one process: either order of `prepare` and `patch_model`, checkpoints, compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from progtuning_kernels import (
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
)
from progtuning_kernels.optim import release_frozen_state, state_bytes

pytestmark = pytest.mark.usefixtures("no_accelerator_of_another_test")
NAME = "bert-sequence"
STEPS, WINDOW, CLIP = 8, 2, 0.05
BOUNDARIES = [0, 0, 1, 1, 2, 2, 3, 3]
_ACCELERATES_OWN = {"_is_accelerate_prepared", "forward"}  # left on a model that it has unwrapped


def _decay(step: int) -> float:
    return 1 - step / STEPS


def _torch_adamw(handle: PatchHandle) -> Optimizer:
    optimizer = AdamW(handle.param_groups(lr=1e-2, weight_decay=0.1))
    handle.on_change(lambda _: release_frozen_state(optimizer))
    return optimizer


def _masked_adamw(handle: PatchHandle) -> Optimizer:
    return MaskedAdamW(handle.param_groups(lr=1e-2, weight_decay=0.1))


OPTIMIZERS = {"torch": _torch_adamw, "masked": _masked_adamw}


def _windows(first: int) -> list[list[dict[str, torch.Tensor]]]:
    """Micro-batches of every optimizer step from `first` on."""
    return [
        [tiny_inputs(NAME, seed=WINDOW * step + i) for i in range(WINDOW)]
        for step in range(first, STEPS)
    ]


def _plain(make: Callable[[PatchHandle], Optimizer], *, bf16: bool) -> dict[str, torch.Tensor]:
    """The same run without Accelerate."""
    model = tiny_model(NAME)
    handle = patch_model(model, ProgressiveSchedule(4, STEPS))
    optimizer = make(handle)
    scheduler = LambdaLR(optimizer, _decay)
    for window in _windows(0):
        for batch in window:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            (loss / WINDOW).backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        handle.advance()
    handle.unpatch()
    return _weights(model)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass
class _Run:
    """One loop of Accelerate's documentation, patched before or after `prepare`."""

    order: str
    make: Callable[[PatchHandle], Optimizer] = _torch_adamw
    precision: str = "no"
    dynamo: TorchDynamoPlugin | None = None
    boundaries: list[int] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision=self.precision,
            gradient_accumulation_steps=WINDOW,
            dynamo_plugin=self.dynamo,
        )
        model, schedule = tiny_model(NAME), ProgressiveSchedule(4, STEPS)
        if self.order == "patch, prepare":
            self.handle = patch_model(model, schedule)
            model = self.accelerator.prepare(model)
        else:
            model = self.accelerator.prepare(model)
            self.handle = patch_model(model, schedule)
        self.model = model
        optimizer = self.make(self.handle)
        self.optimizer, self.scheduler = self.accelerator.prepare(
            optimizer, LambdaLR(optimizer, _decay)
        )
        self.accelerator.register_for_checkpointing(self.handle)

    def train(self, *, save_after: int | None = None, folder: Path | None = None) -> None:
        accelerator = self.accelerator
        for window in _windows(self.handle.step):
            self.boundaries.append(self.handle.boundary)
            for batch in window:
                with accelerator.accumulate(self.model):
                    accelerator.backward(self.model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
            self.state_bytes.append(state_bytes(self.optimizer))
            self.handle.advance()
            if self.handle.step == save_after:
                accelerator.save_state(folder)

    def finish(self) -> dict[str, torch.Tensor]:
        self.handle.unpatch()
        model = self.accelerator.unwrap_model(
            self.model, keep_fp32_wrapper=False, keep_torch_compile=False
        )
        fresh = tiny_model(NAME)
        assert model.__dict__.keys() - fresh.__dict__.keys() <= _ACCELERATES_OWN
        for (name, module), (_, found) in zip(
            model.named_modules(), fresh.named_modules(), strict=True
        ):
            assert type(module) is type(found), name
        return _weights(model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("order", ["patch, prepare", "prepare, patch"])
def test_either_order_trains_as_a_loop_without_accelerate(order, precision, optimizer):
    make = OPTIMIZERS[optimizer]
    run = _Run(order, make, precision)
    run.train()
    run.handle.truncation_report().assert_truncated()
    assert run.boundaries == BOUNDARIES
    sizes = run.state_bytes
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] == sizes[5] > sizes[6]
    head = run.model.classifier.weight
    assert run.optimizer.state[head]["step"] == STEPS  # none at the micro-batches in between
    expected = _plain(make, bf16=precision == "bf16")
    for name, weight in run.finish().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved_after", [3, 4, 5])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer, saved_after):
    straight = _Run("patch, prepare", OPTIMIZERS[optimizer])
    straight.train(save_after=saved_after, folder=tmp_path)
    resumed = _Run("patch, prepare", OPTIMIZERS[optimizer])
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.accelerator.load_state(tmp_path)
    assert resumed.handle.step == saved_after
    resumed.train()
    assert resumed.boundaries == BOUNDARIES[saved_after:]
    assert resumed.state_bytes == straight.state_bytes[saved_after:]
    expected = straight.finish()
    for name, weight in resumed.finish().items():
        assert torch.equal(weight, expected[name]), name


def _thawing(name: str, optimizer: str, folder: Path, *, resume: bool) -> dict[str, torch.Tensor]:
    """A loop under a schedule that thaws, saved after step 7 of 12 or gone on from there."""
    schedule = {
        "milestones": MilestoneSchedule({0: 4, 3: 3, 6: 1, 9: 0}),
        "lisa": RandomBlockSchedule(1, 5, seed=3),
        "badam": CyclicBlockSchedule(1, 5),
    }[name]
    accelerator = Accelerator(cpu=True)
    handle = patch_model(tiny_model(NAME), schedule)
    model, optimizer = accelerator.prepare(handle.model, OPTIMIZERS[optimizer](handle))
    accelerator.register_for_checkpointing(handle)
    if resume:
        accelerator.load_state(folder)  # the optimizer before the handle
        assert handle.step == 7
    for step in range(handle.step, 12):
        accelerator.backward(model(**tiny_inputs(NAME, seed=step)).loss)
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        if handle.step == 7:
            accelerator.save_state(folder)
    handle.unpatch()
    return _weights(handle.model)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["milestones", "lisa", "badam"])
def test_blocks_that_thaw_find_their_state_in_a_resumed_run(name, optimizer, tmp_path):
    straight = _thawing(name, optimizer, tmp_path, resume=False)
    for weight_name, weight in _thawing(name, optimizer, tmp_path, resume=True).items():
        assert torch.equal(weight, straight[weight_name]), weight_name


def _regional() -> TorchDynamoPlugin:
    return TorchDynamoPlugin(backend="eager", use_regional_compilation=True)


@pytest.mark.parametrize("order", ["patch, prepare", "prepare, patch"])
def test_blocks_compiled_one_by_one(order):
    torch._dynamo.reset()
    run = _Run(order, dynamo=_regional())
    # Accelerate hands out a copy whose blocks are compiled; either may be patched
    assert (run.model is run.handle.model) == (order == "prepare, patch")
    run.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert run.boundaries == BOUNDARIES
    run.handle.truncation_report().assert_truncated()
    expected = _plain(_torch_adamw, bf16=False)
    run.handle.unpatch()
    for name, weight in _weights(run.handle.model).items():
        plain = expected[name.replace("_orig_mod.", "")]
        # Adam takes gradients near 0 to steps of its own size: 1.03e-5 apart on AVX2 alone
        torch.testing.assert_close(weight, plain, rtol=1e-4, atol=3e-5)
