"""Classes of a head and of rows, and the figures of a classification."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...backend import one_line
from ..errors import UserError

if TYPE_CHECKING:
    from ..options import TrainOptions

# float() takes "nan" (a language code), "1_000" and blanks as well
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def same_classes(own: Sequence[str], names: Sequence[str]) -> list[str] | None:
    """The classes of a head, in its order, if the rows have the same; None if they have others.

    Rows may number the classes from 0: then a head's own names stay, and one without names
    (LABEL_0, ...) takes the numbers.

    Args:
        own: classes of the head, by index.
        names: classes of the rows.
    """
    if sorted(own) == sorted(names):
        return [*own]
    if len(own) != len(names) or [*names] != [str(i) for i in range(len(own))]:
        return None
    unnamed = [*own] == [f"LABEL_{i}" for i in range(len(own))]
    return [*names] if unnamed else [*own]


def set_classes(config: Any, names: Sequence[str] | None, problem_type: str | None = None) -> None:
    """Make a config one of a head with these classes; None: of a regression."""
    names = ["LABEL_0"] if names is None else names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = problem_type


def learnt(labels: Mapping[str, Sequence[Any]], options: TrainOptions) -> list[Any]:
    """The labels that say which classes there are: of one file that was split, those of all rows.

    Args:
        labels: by split.
    """
    whole = options.validation_split is not None
    return [*labels["train"], *(labels["validation"] if whole else ())]


def class_order(name: str) -> tuple[float, str]:
    """A key that sorts numbers first, 2 before 10, and text after them."""
    return (float(name) if DECIMAL.fullmatch(name) else float("inf"), name)


def class_figures(predicted: Any, truth: Any, num_classes: int) -> dict[str, float]:
    """Figures of a classification in one class each, by scikit-learn.

    Args:
        predicted, truth: (N,) integers.
        num_classes: f1 is binary for two classes, else the macro mean.
    """
    from sklearn import metrics

    average = "binary" if num_classes == 2 else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "f1": float(metrics.f1_score(truth, predicted, average=average, zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(truth, predicted)),
    }


def place_of(name: str, places: dict[str, int], where: str) -> int:
    """The index of a class; `UserError` for one that the training rows do not have."""
    if name not in places:
        known = ", ".join(map(repr, [*places][:10])) + (", ..." if len(places) > 10 else "")
        raise UserError(
            f"{where}: label {one_line(repr(name))} is outside the set of the training rows "
            f"({known})"
        )
    return places[name]
