"""Whole runs, side by side or one after the other, and what is noted of them.

A run is T stages of E epochs over the same rows, shuffled anew in every epoch.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from training import Provider, Work, free, reason

from progtuning_kernels.bench import Batch, timed_steps


@dataclass
class Record:
    """What one provider's runs left behind. Times: stage -> milliseconds per step."""

    first_ms: list[list[float]]  # of the first step of a stage, which pays for the change
    filling_ms: list[list[float]]  # of the others in the first epoch
    later_ms: list[list[float]]
    stages: list[dict[str, Any]]  # bytes
    losses: list[float] = field(default_factory=list)  # of the first run, step by step
    run_s: list[float] = field(default_factory=list)  # of all steps of a run
    note: str | None = None

    @classmethod
    def of(cls, stages: int) -> Record:
        first, filling, later = ([[] for _ in range(stages)] for _ in range(3))
        return cls(first, filling, later, [{} for _ in range(stages)])

    def add(self, other: Record) -> None:
        """Times of another run of the same."""
        for own, its in (
            (self.first_ms, other.first_ms),
            (self.filling_ms, other.filling_ms),
            (self.later_ms, other.later_ms),
        ):
            for stage, times in enumerate(its):
                own[stage] += times
        self.run_s += other.run_s


def _stretches(work: Work, together: int) -> Iterator[list[int]]:
    """Steps between two looks at the clock: the first of a stage alone, epochs never mixed."""
    for stage in range(work.stages):
        for epoch in range(work.epochs):
            first = stage * work.steps_of_stage + epoch * work.batches
            steps = list(range(first, first + work.batches))
            if epoch == 0:
                yield [steps.pop(0)]
            for at in range(0, len(steps), together):
                yield steps[at : at + together]


