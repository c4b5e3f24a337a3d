"""ProgtuningCallback: one more argument to a Trainer that already works."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from tqdm.auto import tqdm
from trainers import STEPS, Recorder, rows_of, trainer_of, weights_of
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SchedulerType
from transformers.utils import logging

from progtuning_kernels import MaskedAdamW, PrefixCache, ProgressiveSchedule, patch_model
from progtuning_kernels.integrations import token_rate
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.patch import handle_of


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stages_follow_global_steps_and_state_is_released(tmp_path, accumulate, capsys):
    recorder = Recorder()
    schedule = ProgressiveSchedule(4)
    callback = ProgtuningCallback(schedule)
    trainer = trainer_of(
        tmp_path, callbacks=[callback, recorder], gradient_accumulation_steps=accumulate
    )
    trainer.train()
    assert (callback.schedule.total_steps, schedule.total_steps) == (STEPS, None)
    steps = recorder.steps
    assert [s.boundary for s in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    sizes = [s.state_bytes for s in steps]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] == sizes[5] > sizes[6]
    for before, after in itertools.pairwise(steps):
        for name, weight in after.weights.items():
            changed = not torch.equal(weight, before.weights[name])
            assert changed == (name in after.gradients), name
    assert "'stage': 4, 'boundary': 3, 'active_share': '0." in capsys.readouterr().out
    assert handle_of(trainer.model) is None
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert all(module.training for module in trainer.model.modules())


def _adapted() -> nn.Module:
    model = tiny_model("bert-sequence", dropout=True)
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:gradient checkpointing with use_reentrant=True")
def test_checkpointing_ends_with_the_same_weights(tmp_path, adapted, reentrant):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    ends, recorders = [], []
    for arguments in ({}, {"gradient_checkpointing": True, **options}):
        recorders.append(recorder := Recorder())
        trainer = trainer_of(
            tmp_path,
            model=_adapted() if adapted else None,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
            **arguments,
        )
        trainer.train()
        ends.append(weights_of(trainer))
    assert [s.boundary for s in recorders[1].steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    for plain, checkpointed in zip(recorders[0].steps, recorders[1].steps, strict=True):
        assert plain.gradients == checkpointed.gradients
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [None, (MaskedAdamW, {"lr": 1e-2})])
@pytest.mark.parametrize("saved_at", [3, 4, 5])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, saved_at, optimizer):
    straight = trainer_of(
        tmp_path / "a",
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4))],
        optimizer=optimizer,
    )
    straight.train()
    arguments = dict(save_strategy="steps", save_steps=saved_at, optimizer=optimizer)
    trainer_of(
        tmp_path / "b", callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], **arguments
    ).train()
    resumed = trainer_of(
        tmp_path / "b", callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], **arguments
    )
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{saved_at}"))
    expected = weights_of(straight)
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(resumed).items())


def test_masked_adamw_clips_once_and_ends_where_torch_does(tmp_path):
    runs = []
    for optimizer, trainer_clips_at in ((None, 0.05), ((MaskedAdamW, {"lr": 1e-2}), 0.0)):
        recorder = Recorder()
        trainer = trainer_of(
            tmp_path,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
            optimizer=optimizer,
            max_grad_norm=0.05,
        )
        trainer.train()
        assert {step.trainer_clips_at for step in recorder.steps} == {trainer_clips_at}
        assert trainer.args.max_grad_norm == 0.05
        runs.append(weights_of(trainer))
    unclipped = trainer_of(
        tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], max_grad_norm=0.0
    )
    unclipped.train()
    theirs, ours = runs
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5)
    assert any((w - theirs[n]).abs().max() > 1e-3 for n, w in weights_of(unclipped).items())


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_masked_optimizer_takes_the_norm_once_and_it_is_logged(tmp_path, monkeypatch, clip):
    logged, passes = [], []
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        "torch.nn.utils.clip_grad_norm_",
        lambda *args, **kwargs: passes.append(args) or clip_grad_norm_(*args, **kwargs),
    )
    for optimizer in (None, (MaskedAdamW, {"lr": 1e-2})):
        passes.clear()
        trainer = trainer_of(
            tmp_path,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4))],
            optimizer=optimizer,
            max_grad_norm=clip,
        )
        trainer.train()
        logged.append([log["grad_norm"] for log in trainer.state.log_history if "loss" in log])
        assert "clip_grad_norm_" not in vars(trainer.accelerator)
        assert (not passes) == (optimizer is not None)
    assert len(logged[0]) == STEPS and logged[1] == pytest.approx(logged[0], rel=1e-4)


@pytest.mark.parametrize(("own", "wanted"), [(0.01, 0.01), (0.5, 0.05), (None, 0.05)])
def test_the_smaller_of_two_norms_to_clip_at_counts(tmp_path, own, wanted):
    trainer = trainer_of(
        tmp_path,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4))],
        optimizer=(MaskedAdamW, {"lr": 1e-2, "max_grad_norm": own}),
        max_grad_norm=0.05,
    )
    trainer.train()
    assert trainer.optimizer.optimizer.max_grad_norm == wanted


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_updates_inside_backward_wait_for_the_window(tmp_path, clip):
    """Three micro-batches per step, the last window of an epoch shorter: the same weights."""
    weights = []
    for in_backward in (False, True):
        optimizer = (MaskedAdamW, {"lr": 1e-2, "in_backward": in_backward})
        trainer = trainer_of(
            tmp_path,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(2))],
            optimizer=optimizer,
            gradient_accumulation_steps=4,
            max_grad_norm=clip,
        )
        trainer.train()
        weights.append(weights_of(trainer))
        assert all(p.grad is None for p in trainer.model.parameters())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


def test_training_twice_starts_over(tmp_path):
    recorder = Recorder()
    trainer = trainer_of(
        tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(2)), recorder], steps=4
    )
    trainer.train()
    trainer.train()
    assert [s.boundary for s in recorder.steps] == [0, 0, 2, 2] * 2


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_an_interrupted_run_leaves_nothing_that_the_next_cannot_put_right(tmp_path):
    optimizer = (MaskedAdamW, {"lr": 1e-2})
    callbacks = [ProgtuningCallback(ProgressiveSchedule(4)), _Stop()]
    broken = trainer_of(tmp_path, callbacks=callbacks, optimizer=optimizer, max_grad_norm=0.05)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert handle_of(broken.model) is not None
    again = trainer_of(
        tmp_path,
        model=broken.model,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(2))],
        optimizer=optimizer,
        max_grad_norm=0.05,
    )
    again.args = broken.args
    before = weights_of(again)
    again.train()
    assert handle_of(again.model) is None and again.args.max_grad_norm == 0.05
    for name, weight in weights_of(again).items():  # what the broken run had frozen trains, too
        assert not torch.equal(weight, before[name]), name


def test_the_users_own_patch_is_not_taken_away(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(4))])
    handle = patch_model(trainer.model, ProgressiveSchedule(2, 8))
    with pytest.raises(ValueError, match="patched already"):
        trainer.train()
    assert handle_of(trainer.model) is handle


def test_keep_is_kept_under_the_trainer(tmp_path):
    optimizer = (MaskedAdamW, {"lr": 1e-2, "on_freeze": "keep"})
    recorder = Recorder()
    callbacks = [ProgtuningCallback(ProgressiveSchedule(4)), recorder]
    trainer_of(tmp_path, callbacks=callbacks, optimizer=optimizer).train()
    assert len({step.state_bytes for step in recorder.steps}) == 1


def test_several_gpus_in_one_process_are_refused():
    callback = ProgtuningCallback(ProgressiveSchedule(2))
    arguments = SimpleNamespace(world_size=1, n_gpu=2)
    with pytest.raises(RuntimeError, match="over 2 GPUs"):
        callback.on_train_begin(arguments, None, None, model=tiny_model("bert-qa"), optimizer=None)


class _Forwards(TrainerCallback):
    """(optimizer steps done, boundary) at every training forward."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def look(model, *inputs):
            if model.training:
                self.seen.append((state.global_step, handle_of(model).boundary))

        self._hook = model.register_forward_pre_hook(look)

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()


