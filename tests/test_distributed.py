"""Two processes train as one does, under DDP and FSDP2, through every change of plan."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import ROWS, WORLD, batch, forks, process_group, run_ranks
from tiny_models import tiny_model
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from progtuning_kernels import (
    AdaptiveSchedule,
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    RandomBlockSchedule,
    load_checkpoint,
    patch_model,
    save_checkpoint,
)
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.cli.app import main as command
from progtuning_kernels.cli.length_batches import EpochOfBatches, LengthBatches
from progtuning_kernels.cli.step_loss import mean_over_step
from progtuning_kernels.integrations import token_rate
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.derived_classes import derived_classes
from progtuning_kernels.model.families import UnsupportedModelError
from progtuning_kernels.model.layout import parameter_slots
from progtuning_kernels.schedules import annealed_lr

STEPS = 9
OPTIONS = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
SCHEDULES = {
    "progressive": lambda: ProgressiveSchedule(3, STEPS),
    "never": lambda: ProgressiveSchedule(3, STEPS, embeddings="never"),
    "always": lambda: ProgressiveSchedule(3, STEPS, embeddings="always"),
    "weights": lambda: ProgressiveSchedule(3, STEPS, weights=[1, 1, 1, 5]),
    "milestones": lambda: MilestoneSchedule({3: 2, 6: 4}),
    "random": lambda: RandomBlockSchedule(2, 2, seed=1),
    "random-truncated": lambda: RandomBlockSchedule(1, 2, seed=1, embeddings="never"),
    "cyclic": lambda: CyclicBlockSchedule(1, 2, order="random", seed=3),
    "adaptive": lambda: AdaptiveSchedule(2, percentile=60),
    "annealed": lambda: ProgressiveSchedule(3, STEPS),
}


def optimizer_of(handle, *, annealed=False, **options):
    optimizer = MaskedAdamW(
        handle.param_groups(weight_decay=0.1, by_unit=annealed), **{**OPTIONS, **options}
    )
    if not annealed:
        return optimizer, None
    factors = annealed_lr(handle.schedule, optimizer.param_groups, handle.num_blocks)
    return optimizer, LambdaLR(optimizer, factors)


def train(called: nn.Module, handle, optimizer, scheduler, rank, *, on_step=None, until=STEPS):
    """Losses of steps up to `until`."""
    losses = []
    while handle.step < until:
        loss = called(**batch(handle.step, rank)).loss
        loss.backward()
        if on_step is not None:
            on_step(handle)
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def reference(schedule, *, annealed: bool = False) -> tuple[nn.Module, object]:
    """The run of one process."""
    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, schedule)
    train(model, handle, *optimizer_of(handle, annealed=annealed), None)
    return model, handle


def assert_same_weights(model: nn.Module, expected: nn.Module, what: str) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def assert_same_decisions(schedule: AdaptiveSchedule, expected: AdaptiveSchedule) -> None:
    ours, theirs = (s.state_dict()["decisions"] for s in (schedule, expected))
    assert ours and [d[::2] for d in ours] == [d[::2] for d in theirs]
    for (_, norms, _), (_, others, _) in zip(ours, theirs, strict=True):
        assert norms == pytest.approx(others, rel=1e-4)  # of the whole gradient, wherever it lies


def same_on_ranks(model: nn.Module) -> bool:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = own.clone()
    dist.broadcast(first, src=0)
    return torch.equal(own, first)


class CountingHook:
    """Bytes that DDP's reducer sends, one entry per bucket."""

    def __init__(self) -> None:
        self.bytes = 0

    def hook(self, state, bucket):
        self.bytes += bucket.buffer().nbytes
        tensor = bucket.buffer().div_(WORLD)
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda f: f.value()[0])


def active_bytes(model: nn.Module) -> int:
    return sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)


