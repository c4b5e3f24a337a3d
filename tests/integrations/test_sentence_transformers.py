"""Trainers of sentence-transformers end with the weights that freezing by hand gives."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_folders import save_model
from trainers import QUIET
from transformers import TrainerCallback

from progtuning_kernels import (
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    patch_model,
)
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots
from progtuning_kernels.patch import handle_of

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
# below what skips this file: they are missing where that is
from sentence_transformers.cross_encoder import losses as pair_losses  # noqa: E402
from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402

STEPS = 9
CLOSE = dict(rtol=1e-4, atol=1e-5)


class ByHand(TrainerCallback):
    """Freezes as the schedule says, in the plain way."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        layout = find_layout(model)
        plan = ProgressiveSchedule(3, STEPS).plan(state.global_step, layout.num_blocks)
        on = {EMBEDDINGS: plan.embeddings, layout.head: plan.head}
        on |= dict(enumerate(plan.trainable))
        for slot in parameter_slots(model, layout):
            if not all(on[unit] for unit in slot.units):
                slot.parameter.requires_grad_(False)
                slot.parameter.grad = None


def _rows(*columns: str) -> datasets.Dataset:
    draw = random.Random(0)

    def text() -> str:
        return " ".join(f"w{draw.randrange(90)}" for _ in range(draw.randrange(2, 20)))

    kinds = {"score": draw.random, "label": lambda: draw.randrange(2)}
    rows = [{c: kinds.get(c, text)() for c in columns} for _ in range(12)]
    return datasets.Dataset.from_list(rows)


def _vectors(folder) -> st.SentenceTransformer:
    torch.manual_seed(0)
    inner = modules.Transformer(str(folder), max_seq_length=32)
    return st.SentenceTransformer(modules=[inner, modules.Pooling(32)], device="cpu")


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("pairs"), "bert-sequence", dropout=False)


def _scores(folder) -> st.CrossEncoder:
    torch.manual_seed(0)
    ignore = {"ignore_mismatched_sizes": True}
    return st.CrossEncoder(str(folder), num_labels=1, device="cpu", model_kwargs=ignore)


def _matryoshka(model):
    return losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16])


TEXTS = ("anchor", "positive", "negative")
CASES = {
    "ranking": (losses.MultipleNegativesRankingLoss, TEXTS),
    "cached": (
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        TEXTS,
    ),
    "cosent": (losses.CoSENTLoss, ("anchor", "positive", "score")),
    "matryoshka": (_matryoshka, TEXTS[:2]),
    "layers": (
        lambda model: losses.AdaptiveLayerLoss(model, losses.CoSENTLoss(model), kl_temperature=0),
        ("anchor", "positive", "score"),
    ),
    "pairs": (pair_losses.BinaryCrossEntropyLoss, ("anchor", "positive", "label")),
    "cached pairs": (
        lambda model: pair_losses.CachedMultipleNegativesRankingLoss(
            model, num_negatives=1, mini_batch_size=2
        ),
        TEXTS[:2],
    ),
}


def _train(tmp_path, model, make_loss, columns, callback, clip=1.0, **arguments):
    pairs = isinstance(model, st.CrossEncoder)
    kind = st.CrossEncoderTrainingArguments if pairs else st.SentenceTransformerTrainingArguments
    torch.manual_seed(1)
    loss = make_loss(model)
    trainer = (st.CrossEncoderTrainer if pairs else st.SentenceTransformerTrainer)(
        model=model,
        args=kind(
            output_dir=str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=4,
            adam_epsilon=1e-3,
            max_grad_norm=clip,
            **QUIET,
        ),
        train_dataset=_rows(*columns),
        loss=loss,
        callbacks=callback,
        **arguments,
    )
    trainer.train()
    return {n: p.detach().clone() for n, p in loss.named_parameters()}, trainer


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_freezing_by_hand(tmp_path, model_folders, pair_folder, case):
    make_loss, columns = CASES[case]
    pairs = "pairs" in case
    new, folder = (_scores, pair_folder) if pairs else (_vectors, _same(model_folders))
    expected, _ = _train(tmp_path, new(folder), make_loss, columns, [ByHand()])
    for options in (
        {"packing": "off", "kernels": "off"},
        {"packing": "on", "cache": PrefixCache(max_bytes=1 << 26)},
    ):
        callback = ProgtuningCallback(ProgressiveSchedule(3), **options)
        reports: list = []
        found, trainer = _train(
            tmp_path, new(folder), make_loss, columns, [callback, _Reports(reports)]
        )
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, **CLOSE)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["boundary"] for log in logs] == [0] * 3 + [1] * 3 + [2] * 3
        if "cache" in options:
            packing, cache = reports[-1]
            assert (packing.batches > 0) == (cache.hits > 0) == (case != "layers")
            handle = callback.handle
            assert handle_of(trainer.model) is None and handle.boundary == 2


