"""The accuracy study's tasks: rows, batches, and scores.

GLUE's tasks are read from `FOLDER/<task>/train.jsonl` and `validation.jsonl`, with `text`, or
`text_a` and `text_b`, and `label`. BBC News is that of a package. `stdlib` is made of this Python's
standard library: the signature of a function is a user's message, the first paragraph of its
docstring the answer. Files are parsed, never imported, and whole files are held out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study_models import bbc_texts, load_tokenizer
from torch import Tensor, nn

from progtuning_kernels.cli.errors import UserError

Row = dict[str, Any]  # input_ids and labels; of stdlib also file and answer, and "choices" to score
EVALUATION_TOKENS = 8192  # of a batch, at most
CHOICES = 4
ANSWERED = 256  # stdlib rows that are scored, at most
ASK_CHARACTERS = 160
NOT_LIBRARY = re.compile(r"(^|/)(site-packages|dist-packages|tests?|idlelib|lib2to3|__pycache__)/")


@dataclass(frozen=True)
class Task:
    """Rows as one model's tokenizer has them."""

    name: str
    train: Sequence[Row]
    validation: Sequence[Row]
    classes: int | None  # of a head; 1 is a number; None: a decoder
    pad: int
    digest: str  # of the texts, before any row was drawn

    def split(self, share: float, rows: int) -> Task:
        """For tuning: training rows alone, so many of them held out."""
        order = random.Random(1).sample(range(len(self.train)), min(rows, len(self.train)))
        chosen = [self.train[i] for i in order]
        held = max(1, round(share * len(chosen)))
        scored, train = chosen[:held], chosen[held:]
        if self.classes is None:
            known = {row["answer"] for row in scored}  # another file may have the same
            scored, train = with_choices(scored), [r for r in train if r["answer"] not in known]
        return Task(self.name, train, scored, self.classes, self.pad, self.digest)

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Padded on the right to the longest row; (B, T)."""
        width = max(len(row["input_ids"]) for row in rows)

        def column(name: str, fill: int) -> Tensor:
            return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch = {"input_ids": column("input_ids", self.pad)}
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = column("token_type_ids", 0)
        if self.classes is None:
            return batch | {"labels": column("labels", -100)}
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def read_task(
    name: str, settings: Mapping[str, Any], model: str, *, data: Path | None, cache: Path
) -> Task:
    """The rows of a task, at most so many as the settings say, drawn by a seed of their own."""
    tokenizer = load_tokenizer(cache, model)
    if name == "stdlib":
        splits: Any = stdlib_answers()
    elif name == "bbc":
        splits = _bbc(cache)
    elif data is None:
        raise UserError(f"{name} is read from files: --data FOLDER, of <task>/train.jsonl")
    else:
        splits = [_jsonl(data / name / f"{part}.jsonl") for part in ("train", "validation")]
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
    train, validation = splits
    order = random.Random(0).sample(range(len(train)), min(settings["train_rows"], len(train)))
    train = [train[i] for i in order]
    if name == "stdlib":
        asked = random.Random(0).sample(validation, min(ANSWERED, len(validation)))
        rows, scored = (
            [_chat(tokenizer, row, settings["tokens"]) for row in part] for part in (train, asked)
        )
        return Task(name, rows, with_choices(scored), None, tokenizer.pad_token_id, digest)
    labels = {row["label"] for row in train}
    classes = 1 if settings["metric"] == "pearson" else len(labels)
    number = {label: i for i, label in enumerate(sorted(labels))}

    def encode(row: Mapping[str, Any]) -> Row:
        texts = (row["text"],) if "text" in row else (row["text_a"], row["text_b"])
        encoded = tokenizer(*texts, truncation=True, max_length=settings["tokens"])
        kept = {k: encoded[k] for k in ("input_ids", "token_type_ids") if k in encoded}
        label = row["label"]
        return kept | {"labels": float(label) if classes == 1 else number[label]}

    return Task(
        name,
        [*map(encode, train)],
        [*map(encode, validation)],
        classes,
        tokenizer.pad_token_id,
        digest,
    )


def _jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _bbc(cache: Path) -> tuple[list[Row], list[Row]]:
    rows = [{"text": text, "label": subject} for subject, text in bbc_texts(cache)]
    if not rows:
        raise UserError(f"no texts of BBC News in {cache}: accuracy_study.py prepare")
    random.Random(0).shuffle(rows)
    held = len(rows) // 5
    return rows[held:], rows[:held]


def stdlib_answers(root: Path | None = None) -> tuple[list[Row], list[Row]]:
    """Questions and answers of training and validation files; no answer stands in both parts."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    by_file: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if NOT_LIBRARY.search(f"/{name}"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escapes in strings
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            ask = f"What does {node.name}({ast.unparse(node.args)}) of {name[:-3]} do?"
            if len(answer.split()) >= 5 and len(ask) <= ASK_CHARACTERS:
                by_file[name].append({"file": name, "ask": ask, "answer": answer})
    files = sorted(by_file)
    random.Random(0).shuffle(files)
    held = set(files[: len(files) // 5])
    validation = [row for name in sorted(held) for row in by_file[name]]
    known = {row["answer"] for row in validation}
    train = [r for n in sorted(by_file) if n not in held for r in by_file[n]]
    return [row for row in train if row["answer"] not in known], validation


def _chat(tokenizer: Any, row: Mapping[str, str], tokens: int) -> Row:
    """One conversation; the loss is that of the answer and its end."""
    # without the system message of the model's template, 20 tokens of every row
    asked = f"<|im_start|>user\n{row['ask']}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    said = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    said = said[: max(1, tokens - len(prompt) - 1)] + [tokenizer.eos_token_id]
    return {**_answered(prompt, said), "file": row["file"], "answer": row["answer"]}


def _answered(prompt: list[int], said: list[int]) -> Row:
    return {"input_ids": prompt + said, "labels": [-100] * len(prompt) + said}


def with_choices(rows: Sequence[Row]) -> list[Row]:
    """Every row with its own answer first, and three others, of its file if there are as many.

    Others are answers of these rows alone: one that trains would be likelier for it.
    """
    draw, near = random.Random(0), defaultdict(set)
    said = {row["answer"]: row["input_ids"][row["labels"].count(-100) :] for row in rows}
    for row in rows:
        near[row["file"]].add(row["answer"])
    found = []
    for row in rows:
        close = sorted(near[row["file"]])
        pool = close if len(close) >= CHOICES else sorted(said)
        wrong = [a for a in draw.sample(pool, CHOICES) if a != row["answer"]][: CHOICES - 1]
        prompt = row["input_ids"][: row["labels"].count(-100)]
        found.append(row | {"choices": [row, *(_answered(prompt, said[a]) for a in wrong)]})
    return found


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, metric: str) -> dict[str, float | None]:
    """Figures of the validation rows; `score` is the metric in points, 100 times itself."""
    model.eval()
    if task.classes is None:
        figures: dict[str, Any] = _choice_figures(model, task)
    else:
        found: list[Tensor] = [torch.empty(0)] * len(task.validation)
        for numbers in _by_length([len(row["input_ids"]) for row in task.validation]):
            batch = task.batch([task.validation[i] for i in numbers])
            batch.pop("labels")
            for i, logits in zip(numbers, model(**batch).logits, strict=True):
                found[i] = logits
        figures = {metric: metric_of(metric, found, [row["labels"] for row in task.validation])}
    model.train()
    return figures | {"score": 100 * figures[metric]}


def metric_of(metric: str, logits: Sequence[Tensor], labels: Sequence[float]) -> float:
    """Of logits (classes,) and labels, a row each."""
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if metric == "pearson":
        values = [float(row) for row in logits]
        # a constant has no correlation, nor have the numbers of a run that diverged
        varies = len(set(values)) > 1 and all(map(math.isfinite, values))
        return float(pearsonr(values, labels)[0]) if varies else 0.0
    classes = [int(row.argmax()) for row in logits]
    known = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef}
    return float(known[metric](labels, classes))


