"""What a decoder goes on with: which tokens are learnt, perplexity, answers, and bad rows."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import transformers
from task_runs import predict_from_file, task_of, train_from_files, write_rows
from tiny_folders import word_tokenizer
from tiny_models import tiny_model

from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.tasks.causal_lm import sft_classes

TEMPLATE = """{% for m in messages %}{% if m.role not in ('user', 'assistant') %}
{{ raise_exception('no role ' ~ m.role) }}{% endif %}{{ 'w80 ' if m.role == 'user' else 'w81 ' }}
{%- generation %}{{ m.content }} [SEP] {% endgeneration %}{% endfor %}
{%- if add_generation_prompt %}w81 {% endif %}"""


def chat(*contents: str) -> dict:
    roles = ["user", "assistant"] * len(contents)
    pairs = zip(roles, contents, strict=False)
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def encoded(rows: list[dict], tokenizer=None, split: str = "train", **options) -> tuple:
    tokenizer = tokenizer or word_tokenizer()
    task = task_of("causal-lm", options, **{split: rows})
    return task, task.encode(task_rows(rows), tokenizer, None, split)


def task_rows(rows: list[dict]):
    from datasets import Dataset

    return Dataset.from_list(rows)


def ids(text: str) -> list[int]:
    return word_tokenizer()(text)["input_ids"]


def chat_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_completion_is_learnt_and_its_prompt_is_not():
    rows = [
        {"prompt": "w0 w1", "completion": " w2"},
        {"prompt": "w3", "completion": " w4 w5 [SEP]"},  # it ends with the end-of-text token
        {"prompt": "w0 w1 w2 w3 w4 w5", "completion": " w6"},  # nothing of it is left
    ]
    task, found = encoded(rows, max_length=4)
    assert (task.kind, task.trainer) == ("prompt", "SFTTrainer")
    assert found["input_ids"][:] == [ids("w0 w1 w2 [SEP]"), ids("w3 w4 w5 [SEP]")]
    assert found["labels"][:] == [[-100, -100, *ids("w2 [SEP]")], [-100, *ids("w4 w5 [SEP]")]]
    assert task.notes == ["1 train rows are left out: --max-length 4 leaves them no token to learn"]
    task, found = encoded(rows[:1], trainer={"completion_only_loss": False})
    assert found["labels"][0] == found["input_ids"][0]
    with pytest.raises(UserError, match="--max-length 4 leaves no train row a token to learn"):
        encoded(rows[2:], max_length=4)


def test_of_messages_all_is_learnt_or_what_an_assistant_says():
    row = chat("w0", "w1 w2", "w3", "w4")
    text = "w80 w0 [SEP] w81 w1 w2 [SEP] w80 w3 [SEP] w81 w4 [SEP]"
    task, found = encoded([row], chat_tokenizer())
    assert task.kind == "messages"
    assert found["input_ids"][0] == found["labels"][0] == ids(text)
    names = {"user": "human", "assistant": "gpt"}  # of ShareGPT
    spoken = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
    _, found = encoded([{"conversations": spoken}], chat_tokenizer())
    assert found["labels"][0] == ids(text)
    pair = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    _, found = encoded([pair], chat_tokenizer())
    assert found["input_ids"][0] == ids(text)
    # the prompt goes as far as the mark that the assistant speaks
    assert found["labels"][0] == [-100] * (len(ids(text)) - 2) + ids("w4 [SEP]")


def test_the_loss_is_of_assistants_alone_where_the_template_marks_them():
    pytest.importorskip("trl")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "{%- generation %}{{ m.content }} [SEP] {% endgeneration %}",
        "{%- if m.role == 'assistant' %}{% generation %}{{ m.content }} [SEP] {% endgeneration %}"
        "{% else %}{{ m.content }} [SEP] {% endif %}",
    )
    only = {"assistant_only_loss": True}
    _, found = encoded([chat("w0", "w1 w2")], tokenizer, trainer=only)
    assert found["labels"][0] == [-100] * 4 + ids("w1 w2 [SEP]")
    assert "messages" in found.column_names  # by which SFTTrainer knows a conversation


def test_an_instruction_with_an_input_is_not_read_by_half():
    rows = [{"instruction": "w1", "input": "", "output": " w2"}]
    _, found = encoded(rows)
    assert found["input_ids"][0] == ids("w1 w2 [SEP]")
    rows.append({**rows[0], "input": "w3"})
    for name, column in (("causal-lm", "prompt=NAME"), ("seq2seq", "source=NAME")):
        with pytest.raises(UserError, match=f"join them into one column.*--column {column}"):
            task_of(name, train=rows)
    task = task_of("causal-lm", {"columns": {"prompt": "instruction"}}, train=rows)
    assert task.columns == {"prompt": "instruction", "completion": "output"}


def test_a_saved_model_answers_without_dropout(tmp_path):
    model = tiny_model("gpt2-causal-lm")
    model.config.resid_pdrop = model.config.embd_pdrop = 0.5
    model.save_pretrained(tmp_path / "model")
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 10**30  # as of tokenizers that do not know their model
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": "w1 w2 w3"}, {"text": "w4 " * 60}]  # the second is cut to 32 - 9 tokens
    path = write_rows(tmp_path / "rows.jsonl", rows)
    length = ("--max-length", 16, "--max-new-tokens", 9)
    answer, _ = predict_from_file(tmp_path / "model", path, *length)
    said = model.eval().generate(torch.tensor([ids("w1 w2 w3")]), do_sample=False, max_new_tokens=9)
    assert answer["output"].split() == word_tokenizer().decode(said[0, 3:]).split()


def test_perplexity_counts_every_predicted_token_once():
    torch.manual_seed(0)
    task = task_of("causal-lm", train=[{"text": "w1"}])
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(7, (3, 5))
    labels[0, :4] = labels[1, 3:] = -100  # 1, 2 and 4 predicted tokens
    kept = task.preprocess_logits((logits, "hidden states"), labels)
    per_token = [
        -float(logits[i, t].log_softmax(-1)[labels[i, t + 1]])
        for i in range(3)
        for t in range(4)
        if labels[i, t + 1] != -100
    ]
    assert kept[:, 1].tolist() == [1, 2, 4] and len(per_token) == 7
    figures = task.figures(kept.numpy(), labels.numpy())
    assert figures == {"perplexity": pytest.approx(math.exp(sum(per_token) / 7), rel=1e-6)}


@torch.no_grad()
def true_perplexity(folder, rows) -> float:
    """Of a saved model, row by row."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    loss = tokens = 0
    for row in rows:
        wanted = torch.tensor([row["labels"]])
        count = int((wanted[:, 1:] != -100).sum())
        batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": wanted}
        loss, tokens = loss + count * float(model(**batch).loss), tokens + count
    return math.exp(loss / tokens)


