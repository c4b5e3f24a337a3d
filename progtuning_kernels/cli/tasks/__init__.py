"""What can be trained: a module per task, each with one class that follows `Task`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from ..options import TrainOptions

_CLASSES = {
    "text-classification": "text_classification:TextClassification",
    "token-classification": "token_classification:TokenClassification",
    "question-answering": "question_answering:QuestionAnswering",
    "masked-lm": "masked_lm:MaskedLM",
    "causal-lm": "causal_lm:CausalLM",
    "seq2seq": "seq2seq:Seq2Seq",
    "image-classification": "image_classification:ImageClassification",
}


class Task(Protocol):
    """How rows become batches, and outputs figures and answers.

    A task is made from its options and its rows before any model is loaded, so that bad rows are
    found first. Rows are a `datasets.Dataset` as `data.load_splits` gives it.

    A task may have more: `trainer_options`, values of its Trainer's arguments that hold unless the
    user gives others; `notes`, lines for the user, there after `encode`; and in place of `answers`
    `generate(model, processor, rows)`, which gives the same where the Trainer cannot generate.

    Attributes:
        auto_model: class of transformers that makes the model.
        processor: class of transformers that reads the rows: "AutoTokenizer" or
            "AutoImageProcessor".
        lora_task: member of `peft.TaskType`; None where it has none that fits.
        trainer: "Trainer", "Seq2SeqTrainer" or "SFTTrainer".
        metrics: figures that an evaluation gives beside the loss; the first is shown.
        names: classes by index; None where there are none.
        columns: role -> name of the column, for the roles that the rows have.
    """

    auto_model: ClassVar[str]
    processor: ClassVar[str]
    lora_task: ClassVar[str | None]
    trainer: str
    metrics: Sequence[str]
    names: list[str] | None
    columns: dict[str, str]

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        """Find columns and classes, and check every row of "train" and "validation".

        With "predict" alone the rows have no labels, and `names` is set by `configure`.

        Raises:
            UserError: one line, with split and row.
        """

    def summary(self) -> str:
        """What the rows were taken for, such as "3 classes: 'a', 'b', 'c'"; may be empty."""

    def configure(self, config: Any) -> None:
        """Write classes and kind of problem into the config of the model before it is made.

        Classes that a trained head has under the same names keep the head's order: `names` takes
        it over.
        """

    def encode(self, rows: Dataset, processor: Any, model: nn.Module, split: str) -> Dataset:
        """Rows as the model reads them: only columns of its forward, and "labels".

        Args:
            processor: tokenizer or image processor.
            split: "train", "validation" or "predict".
        """

    def collator(self, processor: Any, model: nn.Module) -> Callable[[list[dict]], dict]: ...

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        """What an evaluation keeps of a batch's outputs (`preprocess_logits_for_metrics`)."""

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Figures over the validation rows, of what `preprocess_logits` kept: numpy arrays."""

    def answers(self, predictions: Any, rows: Dataset) -> list[dict[str, Any]]:
        """One JSON object per row of "predict", in its order."""


def task_class(name: str) -> type[Task]:
    module, cls = _CLASSES[name].split(":")
    return getattr(import_module(f".{module}", __name__), cls)


TASKS = (*_CLASSES,)
