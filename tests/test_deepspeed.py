"""ZeRO-1 and ZeRO-2 partition what trains, at every change of plan, and end with the weights of one
process.
"""

from __future__ import annotations

import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from ranks import process_group, run_ranks
from test_distributed import (
    ROWS,
    SCHEDULES,
    STEPS,
    StopAfter,
    assert_same_weights,
    batch,
    same_on_ranks,
    trainer_of,
)
from tiny_models import tiny_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from progtuning_kernels import (
    MaskedAdamW,
    PatchHandle,
    PrefixCache,
    ProgressiveSchedule,
    RandomBlockSchedule,
    patch_model,
    save_checkpoint,
)
from progtuning_kernels.checkpoints import CheckpointError
from progtuning_kernels.freezing.decay_groups import decay_groups
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.families import UnsupportedModelError
from progtuning_kernels.optim import release_frozen_state, state_bytes
from progtuning_kernels.planner.ranks import Ranks
from progtuning_kernels.zero import is_engine

WORLD = 2


def adamw(groups) -> tuple[torch.optim.AdamW, LambdaLR]:
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))


def half(step: int, rank: int, part: int) -> dict[str, torch.Tensor]:
    """One of the rows of a rank."""
    return {k: v[part : part + 1] for k, v in batch(step, rank).items()}


def reference(schedule, *, annealed: bool = True, rows=None) -> nn.Module:
    """The run of one process, with plain AdamW that forgets what is frozen."""
    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, schedule, rows=rows)
    optimizer, scheduler = adamw(handle.param_groups(weight_decay=0.1))
    while handle.step < STEPS:
        model(**batch(handle.step, None)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if annealed:
            scheduler.step()
        handle.advance()
        release_frozen_state(optimizer)
    return model


def engine_of(stage: int, *, groups=None, rows=None, optimizer=None, accumulate=1, **config):
    import deepspeed

    model = tiny_model("bert-sequence").train()
    handle = None
    if groups is not None:  # patched first
        handle = patch_model(model, groups, rows=rows)
        made = handle.param_groups(weight_decay=0.1)
    else:
        made = decay_groups(list(model.parameters()), 0.1)
    own, scheduler = adamw(made) if optimizer is None else (optimizer(made), None)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=own,
        lr_scheduler=scheduler,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulate,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.5,
            "steps_per_print": None,
            **config,
        },
    )
    return engine if handle is None else (engine, handle)


def train(engine, handle: PatchHandle, rank: int, *, until: int = STEPS, on_step=None) -> None:
    parts = engine.gradient_accumulation_steps()
    while engine.global_steps < until:
        step = engine.global_steps
        rows = [batch(step, rank)] if parts == 1 else [half(step, rank, i) for i in range(parts)]
        for row in rows:
            engine.backward(engine(**row).loss)
            engine.step()
        if on_step is not None:
            on_step()
        handle.seek(engine.global_steps)


def forget(engine, handle: PatchHandle) -> None:
    """Under ZeRO-0 the optimizer is the user's own, over whole tensors."""
    handle.on_change(lambda _: release_frozen_state(engine.basic_optimizer))


def padded(elements: int) -> int:
    return math.ceil(elements / (2 * WORLD)) * 2 * WORLD


class Sent:
    """Bytes that DeepSpeed sends, one entry a call."""

    def __init__(self) -> None:
        from deepspeed.comm.torch import TorchBackend

        self.calls: list[tuple[str, int]] = []
        for name in ("all_reduce", "all_gather_into_tensor"):
            setattr(TorchBackend, name, self._counted(name, getattr(TorchBackend, name)))

    def _counted(self, name: str, own):
        def call(*args, **kwargs):
            tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
            self.calls.append((name, next(tensors).nbytes))
            return own(*args, **kwargs)

        return call

    def take(self, name: str) -> list[int]:
        found = [size for called, size in self.calls if called == name]
        self.calls = [call for call in self.calls if call[0] != name]
        return found


