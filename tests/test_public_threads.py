"""What people reported about freezing on several ranks and under other people's trainers.

Every test has the name of a public thread. Its first half is what the thread reports, with torch or
transformers alone, and asserts the symptom; its second half is the same script with this library.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import ROWS, WORLD, batch, process_group, run_ranks
from safetensors.torch import load_file
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.utils.data import DataLoader
from trainers import rows_of, trainer_of
from transformers import TrainerCallback

from progtuning_kernels import (
    CyclicBlockSchedule,
    MaskedAdamW,
    MilestoneSchedule,
    RandomBlockSchedule,
    load_checkpoint,
    patch_model,
    save_checkpoint,
)
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.families import UnsupportedModelError

# a step follows the size of its gradient, so that rounding stays what it is
ADAM = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
# of a step each; -1: everything trains
FREEZES, THAWS = (-1, -1, 2, 2), (2, 2, -1, -1)


def bert() -> nn.Module:
    return tiny_model("bert-sequence").train()


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.bert.encoder.layer


def freeze(model: nn.Module, boundary: int) -> None:
    """By hand, as a script does."""
    model.bert.embeddings.requires_grad_(boundary < 0)
    for i, block in enumerate(blocks_of(model)):
        block.requires_grad_(i >= boundary)


def schedule_of(boundaries: tuple[int, ...]) -> MilestoneSchedule:
    return MilestoneSchedule(dict(enumerate(boundaries)))


def train(
    called: nn.Module,
    optimizer: torch.optim.Optimizer,
    boundaries: tuple[int, ...],
    rank: int | None,
    *,
    handle=None,
    first: int = 0,
    clip: float | None = None,
) -> Iterator[int]:
    """Freezes by hand where there is no handle; yields after every backward pass."""
    model = called.module if isinstance(called, DistributedDataParallel) else called
    for step, boundary in enumerate(boundaries[first:], first):
        if handle is None:
            freeze(model, boundary)
        called(**batch(step, rank)).loss.backward()
        yield step
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.advance()


def finish(steps: Iterator[int]) -> None:
    for _ in steps:
        pass


def alone(boundaries: tuple[int, ...], *, clip: float | None = None) -> nn.Module:
    """What one process gets that freezes by hand, without any wrapper or trainer."""
    model = bert()
    finish(train(model, AdamW(model.parameters(), **ADAM), boundaries, None, clip=clip))
    return model


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def differs(model: nn.Module, expected: nn.Module) -> bool:
    with pytest.raises(AssertionError):
        assert_same_weights(model, expected)
    return True


def same_on_ranks(model: nn.Module) -> bool:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    each = [torch.empty_like(own) for _ in range(WORLD)]
    dist.all_gather(each, own)
    return torch.equal(*each)


def nbytes(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def active_bytes(model: nn.Module) -> int:
    return nbytes(p for p in model.parameters() if p.requires_grad)


def with_state(optimizer: torch.optim.Optimizer) -> int:
    return sum(bool(state) for state in optimizer.state.values())


class Sent:
    """Bytes of gradients that DDP reduces."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._bytes = 0
        ddp.register_comm_hook(None, self._reduce)

    def _reduce(self, state, bucket):
        self._bytes += bucket.buffer().nbytes
        work = dist.all_reduce(bucket.buffer().div_(WORLD), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def take(self) -> int:
        taken, self._bytes = self._bytes, 0
        return taken


@contextlib.contextmanager
def scattered_bytes() -> Iterator[list[int]]:
    """Of every reduce-scatter: torch from 2.13 on calls it by the first name."""
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
            own = getattr(dist, name, None)
            if own is None:
                continue

            def scatter(*args, own=own, **kwargs):
                counted.append((kwargs.get("input") if "input" in kwargs else args[1]).nbytes)
                return own(*args, **kwargs)

            patch.setattr(dist, name, scatter)
        yield counted


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block)
    return fully_shard(model)


