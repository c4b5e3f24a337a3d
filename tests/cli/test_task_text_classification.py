"""Text classification: what labels are taken for, bad ones in a line, figures, and answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from datasets import Dataset
from task_runs import task_of
from tiny_folders import sentence_tokenizer

from progtuning_kernels.cli.data import load_splits
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.options import TrainOptions
from progtuning_kernels.cli.preparation import read_rows
from progtuning_kernels.cli.tasks.text_classification import TextClassification

NAME = "text-classification"
PICTURE = Path(__file__).parents[2] / "docs/pictures/training.png"


def _task(labels: list, *, validation: list | None = None, **options: object):
    def rows(own: list) -> list[dict]:
        return [{"text": f"w{i} w7", "label": own[i % len(own)]} for i in range(12)]

    return task_of(NAME, options, train=rows(labels), validation=rows(validation or labels))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["007", "7"], ["007", "7"]),
        (["nan", "en"], ["en", "nan"]),
        (["10", "2", "x"], ["2", "10", "x"]),
        (["1.0", "1"], ["1", "1.0"]),
        ([10, 2], ["2", "10"]),
        ([1.0, 2.0], ["1", "2"]),
        ([True, False], ["False", "True"]),
        ([-1, 1], ["-1", "1"]),
    ],
    ids=str,
)
def test_labels_are_classes_as_they_stand(labels, classes):
    task = _task(labels)
    assert task.names == classes and task.problem_type == "single_label"
    assert f"{len(classes)} classes: {', '.join(map(repr, classes))}" == task.summary()


@pytest.mark.parametrize("labels", [[1.5, 2.0], ["1.5", "2"], ["1e-1", "-3"]], ids=str)
def test_numbers_with_a_fraction_want_a_word(labels):
    with pytest.raises(UserError, match="give --problem-type regression to predict them, or"):
        _task(labels)
    names = _task(labels, problem_type="single_label").names
    assert names == [str(y).removesuffix(".0") for y in sorted(labels, key=float)]
    task = _task(labels, problem_type="regression")
    assert task.names is None and task.metrics == ("pearson", "spearman")
    low, high = sorted(map(float, labels))
    assert task.summary() == f"a regression, labels from {low:g} to {high:g}"


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", None], {}, "train row 2 has no value for column 'label'"),
        (["a", "  "], {}, "train row 2 has no value for column 'label'"),
        ([[1], [2]], {}, r"train row 1: \[1\] cannot be a label"),
        ([float("inf"), 1.0], {}, "train row 1: inf cannot be a label"),
        ([float("nan"), 1.0], {}, "train row 1: nan cannot be a label"),
        (["a"], {}, "the training rows have one label only: 'a'"),
        ([1.5], {"problem_type": "regression"}, "the train rows have one label only"),
        ([1e300, 1.5], {"problem_type": "regression"}, "row 1: label 1e\\+300 is not a number"),
        (["1.5", "x"], {"problem_type": "regression"}, "train row 2: label 'x' is not a number"),
        (["a", "b"], {"problem_type": "multi_label"}, "train row 1: 'a' is no list of labels"),
    ],
    ids=str,
)
def test_bad_labels_get_one_line(labels, options, message):
    with pytest.raises(UserError, match=message):
        _task(labels, **options)


def test_labels_of_two_types_are_told_apart(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1", "label": "7"}\n{"text": "w2", "label": 7}\n')
    options = TrainOptions(train_file=(str(path),), validation_file=(str(path),))
    with pytest.raises(UserError, match="row 2: label 7 is a number, that of row 1 is text"):
        TextClassification(options, load_splits(options))


def test_a_row_of_a_file_that_was_split_is_told_by_its_part(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": " ", "label": 0}\n' * 4)
    options = TrainOptions(train_file=(str(path),), validation_split=0.5)
    with pytest.raises(UserError, match="^row 1 of the train part has no value for column 'text'"):
        read_rows(options)


def test_a_label_that_training_never_shows():
    with pytest.raises(UserError, match="validation row 2: label 'c' is outside the set of the"):
        _task(["a", "b"], validation=["a", "c"])


def test_a_head_keeps_its_order_under_the_same_names():
    task = _task(["a", "b"])
    for head, names, target in (
        ({0: "b", 1: "a"}, ["b", "a"], 1),
        ({0: "LABEL_0", 1: "LABEL_1"}, ["a", "b"], 0),
    ):
        config = SimpleNamespace(id2label=head)
        task.configure(config)
        assert task.names == names and list(config.id2label.values()) == names
        assert task._target("a") == target
    numbered = _task([0, 1])
    numbered.configure(SimpleNamespace(id2label={0: "NEG", 1: "POS"}))
    numbered.configure(SimpleNamespace(id2label={0: "NEG", 1: "POS"}))  # of a second run
    assert numbered.names == ["NEG", "POS"] and numbered._target("1") == 1


def test_any_number_of_labels_a_row(word_tokenizer):
    rows = [{"text": "w1", "label": ["x", "y"]}, {"text": "w2", "label": []}] * 2
    lists = task_of(NAME, {"problem_type": "multi_label"}, train=rows, validation=rows)
    marks = [{"text": "w1", "x": 1, "y": "1.0"}, {"text": "w2", "x": 0, "y": "0"}]
    options = {"problem_type": "multi_label", "columns": {"label": "x,y"}}
    marks = [{**row, "y": str(row["y"])} for row in marks]
    columns = task_of(NAME, options, train=marks, validation=marks)
    for task, own in ((lists, rows), (columns, marks)):
        config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
        task.configure(config)
        assert config.problem_type == "multi_label_classification" and task.names == ["x", "y"]
        encoded = task.encode(Dataset.from_list(own), word_tokenizer, None, "train")
        assert encoded["labels"][:2] == [[1.0, 1.0], [0.0, 0.0]]
    logits = numpy.array([[3.0, -1.0], [-2.0, -2.0]])
    figures = lists.figures(logits, numpy.array([[1.0, 1.0], [0.0, 0.0]]))
    assert figures == pytest.approx({"f1": 2 / 3, "f1_macro": 0.5, "exact_match": 0.5})
    first, second = lists.answers(logits, None)
    assert first["labels"] == ["x"] and second["labels"] == []
    assert first["scores"]["x"] == pytest.approx(1 / (1 + numpy.exp(-3)))
    with pytest.raises(UserError, match="train row 1: 2 is neither 0 nor 1"):
        bad = [{"text": "w1", "x": 2, "y": 1}]
        task_of(NAME, options, train=bad, validation=bad)


def test_figures_and_answers():
    task = _task(["a", "b"])
    logits = numpy.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    figures = task.figures(logits, numpy.array([0, 1, 1, 1]))
    assert figures["accuracy"] == 0.75 and figures["f1"] == pytest.approx(0.8)
    answer = task.answers(logits, None)[3]
    assert answer["label"] == "b" and answer["score"] == pytest.approx(1 / (1 + numpy.exp(-3)))
    numbers = _task([0.5, 1.0], problem_type="regression")
    found = numbers.figures(numpy.array([[1.0], [2.0], [4.0]]), numpy.array([1.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(1) and 0.9 < found["pearson"] < 1
    assert numbers.figures(numpy.ones((3, 1)), numpy.arange(3))["pearson"] == 0
    assert numbers.answers(numpy.array([[1.5]]), None) == [{"score": 1.5}]


@pytest.mark.parametrize(
    ("task", "row"),
    [
        (NAME, {"text": "w1"}),
        ("token-classification", {"tokens": ["w1"]}),
        ("image-classification", {"image": str(PICTURE)}),
    ],
)
def test_a_file_that_is_split_has_the_classes_of_all_its_rows(task, row):
    train, validation = (
        [row | {"label": [x] if "tokens" in row else x} for x in own] for own in ("ab", "ac")
    )
    options = {"columns": {"label": "label"}}
    split = task_of(task, options | {"validation_split": 0.5}, train=train, validation=validation)
    assert split.names == ["a", "b", "c"]
    with pytest.raises(UserError, match="validation row 2: label 'c' is outside the set"):
        task_of(task, options, train=train, validation=validation)


def test_pairs_and_columns_of_their_own():
    qnli = [{"sentence": "w1", "question": "w2", "label": i} for i in (0, 1)]
    task = task_of(NAME, train=qnli, validation=qnli)
    assert task.columns == {"text": "question", "pair": "sentence", "label": "label"}
    rows = [{"premise": "w1", "hypothesis": "w2", "label": i} for i in (0, 1)]
    task = task_of(NAME, train=rows, validation=rows)
    assert task.columns == {"text": "premise", "pair": "hypothesis", "label": "label"}
    task.configure(SimpleNamespace(id2label={0: "0", 1: "1"}))
    task.max_length = 2
    with pytest.raises(UserError, match="--max-length 2 is below the 3 special tokens"):
        task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, "train")
    task = task_of(NAME, {"columns": {"pair": "premise", "text": "hypothesis"}}, train=rows,
                   validation=rows)  # fmt: skip
    assert task.columns["pair"] == "premise" and task.columns["text"] == "hypothesis"
    with pytest.raises(UserError, match="validation row 1 has no value for column 'premise'"):
        task_of(NAME, train=rows, validation=[{"text": "w1", "label": 0}])
    with pytest.raises(UserError, match="train row 1 has no value for column 'text_b'"):
        rows = [{"text_a": "w1", "text_b": None, "label": 1}]
        task_of(NAME, train=rows, validation=rows)
