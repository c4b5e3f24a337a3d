"""An experiment of benchmarks/run.py: what is trained, by whom, and what it should reach."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from providers import PROVIDERS
from training import Work


@dataclass(frozen=True)
class Target:
    """What a provider should reach against another.

    Args:
        of: one provider or several, of which the best counts.
        metric: "run_s" of a whole run (a speedup, at least), "peak_allocated_bytes" (a share, at
            most).
        epochs_per_stage: of the whole run.
    """

    of: tuple[str, ...]
    over: str
    limit: float
    metric: str = "run_s"
    epochs_per_stage: int = 1


@dataclass(frozen=True)
class Experiment:
    """A TOML file of `benchmarks/experiments/`; `Work` says what most of it means.

    Args:
        batches, epochs: measured, of an epoch and of a stage.
        steps_per_epoch, epochs_per_stage: of the whole runs that are composed.
        repeats: runs of everybody.
        interleave: "steps": after each of A's steps comes one of B's, which times want on a noisy
            machine; "runs": A's run, B's run, A's run, which peak memory wants.
        gate_rows: of a batch in the gate; all of them without it.
    """

    name: str
    title: str
    device: str
    shape: str
    precision: str
    rows: int
    tokens: int
    stages: int
    batches: int
    epochs: int
    steps_per_epoch: int
    epochs_per_stage: tuple[int, ...]
    providers: tuple[str, ...]
    repeats: int = 1
    interleave: str = "steps"
    steps_together: int = 1
    gate_rows: int | None = None
    targets: tuple[Target, ...] = ()

    def work(self, device: torch.device) -> Work:
        names = ("shape", "precision", "rows", "tokens", "stages", "batches", "epochs")
        return Work(**{name: getattr(self, name) for name in names}, device=device)


def read_experiment(path: Path) -> Experiment:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib
        except ImportError:
            raise SystemExit("experiments are TOML: Python 3.11, or pip install tomli") from None
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        targets = tuple(
            Target(**{**t, "of": (t["of"],) if isinstance(t["of"], str) else tuple(t["of"])})
            for t in content.pop("targets", ())
        )
        lists = {k: tuple(v) for k, v in content.items() if isinstance(v, list)}
        experiment = Experiment(path.stem, **(content | lists), targets=targets)
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from error
    if unknown := [n for n in experiment.providers if n not in PROVIDERS]:
        raise SystemExit(f"{path}: no provider {unknown[0]!r}; there are {', '.join(PROVIDERS)}")
    if experiment.interleave not in ("steps", "runs"):
        raise SystemExit(f"{path}: interleave is steps or runs, not {experiment.interleave!r}")
    return experiment
