"""ProgtuningCallback: one more argument to a Trainer that already works."""

from __future__ import annotations

from types import SimpleNamespace

import peft
import pytest
import torch
from tiny_models import BATCH, tiny_inputs, tiny_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, patch_model
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.optim import state_bytes
from progtuning_kernels.patch import handle_of

STEPS = 8


class _Recorder(TrainerCallback):
    """What a step looks like from outside."""

    def __init__(self) -> None:
        self.steps: list[SimpleNamespace] = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.steps.append(
            SimpleNamespace(
                boundary=handle_of(model).boundary,
                trainer_clips_at=args.max_grad_norm,
                state_bytes=state_bytes(optimizer),
                gradients={n for n, p in model.named_parameters() if p.grad is not None},
                weights={n: p.detach().clone() for n, p in model.named_parameters()},
            )
        )


def _trainer(
    folder, *, model=None, callbacks=(), steps: int = STEPS, optimizer=None, **arguments
) -> Trainer:
    rows = []
    for seed in range(6):
        inputs = tiny_inputs("bert-sequence", seed=seed)
        rows += [{k: v[i] for k, v in inputs.items()} for i in range(BATCH)]
    return Trainer(
        tiny_model("bert-sequence", dropout=True) if model is None else model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=7,
            **{"save_strategy": "no", **arguments},
        ),
        train_dataset=rows,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=optimizer,
    )


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stages_follow_global_steps_and_state_is_released(tmp_path, accumulate, capsys):
    recorder = _Recorder()
    schedule = ProgressiveSchedule(4)
    callback = ProgtuningCallback(schedule)
    trainer = _trainer(
        tmp_path, callbacks=[callback, recorder], gradient_accumulation_steps=accumulate
    )
    trainer.train()
    assert (callback.schedule.total_steps, schedule.total_steps) == (STEPS, None)
    steps = recorder.steps
    assert [s.boundary for s in steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    sizes = [s.state_bytes for s in steps]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4] == sizes[5] > sizes[6]
    for before, after in zip(steps, steps[1:], strict=False):
        for name, weight in after.weights.items():
            changed = not torch.equal(weight, before.weights[name])
            assert changed == (name in after.gradients), name
    assert "'stage': 3" in capsys.readouterr().out
    assert handle_of(trainer.model) is None
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert all(module.training for module in trainer.model.modules())


def _adapted(kind: str) -> nn.Module:
    model = tiny_model("bert-sequence", dropout=True)
    torch.manual_seed(3)
    if kind == "lora":
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    else:
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:gradient checkpointing with use_reentrant=True")
def test_checkpointing_ends_with_the_same_weights(tmp_path, adapted, reentrant):
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    ends, recorders = [], []
    for arguments in ({}, {"gradient_checkpointing": True, **options}):
        recorders.append(recorder := _Recorder())
        trainer = _trainer(
            tmp_path,
            model=_adapted("lora") if adapted else None,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
            **arguments,
        )
        trainer.train()
        ends.append(_weights(trainer))
    assert [s.boundary for s in recorders[1].steps] == [0, 0, 1, 1, 2, 2, 3, 3]
    for plain, checkpointed in zip(recorders[0].steps, recorders[1].steps, strict=True):
        assert plain.gradients == checkpointed.gradients
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-5)


def test_columns_of_frozen_blocks_are_right_in_every_checkpoint(tmp_path):
    model = _adapted("prefix")
    table = model.prompt_encoder["default"].embedding.weight  # (virtual tokens, L * 2 * C)
    width = table.shape[1] // 4
    seen = []

    class _Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(table.detach().clone())

    _trainer(
        tmp_path,
        model=model,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), _Look()],
        save_strategy="steps",
        save_steps=1,
        max_grad_norm=0.0,
    ).train()
    assert len(seen) == STEPS
    for step in range(1, STEPS):
        frozen = step // 2 * width  # two steps a stage, one block less at each
        assert torch.equal(seen[step][:, :frozen], seen[step - 1][:, :frozen])
        assert not torch.equal(seen[step][:, frozen:], seen[step - 1][:, frozen:])


