"""Patched models with a prefix cache beside one without, and what is done to their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from proofs import FixedPlan
from tiny_models import tiny_model
from torch import nn

from progtuning_kernels import FreezePlan, PatchHandle, PrefixCache, patch_model
from progtuning_kernels.model.forward_hooks import ForwardHooks

BLOCKS = 4
BUDGET = 1 << 26


def cpu_cache(**options: Any) -> PrefixCache:
    return PrefixCache(BUDGET, device="cpu", **options)


def patched_at(
    model: nn.Module, boundary: int = 2, *, cache: PrefixCache | None = None, **options: Any
) -> PatchHandle:
    plan = FreezePlan.from_boundary(boundary, BLOCKS, embeddings=False)
    return patch_model(model, FixedPlan(plan), cache=cache, **options)


def cached_and_plain(
    name: str, boundary: int = 2, **options: Any
) -> tuple[PatchHandle, PatchHandle]:
    """The same model patched with a cache and without."""
    return (
        patched_at(tiny_model(name), boundary, cache=cpu_cache(), **options),
        patched_at(tiny_model(name), boundary, **options),
    )


def blocks_of(handle: PatchHandle) -> list[nn.Module]:
    return [handle.model.get_submodule(path) for path in handle.layout.block_paths]


@contextmanager
def rows_entering(block: nn.Module) -> Iterator[list[int]]:
    rows: list[int] = []
    # a hook of the user's that comes has the cache look at a row again
    hook = ForwardHooks(block, lambda m, args, kwargs: rows.append(args[0].shape[0]))
    try:
        yield rows
    finally:
        hook.remove()


def take_rows(inputs: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    return {k: v[list(rows)] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def joined(*batches: dict[str, Any]) -> dict[str, Any]:
    return {
        k: torch.cat([b[k] for b in batches]) if isinstance(v, torch.Tensor) else v
        for k, v in batches[0].items()
    }


def repadded(inputs: dict[str, Any], *, more: int, pad: int = 0) -> dict[str, Any]:
    """The same rows with `more` columns of padding (fewer, if negative) on the right."""
    tokens = inputs["input_ids"].shape[1]
    changed = {}
    for name, value in inputs.items():
        if not (isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == tokens):
            changed[name] = value
        elif more < 0:
            changed[name] = value[:, :more].contiguous()
        else:
            fill = {"labels": -100, "input_ids": pad}.get(name, 0)
            changed[name] = nn.functional.pad(value, (0, more), value=fill)
    return changed


def assert_same(found: dict, expected: dict, *, exact: bool = True) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        if exact:
            assert torch.equal(found[name], gradient), name
        else:
            scale = float(gradient.abs().max()) + 1e-6
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name