def frozen_in_mid_run(rank: int) -> None:
    """A part that freezes at a step of a DDP run ends it in an error, one wrong step later."""
    model = bert()
    ddp = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        for step in train(ddp, AdamW(model.parameters(), **ADAM), FREEZES, rank):
            reached = step
    assert reached == FREEZES.index(2)  # the first step under the plan was made, without an error,
    assert not same_on_ranks(model)  # by gradients of its own on every rank

    model = bert()
    ddp = DistributedDataParallel(model)
    handle = patch_model(model, schedule_of(FREEZES))
    finish(train(ddp, AdamW(model.parameters(), **ADAM), FREEZES, rank, handle=handle))
    assert same_on_ranks(model)
    assert_same_weights(model, alone(FREEZES))


def frozen_by_a_flag_of_the_optimizer(rank: int) -> None:
    """`freeze` in a parameter group in the place of `requires_grad`: DDP sends every gradient."""
    model = bert()
    ddp = DistributedDataParallel(model)
    sent = Sent(ddp)
    low = [*model.bert.embeddings.parameters(), *blocks_of(model)[:2].parameters()]
    for step in train(ddp, AdamW(model.parameters(), **ADAM), (-1, -1), rank):
        if step == 1:
            for p in low:
                p.grad = None  # as step() of such an optimizer leaves a frozen group out
        assert sent.take() == nbytes(model.parameters())

    model = bert()
    ddp = DistributedDataParallel(model)
    sent = Sent(ddp)
    handle = patch_model(model, schedule_of((-1, 2)))
    optimizer = AdamW(model.parameters(), **ADAM)
    share = [
        sent.take() / nbytes(model.parameters())
        for _ in train(ddp, optimizer, (-1, 2), rank, handle=handle)
    ]
    assert share == [1, active_bytes(model) / nbytes(model.parameters())] and share[1] < 0.5
    assert_same_weights(model, alone((-1, 2)))


def frozen_under_find_unused_parameters(rank: int) -> None:
    """`find_unused_parameters=True` hides the error, and sends zeros for all that is frozen."""
    for patched in (False, True):
        model = bert()
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        sent = Sent(ddp)
        handle = patch_model(model, schedule_of(FREEZES)) if patched else None
        optimizer = AdamW(model.parameters(), **ADAM)
        for step in train(ddp, optimizer, FREEZES, rank, handle=handle):
            wanted = active_bytes(model) if patched else nbytes(model.parameters())
            assert sent.take() == wanted, step
        assert_same_weights(model, alone(FREEZES))


def thawed_in_mid_run(rank: int) -> None:
    """What is frozen when DDP is made, and thaws later, trains on every rank for itself."""
    model = bert()
    freeze(model, THAWS[0])
    ddp = DistributedDataParallel(model)
    finish(train(ddp, AdamW(model.parameters(), **ADAM), THAWS, rank))  # without an error
    assert not same_on_ranks(model)

    model = bert()
    handle = patch_model(model, schedule_of(THAWS))
    ddp = DistributedDataParallel(model)
    finish(train(ddp, AdamW(model.parameters(), **ADAM), THAWS, rank, handle=handle))
    assert same_on_ranks(model)
    assert_same_weights(model, alone(THAWS))


class Lisa(TrainerCallback):
    """LISA as it goes round: `count` blocks of the model train for `period` steps."""

    def __init__(self, model: nn.Module, count: int, period: int, *, at_once: bool) -> None:
        self._blocks, self._count, self._period = blocks_of(model), count, period
        self._random = random.Random(0)
        if at_once:
            self._blocks.requires_grad_(False)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self._period == 0:
            self._blocks.requires_grad_(False)
            for block in self._random.sample([*self._blocks], self._count):
                block.requires_grad_(True)


class ByPlan(TrainerCallback):
    """Freezes by hand what a schedule freezes, and drops the state of the optimizer by hand."""

    def __init__(self, schedule) -> None:
        self._schedule = schedule

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        plan = self._schedule.plan(state.global_step, len(blocks_of(model)))
        model.bert.embeddings.requires_grad_(plan.embeddings)
        for block, trains in zip(blocks_of(model), plan.trainable, strict=True):
            block.requires_grad_(trains)
        for p in model.parameters():
            if not p.requires_grad:
                optimizer.state.pop(p, None)


