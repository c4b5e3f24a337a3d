"""`patch_model`: makes one model instance train what its schedule says, reversibly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn

from .cache import PrefixCache, automatic_cache
from .distributed import refuse_flat_parameters, unwrap
from .freezing.active_set import TiedPolicy
from .freezing.boundary import FrozenMode
from .freezing.handle import PatchHandle, handle_of, live_handles
from .freezing.only import compile_only
from .graphs import Graph
from .model.families import UnsupportedModelError
from .model.layout import find_layout
from .model.rows import TrainedRows
from .packing import Packing
from .schedules import (
    Schedule,
    check_schedule,
    decides_by_score,
    decides_in_training,
    whole_number,
)
from .schedules.plan import check_choice
from .swaps import Kernels

__all__ = ["PatchHandle", "check_options", "handle_of", "patch_model"]


def patch_model(
    model: nn.Module,
    schedule: Schedule,
    *,
    frozen_mode: FrozenMode = "eval",
    tied: TiedPolicy = "frozen",
    only: str | None = None,
    kernels: Kernels = "auto",
    packing: Packing = "auto",
    graph: Graph = "off",
    cache: PrefixCache | Literal["auto"] | None = None,
    blocks: str | Sequence[str] | None = None,
    rows: Mapping[str, Any] | TrainedRows | None = None,
    step: int = 0,
) -> PatchHandle:
    """Patch `model` in place so that it trains only what `schedule` says.

    Embeddings and blocks below the boundary run without autograd; gradients and optimizer state of
    frozen tensors are released when the plan changes. Until `handle.unpatch()` the model has other
    `requires_grad` flags, hooks, and subclasses of their own as the classes of some modules.

    Args:
        model: a Hugging Face model, PEFT adapters included, or any module with lists of blocks.
            Inside `DistributedDataParallel` or `torch.compile`, what is inside is patched, and the
            wrapper attached.
        schedule: plans every optimizer step, e.g. `ProgressiveSchedule(3, total_steps)`.
        frozen_mode: "eval" makes a frozen unit a fixed function (no dropout); "train" leaves its
            mode alone.
        tied: what happens to a weight shared by embeddings and LM head once the embeddings are
            frozen: "frozen" freezes it, "head_only" goes on training it with the gradient of its
            use in the head (the lookup is then not differentiated).
        only: a regular expression, as `re.search` takes it. A parameter whose qualified name, as
            `named_parameters` gives it, does not match is frozen under every plan until
            `handle.unpatch()`. A tied parameter goes by its first name. `rows` train in any case.
        kernels: "auto" lets norms, gated MLPs, BERT's output layers and the head with its loss, on
            a CPU dropout instead, run freeze-aware ops where these are there and pay, which the
            size of every call decides; "on" takes them at any size; "off" leaves all modules
            alone. Each kind is compared with the original first; `handle.kernel_report()` says
            what became of it.
        packing: "auto" leaves padding out of what blocks compute, where at most 95 % of a batch's
            places are real tokens and the first training forward with padding has shown equal
            outputs at these (that step is slower: a few rows run several times, which hooks outside
            the blocks see). "on" packs any padding; "off" computes on it, and draws the dropout of
            an unpatched model. Hidden states and logits at padding are zeros, or what a head makes
            of zeros: a loss of your own that reads them, such as a mean over T without the mask,
            wants "off", and is warned of in its first backward. In training `past_key_values` is
            None; evaluation of a decoder packs with `use_cache=False`. `handle.packing_report()`
            says what came of it.
        graph: "on" captures forward and backward of a stage's steps as CUDA graphs, and replays
            them: one launch for each instead of one for every kernel. Outputs are copies; hooks and
            other Python code inside the model run at the capture alone; in training `use_cache` is
            False unless it is given. "auto" captures where a stored result from a GPU says that it
            pays: there is none yet, so it means "off". `handle.graph_report()` says what was
            captured, and why not more.
        cache: keeps what the frozen prefix computes for a sample and reads it in later epochs;
            "auto" takes a quarter of the CPU memory that is free. It switches itself off where it
            does not pay; `handle.cache_report()` says so.
        blocks: qualified name of the block list where discovery cannot choose; several, in the
            order in which they run, of lists or of single modules that are a block each.
        rows: by name of a parameter, or of a module with a `weight` (the end of a name does where
            it is the only one): row numbers, as a list, range or 1-D tensor of integers. Of that
            tensor these rows alone train, such as those of new tokens in embedding and head: there
            is gradient, optimizer state and update for no other, and all others keep their bits.
            Make the optimizer after patching, from `handle.param_groups()`. A tied tensor is named
            once. What is named trains though it was frozen, as PEFT freezes a base.
        step: number of optimizer steps done. An optimizer that has its state already would
            otherwise lose that of tensors that the plan of step 0 freezes.

    Returns:
        The handle; call `handle.advance()` once per optimizer step.

    Raises:
        TypeError: no model, no schedule, a `step` that is no number, `blocks` that are no names, an
            `only` that is no text, or `rows` that are no mapping.
        UnsupportedModelError: no block list can be found, the blocks share weights, or the model
            has adapters that cannot freeze with their blocks, or is in a wrapper that does not
            follow changes of what trains, or a tensor whose rows cannot train alone is named; from
            the first training forward, if a unit turns out to be computed from a later one, or a
            tensor of which rows train to be used by code outside the modules that hold it.
        ValueError: the model, a part of it or one that it is a part of is patched already, the
            schedule does not fit it, an option has a value that is not named here, `only` is no
            regular expression, matches nothing that trains or leaves nothing to a plan, or `rows`
            names no tensor of the model, or no rows of it.
        RuntimeError: ranks do not train the same; from the first training forward, if a frozen
            block cuts off the gradient of an input, or checkpointing that of a trained block.

    Example:
        ```python
        handle = patch_model(model, ProgressiveSchedule(stages=2, total_steps=len(loader)))
        optimizer = MaskedAdamW(handle.param_groups(lr=5e-5), max_grad_norm=1.0)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch_model takes a model, an nn.Module, and a schedule, got {model!r}")
    check_schedule(schedule, "patch_model")
    options: dict[str, Any] = {"frozen_mode": frozen_mode, "tied": tied, "kernels": kernels}
    options |= {"packing": packing, "graph": graph, "only": only}
    _check_values({**options, "cache": cache})
    step = whole_number("step", step, 0)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(model).__name__}: a scripted or traced model runs no Python that could be "
            "patched: patch the model that it was made from"
        )
    inner = unwrap(model)
    _refuse_patched(inner)
    if decides_in_training(schedule) and any(h.schedule is schedule for h in list(live_handles)):
        raise ValueError(
            f"{schedule!r} decides for a model that is patched already: give each model its own"
        )
    if decides_by_score(schedule) and schedule.best is not None and schedule.best[0] > step:
        raise ValueError(
            f"{schedule!r} has scores of a run up to step {schedule.best[0]}, and this one begins "
            f"at step {step}: make a new schedule for it"
        )
    refuse_flat_parameters(inner)
    layout = find_layout(inner, blocks)
    cache = automatic_cache() if cache == "auto" else cache
    handle = PatchHandle(inner, schedule, layout, **options, cache=cache, rows=rows, step=step)
    if inner is model:
        return handle
    try:
        return handle.attach(model)
    except BaseException:
        handle.unpatch()
        raise


def check_options(options: Mapping[str, Any], taker: str) -> None:
    """Check options that `taker` gives to `patch_model`: `TypeError` for one that it has not, or
    `step`, `ValueError` for a value that it does not take.
    """
    parameters = signature(patch_model).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "step"]
    for name in options:
        if name not in known:
            raise TypeError(f"{taker} has no option {name!r}; it has {', '.join(known)}")
    _check_values(options)


def _check_values(options: Mapping[str, Any]) -> None:
    choices = {
        "frozen_mode": FrozenMode,
        "tied": TiedPolicy,
        "kernels": Kernels,
        "packing": Packing,
        "graph": Graph,
    }
    for name in choices.keys() & options:
        check_choice(name, options[name], choices[name])
    if (only := options.get("only")) is not None:
        compile_only(only)
    cache = options.get("cache")
    if not (cache is None or cache == "auto" or isinstance(cache, PrefixCache)):
        raise ValueError(f"cache must be a PrefixCache, 'auto' or None, got {cache!r}")


def _refuse_patched(model: nn.Module) -> None:
    """Raise `ValueError` for a patched parameter: two plans would undo each other's flags."""
    names = {id(p): name for name, p in model.named_parameters()}
    for handle in list(live_handles):
        if handle.model is model:
            raise ValueError("the model is patched already: call handle.unpatch() first")
        shared = next((names[id(p)] for p in handle.model.parameters() if id(p) in names), None)
        if shared is not None:
            raise ValueError(
                f"{shared} is in a {type(handle.model).__name__} that is patched already: call "
                "unpatch() of its handle first, then patch the model that is called in training"
            )
