"""TRL's trainers are Trainers: the callback alone is enough, with LoRA and without."""

from __future__ import annotations

import peft
import pytest
import torch
from tiny_models import tiny_model
from trainers import QUIET, sft_trainer
from transformers import TrainerCallback

from progtuning_kernels import ProgressiveSchedule
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots
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


class ByHand(TrainerCallback):
    """Freezes as the schedule says, in the plain way."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        layout = find_layout(model)
        plan = ProgressiveSchedule(4, 4).plan(state.global_step, layout.num_blocks)
        on = {EMBEDDINGS: plan.embeddings, layout.head: plan.head}
        on |= dict(enumerate(plan.trainable))
        for slot in parameter_slots(model, layout):
            if not all(on[unit] for unit in slot.units):
                slot.parameter.requires_grad_(False)
                slot.parameter.grad = None


def _rewards(completions, **kwargs) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


def _trainer(kind, folder, tokenizer, callback):
    import datasets
    import trl
    from trl.experimental import kto

    trainer, config, more = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {}),
        "kto": (kto.KTOTrainer, kto.KTOConfig, {}),
        "reward": (trl.RewardTrainer, trl.RewardConfig, {}),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig, dict(num_generations=2, beta=0.0)),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig, dict(num_generations=2, beta=0.0)),
    }[kind]
    online = kind in ("grpo", "rloo")
    arguments = config(
        output_dir=str(folder),
        max_steps=4,
        adam_epsilon=1e-3,
        bf16=False,
        **QUIET,
        per_device_train_batch_size=4,
        **({"max_completion_length": 4} if online else {}),
        **more,
    )

    def text(start: int, words: int) -> str:
        return " ".join(f"w{(7 * start + 3 * j) % 90}" for j in range(words))

    rows = [
        {
            "prompt": text(i, 3 + i % 4),
            "chosen": " " + text(i + 1, 2 + i % 3),
            "rejected": " " + text(i + 5, 3),
            "completion": " " + text(i + 1, 2 + i % 3),
            "label": bool(i % 2),
        }
        for i in range(16)
    ]
    columns = {"kto": ["prompt", "completion", "label"]}.get(kind, ["prompt", "chosen", "rejected"])
    data = datasets.Dataset.from_list(rows).select_columns(["prompt"] if online else columns)
    model = tiny_model("llama-causal-lm" if kind != "reward" else "llama-sequence")
    if kind == "reward":
        model.config.num_labels, model.num_labels = 1, 1
        torch.manual_seed(0)
        model.score = torch.nn.Linear(model.config.hidden_size, 1, bias=False)
    given = {"reward_funcs": _rewards} if online else {}
    if kind in ("dpo", "kto"):
        given["ref_model"] = tiny_model("llama-causal-lm")
    return trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
        **given,
    )


@pytest.mark.parametrize("kind", ["dpo", "kto", "reward", "grpo", "rloo"])
def test_other_trainers_end_with_the_weights_of_freezing_by_hand(tmp_path, word_tokenizer, kind):
    expected = _trainer(kind, tmp_path, word_tokenizer, ByHand())
    expected.train()
    callback = ProgtuningCallback(ProgressiveSchedule(4), packing="on", cache="auto")
    found = _trainer(kind, tmp_path, word_tokenizer, callback)
    found.train()
    logs = [log for log in found.state.log_history if "loss" in log]
    assert [log["boundary"] for log in logs] == [0, 1, 2, 3]
    assert callback.handle.packing_report().batches
    weights = dict(found.model.named_parameters())
    for name, weight in expected.model.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-5)
