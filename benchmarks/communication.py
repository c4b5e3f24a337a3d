"""Two processes on a CPU: the share of a step that communication takes, in every stage.

    python benchmarks/communication.py [--output FOLDER]

Full training and this library's stages, under DDP and FSDP2, over gloo, one thread a process. Both
compute padded rows, without dropout. A step of two ranks is timed in turn with the same step in
groups of one rank, where nothing is sent; both processes run both, so that they share the machine
alike. What the first takes longer is communication that no computation hides: `share` is that part
of the step.

First comes the gate: a step in every stage moves the weights as plain torch does in one process, on
the rows of both ranks. Without it there are no numbers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stored_results import store
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import Work, freeze

from progtuning_kernels import ProgressiveSchedule
from progtuning_kernels.bench import (
    DECAY,
    Batch,
    Refused,
    Session,
    our_session,
    plain_session,
    timed_steps,
)
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.freezing.decay_groups import decay_groups
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.sharding import is_sharded

RANKS = 2
# sums of two ranks round otherwise; with an eps as large as this AdamW does not blow that up
EPS, MOVEMENT_TOLERANCE = 1e-3, 1e-3


@dataclass(frozen=True)
class Settings:
    shape: str = field(default="MiniLM", metadata={"help": "of the model"})
    rows: int = field(default=8, metadata={"help": "of a batch, on each rank"})
    tokens: int = field(default=64, metadata={"help": "of a row"})
    stages: int = field(default=3, metadata={"help": "of the progressive schedule"})
    steps: int = field(
        default=20,
        metadata={"help": "that are timed in a stage, after one that pays its change"},
    )

    @property
    def work(self) -> Work:
        """With the rows of all ranks."""
        return Work(
            self.shape,
            "fp32",
            RANKS * self.rows,
            self.tokens,
            stages=self.stages,
            batches=self.steps + 1,
            epochs=1,
            device=torch.device("cpu"),
            dropout=0.0,
        )

    def own(self, batch: Batch) -> Batch:
        first = dist.get_rank() * self.rows
        return {name: tensor[first : first + self.rows] for name, tensor in batch.items()}


def _ddp(model: nn.Module, group: Any) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def _fsdp2(model: nn.Module, group: Any) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    for path in find_layout(model).block_paths:
        fully_shard(model.get_submodule(path), mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {"ddp": _ddp, "fsdp2": _fsdp2}


def _full(work: Work, model: nn.Module, *, eps: float, **more: Any) -> Session:
    groups = decay_groups(list(model.parameters()), DECAY)
    return plain_session(
        work, model, torch.optim.AdamW(groups, lr=work.lr, eps=eps, fused=True), **more
    )


def _progressive(work: Work, model: nn.Module, *, eps: float) -> Session:
    schedule = ProgressiveSchedule(work.stages, work.steps)
    return our_session(work, model, schedule, optimizer_options={"eps": eps}, packing="off")


METHODS = {"full": _full, "progressive": _progressive}


def _gate(settings: Settings, method: str, wrap: Callable[[nn.Module, Any], nn.Module]) -> float:
    """Relative error of what a step in every stage moves; `Refused` where it is red."""
    work = replace(settings.work, batches=1)
    truth, model = work.model(), work.model()
    before = _weights(truth)
    begin = {}
    if method == "progressive":
        begin["begin"] = lambda stage: freeze(truth, stage, work.boundaries[stage])
    sessions = (
        _full(work, truth, eps=EPS, **begin),
        METHODS[method](work, wrap(model, dist.group.WORLD), eps=EPS),
    )
    for stage, batch in enumerate(replace(work, batches=work.stages).epoch(0)):
        for session, rows in zip(sessions, (batch, settings.own(batch)), strict=True):
            session.step(stage, rows)
    right = _weights(truth) - before
    error = float((_weights(model) - before - right).norm() / right.norm())
    if not error <= MOVEMENT_TOLERANCE:
        raise Refused(f"gate is red: the updates move {error:.1e} off one process")
    return error


def _weights(model: nn.Module) -> Tensor:
    whole = (p.full_tensor() if is_sharded(p) else p for p in model.parameters())
    return torch.cat([p.detach().flatten() for p in whole])


def _stages(
    settings: Settings, method: str, wrap: Callable[[nn.Module, Any], nn.Module], alone: Any
) -> list[dict[str, Any]]:
    """What every stage takes together and alone, step by step in turn."""
    work, stages = settings.work, []
    ways = {
        name: METHODS[method](work, wrap(work.model(), group), eps=1e-8)
        for name, group in (("together", dist.group.WORLD), ("alone", alone))
    }
    batches = [settings.own(batch) for batch in work.epoch(0)]
    for stage, boundary in enumerate(work.boundaries):
        times_ms: dict[str, list[float]] = {name: [] for name in ways}
        for within, batch in enumerate(batches):
            for name, session in ways.items():
                dist.barrier()
                number = stage * work.batches + within
                times_ms[name].append(timed_steps(session, [number], [batch], work.device)[1])
        step_ms = {name: statistics.median(times[1:]) for name, times in times_ms.items()}
        stages.append(
            {
                "boundary": boundary if method == "progressive" else 0,
                "step_ms": step_ms["together"],
                "alone_ms": step_ms["alone"],
                "share": 1 - step_ms["alone"] / step_ms["together"],
            }
        )
    for session in ways.values():
        session.close()
    return stages


def measure(settings: Settings) -> dict[str, Any]:
    """Everything, in a process group of `RANKS`; what is stored."""
    groups = [dist.new_group([rank]) for rank in range(RANKS)]
    ways: dict[str, dict[str, Any]] = {}
    for strategy, wrap in WRAPPERS.items():
        for method in METHODS:
            error = _gate(settings, method, wrap)
            stages = _stages(settings, method, wrap, groups[dist.get_rank()])
            ways[f"{strategy}, {method}"] = {"movement_error": error, "stages": stages}
    meta = provenance(torch.device("cpu"))
    return {"meta": meta, "settings": asdict(settings), "ways": ways}


def table(content: Mapping[str, Any]) -> str:
    """Markdown: milliseconds of a step, and the share of it that communication takes."""
    stages = range(1, content["settings"]["stages"] + 1)
    lines = [f"| | {' | '.join(f'stage {stage}' for stage in stages)} |"]
    lines.append(f"|---|{'---:|' * len(stages)}")
    shares = []
    for way, entry in content["ways"].items():
        cells = (f"{s['step_ms']:.1f} ms, {s['share']:.0%}" for s in entry["stages"])
        lines.append(f"| {way} | {' | '.join(cells)} |")
        shares += [s["share"] for s in entry["stages"]]
    lines += ["", "ms: a step of two ranks; %: the part of it that communication takes"]
    if min(shares) < 0:
        lines.append("a share below 0 is noise: repeat it with more --steps on a quiet machine")
    return "\n".join(lines)


def _rank(rank: int, folder: str, settings: Settings, output: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS
    )
    content = measure(settings)
    if rank == 0:
        print(table(content))
        if output is not None:
            store(content, output / "communication.json")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for setting in fields(Settings):
        kind, about = type(setting.default), f"{setting.metadata['help']} (%(default)s)"
        parser.add_argument(f"--{setting.name}", type=kind, default=setting.default, help=about)
    parser.add_argument("--output", type=Path, help="write communication.json in this folder")
    options = vars(parser.parse_args())
    output = options.pop("output")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, Settings(**options), output)
        torch.multiprocessing.start_processes(_rank, arguments, RANKS, start_method="spawn")


if __name__ == "__main__":
    main()
