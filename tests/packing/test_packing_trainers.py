"""Packing under the Trainer, Accelerate, TRL and sentence-transformers, whose loops stay as they
are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from tiny_models import BATCH, tiny_inputs, tiny_model
from torch import nn
from trainers import sft_trainer, trainer_of, weights_of
from transformers import DataCollatorWithFlattening, TrainerCallback

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, ProgressiveSchedule, patch_model
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.patch import handle_of

BERT, LLAMA = "bert-sequence", "llama-causal-lm"
CLOSE = dict(rtol=1e-5, atol=1e-5)


class Reports(TrainerCallback):
    """The packing report at the last step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.last = handle_of(model).packing_report()


def both(train: Any, **close: float) -> Any:
    """`train(packing)` gives weights, losses and a report; the report of the packed run."""
    (weights, losses, report), (others, expected, padded) = train("on"), train("off")
    assert padded.batches == 0
    assert losses == pytest.approx(expected, abs=1e-4)
    for name, weight in others.items():
        torch.testing.assert_close(weights[name], weight, **(close or CLOSE))
    return report


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 3},
        {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
)
def test_the_trainer(tmp_path, arguments):
    def train(packing: str) -> Any:
        callback = ProgtuningCallback(ProgressiveSchedule(4), packing=packing)
        trainer = trainer_of(
            tmp_path,
            model=tiny_model(BERT),
            callbacks=[callback, reports := Reports()],
            adam_epsilon=1e-3,
            **arguments,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return weights_of(trainer), losses, reports.last

    coarse = dict(rtol=2e-2, atol=1e-2) if "bf16" in arguments else {}
    report = both(train, **coarse)
    if "torch_compile" in arguments:
        assert report.batches == 0
        assert "torch.compile runs as a whole" in str(report)
        return
    assert report.batches >= 8 + 2 * ("eval_strategy" in arguments), report
    assert not report.padded


@pytest.mark.usefixtures("no_accelerator_of_another_test")
@pytest.mark.parametrize("order", ["patch, prepare", "prepare, patch"])
def test_accelerate(order):
    def train(packing: str) -> Any:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, schedule = tiny_model(BERT), ProgressiveSchedule(3, 4)
        if order == "patch, prepare":
            handle = patch_model(model, schedule, packing=packing)
            model = accelerator.prepare(model)
        else:
            model = accelerator.prepare(model)
            handle = patch_model(model, schedule, packing=packing)
        optimizer = accelerator.prepare(MaskedAdamW(handle.param_groups(), lr=1e-2, eps=1e-3))
        losses = []
        for step in range(8):
            with accelerator.accumulate(model):
                loss = model(**tiny_inputs(BERT, seed=step)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                handle.advance()
            losses.append(loss.item())
        weights = {n: p.detach().clone() for n, p in handle.model.named_parameters()}
        return weights, losses, handle.packing_report()

    assert both(train).batches == 8


def test_a_model_spread_over_devices_stays_padded():
    def train(packing: str) -> Any:
        model = tiny_model(BERT)
        places = {"bert.embeddings": "cpu", "bert.pooler": "cpu", "classifier": "cpu"}
        places |= {f"bert.encoder.layer.{i}": "cpu" for i in range(4)}
        dispatch_model(model, places, main_device="cpu", force_hooks=True)
        handle = patch_model(model, MilestoneSchedule({0: 1}), packing=packing)
        loss = model(**tiny_inputs(BERT)).loss
        loss.backward()
        weights = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return weights, [loss.item()], handle.packing_report()

    report = both(train)
    assert report.batches == 0
    assert "has a forward of its own, as accelerate gives it" in str(report)


def flattened(name: str, seed: int) -> dict[str, torch.Tensor]:
    """Rows of a batch one after the other, position ids that start again, and no mask."""
    inputs = tiny_inputs(name, seed=seed)
    rows = [
        {"input_ids": ids[: int(mask.sum())].tolist()}
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    return dict(DataCollatorWithFlattening()(rows))


def test_rows_that_are_packed_already_are_left_alone():
    def train(packing: str) -> Any:
        handle = patch_model(tiny_model(LLAMA), MilestoneSchedule({0: 1}), packing=packing)
        losses = []
        for seed in range(3):
            loss = handle.model(**flattened(LLAMA, seed)).loss
            loss.backward()
            losses.append(loss.item())
        named = handle.model.named_parameters()
        gradients = {n: p.grad for n, p in named if p.grad is not None}
        return gradients, losses, handle.packing_report()

    report = both(train)
    assert report.batches == 0
    assert "no attention_mask of shape (B, T) was passed" in str(report)


class _Swap:
    """Forwards of single modules, as `use_liger_kernel=True` binds them to instances."""

    @staticmethod
    def norm(self: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)

    @staticmethod
    def mlp(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate, up = (linear(x.view(-1, x.shape[-1])) for linear in (self.gate_proj, self.up_proj))
        return self.down_proj(nn.functional.silu(gate) * up).view(x.shape)


@pytest.mark.parametrize("patched_first", [False, True])
def test_modules_with_forwards_of_their_own(patched_first):
    def swap(model: nn.Module) -> None:
        for module in model.modules():
            name = type(module).__name__
            if name in ("LlamaRMSNorm", "LlamaMLP"):
                forward = _Swap.norm if name == "LlamaRMSNorm" else _Swap.mlp
                module.forward = forward.__get__(module, type(module))

    def train(packing: str) -> Any:
        model = tiny_model(LLAMA)
        if not patched_first:
            swap(model)
        handle = patch_model(model, MilestoneSchedule({0: 1}), packing=packing)
        if patched_first:
            swap(model)
        losses = []
        for seed in range(3):
            loss = model(**tiny_inputs(LLAMA, seed=seed)).loss
            loss.backward()
            losses.append(loss.item())
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return gradients, losses, handle.packing_report()

    assert both(train).batches == 3


@pytest.mark.parametrize("padding_free", [False, True])
def test_supervised_fine_tuning(tmp_path, word_tokenizer, padding_free):
    pytest.importorskip("trl"), pytest.importorskip("datasets")

    def train(packing: str) -> Any:
        reports = Reports()
        trainer = sft_trainer(
            tmp_path,
            word_tokenizer,
            callbacks=[ProgtuningCallback(ProgressiveSchedule(2), packing=packing), reports],
            max_steps=4,
            max_length=None,
            padding_free=padding_free,
            per_device_train_batch_size=3,
            adam_epsilon=1e-3,
        )
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return weights_of(trainer), losses, reports.last

    report = both(train)
    assert report.batches == (0 if padding_free else 4), report
    assert ("no attention_mask of shape (B, T) was passed" in str(report)) == padding_free


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_sentence_vectors(model_folders, pooling):
    """A contrastive loss: two forwards before one backward."""
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    texts = [[f"w{7 * i + j} " * (2 + 3 * i) for i in range(BATCH)] for j in range(8)]

    def train(packing: str) -> Any:
        torch.manual_seed(0)
        folder = str(model_folders["bert-without-dropout"])
        inner = modules.Transformer(folder, max_seq_length=32)
        model = st.SentenceTransformer(
            modules=[inner, modules.Pooling(32, pooling_mode=pooling)], device="cpu"
        ).train()
        handle = patch_model(model, MilestoneSchedule({2: 2}), packing=packing)
        optimizer = MaskedAdamW(handle.param_groups(), lr=1e-2, eps=1e-3)
        losses = []
        for step in range(4):
            sides = [model.tokenize(texts[2 * step + side]) for side in range(2)]
            a, b = (model(dict(side))["sentence_embedding"] for side in sides)
            scores = nn.functional.cosine_similarity(a[:, None], b[None], dim=-1) * 5
            loss = nn.functional.cross_entropy(scores, torch.arange(len(a)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
            losses.append(loss.item())
        handle.model.eval()
        vectors = torch.as_tensor(model.encode(texts[0]))
        weights = {n: p.detach().clone() for n, p in handle.model.named_parameters()}
        return {**weights, "encoded": vectors}, losses, handle.packing_report()

    report = both(train)
    assert report.batches == 9, report