def full_state(engine) -> dict[tuple[str, str], torch.Tensor]:
    """Moments and float32 weights of every tensor that ZeRO holds, gathered by DeepSpeed."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for group in engine.optimizer.bit16_groups:
        for p in group:
            name = engine.param_names[p]
            found[name, "weight"] = safe_get_full_fp32_param(p)
    state = engine.optimizer.optimizer.state
    engine.optimizer._hp_optimizer_states_linked = False  # DeepSpeed links at the first update
    if all(state.get(part["params"][0]) for part in engine.optimizer.param_groups):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        for group in engine.optimizer.bit16_groups:
            for p in group:
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = safe_get_full_optimizer_state(p, key)
                    found[engine.param_names[p], key] = moment
    return found


def check_stages(rank: int) -> None:
    """Weights of one process, in both orders of patching, with and without accumulation."""
    for stage in (0, 1, 2):
        for name in ("progressive", "random", "cyclic", "random-truncated"):
            expected = reference(SCHEDULES[name]())
            accumulate = 2 if name in ("random", "cyclic") else 1
            if name == "cyclic" and stage:  # the first forward finds the engine
                engine = engine_of(stage, accumulate=accumulate)
                handle = patch_model(engine.module, SCHEDULES[name]())
            elif name == "progressive":  # nothing is frozen yet
                engine, handle = engine_of(stage, groups=SCHEDULES[name]())
            else:
                engine = engine_of(stage, accumulate=accumulate)
                handle = patch_model(engine, SCHEDULES[name]())
            if stage == 0:
                forget(engine, handle)
            train(engine, handle, rank)
            assert_same_weights(engine.module, expected, f"{name} under ZeRO-{stage}")
            assert same_on_ranks(engine.module)


def check_rows(rank: int) -> None:
    rows = {"word_embeddings": [9, 5]}
    engine, handle = engine_of(2, groups=SCHEDULES["progressive"](), rows=rows)
    train(engine, handle, rank)
    expected = reference(SCHEDULES["progressive"](), rows=rows)
    assert_same_weights(engine.module, expected, "rows")
    found, start = (
        m.bert.embeddings.word_embeddings.weight
        for m in (engine.module, tiny_model("bert-sequence"))
    )
    assert (found != start).any(1).nonzero().flatten().tolist() == [5, 9]
    with pytest.raises(UnsupportedModelError, match="call patch_model before deepspeed.initialize"):
        patch_model(engine_of(2), ProgressiveSchedule(2, 4), rows=rows)


def check_bytes(rank: int) -> None:
    """What is frozen is neither reduced nor kept; what trains on keeps its moments bit for bit."""
    sent = Sent()
    for stage in (1, 2):
        engine = engine_of(stage)
        handle = patch_model(engine, ProgressiveSchedule(3, STEPS))
        base, model, boundaries = engine.basic_optimizer, engine.module, set()

        def look(engine=engine, handle=handle, base=base, model=model, seen=boundaries) -> None:
            seen.add(handle.boundary)
            active = [p for p in model.parameters() if p.requires_grad]
            groups = [sum(p.numel() for p in active if (p.dim() > 1) == m) for m in (True, False)]
            assert sum(b for b in sent.take("all_reduce") if b > 4) == 4 * sum(groups)
            assert sent.take("all_gather_into_tensor") == [4 * padded(n) for n in groups]
            own = sum(map(padded, groups)) // WORLD
            assert state_bytes(base) == 8 * own + 4 * len(groups)
            assert (
                sum(p.nbytes for p in engine.optimizer.single_partition_of_fp32_groups) == 4 * own
            )
            assert all(p.grad is None for p in model.parameters())
            storages = {
                p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()
            }
            held = sum(storage.nbytes() for storage in storages.values())
            frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
            assert held == frozen + 4 * sum(map(padded, groups))  # no old flat tensor is alive
            ranks = Ranks(WORLD, "zero2")
            planned = ranks.traffic(model, handle.layout, handle.boundary)
            gathered = 4 * sum(map(padded, groups))
            assert (planned.reduced_bytes, planned.gathered_bytes) == (4 * sum(groups), gathered)
            assert sum(t.nbytes for t in ranks.updated(model)) == 4 * own
            assert ranks.weight_bytes(model) == held + sum(t.nbytes for t in model.buffers())

        train(engine, handle, rank, on_step=look)
        assert len(boundaries) == 3

        # LISA: what is drawn twice keeps its moments, and what is new begins without
        engine = engine_of(stage)
        handle = patch_model(engine, RandomBlockSchedule(2, 2, seed=1))
        moved = {"kept": 0, "new": 0}
        for end in range(2, STEPS, 2):
            train(engine, handle, rank, until=end - 1)
            step = engine.global_steps
            engine.backward(engine(**batch(step, rank)).loss)
            engine.step()
            before = full_state(engine)
            steps = {
                name: float(part_state["step"])
                for part in engine.optimizer.param_groups
                for name in part["param_names"]
                if (part_state := base_state(engine, part))
            }
            handle.seek(engine.global_steps)
            for part in engine.optimizer.param_groups:
                state = base_state(engine, part)
                for name in part["param_names"]:
                    if (name, "exp_avg") in before:
                        assert float(state["step"]) == steps[name]
                        moved["kept"] += 1
                    else:
                        assert not state
                        moved["new"] += 1
            after = full_state(engine) | moments(engine)
            for key in after.keys() & before.keys():
                assert torch.equal(after[key], before[key]), key
        assert all(moved.values())
        sent.calls.clear()


def base_state(engine, part) -> dict:
    return engine.basic_optimizer.state.get(part["params"][0], {})


def moments(engine) -> dict[tuple[str, str], torch.Tensor]:
    """Of tensors that have any, put together from the slices of all ranks."""
    zero, found = engine.optimizer, {}
    for i, part in enumerate(zero.param_groups):
        for key, value in base_state(engine, part).items():
            if value.dim() == 0:
                continue
            slices = [torch.empty_like(value) for _ in range(WORLD)]
            dist.all_gather(slices, value)
            whole = torch.cat(slices)
            tensors, starts = zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i]
            for p, start in zip(tensors, starts, strict=True):
                found[engine.param_names[p], key] = whole[start : start + p.numel()].view(p.shape)
    return found


def check_bf16(rank: int) -> None:
    """Float32 weights and moments of what trains on keep their bits; weights end near float32."""
    exact = engine_of(2)
    exact_handle = patch_model(exact, RandomBlockSchedule(2, 2, seed=1))
    for stage in (1, 2):
        engine = engine_of(stage, bf16={"enabled": True})
        handle = patch_model(engine, RandomBlockSchedule(2, 2, seed=1))
        for end in range(2, STEPS + 1, 2):
            train(engine, handle, rank, until=end - 1)
            engine.backward(engine(**batch(engine.global_steps, rank)).loss)
            engine.step()
            before = {**full_state(engine), **moments(engine)}
            handle.seek(engine.global_steps)
            after = {**full_state(engine), **moments(engine)}
            for key in (same := after.keys() & before.keys()):
                thawed = key[1] == "weight" and (key[0], "exp_avg") not in after
                assert thawed or torch.equal(after[key], before[key]), key
            assert same
        assert same_on_ranks(engine.module)
    train(exact, exact_handle, rank, until=engine.global_steps)
    for (name, p), q in zip(
        exact.module.named_parameters(), engine.module.parameters(), strict=True
    ):
        apart = (p - q.float()).norm() / p.norm().clamp(min=1e-3)
        assert apart < 0.1, (name, apart)


def check_resume(rank: int) -> None:
    """In the middle of a stage, and between two: the bits of the run that was not stopped."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name, stop in (("progressive", 4), ("random", 5), ("random", 6)):
        for stage in (0, 2) if stop == 6 else (1, 2):
            folder = f"{name}-{stop}-{stage}"
            straight = engine_of(stage)
            handle = patch_model(straight, SCHEDULES[name]())
            if stage == 0:
                forget(straight, handle)

            def save(engine=straight, folder=folder, stop=stop) -> None:
                if engine.global_steps == stop:
                    engine.save_checkpoint(folder)

            train(straight, handle, rank, on_step=save)

            resumed = engine_of(stage)
            handle = patch_model(resumed, SCHEDULES[name]())
            train(resumed, handle, rank, until=1)  # weights of its own, to be replaced
            if stage == 0:
                forget(resumed, handle)
            resumed.load_checkpoint(folder)
            handle.seek(resumed.global_steps)
            train(resumed, handle, rank)
            for p, q in zip(straight.module.parameters(), resumed.module.parameters(), strict=True):
                assert torch.equal(p, q)
            if stage:
                with pytest.raises(RuntimeError, match="layout does not match"):  # not patched
                    engine_of(stage).load_checkpoint(folder)
            if stage == 2:  # DeepSpeed gives its tool what is frozen under ZeRO-2 only
                whole = get_fp32_state_dict_from_zero_checkpoint(folder, tag=f"global_step{stop}")
                assert whole.keys() >= {n for n, _ in straight.module.named_parameters()}