def check_ddp(rank: int) -> None:
    for name, make in SCHEDULES.items():
        expected, alone = reference(make(), annealed=name == "annealed")
        model = tiny_model("bert-sequence").train()
        before = name in ("random", "adaptive", "progressive")  # patched before it is wrapped
        if before:
            handle = patch_model(model, make())
        ddp = DistributedDataParallel(model)
        if not before:
            handle = patch_model(model, make())
        counted = CountingHook()
        ddp.register_comm_hook(None, counted.hook)
        sent, planned, plans = [], [], set()

        def note(handle, counted=counted, sent=sent, planned=planned, plans=plans):
            plans.add(handle.plan)
            sent.append(counted.bytes)
            planned.append(active_bytes(handle.model))
            counted.bytes = 0
            for slot in parameter_slots(handle.model, handle.layout):
                assert (slot.parameter.grad is not None) == slot.parameter.requires_grad

        made = optimizer_of(handle, annealed=name == "annealed")
        train(ddp, handle, *made, rank, on_step=note)
        assert sent == planned, f"{name}: {sent} bytes were reduced, {planned} are active"
        assert len(plans) > 1, name
        assert same_on_ranks(model), name
        assert_same_weights(model, expected, name)
        if name == "adaptive":
            assert handle.schedule.state_dict() != make().state_dict()
            assert_same_decisions(handle.schedule, alone.schedule)
        handle.unpatch()
        ddp(**batch(0, rank)).loss.backward()
        assert counted.bytes == active_bytes(model) > max(planned[-2:])  # everything, as before


class Shifted(nn.Module):
    """BERT, a bare parameter before its blocks, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("bert-sequence")
        self.shift = nn.Parameter(torch.full((32,), 0.1))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, labels, **kwargs):
        vectors = self.inner.get_input_embeddings()(input_ids) + self.shift
        output = self.inner(inputs_embeds=vectors, labels=labels, **kwargs)
        output.loss = output.loss * self.scale.exp()
        return output


def check_ddp_options(rank: int) -> None:
    """What a wrapper was made with, and what hangs on it, survives; so does accumulation."""
    expected, _ = reference(ProgressiveSchedule(3, STEPS))
    for options in (
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 0.001},
    ):
        model = tiny_model("bert-sequence").train()
        ddp = DistributedDataParallel(model, **options)
        calls = []
        ddp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        handle = patch_model(model, ProgressiveSchedule(3, STEPS)).attach(ddp)
        train(ddp, handle, *optimizer_of(handle), rank)
        assert len(calls) == STEPS
        assert_same_weights(model, expected, str(options))

    # torch's own compression to 16 bits: every sum of gradients is one of float16
    model = tiny_model("bert-sequence").train()
    ddp = DistributedDataParallel(model)
    ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    handle = patch_model(model, ProgressiveSchedule(3, STEPS))

    def in_16_bits(handle):
        for p in handle.model.parameters():
            assert p.grad is None or torch.equal(p.grad.half().float(), p.grad), handle

    train(ddp, handle, *optimizer_of(handle), rank, on_step=in_16_bits)
    assert handle.boundary == 2 and same_on_ranks(model)

    # moments of 8 bits, with the gradients of both ranks
    models = []
    for wrapped in (False, True):
        model = tiny_model("bert-sequence").train()
        called = DistributedDataParallel(model) if wrapped else model
        handle = patch_model(model, ProgressiveSchedule(3, STEPS))
        made = optimizer_of(handle, state_dtype="8bit")
        train(called, handle, *made, rank if wrapped else None)
        models.append(model)
    assert same_on_ranks(model)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        # a gradient that rounds to the next of 256 moves an update by a hundredth of lr
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)

    # what the first forward shows of bare parameters is reduced as it trains from then on
    models = []
    for wrapped in (False, True):
        model = Shifted().train()
        called = DistributedDataParallel(model) if wrapped else model
        handle = patch_model(model, ProgressiveSchedule(3, STEPS, embeddings="never"))
        train(called, handle, *optimizer_of(handle), rank if wrapped else None)
        models.append(model)
    assert torch.equal(models[1].shift, Shifted().shift) and models[1].scale != 1
    assert_same_weights(*models, "bare parameters")

    # two micro-batches of one row each, the first without reduction
    model = tiny_model("bert-sequence").train()
    ddp = DistributedDataParallel(model)
    handle = patch_model(model, ProgressiveSchedule(3, STEPS))
    optimizer, _ = optimizer_of(handle)
    for step in range(STEPS):
        rows = batch(step, rank)
        for i, context in enumerate((ddp.no_sync, nullcontext)):
            with context():
                (ddp(**{k: v[i : i + 1] for k, v in rows.items()}).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    assert_same_weights(model, expected, "accumulation")

    # every rank caches its own rows; they come again after three steps. Tiny blocks may cost less
    # than any cache, which is not asked here. DDP of torch 2.10 lets versions count its broadcasts
    models = []
    with (
        mock.patch.object(BreakEven, "verdict", lambda self, rows: None),
        mock.patch.object(torch.autograd, "_unsafe_preserve_version_counter", nullcontext),
    ):
        for options in ({}, {"cache": PrefixCache(1 << 24)}):
            model = tiny_model("bert-sequence").train()
            buffer = torch.ones(3)
            model.bert.encoder.layer[0].register_buffer("scale", buffer)
            ddp = DistributedDataParallel(model)
            handle = patch_model(model, MilestoneSchedule({0: 2}), **options)
            optimizer, _ = optimizer_of(handle)
            for step in range(STEPS):
                ddp(**batch(step % 3, rank)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                handle.advance()
            models.append(model)
        assert buffer._version >= STEPS
        assert handle.cache_report().hits == (STEPS - 3) * ROWS // WORLD
        buffer.mul_(2)
        ddp(**batch(0, rank))
        assert handle.cache_report().hits == (STEPS - 3) * ROWS // WORLD, "other bytes, other rows"
    assert_same_weights(*models, "cache")

    # compiled as a whole, DDP is not seen in the forward: it has to be attached
    model = tiny_model("bert-sequence").train()
    compiled = torch.compile(DistributedDataParallel(model), backend="eager")
    handle = patch_model(model, ProgressiveSchedule(3, STEPS)).attach(compiled)
    train(compiled, handle, *optimizer_of(handle), rank)
    assert_same_weights(model, expected, "compiled")


def prepare_shards(accelerator: Accelerator) -> None:
    """On a CPU Accelerate takes DDP whatever the plugin says; its code for shards runs there."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
    )


