"""A schedule that goes on by a validation score: decisions, restored weights, resumed runs."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import batch, process_group, run_ranks
from tiny_models import tiny_inputs, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainers import trainer_of, weights_of
from transformers import TrainerCallback

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    FixedBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PlateauSchedule,
    ProgressiveSchedule,
    UnsupportedModelError,
    load_checkpoint,
    patch_model,
    save_checkpoint,
    schedule_from_file,
)
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.patch import handle_of
from progtuning_kernels.schedules import ScoredSchedule, stage_count

BERT = "bert-sequence"
THAWING = ["-1", "-2--1", "0--1,embeddings"]


def _plain(scores, *, patience, min_delta, sign, most, stages):
    """Steps at which stages end, written down as the words of the docstring have it."""
    best, stale, start, ends = None, 0, 0, []
    for step, score in scores:
        if not math.isnan(score) and (best is None or sign * (score - best) > min_delta):
            best, stale = score, 0
        else:
            stale += 1
        if len(ends) < stages and (stale == patience or (most and step - start >= most)):
            ends.append(step)
            start, stale = step, 0
    return ends


_SCORES = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.6, 1.0, math.nan, math.inf])),
    max_size=20,
)


@given(
    _SCORES,
    st.integers(1, 3),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from(["min", "max"]),
    st.none() | st.integers(1, 8),
    st.integers(0, 20),
)
def test_a_stage_ends_when_scores_stall_and_goes_on_from_its_saved_scores(
    gaps, patience, min_delta, mode, most, kept
):
    settings = dict(patience=patience, min_delta=min_delta, mode=mode, max_steps_per_stage=most)
    schedule, again = (PlateauSchedule(THAWING, **settings) for _ in range(2))
    scores, step = [], 0
    for gap, score in gaps:
        scores.append((step := step + gap, score))
    ends = _plain(
        scores,
        patience=patience,
        min_delta=min_delta,
        sign=1 if mode == "max" else -1,
        most=most,
        stages=3,
    )
    for i, (at, score) in enumerate(scores):
        if i == kept:
            again.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        before = schedule.best
        assert schedule.report(at, score) == (schedule.best != before)
        if i >= kept:
            again.report(at, score)
    stages = [schedule.stage(s) for s in range(step + 3)]
    assert stages == [min(2, sum(end <= s for end in ends)) for s in range(step + 3)]
    assert schedule.finished == (len(ends) == 3)
    plans = schedule.plans(4)
    assert [schedule.plan(s, 4) for s in range(step + 3)] == [plans[stage] for stage in stages]
    if kept < len(scores):
        assert repr(again.scores) == repr(schedule.scores) and again.best == schedule.best
        assert [again.stage(s) for s in range(step + 3)] == stages
    # back at an earlier step: what follows is decided anew
    if scores:
        at = scores[len(scores) // 2][0]
        schedule.report(at, 0.7)
        same = [scored for scored in scores if scored[0] <= at]
        assert repr(schedule.scores) == repr([*same, (at, 0.7)])


def test_stages_are_a_number_sets_or_another_schedule(tmp_path):
    def boundaries(stages):
        return [plan.boundary for plan in PlateauSchedule(stages).plans(6)]

    assert boundaries(3) == boundaries(ProgressiveSchedule(3)) == [0, 2, 4]
    assert boundaries(ProgressiveSchedule(2, 90, weights=[1, 1, 1, 1, 1, 9])) == [0, 5]
    assert boundaries([[5], "3-5", ""]) == [5, 3, 6]
    assert boundaries(MilestoneSchedule({0: 4, 10: 2, 20: -1})) == [4, 2, 0]
    assert boundaries(CyclicBlockSchedule(2, 5, order="descending").bind(15)) == [4, 2, 0]
    schedule = PlateauSchedule(3)
    assert isinstance(schedule, ScoredSchedule) and stage_count(schedule.bind(9), 9) is None
    path = tmp_path / "plateau.json"
    for stages, same in (
        ('["-1", [0, 1]]', ["-1", "0,1"]),
        ('{"schedule": "milestones", "steps": {"4": 2}}', MilestoneSchedule({4: 2})),
    ):
        path.write_text(f'{{"schedule": "plateau", "stages": {stages}, "mode": "max"}}')
        assert repr(schedule_from_file(path)) == repr(PlateauSchedule(same, mode="max"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PlateauSchedule(3, patience=0), ValueError, "patience must be 1 or more"),
        (lambda: PlateauSchedule(3, min_delta=-1), ValueError, "min_delta must be 0 or more"),
        (lambda: PlateauSchedule(3, min_delta=math.nan), ValueError, "min_delta must be 0"),
        (lambda: PlateauSchedule(3, min_delta="1"), TypeError, "min_delta must be 0 or more"),
        (lambda: PlateauSchedule(3, mode="best"), ValueError, "mode must be one of"),
        (lambda: PlateauSchedule(3, max_steps_per_stage=0), ValueError, "max_steps_per_stage"),
        (lambda: PlateauSchedule([]), ValueError, "what trains from step 0 on"),
        (lambda: PlateauSchedule("0-3"), TypeError, "stages must be 1 or more"),
        (lambda: PlateauSchedule(AdaptiveSchedule(5)), TypeError, "decides by itself"),
        (lambda: PlateauSchedule(PlateauSchedule(2)), TypeError, "decides by itself"),
        (lambda: PlateauSchedule(CyclicBlockSchedule(1, 5)), ValueError, "has no last stage"),
        (lambda: PlateauSchedule(7).plan(0, 6), ValueError, "more than the 6 blocks"),
        (lambda: PlateauSchedule(3).report(-1, 0.0), ValueError, "0 or more"),
    ],
)
def test_bad_settings_of_a_plateau_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def _start(schedule=None, **options):
    schedule = schedule or PlateauSchedule(THAWING)
    handle = patch_model(tiny_model(BERT), schedule, kernels="off")
    return handle, MaskedAdamW(handle.param_groups(lr=3e-3, weight_decay=0.1), **options)


def _train(handle, optimizer, scores, until):
    """Train, and report a score after every step but the first."""
    while handle.step < until:
        handle.model(**tiny_inputs(BERT, seed=handle.step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        if handle.step in scores:
            handle.report_score(scores[handle.step])


@pytest.mark.parametrize("masters", [False, True])
def test_the_weights_of_the_best_score_come_back_when_a_stage_ends(masters):
    handle, optimizer = _start(master_weights=masters)
    model = handle.model.to(torch.bfloat16) if masters else handle.model
    optimizer.on_freeze = "keep" if masters else "release"
    before = copy.deepcopy(model.state_dict())

    def trained() -> set[str]:
        return {n for n, w in model.state_dict().items() if not torch.equal(w, before[n])}

    _train(handle, optimizer, {2: 0.5, 3: 0.4}, 3)
    best = copy.deepcopy(model.state_dict())
    _train(handle, optimizer, {4: 0.45}, 4)
    assert handle.stage == 0 and trained() == {n for n in before if "layer.3" in n} | {
        n for n in before if "pooler" in n or "classifier" in n
    }
    state = handle.state_dict()
    assert set(state["best"]) == trained()
    _train(handle, optimizer, {5: math.nan}, 5)
    assert handle.stage == 1 and handle.plan.boundary == 2 and not handle.finished
    assert all(torch.equal(w, best[n]) for n, w in model.state_dict().items())
    # a stage whose scores are all worse ends with the weights that it began with
    _train(handle, optimizer, {6: 0.6, 7: 0.7}, 6)
    assert not torch.equal(model.state_dict()["classifier.weight"], best["classifier.weight"])
    _train(handle, optimizer, {7: 0.7}, 7)
    assert handle.stage == 2 and handle.boundary == 0
    assert all(torch.equal(w, best[n]) for n, w in model.state_dict().items())
    if masters:  # the master of an update is that of the weights that were put back
        _train(handle, optimizer, {}, 8)
        moved = (model.state_dict()["classifier.weight"] - best["classifier.weight"]).abs()
        assert moved.max() < 0.02
    _train(handle, optimizer, {9: 0.3, 10: 0.4}, 10)
    assert handle.stage == 2 and not handle.finished
    assert not handle.report_score(0.4) and handle.finished
    assert not handle.report_score(0.1) and handle.stage == 2


def test_without_restoring_the_weights_stay():
    schedule = PlateauSchedule(THAWING, restore_best=False, patience=1, mode="max")
    handle, optimizer = _start(schedule)
    _train(handle, optimizer, {1: 0.5}, 2)
    last = copy.deepcopy(handle.model.state_dict())
    assert handle.report_score(0.4) and handle.stage == 1
    assert all(torch.equal(w, last[n]) for n, w in handle.model.state_dict().items())
    assert "best" not in handle.state_dict()
    top = handle.model.get_submodule("bert.encoder.layer.3.output.dense").weight
    assert optimizer.state[top]["step"] == 2  # what goes on training keeps its moments
    handle.unpatch()
    other = patch_model(tiny_model(BERT), FixedBlockSchedule("0"))
    with pytest.raises(RuntimeError, match="decides by no score: pass a PlateauSchedule"):
        other.report_score(1.0)
    assert not other.finished


def test_training_that_ends_without_a_score_is_told_so(recwarn):
    handle, optimizer = _start()
    with handle:
        _train(handle, optimizer, {}, 2)
    assert "has had no score in 2 steps" in str(recwarn.pop(UserWarning).message)
    handle, optimizer = _start()
    with handle:
        _train(handle, optimizer, {1: 0.5}, 2)
    _start()[0].unpatch()  # nothing was trained
    with pytest.raises(KeyError), _start()[0] as handle:
        handle.seek(5)
        raise KeyError
    assert not [w for w in recwarn if "has had no score" in str(w.message)]


def test_scores_that_are_gone_bring_no_weights_back():
    schedule = PlateauSchedule(THAWING, patience=2)
    handle = patch_model(tiny_model(BERT), schedule, kernels="off")
    for step, score in ((10, 0.9), (20, 0.5), (10, 0.95)):
        handle.seek(step)
        handle.report_score(score)
    assert schedule.best == (10, 0.9)  # the weights kept were those of step 20
    with pytest.raises(RuntimeError, match="weights of step 10 are to be put back"):
        handle.report_score(0.96)
    handle.unpatch()
    with pytest.raises(ValueError, match="up to step 10, and this one begins at step 0"):
        patch_model(tiny_model(BERT), schedule)  # a second run would be in the first one's stages
    patch_model(tiny_model(BERT), schedule, step=10).unpatch()


def test_a_run_that_is_broken_off_goes_on_to_the_same_bits(tmp_path):
    scores = {2: 0.5, 3: 0.4, 4: 0.45, 5: 0.46, 6: 0.6, 7: 0.38, 8: 0.39, 9: 0.41}
    straight = _start()
    _train(*straight, scores, 11)
    assert straight[0].stage == 2
    expected = straight[0].model.state_dict()
    for saved_at in (4, 6):  # with weights to put back from before it
        half, again = _start(), _start()
        _train(*half, scores, saved_at)
        save_checkpoint(tmp_path / str(saved_at), *half)
        load_checkpoint(tmp_path / str(saved_at), *again)
        _train(*again, scores, 11)
        assert all(torch.equal(w, expected[n]) for n, w in again[0].model.state_dict().items())
        assert again[0].schedule.state_dict() == straight[0].schedule.state_dict()
        if saved_at == 4:
            bare, state = _start(), half[0].state_dict()
            del state["best"]
            bare[0].load_state_dict(state)
            with pytest.raises(RuntimeError, match="weights of step 3 .* load a whole handle"):
                _train(*bare, scores, 5)


def _on_a_rank(rank: int, folder: str) -> None:
    with process_group(rank, f"{folder}/store"):
        schedule = PlateauSchedule(THAWING, patience=1)
        handle = patch_model(tiny_model(BERT).train(), schedule, kernels="off")
        handle.report_score([0.9, 0.1][rank])  # before a wrapper is known
        optimizer = MaskedAdamW(handle.param_groups(lr=3e-3))
        wrapped, stages = DistributedDataParallel(handle.model), []
        for score in ([0.8, 0.5, 0.6, 0.7, 0.4, 0.4], [0.7, 0.7, 0.7, 0.7, 0.7, 0.7])[rank]:
            wrapped(**batch(handle.step, rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
            handle.report_score(score)
            stages.append(handle.stage)
        assert stages == [0, 0, 1, 2, 2, 2] and handle.finished
        assert [score for _, score in schedule.scores] == [0.9, 0.8, 0.5, 0.6, 0.7, 0.4, 0.4]
        for w in handle.model.parameters():
            first = w.detach().clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(first, w)
        sharded = tiny_model(BERT)
        for module in (*sharded.bert.encoder.layer, sharded):
            fully_shard(module)
        with pytest.raises(UnsupportedModelError, match="no rank has them .* restore_best=False"):
            patch_model(sharded, PlateauSchedule(2))
        options = dict(restore_best=False, patience=1)
        handle = patch_model(sharded, PlateauSchedule(2, **options), only="output|classifier")
        optimizer = MaskedAdamW(handle.param_groups(lr=3e-3, weight_decay=0.1))
        before = {n: p.to_local().clone() for n, p in sharded.named_parameters()}
        sharded(**batch(0, rank)).loss.backward()
        optimizer.step()
        for n, p in sharded.named_parameters():
            same = torch.equal(p.to_local(), before[n])
            assert same != ("output" in n or "classifier" in n) or not p.to_local().numel(), n
        optimizer.zero_grad()
        handle.advance()
        handle.report_score(0.5)
        assert handle.report_score([0.6, 0.4][rank]) and handle.stage == 1


def test_ranks_with_other_scores_decide_alike(tmp_path):
    run_ranks(_on_a_rank, str(tmp_path))


class _Watch(TrainerCallback):
    """Gives evaluations the scores that a test wants, and looks at what trains in every step."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores, self.boundaries = scores, []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.boundaries.append(handle_of(model).boundary)

    def of(self, trainer):
        return lambda _: {"accuracy": self.scores[trainer.state.global_step]}