@pytest.mark.usefixtures("padded")
def test_the_plan_is_there_before_the_first_forward_of_a_step(tmp_path):
    forwards = _Forwards()
    trainer_of(
        tmp_path,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), forwards],
        per_device_train_batch_size=3,  # 6 micro-batches an epoch, so no window is short
        gradient_accumulation_steps=2,
    ).train()
    assert forwards.seen == [(step, step // 2) for step in range(STEPS) for _ in range(2)]


def test_clipping_is_over_active_gradients_alone(tmp_path):
    recorder = Recorder()
    trainer = trainer_of(
        tmp_path,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
        max_grad_norm=0.01,
    )
    trainer.train()
    logged = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logged) == STEPS and min(logged) > 0.02  # clipped at every step
    assert [step.norm for step in recorder.steps] == pytest.approx([0.01] * STEPS, rel=1e-3)
    active = [len(step.gradients) for step in recorder.steps]
    assert active == sorted(active, reverse=True) and active[0] > active[-1]


def test_accumulation_weighs_tokens_as_one_batch_does(tmp_path):
    """Rows of a causal LM count 11, 9 and 7 tokens: a mean of means would be another loss."""
    runs = []
    for rows, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(
            tmp_path,
            model=tiny_model("llama-causal-lm"),
            rows=rows_of("llama-causal-lm")[:16],
            callbacks=[ProgtuningCallback(ProgressiveSchedule(2))],
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["boundary"] for log in logs] == [0] * 4 + [2] * 4
        runs.append(([log["loss"] for log in logs], weights_of(trainer)))
    (losses, weights), *others = runs
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


_NEED_ARGUMENTS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}


