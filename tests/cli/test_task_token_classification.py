"""Token classification: which pieces have labels, figures, answers, and every bad row one line."""

from __future__ import annotations

import random

import numpy as np
import pytest
import transformers
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from task_runs import task_of, train_and_predict
from tiny_folders import sentence_tokenizer

from progtuning_kernels.cli.errors import UserError

ROWS = [
    {"tokens": ["w1", "w2", "w3"], "ner_tags": ["B-PER", "I-PER", "O"]},
    {"tokens": ["w4"], "ner_tags": ["B-LOC"]},
]


def byte_tokenizer(**settings) -> transformers.PreTrainedTokenizerFast:
    """RoBERTa's, with a piece for every byte: "Ġ" is the space before a word."""
    from tokenizers import pre_tokenizers

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces += sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return transformers.RobertaTokenizerFast(vocab=vocabulary, merges=[], **settings)


WORDS = st.lists(st.text("abcü€", min_size=1, max_size=4), min_size=1, max_size=8)


@given(WORDS, st.integers(4, 40), st.booleans())
@settings(max_examples=20, phases=[Phase.generate])
def test_the_first_piece_of_a_word_has_its_label(words, max_length, prefix_space):
    names = [f"t{i}" for i in range(8)]
    labels = names[: len(words)]
    rows = [{"tokens": words, "tags": labels}, {"tokens": ["a"] * 8, "tags": names}]
    tokenizer = byte_tokenizer(add_prefix_space=prefix_space)
    task = task_of("token-classification", {"max_length": max_length}, train=rows)
    encoded = task.encode(Dataset.from_list(rows), tokenizer, None, "train")[0]
    plain = tokenizer(" ".join(words), truncation=True, max_length=max_length)
    assert encoded["input_ids"] == plain["input_ids"]
    starts = [len(" ".join(words[:i]).encode()) for i in range(len(words))]
    if prefix_space:
        starts = [0, *(start + 1 for start in starts[1:])]
    places = [i for i, label in enumerate(encoded["labels"]) if label != -100]
    assert places == [1 + start for start in starts if start < max_length - 2]
    assert [task.names[encoded["labels"][i]] for i in places] == labels[: len(places)]


def test_figures_are_of_entities():
    task = task_of("token-classification", train=ROWS)
    assert task.names == ["B-LOC", "B-PER", "I-PER", "O"]
    # entities: PER at words 0 and 1, LOC at word 3; found: PER at 0 alone, LOC at 3
    labels = np.array([[-100, 1, 2, 3, 0, -100]])
    predictions = np.array([[0, 1, 3, 3, 0, 2]])
    figures = task.figures(predictions, labels)
    assert figures == {"f1": 0.5, "precision": 0.5, "recall": 0.5, "accuracy": 0.75}
    assert tuple(figures) == task.metrics


def test_figures_are_of_words_where_labels_mark_no_entities():
    rows = [{"words": ["w1", "w2", "w3"], "labels": [0, 2, 10]}]
    task = task_of("token-classification", train=rows)
    assert task.names == ["0", "2", "10"]
    figures = task.figures(np.array([[0, 1, 1, 2]]), np.array([[0, 1, -100, 0]]))
    # f1 of class 0: 2/3, of class 1: 1, of class 2: 0
    assert figures == {"accuracy": 2 / 3, "f1_macro": pytest.approx(5 / 9)}
    assert tuple(figures) == task.metrics


