"""Other people's loops with captured forwards end with the weights of eager ones."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import tiny_inputs, tiny_model
from torch.nn.parallel import DistributedDataParallel
from trainers import trainer_of

from progtuning_kernels import (
    MaskedAdamW,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
)
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}])
def test_the_trainer(options, pools, tmp_path):
    weights, reports = [], []
    for graph in ("on", "off"):
        torch.manual_seed(0)
        callback = ProgtuningCallback(
            ProgressiveSchedule(2), kernels="off", packing="off", graph=graph
        )
        trainer = trainer_of(
            tmp_path / graph,
            model=tiny_model("bert-sequence", dropout=True),
            callbacks=[callback],
            **options,
        )
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        reports.append(callback.handle.graph_report())
    assert all(map(torch.equal, *weights))
    assert reports[0].replays >= 4
    assert sum(reports[0].eager.values()) <= 4
    assert not reports[1].replays


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("prepared_first", [False, True])
def test_accelerate(precision, prepared_first, pools):
    weights = []
    for graph in ("on", "off"):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        accelerator = Accelerator(
            gradient_accumulation_steps=2, cpu=True, mixed_precision=precision
        )
        model = tiny_model("bert-sequence", dropout=True).train()
        if prepared_first:
            model = accelerator.prepare(model)
        schedule = RandomBlockSchedule(blocks=2, period=4, seed=0)
        handle = patch_model(model, schedule, kernels="off", packing="off", graph=graph)
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-3))
        optimizer = accelerator.prepare(optimizer)
        model = model if prepared_first else accelerator.prepare(model)
        for i in range(24):
            with accelerator.accumulate(model):
                loss = model(**tiny_inputs("bert-sequence", seed=i % 3)).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                handle.advance()
        weights.append([p.detach().clone() for p in model.parameters()])
        if graph == "on":
            assert handle.graph_report().replays >= 12
        handle.unpatch()
    assert all(map(torch.equal, *weights))


def test_what_ddp_runs_is_eager(pools):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model("bert-sequence").train()
        handle = patch_model(model, ProgressiveSchedule(1, 9), kernels="off", graph="on")
        wrapped = DistributedDataParallel(model)
        for seed in range(3):
            wrapped(**tiny_inputs("bert-sequence", seed=seed)).loss.backward()
    finally:
        dist.destroy_process_group()
    report = handle.graph_report()
    assert not report.replays and sum(report.eager.values()) == 3
    assert any(reason.startswith("DistributedDataParallel") for reason in report.eager)
