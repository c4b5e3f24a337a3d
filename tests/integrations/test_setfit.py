"""SetFit hands callbacks objects of its own; its body ends as freezing by hand leaves it."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from progtuning_kernels import PrefixCache, ProgressiveSchedule
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.layout import find_layout, parameter_slots
from progtuning_kernels.patch import handle_of

setfit = pytest.importorskip("setfit")
datasets = pytest.importorskip("datasets")
# below what skips this file: they are missing where that is
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402

STEPS = 8


class ByHand(TrainerCallback):
    def on_step_begin(self, args, state, control, st_model=None, **kwargs):
        layout = find_layout(st_model)
        plan = ProgressiveSchedule(3, STEPS).plan(state.global_step, layout.num_blocks)
        on = {-1: plan.embeddings, layout.head: plan.head, **dict(enumerate(plan.trainable))}
        for slot in parameter_slots(st_model, layout):
            if not all(on[unit] for unit in slot.units):
                slot.parameter.requires_grad_(False)
                slot.parameter.grad = None


def _train(folder, output, callback) -> tuple[dict[str, torch.Tensor], list[dict]]:
    torch.manual_seed(0)
    inner = modules.Transformer(str(folder), max_seq_length=32)
    body = SentenceTransformer(modules=[inner, modules.Pooling(32)], device="cpu")
    rows = [{"text": f"w{i} w{(5 * i) % 90} " * (1 + i % 4), "label": i % 2} for i in range(16)]
    arguments = setfit.TrainingArguments(
        output_dir=str(output),
        max_steps=STEPS,
        batch_size=4,
        body_learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    logs: list[dict] = []

    class Logs(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    seen = logs
    setfit.Trainer(
        model=setfit.SetFitModel(model_body=body, model_head=LogisticRegression()),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[callback, Logs()],
    ).train()
    assert handle_of(body) is None
    return {n: p.detach().clone() for n, p in body.named_parameters()}, logs


def test_the_body_ends_as_freezing_by_hand_leaves_it(tmp_path, model_folders):
    folder = model_folders["bert-without-dropout"]
    expected, _ = _train(folder, tmp_path, ByHand())
    for options in ({}, {"cache": PrefixCache(max_bytes=1 << 26)}):
        callback = ProgtuningCallback(ProgressiveSchedule(3), **options)
        found, logs = _train(folder, tmp_path, callback)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)
        stages = [log["stage"] for log in logs if "embedding_loss" in log and "stage" in log]
        assert stages == [1, 1, 1, 2, 2, 2, 3, 3]