def test_numbers_of_a_hub_data_set_are_its_classes():
    names = ["O", "B-PER", "I-PER"]
    features = Features(
        {"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))}
    )
    rows = Dataset.from_dict({"tokens": [["w1", "w2"]], "ner_tags": [[1, 0]]}, features=features)
    from progtuning_kernels.cli.options import TrainOptions
    from progtuning_kernels.cli.tasks import task_class

    task = task_class("token-classification")(TrainOptions(), {"train": rows, "validation": rows})
    assert task.names == names
    encoded = task.encode(rows, sentence_tokenizer(), None, "validation")
    assert encoded["labels"][:] == [[-100, 1, 0, -100]]


def test_a_trained_head_keeps_its_order():
    task = task_of("token-classification", train=ROWS)
    config = transformers.BertConfig(id2label=dict(enumerate(["O", "I-PER", "B-PER", "B-LOC"])))
    task.configure(config)
    assert task.names == ["O", "I-PER", "B-PER", "B-LOC"]
    encoded = task.encode(Dataset.from_list(ROWS), sentence_tokenizer(), None, "train")
    assert encoded["labels"][0] == [-100, 2, 1, 0, -100]


GOOD = {"tokens": ["w1", "w2"], "ner_tags": ["O", "X"]}


@pytest.mark.parametrize(
    "split, row, message",
    [
        (
            "train",
            {"tokens": ["w1", "w2"], "ner_tags": ["O"]},
            "train row 2 has 2 words and 1 labels",
        ),
        (
            "validation",
            {"tokens": ["w1"], "ner_tags": ["Y"]},
            "validation row 2: label 'Y' is outside",
        ),
        ("train", {"tokens": [], "ner_tags": []}, "train row 2 has no words in column 'tokens'"),
        ("train", {"tokens": [" "], "ner_tags": ["O"]}, "train row 2 has no words"),
        ("train", {"tokens": None, "ner_tags": ["O"]}, "row 2: tokens None is no list of words"),
        ("train", {"tokens": ["w1", None], "ner_tags": ["O", "O"]}, "is no list of words"),
        ("validation", {"tokens": ["w1"], "ner_tags": None}, "row 2: None is no list of labels"),
        ("validation", {"tokens": ["w1"], "ner_tags": [None]}, "row 2: None cannot be a label"),
    ],
)
def test_a_bad_row_is_one_line(split, row, message):
    splits = {"train": [GOOD, GOOD], "validation": [GOOD, GOOD]}
    splits[split] = [GOOD, row]
    with pytest.raises(UserError, match=message) as error:
        task_of("token-classification", **splits)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"tokens": "w1 w2", "ner_tags": "O O"}], "tokens 'w1 w2' is no list of words"),
        ([{"tokens": ["w1"], "ner_tags": [0.5]}], "0.5 cannot be a label"),
        ([{"tokens": ["w1"], "ner_tags": [True]}], "True cannot be a label"),
        ([{"tokens": ["w1"], "ner_tags": ["O"]}], "the training rows have one label only: 'O'"),
        ([{"tokens": ["w1"]}], "which column is the label"),
    ],
)
def test_bad_rows_are_one_line(rows, message):
    with pytest.raises(UserError, match=message):
        task_of("token-classification", train=rows, validation=rows)


def _rows(count: int) -> list[dict]:
    """Words from w60 on begin an entity, those from w45 on are inside of one."""
    draw, rows = random.Random(count), []
    for _ in range(count):
        words = [draw.randrange(90) for _ in range(draw.randrange(2, 7))]
        tags = ["B-X" if w >= 60 else "I-X" if w >= 45 else "O" for w in words]
        rows.append({"tokens": [f"w{w}" for w in words], "ner_tags": tags})
    return rows


def test_it_learns_and_answers(tmp_path):
    rows = [{"tokens": ["w70", "w50", "w1"]}, {"tokens": ["w2"] * 16}]
    splits = {"train": _rows(256), "validation": _rows(40)}
    options = ("--max-length", 16, "--epochs", 4)
    run = train_and_predict("token-classification", tmp_path, *options, predict=rows, **splits)
    assert run.figures["f1"] > 0.9
    assert run.model.config.label2id == {"B-X": 0, "I-X": 1, "O": 2}
    assert run.answers[0] == {"tags": ["B-X", "I-X", "O"]}
    # two of the 16 tokens are special
    assert run.answers[1] == {"tags": ["O"] * 14 + [None] * 2}