@pytest.mark.parametrize("scheduler", sorted({s.value for s in SchedulerType} - _NEED_ARGUMENTS))
def test_schedulers_see_the_groups_that_they_began_with(tmp_path, scheduler):
    rates, groups = [], []

    class _Groups(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            groups.append([list(map(id, group["params"])) for group in optimizer.param_groups])

    for callbacks in ([], [ProgtuningCallback(ProgressiveSchedule(4)), _Groups()]):
        trainer = trainer_of(
            tmp_path,
            callbacks=callbacks,
            lr_scheduler_type=scheduler,
            warmup_steps=2,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()
        logs = trainer.state.log_history
        rates.append([log["learning_rate"] for log in logs if "learning_rate" in log])
    everything = sorted(map(id, trainer.model.parameters()))
    assert len(groups) == STEPS and all(seen == groups[0] for seen in groups)
    assert sorted(parameter for group in groups[0] for parameter in group) == everything
    assert len(rates[0]) == STEPS and rates[0] == rates[1]


class _FallingScore:
    """A metric that is worse at every evaluation: the first checkpoint is the best."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, prediction) -> dict[str, float]:
        self.calls += 1
        return {"score": -float(self.calls)}


_BEST_FIRST = dict(
    eval_strategy="steps",
    eval_steps=2,
    save_strategy="steps",
    save_steps=2,
    load_best_model_at_end=True,
    metric_for_best_model="score",
)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_best_model_of_an_earlier_stage_is_what_remains(tmp_path, adapted):
    model = tiny_model("bert-sequence", dropout=True) if not adapted else _adapted()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(
        tmp_path,
        model=model,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4))],
        compute_metrics=_FallingScore(),
        **_BEST_FIRST,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = (
        load_file(
            tmp_path / f"checkpoint-{step}" / f"{'adapter_' if adapted else ''}model.safetensors"
        )
        for step in (2, STEPS)
    )
    kept = model.state_dict() if not adapted else peft.get_peft_model_state_dict(model)
    assert kept.keys() == best.keys()
    assert all(torch.equal(kept[name], weight) for name, weight in best.items())
    assert any(not torch.equal(last[name], weight) for name, weight in best.items())
    assert handle_of(model) is None
    if not adapted:  # PEFT loads adapters for inference: `is_trainable=False`
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_early_stopping_unpatches(tmp_path):
    recorder = Recorder()
    trainer = trainer_of(
        tmp_path,
        callbacks=[
            ProgtuningCallback(ProgressiveSchedule(4)),
            recorder,
            EarlyStoppingCallback(early_stopping_patience=1),
        ],
        compute_metrics=_FallingScore(),
        optimizer=(MaskedAdamW, {"lr": 1e-2}),
        max_grad_norm=0.05,
        **_BEST_FIRST,
    )
    trainer.train()
    assert [step.boundary for step in recorder.steps] == [0, 0, 1, 1]  # and no further
    assert handle_of(trainer.model) is None and trainer.args.max_grad_norm == 0.05
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_evaluation_between_steps_changes_nothing(tmp_path):
    ends, recorders = [], []
    for arguments in ({}, dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)):
        recorders.append(recorder := Recorder())
        trainer = trainer_of(
            tmp_path,
            model=tiny_model("bert-sequence"),
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
            **arguments,
        )
        trainer.train()
        ends.append(weights_of(trainer))
    assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == STEPS + 1
    assert all(torch.equal(weight, ends[0][name]) for name, weight in ends[1].items())
    for plain, evaluated in zip(recorders[0].steps, recorders[1].steps, strict=True):
        assert plain.stochastic == evaluated.stochastic
    assert "bert.encoder.layer.2" not in evaluated.stochastic  # the last stage is frozen up to it
    assert "bert.encoder.layer.3" in evaluated.stochastic


class _OutOfMemory(TrainerCallback):
    """The first attempt of the Trainer ends at its third step, for want of memory."""

    failed = False

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")


_EVERY_TWO = {"eval_strategy": "steps", "eval_steps": 2}
_OPTIONS = {
    "epochs": {"steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5},
    "steps within an epoch": {"steps": 3},
    "best": _EVERY_TWO | {"save_strategy": "best", "metric_for_best_model": "loss"},
    "bf16": {"bf16": True},
    "bf16, checkpointed": {"bf16": True, "gradient_checkpointing": True},
    "a scheduler with arguments": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-4},
    },
    "auto_find_batch_size": {"auto_find_batch_size": True, "steps": 6},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", _OPTIONS)
def test_the_plan_under_options_of_the_trainer(tmp_path, name, masked):
    callback, recorder = ProgtuningCallback(ProgressiveSchedule(3)), Recorder()
    callbacks = [callback, recorder, *[_OutOfMemory()] * (name == "auto_find_batch_size")]
    optimizer = (MaskedAdamW, {"lr": 1e-2}) if masked else None
    trainer = trainer_of(tmp_path, callbacks=callbacks, optimizer=optimizer, **_OPTIONS[name])
    before = weights_of(trainer)
    done = trainer.train().global_step
    steps = recorder.steps[-done:]
    schedule = ProgressiveSchedule(3, done)
    assert [s.boundary for s in steps] == [schedule.plan(i, 4).boundary for i in range(done)]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["boundary"] for log in logs] == [s.boundary for s in steps]
    assert handle_of(trainer.model) is None and trainer.args.max_grad_norm == 1.0
    # the optimizer of a second attempt has what the first one had frozen
    earlier = recorder.steps[-done - 1].weights if len(recorder.steps) > done else before
    assert all(not torch.equal(w, earlier[n]) for n, w in steps[0].weights.items())


class _SavedBytes(TrainerCallback):
    """Bytes handed to autograd for backward, per optimizer step."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def _count(self, tensor):
        self.steps[-1] += tensor.nbytes
        return tensor

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(0)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._hooks.__enter__()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._hooks.__exit__()


@pytest.mark.usefixtures("padded")
def test_a_compiled_model_is_truncated(tmp_path):
    ends, saved = [], []
    for arguments in ({}, dict(torch_compile=True, torch_compile_backend="eager")):
        torch._dynamo.reset()
        saved.append(counter := _SavedBytes())
        trainer = trainer_of(
            tmp_path,
            model=tiny_model("bert-sequence"),
            callbacks=[ProgtuningCallback(ProgressiveSchedule(2)), counter],
            steps=4,
            **arguments,
        )
        trainer.train()
        assert handle_of(trainer.model) is None
        ends.append(weights_of(trainer))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["real_tokens_per_second"] > 0 for log in logs)
    eager, compiled = (counter.steps for counter in saved)
    assert eager == compiled and eager[0] > 1.8 * eager[2]
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-5)


