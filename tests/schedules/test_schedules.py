"""Schedules: pure functions of the step; every property is checked on generated settings."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    FreezePlan,
    MilestoneSchedule,
    ProgressiveSchedule,
    RandomBlockSchedule,
    annealed_lr,
    schedule_from_file,
)
from progtuning_kernels.schedules import (
    ObservingSchedule,
    Schedule,
    decides_by_gradients,
    stage_count,
    steps_to_check,
)
from progtuning_kernels.schedules.annealing import freezing_steps
from progtuning_kernels.schedules.blocks import _sample


@st.composite
def _settings(draw: st.DrawFn) -> tuple[int, int, int]:
    num_blocks = draw(st.integers(1, 48))
    stages = draw(st.integers(1, num_blocks))
    total_steps = draw(st.integers(stages, 500))
    return num_blocks, stages, total_steps


@given(_settings(), st.sampled_from(["first_stage", "always", "never"]))
def test_progressive_covers_every_stage_and_only_ever_freezes(run, embeddings):
    num_blocks, stages, total_steps = run
    schedule = ProgressiveSchedule(stages, total_steps, embeddings=embeddings)
    plans = [schedule.plan(step, num_blocks) for step in range(total_steps)]
    seen = [schedule.stage(step) for step in range(total_steps)]
    assert sorted(set(seen)) == list(range(stages)) and seen == sorted(seen)
    lengths = [seen.count(stage) for stage in range(stages)]
    assert max(lengths) - min(lengths) <= 1
    for before, after in itertools.pairwise(plans):
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


def test_weighted_cuts_lie_where_the_contribution_is_halved():
    def cuts(stages, weights):
        schedule = ProgressiveSchedule(stages, 60, weights=weights)
        return schedule.boundaries(len(weights))

    assert cuts(2, [1, 1, 1, 1, 1, 5]) == (0, 5)
    assert cuts(3, [0.1] * 6) == (0, 2, 4)
    assert cuts(2, [1, 1, 1]) == (0, 1)  # both places are as near: the lower one
    assert cuts(3, [0, 0, 0, 0, 9]) == (0, 1, 2)  # no part is empty
    assert cuts(3, [9, 0, 0, 0, 0]) == (0, 1, 2)
    assert cuts(2, [1e308, 1e308, 1e308, 1e308]) == (0, 2)  # whose sum is no float


@given(
    st.dictionaries(st.integers(0, 60), st.integers(-1, 12), max_size=6),
    st.sampled_from(["first_stage", "always", "never"]),
    st.integers(0, 80),
)
def test_milestones_hold_from_their_step_on(milestones, embeddings, step):
    if embeddings == "never" and -1 in milestones.values():
        with pytest.raises(ValueError, match="-1 trains the embeddings"):
            MilestoneSchedule(milestones, embeddings=embeddings)
        return
    schedule = MilestoneSchedule(milestones, embeddings=embeddings)
    plan = schedule.plan(step, 12)
    passed = [s for s in milestones if s <= step]
    boundary = milestones[max(passed)] if passed else 0
    assert plan.trainable == tuple(i >= boundary for i in range(12)) and plan.head
    first = embeddings == "first_stage" and boundary == 0 and not any(0 < s for s in passed)
    assert plan.embeddings == (boundary == -1 or embeddings == "always" or first)
    assert eval(repr(schedule)).plan(step, 12) == plan


def test_embeddings_can_thaw_last():
    schedule = MilestoneSchedule({0: 2, 10: 1, 20: 0, 30: -1})
    plans = [schedule.plan(step, 2) for step in range(0, 40, 10)]
    assert [sum(plan.trainable) for plan in plans] == [0, 1, 2, 2]
    assert [plan.embeddings for plan in plans] == [False, False, False, True]


@given(st.lists(st.booleans(), min_size=1, max_size=12).map(tuple), st.booleans())
def test_boundary_is_the_lowest_trainable_unit(trainable, embeddings):
    plan = FreezePlan(trainable, embeddings=embeddings)
    if embeddings:
        assert plan.boundary == 0
    else:
        assert not any(trainable[: plan.boundary])
        assert plan.boundary == len(trainable) or trainable[plan.boundary]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (FreezePlan((True, True, False, True), embeddings=True), "embeddings, blocks 0-1, 3, head"),
        (FreezePlan((False, True, True)), "blocks 1-2, head"),
        (FreezePlan((False, True), head=False), "blocks 1"),
        (FreezePlan((False, False)), "head"),
    ],
)
def test_units_in_words(plan, words):
    assert plan.units_in_words() == words


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
        (lambda: ProgressiveSchedule(2, 9, weights=[1, -2]), "none negative"),
        (lambda: ProgressiveSchedule(2, 9, weights=[0, 0]), "not all 0"),
        (lambda: ProgressiveSchedule(2, 9, weights=[1, float("nan")]), "finite"),
        (lambda: ProgressiveSchedule(2, 9, weights=[1, float("inf")]), "finite"),
        (lambda: ProgressiveSchedule(2.5, 9), "stages must be 1 or more, and whole"),
        (lambda: ProgressiveSchedule(2, 9, embeddings="sometimes"), "embeddings must be one of"),
        (lambda: RandomBlockSchedule(0, 5), "blocks must be 1 or more"),
        (lambda: RandomBlockSchedule(1, 0), "period must be 1 or more"),
        (lambda: RandomBlockSchedule(7, 5).plan(0, 6), "blocks=7 is more than the 6 blocks"),
        (lambda: RandomBlockSchedule(1, 5, seed=1.5), "seed must be whole"),
        (lambda: RandomBlockSchedule(1, 5, embeddings="first_stage"), "embeddings must be one of"),
        (lambda: CyclicBlockSchedule(1, 5, order="upwards"), "order must be one of"),
        (lambda: CyclicBlockSchedule(1, 5, head="sometimes"), "head must be one of"),
        (lambda: CyclicBlockSchedule(1, 5).plan(-1, 6), "0 or more"),
        (lambda: CyclicBlockSchedule(9, 5).plan(0, 6), "more than the 6 blocks"),
        (lambda: FixedBlockSchedule({4: "0"}), "must say what trains from step 0 on"),
        (lambda: FixedBlockSchedule("0..3"), "blocks must be like '0-3,8,-1'"),
        (lambda: FixedBlockSchedule("0,,1"), "blocks must be like"),
        (lambda: FixedBlockSchedule("1 0"), "blocks must be like"),
        (lambda: FixedBlockSchedule("1 -1"), "blocks must be like"),
        (lambda: FixedBlockSchedule("0-3", head="first"), "head must be one of"),
        (lambda: FixedBlockSchedule("0,6").plan(0, 6), "block 6 is none of the 6 blocks there are"),
        (lambda: FixedBlockSchedule([-7]).plan(0, 6), "block -7 is none of the 6 blocks"),
        (lambda: FixedBlockSchedule("-1-2").plan(0, 6), "write the lower one first"),
        (lambda: FixedBlockSchedule("1").plan(-1, 6), "0 or more"),
        (lambda: AdaptiveSchedule(0), "interval must be 1 or more"),
        (lambda: AdaptiveSchedule(5, window=6), "window=6 is more than interval=5"),
        (lambda: AdaptiveSchedule(5, percentile=101), "percentile must be 0 to 100"),
        (lambda: AdaptiveSchedule(5).observe(3, [1.0], 1), "no interval of 5 steps ends with"),
        (lambda: AdaptiveSchedule(5).observe(4, [1.0], 2), "expected 2 finite norms"),
        (lambda: annealed_lr(AdaptiveSchedule(5), [], 4), "does not know its freezing steps"),
        (lambda: annealed_lr(ProgressiveSchedule(2), [], 4), "length of the run"),
        (lambda: annealed_lr(MilestoneSchedule({2: 3, 4: 0}).bind(9), [], 4), "thaws"),
        (lambda: ProgressiveSchedule(2, 9).plan(-1, 6), "0 or more"),
        (lambda: MilestoneSchedule({3: 7}).plan(0, 6), "above the 6 blocks"),
        (lambda: MilestoneSchedule({-3: 1}), "milestone's step must be 0 or more"),
        (lambda: MilestoneSchedule({3: -2}), "boundary of milestone 3 must be -1 or more"),
        (lambda: MilestoneSchedule({3: 0.5}), "boundary of milestone 3 must be -1 or more, and"),
        (lambda: ProgressiveSchedule(2, 9.5), "total_steps must be 1 or more, and whole, got 9.5"),
        (lambda: ProgressiveSchedule(2, float("nan")), "total_steps must be 1 or more, and whole"),
        (lambda: ProgressiveSchedule(2, float("inf")), "total_steps must be 1 or more, and whole"),
        (lambda: ProgressiveSchedule(2, -9), "total_steps must be 1 or more"),
        (lambda: CyclicBlockSchedule(1, 5).bind(0), "total_steps must be 1 or more"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


_NUMBERS = {
    "stages": lambda n: ProgressiveSchedule(n, 8),
    "total_steps": lambda n: ProgressiveSchedule(2, n),
    "total_steps bound later": lambda n: ProgressiveSchedule(2).bind(n),
    "total_steps of milestones": lambda n: MilestoneSchedule({}).bind(n),
    "total_steps of random": lambda n: RandomBlockSchedule(1, 5).bind(n),
    "total_steps of cyclic": lambda n: CyclicBlockSchedule(1, 5).bind(n),
    "total_steps of adaptive": lambda n: AdaptiveSchedule(5).bind(n),
    "milestone's step": lambda n: MilestoneSchedule({n: 1}),
    "boundary of milestone": lambda n: MilestoneSchedule({1: n}),
    "blocks": lambda n: RandomBlockSchedule(n, 5),
    "period": lambda n: RandomBlockSchedule(1, n),
    "seed": lambda n: RandomBlockSchedule(1, 5, seed=n),
    "blocks of cyclic": lambda n: CyclicBlockSchedule(n, 5),
    "period of cyclic": lambda n: CyclicBlockSchedule(1, n),
    "seed of cyclic": lambda n: CyclicBlockSchedule(1, 5, seed=n),
    "total_steps of fixed": lambda n: FixedBlockSchedule("0").bind(n),
    "milestone's step of fixed": lambda n: FixedBlockSchedule({0: "0", n: "1"}),
    "interval": lambda n: AdaptiveSchedule(n),
    "window": lambda n: AdaptiveSchedule(5, window=n),
    "percentile": lambda n: AdaptiveSchedule(5, percentile=n),
    "weights": lambda n: ProgressiveSchedule(2, 8, weights=n),
}


@pytest.mark.parametrize("name", _NUMBERS)
def test_settings_are_numbers_of_any_library_and_nothing_else(name):
    make = _NUMBERS[name]
    for wrong in ("4", True, (4,), object()) if name != "weights" else ("ab", 4, True, [[4]]):
        with pytest.raises(TypeError, match=name.split(" of ")[0].removesuffix(" bound later")):
            make(wrong)
    if name == "weights":
        assert repr(make(np.ones(3, np.float32))) == repr(make([1, 1, 1]))
        return
    expected = make(4)
    for same in (4.0, np.int64(4), np.float32(4), np.float64(4), np.uint8(4)):
        made = make(same)
        assert repr(made) == repr(expected)
        assert "np." not in repr(made) and type(made.total_steps) is type(expected.total_steps)
        assert made.stage(3) == expected.stage(3) and made.plan(3, 4) == expected.plan(3, 4)


def test_schedules_are_asked_what_is_known_of_them_ahead():
    class Own:
        """Of a user: what `Schedule` asks for, and nothing else."""

        total_steps = 6

        def plan(self, step: int, num_blocks: int) -> FreezePlan:
            return FreezePlan.from_boundary(self.stage(step), num_blocks, embeddings=False)

        def stage(self, step: int) -> int:
            return step // 4

        def bind(self, total_steps: int) -> Own:
            return self

    assert not decides_by_gradients(Own()) and decides_by_gradients(AdaptiveSchedule(5))
    assert stage_count(Own(), 6) == 2 and stage_count(AdaptiveSchedule(5), 6) is None
    assert steps_to_check(Own()) == {0, 5}
    assert steps_to_check(MilestoneSchedule({3: 1, 7: 2})) == {0, 3, 7}
    assert steps_to_check(ProgressiveSchedule(2)) == {0}


def test_schedules_fulfil_the_protocol_and_need_the_standard_library_only():
    assert isinstance(ProgressiveSchedule(2), Schedule)
    assert isinstance(MilestoneSchedule({}), Schedule)
    for schedule in (RandomBlockSchedule(1, 5), CyclicBlockSchedule(1, 5), FixedBlockSchedule("")):
        assert isinstance(schedule, Schedule) and not isinstance(schedule, ObservingSchedule)
    assert isinstance(AdaptiveSchedule(5), Schedule)
    assert isinstance(AdaptiveSchedule(5), ObservingSchedule)
    from progtuning_kernels import schedules

    code = (
        "import sys; before = set(sys.modules); "
        f"sys.path.insert(0, {str(Path(schedules.__file__).parent.parent)!r}); import schedules; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - {'schedules'}; "
        "sys.exit(str(new - set(sys.stdlib_module_names)) if new - set(sys.stdlib_module_names) "
        "else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_POLICIES = st.sampled_from(["always", "never"])


@st.composite
def _in_turn(draw: st.DrawFn) -> tuple[Schedule, int]:
    """A random or a cyclic schedule, and a number of blocks that it fits."""
    num_blocks = draw(st.integers(1, 48))
    common = dict(
        blocks=draw(st.integers(1, num_blocks)),
        period=draw(st.integers(1, 40)),
        seed=draw(st.integers(-5, 2**70)),
        embeddings=draw(_POLICIES),
        head=draw(_POLICIES),
    )
    if draw(st.booleans()):
        return RandomBlockSchedule(**common), num_blocks
    order = draw(st.sampled_from(["ascending", "descending", "random"]))
    return CyclicBlockSchedule(**common, order=order), num_blocks


@given(_in_turn(), st.integers(1, 300), st.randoms(use_true_random=False))
def test_plans_in_turn_are_total_of_the_right_size_and_need_no_history(drawn, total_steps, shuffle):
    schedule, num_blocks = drawn
    schedule.bind(total_steps)
    plans = [schedule.plan(step, num_blocks) for step in range(total_steps)]
    cyclic = isinstance(schedule, CyclicBlockSchedule)
    for step, plan in enumerate(plans):
        assert schedule.stage(step) == step // schedule.period
        assert plan == plans[step - step % schedule.period]
        assert plan.embeddings == (schedule.embeddings == "always")
        assert plan.head == (schedule.head == "always")
        last = cyclic and (step // schedule.period + 1) % -(-num_blocks // schedule.blocks) == 0
        rest = num_blocks % schedule.blocks or schedule.blocks
        assert sum(plan.trainable) == (rest if last else schedule.blocks)
    again = copy.deepcopy(schedule)
    steps = [*range(total_steps)]
    shuffle.shuffle(steps)
    assert all(again.plan(step, num_blocks) == plans[step] for step in steps)
    assert repr(again) == repr(schedule)


@given(_in_turn(), st.integers(0, 10**9))
def test_settings_that_show_in_the_repr_are_all_there_are(drawn, step):
    schedule, num_blocks = drawn
    classes = {c.__name__: c for c in (RandomBlockSchedule, CyclicBlockSchedule)}
    same = eval(repr(schedule), classes)
    assert same.plan(step, num_blocks) == schedule.plan(step, num_blocks)


def test_draws_are_those_of_blake2b_on_every_machine():
    # recorded: a change of the counter or of the shuffle would redraw every saved run
    assert [_sample("blocks", 0, draw, 2, 12) for draw in range(4)] == [
        [4, 1],
        [1, 2],
        [3, 5],
        [8, 4],
    ]
    assert _sample("cycle", 7, 0, 6, 6) == [3, 2, 4, 1, 5, 0]
    state = random.getstate()
    RandomBlockSchedule(2, 5).plan(3, 12)
    assert random.getstate() == state


@pytest.mark.parametrize(("size", "out_of"), [(2, 12), (1, 7), (5, 6)])
def test_random_blocks_are_uniform_and_so_are_pairs(size, out_of):
    seeds, each = 10, 2000
    draws = seeds * each
    singles, pairs = Counter(), Counter()
    plans = [
        RandomBlockSchedule(size, 1, seed=s).plan(i, out_of).trainable
        for s in range(seeds)
        for i in range(each)
    ]
    for plan in plans:
        chosen = [i for i, on in enumerate(plan) if on]
        singles.update(chosen)
        pairs.update((a, b) for a in chosen for b in chosen if a < b)
    expected = {
        **{(i,): (singles[i], size / out_of) for i in range(out_of)},
        **{
            (a, b): (pairs[a, b], size * (size - 1) / (out_of * (out_of - 1)))
            for a in range(out_of)
            for b in range(a + 1, out_of)
        },
    }
    for key, (seen, share) in expected.items():
        error = math.sqrt(share * (1 - share) * draws)
        assert abs(seen - share * draws) <= 4 * error, key
    # neighbouring draws have nothing to do with each other, nor have those of neighbouring seeds
    same = 1 / math.comb(out_of, size)
    for others in (plans[1:], plans[each:]):
        hits = sum(a == b for a, b in zip(plans, others, strict=False))
        error = math.sqrt(same * (1 - same) * len(others))
        assert abs(hits - same * len(others)) <= 4 * error


@given(_in_turn(), st.integers(0, 50))
def test_a_cycle_trains_every_block_once(drawn, cycle):
    schedule, num_blocks = drawn
    if isinstance(schedule, RandomBlockSchedule):
        return
    groups = -(-num_blocks // schedule.blocks)
    starts = [(cycle * groups + turn) * schedule.period for turn in range(groups)]
    trained = Counter()
    for start in starts:
        trained.update(i for i, on in enumerate(schedule.plan(start, num_blocks).trainable) if on)
    assert trained == dict.fromkeys(range(num_blocks), 1)
    first = schedule.plan(starts[0], num_blocks).trainable
    if schedule.order == "ascending":
        assert all(first[: schedule.blocks])
    elif schedule.order == "descending":
        assert all(first[-schedule.blocks :])


@given(
    st.dictionaries(st.integers(1, 40), st.sets(st.integers(-9, 8)), max_size=4),
    st.sets(st.integers(-9, 8) | st.sampled_from(["embeddings", "head"])),
    _POLICIES,
    _POLICIES,
    st.integers(0, 50),
)
def test_given_sets_hold_from_their_step_on(later, first, embeddings, head, step):
    schedule = FixedBlockSchedule({0: first, **later}, embeddings=embeddings, head=head)
    chosen = ({0: first, **later})[max(s for s in (0, *later) if s <= step)]
    plan = schedule.plan(step, 9)
    assert plan.trainable == tuple(i in chosen or i - 9 in chosen for i in range(9))
    assert plan.embeddings == (embeddings == "always" or "embeddings" in chosen)
    assert plan.head == (head == "always" or "head" in chosen)
    assert schedule.stage(step) == sum(s <= step for s in later)
    same = eval(repr(schedule), {"FixedBlockSchedule": FixedBlockSchedule})
    assert same.plan(step, 9) == plan and repr(same) == repr(schedule)
    assert steps_to_check(schedule) == {0, *later}


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ("0-2, 4", [0, 1, 2, 4]),
        ("4--1", [4, 5]),
        ("-3--2,0-0", [0, 3, 4]),
        (range(2), [0, 1]),
        (np.int64(3), [3]),
        ([2.0, "3-4"], [2, 3, 4]),
        ("", []),
        ((), []),
    ],
)
def test_sets_of_blocks_are_texts_or_numbers(given, blocks):
    plan = FixedBlockSchedule(given).plan(7, 6)
    assert plan == FreezePlan(tuple(i in blocks for i in range(6)))
    with pytest.raises(TypeError, match="a block must be whole"):
        FixedBlockSchedule(torch.tensor([True, False]))  # a mask is no list of blocks 1 and 0


def test_random_cycles_differ_from_each_other():
    schedule = CyclicBlockSchedule(1, 1, order="random", seed=1)
    plans = [schedule.plan(step, 8).trainable.index(True) for step in range(40)]
    assert len({tuple(plans[i : i + 8]) for i in range(0, 40, 8)}) == 5


def _trained_adaptively(schedule: AdaptiveSchedule, norms: list[list[float]]) -> None:
    for i, some in enumerate(norms):
        schedule.observe((i + 1) * schedule.interval - 1, some, len(some))


_NORMS = st.integers(1, 12).flatmap(
    lambda blocks: st.lists(
        st.lists(st.floats(0, 1e6), min_size=blocks, max_size=blocks), min_size=1, max_size=8
    )
)


@given(_NORMS, st.floats(0, 100), st.integers(1, 9), st.integers(0, 8))
def test_adaptive_only_ever_freezes_and_goes_on_from_its_saved_decisions(
    norms, percentile, interval, kept
):
    num_blocks = len(norms[0])
    schedule = AdaptiveSchedule(interval, percentile=percentile)
    _trained_adaptively(schedule, norms)
    steps = range(interval * (len(norms) + 1))
    plans = [schedule.plan(step, num_blocks) for step in steps]
    boundaries = [plan.trainable.index(True) for plan in plans]
    assert boundaries == sorted(boundaries) and not any(boundaries[: 2 * interval])
    assert [plan.embeddings for plan in plans] == [b == 0 for b in boundaries]
    stages = [schedule.stage(step) for step in steps]
    assert stages == [len({*boundaries[: i + 1]}) - 1 for i in steps]
    # saved after some of the decisions, as text, and gone on with the others
    kept = min(kept, len(norms))
    first, second = (AdaptiveSchedule(interval, percentile=percentile) for _ in range(2))
    _trained_adaptively(first, norms[:kept])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for i in range(kept, len(norms)):
        second.observe((i + 1) * interval - 1, norms[i], num_blocks)
    assert second.state_dict() == schedule.state_dict()
    assert [second.plan(step, num_blocks) for step in steps] == plans


def test_adaptive_rule_is_that_of_the_paper():
    schedule = AdaptiveSchedule(10, percentile=50)
    before, now = [4.0, 2.0, 1.0, 1.0, 5.0], [4.4, 2.0, 2.0, 1.2, 10.0]
    _trained_adaptively(schedule, [before, now])
    changes = [abs(a - b) / a for a, b in zip(before, now, strict=True)]  # .1 0 1 .2 1
    first = next(i for i, c in enumerate(changes) if c >= np.percentile(changes, 50))
    assert schedule.decisions == {9: 0, 19: first} and first == 2
    assert schedule.plan(19, 5).boundary == 0 and schedule.plan(20, 5).boundary == 2
    # of three active blocks, the lowest changes least; frozen ones have no norm
    schedule.observe(29, [0, 0, 2.0, 2.4, 20.0], 5)
    assert schedule.decisions[29] == 3
    # back at an earlier step: what was decided from there on is decided anew
    schedule.observe(19, before, 5)
    assert schedule.decisions == {9: 0, 19: 0} and schedule.plan(99, 5).boundary == 0


@given(st.integers(0, 200), st.integers(1, 12), st.integers(1, 12))
def test_windows_end_with_their_interval(step, interval, window):
    schedule = AdaptiveSchedule(interval, window=min(window, interval))
    assert schedule.decides(step) == ((step + 1) % interval == 0)
    counted = [s for s in range(step - step % interval, step + 1) if schedule.observes(s)]
    assert not schedule.decides(step) or len(counted) == schedule.window


@settings(deadline=None)
@given(_settings(), st.sampled_from(["first_stage", "always", "never"]), st.booleans())
def test_every_unit_anneals_to_nothing_where_it_freezes(run, embeddings, scaled):
    num_blocks, stages, total_steps = run
    schedule = ProgressiveSchedule(stages, total_steps, embeddings=embeddings)
    groups = [{"unit": unit} for unit in range(-1, num_blocks + 1)]
    factors = annealed_lr(schedule, groups, num_blocks, scaled=scaled)
    _, ends = freezing_steps(schedule, num_blocks)
    for unit, end in enumerate(ends):
        scales = [factors[unit](step) for step in range(total_steps)]
        assert scales == sorted(scales, reverse=True)
        assert all(scale > 0 for scale in scales[:end]) and not any(scales[end:])
        if end:
            assert scales[0] == pytest.approx(total_steps / end if scaled else 1)
            full = total_steps if scaled else end
            assert sum(scales) == pytest.approx(full * (1 + 1 / end) / 2)
    for step in range(total_steps):
        plan = schedule.plan(step, num_blocks)
        on = [plan.embeddings, *plan.trainable, plan.head]
        assert on == [step < end for end in ends]


_FILES = {
    "a.toml": ('schedule = "random"\nblocks = 2\nperiod = 20', RandomBlockSchedule(2, 20)),
    "b.json": (
        '{"schedule": "cyclic", "blocks": 1, "period": 5, "order": "random"}',
        CyclicBlockSchedule(1, 5, order="random"),
    ),
    "c.yaml": ("schedule: adaptive\ninterval: 50\n", AdaptiveSchedule(50)),
    "d.yml": (
        "schedule: milestones\nsteps: {0: 1, 40: 3}\nembeddings: never",
        MilestoneSchedule({0: 1, 40: 3}, embeddings="never"),
    ),
    "e.json": (
        '{"schedule": "progressive", "stages": 2, "weights": [1, 2]}',
        ProgressiveSchedule(2, weights=[1, 2]),
    ),
    "g.json": (
        '{"schedule": "milestones", "steps": {"0": 2, "10": 0, "20": -1}}',
        MilestoneSchedule({0: 2, 10: 0, 20: -1}),
    ),
    "h.json": (
        '{"schedule": "fixed", "blocks": {"0": "-1", "9": [0, "embeddings"]}, "head": "never"}',
        FixedBlockSchedule({0: "-1", 9: "0,embeddings"}, head="never"),
    ),
    "i.yaml": ("schedule: fixed\nblocks: 0-3,8\n", FixedBlockSchedule("0-3, 8")),
    "f.toml": (
        'schedule = "milestones"\n[steps]\n5 = 2\n',
        MilestoneSchedule({5: 2}),
    ),
}
_needs_toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=_needs_toml if "toml" in n else ()) for n in _FILES]
)
def test_files_say_what_their_class_says(name, tmp_path):
    text, expected = _FILES[name]
    (tmp_path / name).write_text(text)
    assert repr(schedule_from_file(tmp_path / name)) == repr(expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"schedule": "lisa"}', "schedule must be one of progressive, milestones,"),
        ("a.json", '{"schedule": "random", "blocks": 2}', "random needs period"),
        ("a.json", '{"schedule": "cyclic", "blocks": 1, "period": 5, "k": 1}', "no setting 'k'"),
        ("a.json", '{"schedule": "random", "blocks": "2", "period": 5}', "blocks must be 1 or"),
        ("a.json", '{"schedule": "adaptive", "interval": 5, "percentile": "x"}', "wrong type"),
        ("a.json", '{"schedule": "milestones", "steps": [1]}', "table of step = boundary"),
        ("a.json", '{"schedule": "milestones", "steps": {"x": 1}}', "table of step = boundary"),
        ("a.json", '{"schedule": "milestones", "steps": {"3": 1.5}}', "milestone 3 must be -1 or"),
        ("a.json", '{"schedule": "milestones", "steps": {"3": true}}', "milestone 3 must be -1 or"),
        ("a.json", '{"schedule": "milestones", "steps": {"3": "1"}}', "milestone 3 must be -1 or"),
        ("a.json", '{"schedule": "fixed", "blocks": {"x": 1}}', "table of step = blocks"),
        ("a.json", '{"schedule": "fixed", "blocks": [[1]]}', "wrong type"),
        ("a.json", '{"schedule": "random", "blocks": 2, "period": 2.5}', "period must be 1 or"),
        ("a.json", '{"schedule": "progressive", "stages": 2, "anneal": true}', "train --anneal"),
        ("a.json", "{", "Expecting property name"),
        ("a.json", "[1]", "expected settings"),
        ("a.yaml", "a: [1\nb: {", "while parsing"),
        ("a.yaml", "schedule: [random]", "schedule must be one of"),
        ("a.txt", "", "a .toml, .yaml, .yml or .json file"),
        pytest.param("a.toml", "blocks = ", "Invalid value", marks=_needs_toml),
    ],
)
def test_bad_files_are_one_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        schedule_from_file(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


def test_toml_without_a_parser_says_what_to_write(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(ValueError, match="TOML needs Python 3.11: write it as JSON or YAML"):
        schedule_from_file(tmp_path / "a.toml")