def few_steps(folder, model: nn.Module, callback: TrainerCallback, *, rows: int = 4, **arguments):
    """A Trainer of 4 steps, whose AdamW keeps rounding as small as it is."""
    return trainer_of(
        folder,
        model=model,
        callbacks=[callback],
        steps=4,
        rows=rows_of("bert-sequence")[:16],
        per_device_train_batch_size=rows,
        adam_epsilon=1e-3,
        average_tokens_across_devices=False,  # it would take a mean over rows for a sum
        **arguments,
    )


def one_block_at_a_time() -> RandomBlockSchedule:
    return RandomBlockSchedule(1, 1, seed=1)


def lisa_on_several_ranks(rank: int) -> None:
    """LISA under the Trainer ends in DDP's error on more than one GPU."""
    model = bert()
    lisa = Lisa(model, 1, 1, at_once=False)
    trainer = few_steps("plain", model, lisa, rows=2, ddp_find_unused_parameters=False)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        trainer.train()

    model = bert()
    callback = ProgtuningCallback(one_block_at_a_time())
    few_steps("ours", model, callback, rows=2, ddp_find_unused_parameters=False).train()
    assert same_on_ranks(model)
    expected = bert()
    expected.load_state_dict(torch.load("lisa.pt", weights_only=True))
    assert_same_weights(model, expected)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(tiny_model("llama-causal-lm").train(), config)


def adapters_under_checkpointing(rank: int) -> None:
    """LoRA, re-entrant checkpointing and DDP that looks for unused parameters."""

    def start() -> tuple[nn.Module, DistributedDataParallel]:
        model = adapted()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        return model, DistributedDataParallel(model, find_unused_parameters=True)

    inputs = tiny_inputs("llama-causal-lm", seed=5)
    _, ddp = start()
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        ddp(**inputs).loss.backward()

    model, ddp = start()
    expected = adapted()
    for name, p in expected.named_parameters():
        p.requires_grad_(p.requires_grad and ".layers.0." not in name)
    expected(**inputs).loss.backward()
    patch_model(model, schedule_of((1,)), packing="off")
    with pytest.warns(UserWarning, match="use_reentrant=True"):
        ddp(**inputs).loss.backward()  # the same rows on both ranks: their mean is that of one
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


