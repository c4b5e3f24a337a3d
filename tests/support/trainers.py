"""A small run of transformers.Trainer, and a callback that looks at its steps."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tiny_models import BATCH, tiny_inputs, tiny_model
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainingArguments

from progtuning_kernels.optim import state_bytes
from progtuning_kernels.patch import handle_of

QUIET = dict(
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
)
STEPS = 8


class Recorder(TrainerCallback):
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
                norm=float(
                    get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
                ),
                stochastic={n for n, m in model.named_modules() if m.training},
                weights={n: p.detach().clone() for n, p in model.named_parameters()},
            )
        )


def rows_of(name: str) -> list[dict[str, torch.Tensor]]:
    rows = []
    for seed in range(6):
        inputs = tiny_inputs(name, seed=seed)
        rows += [{k: v[i] for k, v in inputs.items()} for i in range(BATCH)]
    return rows


def trainer_of(
    folder,
    *,
    model=None,
    callbacks=(),
    steps: int = STEPS,
    optimizer=None,
    rows=None,
    compute_metrics=None,
    **arguments,
) -> Trainer:
    rows = rows_of("bert-sequence") if rows is None else rows
    return Trainer(
        tiny_model("bert-sequence", dropout=True) if model is None else model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            learning_rate=1e-2,
            weight_decay=0.1,
            report_to="none",
            use_cpu=True,
            seed=7,
            **{
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "lr_scheduler_type": "linear",
                "disable_tqdm": True,
                "save_strategy": "no",
                **arguments,
            },
        ),
        train_dataset=rows,
        eval_dataset=rows[:BATCH],
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=optimizer,
    )


def sft_trainer(folder, tokenizer, *, callbacks, peft_config=None, **arguments):
    """TRL's trainer of a tiny Llama, on 24 rows of 4 to 12 words."""
    import datasets
    import trl

    rows = [{"text": " ".join(f"w{(7 * i + j) % 90}" for j in range(4 + i % 9))} for i in range(24)]
    return trl.SFTTrainer(
        model=tiny_model("llama-causal-lm"),
        args=trl.SFTConfig(
            output_dir=str(folder),
            bf16=False,
            **QUIET,
            **arguments,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
