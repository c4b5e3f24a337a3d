"""Masked LM: rows of plain text, masks that stay or move, perplexity, guesses for a mask."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest
import torch
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from task_runs import task_of, train_and_predict
from tiny_folders import sentence_tokenizer

from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.tasks.plain_text import join_and_cut, perplexity, row_losses


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(2, 12))
@settings(max_examples=20, phases=[Phase.generate])
def test_texts_are_joined_and_cut(lengths, max_length):
    texts = [" ".join(f"w{(i + j) % 90}" for j in range(n)) for i, n in enumerate(lengths)]
    tokenizer = sentence_tokenizer()
    joined = tokenizer(" [SEP] ".join([*filter(None, texts), ""]), add_special_tokens=False)
    whole = len(joined["input_ids"]) // max_length
    rows = Dataset.from_dict({"body": texts})
    if not whole:
        with pytest.raises(UserError, match=f"shorter than one row of {max_length} tokens"):
            join_and_cut(rows, tokenizer, max_length, column="body")
        return
    cut = join_and_cut(rows, tokenizer, max_length, column="body")
    assert cut.column_names == ["input_ids"] and {*map(len, cut["input_ids"])} == {max_length}
    assert [*chain.from_iterable(cut["input_ids"])] == joined["input_ids"][: whole * max_length]


def test_rows_go_on_from_one_batch_of_texts_to_the_next():
    rows = Dataset.from_dict({"text": ["w1 w2"] * 2500})  # read 1,000 at a time
    cut = join_and_cut(rows, sentence_tokenizer(), 7)
    assert len(cut) == 2500 * 3 // 7
    assert [*chain.from_iterable(cut["input_ids"])] == ([5, 6, 3] * 2500)[: 7 * len(cut)]


def test_losses_are_summed_by_row_and_perplexity_is_of_all_tokens():
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2, 3, 3).bfloat16()
    labels = torch.tensor([[0, -100, 1], [-100, -100, -100]])
    losses = row_losses(logits, labels)
    expected = torch.tensor([[math.log(8), 2], [0, 0]])
    torch.testing.assert_close(losses, expected, atol=1e-2, rtol=0)
    assert perplexity(losses.numpy()) == pytest.approx(math.sqrt(8), rel=1e-2)


def _texts(count: int) -> list[dict]:
    """Each has 14 times the same of six words."""
    draw = random.Random(count)
    return [{"text": " ".join([f"w{draw.randrange(6)}"] * 14)} for _ in range(count)]


def test_masks_of_validation_rows_stay_and_those_of_training_rows_move():
    rows, tokenizer = _texts(40), sentence_tokenizer()
    options = {"max_length": 15, "mlm_probability": 0.3}
    task = task_of("masked-lm", options, train=rows, validation=rows)
    split = Dataset.from_list(rows)
    one, two = (task.encode(split, tokenizer, None, "validation") for _ in range(2))
    assert one[:] == two[:]
    train, collate = task.encode(split, tokenizer, None, "train"), task.collator(tokenizer, None)
    state = torch.get_rng_state()
    first, second = collate([*train]), collate([*train][::-1])  # as another epoch has them
    assert torch.equal(torch.get_rng_state(), state)
    second = {name: tensor.flip(0) for name, tensor in second.items()}
    assert not torch.equal(first["labels"], second["labels"])
    ids = torch.tensor(train["input_ids"][:])
    for batch in (first, second, collate([*one])):
        masked = batch["labels"] != -100
        assert 0.25 < masked[:, :-1].float().mean() < 0.35
        assert not masked[ids == tokenizer.sep_token_id].any()
        assert torch.equal(batch["labels"][masked], ids[masked])
        assert torch.equal(batch["input_ids"][~masked], ids[~masked])
        replaced = (batch["input_ids"][masked] == tokenizer.mask_token_id).float().mean()
        assert 0.7 < replaced < 0.9


@pytest.mark.parametrize(
    "split, text, message",
    [
        ("train", "w1 [MASK]", "train row 2 holds a \\[MASK\\], which training puts in itself"),
        ("predict", "w1 w2", "predict row 2 has no \\[MASK\\]"),
        ("predict", "w1 " * 31 + "[MASK]", "predict row 2: no mask within --max-length 32"),
        ("predict", " ", "predict row 2 has no value for column 'text'"),
    ],
)
def test_a_bad_row_is_one_line(split, text, message):
    rows = [{"text": "w1 [MASK]" if split == "predict" else "w1 w2"}, {"text": text}]
    with pytest.raises(UserError, match=message) as error:
        task = task_of("masked-lm", **{split: rows})
        task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, split)
    assert "\n" not in str(error.value)


def test_bad_options_and_texts_are_one_line():
    rows = [{"text": "w1 w2"}]
    with pytest.raises(UserError, match="--mlm-probability is between 0 and 1, got 1"):
        task_of("masked-lm", {"mlm_probability": 1.0}, train=rows)
    with pytest.raises(UserError, match="train row 1, column 'text' holds 7, which is no text"):
        task_of("masked-lm", train=[{"text": 7}])
    options = {"max_length": 2, "mlm_probability": 1e-9}
    task = task_of("masked-lm", options, train=rows, validation=rows)
    split, tokenizer = Dataset.from_list(rows), sentence_tokenizer()
    with pytest.raises(UserError, match="no token of the validation text was masked"):
        task.encode(split, tokenizer, None, "validation")
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        task.encode(split, tokenizer, None, "train")


def test_it_learns_and_answers(tmp_path):
    rows = [{"text": "w3 w3 [MASK] w3 w3"}, {"text": "[MASK] w5 w5 w5 w5 [MASK] w5"}]
    splits = {"train": _texts(256), "validation": _texts(40)}
    options = ("--max-length", 15, "--epochs", 4, "--mlm-probability", 0.3)
    run = train_and_predict("masked-lm", tmp_path, *options, predict=rows, **splits)
    assert 1 < run.figures["perplexity"] < 6
    for row, expected in zip(run.answers, (["w3"], ["w5", "w5"]), strict=True):
        assert [guesses[0]["token"] for guesses in row["masks"]] == expected
    scores = [guess["score"] for guess in run.answers[0]["masks"][0]]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True) and sum(scores) < 1

    with torch.no_grad():
        logits = run.model(**sentence_tokenizer()(rows[0]["text"], return_tensors="pt")).logits
    assert scores == pytest.approx(logits[0, 3].softmax(-1).topk(5).values.tolist(), rel=1e-4)