def _by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers of batches of like length."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > EVALUATION_TOKENS:
            batches.append([])
        batches[-1].append(i)
    return batches


def _choice_figures(model: nn.Module, task: Task) -> dict[str, Any]:
    """How often the mean log-likelihood of a token is highest in the row's own answer, and the
    perplexity of these answers; None where the loss is not finite.
    """
    flat = [choice for row in task.validation for choice in row["choices"]]
    means, counts = [0.0] * len(flat), [0] * len(flat)
    for numbers in _by_length([len(row["input_ids"]) for row in flat]):
        batch = task.batch([flat[i] for i in numbers])
        labels = batch.pop("labels")[:, 1:]  # (B, T - 1)
        logits = model(**batch).logits[:, :-1].float()  # (B, T - 1, V)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        answered = (labels != -100).sum(1)
        for i, loss, count in zip(numbers, losses.sum(1) / answered, answered, strict=True):
            means[i], counts[i] = -float(loss), int(count)
    right = [means[at] > max(means[at + 1 : at + CHOICES]) for at in range(0, len(flat), CHOICES)]
    own = range(0, len(flat), CHOICES)
    loss = -sum(means[i] * counts[i] for i in own) / sum(counts[i] for i in own)
    perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else None
    return {"accuracy": sum(right) / len(right), "perplexity": perplexity}
