"""Schedules: pure functions of the step; every property is checked on generated settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progtuning_kernels import FreezePlan, MilestoneSchedule, ProgressiveSchedule
from progtuning_kernels.schedules import Schedule


@st.composite
def _settings(draw: st.DrawFn) -> tuple[int, int, int]:
    num_blocks = draw(st.integers(1, 48))
    stages = draw(st.integers(1, num_blocks))
    total_steps = draw(st.integers(stages, 500))
    return num_blocks, stages, total_steps


@given(_settings(), st.sampled_from(["first_stage", "always", "never"]))
def test_progressive_covers_every_stage_and_only_ever_freezes(settings, embeddings):
    num_blocks, stages, total_steps = settings
    schedule = ProgressiveSchedule(stages, total_steps, embeddings=embeddings)
    plans = [schedule.plan(step, num_blocks) for step in range(total_steps)]
    seen = [schedule.stage(step) for step in range(total_steps)]
    assert sorted(set(seen)) == list(range(stages)) and seen == sorted(seen)
    lengths = [seen.count(stage) for stage in range(stages)]
    assert max(lengths) - min(lengths) <= 1
    for before, after in zip(plans, plans[1:], strict=False):
        assert all(b or not a for b, a in zip(before.trainable, after.trainable, strict=True))
    assert all(plan.trainable[-1] and plan.head for plan in plans)
    expected = {"always": total_steps, "never": 0, "first_stage": lengths[0]}[embeddings]
    assert sum(plan.embeddings for plan in plans) == expected
    assert schedule.plan(total_steps + 7, num_blocks) == plans[-1]


@given(_settings())
def test_parts_are_equal_and_the_top_part_takes_the_rest(settings):
    num_blocks, stages, total_steps = settings
    cuts = ProgressiveSchedule(stages, total_steps).boundaries(num_blocks)
    parts = [b - a for a, b in zip(cuts, [*cuts[1:], num_blocks], strict=True)]
    assert parts[:-1] == [num_blocks // stages] * (stages - 1)
    assert sum(parts) == num_blocks and parts[-1] >= num_blocks // stages


@given(_settings(), st.data())
def test_weighted_parts_are_never_empty_and_as_even_as_one_cut_allows(settings, data):
    num_blocks, stages, total_steps = settings
    weight = st.floats(0.01, 100)
    weights = data.draw(st.lists(weight, min_size=num_blocks, max_size=num_blocks))
    cuts = ProgressiveSchedule(stages, total_steps, weights=weights).boundaries(num_blocks)
    assert cuts[0] == 0 and list(cuts) == sorted(set(cuts)) and cuts[-1] < num_blocks
    if stages == 2:
        gaps = [abs(2 * sum(weights[:cut]) - sum(weights)) for cut in range(1, num_blocks)]
        best = abs(2 * sum(weights[: cuts[1]]) - sum(weights))
        assert best <= min(gaps) * (1 + 1e-9) + 1e-9


@given(st.dictionaries(st.integers(0, 60), st.integers(0, 12), max_size=6), st.integers(0, 80))
def test_milestones_hold_from_their_step_on(milestones, step):
    plan = MilestoneSchedule(milestones, embeddings="never").plan(step, 12)
    passed = [s for s in milestones if s <= step]
    assert plan.boundary == (milestones[max(passed)] if passed else 0)


@given(st.lists(st.booleans(), min_size=1, max_size=12).map(tuple), st.booleans())
def test_boundary_is_the_lowest_trainable_unit(trainable, embeddings):
    plan = FreezePlan(trainable, embeddings=embeddings)
    if embeddings:
        assert plan.boundary == 0
    else:
        assert not any(trainable[: plan.boundary])
        assert plan.boundary == len(trainable) or trainable[plan.boundary]


def test_paper_arithmetic_of_bert_base():
    # 12 blocks of 7,087,872 parameters, embeddings 23,837,184, three stages: 25.9 % fewer updates
    # with the embeddings in every stage, 40 % in the first only, 48 % never (of all parameters)
    blocks, embeddings, head = 7_087_872, 23_837_184, 590_592 + 1_538
    full = 12 * blocks + embeddings + head
    saved = {}
    for policy in ("always", "first_stage", "never"):
        schedule = ProgressiveSchedule(3, 3, embeddings=policy)
        plans = [schedule.plan(step, 12) for step in range(3)]
        updates = sum(sum(p.trainable) * blocks + p.embeddings * embeddings + head for p in plans)
        saved[policy] = round(1 - updates / (3 * full), 3)
    assert saved == {"always": 0.259, "first_stage": 0.404, "never": 0.477}


def test_embeddings_train_in_the_first_milestone_stage_only_under_boundary_0():
    assert MilestoneSchedule({5: 2}).plan(4, 6).embeddings
    assert not MilestoneSchedule({5: 2}).plan(5, 6).embeddings
    assert not MilestoneSchedule({0: 2}).plan(0, 6).embeddings
    assert not MilestoneSchedule({5: 2, 9: 0}).plan(9, 6).embeddings


def test_unbound_schedule_plans_its_first_step_and_refuses_the_second():
    schedule = ProgressiveSchedule(3)
    assert schedule.plan(0, 6).boundary == 0
    with pytest.raises(ValueError, match="bind"):
        schedule.plan(1, 6)
    assert schedule.bind(9).plan(8, 6).boundary == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProgressiveSchedule(0), "stages must be 1 or more"),
        (lambda: ProgressiveSchedule(3, 2), "fewer than stages"),
        (lambda: ProgressiveSchedule(7, 70).plan(0, 6), "more than the 6 blocks"),
        (lambda: ProgressiveSchedule(2, 9, weights=[1, 2]).plan(0, 6), "2 weights for a model of"),
        (lambda: ProgressiveSchedule(2, 9, weights=[1, -2]), "positive"),
        (lambda: ProgressiveSchedule(2, 9, embeddings="sometimes"), "embeddings must be one of"),
        (lambda: ProgressiveSchedule(2, 9).plan(-1, 6), "0 or more"),
        (lambda: MilestoneSchedule({3: 7}).plan(0, 6), "above the 6 blocks"),
        (lambda: MilestoneSchedule({-3: 1}), "negative"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_fulfil_the_protocol_and_need_the_standard_library_only():
    assert isinstance(ProgressiveSchedule(2), Schedule)
    assert isinstance(MilestoneSchedule({}), Schedule)
    from progtuning_kernels import schedules

    code = (
        "import runpy, sys; before = set(sys.modules); "
        f"runpy.run_path({schedules.__file__!r}); "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "sys.exit(str(new - set(sys.stdlib_module_names)) if new - set(sys.stdlib_module_names) "
        "else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
