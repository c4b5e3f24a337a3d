"""Validation figures, by scikit-learn and SciPy."""

from __future__ import annotations

import importlib.util
import math

import torch

from .errors import UserError

# What an evaluation gives for each kind of task; the first is shown unless another is asked for.
FIGURES = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity",),
}


def check_installed() -> None:
    """Raise `UserError` before training if scikit-learn or SciPy is missing."""
    for package in ("sklearn", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"evaluation needs {package}: pip install scikit-learn scipy")


def classification_figures(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """logits (N, classes), labels (N,). f1 is binary for two classes, else the macro mean."""
    from sklearn import metrics

    predicted, truth = logits.argmax(-1).numpy(), labels.numpy()
    average = "binary" if logits.shape[-1] == 2 else "macro"
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "f1": float(metrics.f1_score(truth, predicted, average=average, zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(truth, predicted)),
    }


def regression_figures(predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """predictions (N,), labels (N,). A constant prediction correlates with nothing: 0."""
    from scipy import stats

    if predictions.unique().numel() < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    x, y = predictions.double().numpy(), labels.double().numpy()
    return {
        "pearson": float(stats.pearsonr(x, y).statistic),
        "spearman": float(stats.spearmanr(x, y).statistic),
    }


def language_model_figures(loss: float) -> dict[str, float]:
    """loss: mean negative log-likelihood per token, in nats."""
    return {"perplexity": math.exp(min(loss, 50.0))}
