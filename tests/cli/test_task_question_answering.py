"""Question answering: windows and positions, the best span, figures, every bad row one line."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from task_runs import task_of, train_and_predict
from tiny_folders import sentence_tokenizer
from tiny_models import tiny_model

from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.models import wrap_lora

CONTEXT = " ".join(f"w{i}" for i in range(30))


def _row(answer: str | None, question: str = "w1 w2", context: str = CONTEXT) -> dict:
    texts = [] if answer is None else [answer]
    answers = {"text": texts, "answer_start": [context.index(text) for text in texts]}
    return {"question": question, "context": context, "answers": answers}


@given(
    st.integers(0, 29),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(11, 40),
    st.integers(0, 12),
)
@settings(max_examples=20, phases=[Phase.generate])
def test_windows_hold_the_whole_context_and_positions_the_answer(
    first, length, asked, max_length, stride
):
    words = CONTEXT.split()
    answer = " ".join(words[first : first + length])
    rows = [_row(answer, " ".join(["w1"] * asked)), _row(None)]
    options = {"max_length": max_length, "doc_stride": stride}
    task = task_of("question-answering", options, train=rows)
    tokenizer = sentence_tokenizer()
    encoded = task.encode(Dataset.from_list(rows), tokenizer, None, "train")
    seen, answered = set(), False
    for window in encoded:
        assert len(window["input_ids"]) <= max_length
        pieces = tokenizer.convert_ids_to_tokens(window["input_ids"])
        start, end = window["start_positions"], window["end_positions"]
        if pieces[: 2 + asked] != ["[CLS]", *["w1"] * asked, "[SEP]"]:
            assert (start, end) == (0, 0)  # of the second row, which has no answer
            continue
        inside = pieces[2 + asked : -1]
        seen |= {*inside}
        if f" {answer} " in f" {' '.join(inside)} ":
            answered = True
            assert pieces[start : end + 1] == answer.split()
        else:
            assert (start, end) == (0, 0) and pieces[0] == "[CLS]"
    assert seen == {*words}
    room = max_length - 3 - asked
    assert answered or min(stride, room // 2) < len(answer.split())


def _logits(task, spans: dict[tuple[int, int, int], float], windows: int, tokens: int):
    """Start and end logits with half of each span's score at its ends, and -9 elsewhere."""
    start, end = np.full((2, windows, tokens), -9.0)
    for (window, first, last), score in spans.items():
        start[window, first] = end[window, last] = score / 2
    return start, end


def test_the_best_span_of_all_windows_is_the_answer():
    rows = [_row("w5 w6"), _row("w29")]
    task = task_of("question-answering", {"max_length": 16}, train=rows, validation=rows)
    task.configure(transformers.BertConfig())
    encoded = task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, "validation")
    assert len(encoded) == 10  # 12 tokens of 30 in a window, six of them shared
    # [CLS] w1 w2 [SEP] w0 ...: w5 w6 are tokens 9 and 10 of the first window, w6 is 4 of the next
    spans = {
        (0, 9, 10): 6.0,
        (1, 4, 4): 4.0,
        (0, 1, 2): 20.0,  # of the question
        (2, 8, 5): 20.0,  # the end lies before the start
        (9, 0, 0): 50.0,  # [CLS]: rows without an answer were not trained on
        (9, 9, 9): 1.0,  # w29, the last word of the last window
    }
    found = task.figures(_logits(task, spans, 10, 20), None)
    assert found == {"f1": 1.0, "exact_match": 1.0}
    better = {**spans, (1, 4, 5): 7.0, (0, 10, 11): 1.0}  # w6 w7 is in both windows
    best = task._best(_logits(task, better, 10, 20), "validation")
    assert [text for text, _ in best] == ["w6 w7", "w29"]
    # of its answers one word of two is right, so F1 is 1/2; the other row is right
    found = task.figures(_logits(task, better, 10, 20), None)
    assert found == {"f1": 0.75, "exact_match": 0.5}


def test_no_answer_wins_only_where_it_was_taught_and_every_window_says_so():
    rows = [_row("w5 w6"), _row(None)]
    task = task_of("question-answering", {"max_length": 16}, train=rows, validation=rows)
    config = transformers.BertConfig()
    task.configure(config)
    assert config.handle_impossible_answer and config.num_labels == 2
    task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, "validation")
    nowhere = {(window, 0, 0): 8.0 for window in range(1, 10)}
    logits = _logits(task, {**nowhere, (0, 9, 10): 6.0}, 10, 16)
    assert [text for text, _ in task._best(logits, "validation")] == ["w5 w6", ""]
    assert task.figures(logits, None) == {"f1": 1.0, "exact_match": 1.0}
    # scores are shares among the likeliest: e^8 beside nineteen of e^-18
    share = 1 / (1 + 19 * np.exp(-26))
    assert task._best(logits, "validation")[1][1] == pytest.approx(share)
    task.unanswerable = False
    assert task._best(logits, "validation")[1][0] != ""