@pytest.mark.parametrize("saved_at", [3, 4, 5])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, saved_at):
    straight = _trainer(tmp_path / "a", callbacks=[ProgtuningCallback(ProgressiveSchedule(4))])
    straight.train()
    arguments = dict(save_strategy="steps", save_steps=saved_at)
    _trainer(
        tmp_path / "b", callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], **arguments
    ).train()
    resumed = _trainer(
        tmp_path / "b", callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], **arguments
    )
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{saved_at}"))
    expected = _weights(straight)
    assert all(torch.equal(w, expected[n]) for n, w in _weights(resumed).items())


def test_masked_adamw_clips_once_and_ends_where_torch_does(tmp_path):
    runs = []
    for optimizer, trainer_clips_at in ((None, 0.05), ((MaskedAdamW, {"lr": 1e-2}), 0.0)):
        recorder = _Recorder()
        trainer = _trainer(
            tmp_path,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
            optimizer=optimizer,
            max_grad_norm=0.05,
        )
        trainer.train()
        assert {step.trainer_clips_at for step in recorder.steps} == {trainer_clips_at}
        assert trainer.args.max_grad_norm == 0.05
        runs.append(_weights(trainer))
    unclipped = _trainer(
        tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(4))], max_grad_norm=0.0
    )
    unclipped.train()
    theirs, ours = runs
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5)
    assert any((w - theirs[n]).abs().max() > 1e-3 for n, w in _weights(unclipped).items())


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_updates_inside_backward_wait_for_the_window(tmp_path, clip):
    """Three micro-batches per step, the last window of an epoch shorter: the same weights."""
    weights = []
    for in_backward in (False, True):
        optimizer = (MaskedAdamW, {"lr": 1e-2, "in_backward": in_backward})
        trainer = _trainer(
            tmp_path,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(2))],
            optimizer=optimizer,
            gradient_accumulation_steps=4,
            max_grad_norm=clip,
        )
        trainer.train()
        weights.append(_weights(trainer))
        assert all(p.grad is None for p in trainer.model.parameters())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


def test_training_twice_starts_over(tmp_path):
    recorder = _Recorder()
    trainer = _trainer(
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
    broken = _trainer(tmp_path, callbacks=callbacks, optimizer=optimizer, max_grad_norm=0.05)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert handle_of(broken.model) is not None
    again = _trainer(
        tmp_path,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(2))],
        optimizer=optimizer,
        max_grad_norm=0.05,
    )
    again.model, again.args = broken.model, broken.args
    again.train()
    assert handle_of(again.model) is None and again.args.max_grad_norm == 0.05


def test_the_users_own_patch_is_not_taken_away(tmp_path):
    trainer = _trainer(tmp_path, callbacks=[ProgtuningCallback(ProgressiveSchedule(4))])
    handle = patch_model(trainer.model, ProgressiveSchedule(2, 8))
    with pytest.raises(ValueError, match="patched already"):
        trainer.train()
    assert handle_of(trainer.model) is handle


def test_keep_is_kept_under_the_trainer(tmp_path):
    optimizer = (MaskedAdamW, {"lr": 1e-2, "on_freeze": "keep"})
    recorder = _Recorder()
    callbacks = [ProgtuningCallback(ProgressiveSchedule(4)), recorder]
    _trainer(tmp_path, callbacks=callbacks, optimizer=optimizer).train()
    assert len({step.state_bytes for step in recorder.steps}) == 1


@pytest.mark.parametrize(
    ("world_size", "n_gpu", "message"), [(2, 1, "2 processes"), (1, 2, "over 2 GPUs")]
)
def test_several_processes_and_gpus_are_refused(world_size, n_gpu, message):
    callback = ProgtuningCallback(ProgressiveSchedule(2))
    arguments = SimpleNamespace(world_size=world_size, n_gpu=n_gpu)
    with pytest.raises(RuntimeError, match=message):
        callback.on_train_begin(arguments, None, None, model=tiny_model("bert-qa"), optimizer=None)
