"""Two processes pack as one does: all ranks try on the same rows, and decide alike."""

from __future__ import annotations

import gc
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from proofs import enable_checkpointing
from ranks import process_group, run_ranks
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, PatchHandle, patch_model
from progtuning_kernels.distributed import Wrapper

WORLD, STEPS, BERT, LLAMA = 2, 6, "bert-sequence", "llama-causal-lm"
SCHEDULE = MilestoneSchedule({0: 2, 2: 0, 4: 3})  # thaws: what was tried has to be tried again


def batch(name: str, step: int, rank: int, full: tuple[int, ...] = ()) -> dict[str, Any]:
    """Rows of one rank; at step 0 those of the ranks in `full` have no padding, the second's not
    even a mask.
    """
    inputs = tiny_inputs(name, seed=10 * step + rank)
    if step == 0 and rank in full:
        mask = inputs.pop("attention_mask")
        if rank == 0:
            inputs["attention_mask"] = torch.ones_like(mask)
    return inputs


def optimizer_of(handle: PatchHandle) -> torch.optim.Optimizer:
    return MaskedAdamW(handle.param_groups(), lr=1e-2, eps=1e-3, max_grad_norm=0.5)


def reference(name: str, full: tuple[int, ...]) -> nn.Module:
    """Padded, in one process, gradients of both ranks' rows in turn."""
    model = tiny_model(name)
    handle = patch_model(model, SCHEDULE, packing="off", kernels="off")
    optimizer = optimizer_of(handle)
    for step in range(STEPS):
        for rank in range(WORLD):
            (model(**batch(name, step, rank, full)).loss / WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    return model


def train(called: nn.Module, handle: PatchHandle, name: str, rank: int, full=()) -> None:
    optimizer = optimizer_of(handle)
    for step in range(STEPS):
        called(**batch(name, step, rank, full)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()


def assert_same_weights(model: nn.Module, expected: nn.Module, what: str, **close: float) -> None:
    close = close or dict(rtol=1e-5, atol=5e-6)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(
            p.detach(), q.detach(), **close, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def assert_alike(handle: PatchHandle, what: str, *, packs: bool = True) -> None:
    """All ranks have decided the same."""
    report = handle.packing_report()
    told: list[Any] = [None] * WORLD
    dist.all_gather_object(told, dict(report.stacks))
    assert told[0] == told[1], what
    assert report.packs == packs, f"{what}: {report}"
    assert not packs or report.batches >= STEPS - 1, f"{what}: {report}"


FULL = [(), (0,), (1,), (0, 1)]


def check_ddp(rank: int) -> None:
    shared = []
    share = Wrapper.share

    def counted(self: Wrapper, value: bytes) -> bytes:
        shared.append(handle.step)
        return share(self, value)

    with mock.patch.object(Wrapper, "share", counted):
        for at, full in enumerate(FULL):
            model = tiny_model(BERT)
            if at % 2:
                ddp = DistributedDataParallel(model)
            handle = patch_model(model, SCHEDULE, packing="on")
            if not at % 2:
                ddp = DistributedDataParallel(model)
            shared.clear()
            train(ddp, handle, BERT, rank, full)
            assert_same_weights(model, reference(BERT, full), f"full: {full}")
            assert_alike(handle, f"full: {full}")
            # rows and verdict, where something lower than before trains: never in between
            assert shared == [0, 0, 2, 2]


def check_ddp_options(rank: int) -> None:
    for options in (
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    ):
        model = tiny_model(LLAMA)
        handle = patch_model(model, SCHEDULE, packing="on")
        train(DistributedDataParallel(model, **options), handle, LLAMA, rank, (0,))
        assert_same_weights(model, reference(LLAMA, (0,)), str(options))
        assert_alike(handle, str(options))


def check_first_rank_without_mask(rank: int) -> None:
    """It cannot try, so that nobody does; the others are told why, and nobody waits for ever."""
    model = tiny_model(BERT)
    handle = patch_model(model, MilestoneSchedule({0: 0}), packing="on")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(handle)
    with mock.patch.object(Wrapper, "share", autospec=True, side_effect=Wrapper.share) as share:
        for step in range(8):
            inputs = batch(BERT, step, rank)
            if rank == 0:
                del inputs["attention_mask"]
            ddp(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
    assert share.call_count == 4
    assert "no attention_mask" in handle.packing_report().stacks["bert.encoder.layer"]
    assert_alike(handle, "no mask", packs=False)


def shard(model: nn.Module, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)


def check_fsdp2(rank: int) -> None:
    for at, full in enumerate(FULL):
        name = BERT if at < 2 else LLAMA
        model = tiny_model(name)
        if at % 2:
            shard(model, reshard_after_forward=True)
        if at == 2:
            enable_checkpointing(model)
        handle = patch_model(model, SCHEDULE, packing="on", kernels="off")
        if not at % 2:
            shard(model)
        train(model, handle, name, rank, full)
        assert_same_weights(model, reference(name, full), f"full: {full}")
        assert_alike(handle, f"full: {full}")


def check_fsdp2_mixed(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # FSDP2 warns of blocks that return a view: what is written into one loses its hooks
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    models = []
    for packing in ("on", "off"):
        model = tiny_model(LLAMA)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, mp_policy=policy)
        # FSDP2 gives what thaws under a policy gradients of the wrong dtype, packed or not
        handle = patch_model(model, MilestoneSchedule({3: 2}), packing=packing, kernels="off")
        train(model, handle, LLAMA, rank, (0,))
        models.append({n: p.full_tensor().detach() for n, p in model.named_parameters()})
        assert_alike(handle, packing, packs=packing == "on")
    for name, weight in models[0].items():  # six steps of at most 1e-2
        torch.testing.assert_close(weight, models[1][name], rtol=2e-2, atol=6e-3)


CHECKS = {  # to start two processes takes longer than any of them
    "ddp": (check_ddp, check_ddp_options, check_first_rank_without_mask),
    "fsdp2": (check_fsdp2, check_fsdp2_mixed),
}


def run(rank: int, name: str, store: str) -> None:
    with process_group(rank, store):
        for check in CHECKS[name]:
            check(rank)
            gc.collect()  # wrappers go before the process group does


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, tmp_path):
    run_ranks(run, name, str(tmp_path / "store"), count=WORLD)
