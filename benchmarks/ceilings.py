"""How much faster a run can be at most, by what it computes and by what it launches; no GPU.

    python benchmarks/ceilings.py            # count, store, print: 1 minute
    python benchmarks/ceilings.py --table    # the table of docs/tables/benchmarks.md

A step takes at least the time of its operations, and at least the time in which its CPU launches
its kernels. So where full training is bound by operations, a run is at most as much faster as it
has fewer of them, and where full training is bound by launches, as it has fewer of those. A target
of an experiment lies below both ceilings, as which one holds depends on GPU and CPU.

FLOP are the planner's (`plan_training`), of matmuls and attention. Launches are operations of
torch's that start at least one kernel, and kernels of ours, in one step of every stage: the model
is a narrow one with as many blocks, on CPU tensors that say they lie on a GPU
(tests/support/pretend_cuda.py), with a GPU's forms of dropout, attention and layer norm; one fused
or foreach operation counts as one. Kernels of ours run wherever they can, which launches least.

Captured graphs launch once for a forward and once for a backward: the ceiling by FLOP alone holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from stored_results import store
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compiled" / "ceilings.json"
EXPERIMENTS = ("gpu-bert", "gpu-llama-1b")
WAYS = ("full", "naive freezing", "ours, packing off", "ours", "ours, cache")
# of the same operations; what they launch cannot be counted without a GPU
SAME_FLOP = {"full, liger-kernel": "full", "naive freezing, liger-kernel": "naive freezing"}
# but for the padding that captured graphs compute, a 16th of the places; their launches are none
SAME_FLOP |= {"ours, graph": "ours", "ours, cache, graph": "ours, cache"}
SAME_WORK = {"gpu-graph": "gpu-bert"}

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 4}  # csrc/launchers.h


def launches_kernel(func: Any) -> bool:
    """Whether an operation of ATen computes something: no view, no memory without values."""
    name = func.overloadpacket.__name__
    no_values = ("empty", "new_empty", "detach", "lift", "alias", "promote_types", "_unsafe_view")
    return func.namespace == "aten" and not func.is_view and not name.startswith(no_values)


class Launches(TorchDispatchMode):
    """Counts them while `watches` says so."""

    def __init__(self, watches: Any) -> None:
        super().__init__()
        self.count, self._watches = 0, watches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += launches_kernel(func) and self._watches()
        with torch._C.DisableTorchFunction():  # of backward, as in pretend_cuda.py
            return func(*args, **(kwargs or {}))


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One kernel each way, as on a GPU, behind the sum that a mask becomes there."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        added = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = added.masked_fill_(attn_mask.logical_not(), float("-inf"))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _layer_norm(x: Tensor, *args: Any, own: Any = F.layer_norm, **kwargs: Any) -> Tensor:
    """Autocast on a GPU makes it float32."""
    return own(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)


@contextlib.contextmanager
def _pretended_gpu() -> Iterator[tuple[Any, Any]]:
    """A PretendCuda, and the counts of kernels of ours, which do not run."""
    import transformers
    import unlaunched_kernels
    from pretend_cuda import PretendCuda

    from progtuning_kernels import backend
    from progtuning_kernels.ops.norm.triton import NO_DROPOUT

    for name in ("BertForSequenceClassification", "LlamaForCausalLM"):
        getattr(transformers, name)  # imported now: not where torch.cuda is a stand-in

    def forward(*args: Any, own: Any = unlaunched_kernels._forward, **options: Any) -> Any:
        return own(*args, **options | {"dropout": NO_DROPOUT})  # values count for nothing here

    built = type("Built", (), {"dtype_codes": DTYPE_CODES})()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (F, "dropout", _dropout),
            (F, "scaled_dot_product_attention", _attention),
            (F, "layer_norm", _layer_norm),
            (backend, "_load_native", lambda: (built, None)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        changed = {"forward": forward}
        stack.enter_context(mock.patch.dict(unlaunched_kernels._COMPUTED, changed))
        pretend = stack.enter_context(PretendCuda())
        kernels = stack.enter_context(unlaunched_kernels.unlaunched(pretend, native=True))
        yield pretend, kernels


def count_launches(work: Any, way: str) -> dict[str, list[int]]:
    """Of a step of every stage: in its first epoch, and in later ones, which a cache serves.

    work: of any width; two epochs a stage of two batches.
    """
    from providers import PROVIDERS
    from training import Work

    with _pretended_gpu() as (pretend, kernels):

        class OnGpu(Work):
            def model(self) -> nn.Module:
                return pretend.put(super().model())

            def autocast(self) -> Any:  # PretendCuda's limit: autocast of a GPU casts nothing
                on = self.precision == "bf16-autocast"
                return torch.autocast("cpu", torch.bfloat16, enabled=on)

        work = OnGpu(**vars(work) | {"batches": 2, "epochs": 2, "forced_kernels": True})
        session = PROVIDERS[way].session(work)
        found = []
        for step in range(work.steps):
            batch = pretend.put(work.epoch(0)[step % 2])
            session.begin(step)
            kernels.launches.clear()
            with Launches(lambda: pretend._watching) as torchs:
                session.backward(batch)
                session.update()
            found.append(torchs.count + kernels.launches.total())
        session.close()
    # the first step of a stage builds tables
    stages = range(0, work.steps, work.steps_of_stage)
    return {"first": [found[s + 1] for s in stages], "later": [found[s + 3] for s in stages]}


def count_flop(work: Any, real_tokens: float) -> dict[str, dict[str, list[float]]]:
    """By way, as launches; and the peak of the largest stage in bytes, by optimizer."""
    from progtuning_kernels import ProgressiveSchedule, plan_training

    model = replace(work, device=torch.device("meta")).model()
    sizes = dict(batch_size=work.rows, seq_len=work.tokens, device=torch.device("cuda"))
    sizes |= dict(dtype=torch.float32 if work.precision == "fp32" else torch.bfloat16)
    schedule = ProgressiveSchedule(work.stages)
    padded = plan_training(model, schedule, **sizes)
    packed = plan_training(model, schedule, real_tokens=real_tokens, cache=True, **sizes)
    full, stages = float(padded.full.flops), range(work.stages)
    ours = [s.step_ratio * full for s in packed.stages]
    served = [s.cached_step_ratio or s.step_ratio for s in packed.stages]
    by_way = {
        "full": [full for _ in stages],
        "naive freezing": [s.step_ratio * full for s in padded.stages],
        "ours": ours,
    }
    by_way["ours, packing off"] = by_way["naive freezing"]
    found = {way: {"first": steps, "later": steps} for way, steps in by_way.items()}
    return found | {"ours, cache": {"first": ours, "later": [r * full for r in served]}}


def least_peak_share(work: Any) -> float:
    """Of full training's peak, what weights, 8-bit moments and one unit's gradients take alone."""
    from progtuning_kernels import ProgressiveSchedule, plan_training

    model = replace(work, device=torch.device("meta")).model()
    sizes = dict(batch_size=work.rows, seq_len=work.tokens, device=torch.device("cuda"))
    sizes |= dict(dtype=torch.bfloat16)
    schedule = ProgressiveSchedule(work.stages)
    # torch's AdamW keeps moments in the parameters' dtype
    full = plan_training(model, schedule, optimizer="adamw-bf16", **sizes).full.peak_bytes
    ours = plan_training(model, schedule, optimizer="adamw-8bit", in_backward=True, **sizes)
    kept = (s.weight_bytes + s.state_bytes + s.gradient_bytes for s in ours.stages)
    return max(kept) / full


def narrow(work: Any) -> Any:
    """A shape of as many blocks, for counting launches: its name in `training.SHAPES`."""
    import training

    heads = 2 if work.sizes.kv_heads is None else 4
    sizes = dict(width=64, heads=heads, inside=128, vocabulary=300)
    sizes |= {} if work.sizes.kv_heads is None else {"kv_heads": 2}
    name = f"{work.shape}, narrow"
    training.SHAPES[name] = replace(work.sizes, **sizes)
    return replace(work, shape=name, rows=4, tokens=16, device=torch.device("cpu"))


def counted(experiment: Any) -> dict[str, Any]:
    work = experiment.work(torch.device("cpu"))
    batches = replace(narrow(work), tokens=work.tokens, batches=64).epoch(0)
    real_tokens = torch.cat([batch["attention_mask"] for batch in batches]).double().mean().item()
    found: dict[str, Any] = {
        "title": experiment.title,
        "real_tokens": real_tokens,
        "FLOP": count_flop(work, real_tokens),
        "launches": {way: count_launches(narrow(work), way) for way in WAYS},
    }
    if any(t.metric == "peak_allocated_bytes" for t in experiment.targets):
        found["least_peak_share"] = least_peak_share(work)
    return found


def speedup(
    stored: dict[str, Any], resource: str, of: str, over: str, epochs_per_stage: int
) -> float | None:
    """Of a whole run, if it took as long as it has of a resource; None where none is counted."""

    def total(way: str) -> float | None:
        steps = stored[resource].get(SAME_FLOP.get(way, way) if resource == "FLOP" else way)
        if steps is None:
            return None
        return sum(steps["first"]) + (epochs_per_stage - 1) * sum(steps["later"])

    own, base = total(of), total(over)
    return base / own if own and base else None


def ceilings(
    experiment: str, target: dict[str, Any], content: dict[str, Any] | None = None
) -> dict[str, float]:
    """Of a target's metric, by resource: of several ways that of the best.

    Args:
        experiment: its name. target: fields of `experiment.Target`.
        content: of a ceilings.json; None: the stored one.

    Returns:
        {} where nothing is counted. A peak of memory has a floor in place of a ceiling.
    """
    if content is None:
        content = json.loads(RESULT.read_text()) if RESULT.exists() else {"experiments": {}}
    stored = content["experiments"].get(SAME_WORK.get(experiment, experiment))
    if stored is None:
        return {}
    if target["metric"] == "peak_allocated_bytes":
        return {"bytes": stored["least_peak_share"]}
    found: dict[str, float] = {}
    for resource in ("FLOP", "launches"):
        epochs = target["epochs_per_stage"]
        ways = [speedup(stored, resource, way, target["over"], epochs) for way in target["of"]]
        if known := [ratio for ratio in ways if ratio is not None]:
            found[resource] = max(known)
    return found


def in_words(found: dict[str, float]) -> str:
    """ "ceiling 1.29 x by FLOP, 1.33 x by launches"; nothing where nothing is known."""
    if "bytes" in found:
        return f"floor {found['bytes']:.2f} by bytes"
    shown = ", ".join(f"{ratio:.2f} x by {resource}" for resource, ratio in found.items())
    return f"ceiling {shown}" if shown else ""


def table(content: dict[str, Any]) -> str:
    """Markdown of a stored ceilings.json."""
    lines = [
        "| | launches of a step, by stage | x full by launches | if launches were free |",
        "|---|---|---:|---:|",
    ]
    for stored in content["experiments"].values():
        real = f"{stored['real_tokens']:.2f} of the places are real tokens"
        lines.append(f"| **{stored['title']}, {real}** | | | |")
        for way in WAYS:
            for epochs in (1, 3) if way == "ours, cache" else (1,):
                steps = stored["launches"][way]["later" if epochs > 1 else "first"]
                cells = [" → ".join(map(str, steps))]
                for resource in ("launches", "FLOP"):
                    ratio = speedup(stored, resource, way, "full", epochs)
                    cells.append(f"{ratio:.2f}")
                title = f"{way}, {epochs} epochs a stage" if epochs > 1 else way
                lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored table and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
        from experiment import read_experiment

        from progtuning_kernels.cli.provenance import provenance

        paths = {name: ROOT / "benchmarks" / "experiments" / f"{name}.toml" for name in EXPERIMENTS}
        found = {name: counted(read_experiment(path)) for name, path in paths.items()}
        store({"meta": provenance(None), "experiments": found}, RESULT)
    print(table(json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