def test_the_progress_bar_and_the_logs_say_the_stage(tmp_path, capsys, caplog):
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_propagation()
    outer = tqdm(total=STEPS, desc="runs")
    try:
        trainer = trainer_of(
            tmp_path,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4))],
            disable_tqdm=False,
            save_strategy="steps",
            save_steps=STEPS,
        )
        trainer.train()
        assert outer.desc == "runs"
    finally:
        outer.close()
        logging.set_verbosity(verbosity)
        logging.disable_propagation()
    printed = capsys.readouterr()
    for stage in range(1, 5):
        assert f"stage {stage}/4:" in printed.err
        assert f"'stage': {stage}, 'boundary': {stage - 1}" in printed.out + printed.err
    lines = list(dict.fromkeys(line for line in caplog.messages if "from step" in line))
    assert lines[2].startswith("  stage 3/4 from step 4: boundary 2 of 4 blocks, ")
    saved = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    logs = [log for log in saved["log_history"] if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 2, 2, 3, 3, 4, 4]
    shares = [log["active_share"] for log in logs]
    assert shares[0] == 1.0 and shares == sorted(shares, reverse=True) and shares[-1] < 0.5


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
@pytest.mark.parametrize("frozen_mode", ["eval", "train"])
def test_noise_of_neftune_goes_on_when_the_embeddings_are_frozen(tmp_path, name, frozen_mode):
    model = tiny_model(name, dropout=True)
    embeddings, noisy = model.get_input_embeddings(), []

    class _Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            def look(module, args, output):  # runs after the hook that adds the noise
                plain = nn.functional.embedding(args[0], module.weight, module.padding_idx)
                noisy.append((handle_of(model).boundary, not torch.equal(output, plain)))

            self.hook = embeddings.register_forward_hook(look)

        def on_train_end(self, args, state, control, **kwargs):
            self.hook.remove()

    trainer = trainer_of(
        tmp_path,
        model=model,
        rows=rows_of(name),
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4), frozen_mode=frozen_mode), _Look()],
        neftune_noise_alpha=50.0,
        eval_strategy="steps",
        eval_steps=STEPS,
    )
    trainer.train()
    *steps, evaluation = noisy
    assert steps == [(step // 2, True) for step in range(STEPS)]
    assert evaluation == (3, False)
    assert all(module.training for module in model.train().modules())


class _Tracker(TrainerCallback):
    """Sends what it finds at the moment of the log, as TensorBoard's and W&B's do."""

    def __init__(self) -> None:
        self.sent: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


@pytest.mark.parametrize("place", ["report_to", "before", "after", "added"])
def test_trackers_get_the_stage_wherever_they_stand(tmp_path, monkeypatch, place):
    tracker, ours = _Tracker(), ProgtuningCallback(ProgressiveSchedule(4))
    if place == "report_to":
        monkeypatch.setattr(
            "transformers.trainer.get_reporting_integration_callbacks", lambda _: [tracker]
        )
    callbacks = {"before": [tracker, ours], "after": [ours, tracker]}.get(place, [ours])
    trainer = trainer_of(tmp_path, callbacks=callbacks)
    if place == "added":
        trainer.remove_callback(ours)
        trainer.add_callback(tracker)
        trainer.add_callback(ours)
    others = [c for c in trainer.callback_handler.callbacks if c is not ours]
    for _ in range(2):
        tracker.sent.clear()
        trainer.train()
        *steps, summary = tracker.sent
        assert [log["stage"] for log in steps] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert [log["boundary"] for log in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert all(0 < log["active_share"] <= 1 for log in steps)
        numbers = ("state_bytes", "peak_memory_bytes", "real_tokens_per_second")
        assert all(type(log[name]) in (int, float) for log in steps for name in numbers)
        sizes = [log["state_bytes"] for log in steps]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 2
        assert all("cache_rows" not in log for log in steps)
        assert "train_runtime" in summary and "stage" not in summary
        # every callback is still there, once, in the order that it had
        assert [c for c in trainer.callback_handler.callbacks if c is not ours] == others
        assert trainer.callback_handler.callbacks.count(ours) == 1


class _Clock(TrainerCallback):
    """A step takes 2 s; evaluation, saving and what callbacks do before a step 100 s each."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.now += 100
        model(**tiny_inputs("bert-sequence")).loss.backward()  # as to measure something
        model.zero_grad()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.now += 2

    def save(self, *args) -> None:
        self.now += 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "logging_steps": 2},
        {"optimizer": (MaskedAdamW, {"lr": 1e-2, "in_backward": True}), "logging_steps": 3},
        {"cache": 1 << 20},
    ],
    ids=["plain", "accumulated", "in backward", "cached"],
)
def test_real_tokens_of_training_time(tmp_path, monkeypatch, options):
    clock, rows, options = _Clock(), rows_of("bert-sequence"), dict(options)
    cache = PrefixCache(max_bytes=options.pop("cache")) if "cache" in options else None
    monkeypatch.setattr(token_rate, "time", clock)
    trainer = trainer_of(
        tmp_path,
        model=tiny_model("bert-sequence"),
        callbacks=[ProgtuningCallback(ProgressiveSchedule(3), cache=cache), clock],
        rows=rows,
        steps=12 // options.get("gradient_accumulation_steps", 1),
        per_device_train_batch_size=len(rows) // 6,
        eval_strategy="steps",
        eval_steps=1,
        compute_metrics=lambda _: clock.save() or {},
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    monkeypatch.setattr(trainer, "_save_checkpoint", clock.save)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    every = options.get("logging_steps", 1)
    assert "training_step" not in vars(trainer)
    counted = sum(log["real_tokens_per_second"] * 2 * every for log in logs)
    assert counted == pytest.approx(2 * sum(int(row["attention_mask"].sum()) for row in rows))
    if cache is not None:
        stored = [log["cache_rows"] for log in logs]
        assert stored[:4] == [0, 0, 0, 0] and stored[-1] == len(rows)


class _SetFitTrainer(Trainer):
    """Hands callbacks its own model and arguments, as SetFit's does."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        handler, body = self.callback_handler, self.model
        given = {"model": SimpleNamespace(model_body=body), "st_model": body}

        def call_event(event, args, state, control, **kwargs):
            for callback in handler.callbacks:
                kwargs |= {
                    "optimizer": handler.optimizer,
                    "train_dataloader": handler.train_dataloader,
                }
                if isinstance(callback, ProgtuningCallback):
                    own = (SimpleNamespace(), state, control)
                    getattr(callback, event)(*own, **given, st_args=args, **kwargs)
                else:
                    got = getattr(callback, event)(args, state, control, model=body, **kwargs)
                    control = got or control
            return control

        handler.call_event = call_event
        handler.on_init_end(self.args, self.state, self.control)

    def log(self, logs, *args, **kwargs) -> None:
        super().log({f"body_{k}" if k == "loss" else k: v for k, v in logs.items()})


def test_the_objects_that_setfit_hands_to_callbacks(tmp_path, monkeypatch):
    plain = trainer_of(tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(4))])
    plain.train()
    monkeypatch.setattr("trainers.Trainer", _SetFitTrainer)
    optimizer = (MaskedAdamW, {"lr": 1e-2})
    for kind in (None, optimizer):
        trainer = trainer_of(
            tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], optimizer=kind
        )
        trainer.train()
        assert handle_of(trainer.model) is None
        logs = [log for log in trainer.state.log_history if "body_loss" in log]
        assert [log["stage"] for log in logs] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert all(log["real_tokens_per_second"] > 0 < log["state_bytes"] for log in logs)
        expected = weights_of(plain)
        for name, weight in weights_of(trainer).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=2e-5)


def test_a_model_that_is_no_module_is_refused_with_a_cure():
    callback = ProgtuningCallback(ProgressiveSchedule(2))
    body = SimpleNamespace(encoder=tiny_model("bert-qa"))
    with pytest.raises(TypeError, match="SimpleNamespace, no nn.Module: give patch_model the mod"):
        callback.on_train_begin(SimpleNamespace(), None, None, model=body, optimizer=None)