def check_wrapped(rank: int) -> None:
    """What is handed in may be the wrapper; the optimizer may be older than the patch."""

    def run(called: nn.Module, optimizer, handle, rank, backward) -> None:
        for step in range(STEPS):
            backward(called(**batch(step, rank)).loss)
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_model("bert-sequence").train()
        return model, torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-3)

    expected, optimizer = start()
    handle = patch_model(expected, ProgressiveSchedule(3, STEPS))
    run(expected, optimizer, handle, None, torch.Tensor.backward)
    accelerator = Accelerator(cpu=True)
    for order in ("before", "after", "after, unwrapped"):
        model, optimizer = start()
        if order == "before":
            handle = patch_model(model, ProgressiveSchedule(3, STEPS))
        called, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(called, DistributedDataParallel)
        if order != "before":
            given = called if order == "after" else accelerator.unwrap_model(called)
            handle = patch_model(given, ProgressiveSchedule(3, STEPS))
        assert handle.model is model
        run(called, optimizer, handle, rank, accelerator.backward)
        assert handle.boundary == 2 and same_on_ranks(model), order
        assert_same_weights(model, expected, order)
        handle.unpatch()
    for order in ("before", "after"):
        model, optimizer = start()
        if order == "before":
            handle = patch_model(model, ProgressiveSchedule(3, STEPS))
        accelerator.free_memory()
        prepare_shards(accelerator)
        called, optimizer = accelerator.prepare(model, optimizer)
        if order == "after":
            handle = patch_model(called, ProgressiveSchedule(3, STEPS))
        assert called is model and any(hasattr(p, "full_tensor") for p in model.parameters())
        run(called, optimizer, handle, rank, accelerator.backward)
        assert_same_weights(model, expected, f"shards, patched {order}")

    model, optimizer = start()
    called = DistributedDataParallel(torch.compile(model, backend="eager"))
    handle = patch_model(called, ProgressiveSchedule(3, STEPS))
    assert handle.model is model
    run(called, optimizer, handle, rank, torch.Tensor.backward)
    assert_same_weights(model, expected, "compiled")

    whole = nn.ModuleDict({"net": DistributedDataParallel(tiny_model("bert-sequence"))})
    with pytest.raises(UnsupportedModelError, match=r"net is a Dist.*: pass model.net.module"):
        patch_model(whole, ProgressiveSchedule(3, STEPS))
    patch_model(whole.net.module, ProgressiveSchedule(3, STEPS))


