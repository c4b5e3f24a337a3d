"""The result of planning, and its table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from ..text_table import Table, as_html, as_text
from .host_plan import HostPlan
from .ranks import Ranks, Traffic

_WIDTH = 80  # columns of a terminal


@dataclass(frozen=True)
class Part:
    """Some of the bytes of a peak.

    Attributes:
        what: in words; of tensors that come and go their number, dtype and shape.
        nbytes: of all of them.
    """

    what: str
    nbytes: int


@dataclass(frozen=True)
class StagePlan:
    """What one stage costs.

    Attributes:
        first_step: its first optimizer step, from 0.
        steps: number of optimizer steps in it.
        boundary: the effective boundary.
        trains: units that train, in words.
        trainable_params: elements that an optimizer step updates.
        weight_bytes: of all parameters and buffers.
        gradient_bytes: of the trained parameters; under in_backward, in one process, those of the
            largest block of `MaskedAdamW`, or of three that follow each other where state is on the
            host.
        state_bytes: of the optimizer, with master weights, beside the weights.
        activation_bytes: of distinct tensors that a forward keeps for backward.
        peak_bytes: weights, state, and the most that activations, temporaries and gradients take
            together. An allocator's rounding, workspaces of libraries and a GPU's context (about
            0.5 GiB) come on top.
        forward_flops: of one micro-batch; a multiplication and an addition are two.
        backward_flops: the same of backward.
        step_ratio: time of a step relative to full training: of measured unit costs where the plan
            is calibrated, otherwise of the operations, the optimizer left out.
        step_ms: milliseconds of a step of one micro-batch; None where it is not calibrated.
        cache_bytes_per_sample: of one row's boundary activations; None without cache, and in a
            stage without prefix.
        cached_step_ratio: of a step whose rows are all in the cache; None as above.
        buffer_bytes: of what communication between ranks keeps: DDP's buckets, weights that FSDP2
            gathers at a time, or DeepSpeed's bucket; 0 for one rank.
        traffic: what each of several ranks sends in a step; None for one. All bytes are those of
            the first rank, whose shards are the largest.
        host: what is kept in host memory and goes there and back in a step; None where the state
            lies beside the weights.
        peak_parts: what `peak_bytes` is the sum of; empty where padding was taken off it.
    """

    first_step: int
    steps: int
    boundary: int
    trains: str
    trainable_params: int
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int
    forward_flops: int
    backward_flops: int
    step_ratio: float
    step_ms: float | None = None
    cache_bytes_per_sample: int | None = None
    cached_step_ratio: float | None = None
    buffer_bytes: int = 0
    traffic: Traffic | None = None
    host: HostPlan | None = None
    peak_parts: tuple[Part, ...] = ()

    @property
    def graph_bytes(self) -> int:
        """What captured graphs of one kind of batch keep between steps (`patch_model(graph="on")`):
        activations, and gradients twice, as backward makes them and as it hands them out.
        """
        return self.activation_bytes + 2 * self.gradient_bytes

    @property
    def flops(self) -> int:
        """Operations of forward and backward together."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Remedy:
    """An option that lowers the peak.

    Attributes:
        option: what to change, in words.
        peak_bytes: of the same stage with it.
    """

    option: str
    peak_bytes: int