def check_accelerate(rank: int) -> None:
    from accelerate import DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    expected = reference(SCHEDULES["cyclic"](), annealed=False)
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.5,
        }
    )
    accelerator = Accelerator(gradient_accumulation_steps=2, deepspeed_plugin=plugin)
    model = tiny_model("bert-sequence").train()
    optimizer, _ = adamw(decay_groups(list(model.parameters()), 0.1))
    engine, optimizer = accelerator.prepare(model, optimizer)
    assert is_engine(engine)
    handle = patch_model(engine, SCHEDULES["cyclic"]())
    while handle.step < STEPS:
        for part in range(2):
            with accelerator.accumulate(engine):
                accelerator.backward(engine(**half(handle.step, rank, part)).loss)
                optimizer.step()
                optimizer.zero_grad()
        handle.advance()
    assert_same_weights(model, expected, "Accelerate")
    AcceleratorState._reset_state()


def check_trainer(rank: int) -> None:
    """The callback alone is enough, resume included."""
    expected = torch.load("expected.pt", weights_only=True)
    for stage in (1, 2):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        folder = f"runs-{stage}"
        for kind, accumulate in (("plain", 1), ("accumulated", 2)):
            model = tiny_model("bert-sequence")
            trainer = trainer_of(
                folder,
                model,
                ProgtuningCallback(ProgressiveSchedule(3)),
                rows=ROWS // WORLD // accumulate,
                gradient_accumulation_steps=accumulate,
                deepspeed=config,
                logging_steps=3,
            )
            trainer.train()
            assert is_engine(trainer.model_wrapped)
            assert_trained(model, expected[kind])
            sizes = [log["state_bytes"] for log in trainer.state.log_history if "loss" in log]
            assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == 3
        for stop in (True, False):
            model = tiny_model("bert-sequence")
            callback = ProgtuningCallback(ProgressiveSchedule(3, STEPS))
            trainer = trainer_of(
                folder,
                model,
                callback,
                rows=2,
                deepspeed=config,
                save_strategy="steps",
                save_steps=5,
            )
            if stop:
                trainer.add_callback(StopAfter(5))
            trainer.train(resume_from_checkpoint=None if stop else f"{folder}/checkpoint-5")
        assert_trained(model, expected["plain"])


