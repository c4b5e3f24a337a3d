"""The loss of an optimizer step of a Trainer: one mean over all its labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer


def mean_over_step(trainer: Trainer) -> None:
    """Weigh each micro-batch of `trainer` by its labels, over those of the step and of all ranks.

    The Trainer leaves that to models whose forward takes `**kwargs`. T5 and most heads of encoders
    take them and do not do it, and transformers 5.23 sums up their means: two micro-batches or two
    ranks double the gradient. A model whose targets are not called `labels` keeps the Trainer's
    loss.
    """
    compute = trainer.compute_loss
    shifts = getattr(trainer, "_loss_shifts_labels", False)  # transformers 5.0 has it not

    def compute_loss(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is None:
            return compute(model, inputs, return_outputs=return_outputs)
        labels = inputs["labels"]
        count = (labels[..., 1:] if shifts else labels).ne(-100).sum()
        # the mean over no label is NaN: such a micro-batch gets labels, and no weight
        inputs = {**inputs, "labels": torch.where(count > 0, labels, labels.clamp(min=0))}
        loss, outputs = compute(model, inputs, return_outputs=True)
        over_ranks = trainer.args.average_tokens_across_devices
        loss = loss * (count / num_items_in_batch)
        loss = loss * trainer.accelerator.num_processes if over_ranks else loss
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