@dataclass(frozen=True)
class TrainingPlan:
    """What a run costs, stage by stage. `print(plan)` shows it as a table.

    Attributes:
        title: the model and the shape of a micro-batch.
        stages: in the order of the run.
        full: one step of full training, to compare with.
        memory_bytes: what a stage has to fit in, as it was given; None: nothing to fit.
        remedies: what would lower the peak, the most effective first.
        notes: what was assumed, a line each.
        calibrated: whether times come from a measurement on this machine.
        length_known: whether `steps` are those of the run; otherwise they are in its proportions.
        ranks: number of ranks, and what spreads the model over them.
    """

    title: str
    stages: tuple[StagePlan, ...]
    full: StagePlan
    memory_bytes: int | None
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]
    calibrated: bool
    length_known: bool = True
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def run_ratio(self) -> float:
        """Time of the whole run relative to full training; without cache."""
        return sum(s.steps * s.step_ratio for s in self.stages) / self.total_steps

    @property
    def cached_run_ratio(self) -> float | None:
        """`run_ratio` if every row of a stage with a prefix is in the cache; None without a cache.

        A run comes near it with many epochs a stage: the first epoch of each computes and stores.
        """
        if all(s.cached_step_ratio is None for s in self.stages):
            return None
        times = (
            s.steps * (s.step_ratio if s.cached_step_ratio is None else s.cached_step_ratio)
            for s in self.stages
        )
        return sum(times) / self.total_steps

    @property
    def peak_stage(self) -> int:
        """Index of the stage that takes most memory; the first of several."""
        return max(range(len(self.stages)), key=lambda i: self.stages[i].peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak of that stage."""
        return self.stages[self.peak_stage].peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits in `memory_bytes`; None if no memory was given."""
        return None if self.memory_bytes is None else self.peak_bytes <= self.memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {
            "total_steps": self.total_steps,
            "run_ratio": self.run_ratio,
            "cached_run_ratio": self.cached_run_ratio,
            "peak_stage": self.peak_stage,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        def filled(line: str) -> str:
            # of what is set in, below its text and not below its size
            return textwrap.fill(line, _WIDTH, subsequent_indent=" " * 18 * line.startswith("  "))

        return as_text(filled(p) if isinstance(p, str) else p for p in self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        named = [(str(i + 1), stage) for i, stage in enumerate(self.stages)]
        named.append(("full", self.full))
        on = f" on each of {self.ranks.count:,} ranks" if self.ranks.count > 1 else ""
        memory, unit = self._memory(named)
        title = f"memory of a step{on} in {unit}" + "; of a row in the cache in KiB" * self._cached
        return [
            self.title,
            "",
            "a step of one micro-batch, and its time as a share of full training:",
            Table(self._times(named), left=[0, 2]),
            "",
            f"{title}:",
            Table(memory, left=[0]),
            "",
            *self._traffic(named),
            *self._host(named),
            *self._arithmetic(),
            *self._conclusions(),
        ]

    @property
    def _cached(self) -> bool:
        return any(stage.cache_bytes_per_sample is not None for stage in self.stages)

    def _times(self, named: Sequence[tuple[str, StagePlan]]) -> list[list[str]]:
        rows = [["stage", "steps", "trains", "params", "ms" if self.calibrated else "GFLOP"]]
        rows[0] += ["of full"] + ["cached"] * self._cached
        for name, s in named:
            steps = f"{s.steps:,}" if self.length_known else f"{s.steps / self.total_steps:.0%}"
            cost = f"{s.flops / 1e9:,.1f}" if s.step_ms is None else f"{s.step_ms:,.1f}"
            row = [name, steps if s.steps else "", s.trains, f"{s.trainable_params / 1e6:,.2f}M"]
            row += [cost, f"{s.step_ratio:.3f}"]
            if self._cached:
                ratio = s.cached_step_ratio
                row.append("" if ratio is None else f"{ratio:.3f}")
            rows.append(row)
        return rows

    def _memory(self, named: Sequence[tuple[str, StagePlan]]) -> tuple[list[list[str]], str]:
        several = self.ranks.count > 1
        unit, shown = _unit(max(s.peak_bytes for _, s in named))
        rows = [["stage", "weights", "gradients", "state", "activations"]]
        rows[0] += ["buffers"] * several + ["peak"]
        rows[0] += ["cache row"] * self._cached + ["fits"] * (self.memory_bytes is not None)
        for name, s in named:
            sizes = [s.weight_bytes, s.gradient_bytes, s.state_bytes, s.activation_bytes]
            sizes += [s.buffer_bytes] * several
            row = [name, *map(shown, (*sizes, s.peak_bytes))]
            if self._cached:
                size = s.cache_bytes_per_sample
                row.append("" if size is None else f"{size / 2**10:,.1f}")
            if self.memory_bytes is not None:
                row.append("yes" if s.peak_bytes <= self.memory_bytes else "NO")
            rows.append(row)
        return rows, unit

    def _traffic(self, named: Sequence[tuple[str, StagePlan]]) -> list[str | Table]:
        if self.ranks.count == 1:
            return []
        rows = [["stage", "gradients", "weights", "again in backward", "sent"]]
        traffic = {name: astuple(s.traffic) for name, s in named if s.traffic is not None}
        unit, shown = _unit(max(map(max, traffic.values())))
        rows += [[name, *map(shown, sizes)] for name, sizes in traffic.items()]
        if self.ranks.strategy != "fsdp2":  # the others gather nothing in backward
            rows = [[*row[:3], row[4]] for row in rows]
        title = f"what each of {self.ranks.count:,} ranks reduces, gathers and sends in {unit}"
        return [f"{title} ({self.ranks.strategy}):", Table(rows, left=[0]), ""]

    def _host(self, named: Sequence[tuple[str, StagePlan]]) -> list[str | Table]:
        hosts = [(name, s, s.host) for name, s in named if s.host is not None]
        if not hosts:
            return []
        unit, shown = _unit(max(host.update_bytes for *_, host in hosts))
        sizes = [["stage", "state", "weights", "staging", "to host", "to device", "updates"]]
        times = [["stage", "to host", "to device", "update", "in backward", "after it", "hidden"]]
        slowest = max(max(astuple(host)[6:]) for *_, host in hosts)
        scale, in_words = (1, "seconds") if slowest >= 1 else (1e3, "milliseconds")
        for name, s, host in hosts:
            sizes.append([name, *map(shown, astuple(host)[:6])])
            times.append([name, *(f"{scale * seconds:.2f}" for seconds in astuple(host)[6:])])
            if not host.beside_backward_s:
                times[-1].append("NO")
            elif s.step_ms is None:
                rate = s.backward_flops / host.beside_backward_s
                times[-1].append(f"below {rate / 1e12:,.1f} TFLOP/s")
            else:
                backward_s = s.step_ms / 1e3 * s.backward_flops / s.flops
                times[-1].append("yes" if host.beside_backward_s <= backward_s else "NO")
        return [
            f"in host memory, and what a step sends and updates, in {unit}:",
            Table(sizes, left=[0]),
            "",
            f"{in_words} of a step for that, and whether backward hides what runs beside it:",
            Table(times, left=[0]),
            "",
        ]

    def _arithmetic(self) -> list[str | Table]:
        parts = self.stages[self.peak_stage].peak_parts
        if self.memory_bytes is None or not parts:
            return []
        unit, shown = _unit(self.peak_bytes)
        rows = [[shown(part.nbytes), part.what] for part in parts]
        title = f"the peak of stage {self.peak_stage + 1}, in {unit}:"
        return [title, Table(rows, left=[1], head=False), ""]

    def _conclusions(self) -> list[str]:
        how = "measured unit costs" if self.calibrated else "operations, the optimizer left out"
        lines = [f"whole run / full training: {self.run_ratio:.3f} (by {how})"]
        if (cached := self.cached_run_ratio) is not None:
            lines[0] += f"; {cached:.3f} once the cache holds every row"
        number = self.peak_stage + 1
        peak = f"the peak is stage {number}: {_size(self.peak_bytes)}"
        if self.memory_bytes is not None:
            verdict = "fits in" if self.fits else "does NOT fit in"
            peak += f", which {verdict} {_size(self.memory_bytes)}"
        lines.append(f"{peak}; later stages lower the mean, not the peak")
        memory_bytes = self.memory_bytes or 0
        if self.fits:
            lines.append(
                f"{_size(memory_bytes - self.peak_bytes)} are left for what is not counted: a "
                "GPU's context (about 0.5 GiB), workspaces, and what an allocator cannot use again"
            )
        if (host := self.stages[self.peak_stage].host) is not None:
            lines.append(f"stage {number} takes {_size(host.host_bytes)} of host memory")
        if self.remedies:
            lines.append(f"stage {number} would take at its peak:")
            lines += [f"  {_size(r.peak_bytes):>9}  with {r.option}" for r in self.remedies]
        if self.fits is False and all(r.peak_bytes > memory_bytes for r in self.remedies):
            without = "" if host is None else ", without state_device"
            lines.append(
                "none of them fits: it takes a smaller model, shorter rows, or more ranks "
                f"(fsdp2{without})"
            )
        if (count := self.ranks.count) > 1:
            share = f"{count - 1}/{count}"
            twice = "" if self.ranks.strategy == "fsdp2" else ", twice that of gradients"
            lines.append(f"sent: {share} of what is reduced and gathered{twice}, as a ring sends")
        return [*lines, *self.notes]


def _unit(largest: int) -> tuple[str, Callable[[int], str]]:
    """The unit of a table, and how a size looks in it."""
    if largest >= 10 * 2**30:
        return "GiB", lambda count: f"{count / 2**30:,.2f}"
    return "MiB", lambda count: f"{count / 2**20:,.1f}"


def _size(count: int) -> str:
    if count >= 2**30:
        return f"{count / 2**30:,.2f} GiB"
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
