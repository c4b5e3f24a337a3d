"""Two processes under `fully_shard` with a prefix cache, packing and ops train as one does."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import quick_interpreter
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import batch, forks, process_group, run_ranks
from test_distributed import Collectives, assert_same_weights, optimizer_of, shard
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard

from progtuning_kernels import (
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
from progtuning_kernels.sharding import local_of
from progtuning_kernels.swaps.deferred_logits import DeferredLogits

BATCHES = 2  # that come again in every epoch
STEPS = 18
SCHEDULES = {
    "progressive": lambda: ProgressiveSchedule(3, STEPS),
    "lisa": lambda: RandomBlockSchedule(1, 6, seed=1, embeddings="never"),
    "cyclic": lambda: CyclicBlockSchedule(1, 6, order="descending"),
}


def check_schedules(rank: int) -> None:
    """Cache and packing together: the weights of one process, and what is gathered for them."""
    counted = Collectives()
    for name, make in SCHEDULES.items():
        expected = tiny_model("bert-sequence").train()
        models = {None: expected, rank: tiny_model("bert-sequence").train()}
        for of, model in models.items():
            if of is not None:
                shard(model)
            options = {} if of is None else {"cache": PrefixCache(1 << 24), "packing": "on"}
            handle = patch_model(model, make(), **options)
            optimizer, _ = optimizer_of(handle)
            served = below = 0
            while handle.step < STEPS:
                counted.gathers = 0
                model(**batch(handle.step % BATCHES, of)).loss.backward()
                if of is not None:
                    report = handle.cache_report()
                    hit, served = report.served_steps > served, report.served_steps
                    suffix = handle.num_blocks - handle.boundary
                    # the root, and blocks from the boundary on; if rows are new, those below, too,
                    # or those that the boundary has passed, as all rows were seen below it
                    lower = below if 0 < below < handle.boundary else 0
                    forward = 1 + handle.num_blocks - (handle.boundary if hit else lower)
                    first = handle.step % 6 == 0  # of a stage: trials
                    assert first or counted.gathers == forward + suffix, (name, handle.step)
                    assert hit == (handle.boundary > 0 and handle.step % 6 >= BATCHES), name
                optimizer.step()
                optimizer.zero_grad()
                boundary = handle.boundary
                if handle.advance():
                    served, below = 0, boundary
        assert handle.packing_report().packs
        assert_same_weights(model, expected, name)


def rows(ids: list[int]) -> dict[str, torch.Tensor]:
    """Some of 18 rows; the first of every three has no padding."""
    inputs = [tiny_inputs("bert-sequence", seed=i) for i in range(6)]
    return {k: torch.cat([x[k] for x in inputs])[ids] for k in inputs[0]}


def check_ranks_that_differ(rank: int) -> None:
    """Ranks that need different things of the same forward do the same, and nothing is stale."""
    counted = Collectives()
    flags: dict[str, bool] = {}
    gathers: list[int] = []

    def shorter(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {k: v[:, :7] if v.dim() == 2 else v for k, v in inputs.items()}
        return {**inputs, "return_dict": True}

    def without_padding(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    def all_hidden(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**inputs, "output_hidden_states": True}

    def other_weights(model: nn.Module, of: int | None) -> None:
        """Past FSDP2, on one rank."""
        weight = model.bert.encoder.layer[0].output.dense.weight
        with torch.no_grad():
            if of is None:
                weight[16:] *= 9
            elif of == 1:
                local_of(weight).mul_(9)

    def evaluate(model: nn.Module, of: int | None) -> None:
        if of is not None:
            model.eval()
            with torch.no_grad():
                model(**rows([0, 1] if of == 0 else [2, 3]))
                model(**rows([0, 1] if of == 0 else [7, 8]))
            model.train()

    def setting(model: nn.Module, of: int | None) -> None:
        if of == 1:
            model.bert.encoder.layer[0].attention.self.note = 1

    def off(model: nn.Module, of: int | None) -> None:
        flags["off"] = of == 1

    same: Callable[..., object] = lambda inputs: inputs  # noqa: E731
    # by step: rows of both ranks, what rank 1 does with its rows, what happens before
    steps = [
        ([0, 1], [2, 3], same, None),  # boundary 1
        ([0, 1], [2, 3], same, None),
        ([0, 1], [4, 5], same, None),  # one has all rows, the other none
        ([0, 1], [4, 6], same, None),  # or some
        ([0, 1], [7, 8, 4], same, None),  # other numbers of rows
        ([0, 1], [2], same, evaluate),
        ([0, 1], [2, 3], shorter, None),  # another shape, and another kind of arguments
        ([0, 3], [6, 9], without_padding, None),  # padding on one rank
        ([0, 1], [2, 3], all_hidden, None),  # no cache for one
        ([0, 1], [2, 3], same, None),
        ([0, 1], [2, 3], same, other_weights),
        ([0, 1], [2, 3], same, None),
        ([0, 1], [2, 3], same, setting),
        ([0, 1], [2, 3], same, None),
        ([0, 1], [10, 11], same, None),  # boundary 3: rows of block 1, and new ones
        ([0, 1], [2, 11], same, None),
        ([0, 1], [2, 11], same, None),
        ([0, 1], [2, 11], same, off),
        ([0, 1], [2, 11], same, None),
    ]

    def run(model: nn.Module, handle, of: int | None) -> None:
        optimizer, _ = optimizer_of(handle)
        for first, second, change, happens in steps:
            if happens is not None:
                happens(model, of)
            counted.gathers = 0
            given = [rows(first), change(rows(second))]
            losses = [model(**g).loss for g in (given if of is None else [given[of]])]
            (sum(losses) / len(losses)).backward()
            gathers.append(counted.gathers)
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()

    expected = tiny_model("bert-sequence").train()
    run(expected, patch_model(expected, MilestoneSchedule({0: 1, 14: 3})), None)
    model = tiny_model("bert-sequence").train()
    shard(model)
    verdict = lambda *_: "it does not pay" if flags.get("off") else None  # noqa: E731
    with mock.patch.object(BreakEven, "verdict", verdict):
        handle = patch_model(model, MilestoneSchedule({0: 1, 14: 3}), cache=PrefixCache(1 << 24))
        with pytest.warns(UserWarning, match="cache is off"):
            run(model, handle, rank)
    # the root, blocks from the boundary on, these again in backward, and 1 below it where a row of
    # one rank has to run through block 0, or 2 where it has to run through blocks 1 and 2
    found = {step: gathers[len(steps) + step] for step in (1, 2, 3, 4, 5, 8, 9, 11, 13, 15, 16, 18)}
    assert found == {
        **{1: 7, 2: 8, 3: 8, 4: 8, 5: 7, 8: 8, 9: 7, 11: 7, 13: 7},
        **{15: 5, 16: 3, 18: 6},
    }
    report = handle.cache_report()
    assert report.state == "off" and ("another rank" in report.reason) == (rank == 0)
    assert_same_weights(model, expected, "ranks that differ")


def check_disk(rank: int) -> None:
    """A later run finds its rows again: their keys come from whole weights."""
    for run in range(2):
        model = tiny_model("bert-sequence").train()
        shard(model)
        cache = PrefixCache(1 << 24, device="disk", path=f"rows-{rank}")
        with patch_model(model, MilestoneSchedule({0: 2}), cache=cache) as handle:
            for _ in range(2):
                model(**batch(0, rank)).loss.backward()
            report = handle.cache_report()
            assert (report.hits, report.misses) == (2 + 2 * run, 2 - 2 * run), report


def check_saved_after_an_evaluation(rank: int) -> None:
    """It leaves weights gathered: the checkpoint has the shards of all ranks all the same."""
    models = [tiny_model("bert-sequence", seed=seed).train() for seed in range(2)]
    for model in models:
        for block in (*model.bert.encoder.layer, model):
            fully_shard(block, reshard_after_forward=False)
    first, second = (patch_model(m, MilestoneSchedule({0: 1, 2: 3})) for m in models)
    optimizers = [optimizer_of(handle)[0] for handle in (first, second)]
    for step in range(2):
        models[0](**batch(step, rank)).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        first.advance()
    models[0].eval()
    with torch.no_grad():
        models[0](**batch(0, rank))
    models[0].train()
    save_checkpoint("after-an-evaluation", first, optimizers[0])
    load_checkpoint("after-an-evaluation", second, optimizers[1])
    expected = {n: p.full_tensor().detach() for n, p in models[0].named_parameters()}
    for name, p in models[1].named_parameters():
        assert torch.equal(p.full_tensor(), expected[name]), name
    for model in models:
        model(**batch(2, rank)).loss.backward()


def check_what_is_refused(rank: int) -> None:
    """What would train nothing, and ranks that would wait for each other's forwards."""
    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    old = optimizer_of(handle)[0]
    shard(model)
    with pytest.raises(RuntimeError, match="make the optimizer after fully_shard"):
        model(**batch(0, rank))
    optimizer = optimizer_of(handle)[0]  # of shards, though the forward has gathered
    shards = [local_of(p.detach()) for group in optimizer.param_groups for p in group["params"]]
    before = [p.clone() for p in shards]
    model(**batch(0, rank)).loss.backward()
    optimizer.step()
    moved = sum(not torch.equal(p, was) for p, was in zip(shards, before, strict=True))
    assert moved == sum(p.requires_grad and local_of(p).numel() > 0 for p in model.parameters())
    del old  # it was there until now
    handle.unpatch()
    for options in ({"cache": PrefixCache(1 << 24)}, {"packing": "off"}):
        with pytest.raises(RuntimeError, match="under fully_shard also a cache and packing"):
            patch_model(model, MilestoneSchedule({0: 2}), **(options if rank else {}))


