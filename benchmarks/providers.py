"""Who trains: plain torch, freezing by hand, other people's packages, and this library.

A provider builds a `Session` from a `Work`. Others are optional: who is not installed, or cannot
run here, raises `Refused` with the reason. Hyper-parameters are AdamW's for everybody who has it
(learning rate and decay of the work, clipping at 1); where a package has another rule, those of its
README.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from training import Provider, Work, freeze

from progtuning_kernels import MaskedAdamW, PrefixCache, ProgressiveSchedule, patch_model
from progtuning_kernels.bench import (
    DECAY,
    Batch,
    Refused,
    Session,
    backward_of,
    our_session,
    plain_session,
)
from progtuning_kernels.freezing.decay_groups import decay_groups
from progtuning_kernels.optim import release_frozen_state
from progtuning_kernels.patch import handle_of

GIB = 2**30


def _torch_adamw(work: Work, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_groups(model), lr=work.lr, fused=True)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return decay_groups([p for p in model.parameters() if p.requires_grad], DECAY)


def _full(work: Work) -> Session:
    return plain_session(work, work.model())


def _full_compiled(work: Work) -> Session:
    return plain_session(work, torch.compile(work.model()))


def _freezing(work: Work, model: nn.Module) -> Callable[[int], None]:
    def begin(step: int) -> None:
        stage, within = divmod(step, work.steps_of_stage)
        if not within:
            freeze(model, stage, work.boundaries[stage])

    return begin


def _naive(work: Work) -> Session:
    model = work.model()
    return plain_session(work, model, begin=_freezing(work, model))


def _naive_compiled(work: Work) -> Session:
    model = work.model()
    return plain_session(work, torch.compile(model), begin=_freezing(work, model))


# ---- other packages


def _package(name: str) -> Any:
    logging.disable(logging.WARNING)  # of native parts for other versions of torch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Refused(f"not importable: {str(error).splitlines()[0]}") from None
    finally:
        logging.disable(logging.NOTSET)


def _liger(work: Work, *, naive: bool) -> Session:
    if not work.sizes.is_causal:
        raise Refused("liger-kernel has nothing for BERT")
    if work.device.type == "cpu":  # Triton 3.9's interpreter does not run liger 0.8's kernels
        raise Refused("Triton kernels need a GPU")
    liger = _package("liger_kernel.transformers")
    model = work.model()
    liger.apply_liger_kernel_to_llama(model=model)
    return plain_session(work, model, **({"begin": _freezing(work, model)} if naive else {}))


def _lora(work: Work) -> Session:
    peft = _package("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if work.sizes.is_causal else "SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
    )
    return plain_session(work, peft.get_peft_model(work.model(), config))


def _badam(work: Work) -> Session:
    """A block at a time, top to bottom, all blocks within the run: every one the same share."""
    badam, model = _package("badam"), work.model()
    stack = "model.layers" if work.sizes.is_causal else f"{work.sizes.kind}.encoder.layer"
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # that weights are better in bfloat16
        optimizer = badam.BlockOptimizer(
            base_optimizer=_torch_adamw(work, model),
            named_parameters_list=list(model.named_parameters()),
            block_prefix_list=[[f"{stack}.{i}."] for i in range(work.sizes.blocks)],
            switch_block_every=max(1, work.steps // work.sizes.blocks),
            switch_mode="descending",
            verbose=0,
        )
    session = plain_session(work, model, optimizer)
    clip_and_update = session.update

    def update() -> None:
        with redirect_stdout(StringIO()):  # it prints every block
            clip_and_update()

    def kept() -> Any:
        return [optimizer.base_optimizer.state, optimizer.param_idx2hp]

    return Session(model, backward_of(work, model), update, kept)


def _galore(work: Work) -> Session:
    galore, model = _package("galore_torch"), work.model()
    low = [p for n, p in model.named_parameters() if ".layer" in n and p.ndim == 2]
    kept = {id(p) for p in low}
    others = [p for p in model.parameters() if id(p) not in kept]
    optimizer = galore.GaLoreAdamW(
        [
            {"params": others},
            {"params": low, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
        ],
        lr=work.lr,
        weight_decay=DECAY,
        no_deprecation_warning=True,
    )
    return plain_session(work, model, optimizer)


def _lomo(work: Work) -> Session:
    lomo, model = _package("lomo_optim"), work.model()
    optimizer = lomo.Lomo(model, lr=work.lr)

    def backward(batch: Batch) -> Tensor:
        with work.autocast():
            loss = model(**batch).loss
        optimizer.fused_backward(loss, work.lr)
        return loss.detach()

    return Session(model, backward, lambda: None, lambda: ())


def _adalomo(work: Work) -> Session:
    lomo, model = _package("lomo_optim"), work.model()
    try:
        optimizer = lomo.AdaLomo(model, lr=work.lr)
    except (AssertionError, RuntimeError) as error:
        raise Refused(f"lomo-optim: {str(error).splitlines()[0]}") from None

    def backward(batch: Batch) -> Tensor:
        with work.autocast():
            loss = model(**batch).loss
        optimizer.fused_backward(loss, work.lr)
        return loss.detach()

    kept = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
    return Session(
        model, backward, lambda: None, lambda: [getattr(optimizer, name) for name in kept]
    )


def _torchao(work: Work) -> Session:
    optim, model = _package("torchao.optim"), work.model()
    return plain_session(work, model, optim.AdamW8bit(_groups(model), lr=work.lr))


def _bitsandbytes(work: Work) -> Session:
    bnb, model = _package("bitsandbytes"), work.model()
    return plain_session(work, model, bnb.optim.AdamW8bit(_groups(model), lr=work.lr))


def _flashoptim(work: Work) -> Session:
    flash, model = _package("flashoptim"), work.model()
    bits = 24 if next(model.parameters()).dtype.itemsize == 2 else None  # float32 has its 32
    optimizer = flash.FlashAdamW(_groups(model), lr=work.lr, master_weight_bits=bits)
    return plain_session(work, model, optimizer)


# ---- this library


def _schedule(work: Work) -> ProgressiveSchedule:
    return ProgressiveSchedule(work.stages, work.steps)


def _ours(work: Work, *, cached: bool = False, compiled: bool = False, **options: Any) -> Session:
    """options: of `patch_model` (frozen_mode, kernels, packing, graph), others of `MaskedAdamW`."""
    model = work.model()
    names = ("frozen_mode", "kernels", "packing", "graph")
    patching = {name: options.pop(name) for name in names if name in options}
    if work.forced_kernels and "kernels" not in patching:
        patching["kernels"] = "on"
    cache = PrefixCache(4 * GIB, device=work.device.type) if cached else None
    session = our_session(
        work, model, _schedule(work), cache=cache, optimizer_options=options, **patching
    )
    if compiled:
        for path in handle_of(model).layout.block_paths:
            model.get_submodule(path).compile()
    return session


def _ours_with_torch_adamw(work: Work) -> Session:
    model = work.model()
    optimizer = _torch_adamw(work, model)
    handle = patch_model(model, _schedule(work))
    handle.on_change(lambda handle: release_frozen_state(optimizer))

    def begin(step: int) -> None:
        if step:
            handle.advance()

    return plain_session(work, model, optimizer, begin=begin, close=handle.unpatch)


def _ours_without_truncation(work: Work) -> Session:
    """Frozen weights and `MaskedAdamW`, but the input of block 0 requires grad: what gradient
    checkpointing in transformers and `enable_input_require_grads()` do."""
    model = work.model()
    model.enable_input_require_grads()
    optimizer = MaskedAdamW(_groups(model), lr=work.lr, max_grad_norm=work.clip)

    def begin(step: int) -> None:
        stage, within = divmod(step, work.steps_of_stage)
        if not within:
            freeze(model, stage, work.boundaries[stage], evaluate=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Session(model, backward_of(work, model), update, lambda: optimizer.state, begin)


def _planned(build: Callable[[Work], Session], **settings: Any) -> Provider:
    return Provider(build, follows_plan=True, **settings)


def _with(**options: Any) -> Callable[[Work], Session]:
    return lambda work: _ours(work, **options)


_APART = dict(same_rule=False)  # its gradients or its rule are its own
_IN_BACKWARD = dict(in_backward=True, clip_mode="previous_norm")

PROVIDERS: dict[str, Provider] = {
    "full": Provider(_full),
    "full, compiled": Provider(_full_compiled, compiles=True),
    "full, liger-kernel": Provider(
        lambda work: _liger(work, naive=False),
        patches_globally=True,
        packages=("liger-kernel",),
    ),
    "naive freezing": _planned(_naive),
    "naive freezing, compiled": _planned(_naive_compiled, compiles=True),
    "naive freezing, liger-kernel": _planned(
        lambda work: _liger(work, naive=True), patches_globally=True, packages=("liger-kernel",)
    ),
    "LoRA": Provider(_lora, **_APART, packages=("peft",), lr=1e-3),
    "BAdam": Provider(_badam, **_APART, packages=("badam",)),
    "GaLore": Provider(_galore, **_APART, packages=("galore-torch",)),
    "LOMO": Provider(_lomo, **_APART, packages=("lomo-optim",), lr=1e-2),
    "AdaLomo": Provider(_adalomo, **_APART, packages=("lomo-optim",), lr=5e-4),
    "torchao 8-bit": Provider(_torchao, movement_tolerance=0.3, packages=("torchao",)),
    "bitsandbytes 8-bit": Provider(
        _bitsandbytes, movement_tolerance=0.3, packages=("bitsandbytes",)
    ),
    "FlashOptim 8-bit": Provider(_flashoptim, movement_tolerance=0.3, packages=("flashoptim",)),
    "ours": _planned(_with()),
    "ours, cache": _planned(_with(cached=True), caches=True),
    "ours, graph": _planned(_with(graph="on"), captures=True),
    "ours, cache, graph": _planned(_with(cached=True, graph="on"), caches=True, captures=True),
    "ours, compiled": _planned(_with(compiled=True), compiles=True),
    "ours, 8-bit state": _planned(_with(state_dtype="8bit"), movement_tolerance=0.3),
    "ours, in backward": _planned(
        _with(**_IN_BACKWARD), keeps_gradients=False, clips_otherwise=True
    ),
    "ours, 8-bit in backward": _planned(
        _with(state_dtype="8bit", **_IN_BACKWARD),
        keeps_gradients=False,
        clips_otherwise=True,
        movement_tolerance=0.3,
    ),
    "ours, backward not truncated": _planned(_ours_without_truncation),
    "ours, torch's AdamW": _planned(_ours_with_torch_adamw),
    "ours, frozen state kept": _planned(_with(on_freeze="keep")),
    "ours, frozen dropout kept": _planned(_with(frozen_mode="train")),
    "ours, kernels off": _planned(_with(kernels="off")),
    "ours, packing off": _planned(_with(packing="off")),
}
