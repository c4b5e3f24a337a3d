"""Micro-batches of rows of like length, and the loss of a step that they make up."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch.utils.data import DataLoader
from trainers import rows_of, trainer_of, weights_of

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule
from progtuning_kernels.cli.length_batches import EpochOfBatches, LengthBatches
from progtuning_kernels.cli.options import TrainOptions
from progtuning_kernels.cli.step_loss import mean_over_step
from progtuning_kernels.cli.tasks.masked_lm import MaskedLM
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback


def _epoch(batches: LengthBatches, number: int) -> list[list[int]]:
    batches.set_epoch(number)
    return list(batches)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200),
    size=st.sampled_from([{"rows": 3}, {"tokens": 32}, {"tokens": 100}]),
    accumulate=st.integers(1, 3),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_an_epoch_has_every_row_once_and_keeps_the_budget(lengths, size, accumulate, ranks, seed):
    options = size | {"accumulate": accumulate, "ranks": ranks, "seed": seed}
    batches = LengthBatches(lengths, **options)
    again = LengthBatches(lengths, **options)
    for number in (2, 0, 1):
        epoch = _epoch(batches, number)
        assert epoch == _epoch(again, number) == list(again)
        assert len(epoch) == len(batches) and len(epoch) % ranks == 0
        repeated = next(
            n for n in range(ranks) if sum(map(len, epoch[: len(epoch) - n])) == len(lengths)
        )
        counts = Counter(itertools.chain.from_iterable(epoch[: len(epoch) - repeated]))
        assert counts == Counter(range(len(lengths)))
        distinct = epoch[: len(epoch) - repeated]
        assert epoch[len(distinct) :] == [distinct[i % len(distinct)] for i in range(repeated)]
        for batch in epoch:
            assert len(batch) <= size.get("rows", len(batch))
            longest = max(lengths[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= size.get("tokens", 1 << 30)


def test_epochs_and_seeds_differ_and_windows_hold_rows_of_like_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 128, (2000,), generator=generator).tolist()
    for size, most in (({"rows": 8}, 1.2), ({"tokens": 1024}, 1.1)):
        batches = LengthBatches(lengths, accumulate=2, ranks=2, **size)
        first = _epoch(batches, 0)
        assert first != _epoch(batches, 1)
        assert first != _epoch(LengthBatches(lengths, accumulate=2, ranks=2, seed=1, **size), 0)
        # rows meet others in the next epoch
        assert not {frozenset(b) for b in first} & {frozenset(b) for b in _epoch(batches, 1)}
        places = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
        assert places < most * sum(lengths)
        for start in range(0, len(first) - 4, 4):  # the four micro-batches of a step
            longest = [max(lengths[i] for i in batch) for batch in first[start : start + 4]]
            assert min(longest) > 0.6 * max(longest) - 8
    # and a budget of tokens is used: 1,024 of real tokens are 102,400 places in 100 micro-batches
    assert sum(lengths) > 0.85 * 1024 * len(batches)


def test_rows_have_the_order_that_earlier_versions_had():
    lengths = [5, 9, 2, 7, 7, 3, 8, 1, 4, 6]
    batches = LengthBatches(lengths, rows=2, accumulate=2, seed=3)
    assert [_epoch(batches, number) for number in (0, 1)] == [
        [[1, 4], [0, 5], [6, 3], [8, 2], [9, 7]],
        [[1, 6], [9, 5], [4, 3], [0, 8], [2, 7]],
    ]


@pytest.mark.parametrize("size", [{}, {"rows": 2, "tokens": 64}])
def test_rows_or_tokens(size):
    with pytest.raises(ValueError, match="either rows or tokens"):
        LengthBatches([1, 2], **size)


def _trainer(
    folder, *, size=None, name="bert-sequence", rows=None, data_collator=None, **arguments
):
    rows = rows_of(name)[:17] if rows is None else rows
    lengths = [int(sum(row.get("attention_mask", row["input_ids"]))) for row in rows]
    accumulate = arguments.get("gradient_accumulation_steps", 1)
    batches = LengthBatches(lengths, **(size or {"rows": 4}), accumulate=accumulate, seed=5)
    trainer = trainer_of(
        folder,
        model=tiny_model(name, dropout=True),
        rows=rows,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(3)), EpochOfBatches(batches)],
        optimizer=(MaskedAdamW, {"lr": 1e-2}),
        **arguments,
    )
    loader = DataLoader(
        rows, batch_sampler=batches, collate_fn=data_collator or trainer.data_collator
    )
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(loader)
    mean_over_step(trainer)
    return trainer


@pytest.mark.parametrize(("size", "accumulate"), [({"rows": 4}, 2), ({"tokens": 40}, 1)])
def test_a_run_that_resumes_at_any_step_ends_with_the_same_bits(tmp_path, size, accumulate):
    options = dict(size=size, gradient_accumulation_steps=accumulate, steps=7)
    straight = _trainer(tmp_path, save_strategy="steps", save_steps=1, **options)
    straight.train()
    losses = [log["loss"] for log in straight.state.log_history if "loss" in log]
    for step in (2, 5):
        resumed = _trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == losses
        expected = weights_of(straight)
        assert all(torch.equal(w, expected[n]) for n, w in weights_of(resumed).items()), step


def _masking(tokenizer):
    """The collator of masked LM, and rows for it."""
    tokenizer.mask_token = "w1"
    texts = [" ".join(f"w{(7 * i + j) % 80 + 10}" for j in range(8)) for i in range(17)]
    task = MaskedLM(TrainOptions(), {"train": Dataset.from_dict({"text": texts})})
    return task.collator(tokenizer, None), [
        {"input_ids": tokenizer(text).input_ids} for text in texts
    ]


def test_masks_are_those_of_the_batch_in_a_run_that_resumes(tmp_path, word_tokenizer):
    collate, rows = _masking(copy.deepcopy(word_tokenizer))
    options = dict(name="bert-masked-lm", rows=rows, data_collator=collate, steps=7)
    straight = _trainer(tmp_path, save_strategy="steps", save_steps=7 // 2, **options)
    straight.train()
    resumed = _trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    expected = weights_of(straight)
    assert all(torch.equal(w, expected[n]) for n, w in weights_of(resumed).items())
    torch.manual_seed(1)
    first = collate(rows[:4])
    again, other = collate(rows[:4]), collate(rows[1:5])
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"][1:] == -100, other["labels"][:3] == -100)


@pytest.mark.parametrize("name", ["bert-sequence", "bert-masked-lm", "t5-seq2seq-lm", "bert-qa"])
def test_micro_batches_make_up_the_loss_of_one_batch(tmp_path, name):
    logs = []
    for rows, accumulate in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(
            tmp_path,
            model=tiny_model(name),
            rows=rows_of(name),
            steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=1e9,
        )
        mean_over_step(trainer)
        trainer.train()
        logs.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert logs[2] == pytest.approx(logs[0], rel=1e-4)


def test_a_micro_batch_without_labels_counts_nothing(tmp_path):
    rows = rows_of("bert-masked-lm")[:2]
    rows[1] = rows[1] | {"labels": torch.full_like(rows[1]["labels"], -100)}
    logs = []
    for batch, accumulate in ((2, 1), (1, 2)):
        trainer = trainer_of(
            tmp_path,
            model=tiny_model("bert-masked-lm"),
            rows=rows,
            steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            logging_nan_inf_filter=False,
        )
        mean_over_step(trainer)
        trainer.train()
        logs.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
