"""Blocks that the plan trains and no optimizer updates are told so."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import (
    CyclicBlockSchedule,
    MaskedAdamW,
    ProgressiveSchedule,
    patch_model,
)
from progtuning_kernels.freezing.missed_updates import some_values

_EVERYTHING = ProgressiveSchedule(1)


def _told(schedule, make, *, steps=40, before=None, step=None) -> list[str]:
    """The warnings about updates in a run of which `make(model)` makes the optimizer."""
    model, inputs = tiny_model("bert-sequence"), tiny_inputs("bert-sequence")
    with patch_model(model, schedule) as handle, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make(model)
        if before is not None:
            before(model)
        for number in range(steps):
            model(**inputs).loss.backward()
            (optimizer.step if step is None else partial(step, optimizer, number))()
            optimizer.zero_grad()
            handle.advance()
    return [text for w in caught if "have changed nothing" in (text := str(w.message))]


def _of_all(kind, **options):
    return lambda model: kind(model.parameters(), lr=1e-5, **options)


def _of_what_trains_now(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("period", [5, 20])
def test_blocks_that_train_later_than_the_optimizer_was_made_are_named_once(period):
    (message,) = _told(CyclicBlockSchedule(1, period), _of_what_trains_now, steps=90)
    assert message.startswith("block 1 should train, and 16 steps have changed nothing in there")
    assert "make the optimizer of handle.param_groups()" in message


def test_an_optimizer_of_a_copy_is_told_so():
    def of_a_copy(model):
        return torch.optim.AdamW(copy.deepcopy(model).parameters())

    (message,) = _told(_EVERYTHING, of_a_copy)
    assert message.startswith("block 0 and 3 more should train")


def test_an_optimizer_of_weights_that_were_replaced_is_told_so():
    def replace(model):
        for module in model.modules():
            for name, parameter in [*module._parameters.items()]:
                if parameter is not None:
                    setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))

    assert len(_told(_EVERYTHING, _of_all(torch.optim.SGD), before=replace)) == 1


def test_steps_that_are_always_skipped_are_told():
    def make(model):
        bias = model.get_submodule("bert.encoder.layer.1.output.dense").bias
        bias.register_hook(lambda gradient: gradient * float("nan"))
        return MaskedAdamW(model.parameters(), max_grad_norm=1.0)

    assert len(_told(_EVERYTHING, make)) == 1


class _PastTheCounters(torch.optim.SGD):
    """Writes as DeepSpeed, Apex and bitsandbytes do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize(
    "make",
    [
        _of_all(torch.optim.AdamW, foreach=False),
        _of_all(torch.optim.AdamW, foreach=True),
        _of_all(torch.optim.AdamW, fused=True),
        _of_all(torch.optim.SGD),
        _of_all(MaskedAdamW),
        _of_all(_PastTheCounters),
    ],
)
@pytest.mark.parametrize(
    "schedule",
    [_EVERYTHING, ProgressiveSchedule(4, 40), CyclicBlockSchedule(4, 10)],
    ids=["everything", "progressive", "cyclic"],
)
def test_optimizers_of_all_parameters_are_not(schedule, make):
    assert not _told(schedule, make)


def test_steps_that_a_gradient_scaler_leaves_out_are_not():
    def step(optimizer, number):
        if number >= 10:
            optimizer.step()

    assert not _told(_EVERYTHING, _of_all(torch.optim.AdamW), step=step)


def test_a_handle_that_advances_without_training_is_not():
    with patch_model(tiny_model("bert-sequence"), _EVERYTHING) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(40):
                with torch.no_grad():
                    handle.model(**tiny_inputs("bert-sequence"))
                handle.advance()


def test_blocks_that_the_user_froze_are_not():
    def without_block_0(model):
        model.bert.encoder.layer[0].requires_grad_(False)
        return _of_what_trains_now(model)

    assert not _told(_EVERYTHING, without_block_0)


class _NoSlices(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.reshape, torch.Tensor.__getitem__):
            raise NotImplementedError
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    "tensor", [torch.empty(3, device="meta"), torch.ones(3).as_subclass(_NoSlices)]
)
def test_tensors_without_values_to_compare_are_left_alone(tensor):
    assert some_values(tensor) is None
