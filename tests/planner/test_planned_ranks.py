"""Bytes that ranks reduce, gather and keep, as planned and as counted on 2 and 4 of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, run_ranks
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, patch_model
from progtuning_kernels.freezing.freezer import Freezer
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.optim.masked_adamw import STATE_DTYPES
from progtuning_kernels.planner.meta_step import meta_copy
from progtuning_kernels.planner.ranks import Ranks, Traffic
from progtuning_kernels.planner.stage_meter import Options, StageMeter
from progtuning_kernels.sharding import local_of

MODELS = {"bert-sequence": "fp32", "llama-causal-lm": "8bit"}  # with the moments' dtype
SCHEDULE = ProgressiveSchedule(3, 3)


class Counted:
    """Bytes of whole tensors that collectives are called with."""

    def __init__(self) -> None:
        self.reduced = self.gathered = 0

    def hook(self, state, bucket):  # torch compares annotations with classes of its own
        self.reduced += bucket.buffer().nbytes
        summed = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return summed.then(lambda f: f.value()[0] / dist.get_world_size())

    def watch_fsdp2(self) -> None:
        """It calls them by the newer names from torch 2.13 on, by the others before."""

        def counted(call: Callable[..., Any], count: Callable[..., None]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                count(*args, **kwargs)
                return call(*args, **kwargs)

            return counting

        for name in ("all_gather_single", "all_gather_into_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, counted(getattr(dist, name), self.count_gather))
        for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
            if hasattr(dist, name):
                setattr(dist, name, counted(getattr(dist, name), self.count_scatter))

    def count_gather(self, output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.gathered += output_tensor.nbytes

    def count_scatter(self, output: torch.Tensor, input: torch.Tensor, **kwargs: Any) -> None:
        self.reduced += input.nbytes


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = [local_of(t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def wrap(model: nn.Module, strategy: str, counted: Counted) -> nn.Module:
    if strategy == "ddp":
        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(None, counted.hook)
        return ddp
    from torch.distributed.fsdp import fully_shard

    for block in model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def model_of(name: str) -> nn.Module:
    model = tiny_model(name)
    if MODELS[name] == "fp32":
        return model
    model.config.intermediate_size = 150  # moments of 4,800 elements have 8 bits, their shards too
    torch.manual_seed(0)
    return type(model)(model.config)


def planned_stages(name: str, ranks: Ranks) -> list[SimpleNamespace]:
    model, device = meta_copy(model_of(name), torch.float32), torch.device("cpu")
    layout = find_layout(model)
    freezer = Freezer(model, layout, tied="frozen", frozen_mode="eval")
    optimizer = {"fp32": "adamw", "8bit": "adamw-8bit"}[MODELS[name]]
    options = Options(optimizer, False, False, None, device, ranks=ranks)
    meter = StageMeter(model, layout, freezer, {}, options)
    plans = (SCHEDULE.plan(step, layout.num_blocks) for step in range(3))
    return [SimpleNamespace(**meter.bytes_without_a_step(plan)) for plan in plans]


def check(rank: int, store: str, count: int, plans: dict[tuple[str, str], list]) -> None:
    with process_group(rank, store, count=count):
        counted = Counted()
        counted.watch_fsdp2()
        for (name, strategy), stages in plans.items():
            model = model_of(name)
            wrapped = wrap(model, strategy, counted)
            handle = patch_model(model, SCHEDULE, kernels="off", packing="off")
            state_dtype = STATE_DTYPES[MODELS[name]]
            optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), state_dtype=state_dtype)
            for stage in stages:
                what, planned = f"{name}, {strategy}, boundary {handle.boundary}", stage.traffic
                weights = storage_bytes([*model.parameters(), *model.buffers()])
                counted.reduced = counted.gathered = 0
                loss = wrapped(**tiny_inputs(name, seed=rank)).loss
                forward, counted.gathered = counted.gathered, 0
                loss.backward()
                assert counted.reduced == planned.reduced_bytes, what
                assert forward == planned.gathered_bytes, what
                assert counted.gathered == planned.gathered_again_bytes, what
                gradients = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
                optimizer.step()
                optimizer.zero_grad()
                state = [t for kept in optimizer.state.values() for t in kept.values()]
                if rank == 0:  # its shards are the largest
                    assert gradients == stage.gradient_bytes, what
                    assert strategy == "fsdp2" or counted.reduced == stage.buffer_bytes, what
                    assert sum(local_of(t).nbytes for t in state) == stage.state_bytes, what
                    assert weights == stage.weight_bytes, what
                handle.advance()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("count", [2, 4])
def test_ranks_reduce_gather_and_keep_what_is_planned(count, tmp_path):
    plans = {
        (name, strategy): planned_stages(name, Ranks(count, strategy))
        for name in MODELS
        for strategy in ("ddp", "fsdp2")
    }
    run_ranks(check, str(tmp_path / "store"), count, plans, count=count)


def test_zero_2_is_planned_as_it_was_counted():
    """On 2 ranks with DeepSpeed 0.19.8, under its default buckets and MaskedAdamW: 33,984 elements
    of matrices and 1,443 of vectors.
    """
    (stage, *_) = planned_stages("bert-sequence", Ranks(2, "zero2"))
    gathered = 135_936 + 5_776
    assert stage.traffic == Traffic(141_708, gathered, 0, 141_708 + gathered // 2)
    assert stage.state_bytes == 141_720 + gathered // 2  # with the float32 slice that it updates
    assert stage.gradient_bytes == gathered // 2
    model = tiny_model("bert-sequence")
    assert stage.weight_bytes == gathered + sum(t.nbytes for t in model.buffers())
    assert stage.buffer_bytes == 4 * 500_000_000