def _same(folders):
    return folders["bert-without-dropout"]


class _Reports(TrainerCallback):
    def __init__(self, reports: list) -> None:
        self.reports = reports

    def on_step_end(self, args, state, control, model=None, **kwargs):
        handle = handle_of(model)
        handle.truncation_report().assert_truncated()
        self.reports.append((handle.packing_report(), handle.cache and handle.cache_report()))


def test_cached_losses_draw_the_same_dropout_in_both_passes(tmp_path, model_folders):
    model, made = _vectors(model_folders["bert"]), {False: [], True: []}

    def note(module, args, output):
        handle = handle_of(module)
        beside = handle is None or handle.freezer.packer.busy or handle.cache.busy
        if module.training and not beside:
            vectors = output["sentence_embedding"].detach()
            made[torch.is_grad_enabled()].append((handle.step, vectors))

    model.register_forward_hook(note)
    callback = ProgtuningCallback(
        ProgressiveSchedule(3), packing="on", cache=PrefixCache(max_bytes=1 << 26)
    )
    _train(tmp_path, model, *CASES["cached"], [callback])
    assert len(made[False]) == len(made[True]) == 2 * 3 * STEPS
    for (step, first), (_, second) in zip(made[False], made[True], strict=True):
        if step:  # packing is tried between the two passes of the first step
            torch.testing.assert_close(second, first, **CLOSE)


def test_weights_of_a_loss_that_the_optimizer_has_not_are_refused(tmp_path, model_folders):
    case = (lambda model: losses.SoftmaxLoss(model, 32, 2), ("anchor", "positive", "label"))
    folder, options = _same(model_folders), {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.0}
    callbacks = [ProgtuningCallback(ProgressiveSchedule(3))]
    chosen = {"optimizer_cls_and_kwargs": (MaskedAdamW, options)}
    with pytest.raises(RuntimeError, match="classifier.weight of SoftmaxLoss would not train"):
        _train(tmp_path, _vectors(folder), *case, callbacks, **chosen)
    # the Trainer clips the model's gradients alone, MaskedAdamW those of the loss too
    expected, _ = _train(tmp_path, _vectors(folder), *case, [ByHand()], clip=0.0)
    model = _vectors(folder)
    torch.manual_seed(1)
    loss = case[0](model)  # the cure
    optimizer = MaskedAdamW(loss.parameters(), **options)
    cured = (lambda _: loss, case[1])
    found, _ = _train(tmp_path, model, *cured, callbacks, 0.0, optimizers=(optimizer, None))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **CLOSE)


def test_layers_stay_padded_after_a_loss_that_has_packed(model_folders):
    model, texts = _vectors(_same(model_folders)), [f"w{i} " * (1 + 4 * i) for i in range(6)]

    def loss_of(kind) -> torch.Tensor:
        sides = [model.preprocess(side) for side in (texts[:3], texts[3:])]
        return kind(sides, torch.tensor([0.1, 0.9, 0.5]))

    layers = losses.AdaptiveLayerLoss(
        model, losses.CoSENTLoss(model), n_layers_per_step=-1, kl_temperature=0
    )
    model.train()
    expected = loss_of(layers)
    handle = patch_model(model, MilestoneSchedule({0: 2}), packing="on")
    loss_of(losses.CoSENTLoss(model)).backward()
    assert handle.packing_report().batches
    torch.testing.assert_close(loss_of(layers), expected)