def shard(model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)


class Collectives:
    """All-gathers and bytes of reduce-scatters of FSDP2, forward and backward apart."""

    def __init__(self) -> None:
        self.gathers, self.scattered_bytes = 0, 0
        # FSDP2 calls them by these names from torch 2.13 on, by the older ones before
        new = hasattr(dist, "all_gather_single")
        names = ("all_gather_single", "reduce_scatter_single")
        names = names if new else ("all_gather_into_tensor", "reduce_scatter_tensor")
        gather, scatter = (getattr(dist, name) for name in names)

        def counted_gather(*args, **kwargs):
            self.gathers += 1
            return gather(*args, **kwargs)

        def counted_scatter(*args, **kwargs):
            self.scattered_bytes += kwargs["input"].nbytes
            return scatter(*args, **kwargs)

        setattr(dist, names[0], counted_gather)
        setattr(dist, names[1], counted_scatter)


def check_fsdp2(rank: int) -> None:
    counted = Collectives()
    for name, make in SCHEDULES.items():
        expected, alone = reference(make(), annealed=name == "annealed")
        model = tiny_model("bert-sequence").train()
        before = name in ("never", "cyclic", "adaptive")  # frozen blocks get sharded, too
        tries = name in ("progressive", "never")  # to pack, in the first forward
        options = {"kernels": "off", "packing": "on" if tries else "off"}
        if before:
            handle = patch_model(model, make(), **options)
        shard(model)
        if not before:
            handle = patch_model(model, make(), **options)
        optimizer, scheduler = optimizer_of(handle, annealed=name == "annealed")
        left_gathered = False
        while handle.step < STEPS:
            counted.gathers = counted.scattered_bytes = 0
            loss = model(**batch(handle.step, rank)).loss
            forward, counted.gathers = counted.gathers, 0
            # the root and four blocks; after an evaluation the root still is, within a stage
            tried = tries and handle.step == 0
            assert forward == 5 - left_gathered or tried, name
            loss.backward()
            # blocks from the boundary on; the root keeps its weights from the forward
            what = f"{name}, step {handle.step}, boundary {handle.boundary}: {counted.gathers}"
            # after a trial FSDP2 takes its last block for one below block 0, and prefetches it
            assert counted.gathers == handle.num_blocks - handle.boundary + tried, what
            # to the byte, but for rows that do not divide by the ranks
            planned = active_bytes(model)
            assert planned <= counted.scattered_bytes <= 1.05 * planned + 256, name
            optimizer.step()
            optimizer.zero_grad()
            evaluates = handle.step in (1, 2, 4, 5)
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(**batch(0, rank))
                model.train()
            changed = handle.advance()
            left_gathered = evaluates and not changed
            if scheduler is not None:
                scheduler.step()
        assert_same_weights(model, expected, name)
        if name == "adaptive":
            assert_same_decisions(handle.schedule, alone.schedule)
        for module in model.modules():
            ours = [cls in derived_classes() for cls in type(module).__mro__]
            assert not any(ours[1:]), f"{name}: {type(module).__mro__}"  # on top, if anywhere
        if name == "progressive":
            handle.truncation_report().assert_truncated()
        assert handle.packing_report().packs == tries
        handle.unpatch()
        assert not any(cls in derived_classes() for m in model.modules() for cls in type(m).__mro__)
        assert all(p.requires_grad for p in model.parameters())

    # frozen blocks get sharded, and thaw before any forward: as after a resume
    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, SCHEDULES["cyclic"]())
    frozen_blocks = handle.boundary
    shard(model)
    handle.seek(next(s for s in range(STEPS) if handle.schedule.plan(s, 4).boundary == 0))
    assert frozen_blocks and handle.boundary == 0
    for module in model.modules():
        assert not any(cls in derived_classes() for cls in type(module).__mro__[1:])