def frozen_in_a_flat_piece(rank: int) -> None:
    """FSDP1 refuses a piece that is frozen in part, or keeps its gradient whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = bert()
    freeze(model, 2)
    with pytest.raises(ValueError, match="uniform `requires_grad`"):
        FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    trains, whole = active_bytes(model), nbytes(model.parameters())
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with scattered_bytes() as scattered:
        wrapped(**batch(0, rank)).loss.backward()
    assert sum(scattered) >= whole > 2 * trains
    with pytest.raises(UnsupportedModelError, match="FSDP1.*fully_shard"):
        patch_model(wrapped, schedule_of((2,)))

    model = shard(bert())  # the cure that the message names
    handle = patch_model(model, schedule_of(FREEZES), kernels="off")
    optimizer = AdamW(model.parameters(), **ADAM)
    with scattered_bytes() as scattered:
        for step in train(model, optimizer, FREEZES, rank, handle=handle):
            planned = whole if FREEZES[step] < 0 else trains
            assert planned <= sum(scattered) <= 1.05 * planned + 256  # rows divided by the ranks
            scattered.clear()
    assert_same_weights(model, alone(FREEZES))


def sharded(boundaries: tuple[int, ...], **options) -> tuple[nn.Module, object, MaskedAdamW]:
    model = shard(bert())
    handle = patch_model(model, schedule_of(boundaries), kernels="off")
    return model, handle, MaskedAdamW(handle.param_groups(), **ADAM, **options)


def state_of_frozen_parameters(rank: int) -> None:
    """State of what was trained and then froze is dropped when a checkpoint is loaded."""
    boundaries = (-1, 2, 2, -1, -1)
    model = shard(bert())
    optimizer = AdamW(model.parameters(), **ADAM)
    finish(train(model, optimizer, boundaries[:3], rank))
    saved = get_optimizer_state_dict(model, optimizer)
    resumed = shard(bert())
    freeze(resumed, 2)
    loaded = AdamW(resumed.parameters(), **ADAM)
    set_optimizer_state_dict(resumed, loaded, saved)
    everything = len([*model.parameters()])
    assert len(saved["state"]) == with_state(optimizer) == everything
    assert with_state(loaded) == sum(p.requires_grad for p in resumed.parameters()) < everything

    model, handle, optimizer = sharded(boundaries, on_freeze="keep")
    finish(train(model, optimizer, boundaries[:3], rank, handle=handle))
    save_checkpoint("kept", handle, optimizer)
    model, handle, optimizer = sharded(boundaries, on_freeze="keep")
    load_checkpoint("kept", handle, optimizer)
    assert with_state(optimizer) == everything
    finish(train(model, optimizer, boundaries, rank, handle=handle, first=handle.step))
    assert_same_weights(model, alone(boundaries))


def state_of_parameters_that_never_trained(rank: int) -> None:
    """What has no state yet when a checkpoint is written is missed when it is read."""
    model = shard(bert())
    optimizer = AdamW(model.parameters(), **ADAM)
    finish(train(model, optimizer, THAWS[:2], rank))
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id="dcp")
    resumed = shard(bert())
    fresh = AdamW(resumed.parameters(), **ADAM)
    wanted = {"optim": get_optimizer_state_dict(resumed, fresh)}
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key .*optim\.state.*step"):
        dcp.load(wanted, checkpoint_id="dcp")

    model, handle, optimizer = sharded(THAWS)
    finish(train(model, optimizer, THAWS[:2], rank, handle=handle))
    save_checkpoint("thaws", handle, optimizer)
    model, handle, optimizer = sharded(THAWS)
    load_checkpoint("thaws", handle, optimizer)
    assert handle.step == 2 and 0 < with_state(optimizer) < len([*model.parameters()])
    finish(train(model, optimizer, THAWS, rank, handle=handle, first=2))
    assert_same_weights(model, alone(THAWS))


def clipping_of_updates_in_backward(rank: int) -> None:
    """An optimizer in backward has used the gradients before anybody can clip them."""
    clip = 0.05
    model = shard(bert())
    for p in model.parameters():
        optimizer = AdamW([p], **ADAM)
        p.register_post_accumulate_grad_hook(
            lambda p, optimizer=optimizer: (optimizer.step(), optimizer.zero_grad())
        )
    for step in range(len(FREEZES)):
        model(**batch(step, rank)).loss.backward()
        assert clip_grad_norm_(model.parameters(), clip) == 0
    everything = (-1,) * len(FREEZES)
    assert_same_weights(model, alone(everything))  # as without clipping
    assert differs(model, alone(everything, clip=clip))

    model, handle, optimizer = sharded(FREEZES, in_backward=True, max_grad_norm=clip)
    finish(train(model, optimizer, FREEZES, rank, handle=handle))
    assert_same_weights(model, alone(FREEZES, clip=clip))


def engine_of(model: nn.Module):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": ROWS // WORLD,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # it would be 1
        "steps_per_print": None,
    }
    optimizer = AdamW(model.parameters(), **ADAM)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train_engine(engine, boundaries: tuple[int, ...], rank: int, handle=None) -> Iterator[int]:
    """As `train`; yields the bytes that a rank keeps of the optimizer after every step."""
    for step, boundary in enumerate(boundaries):
        if handle is None:
            freeze(engine.module, boundary)
        engine.backward(engine(**batch(step, rank)).loss)
        engine.step()
        if handle is not None:
            handle.advance()
        states = engine.basic_optimizer.state.values()
        yield sum(nbytes(v for v in state.values() if v.dim()) for state in states)


def frozen_under_zero(rank: int) -> None:
    """ZeRO-2 keeps the state of what froze, and its momentum goes on moving the weights."""
    model = bert()
    engine = engine_of(model)
    weights, states = [], []
    for kept in train_engine(engine, FREEZES, rank):
        weights.append(lowest_weight(model).clone())
        states.append(kept)
    assert len({*states}) == 1
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(weights[2], weights[3])

    model = bert()
    engine = engine_of(model)
    handle = patch_model(engine, schedule_of(FREEZES))
    states = [*train_engine(engine, FREEZES, rank, handle)]
    assert states[-1] == pytest.approx(2 * active_bytes(model) / WORLD, abs=16)  # padded
    assert states[-1] < states[0] / 2
    assert_same_weights(model, alone(FREEZES))


def thawed_under_zero(rank: int) -> None:
    """What is frozen when the engine is made is never updated. (The thread has ZeRO-3.)"""
    model = bert()
    freeze(model, THAWS[0])
    start = lowest_weight(model).clone()
    finish(train_engine(engine_of(model), THAWS, rank))
    assert torch.equal(lowest_weight(model), start)

    model = bert()
    engine = engine_of(model)
    finish(train_engine(engine, THAWS, rank, patch_model(engine, schedule_of(THAWS))))
    assert_same_weights(model, alone(THAWS))


ON_RANKS: dict[str, Callable[[int], None]] = {
    "ShiqiYu/OpenGait#230": frozen_in_mid_run,
    "JDAI-CV/fast-reid#178": frozen_by_a_flag_of_the_optimizer,
    "open-mmlab/mmengine#767": frozen_under_find_unused_parameters,
    "facebookresearch/detectron2#2486": thawed_in_mid_run,
    "axolotl-ai-cloud/axolotl#1474": lisa_on_several_ranks,
    "huggingface/peft#313": adapters_under_checkpointing,
    "pytorch/pytorch#104690": frozen_in_a_flat_piece,
    "pytorch/pytorch#192202": state_of_frozen_parameters,
    "PrimeIntellect-ai/prime-rl#2800": state_of_parameters_that_never_trained,
    "meta-pytorch/torchtune#1934": clipping_of_updates_in_backward,
}


UNDER_DEEPSPEED: dict[str, Callable[[int], None]] = {
    "deepspeedai/DeepSpeed#5341": frozen_under_zero,
    "deepspeedai/DeepSpeed#5639": thawed_under_zero,
}


def run_threads(rank: int, folder: str, threads: dict[str, Callable[[int], None]]) -> None:
    """All threads, until one fails: then the other rank may be anywhere."""
    # for the Trainer, and DeepSpeed
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "DS_ACCELERATOR": "cpu"}
    os.chdir(folder)
    with process_group(rank, "store"):
        for number, check in enumerate(threads.values()):
            try:
                check(rank)
            except BaseException:
                Path(f"{number}-{rank}.failed").write_text(traceback.format_exc())
                raise
            Path(f"{number}-{rank}.passed").touch()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """A folder with what became of every thread on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    expected = bert()
    few_steps(folder / "alone", expected, ByPlan(one_block_at_a_time())).train()
    torch.save(expected.state_dict(), folder / "lisa.pt")
    with contextlib.suppress(ProcessExitedException, ProcessRaisedException):
        run_ranks(run_threads, str(folder), ON_RANKS, count=WORLD)
    return folder


