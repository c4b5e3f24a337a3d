"""Classes of a head and of rows, and the figures of a classification."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...backend import one_line
from ..errors import UserError
from ..options import TrainOptions

# float() takes "nan" (a language code), "1_000" and blanks as well
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def own_classes(config: Any) -> list[str]:
    return [str(config.id2label[i]) for i in sorted(config.id2label)]


def same_classes(own: Sequence[str], names: Sequence[str]) -> list[str] | None:
    """The classes of a head, in its order, if the rows have the same; None if they have others.

    Rows may number the classes from 0: then a head's `own` names stay, and one without names
    (LABEL_0, ...) takes the numbers.
    """
    if sorted(own) == sorted(names):
        return [*own]
    if len(own) != len(names) or [*names] != [str(i) for i in range(len(own))]:
        return None
    unnamed = [*own] == [f"LABEL_{i}" for i in range(len(own))]
    return [*names] if unnamed else [*own]


def fit_head(
    config: Any, names: Sequence[str], problem_type: str | None = None
) -> tuple[list[str], dict[str, int]]:
    """Write the rows' classes into a config; its head's classes, and where those of the rows are.

    A head that has the same classes keeps its order, and its names where the rows have numbers.
    """
    head = same_classes(own_classes(config), names) or [*names]
    set_classes(config, head, problem_type)
    known = head if sorted(head) == sorted(names) else names
    return head, {name: i for i, name in enumerate(known)}


def set_classes(config: Any, names: Sequence[str], problem_type: str | None) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = problem_type


def learnt(labels: Mapping[str, Sequence[Any]], options: TrainOptions) -> list[Any]:
    """The labels, by split, that say which classes there are: of a split file those of all rows."""
    whole = options.validation_split is not None
    return [*labels["train"], *(labels["validation"] if whole else ())]


def order(name: str) -> tuple[float, str]:
    """A key that sorts numbers first, 2 before 10, and text after them."""
    return (float(name) if DECIMAL.fullmatch(name) else float("inf"), name)


def shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (", ..." if names[10:] else "")


def check(names: Sequence[str], labels: Mapping[str, Iterable[Iterable[str]]]) -> None:
    """Refuse a single class, and rows of a class that the training rows do not have."""
    if len(names) < 2:
        only = repr(names[0]) if names else "none at all"
        raise UserError(f"the training rows have one label only: {only}")
    known = {*names}
    for split, rows in labels.items():
        for number, row in enumerate(rows, 1):
            if foreign := [name for name in row if name not in known]:
                raise UserError(
                    f"{split} row {number}: label {one_line(repr(foreign[0]))} is outside the set "
                    f"of the training rows ({shown(names)})"
                )


def figures_of(predicted: Any, truth: Any, num_classes: int) -> dict[str, float]:
    """Figures of (N,) classes; f1 is binary for two of them, else the macro mean."""
    from sklearn import metrics

    average = "binary" if num_classes == 2 else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "f1": float(metrics.f1_score(truth, predicted, average=average, zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(truth, predicted)),
    }


def likeliest(logits: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """The answer to each row: its class and that class's probability; logits (N, classes)."""
    from scipy import special

    shares = special.softmax(logits, -1)
    return [{"label": names[row.argmax()], "score": float(row.max())} for row in shares]