def check_fsdp1(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for options in ({"use_orig_params": True}, {}):
        model = tiny_model("bert-sequence")
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        for given in (wrapped, model):
            with pytest.raises(UnsupportedModelError, match="FSDP1.*fully_shard"):
                patch_model(given, ProgressiveSchedule(2, 4))
        model = tiny_model("bert-sequence")
        handle = patch_model(model, ProgressiveSchedule(2, 4))
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
        with pytest.raises(UnsupportedModelError, match="FSDP1.*fully_shard"):
            handle.attach(wrapped)
        with pytest.raises(UnsupportedModelError, match="FSDP1.*fully_shard"):
            wrapped(**batch(0, rank))


def check_mismatch(rank: int) -> None:
    def message(action) -> str:
        with pytest.raises(RuntimeError) as caught:
            action()
        dist.barrier()
        return str(caught.value)

    # a schedule of its own
    model = tiny_model("bert-sequence").train()
    ddp = DistributedDataParallel(model)
    handle = patch_model(model, MilestoneSchedule({0: 1 + rank, 5: 3}))
    text = message(lambda: ddp(**batch(0, rank)))
    assert "ranks do not train the same: rank 0: step 0, boundary 1" in text
    assert "rank 1: step 0, boundary 2" in text

    # a layer that one rank froze
    model = tiny_model("bert-sequence").train()
    ddp = DistributedDataParallel(model)
    handle = patch_model(model, MilestoneSchedule({2: 1})).attach(ddp)
    if rank == 1:
        model.bert.encoder.layer[3].attention.requires_grad_(False)
    assert "active tensors" in message(lambda: handle.seek(2))

    # a step that was not counted: the rank that missed it never comes to the meeting
    model = tiny_model("bert-sequence").train()
    ddp = DistributedDataParallel(model)
    handle = patch_model(model, MilestoneSchedule({2: 1}))
    handle.attach(ddp, timeout=timedelta(seconds=1))
    handle.seek(1)
    if rank == 0:
        assert "rank 1 did not come to the change of plan at step 2 within 1 s" in message(
            handle.advance
        )
    else:
        dist.barrier()

    # an agreement afterwards is one again
    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, MilestoneSchedule({2: 1})).attach(DistributedDataParallel(model))
    assert handle.seek(2)


def trainer_of(folder: str, model: nn.Module, callback, *, rows: int, **arguments):
    data = [
        {k: v[i] for k, v in batch(step, None).items()} for step in range(3) for i in range(ROWS)
    ]
    return Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=rows,
            learning_rate=0.02,
            adam_epsilon=1e-3,
            weight_decay=0.1,
            max_grad_norm=0.5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            # else the Trainer takes a mean over rows for a sum, and doubles the loss of two ranks
            average_tokens_across_devices=False,
            **{"save_strategy": "no", **arguments},
        ),
        train_dataset=data,
        callbacks=[callback],
    )


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self._step