def assert_passed(folder: Path, number: int) -> None:
    for failed in folder.glob(f"{number}-*.failed"):
        pytest.fail(failed.read_text())
    passed = len([*folder.glob(f"{number}-*.passed")])
    assert passed == WORLD, "not reached: an earlier thread failed"


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("thread", ON_RANKS)
def test_on_two_ranks(thread, ranks):
    assert_passed(ranks, [*ON_RANKS].index(thread))


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Path:
    """As `ranks`, where DeepSpeed is installed."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    with contextlib.suppress(ProcessExitedException, ProcessRaisedException):
        run_ranks(run_threads, str(folder), UNDER_DEEPSPEED, count=WORLD)
    return folder


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("thread", UNDER_DEEPSPEED)
def test_under_deepspeed(thread, engines):
    assert_passed(engines, [*UNDER_DEEPSPEED].index(thread))


def losses_of(trainer) -> list[float]:
    trainer.train()
    return [float(log["loss"]) for log in trainer.state.log_history if "loss" in log]


def lisa_that_trains_no_block(folder: Path) -> None:
    """Blocks that are frozen when the Trainer makes its optimizer are never in it."""
    losses = []
    for count in (1, 3):
        model = bert()
        losses.append(losses_of(few_steps(folder, model, Lisa(model, count, 1, at_once=True))))
        for p, start in zip(
            blocks_of(model).parameters(), blocks_of(bert()).parameters(), strict=True
        ):
            assert torch.equal(p, start)
    assert losses[0] == losses[1]  # however many blocks are to train

    losses = []
    for count in (1, 3):
        model, expected = bert(), bert()
        schedule = RandomBlockSchedule(count, 1, seed=1)
        losses.append(losses_of(few_steps(folder, model, ProgtuningCallback(schedule))))
        few_steps(folder, expected, ByPlan(schedule)).train()
        assert_same_weights(model, expected)
    assert losses[0] != losses[1]


class States(TrainerCallback):
    """How many blocks have state in the optimizer after every step."""

    def __init__(self) -> None:
        self.blocks: list[int] = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        held = [any(map(optimizer.state.get, b.parameters())) for b in blocks_of(model)]
        self.blocks.append(sum(held))


def lisa_that_keeps_all_state(folder: Path) -> None:
    """State of blocks that trained once stays: in the end it is that of full fine-tuning."""
    plain, ours = States(), States()
    model = bert()
    trainer = few_steps(folder, model, Lisa(model, 1, 1, at_once=False))
    trainer.add_callback(plain)
    trainer.train()
    assert plain.blocks[0] == 1 and plain.blocks == sorted(plain.blocks) and plain.blocks[-1] > 2

    trainer = few_steps(folder, bert(), ProgtuningCallback(one_block_at_a_time()))
    trainer.add_callback(ours)
    trainer.train()
    assert ours.blocks == [1, 1, 1, 1]


class FreezeAt(TrainerCallback):
    """Freezes when a step is reached, as most callbacks of scripts do."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == FREEZES.index(2):
            freeze(model, 2)


