"""What can be trained: a module per task, each with one class that follows `Task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ..options import TrainOptions


class Kind(NamedTuple):
    """What is known of a task without the import of its module, which needs `datasets`."""

    cls: str
    model: str  # AutoModelFor...
    lora: str | None  # of `peft.TaskType`, if one fits


KINDS = {
    "text-classification": Kind("TextClassification", "SequenceClassification", "SEQ_CLS"),
    "token-classification": Kind("TokenClassification", "TokenClassification", "TOKEN_CLS"),
    # PEFT's class of QUESTION_ANS drops the token types
    "question-answering": Kind("QuestionAnswering", "QuestionAnswering", None),
    # PEFT has no masked LM, and no images
    "masked-lm": Kind("MaskedLM", "MaskedLM", "FEATURE_EXTRACTION"),
    "causal-lm": Kind("CausalLM", "CausalLM", "CAUSAL_LM"),
    "seq2seq": Kind("Seq2Seq", "Seq2SeqLM", "SEQ_2_SEQ_LM"),
    "image-classification": Kind("ImageClassification", "ImageClassification", None),
}
TASKS = (*KINDS,)


class Task(Protocol):
    """How rows become batches, and outputs figures and answers.

    A task is made from its options and its rows before any model is loaded, so that bad rows are
    found first: every row of "train" and "validation" is checked. With "predict" alone the rows
    have no labels, and `names` is set by `configure`.

    A task may have more: `trainer_options`, values of its Trainer's arguments that hold unless the
    user gives others; `notes`, lines for the user, there after `encode`; and in place of `answers`
    `generate(model, processor, rows)`, which gives the same where the Trainer cannot generate.

    Attributes:
        processor: class of transformers that reads the rows.
        trainer: "Trainer", "Seq2SeqTrainer" or "SFTTrainer".
        metrics: figures that an evaluation gives beside the loss; the first is shown.
        names: classes by index; None where there are none.
        columns: role -> name of the column, for the roles that the rows have.
    """

    processor: str
    trainer: str
    metrics: Sequence[str]
    names: list[str] | None
    columns: dict[str, str]

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None: ...

    def summary(self) -> str:
        """What the rows were taken for, such as "3 classes: 'a', 'b', 'c'"; may be empty."""

    def configure(self, config: Any) -> None:
        """Write classes and kind of problem into the config of the model before it is made.

        Classes that a trained head has under the same names keep the head's order.
        """

    def encode(self, rows: Dataset, processor: Any, model: nn.Module, split: str) -> Dataset:
        """Rows as the model reads them: only columns of its forward, and "labels"."""

    def collator(self, processor: Any, model: nn.Module) -> Callable[[list[dict]], dict]: ...

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        """What an evaluation keeps of a batch's outputs (`preprocess_logits_for_metrics`)."""

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Figures over the validation rows, of what `preprocess_logits` kept: numpy arrays."""

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        """One JSON object per row of "predict", in its order."""


def task_class(name: str) -> type[Task]:
    return getattr(import_module(f".{name.replace('-', '_')}", __name__), KINDS[name].cls)