def check_trainer(rank: int) -> None:
    """The callback alone is enough, resume included."""
    expected, folder = torch.load("expected.pt", weights_only=True), "runs"
    for options in (
        {},
        {"ddp_find_unused_parameters": False},
        {"gradient_accumulation_steps": 2, "rows": 1},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ):
        model = tiny_model("bert-sequence")
        callback = ProgtuningCallback(ProgressiveSchedule(3))
        rows = options.pop("rows", ROWS // WORLD)
        trainer = trainer_of(folder, model, callback, rows=rows, **options)
        if "torch_compile" in options:
            with pytest.raises(RuntimeError, match=r"callback.attach\(trainer\)"):
                trainer.train()
            callback.attach(trainer)
        trainer.train()
        assert same_on_ranks(model)
        kind = "accumulated" if "gradient_accumulation_steps" in options else "plain"
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[kind][name], rtol=1e-5, atol=2e-6)

    # stopped in stage 2, and resumed
    for stop in (True, False):
        model = tiny_model("bert-sequence")
        callback = ProgtuningCallback(ProgressiveSchedule(3, STEPS))
        trainer = trainer_of(folder, model, callback, rows=2, save_strategy="steps", save_steps=5)
        if stop:
            trainer.add_callback(StopAfter(5))
        try:
            trainer.train(resume_from_checkpoint=None if stop else f"{folder}/checkpoint-5")
        except RuntimeError as error:  # transformers 5.0 loads to a device that torch refuses
            if "tagged with cpu:0" not in str(error):
                raise
            return
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected["plain"][name], rtol=1e-5, atol=2e-6)


def uneven_trainer(folder: str, *, rows: int, ranks: int, cached: bool = True, **arguments):
    """23 rows in batches of like length: the last step has 3 of them, 2 on one rank and 1 on the
    other.
    """
    data = [{k: v[i] for k, v in batch(step, None).items()} for step in range(6) for i in range(4)]
    data = data[:23]
    lengths = [int(row["attention_mask"].sum()) for row in data]
    batches = LengthBatches(lengths, rows=rows, ranks=ranks, seed=1)
    cache = PrefixCache(max_bytes=1 << 20) if cached else None
    callback = ProgtuningCallback(ProgressiveSchedule(3), packing="on", cache=cache)
    trainer = Trainer(
        tiny_model("bert-sequence", dropout=not cached),
        TrainingArguments(
            output_dir=folder,
            max_steps=11,  # 6 of an epoch
            learning_rate=0.02,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
            **{"save_strategy": "no", **arguments},
        ),
        train_dataset=data,
        callbacks=[callback, EpochOfBatches(batches)],
        optimizer_cls_and_kwargs=(MaskedAdamW, {"lr": 0.02, "eps": 1e-3}),
    )
    loader = DataLoader(data, batch_sampler=batches, collate_fn=trainer.data_collator)
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(loader)
    mean_over_step(trainer)
    return trainer


def logs_of(trainer: Trainer, name: str) -> list[float]:
    return [log[name] for log in trainer.state.log_history if "loss" in log]


def ticks() -> contextlib.AbstractContextManager:
    """Every look at the clock of the token rate takes a second."""
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    return mock.patch.object(token_rate, "time", clock)


def check_uneven_trainer(rank: int) -> None:
    """Packing, cache and an uneven last batch: losses and weights of one process with twice the
    rows of a batch; and with dropout, a run that resumes within an epoch has the same bits.
    """
    expected = torch.load("expected.pt", weights_only=True)
    trainer = uneven_trainer("runs", rows=2, ranks=WORLD)
    with ticks():
        trainer.train()
    assert same_on_ranks(trainer.model)
    assert logs_of(trainer, "loss") == pytest.approx(expected["loss"], rel=1e-4)
    assert logs_of(trainer, "real_tokens_per_second") == expected["real_tokens_per_second"]
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.detach(), expected["weights"][name], rtol=1e-4, atol=1e-5)
    handle = trainer.callback_handler.callbacks[0].handle
    assert handle.packing_report().batches > 0
    assert logs_of(trainer, "cache_rows")[-1] > 0

    straight = uneven_trainer(
        "more", rows=2, ranks=WORLD, cached=False, save_strategy="steps", save_steps=8
    )
    straight.train()
    resumed = uneven_trainer("more", rows=2, ranks=WORLD, cached=False)
    try:
        resumed.train(resume_from_checkpoint="more/checkpoint-8")
    except RuntimeError as error:  # transformers 5.0 loads to a device that torch refuses
        if "tagged with cpu:0" not in str(error):
            raise
        return
    assert logs_of(resumed, "loss") == logs_of(straight, "loss")
    for p, q in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(p, q)