def assert_trained(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert same_on_ranks(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=2e-6)


def check_cache(rank: int) -> None:
    """Rows are kept while the weights of the prefix move to storages of their own."""
    expected = reference(ProgressiveSchedule(3, STEPS))
    engine = engine_of(2)
    cache = PrefixCache(max_bytes=1 << 20)
    handle = patch_model(engine.module, ProgressiveSchedule(3, STEPS), cache=cache, packing="on")
    train(engine, handle, rank)
    assert_same_weights(engine.module, expected, "with a cache")
    for _ in range(2):  # the rows of the last step once more
        engine.backward(engine(**batch(STEPS - 1, rank)).loss)
        engine.step()
    assert handle.cache_report().hits == 2 * ROWS // WORLD


def check_refusals(rank: int) -> None:
    schedule = ProgressiveSchedule(3, STEPS)
    for options, message in (
        ({"stage": 3}, "ZeRO-3.*use ZeRO-2"),
        ({"stage": 0, "bf16": {"enabled": True}}, "without ZeRO.*use .*stage"),
        (
            {
                "stage": 1,
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            "accumulated in float32.*use ZeRO-2",
        ),
        ({"stage": 2, "optimizer": MaskedAdamW}, "MaskedAdamW in ZeRO.*use torch.optim.AdamW"),
        (
            {"stage": 0, "optimizer": lambda groups: MaskedAdamW(groups, in_backward=True)},
            "in_backward=False",
        ),
        ({"stage": 1, "optimizer": torch.optim.Adagrad}, "Adagrad in ZeRO"),
    ):
        engine = engine_of(**options)
        refused = [lambda engine=engine: patch_model(engine, schedule)]
        if options["stage"] == 3:
            refused += [lambda engine=engine: patch_model(engine.module, schedule)]
        else:
            handle = patch_model(engine.module, schedule)
            refused += [lambda engine=engine: engine(**batch(0, rank))]
            refused += [lambda engine=engine, handle=handle: handle.attach(engine)]
        for call in reversed(refused):
            with pytest.raises(UnsupportedModelError, match=message):
                call()
            if options["stage"] != 3 and call is refused[1]:
                handle.unpatch()

    engine = engine_of(2, accumulate=2)
    handle = patch_model(engine, schedule)
    engine.backward(engine(**half(0, rank, 0)).loss)
    engine.step()
    with pytest.raises(RuntimeError, match="accumulated gradients"):
        handle.seek(5)

    engine = engine_of(2)
    with pytest.raises(UnsupportedModelError, match="under DeepSpeed no rank"):
        patch_model(engine, SCHEDULES["adaptive"]())

    # frozen when ZeRO started, and in a group without names
    import deepspeed

    model = tiny_model("bert-sequence").train()
    handle = patch_model(model, SCHEDULES["random-truncated"]())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    with pytest.raises(RuntimeError, match=r"in no group.*deepspeed.initialize before"):
        for step in range(STEPS):
            engine.backward(engine(**batch(step, rank)).loss)
            engine.step()
            handle.seek(engine.global_steps)

    # a model that is patched no more trains as a whole again
    engine = engine_of(2)
    with patch_model(engine, SCHEDULES["random"]()) as handle:
        train(engine, handle, rank, until=3)
        with pytest.raises(CheckpointError, match="engine.save_checkpoint"):
            save_checkpoint("none", handle, engine.basic_optimizer)
    held = sum(p.numel() for group in engine.optimizer.bit16_groups for p in group)
    assert held == sum(p.numel() for p in engine.module.parameters())
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.125
    assert {group["lr"] for group in engine.basic_optimizer.param_groups} == {0.125}
    assert {group["lr"] for group in engine.optimizer.param_groups} == {0.125}

    # a plan that comes too early is refused; the old one goes on, and the new one comes in time
    engine = engine_of(2, accumulate=2)
    handle = patch_model(engine, schedule)
    for part in range(2):
        engine.backward(engine(**half(0, rank, part)).loss)
        engine.step()
        if not part:
            for early in (lambda: handle.seek(5), lambda: engine(**half(0, rank, 1))):
                with pytest.raises(RuntimeError, match="accumulated gradients"):
                    early()
            handle.seek(engine.global_steps)
    handle.seek(5)
    held = sum(p.numel() for group in engine.optimizer.bit16_groups for p in group)
    assert held == handle.active_params < handle.trainable_params


def check_exceptions(rank: int) -> None:
    """Unpatching after an exception sends nothing and raises nothing; the next forward sees to it
    that everything trains.
    """
    engine = engine_of(2)
    with pytest.raises(KeyError), patch_model(engine, SCHEDULES["random-truncated"]()) as handle:
        train(engine, handle, rank, until=2)
        raise KeyError
    held = sum(p.numel() for group in engine.optimizer.bit16_groups for p in group)
    assert held < handle.trainable_params
    engine(**batch(2, rank))
    held = sum(p.numel() for group in engine.optimizer.bit16_groups for p in group)
    assert held == handle.trainable_params

    with pytest.raises(KeyError), patch_model(engine, SCHEDULES["random"]()):
        engine.backward(engine(**batch(2, rank)).loss)
        raise KeyError  # while gradients wait


CHECKS = (
    check_stages,
    check_rows,
    check_cache,
    check_bytes,
    check_bf16,
    check_resume,
    check_accelerate,
    check_trainer,
    check_refusals,
    check_exceptions,
)


def run(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29413", "DS_ACCELERATOR": "cpu"}
    os.chdir(folder)
    warnings.simplefilter("ignore", FutureWarning)  # torch's names of collectives
    with process_group(rank, "store"):
        for check in CHECKS:
            if os.environ.get("ONLY", check.__name__) == check.__name__:
                check(rank)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks(tmp_path):
    pytest.importorskip("deepspeed")
    expected = {}
    for kind, accumulate in (("plain", 1), ("accumulated", 2)):
        model = tiny_model("bert-sequence")
        trainer_of(
            str(tmp_path),
            model,
            ProgtuningCallback(ProgressiveSchedule(3)),
            rows=ROWS // accumulate,
            gradient_accumulation_steps=accumulate,
        ).train()
        expected[kind] = model.state_dict()
    torch.save(expected, tmp_path / "expected.pt")
    run_ranks(run, str(tmp_path), count=WORLD)
