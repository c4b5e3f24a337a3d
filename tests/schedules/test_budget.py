"""`budget_schedule`: the best set that fits, costs as counted, importance as torch has it."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cli_calls import broken_off
from peft import LoraConfig, get_peft_model
from proofs import frozen_by_hand, gradients
from ranks import run_ranks
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import (
    FixedBlockSchedule,
    FreezePlan,
    budget,
    budget_schedule,
    measure_contribution,
    patch_model,
    plan_training,
    schedule_from_file,
)
from progtuning_kernels.budget import step_costs
from progtuning_kernels.budget.importance import signal_to_noise
from progtuning_kernels.budget.knapsack import StepCosts, choose_units
from progtuning_kernels.cli.app import main
from progtuning_kernels.freezing.freezer import StageState
from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots
from progtuning_kernels.planner.calibration import UnitCosts

ROWS, TOKENS = 3, 11
_KNOWN: dict[tuple[bool, ...], StepCosts] = {}
SHAPE = dict(batch_size=ROWS, seq_len=TOKENS)


def _costs(draw: random.Random, num_blocks: int, *, small: bool) -> StepCosts:
    """Of blocks that differ; `small`: of few values, so that many sets are alike."""

    def number() -> Fraction:
        return Fraction(draw.randint(1, 3)) if small else Fraction(draw.random())

    blocks = [i for i in range(num_blocks) if draw.random() < 0.9]
    below = list(itertools.accumulate(number() for _ in range(num_blocks + 2)))
    base = {(i, True): 2 + below[num_blocks - i] for i in (EMBEDDINGS, *blocks, num_blocks)}
    saved = min(number(), Fraction(2))
    base |= {(i, False): cost - saved for (i, _), cost in base.items() if i < num_blocks}
    added = {i: number() for i in blocks}
    return StepCosts(base, added, base[EMBEDDINGS, True] + sum(added.values()))


def _every_plan(costs: StepCosts, num_blocks: int):
    flags = [(False, True) if (i, True) in costs.base else (False,) for i in range(num_blocks)]
    for embeddings, *trainable, head in itertools.product((0, 1), *flags, (0, 1)):
        if embeddings or head or any(trainable):
            yield FreezePlan(tuple(trainable), embeddings=bool(embeddings), head=bool(head))


def _worth(plan: FreezePlan, importance: list[Fraction]) -> Fraction:
    flags = (plan.embeddings, *plan.trainable, plan.head)
    return sum((w for w, on in zip(importance, flags, strict=True) if on), Fraction(0))


@pytest.mark.parametrize("small", [False, True])
def test_the_chosen_set_is_the_best_of_all_sets(small):
    draw = random.Random(small)
    for _ in range(25):
        num_blocks = draw.randint(1, 6)
        costs = _costs(draw, num_blocks, small=small)
        importance = [
            Fraction(draw.randint(0, 3)) if small else Fraction(draw.random())
            for _ in range(num_blocks + 2)
        ]
        plans = list(_every_plan(costs, num_blocks))
        before = Fraction(-1)
        for rho in (0.05, 0.3, 0.45, 0.6, 0.7, 0.85, 1.0):
            limit = Fraction(rho) * costs.full
            ways = dict(embeddings=(True, False), head=draw.choice([(True,), (True, False)]))
            found = choose_units(costs, importance, limit, **ways)
            fitting = [p for p in plans if costs.of(p) <= limit and p.head in ways["head"]]
            if found is None:
                assert not fitting
                continue
            assert costs.of(found) <= limit
            best = max((_worth(p, importance), -costs.of(p), p.trainable[::-1]) for p in fitting)
            assert (_worth(found, importance), -costs.of(found), found.trainable[::-1]) == best
            if ways["head"] == (True, False):  # more budget is never worth less
                assert best[0] >= before
                before = best[0]


def test_blocks_that_are_alike_are_taken_from_the_top():
    base = {(0, True): Fraction(8), (5, True): Fraction(1)}
    costs = StepCosts(base, dict.fromkeys(range(1, 5), Fraction(1)), Fraction(12))
    for more, blocks in ((1, (0, 4)), (2, (0, 3, 4)), (4, (0, 1, 2, 3, 4))):
        found = choose_units(
            costs, [Fraction(w) for w in (0, 9, 1, 1, 1, 1, 0)], Fraction(8 + more)
        )
        assert found == FreezePlan(tuple(i in blocks for i in range(5)))


def test_many_blocks_take_no_time():
    """A set is kept for each number of blocks where they cost the same, of 2^80 sets in all."""
    base = {(i, True): Fraction(100 - i) for i in range(-1, 81)}
    costs = StepCosts(base, dict.fromkeys(range(80), Fraction(1, 3)), base[-1, True] + 80)
    importance = [Fraction(random.Random(i).random()) for i in range(82)]
    found = choose_units(costs, importance, costs.full * Fraction(3, 5))
    assert found is not None and costs.of(found) <= costs.full * Fraction(3, 5)


# an encoder, a decoder with tied weights, two stacks, adapters; nothing frozen, and something
@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("bert-sequence", None),
        ("gpt2-causal-lm", None),
        ("llama-causal-lm", "model.layers.2"),
        ("t5-seq2seq-lm", None),
    ],
)
def test_costs_of_any_plan_are_those_that_the_meter_counts(name, frozen):
    model = tiny_model(name, dropout=False)
    if frozen is not None:
        model.get_submodule(frozen).requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
    found = []
    compose = step_costs.compose

    def noted(measure, everything, kinds, head):
        found.append((measure, everything, compose(measure, everything, kinds, head)))
        return found[-1][-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_costs, "compose", noted)
        budget_schedule(model, 1.0, importance=[1.0] * 4, head="chosen", **SHAPE)
    ((measure, everything, costs),) = found
    assert costs.full == measure(everything) == costs.of(everything)
    plans = [p for p in _every_plan(costs, 4) if not p.embeddings or everything.embeddings]
    for plan in random.Random(0).sample(plans, 3):
        # a decoder whose blocks below are frozen needs less: the budget holds all the more
        more = 1.1 if name.startswith("t5") and not plan.embeddings else 1
        assert measure(plan) <= costs.of(plan) <= more * measure(plan), plan
    assert frozen is None or not (everything.trainable[2] or everything.embeddings)


def _gradient_worth(model, batches, tied: str = "frozen") -> list[float]:
    """By plain torch in float64, a parameter at a time."""
    twin, layout = copy.deepcopy(model).double().eval(), find_layout(model)
    worth = [0.0] * (layout.num_blocks + 2)
    for batch in batches:
        twin.zero_grad()
        twin(**batch).loss.backward()
        for slot in parameter_slots(twin, layout):
            if slot.parameter.grad is not None:
                both = slot.units == (EMBEDDINGS, layout.head) and tied == "head_only"
                unit = layout.head if both else slot.units[0]
                worth[unit + 1] += (slot.parameter.grad * slot.parameter).abs().sum().item()
    return worth


def _measured(monkeypatch, model, **options) -> list[float]:
    """The importance that `budget_schedule` finds."""
    seen = []
    monkeypatch.setattr(
        "progtuning_kernels.budget.choose_units",
        lambda _, numbers, *__, **___: (
            seen.append([*map(float, numbers)]) or FreezePlan((True,) * 4)
        ),
    )
    budget_schedule(model, 0.9, **options)
    return seen[0]


@pytest.mark.parametrize("tied", ["frozen", "head_only"])
def test_gradient_importance_is_torch_s(monkeypatch, tied):
    for name in ("bert-sequence", "gpt2-causal-lm"):
        model = tiny_model(name, dropout=True).train()
        batches = [tiny_inputs(name, seed=seed) for seed in range(2)]
        model.get_submodule(find_layout(model).block_paths[1]).requires_grad_(False)
        flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
        found = _measured(monkeypatch, model, batches=batches, tied=tied)
        assert found == pytest.approx(_gradient_worth(model, batches, tied), rel=1e-4)
        assert found[2] == 0
        assert model.training and flags == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)


def test_contribution_and_given_numbers(monkeypatch):
    model, batches = tiny_model("bert-sequence"), [tiny_inputs("bert-sequence")]
    expected = measure_contribution(model, batches).weights
    found = _measured(monkeypatch, model, batches=batches, importance="contribution")
    assert found == [0, *expected, 0]
    assert _measured(monkeypatch, model, importance=[1, 2, 3, 4], **SHAPE) == [0, 1, 2, 3, 4, 0]
    given = torch.arange(6) / 4  # of any library
    assert _measured(monkeypatch, model, importance=given, **SHAPE) == given.tolist()


def test_signal_to_noise_finds_what_was_put_in():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((300, 300), (500, 80), (40, 400)):
        noise = 0.3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        ratio, largest = signal_to_noise(noise.float())
        values = torch.linalg.svdvals(noise)
        assert ratio < 0.03 and largest == pytest.approx(values[0].item(), rel=1e-5)
        left = torch.linalg.qr(torch.randn(rows, 3, generator=generator, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(columns, 3, generator=generator, dtype=torch.float64))[
            0
        ]
        edge = 0.3 * (math.sqrt(rows) + math.sqrt(columns))
        spiked = noise + 3 * edge * left @ right.T
        values = torch.linalg.svdvals(spiked)
        signal, rest = values[values > 1.05 * edge].sum(), values[values <= 1.05 * edge].sum()
        assert (values > 1.05 * edge).sum() == 3
        assert signal_to_noise(spiked)[0] == pytest.approx((signal / rest).item(), rel=1e-6)
    assert signal_to_noise(torch.zeros(4, 6)) == (0.0, 0.0)
    assert math.isfinite(signal_to_noise(torch.ones(9, 9))[0])


def test_snr_importance_ranks_the_block_with_signal_first(monkeypatch):
    model = tiny_model("bert-sequence")
    layout = find_layout(model)
    with torch.no_grad():
        for i, path in enumerate(layout.block_paths):
            for p in model.get_submodule(path).parameters():
                if p.ndim == 2:
                    p[range(2 * i), range(2 * i)] += 2.0  # so many singular values
    found = _measured(monkeypatch, model, importance="snr", **SHAPE)
    assert found[1] < found[2] < found[3] and sum(found[1:5]) == pytest.approx(4)
    # as a user finds it: what a block is worth does not depend on the scale of a kind
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for path in layout.block_paths:
            twin.get_submodule(path).output.dense.weight.mul_(8)
    assert _measured(monkeypatch, twin, importance="snr", **SHAPE)[1:5] == pytest.approx(found[1:5])
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["query"], r=2))
    batches = [tiny_inputs("bert-sequence")]
    with pytest.raises(ValueError, match='have none by gradient yet: take "snr"'):
        budget_schedule(adapted, 0.8, batches=batches)
    of_adapted = _measured(monkeypatch, adapted, importance="snr", batches=batches)
    assert of_adapted[1:5] == pytest.approx(found[1:5])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="PeftModel does not take input_ids: give batches"):
        budget_schedule(adapted, 1.0, importance="snr", **SHAPE)
    plan = budget_schedule(adapted, 1.0, importance="snr", batches=batches).plan(0, 4)
    assert plan.trainable[1:] == (True,) * 3 and not plan.embeddings  # which have no adapter


@pytest.fixture
def counted_once(monkeypatch):
    """The costs of one model and shape, which most tests of a choice share."""
    measure, known = budget.measure_step_costs, _KNOWN

    def measure_once(*model, head, **options):
        if head not in known:
            known[head] = measure(*model, head=head, **options)
        return known[head]

    monkeypatch.setattr(budget, "measure_step_costs", measure_once)


@pytest.mark.usefixtures("counted_once")
def test_the_schedule_is_a_plain_one(tmp_path):
    model = tiny_model("bert-sequence")
    options = dict(importance=[9, 1, 1, 9, 1, 1], **SHAPE)
    schedule = budget_schedule(model, 0.85, **options)
    assert schedule.total_steps is None and schedule.bind(7).total_steps == 7
    assert repr(schedule) == repr(budget_schedule(model, 0.85, 60, **options))
    assert pickle.loads(pickle.dumps(schedule)).plan(3, 4) == schedule.plan(3, 4)
    content = {"schedule": "fixed", "blocks": schedule.blocks, "head": schedule.head}
    (tmp_path / "chosen.json").write_text(json.dumps(content))
    assert repr(schedule_from_file(tmp_path / "chosen.json")) == repr(schedule)
    several = budget_schedule(model, [0.9, 0.7, 0.5], 10, head="chosen", **options)
    assert list(several.milestones) == [0, 3, 6] and several.plan(6, 4) != several.plan(5, 4)
    for step, rho in ((0, 0.9), (3, 0.7), (6, 0.5)):
        alone = budget_schedule(model, rho, head="chosen", **options)
        assert several.plan(step, 4) == alone.plan(0, 4)
    planned = plan_training(model, schedule, steps=1, device="cpu", **SHAPE)
    assert planned.stages[0].step_ratio <= 0.85


@pytest.mark.usefixtures("counted_once", "padded")
def test_it_trains_as_plain_freezing_does_and_resumes():
    inputs = tiny_inputs("bert-sequence")
    schedule = budget_schedule(tiny_model("bert-sequence"), [0.95, 0.6], 4, batches=[inputs])
    handle = patch_model(tiny_model("bert-sequence", dropout=False), schedule, kernels="off")
    for step in range(4):
        twin = tiny_model("bert-sequence", dropout=False)
        expected = frozen_by_hand(twin, handle.plan, inputs)
        found = gradients(handle.model, inputs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        handle.advance()
        if step == 1:
            state = handle.state_dict()
            again = patch_model(tiny_model("bert-sequence", dropout=False), schedule)
            again.load_state_dict(state)
            assert again.plan == handle.plan and again.step == 2


def test_calibrated_costs_are_those_of_the_units(monkeypatch):
    units = UnitCosts(
        embeddings=4,
        embeddings_frozen=1,
        block=9,
        block_lowest=7,
        block_frozen=3,
        block_between=6,
        head=2,
        update=0,
    )
    monkeypatch.setattr(step_costs, "measure_units", lambda *_, **__: units)
    model = tiny_model("bert-sequence")
    options = dict(calibrate=True, **SHAPE)
    # a full step takes 42, the head alone 15, block 3 alone 19, block 2 alone 22, both 25
    chosen = {15: "", 18.9: "", 19: "3", 22: "2", 25: "1", 28: "1-2", 31: "1-3", 42: "0-3"}
    for seconds, blocks in chosen.items():
        found = budget_schedule(
            model, seconds / 42 + 1e-9 * (seconds < 42), importance=[1, 20, 10, 5], **options
        )
        assert found.blocks == blocks, seconds
    tied, active = replace(units, head_alone=1.0), frozenset({3, 4})
    without, whole = StageState(3, active, 0), StageState(0, active | {EMBEDDINGS}, 0)
    assert tied.step_s(without, 4) == units.step_s(without, 4) - 1
    assert tied.step_s(whole, 4) == units.step_s(whole, 4)
    with pytest.raises(ValueError, match="head with its weight gradients"):
        budget_schedule(model, 0.5, importance=[1] * 4, head="chosen", **options)


def test_calibration_needs_one_stack():
    with pytest.raises(ValueError, match="leave calibrate=True out"):
        budget_schedule(
            tiny_model("t5-seq2seq-lm"), 0.5, importance=[1] * 4, calibrate=True, **SHAPE
        )


@pytest.mark.usefixtures("counted_once")
def test_what_cannot_be_is_refused_with_a_cure_that_works():
    model = tiny_model("bert-sequence")
    ones = dict(importance=[1] * 4, **SHAPE)
    with pytest.raises(ValueError, match="less than the cheapest step") as refused:
        budget_schedule(model, 0.01, **ones)
    smallest = float(str(refused.value).partition("rho=")[2].split("rho=")[1].split()[0])
    assert budget_schedule(model, smallest, **ones).blocks == ""
    for rho in (0, -1, 1.5, math.nan, [], [0.5, 2]):
        with pytest.raises(ValueError, match="rho"):
            budget_schedule(model, rho, **ones)
    with pytest.raises(TypeError, match="rho must be"):
        budget_schedule(model, "half", **ones)
    for changed, message in (
        (dict(importance="gradient"), "needs batches"),
        (dict(importance=[1, 2]), "2 numbers of importance: give 4"),
        (dict(importance=[0] * 4), "not all 0"),
        (dict(importance=[1, 1, 1, math.inf]), "must be finite"),
        (dict(batch_size=2.5), "batch_size must be"),
        (dict(embeddings="sometimes"), "must be one of 'chosen'"),
        (dict(importance="magnitude"), "importance must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            budget_schedule(model, 0.5, **ones | changed)
    inputs = tiny_inputs("bert-sequence")
    for batches, message in (
        (inputs, "batches must be several"),
        ([{k: v for k, v in inputs.items() if k != "labels"}], "give labels in the batches"),
    ):
        with pytest.raises(TypeError, match=message):
            budget_schedule(model, 0.7, batches=batches)
    by_signal = budget_schedule(model, 0.7, importance="snr")
    assert budget_schedule(model, 0.7).blocks == by_signal.blocks
    array = torch.arange(1, 5).numpy()
    assert budget_schedule(model, 0.7, **ones | dict(importance=array)).blocks == "2-3"
    with pytest.raises(ValueError, match="give total_steps"):
        budget_schedule(model, [0.6, 0.5], **ones)
    with patch_model(model, FixedBlockSchedule("")), pytest.raises(ValueError, match="is patched"):
        budget_schedule(model, 0.5, **ones)


def test_new_adapters_do_not_leave_the_head_alone():
    model = get_peft_model(
        tiny_model("bert-sequence"), LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    )
    batches = [tiny_inputs("bert-sequence")]
    with pytest.raises(ValueError, match='new adapters, .* take "snr"'):
        budget_schedule(model, 0.8, batches=batches)
    assert budget_schedule(model, 0.8, batches=batches, importance="snr").blocks
    with pytest.raises(ValueError, match="every parameter is frozen"):
        budget_schedule(model.requires_grad_(False), 0.8, batches=batches)


def _on_rank(rank: int, folder: str) -> None:
    model = tiny_model("bert-sequence")
    own = [[9, 1, 1, 1], [1, 1, 1, 9]][rank]
    schedule = budget_schedule(model, 0.7, importance=own, **SHAPE)
    with open(f"{folder}/{rank}", "w") as file:
        file.write(repr(schedule))
    with pytest.raises(ValueError, match="cheapest step"):
        budget_schedule(model, 0.01, importance=own, **SHAPE)


def test_ranks_take_what_the_first_one_chooses(tmp_path):
    run_ranks(_on_rank, str(tmp_path))
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first == second
    alone = budget_schedule(tiny_model("bert-sequence"), 0.7, importance=[9, 1, 1, 1], **SHAPE)
    assert first == repr(alone)


def test_command_line_chooses_trains_and_resumes(model_folders, text_files, tmp_path, capsys):
    def call(name, *extra):
        files = ["--train-file", text_files[0], "--validation-file", text_files[1]]
        sizes = ["--batch-size", 8, "--max-length", 16, "--max-steps", 6, "--checkpoint-every", 3]
        where = ["--model", model_folders["bert"], "--output", tmp_path / name]
        options = ["train", *files, *where, *sizes, "--schedule", "budget", "--rho", 0.7, *extra]
        main([str(option) for option in options])

    call("run", "--dry-run")
    planned = " ".join(capsys.readouterr().out.split())
    with broken_off(4):
        call("run")
    before = (tmp_path / "run" / "schedule.json").read_text()
    call("run", "--resume")
    assert (tmp_path / "run" / "schedule.json").read_text() == before
    chosen = schedule_from_file(tmp_path / "run" / "schedule.json").plan(0, 4)
    assert f"# 1 6 {chosen.units_in_words()} " in planned
    (stage,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["stages"]
    assert tuple(stage["trainable"]) == chosen.trainable and stage["last_step"] == 6
    capsys.readouterr()
    plan = ["plan", "--model", str(model_folders["bert"]), "--schedule", "budget"]
    plan += ["--max-length", "16"]
    main([*plan, "--max-steps", "6", "--rho", "0.7", "--importance", "snr"])
    (ratio,) = re.findall(r"^1 .*head .* ([0-9.]+)$", capsys.readouterr().out, re.MULTILINE)[:1]
    assert 0 < float(ratio) <= 0.7
    for extra, message in (
        (("--rho", "0.7"), "take --importance snr, or progtuning train --dry-run"),
        ((), "--schedule budget and --rho need each other: --schedule budget --rho 0.5"),
        (("--rho", "0.01", "--importance", "snr"), "pass rho="),
    ):
        with pytest.raises(SystemExit):
            main([*plan, *extra])
        assert message in capsys.readouterr().err