CHECKS = {
    "trainer": check_trainer,
    "uneven_trainer": check_uneven_trainer,
    "ddp": check_ddp,
    "ddp_options": check_ddp_options,
    "wrapped": check_wrapped,
    "fsdp2": check_fsdp2,
    "fsdp1": check_fsdp1,
    "mismatch": check_mismatch,
}


def run(rank: int, name: str, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}  # for the Trainer
    os.chdir(folder)
    with process_group(rank, "store"):
        CHECKS[name](rank)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, tmp_path):
    if name == "trainer":
        expected = {}
        for kind, accumulate in (("plain", 1), ("accumulated", 2)):
            model = tiny_model("bert-sequence")
            callback = ProgtuningCallback(ProgressiveSchedule(3))
            rows, options = ROWS // accumulate, {"gradient_accumulation_steps": accumulate}
            trainer_of(str(tmp_path), model, callback, rows=rows, **options).train()
            expected[kind] = model.state_dict()
        torch.save(expected, tmp_path / "expected.pt")
    if name == "uneven_trainer":
        trainer = uneven_trainer(str(tmp_path), rows=2 * WORLD, ranks=1)
        with ticks():
            trainer.train()
        expected = {key: logs_of(trainer, key) for key in ("loss", "real_tokens_per_second")}
        expected["weights"] = trainer.model.state_dict()
        torch.save(expected, tmp_path / "expected.pt")
    run_ranks(run, name, str(tmp_path), count=WORLD)