class _Runner:
    """One run of one provider, a stretch at a time."""

    def __init__(self, provider: Provider, work: Work, record: Record) -> None:
        self.work, self.record = work, record
        self.measures_bytes = not record.run_s  # in the first run
        self.resident_bytes = 0
        if work.device.type == "cuda":
            self.resident_bytes = torch.cuda.memory_allocated(work.device)
        self.session = provider.session(work)
        self.counts_saved = self.measures_bytes and not provider.compiles
        self.total_ms = 0.0

    def advance(self, steps: Sequence[int], batches: Sequence[Batch]) -> None:
        work, record, device = self.work, self.record, self.work.device
        stage, within = divmod(steps[0], work.steps_of_stage)
        if device.type == "cuda" and not within:
            torch.cuda.reset_peak_memory_stats(device)
        of_steps = [batches[step % work.batches] for step in steps]
        losses, spent_ms = timed_steps(self.session, steps, of_steps, device)
        self.total_ms += spent_ms
        kind = record.first_ms if not within else record.later_ms
        kind = record.filling_ms if 0 < within < work.batches else kind
        kind[stage] += [spent_ms / len(steps)] * len(steps)
        if self.measures_bytes:
            record.losses += [loss.item() for loss in losses]
            if steps[-1] + 1 == (stage + 1) * work.steps_of_stage:
                record.stages[stage] = self._bytes(batches[0])

    def _bytes(self, batch: Batch) -> dict[str, Any]:
        """By one more step, of which no time is kept."""
        device, found = self.work.device, {}
        if device.type == "cuda":
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
            found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
            found["resident_before_bytes"] = self.resident_bytes  # of others: should be nothing
        weights = {_address(p) for p in self.session.model.parameters()}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if type(tensor) is Tensor and _address(tensor) not in weights:
                saved[_address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = nullcontext()
        if self.counts_saved:
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks:
            self.session.backward(batch)
        gradients = [p.grad for p in self.session.model.parameters() if p.grad is not None]
        found["gradient_bytes_after_backward"] = sum(g.nbytes for g in gradients)
        del gradients
        self.session.update()
        found["saved_bytes"] = sum(saved.values()) if self.counts_saved else None
        found["state_bytes"] = tensor_bytes(self.session.optimizer_tensors(), but=weights)
        parameters = [p for p in self.session.model.parameters() if p.requires_grad]
        return found | {"trainable_params": sum(p.numel() for p in parameters)}

    def finish(self) -> None:
        self.record.run_s.append(self.total_ms / 1e3)
        self.record.note = self.session.note()
        self.session.close()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensor_bytes(kept: Any, *, but: Collection[int] = ()) -> int:
    """Bytes of the distinct storages in nested dicts, lists and objects with `__dict__`.

    Args:
        but: addresses of storages that do not count.
    """
    found: dict[int, int] = {}

    def walk(thing: Any) -> None:
        if isinstance(thing, Tensor):
            if hasattr(thing, "__tensor_flatten__"):  # a quantised tensor is made of several
                walk([getattr(thing, name) for name in thing.__tensor_flatten__()[0]])
            else:
                found[_address(thing)] = thing.untyped_storage().nbytes()
        elif isinstance(thing, Mapping):
            walk(list(thing.values()))
        elif isinstance(thing, (list, tuple, set)):
            for part in thing:
                walk(part)
        elif hasattr(thing, "__dict__"):
            walk([v for v in vars(thing).values() if isinstance(v, (Tensor, Mapping, list))])

    walk(kept)
    return sum(size for address, size in found.items() if address not in but)


def train(
    providers: Mapping[str, Provider], work: Work, together: int, records: dict[str, Record]
) -> dict[str, str]:
    """One run of everybody: after each of A's steps comes one of B's, so that whatever else the
    machine does meets all alike. All models live at once: peak memory wants them one by one.

    Args:
        together: steps between two looks at the clock, but for the first of a stage.
        records: to which the run is added.

    Returns:
        Who raised, and the reason; they are left out from there on.
    """
    failed: dict[str, str] = {}
    runners: dict[str, _Runner] = {}

    @contextmanager
    def left_out_if_it_raises(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed[name] = reason(error)
            runners.pop(name, None)

    for name, provider in providers.items():
        with left_out_if_it_raises(name):
            record = records.setdefault(name, Record.of(work.stages))
            runners[name] = _Runner(provider, work, record)
    epoch, batches = -1, []
    for steps in _stretches(work, together):
        if steps[0] // work.batches != epoch:
            epoch = steps[0] // work.batches
            batches = work.epoch(epoch)
        for name in list(runners):
            with left_out_if_it_raises(name):
                runners[name].advance(steps, batches)
    for name in list(runners):
        with left_out_if_it_raises(name):
            runners[name].finish()
    runners.clear()
    free(work.device, compiled=any(p.compiles for p in providers.values()))
    return failed


def _spread(times_ms: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    return {
        "step_ms": statistics.median(ordered),
        "step_ms_p20": ordered[len(ordered) // 5],
        "step_ms_p80": ordered[4 * len(ordered) // 5],
        "steps": len(ordered),
    }


def _composed(
    stages: Sequence[Mapping[str, Any]], epochs_per_stage: int, steps_per_epoch: int
) -> dict[str, float]:
    first_ms = sum(s["first_step_ms"] - s["first_epoch"]["step_ms"] for s in stages)
    step_ms = sum(
        s["first_epoch"]["step_ms"] + (epochs_per_stage - 1) * s["later_epochs"]["step_ms"]
        for s in stages
    )
    return {
        "epochs_per_stage": epochs_per_stage,
        "run_s": (step_ms * steps_per_epoch + first_ms) / 1e3,
        "first_steps_extra_s": first_ms / 1e3,
    }


def summarise(
    provider: Provider, work: Work, record: Record, *, epochs: Sequence[int], steps_per_epoch: int
) -> dict[str, Any]:
    """What is stored of a provider.

    `whole_runs` composes runs longer than the measured one: per stage, the first step, the median
    of the first epoch and that of the later ones, times their steps. Where nothing is cached, the
    two epochs are alike and share one median.

    Args:
        epochs: of a stage, one whole run for each.
        steps_per_epoch: of those runs.
    """
    stages: list[dict[str, Any]] = []
    for stage, boundary in enumerate(work.boundaries):
        filling, later = record.filling_ms[stage], record.later_ms[stage]
        if not provider.caches:
            filling = later = filling + later
        stages.append(
            {
                "boundary": boundary if provider.follows_plan else None,
                "first_step_ms": statistics.median(record.first_ms[stage]),
                "first_epoch": _spread(filling),
                "later_epochs": _spread(later or filling),
                **record.stages[stage],
            }
        )
    measured_s = statistics.median(record.run_s)
    composed_s = _composed(stages, work.epochs, work.batches)["run_s"]
    return {
        "stages": stages,
        "whole_runs": [_composed(stages, count, steps_per_epoch) for count in epochs],
        "measured_run_s": measured_s,
        "composed_over_measured": composed_s / measured_s,  # of a run of the measured length
        "losses": record.losses,
        "last_epoch_loss": statistics.mean(record.losses[-work.batches :]),
        **({"note": record.note} if record.note else {}),
    }