def counting(start: int, count: int) -> str:
    return " ".join(f"w{(start + i) % 20}" for i in range(count))


def test_completions_are_trained_by_sft_and_predicted(tmp_path):
    pytest.importorskip("trl")
    tiny_model("llama-causal-lm").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": counting(7 * i, 1 + i % 3), "completion": " " + counting(7 * i + 1 + i % 3, n)}
        for i in range(120)
        for n in [1 + i % 4]
    ]
    run = train_from_files(
        tmp_path,
        *("--task", "causal-lm", "--model", tmp_path / "model", "--max-length", 16),
        *("--epochs", 6, "--max-new-tokens", 3, "--per-device-eval-batch-size", 4),
        train=rows[:100],
        validation=rows[100:],
        predict=rows[100:107],
    )
    assert [stage["boundary"] for stage in run["stages"]] == [0, 1, 2]
    _, found = encoded(rows[100:])
    perplexity = run["summary"]["metric"]
    assert perplexity == pytest.approx(true_perplexity(run["folder"], found), rel=1e-5)
    assert perplexity < 6  # of 20 words and an end
    # batches of means say something else
    assert abs(math.log(perplexity) - run["evaluations"][-1]["loss"]) > 1e-3

    model = transformers.AutoModelForCausalLM.from_pretrained(run["folder"])
    for row, answer in zip(rows[100:107], run["predictions"], strict=True):
        prompt = torch.tensor([ids(row["prompt"])])
        said = model.generate(prompt, do_sample=False, max_new_tokens=3)[0, prompt.shape[1] :]
        alone = word_tokenizer().decode(said, skip_special_tokens=True)
        assert answer["output"].strip() == alone.strip()
    again = ("--max-length", 16, "--max-new-tokens", 3)
    assert (
        predict_from_file(run["folder"], tmp_path / "predict.jsonl", *again) == run["predictions"]
    )