def freezing_lost_on_resume(folder: Path) -> None:
    """A Trainer that resumes trains what was frozen when the checkpoint was written."""

    def resumed(make: Callable[[], TrainerCallback]) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Weights of the checkpoint of step 3, of the resumed run, and of one that went through."""
        straight, model, saved = bert(), bert(), bert()
        few_steps(folder, straight, make(), save_strategy="steps", save_steps=3).train()
        few_steps(folder, model, make()).train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        saved.load_state_dict(load_file(folder / "checkpoint-3" / "model.safetensors"))
        return saved, model, straight

    saved, model, straight = resumed(FreezeAt)
    assert not torch.equal(lowest_weight(model), lowest_weight(saved))
    assert differs(model, straight)

    saved, model, straight = resumed(lambda: ProgtuningCallback(schedule_of(FREEZES)))
    assert torch.equal(lowest_weight(model), lowest_weight(saved))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


def lowest_weight(model: nn.Module) -> torch.Tensor:
    return blocks_of(model)[0].output.dense.weight


def freezing_out_of_the_groups(folder: Path) -> None:
    """A frozen layer that leaves the optimizer's groups can neither be saved nor loaded."""
    model = bert()
    optimizer = AdamW(model.parameters(), **ADAM)
    finish(train(model, optimizer, (-1, 2), None))
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    with pytest.raises(KeyError):
        optimizer.state_dict()
    for p in [p for p in optimizer.state if not p.requires_grad]:
        del optimizer.state[p]  # then it is saved, and a new run does not know what was left out
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        AdamW(bert().parameters(), **ADAM).load_state_dict(optimizer.state_dict())

    models = []
    for stops in (False, True):
        model = bert()
        handle = patch_model(model, schedule_of(FREEZES))
        optimizer = AdamW(handle.param_groups(), **ADAM)
        if stops:
            load_checkpoint(folder, handle, optimizer)
        for step in train(model, optimizer, FREEZES, None, handle=handle, first=handle.step):
            if step == 3 and not stops:
                save_checkpoint(folder, handle, optimizer)
        models.append(model)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