def _trainer(folder, scores, schedule=None, *, masked=True, **arguments):
    watch = _Watch(scores)
    callback = ProgtuningCallback(
        schedule or PlateauSchedule([*THAWING[:2]], patience=1), only="layer|classifier"
    )
    settings = dict(eval_strategy="steps", eval_steps=2, metric_for_best_model="accuracy")
    optimizer = (MaskedAdamW, {"lr": 1e-2}) if masked else None
    trainer = trainer_of(
        folder, callbacks=[callback, watch], steps=20, optimizer=optimizer, **settings | arguments
    )
    trainer.compute_metrics = watch.of(trainer)
    return trainer, callback, watch


@pytest.mark.parametrize("masked", [True, False])
def test_the_trainer_goes_on_by_its_metric_and_stops_after_the_last_stage(tmp_path, masked):
    scores = {2: 0.5, 4: 0.6, 6: 0.55, 8: 0.7, 10: 0.65}
    saving = dict(save_strategy="steps", save_steps=2)
    trainer, callback, watch = _trainer(tmp_path, scores, masked=masked, **saving)
    trainer.train()
    assert trainer.state.global_step == 10 and callback.handle.finished
    assert watch.boundaries == [3] * 6 + [2] * 4
    expected = weights_of(trainer)
    kept = torch.load(tmp_path / "checkpoint-4" / "progtuning_best.pt", weights_only=True)
    assert kept and all("layer.3" in name or "classifier" in name for name in kept)
    for step in (4, 6, 8)[
        : 3 if masked else 1
    ]:  # with a best to come back to, where a stage ended, in the last one
        resumed, again, later = _trainer(tmp_path / "again", scores, masked=masked)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert later.boundaries == watch.boundaries[step:]
        assert again.schedule.state_dict() == callback.schedule.state_dict()
        assert all(torch.equal(w, expected[n]) for n, w in weights_of(resumed).items())
    callback = ProgtuningCallback(PlateauSchedule([*THAWING[:2]], patience=1))
    other = trainer_of(tmp_path, callbacks=[callback], eval_strategy="epoch")
    with pytest.raises(ValueError, match="saved with only='layer|classifier', this run has only"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_of_another_schedule_is_said_to_begin_the_first_stage(tmp_path):
    scores, saving = {2: 0.5, 4: 0.6}, dict(save_strategy="steps", save_steps=2)
    earlier, *_ = _trainer(tmp_path, scores, ProgressiveSchedule(2), **saving)
    later, callback, watch = _trainer(tmp_path / "later", scores)
    earlier.args.max_steps, later.args.max_steps = 2, 4
    earlier.train()
    with pytest.warns(UserWarning, match="no decisions of a PlateauSchedule: it begins with its f"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert watch.boundaries == [3, 3]
    assert callback.schedule.state_dict()["scores"] == [[4, 0.6]]


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (None, {"eval_strategy": "no"}, "the Trainer never evaluates: give .*eval_strategy='ste"),
        (
            PlateauSchedule(2, mode="min"),
            {},
            "mode='min', and the Trainer takes 'max' for",
        ),
        (
            None,
            {"metric_for_best_model": "f1"},
            "no eval_f1, by which .* it has eval_loss,",
        ),
    ],
)
def test_a_trainer_that_cannot_bring_scores_is_refused(tmp_path, schedule, arguments, message):
    trainer, *_ = _trainer(tmp_path, {2: 0.5}, schedule, **arguments)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_the_loss_is_the_score_unless_another_is_named(tmp_path):
    callback = ProgtuningCallback(PlateauSchedule(2, patience=1, min_delta=100.0))
    rows = {"near": trainer_of(tmp_path).eval_dataset, "far": trainer_of(tmp_path).eval_dataset}
    trainer = trainer_of(
        tmp_path,
        callbacks=[callback],
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="far_loss",
    )
    trainer.eval_dataset = rows
    trainer.train()
    assert trainer.state.global_step == 3 and callback.schedule.mode == "min"
    logged = [log["eval_far_loss"] for log in trainer.state.log_history if "eval_far_loss" in log]
    assert [score for _, score in callback.schedule.scores] == logged
