"""TRL's SFTTrainer is a Trainer: the callback alone is enough, with LoRA and without."""

from __future__ import annotations

import peft
import pytest
from trainers import sft_trainer
from transformers import TrainerCallback

from progtuning_kernels import ProgressiveSchedule
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.optim import state_bytes
from progtuning_kernels.patch import handle_of

pytest.importorskip("trl")
pytest.importorskip("datasets")

STEPS = 8


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.boundaries: list[int] = []
        self.gradients: list[set[str]] = []
        self.state_bytes: list[int] = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.boundaries.append(handle_of(model).boundary)
        self.gradients.append({n for n, p in model.named_parameters() if p.grad is not None})
        self.state_bytes.append(state_bytes(optimizer))
        handle_of(model).truncation_report().assert_truncated()


@pytest.mark.parametrize("adapted", [False, True])
def test_supervised_fine_tuning(tmp_path, word_tokenizer, adapted):
    recorder = _Recorder()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = sft_trainer(
        tmp_path,
        word_tokenizer,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(4)), recorder],
        peft_config=lora if adapted else None,
        max_steps=STEPS,
        max_length=24,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in trainable) == adapted
    trainer.train()
    assert recorder.boundaries == [0, 0, 1, 1, 2, 2, 3, 3]
    assert recorder.gradients[0] == trainable
    for step, names in enumerate(recorder.gradients):
        blocks = {
            int(name.split("layers.")[1].split(".")[0]) for name in names if "layers." in name
        }
        assert min(blocks) == step // 2 and max(blocks) == 3
    sizes = recorder.state_bytes
    assert sizes[0] > sizes[2] > sizes[4] > sizes[6]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["boundary"] for log in logs] == recorder.boundaries
    assert handle_of(trainer.model) is None
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == trainable