def checkpointing_of_frozen_blocks(folder: Path) -> None:
    """Re-entrant checkpointing of blocks above frozen ones gives them no gradient."""

    def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
        model(**batch(0)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    def checkpointed() -> nn.Module:
        model = bert()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with contextlib.suppress(AttributeError):  # later versions have switched them on
            model.disable_input_require_grads()
        return model

    expected = bert()
    freeze(expected, 2)
    wanted = gradients(expected)
    model = checkpointed()
    freeze(model, 2)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        got = gradients(model)
    assert wanted["bert.encoder.layer.3.output.dense.weight"] is not None
    assert not any(g is not None for name, g in got.items() if ".layer." in name)

    model = checkpointed()
    handle = patch_model(model, schedule_of((2,)), packing="off", kernels="off")
    with pytest.warns(UserWarning, match="use_reentrant=True"):
        got = gradients(model)
    handle.truncation_report().assert_truncated()
    for name, gradient in wanted.items():
        same = got[name] is None if gradient is None else torch.equal(got[name], gradient)
        assert same, name


def accumulation_of_updates_in_backward(folder: Path) -> None:
    """An optimizer in backward updates at every micro-batch."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    def micro_batches(step: int) -> Iterator[dict[str, torch.Tensor]]:
        return (batch(step, rank) for rank in range(WORLD))

    def accumulate(model: nn.Module, optimizer, handle=None) -> nn.Module:
        for step, boundary in enumerate(FREEZES):
            if handle is None:
                freeze(model, boundary)
            for i, rows in enumerate(micro_batches(step)):
                early = i == 0 and isinstance(optimizer, MaskedAdamW)
                with optimizer.accumulate() if early else contextlib.nullcontext():
                    (model(**rows).loss / WORLD).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            if handle is not None:
                handle.advance()
        return model

    expected = bert()
    accumulate(expected, AdamW(expected.parameters(), **ADAM))
    model = bert()
    _apply_optimizer_in_backward(AdamW, [*model.parameters()], ADAM)
    assert differs(accumulate(model, None), expected)

    model = bert()
    handle = patch_model(model, schedule_of(FREEZES))
    optimizer = MaskedAdamW(handle.param_groups(), in_backward=True, **ADAM)
    assert_same_weights(accumulate(model, optimizer, handle), expected)


def freezing_between_backward_and_step(folder: Path) -> None:
    """What freezes after the backward pass is updated by the gradient that it has already."""
    model = bert()
    optimizer = AdamW(model.parameters(), **ADAM)
    before = lowest_weight(model).clone()
    model(**batch(0)).loss.backward()
    freeze(model, 2)
    optimizer.step()
    assert not torch.equal(lowest_weight(model), before)

    model = bert()
    handle = patch_model(model, schedule_of((-1, 2)))
    optimizer = AdamW(model.parameters(), **ADAM)
    model(**batch(0)).loss.backward()
    moves = blocks_of(model)[2].output.dense.weight.clone()
    handle.advance()
    optimizer.step()
    assert torch.equal(lowest_weight(model), before)
    assert not torch.equal(blocks_of(model)[2].output.dense.weight, moves)


def adapters_that_thaw(folder: Path) -> None:
    """Leaving `disable_adapter()`, as a reference pass does, makes frozen adapters train again."""
    inputs = tiny_inputs("llama-causal-lm")

    def trained(model: nn.Module) -> set[str]:
        """Blocks whose adapters move in a step that comes after a reference pass."""
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = AdamW(model.parameters(), **ADAM)
        model(**inputs).loss.backward()
        optimizer.step()
        moved = (n for n, p in model.named_parameters() if not torch.equal(p, before[n]))
        return {name.split(".layers.")[1][0] for name in moved}

    model = adapted()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and ".layers.0." in name)
    assert trained(model) == {"0", "1", "2", "3"}

    model = adapted()
    patch_model(model, CyclicBlockSchedule(1, 5))
    assert trained(model) == {"0"}


def refrozen_when_lightning_resumes(folder: Path) -> None:
    """BaseFinetuning freezes again what had thawed before the checkpoint, for good."""
    L = pytest.importorskip("lightning.pytorch")
    lightning = pytest.importorskip("progtuning_kernels.integrations.lightning")

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = bert()

        def training_step(self, rows, number):
            return self.model(**rows).loss

        def configure_optimizers(self):
            return AdamW((p for p in self.parameters() if p.requires_grad), **ADAM)

    class Thaw(L.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze([pl_module.model.bert.embeddings, blocks_of(pl_module.model)[:2]])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                low = [pl_module.model.bert.embeddings, blocks_of(pl_module.model)[:2]]
                self.unfreeze_and_add_param_group(low, optimizer, initial_denom_lr=1)

    def fit(callback, epochs: int, **given) -> tuple[nn.Module, L.Trainer]:
        module = Module()
        trainer = L.Trainer(
            default_root_dir=folder,
            max_epochs=epochs,
            callbacks=[callback],
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        rows = DataLoader([batch(0), batch(1)], batch_size=None)
        trainer.fit(module, rows, weights_only=False, **given)
        return module.model, trainer

    def resumed(make) -> list[nn.Module]:
        """After the epoch of the thaw, after one more in another run, and in the same one."""
        saved, trainer = fit(make(), 2)
        trainer.save_checkpoint(folder / "thawed.ckpt")
        model, _ = fit(make(), 3, ckpt_path=folder / "thawed.ckpt")
        return [saved, model, fit(make(), 3)[0]]

    saved, model, straight = resumed(Thaw)
    assert not torch.equal(lowest_weight(saved), lowest_weight(bert()))
    assert torch.equal(lowest_weight(model), lowest_weight(saved))
    assert differs(model, straight)

    schedule = MilestoneSchedule({0: 2, 2: -1})
    saved, model, straight = resumed(lambda: lightning.ProgtuningCallback(schedule))
    assert not torch.equal(lowest_weight(model), lowest_weight(saved))
    for p, q in zip(model.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


ALONE: dict[str, Callable[[Path], None]] = {
    "OptimalScale/LMFlow#726": lisa_that_trains_no_block,
    "OptimalScale/LMFlow#768": lisa_that_keeps_all_state,
    "huggingface/transformers#11294": freezing_lost_on_resume,
    "mosaicml/composer#1002": freezing_out_of_the_groups,
    "huggingface/transformers#21381": checkpointing_of_frozen_blocks,
    "pytorch/pytorch#124523": accumulation_of_updates_in_backward,
    "neuralmagic/sparseml#965": freezing_between_backward_and_step,
    "huggingface/peft#3447": adapters_that_thaw,
    "Lightning-AI/pytorch-lightning#21901": refrozen_when_lightning_resumes,
}


@pytest.mark.parametrize("thread", ALONE)
def test_in_one_process(thread, tmp_path):
    ALONE[thread](tmp_path)


def test_the_page_lists_these_threads():
    page = (Path(__file__).parent.parent / "docs/tables/threads.md").read_text(encoding="utf-8")
    page, _, _ = page.partition("## New tokens")  # whose tests are in test_rows_threads.py
    rows = re.findall(r"^\| \[(\S+)/(\S+)#(\d+)\]\((\S+)\)", page, flags=re.M)
    assert [f"{owner}/{name}#{number}" for owner, name, number, _ in rows] == [
        *ON_RANKS,
        *UNDER_DEEPSPEED,
        *ALONE,
    ]
    for owner, name, number, link in rows:
        where = f"https://github.com/{owner}/{name}/"
        assert link in (f"{where}issues/{number}", f"{where}pull/{number}")
