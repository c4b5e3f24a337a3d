"""Sequence to sequence: nested columns, figures of generated texts, answers, and bad rows."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from datasets import Dataset
from task_runs import predict_from_file, task_of, train_from_files
from tiny_folders import word_tokenizer
from tiny_models import tiny_model

from progtuning_kernels.cli.errors import UserError

COLUMNS = {"columns": {"source": "translation.en", "target": "translation.de"}}


def translation(first: int) -> dict:
    source, target = f"w{first} w{first + 1}", f"w{first + 40} w{first + 41} [SEP]"
    return {"translation": {"en": source, "de": target}}


def test_nested_columns_become_tokens_and_labels():
    tokenizer = word_tokenizer()
    rows = [translation(0), translation(5)]
    task = task_of("seq2seq", COLUMNS | {"max_new_tokens": 2}, train=rows, predict=rows)
    encoded = task.encode(Dataset.from_list(rows), tokenizer, None, "train")
    assert encoded["input_ids"][:] == [[4, 5], [9, 10]]
    assert encoded["labels"][:] == [[44, 45], [49, 50]]  # without the third token, [SEP]
    to_predict = task.encode(Dataset.from_list(rows), tokenizer, None, "predict")
    batch = task.collator(tokenizer, None)([*to_predict])
    assert {*batch} == {"input_ids", "attention_mask"}


def test_figures_of_generated_texts():
    pytest.importorskip("torchmetrics")
    tokenizer = word_tokenizer()
    task = task_of("seq2seq", train=[{"source": "w1", "target": "w2"}])
    task.collator(tokenizer, None)
    wanted = np.array([[5, 6, 7, 8, 9, 3, -100]])
    assert task.figures(wanted, wanted) == pytest.approx(dict.fromkeys(task.metrics, 1.0))
    figures = task.figures(np.array([[2, 5, 6, 7, 8, 10, 3, 0, -100]]), wanted)
    assert figures == pytest.approx(
        {
            "rouge1": 4 / 5,
            "rouge2": 3 / 4,
            "rougeL": 4 / 5,
            # 1 to 4 words in a row; 1 to 6 characters, of which the last of ten is another
            "bleu": (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4),
            "chrf": sum((10 - n) / (11 - n) for n in range(1, 7)) / 6,
        }
    )


def test_it_is_trained_on_files_and_generates(tmp_path):
    pytest.importorskip("torchmetrics")
    tiny_model("t5-seq2seq-lm").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [translation(7 * i % 20) for i in range(140)]
    run = train_from_files(
        tmp_path,
        *("--task", "seq2seq", "--model", tmp_path / "model", "--epochs", 5, "--max-length", 8),
        *("--max-new-tokens", 3, "--stages", 2),
        *("--column", "source=translation.en", "--column", "target=translation.de"),
        train=rows[:120],
        validation=rows[120:],
        predict=rows[120:126],
    )
    assert run["metric_name"] == "chrf" and run["summary"]["metric"] > 0.9
    assert [stage["boundary"] for stage in run["stages"]] == [0, 2]
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(run["folder"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(run["folder"])
    for row, answer in zip(rows[120:126], run["predictions"], strict=True):
        source = tokenizer(row["translation"]["en"], return_tensors="pt")["input_ids"]
        said = model.generate(source, max_new_tokens=3)
        assert answer == {"output": tokenizer.decode(said[0], skip_special_tokens=True)}
    again = ("--column", "source=translation.en", "--max-length", 8, "--max-new-tokens", 3)
    rows = tmp_path / "predict.jsonl"
    assert predict_from_file(run["folder"], rows, *again) == run["predictions"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"source": "w1", "target": "w2"}, {"source": " ", "target": "w2"}],
            "train row 2 has no value for column 'source'",
        ),
        ([{"document": "w1", "summary": None}], "train row 1 has no value for column 'summary'"),
        ([{"source": "w1", "target": 3}], "train row 1, column 'target' holds 3, which is no text"),
        ([{"source": "w1"}], "which column is the target? --column target=NAME; there are source"),
    ],
)
def test_a_bad_row_is_one_line(rows, message):
    with pytest.raises(UserError) as error:
        task_of("seq2seq", train=rows)
    assert str(error.value) == message


def test_what_does_not_fit_is_refused():
    rows = [{"source": "w1", "target": "w2"}]
    with pytest.raises(UserError, match="seq2seq needs an encoder-decoder model, not gpt2"):
        task_of("seq2seq", train=rows).configure(transformers.GPT2Config())
    with pytest.raises(UserError, match="leave predict_with_generate on"):
        task_of("seq2seq", {"trainer": {"predict_with_generate": False}}, train=rows)