def train_or_die(rank: int, folder: str, victim: int | None) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{victim}", WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=10)
    )
    model = tiny_model("bert-sequence").train()
    ddp = DistributedDataParallel(model)
    handle = patch_model(model, ProgressiveSchedule(3, STEPS)).attach(ddp)
    optimizer, _ = optimizer_of(handle)
    load_checkpoint(f"{folder}/checkpoints", handle, optimizer)
    try:
        while handle.step < STEPS:
            if handle.step == 4:
                save_checkpoint(f"{folder}/checkpoints", handle, optimizer)
            if rank == victim and handle.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            train(ddp, handle, optimizer, None, rank, until=handle.step + 1)
    except RuntimeError as error:
        Path(folder, f"error-{rank}").write_text(str(error))
        os._exit(1)
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/weights.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_a_killed_rank_ends_the_others_and_the_run_resumes(tmp_path):
    for victim in (1, None):
        ranks = [
            forks().Process(target=train_or_die, args=(r, str(tmp_path), victim))
            for r in range(WORLD)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=90)
        codes = [process.exitcode for process in ranks]
        assert codes == ([1, -signal.SIGKILL] if victim == 1 else [0, 0])
    assert (tmp_path / "error-0").read_text(), "the other rank says what happened"
    assert [path.stem for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    expected, _ = reference(ProgressiveSchedule(3, STEPS))
    model = tiny_model("bert-sequence")
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same_weights(model, expected, "resumed")


def run_example(rank: int, folder: str, example: str, arguments: list[str]) -> None:
    """As torchrun starts it, in a fork that has imported everything; it ends its group itself."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    sys.argv = [example, *arguments]
    runpy.run_path(example, run_name="__main__")


def test_the_accelerate_example_runs_on_two_ranks(model_folders, tmp_path):
    rows = [{"text": f"w{i % 90} w3 w7", "label": int(i % 90 < 45)} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    example = Path(__file__).parent.parent / "examples" / "accelerate_loop.py"
    arguments = ["--model", model_folders["bert"], "--train-file", tmp_path / "rows.jsonl"]
    arguments += ["--output", tmp_path / "out", "--batch-size", 4, "--cpu"]
    run_ranks(run_example, str(tmp_path), str(example), [*map(str, arguments)])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    start = AutoModelForSequenceClassification.from_pretrained(model_folders["bert"])
    changed = model.bert.encoder.layer[0].output.dense.weight
    assert not torch.equal(changed, start.bert.encoder.layer[0].output.dense.weight)


def test_the_command_under_torchrun_trains_as_one_process(model_folders, text_files, tmp_path):
    files = ["--train-file", text_files[0], "--validation-file", text_files[1]]
    common = [*files, "--model", model_folders["bert-without-dropout"], "--max-length", 16]
    common += ["--max-steps", 6, "--lr", 3e-3, "--device", "cpu", "--predict-file", text_files[1]]
    common += ["--max-validation-rows", 13]  # no multiple of what two processes take
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = ["-m", "progtuning_kernels", "train", "--output", tmp_path / "two", "--batch-size", 4]
    done = subprocess.run(
        [*launch, *map(str, [*ours, *common])],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1
    command(["train", "--output", str(tmp_path / "one"), "--batch-size", "8", *map(str, common)])
    two, one = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("two", "one"))
    losses = [[step["loss"] for step in run["steps"]] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [s["tokens"] for s in two["stages"]] == [s["tokens"] for s in one["stages"]]
    accuracies = [[e["accuracy"] for e in run["evaluations"]] for run in (two, one)]
    assert accuracies[0] == accuracies[1]
    answers = [
        (tmp_path / n / "predictions.jsonl").read_text().splitlines() for n in ("two", "one")
    ]
    labels = [[json.loads(row)["prediction"]["label"] for row in rows] for rows in answers]
    assert labels[0] == labels[1]


def test_attach_takes_what_surrounds_the_model():
    model, other = tiny_model("bert-sequence"), tiny_model("bert-sequence")
    with patch_model(model, ProgressiveSchedule(2, 4)) as handle:
        assert handle.attach(model) is handle  # one process: nothing to do
        with pytest.raises(ValueError, match="does not hold it"):
            handle.attach(other)
        with pytest.raises(UnsupportedModelError, match="one process per GPU"):
            handle.attach(DataParallel(model))
        with pytest.raises(UnsupportedModelError, match="without pipeline stages"):
            handle.attach(engine_around(model, "PipelineEngine"))


def engine_around(model: nn.Module, kind: str = "", optimizer: str = "") -> nn.Module:
    """What is told by the names of DeepSpeed's classes."""
    cls = type("DeepSpeedEngine", (nn.Module,), {})
    engine = type(kind, (cls,), {})() if kind else cls()
    engine.module = model
    engine.optimizer = type(optimizer, (), {})() if optimizer else None
    return engine


def test_wrappers_that_do_not_follow_are_refused_wherever_they_are():
    schedule = ProgressiveSchedule(2, 4)
    model = tiny_model("bert-sequence")
    for wrapped, message in (
        (DataParallel(model), "one process per GPU"),
        (engine_around(model, "PipelineEngine"), "without pipeline stages"),
        (engine_around(model, optimizer="BF16_Optimizer"), "use ZeRO-2"),
        (engine_around(model, optimizer="FP16_UnfusedOptimizer"), '"stage": 1'),
        (engine_around(model, optimizer="ZenFlowZeroOptimizer"), "use .* fully_shard"),
    ):
        for given in (wrapped, nn.ModuleDict({"inside": wrapped})):
            with pytest.raises(UnsupportedModelError, match=message):
                patch_model(given, schedule)
    with pytest.raises(UnsupportedModelError, match=r"pass model.inside.module"):
        patch_model(nn.ModuleDict({"inside": engine_around(model)}), schedule)


def test_zero_3_is_refused():
    model = tiny_model("bert-sequence")
    model.bert.encoder.layer[0].output.dense.weight.ds_id = 7
    for given in (model, engine_around(model), engine_around(model, optimizer="Stage3")):
        with pytest.raises(UnsupportedModelError, match=r"ZeRO-3.*use ZeRO-2.*fully_shard"):
            patch_model(given, ProgressiveSchedule(2, 4))


def test_copies_know_no_wrapper():
    model = tiny_model("bert-sequence")
    with patch_model(model, ProgressiveSchedule(2, 4)) as handle:
        handle.attach(model)
        copy.deepcopy(model)
