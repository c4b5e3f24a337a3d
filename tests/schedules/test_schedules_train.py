"""Schedules beyond the paper on real models: gradients, state, moments, decisions, rates."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from cli_calls import broken_off
from proofs import FixedPlan, frozen_by_hand, gradients, saved_bytes
from ranks import run_ranks
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from trainers import STEPS, Recorder, trainer_of, weights_of
from transformers import TrainerCallback

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    FreezePlan,
    MaskedAdamW,
    PatchHandle,
    ProgressiveSchedule,
    RandomBlockSchedule,
    annealed_lr,
    patch_model,
    release_frozen_state,
)
from progtuning_kernels.cli.app import main
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots
from progtuning_kernels.optim import state_bytes
from progtuning_kernels.patch import handle_of
from progtuning_kernels.schedules import Schedule

SCHEDULES: dict[str, Schedule] = {
    "lisa": RandomBlockSchedule(2, 2, seed=1),
    "random, no embeddings": RandomBlockSchedule(1, 2, seed=1, embeddings="never"),
    "badam": CyclicBlockSchedule(1, 2),
    "badam, head too": CyclicBlockSchedule(1, 2, order="descending", head="never"),
    "random cycles of three and one": CyclicBlockSchedule(3, 2, order="random", seed=5),
    "two groups in turn": CyclicBlockSchedule(2, 2),
    "from the bottom, then from the top": FixedBlockSchedule(
        {0: "embeddings,0-1", 3: "0,2", 6: "-1,head", 9: "-2--1,head"}, head="never"
    ),
    "adaptive": AdaptiveSchedule(2, percentile=80),
    "weighted": ProgressiveSchedule(3, 12, weights=[1, 1, 1, 9]),
    "a stage per block": ProgressiveSchedule(4, 12),
}
IN_TURN = ["lisa", "random, no embeddings", "badam", "badam, head too"]


def _schedule(name: str) -> Schedule:
    return copy.deepcopy(SCHEDULES[name])


def _start(
    model_name: str, schedule: Schedule, *, by_unit: bool = False, **options
) -> tuple[PatchHandle, MaskedAdamW]:
    handle = patch_model(tiny_model(model_name), schedule, kernels="off")
    options = {"lr": 3e-3, "weight_decay": 0.1, "max_grad_norm": 1.0} | options
    return handle, MaskedAdamW(handle.param_groups(by_unit=by_unit), **options)


def _step(handle: PatchHandle, optimizer: torch.optim.Optimizer, inputs: dict) -> float:
    loss = handle.model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    handle.advance()
    return loss.item()


def _block_norms(model: nn.Module, found: dict[str, torch.Tensor]) -> list[float]:
    """By the names of gradients, in float64."""
    squares = [0.0] * 4
    for i, path in enumerate(find_layout(model).block_paths):
        squares[i] = sum(
            g.double().square().sum().item() for n, g in found.items() if n.startswith(path + ".")
        )
    return [math.sqrt(square) for square in squares]


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("model_name", ["bert-sequence", "llama-causal-lm"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_plan_trains_as_plain_freezing_does(name, model_name):
    handle, optimizer = _start(model_name, _schedule(name))
    model, met = handle.model, []
    for step in range(12):
        inputs = tiny_inputs(model_name, seed=step)
        twin = tiny_model(model_name)
        twin.load_state_dict(model.state_dict())
        expected = frozen_by_hand(twin, handle.plan, inputs)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        found = gradients(model, inputs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        if handle.plan not in met:
            met.append(handle.plan)
            handle.truncation_report().assert_truncated()
            if not handle.plan.embeddings:
                assert handle.boundary == handle.plan.boundary
        optimizer.step()
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n]) == (n not in expected), n
        optimizer.zero_grad()
        groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
        handle.advance()
        assert groups == [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert len(met) > 1, "the run has to meet several plans"
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, every)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("model_name", ["bert-sequence", "llama-causal-lm"])
def test_frozen_blocks_inside_the_suffix_save_less_and_have_no_gradient(model_name):
    inputs = tiny_inputs(model_name)
    saved, units = {}, {}
    for flags in ((1, 1, 1, 1), (1, 0, 1, 0), (0, 1, 0, 1)):
        plan = FreezePlan(tuple(map(bool, flags)))
        handle = patch_model(tiny_model(model_name), FixedPlan(plan), kernels="off")
        twin = tiny_model(model_name)
        frozen_by_hand(twin, plan, inputs)
        gradients(handle.model, inputs)
        for block, on in zip(handle.layout.block_paths, flags, strict=True):
            grads = [p.grad for p in handle.model.get_submodule(block).parameters()]
            assert all((g is not None) == on for g in grads)
        saved[flags] = saved_bytes(lambda h=handle: h.model(**inputs))
        assert saved[flags] <= saved_bytes(lambda m=twin: m(**inputs))
        units[flags] = [unit.saved_bytes for unit in handle.truncation_report().units[1:-1]]
    assert saved[1, 1, 1, 1] > saved[1, 0, 1, 0] > saved[0, 1, 0, 1]
    full, alternating, _ = units.values()
    # each linear layer of a frozen block keeps its weight only: (B*T, C) inputs are not saved
    tokens = inputs["input_ids"].numel()
    for i in (1, 3):
        assert full[i] - alternating[i] >= 3 * tokens * 32 * 4
    for i in (0, 2):
        assert full[i] == alternating[i]
    assert units[0, 1, 0, 1][0] == 0


@pytest.mark.parametrize("name", IN_TURN)
def test_state_stays_flat_over_ten_switches(name):
    sizes: dict[str, list[int]] = {}
    for on_freeze in ("release", "keep"):
        handle, optimizer = _start("bert-sequence", _schedule(name), on_freeze=on_freeze)
        sizes[on_freeze] = []
        for step in range(22):
            active = [p for p in handle.model.parameters() if p.requires_grad]
            handle.model(**tiny_inputs("bert-sequence", seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected = sum(8 * p.numel() + 4 for p in active)
            sizes[on_freeze].append(state_bytes(optimizer))
            assert on_freeze == "keep" or sizes[on_freeze][-1] == expected
            assert all(p.grad is None for p in handle.model.parameters())
            handle.advance()
    assert len(set(sizes["release"])) == 1
    # what published implementations do, and what shows that the blocks really switch
    assert sizes["keep"][-1] > sizes["keep"][0] == sizes["release"][0]


def test_torch_optimizers_stay_flat_when_told():
    handle, _ = _start("bert-sequence", _schedule("lisa"))
    optimizer = torch.optim.AdamW(handle.param_groups(lr=1e-3))
    handle.on_change(lambda handle: release_frozen_state(optimizer))
    sizes = set()
    for step in range(22):
        handle.model(**tiny_inputs("bert-sequence", seed=step)).loss.backward()
        optimizer.step()
        sizes.add(state_bytes(optimizer))
        optimizer.zero_grad()
        handle.advance()
    assert len(sizes) == 1


@pytest.mark.parametrize("on_freeze", ["release", "keep", "offload"])
def test_a_thawed_block_gets_its_moments_as_it_was_asked(on_freeze):
    handle, optimizer = _start("bert-sequence", CyclicBlockSchedule(1, 2), on_freeze=on_freeze)
    weight = handle.model.bert.encoder.layer[0].output.dense.weight
    head = handle.model.classifier.weight
    for step in range(2):
        _step(handle, optimizer, tiny_inputs("bert-sequence", seed=step))
    before = {k: v.clone() for k, v in optimizer.state.get(weight, {}).items()}
    for step in range(2, 8):
        assert not weight.requires_grad
        _step(handle, optimizer, tiny_inputs("bert-sequence", seed=step))
    assert weight.requires_grad and optimizer.state[head]["step"] == 8
    if on_freeze == "release":
        assert not before and not optimizer.state.get(weight)
    else:
        assert before["step"] == 2 and before["exp_avg"].abs().max() > 0
        after = optimizer.state[weight]
        assert all(torch.equal(after[key], value) for key, value in before.items())
    gradient = gradients(handle.model, tiny_inputs("bert-sequence", seed=8))
    optimizer.max_grad_norm = None
    optimizer.step()
    state = optimizer.state[weight]
    name = "bert.encoder.layer.0.output.dense.weight"
    old = before.get("exp_avg", torch.zeros(()))
    assert state["step"] == (1 if on_freeze == "release" else 3)
    torch.testing.assert_close(state["exp_avg"], 0.9 * old + 0.1 * gradient[name])


def _run(
    schedule: AdaptiveSchedule,
    steps: int,
    *,
    save_at: int | None = None,
    state: bytes | None = None,
) -> tuple[PatchHandle, list[float], bytes | None]:
    """Train, from a saved state if one is given; returns losses and the state of `save_at`."""
    handle, optimizer = _start("bert-sequence", schedule)
    if state is not None:
        loaded = torch.load(io.BytesIO(state), weights_only=True)
        handle.model.load_state_dict(loaded["model"])
        handle.load_state_dict(loaded["handle"])
        optimizer.load_state_dict(loaded["optimizer"])
    losses, saved = [], None
    while handle.step < steps:
        inputs = tiny_inputs("bert-sequence", seed=handle.step)
        losses.append(_step(handle, optimizer, inputs))
        if handle.step == save_at:
            file = io.BytesIO()
            parts = {"model": handle.model, "handle": handle, "optimizer": optimizer}
            torch.save({key: part.state_dict() for key, part in parts.items()}, file)
            saved = file.getvalue()
    return handle, losses, saved


# interval 5, window 3: before a window, in its middle, at decisions that do and do not freeze
@pytest.mark.parametrize("save_at", [1, 4, 5, 9, 10, 13, 15, 18])
def test_adaptive_decisions_resume_bit_for_bit(save_at):
    def schedule():
        return AdaptiveSchedule(5, percentile=80, window=3)

    straight, losses, saved = _run(schedule(), 24, save_at=save_at)
    assert len(set(straight.schedule.decisions.values())) > 1, "nothing was ever frozen"
    resumed, rest, _ = _run(schedule(), 24, state=saved)
    assert rest == losses[save_at:]
    assert resumed.schedule.state_dict() == straight.schedule.state_dict()
    expected = straight.model.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in resumed.model.state_dict().items())
    other = AdaptiveSchedule(5, percentile=70, window=3)
    with pytest.raises(ValueError, match="saved under AdaptiveSchedule"):
        _run(other, 24, state=saved)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_observed_norms_are_those_of_the_whole_gradients(in_backward, micro_batches):
    schedule = AdaptiveSchedule(2, window=2)
    handle, optimizer = _start(
        "bert-sequence", schedule, in_backward=in_backward, max_grad_norm=None
    )
    expected: list[list[float]] = []
    for step in range(4):
        seeds = range(step * micro_batches, (step + 1) * micro_batches)
        twin = tiny_model("bert-sequence")
        twin.load_state_dict(handle.model.state_dict())
        for n, p in twin.named_parameters():
            p.requires_grad_(handle.model.get_parameter(n).requires_grad)
        for seed in seeds:
            twin(**tiny_inputs("bert-sequence", seed=seed)).loss.backward()
        grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        expected.append(_block_norms(twin, grads))
        for seed in seeds:
            loss = handle.model(**tiny_inputs("bert-sequence", seed=seed)).loss
            if seed < seeds[-1]:
                with optimizer.accumulate():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    for i, (step, norms, _) in enumerate(schedule.state_dict()["decisions"]):
        pairs = zip(*expected[2 * i : 2 * i + 2], strict=True)
        assert step == 2 * i + 1
        assert norms == pytest.approx([math.sqrt((a * a + b * b) / 2) for a, b in pairs], rel=1e-5)


def test_a_step_with_a_bad_gradient_does_not_count():
    schedules = [AdaptiveSchedule(4, window=w) for w in (4, 4, 1)]
    for schedule, bad in zip(schedules, ((), (1,), (3,)), strict=True):
        handle, optimizer = _start("bert-sequence", schedule, lr=0.0, weight_decay=0.0)
        for step in range(8):
            loss = handle.model(**tiny_inputs("bert-sequence", seed=step)).loss
            (loss * (float("inf") if step in bad else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        assert optimizer.skipped_steps == len(bad)
    clean, without_one, without_any = (s.state_dict()["decisions"] for s in schedules)
    assert [step for step, *_ in clean] == [step for step, *_ in without_one] == [3, 7]
    assert clean[0][1] != without_one[0][1] and clean[1][1] == without_one[1][1]
    assert [step for step, *_ in without_any] == [7]


def test_norms_that_cannot_be_had_are_an_error():
    handle, _ = _start("bert-sequence", AdaptiveSchedule(2))
    handle.advance()
    with pytest.raises(RuntimeError, match="no gradient of any block was seen in the steps up to"):
        handle.advance()
    model = tiny_model("bert-sequence")
    early = MaskedAdamW(model.named_parameters(), in_backward=True)
    handle = patch_model(model, AdaptiveSchedule(1), kernels="off")
    with pytest.raises(RuntimeError, match="build it after patch_model"):
        _step(handle, early, tiny_inputs("bert-sequence"))
    early.zero_grad()
    del early
    without_names = MaskedAdamW(model.parameters(), in_backward=True)  # knows no blocks
    with pytest.raises(RuntimeError, match="give it handle.param_groups"):
        _step(handle, without_names, tiny_inputs("bert-sequence"))
    without_names.zero_grad()
    handle.unpatch()
    assert not any(p._post_accumulate_grad_hooks for p in tiny_model("bert-sequence").parameters())


def test_hooks_are_there_for_adaptive_schedules_only_and_go_with_the_patch():
    def hooked(model: nn.Module) -> int:
        return sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters())

    model = tiny_model("bert-sequence")
    with patch_model(model, RandomBlockSchedule(2, 2)):
        assert hooked(model) == 0
    with patch_model(model, AdaptiveSchedule(2)) as handle:
        blocks = list(model.bert.encoder.layer.parameters())
        assert hooked(model) == len(blocks)
        twin = copy.deepcopy(model)
        assert hooked(twin) == 0
        handle.schedule.load_state_dict({"decisions": [[1, [1.0] * 4, 3]]})
        handle.seek(2)
        assert hooked(model) == len(blocks) // 4
    assert hooked(model) == 0


def _decide(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    schedule = AdaptiveSchedule(3, percentile=80)
    handle = patch_model(tiny_model("bert-sequence"), schedule, kernels="off")
    optimizer = MaskedAdamW(handle.param_groups(lr=3e-3))
    for step in range(15):
        handle.model(**tiny_inputs("bert-sequence", seed=100 * rank + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    Path(folder, f"{rank}.json").write_text(json.dumps(schedule.state_dict()))


def test_ranks_with_other_gradients_decide_alike(tmp_path):
    run_ranks(_decide, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first["decisions"]) == 5
    assert first["decisions"][-1][2] > 0


class _Plans(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[FreezePlan] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(handle_of(model).plan)


class _SaveAt(TrainerCallback):
    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("masked", [False, True])
def test_trainer_trains_and_resumes_under_every_schedule(tmp_path, name, masked):
    optimizer = (MaskedAdamW, {"lr": 1e-2}) if masked else None
    given = SCHEDULES[name]
    runs = {}
    for saved_at in (0, 4, 5):  # where plans of two steps change, and in between
        callback, recorder, plans = ProgtuningCallback(given), Recorder(), _Plans()
        callbacks = [callback, recorder, plans, *([] if saved_at else [_SaveAt(4, 5)])]
        trainer = trainer_of(tmp_path, callbacks=callbacks, optimizer=optimizer)
        checkpoint = str(tmp_path / f"checkpoint-{saved_at}")
        trainer.train(resume_from_checkpoint=checkpoint if saved_at else None)
        runs[saved_at] = (trainer, plans, callback)
        if not saved_at and name in IN_TURN:
            assert len({step.state_bytes for step in recorder.steps}) == 1
        assert callback.schedule is not given
    straight, plans, callback = runs.pop(0)
    assert len(plans.seen) == STEPS
    if name != "adaptive":
        assert plans.seen == [callback.schedule.plan(step, 4) for step in range(STEPS)]
    expected = weights_of(straight)
    for saved_at, (resumed, later, its_callback) in runs.items():
        assert plans.seen[saved_at:] == later.seen
        assert all(torch.equal(w, expected[n]) for n, w in weights_of(resumed).items())
        if name == "adaptive":
            assert its_callback.schedule.state_dict() == callback.schedule.state_dict()
    if name == "adaptive":
        assert len(set(callback.schedule.decisions.values())) > 1
        assert given.state_dict() == {"decisions": []}
        straight.train()  # once more: from nothing
        assert min(callback.schedule.decisions) == 1


def test_every_unit_anneals_at_its_own_rate():
    steps, lr = 12, 1e-2
    schedule = ProgressiveSchedule(4, steps)
    handle, optimizer = _start("bert-sequence", schedule, by_unit=True, lr=lr, weight_decay=0.0)

    def warm_up(step: int) -> float:
        return min(1.0, (step + 1) / 2)

    factors = annealed_lr(schedule, optimizer.param_groups, handle.num_blocks, base=warm_up)
    scheduler = LambdaLR(optimizer, factors)
    ends = [3, 3, 6, 9, 12, 12]  # embeddings, four blocks, head
    unit_of = {}
    for slot in parameter_slots(handle.model, handle.layout):
        unit_of[slot.name] = slot.units[0]
    for step in range(steps):
        scales = [(1 + math.cos(math.pi * min(1, step / end))) / 2 for end in ends]
        before = {n: p.detach().clone() for n, p in handle.model.named_parameters()}
        for group in optimizer.param_groups:
            assert {unit_of[name] for name in group["param_names"]} == {group["unit"]}
            assert group["lr"] == pytest.approx(lr * warm_up(step) * scales[group["unit"] + 1])
        handle.model(**tiny_inputs("bert-sequence", seed=step)).loss.backward()
        optimizer.step()
        if step == 0:  # Adam's first update is lr times the gradient's sign
            for n, p in handle.model.named_parameters():
                moved = (p.detach() - before[n]).abs().max().item()
                assert p.ndim < 2 or moved == pytest.approx(lr / 2, rel=0.02), n
        if step == 2:  # the last step of embeddings and block 0, at a quarter of the full rate
            assert scales[0] == scales[1] == pytest.approx((1 + math.cos(math.pi * 2 / 3)) / 2)
        optimizer.zero_grad()
        handle.advance()
        scheduler.step()
    assert [scales[0], scales[1], scales[2]] == [0.0] * 3 and scales[-1] > 0


def test_annealed_rates_under_the_trainer(tmp_path):
    schedule = ProgressiveSchedule(4, STEPS)
    recorder = Recorder()
    trainer = trainer_of(tmp_path, callbacks=[ProgtuningCallback(schedule), recorder])
    with patch_model(trainer.model, schedule) as handle:
        trainer.optimizer = MaskedAdamW(handle.param_groups(lr=1e-2, by_unit=True))
        factors = annealed_lr(schedule, trainer.optimizer.param_groups, handle.num_blocks)
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, factors)
    trainer.train()
    assert [step.boundary for step in recorder.steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    rates = {group["unit"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert not any(rates.values()) and list(rates) == [-1, 0, 1, 2, 3, 4]
    name = "bert.encoder.layer.3.output.dense.weight"
    moved = [
        (b.weights[name] - a.weights[name]).abs().max()
        for a, b in zip(recorder.steps, recorder.steps[1:], strict=False)
    ]
    assert moved[-1] < 0.25 * moved[0]  # 0.11; at a constant rate Adam moves alike in every step


def test_annealed_rates_work_inside_backward_and_resume():
    def start():
        schedule, options = ProgressiveSchedule(4, 12), {"in_backward": True, "max_grad_norm": None}
        handle, optimizer = _start("bert-sequence", schedule, by_unit=True, **options)
        factors = annealed_lr(schedule, optimizer.param_groups, handle.num_blocks, scaled=True)
        return handle, optimizer, LambdaLR(optimizer, factors)

    def train(handle, optimizer, scheduler, until):
        while handle.step < until:
            _step(handle, optimizer, tiny_inputs("bert-sequence", seed=handle.step))
            scheduler.step()

    straight, half, again = start(), start(), start()
    train(*straight, 12)
    train(*half, 5)
    again[0].model.load_state_dict(half[0].model.state_dict())
    for fresh, saved in zip(again, half, strict=True):
        fresh.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(*again, 12)
    expected = straight[0].model.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in again[0].model.state_dict().items())


def test_groups_by_unit_hold_shared_parameters_where_they_freeze():
    for tied, unit in (("frozen", EMBEDDINGS), ("head_only", 4)):
        handle = patch_model(tiny_model("gpt2-causal-lm"), ProgressiveSchedule(2, 4), tied=tied)
        groups = handle.param_groups(lr=1e-3, weight_decay=0.1, by_unit=True)
        homes = {n: g["unit"] for g in groups for n in g["param_names"]}
        assert homes["transformer.wte.weight"] == unit
        assert homes["transformer.h.2.attn.c_attn.bias"] == 2
        assert {g["weight_decay"] for g in groups} == {0.0, 0.1}
        assert sum(p.numel() for g in groups for p in g["params"]) == sum(
            p.numel() for p in handle.model.parameters()
        )
    with pytest.raises(ValueError, match="by_unit=True"):
        annealed_lr(ProgressiveSchedule(2, 4), handle.param_groups(), 4)


def _call(model_folders, text_files, output, *extra) -> list[str]:
    files = ["--train-file", text_files[0], "--validation-file", text_files[1]]
    sizes = ["--batch-size", 8, "--max-length", 16, "--lr", 3e-3]
    common = ["train", *files, "--model", model_folders["bert"], "--output", output, *sizes]
    return [str(x) for x in (*common, *extra)]


_CLI_FILES = {
    "random": '{"schedule": "random", "blocks": 2, "period": 3, "embeddings": "never"}',
    "cyclic": '{"schedule": "cyclic", "blocks": 1, "period": 2, "order": "random"}',
    "adaptive": '{"schedule": "adaptive", "interval": 3, "percentile": 80}',
    "annealed": '{"schedule": "progressive", "stages": 3}',
    "plateau": '{"schedule": "plateau", "stages": 2, "patience": 2, "min_delta": 100}',
}


@pytest.mark.parametrize("kind", _CLI_FILES)
def test_command_line_trains_and_resumes_under_a_file(kind, model_folders, text_files, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(_CLI_FILES[kind])
    common = ["--schedule", path, "--max-steps", 12, "--checkpoint-every", 7]
    common += ["--anneal"] if kind == "annealed" else []
    if kind == "plateau":
        common += ["--eval-strategy", "steps", "--eval-steps", 3, "--only", "layer|classifier"]
    main(_call(model_folders, text_files, tmp_path / "straight", *common))
    with broken_off(9):
        main(_call(model_folders, text_files, tmp_path / "run", *common))
    main(_call(model_folders, text_files, tmp_path / "run", *common, "--resume"))
    straight, run = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("straight", "run")
    )
    assert [s["loss"] for s in straight["steps"]] == [s["loss"] for s in run["steps"]]
    assert [s["trainable"] for s in straight["stages"]] == [s["trainable"] for s in run["stages"]]
    assert [s["stage"] for s in run["stages"]] == list(range(len(run["stages"])))
    assert run["evaluations"][-1]["step"] == 12
    if kind == "random":
        assert [sum(s["trainable"]) for s in run["stages"]] == [2] * 4
    if kind == "plateau":  # the third evaluation is the second without a better score
        assert [s["first_step"] for s in run["stages"]] == [1, 10]
        assert [s["boundary"] for s in run["stages"]] == [0, 2]
        assert run["stages"][0]["last_step"] == 9 and run["steps"][-1]["stage"] == 1
    if kind == "annealed":
        rates = [s["lr"] for s in run["steps"]]
        assert rates[0] == 0 and rates[1:] == sorted(rates[1:], reverse=True)
        assert rates[6] == pytest.approx(3e-3 / 2)


def test_command_line_names_and_errors(model_folders, text_files, tmp_path, capsys):
    def call(*extra):
        return _call(model_folders, text_files, tmp_path / "run", *extra)

    main(call("--schedule", "random", "--max-steps", 41, "--dry-run"))
    stages = re.findall(r"# \d +(\d+)  embeddings, block", capsys.readouterr().out)
    assert stages == ["20", "20", "1"]
    main(call("--schedule", "0,-1", "--max-steps", 9, "--dry-run", "--only", "output"))
    out = " ".join(capsys.readouterr().out.split())
    assert "blocks 0, 3" in out and "only='output': freezes" in out
    main(call("--schedule", "adaptive", "--max-steps", 9, "--dry-run"))
    assert "decided in training" in " ".join(capsys.readouterr().out.split())
    bad = tmp_path / "bad.json"
    bad.write_text('{"schedule": "random", "blocks": 9, "period": 3}')
    thaws = tmp_path / "thaws.json"
    thaws.write_text('{"schedule": "cyclic", "blocks": 1, "period": 3}')
    for extra, message in (
        (
            ("--schedule", "lisa"),
            "--schedule is progressive, random, cyclic, adaptive, plateau, budget, a set of blocks",
        ),
        (("--schedule", tmp_path / "none.toml"), "No such file"),
        (("--schedule", bad), "blocks=9 is more than the 4 blocks"),
        (("--schedule", thaws, "--anneal"), "thaws at step 3"),
        (("--schedule", "plateau"), "ends its stages by evaluations: --eval-strategy epoch"),
        (("--only", "mlp"), "only='mlp' matches no parameter"),
        (("--method", "full", "--only", "layer"), "--only is for the progressive methods"),
        (("--method", "full", "--anneal"), "--anneal is for the progressive methods"),
        (("--method", "full", "--schedule", "0"), "--schedule is for the progressive methods"),
        (("--schedule", "cyclic", "--stages", 4), "are for the progressive schedule"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(call(*extra, "--max-steps", 9))
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and message in line


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_the_example_file_is_a_schedule(model_folders, text_files, tmp_path, capsys):
    example = os.path.join(os.path.dirname(__file__), "..", "..", "examples", "random_blocks.toml")
    options = ("--schedule", example, "--max-steps", 30, "--dry-run")
    main(_call(model_folders, text_files, tmp_path / "run", *options))
    assert re.search(r"# 1 +20 ", capsys.readouterr().out)