def check_optimizers_of_weights_that_are_gone(rank: int) -> None:
    """One that the handle does not know of is told that it trains nothing."""
    for kind in (torch.optim.AdamW, MaskedAdamW):
        for early in (True, False):
            model = tiny_model("bert-sequence").train()
            handle = patch_model(model, MilestoneSchedule({0: 2}))
            made = [kind(model.parameters(), lr=1e-3)] if early else []
            shard(model)
            optimizer = made[0] if early else kind(model.parameters(), lr=1e-3)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                while handle.step < 20:
                    model(**batch(0, rank)).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    model.zero_grad()
                    handle.advance()
            told = [str(w.message) for w in caught if "changed nothing in there" in str(w.message)]
            assert len(told) == early, (kind, early, told)
            assert not early or told[0].startswith("block 2 and 1 more should train")
            handle.unpatch()


CHECKS = (
    check_schedules,
    check_ranks_that_differ,
    check_disk,
    check_saved_after_an_evaluation,
    check_what_is_refused,
    check_optimizers_of_weights_that_are_gone,
)


def run(rank: int, folder: str) -> None:
    os.chdir(folder)
    with process_group(rank, "store"), mock.patch.object(BreakEven, "verdict", lambda *_: None):
        for check in CHECKS:
            check(rank)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks(tmp_path):
    run_ranks(run, str(tmp_path))


