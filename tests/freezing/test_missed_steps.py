"""Loops that do not advance, and runs that end before their schedule, are told so."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
)


class _Told:
    """The warnings about missed steps that came inside."""

    def __enter__(self) -> list[str]:
        self._caught = warnings.catch_warnings(record=True)
        self._messages = self._caught.__enter__()
        warnings.simplefilter("always")
        self.about: list[str] = []
        return self.about

    def __exit__(self, *exc: object) -> None:
        self._caught.__exit__(*exc)
        self.about += [text for m in self._messages if "handle.advance" in (text := str(m.message))]


def _loop(schedule, step, *, optimizer=torch.optim.SGD, steps=8) -> list[str]:
    """What is told while `step(handle, backward, optimizer)` makes each of some steps."""
    handle = patch_model(tiny_model("bert-sequence"), schedule)
    inputs = tiny_inputs("bert-sequence")
    made = optimizer(handle.model.parameters(), lr=0.01)

    def backward():
        made.zero_grad()
        loss = handle.model(**inputs).loss
        loss.backward()
        return loss

    with handle, _Told() as told:
        for _ in range(steps):
            step(handle, backward, made)
    return told


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, MaskedAdamW])
@pytest.mark.parametrize(
    "schedule",
    [
        ProgressiveSchedule(4, 8),
        ProgressiveSchedule(4),
        MilestoneSchedule({100: 2}),
        RandomBlockSchedule(1, 5),
        AdaptiveSchedule(5),
    ],
    ids=repr,
)
def test_a_loop_without_advance_is_told_so_once(schedule, optimizer):
    def step(handle, backward, made):
        backward()
        made.step()

    (message,) = _loop(schedule, step, optimizer=optimizer)
    assert "still at step 0: call handle.advance() once per optimizer step" in message


def test_a_loop_without_advance_is_told_so_where_no_version_counter_is_written():
    def step(handle, backward, made):
        backward()
        made.step()

    fused = partial(torch.optim.AdamW, fused=True)
    (message,) = _loop(ProgressiveSchedule(4, 100), step, optimizer=fused, steps=80)
    assert "still at step 0" in message


def test_a_loop_that_seeks_a_step_that_stands_still_is_told_so():
    def step(handle, backward, made):
        backward()
        made.step()
        handle.seek(0)  # of a counter that counts another optimizer

    (message,) = _loop(ProgressiveSchedule(4, 8), step)
    assert "still at step 0" in message


def test_an_advance_once_in_a_while_is_no_advance_per_step():
    def step(handle, backward, made):
        for _ in range(4):
            backward()
            made.step()
        handle.advance()

    assert len(_loop(ProgressiveSchedule(4, 8), step)) == 1


def test_going_on_past_the_end_is_told_once():
    def step(handle, backward, made):
        for _ in range(2):  # per batch, where a step is two
            backward()
            handle.advance()
        made.step()

    (message,) = _loop(ProgressiveSchedule(4, 8), step)
    assert "past total_steps=8" in message and "handle.advance() once per optimizer" in message


def _accumulates(handle, backward, made):
    for _ in range(4):
        backward()
    made.step()
    handle.advance()


def _advances_first(handle, backward, made):
    backward()
    handle.advance()
    made.step()


def _looks_for_a_worse_place(handle, backward, made, *, batches=1):  # as SAM does
    for _ in range(batches):
        backward()
    with torch.no_grad():
        for p in handle.model.parameters():
            p.add_(0.01)
    for _ in range(batches):
        backward()
    with torch.no_grad():
        for p in handle.model.parameters():
            p.sub_(0.01)
    made.step()
    handle.advance()


def _runs_a_closure(handle, backward, made):
    made.step(backward)
    handle.advance()


def _evaluates(handle, backward, made):
    backward()
    made.step()
    handle.model.load_state_dict(handle.model.state_dict())
    with torch.no_grad():
        for _ in range(3):
            handle.model(**tiny_inputs("bert-sequence"))
    handle.advance()


@pytest.mark.parametrize(
    ("step", "optimizer"),
    [
        (_accumulates, torch.optim.SGD),
        (_accumulates, MaskedAdamW),
        (_advances_first, torch.optim.SGD),
        (_looks_for_a_worse_place, torch.optim.SGD),
        (partial(_looks_for_a_worse_place, batches=17), torch.optim.SGD),
        (_runs_a_closure, torch.optim.LBFGS),
        (_evaluates, torch.optim.AdamW),
    ],
)
def test_loops_that_advance_are_told_nothing(step, optimizer):
    assert _loop(ProgressiveSchedule(4, 8), step, optimizer=optimizer) == []


def test_one_plan_for_all_steps_needs_no_advance():
    def step(handle, backward, made):
        backward()
        made.step()

    assert _loop(MilestoneSchedule({0: 2}), step) == []


@pytest.mark.parametrize(
    ("schedule", "told"),
    [
        (CyclicBlockSchedule(1, 50), True),
        (MilestoneSchedule({0: 0, 1000: 3}), True),
        (MilestoneSchedule({0: 0, 17: 3}), False),
        (MilestoneSchedule({}), False),
        (ProgressiveSchedule(1), False),
        (ProgressiveSchedule(3), False),
        (AdaptiveSchedule(100), False),
    ],
)
def test_a_run_that_ends_before_its_schedule_changes_anything_is_told(schedule, told):
    schedule = copy.deepcopy(schedule).bind(18)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch_model(tiny_model("bert-sequence"), schedule).unpatch()
    assert [str(w.message) for w in caught if "within the 18 steps" in str(w.message)] == [
        f"{schedule!r} changes nothing within the 18 steps of the run: its first plan is in force "
        "to the end"
    ] * told
    assert not told or caught[0].filename == __file__