def test_an_answer_has_at_most_thirty_tokens():
    context = " ".join(["w3"] * 40)
    rows = [_row("w3", context=context)]
    task = task_of("question-answering", {"max_length": 64}, train=rows, validation=rows)
    task.configure(transformers.BertConfig())
    task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, "validation")
    text, _ = task._best(_logits(task, {(0, 5, 34): 18.0, (0, 4, 34): 20.0}, 1, 47), "validation")[
        0
    ]
    assert text == " ".join(["w3"] * 30)


FORMS = [
    {"answers": {"text": [" w5 w6"], "answer_start": [CONTEXT.index(" w5")]}},
    {"answers": [{"text": "w5 w6", "answer_start": CONTEXT.index("w5")}]},
    {"answer": "w5 w6", "answer_start": CONTEXT.index("w5")},
    {"answer": "w5 w6", "answer_start": str(CONTEXT.index("w5"))},  # of a table
]


@pytest.mark.parametrize("form", FORMS)
def test_answers_have_several_forms(form):
    rows = [{"question": "w1", "context": CONTEXT, **form}]
    task = task_of("question-answering", {"max_length": 40}, train=rows)
    encoded = task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, "train")
    assert (encoded["start_positions"][:], encoded["end_positions"][:]) == ([8], [9])


GOOD = {"question": "w1", "context": CONTEXT, "answer": "w0", "answer_start": 0}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer_start": 1}, "train row 2: 'w0' is not at character 1"),
        ({"answer_start": -len(CONTEXT)}, f"is not at character -{len(CONTEXT)}"),
        ({"answer_start": None}, "train row 2: None is no answer_start"),
        ({"answer": " "}, "train row 2: ' ' is no text of an answer"),
        ({"question": " "}, "train row 2 has no value for column 'question'"),
        ({"context": ""}, "train row 2 has no value for column 'context'"),
    ],
)
def test_a_bad_row_is_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        task_of("question-answering", train=[GOOD, GOOD | change], validation=[GOOD])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([_row("w1") | {"answers": ["w1"]}], "row 1: \\['w1'\\] is no text of an answer"),
        ([_row("w1") | {"answers": {"text": ["w1"]}}], "is no answers with text and answer_start"),
        ([_row("w1") | {"answers": 7}], "row 1: 7 is no text of an answer"),
        ([_row("w1") | {"question": 7}], "column 'question' holds 7, which is no text"),
        ([_row(None)], "no training row has an answer"),
        ([{"question": "w1", "context": "w1"}], "which column is the answers"),
    ],
)
def test_bad_rows_are_one_line(rows, message):
    with pytest.raises(UserError, match=message):
        task_of("question-answering", train=rows, validation=rows)


def test_a_question_that_fills_a_row_is_one_line():
    rows = [_row("w1"), _row("w1", question=" ".join(["w1"] * 29))]
    task = task_of("question-answering", train=rows)
    message = "train row 2: a question of 29 tokens leaves no room for its context in 32 tokens"
    with pytest.raises(UserError, match=message):
        task.encode(Dataset.from_list(rows), sentence_tokenizer(), None, "train")


def _rows(count: int) -> list[dict]:
    """The answer is the word from w80 on; one row in four has none."""
    draw, rows = random.Random(count), []
    for i in range(count):
        words = [f"w{draw.randrange(80)}" for _ in range(draw.randrange(4, 20))]
        answer = f"w{draw.randrange(80, 90)}" if i % 4 else None
        if answer:
            words[draw.randrange(len(words))] = answer
        rows.append(_row(answer, "w1", " ".join(words)))
    return rows


def test_lora_reads_what_the_saved_model_reads():
    pytest.importorskip("peft")
    model = tiny_model("bert-qa").eval()
    types = torch.arange(8)[None] // 4
    batch = {"input_ids": torch.arange(8)[None], "token_type_ids": types}
    with torch.no_grad():
        wanted = model(**batch).start_logits
        adapted = wrap_lora(model, "question-answering", 4).eval()
        assert torch.equal(adapted(**batch).start_logits, wanted)
    trained = [name for name, own in adapted.named_parameters() if own.requires_grad]
    assert sum("qa_outputs.modules_to_save" in name for name in trained) == 2
    assert not any("lora" in name for name in trained if "qa_outputs" in name)


def test_it_learns_and_answers(tmp_path):
    rows = [
        {"question": "w1", "context": "w3 " * 14 + "w85 w7 w9"},
        {"question": "w1", "context": "w3 w4 w5 w6"},
    ]
    splits = {"train": _rows(256), "validation": _rows(40)}
    options = ("--max-length", 16, "--epochs", 5)
    run = train_and_predict("question-answering", tmp_path, *options, predict=rows, **splits)
    assert run.figures["f1"] > 0.8 and run.figures["exact_match"] > 0.8
    assert [answer["answer"] for answer in run.answers] == ["w85", ""]
    assert all(0 < answer["score"] <= 1 for answer in run.answers)