def short(step: int, of: int | None) -> dict[str, torch.Tensor]:
    """One row of five tokens for each rank, or both; the interpreter takes 6 ms a launch."""
    inputs = [tiny_inputs("llama-causal-lm", seed=2 * (step % 2) + i) for i in range(2)]
    inputs = inputs if of is None else [inputs[of]]
    ids = torch.cat([x["input_ids"][:1, :5] for x in inputs])
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run_ops(rank: int, folder: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    # it counts where triton is imported, which the process that this one was forked from has done
    for name in [name for name in sys.modules if re.match(r"triton\b(?!\._C)", name)]:
        del sys.modules[name]
    os.chdir(folder)
    quick_interpreter.install()
    with process_group(rank, "store"), mock.patch.object(BreakEven, "verdict", lambda *_: None):
        models = {None: tiny_model("llama-causal-lm"), rank: tiny_model("llama-causal-lm")}
        for of, model in models.items():
            options = {"kernels": "off"}
            if of is not None:
                options = {"kernels": "on", "packing": "on", "cache": PrefixCache(1 << 24)}
                for block in model.model.layers:
                    fully_shard(block)
                fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
                fully_shard(model)
            handle = patch_model(model.train(), MilestoneSchedule({1: 2, 4: 4}), **options)
            optimizer, _ = optimizer_of(handle)
            for step in range(6):
                inputs = short(step, of)
                labels = inputs.pop("labels")
                logits = model(**inputs, use_cache=False).logits
                loss = F.cross_entropy(
                    logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1)
                )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                handle.advance()
        report = handle.kernel_report()
        assert report.swapped == 14, str(report)  # nine norms, four MLPs, and the head
        assert handle.cache_report().hits > 0
        assert type(logits) is DeferredLogits and logits._logits is None
        with pytest.raises(RuntimeError, match="freed the head"):
            logits.sum()
        assert_same_weights(model, models[None], "ops")
        assert handle.packing_report().packs


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ops_run_on_what_is_gathered(tmp_path):
    pytest.importorskip("triton")
    run_ranks(run_ops, str(tmp_path))


def train_or_die(rank: int, folder: str, victim: int | None) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{victim}", 2)
    patience = timedelta(seconds=10)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    model = tiny_model("bert-sequence").train()
    shard(model)
    handle = patch_model(model, SCHEDULES["progressive"](), cache=PrefixCache(1 << 24))
    optimizer, _ = optimizer_of(handle)
    load_checkpoint(f"{folder}/checkpoints", handle, optimizer)
    try:
        while handle.step < STEPS:
            if handle.step == 8:
                save_checkpoint(f"{folder}/checkpoints", handle, optimizer)
            if rank == victim and handle.step == 10:  # the other has rows, and asks what it has
                os.kill(os.getpid(), signal.SIGKILL)
            model(**batch(handle.step % BATCHES, rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
    except RuntimeError as error:
        Path(folder, f"error-{rank}").write_text(str(error))
        os._exit(1)
    model.reshard()
    weights = {name: p.full_tensor() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_a_killed_rank_ends_the_other_and_the_run_resumes(tmp_path):
    for victim in (1, None):
        ranks = [
            forks().Process(target=train_or_die, args=(r, str(tmp_path), victim)) for r in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=90)
        codes = [process.exitcode for process in ranks]
        assert codes == ([1, -signal.SIGKILL] if victim == 1 else [0, 0])
    assert (tmp_path / "error-0").read_text(), "the other rank says what happened"
    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, SCHEDULES["progressive"]())
    optimizer, _ = optimizer_of(handle)
    while handle.step < STEPS:
        model(**batch(handle.step % BATCHES, None)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, found in weights.items():
        torch.testing.assert_close(found, model.get_parameter(name), rtol=1e-5, atol=2e-6)
    assert len(weights) == len([*model.parameters()])