def test_plain_text_is_trained_by_the_trainer(tmp_path):
    tiny_model("gpt2-causal-lm").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": counting(7 * i, 9) if i % 3 else ""} for i in range(150)]
    run = train_from_files(
        tmp_path,
        *("--task", "causal-lm", "--model", tmp_path / "model", "--max-length", 16),
        *("--epochs", 6, "--batch-size", 4, "--per-device-eval-batch-size", 8),
        train=rows[:100],
        validation=rows[100:],
    )
    _, found = encoded(rows[100:], max_length=16)
    found = [{"input_ids": row, "labels": row} for row in found["input_ids"]]
    perplexity = run["summary"]["metric"]
    assert perplexity == pytest.approx(true_perplexity(run["folder"], found), rel=1e-5)
    assert perplexity < 18  # of 20 words and an end
    # GPT-2's name hides from the Trainer that a row of T tokens has T - 1 predictions: without
    # `mean_over_step` its loss is 15/16 of this
    assert run["evaluations"][-1]["loss"] == pytest.approx(math.log(perplexity), rel=1e-5)


TEXT = {"role": "user", "content": "w1"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": []}], "train row 1: [] in 'messages' is no list of messages"),
        ([{"messages": [TEXT]}, {"messages": None}], "train row 2: None in 'messages' is no list"),
        ([{"messages": [{"content": "w1"}]}], "train row 1: message 1 of 'messages' has no role"),
        (
            [{"messages": [TEXT, {"role": "user", "content": ""}]}],
            "train row 1: message 2 of 'messages' has no content",
        ),
        (
            [{"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": " "}],
            "train row 2 has no value for column 'completion'",
        ),
        (
            [{"prompt": [TEXT], "completion": "w2"}],
            "train row 1: 'w2' in 'completion' is no list of messages",
        ),
        (
            [{"prompt": "w1", "completion": [TEXT]}],
            "train row 1, column 'completion' holds [{'content': 'w1', 'role': 'user'}], which",
        ),
        ([{"text": ""}, {"text": None}], "all train rows are empty in column 'text'"),
        ([{"prompt": "w1"}], "which column is the text? --text-column; there are prompt"),
        (
            [chat("w1"), {"messages": [{"role": "god", "content": "w1"}]}],
            "train row 2: the chat template refuses it: no role god",
        ),
    ],
)
def test_a_bad_row_is_one_line(rows, message):
    with pytest.raises(UserError) as error:
        encoded(rows, chat_tokenizer())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_rows_to_predict_need_no_completion_and_no_empty_text():
    rows = [{"prompt": "w1", "completion": " w2"}]
    task = task_of("causal-lm", train=rows, predict=[{"prompt": "w3 w4"}])
    found = task.encode(task_rows([{"prompt": "w3 w4"}]), word_tokenizer(), None, "predict")
    assert found["input_ids"][:] == [ids("w3 w4")]
    with pytest.raises(UserError, match="predict row 1 has no value for column 'prompt'"):
        task_of("causal-lm", train=rows, predict=[{"text": "w3 w4"}])
    with pytest.raises(UserError, match="predict row 2 has no value for column 'text'"):
        task_of("causal-lm", predict=[{"text": "w3 w4"}, {"text": ""}])


def test_messages_need_trl_and_a_template(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="messages and completions need TRL, on Python 3.11"):
        sft_classes()
    with pytest.raises(UserError, match="the tokenizer has no chat template for messages"):
        encoded([chat("w1", "w2")])
    with pytest.raises(UserError, match="causal-lm needs a decoder; t5 is for seq2seq"):
        task_of("causal-lm", train=[{"text": "w1"}]).configure(transformers.T5Config())
