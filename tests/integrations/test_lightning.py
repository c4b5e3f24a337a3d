"""Lightning's Trainer with the callback ends with the weights of a plain loop."""

from __future__ import annotations

import pytest
import torch
from ranks import process_group, run_ranks
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    AdaptiveSchedule,
    MaskedAdamW,
    PlateauSchedule,
    PrefixCache,
    ProgressiveSchedule,
    patch_model,
)
from progtuning_kernels.optim import release_frozen_state
from progtuning_kernels.patch import handle_of

L = pytest.importorskip("lightning.pytorch")
lightning = pytest.importorskip("progtuning_kernels.integrations.lightning")

NAME, STEPS = "bert-sequence", 8
QUIET = dict(
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    max_epochs=2,
)
CLOSE = dict(rtol=1e-4, atol=1e-5)


class Module(L.LightningModule):
    def __init__(self, masked: dict | None = None, clips: bool = False) -> None:
        super().__init__()
        self.model = tiny_model(NAME)
        self.masked, self.seen, self.gradients = masked, [], []
        self.trained = []

    def training_step(self, batch, number):
        handle = handle_of(self.model)
        self.seen.append((self.trainer.global_step, handle.boundary))
        return self.model(**batch).loss

    def on_before_optimizer_step(self, optimizer):
        named = self.model.named_parameters()
        self.gradients.append({n for n, p in named if p.grad is not None})

    def validation_step(self, batch, number):
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return optimizer_of(self.model, self.masked)


def optimizer_of(model: nn.Module, masked: dict | None) -> torch.optim.Optimizer:
    kind, options = (torch.optim.AdamW, {}) if masked is None else (MaskedAdamW, masked)
    return kind(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.1, **options)


class Batches:
    """Four batches; it can be resumed in the middle, as a torchdata loader can."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        self.at %= len(self)
        while self.at < len(self):
            self.at += 1
            yield tiny_inputs(NAME, seed=self.at)

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.model.named_parameters()}


def plain_loop(
    *, masked=None, clip=None, accumulate=1, bf16=False, schedule=None, **options
) -> dict[str, torch.Tensor]:
    model = tiny_model(NAME)
    schedule = schedule or ProgressiveSchedule(4)
    if schedule.total_steps is None:
        schedule.bind(STEPS // accumulate)
    handle = patch_model(model, schedule, **options)
    optimizer = optimizer_of(model, masked)
    for number, batch in enumerate([*Batches(), *Batches()]):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if handle.advance() and masked is None:
                release_frozen_state(optimizer)
    handle.unpatch()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def fit(folder, module=None, *, schedule=None, ckpt_path=None, options=None, **arguments):
    callback = lightning.ProgtuningCallback(schedule or ProgressiveSchedule(4), **(options or {}))
    callbacks = [callback, *arguments.pop("callbacks", ())]
    trainer = L.Trainer(
        **{**QUIET, "default_root_dir": folder, "enable_checkpointing": False, **arguments},
        callbacks=callbacks,
    )
    module = module or Module()
    trainer.fit(module, Batches(), ckpt_path=ckpt_path, weights_only=False)
    assert handle_of(module.model) is None
    return module, trainer, callback


def same(found: dict, expected: dict, **close: float) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **close)


class Scored(Module):
    """Whose validations have the scores that a test wants."""

    def validation_step(self, batch, number):
        self.log("score", {4: 0.5, 8: 0.4, 12: 0.6, 16: 0.45}.get(self.trainer.global_step, 9.0))


def scored(folder, schedule, *, ckpt_path=None, **options):
    callback = lightning.ProgtuningCallback(schedule, only="layer|classifier", **options)
    saved = L.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    trainer = L.Trainer(**QUIET | {"max_epochs": 9}, callbacks=[callback, saved])
    module = Scored({})
    trainer.fit(module, Batches(), Batches(), ckpt_path=ckpt_path, weights_only=False)
    return module, trainer, callback


def test_a_stage_ends_by_the_score_that_is_logged(tmp_path):
    schedule = PlateauSchedule(["-1", "-2--1"], patience=1)
    module, trainer, callback = scored(tmp_path, schedule, monitor="score")
    assert trainer.global_step == 16 and callback.handle.finished
    assert [boundary for _, boundary in module.seen] == [3] * 12 + [2] * 4
    for step in (8, 12):
        path = str(tmp_path / f"step={step}.ckpt")
        again, _, later = scored(tmp_path, schedule, monitor="score", ckpt_path=path)
        assert later.schedule.state_dict() == callback.schedule.state_dict()
        same(weights_of(again), weights_of(module), rtol=0, atol=0)
    with pytest.raises(ValueError, match="monitor='f1' was not logged; there are .*score"):
        scored(tmp_path, schedule, monitor="f1")
    with pytest.raises(ValueError, match="goes on by a score: give monitor="):
        lightning.ProgtuningCallback(schedule)
    other = lightning.ProgtuningCallback(schedule, monitor="score")
    trainer = L.Trainer(**QUIET | {"max_epochs": 9}, callbacks=[other])
    with pytest.raises(ValueError, match="saved with only='layer|classifier', this run has only="):
        trainer.fit(Scored({}), Batches(), Batches(), ckpt_path=path, weights_only=False)


@pytest.mark.parametrize("masked", [None, {}])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_are_those_of_a_plain_loop(tmp_path, masked, accumulate):
    module, trainer, callback = fit(tmp_path, Module(masked), accumulate_grad_batches=accumulate)
    same(weights_of(module), plain_loop(masked=masked, accumulate=accumulate), rtol=0, atol=0)
    steps = STEPS // accumulate
    assert callback.schedule.total_steps == trainer.global_step == steps
    assert module.seen == [(i // accumulate, 4 * i // STEPS) for i in range(STEPS)]
    assert len(module.gradients[0]) > len(module.gradients[-1])
    shown = trainer.callback_metrics
    assert (shown["stage"], shown["boundary"]) == (4, 3)
    assert 0 < shown["active_share"] < 1 and shown["state_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({"precision": "bf16-mixed"}, {"bf16": True}),
        ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
        ({"options": {"cache": PrefixCache(max_bytes=1 << 26)}}, {}),
        ({"options": {"packing": "off"}}, {"packing": "off"}),
    ],
)
def test_options_of_the_trainer_and_of_the_patch(tmp_path, arguments, plain):
    module, _, _ = fit(tmp_path, **arguments)
    exact = {} if "cache" in arguments.get("options", {}) else {"rtol": 0, "atol": 0}
    same(weights_of(module), plain_loop(**plain), **(exact or CLOSE))


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_masked_optimizer_clips_once(tmp_path, monkeypatch, in_backward):
    passes = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a, **k: passes.append(a))
    masked = {"in_backward": in_backward}
    module, trainer, _ = fit(
        tmp_path, Module(masked), gradient_clip_val=0.05, accumulate_grad_batches=2
    )
    expected = plain_loop(masked={"max_grad_norm": 0.05}, accumulate=2)
    same(weights_of(module), expected, **CLOSE)
    assert not passes and trainer.gradient_clip_val == 0.05


class Clipping(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        if self.trainer.current_epoch:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


def test_a_module_that_clips_by_itself_does_so_with_a_masked_optimizer(tmp_path):
    plain, masked = (
        fit(tmp_path, Clipping(options), gradient_clip_val=0.05)[0] for options in (None, {})
    )
    same(weights_of(masked), weights_of(plain), **CLOSE)


class Stop(L.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/stopped.ckpt")
            raise KeyError("stop")


@pytest.mark.parametrize("masked", [None, {}])
@pytest.mark.parametrize("schedule", [ProgressiveSchedule(4), AdaptiveSchedule(1)])
def test_resumed_run_ends_with_the_same_bits(tmp_path, schedule, masked):
    straight, *_ = fit(tmp_path, Module(masked), schedule=schedule)
    for at in (2, 3, 5):
        with pytest.raises(KeyError):
            fit(tmp_path, Module(masked), schedule=schedule, callbacks=[Stop(at)])
        resumed = Module(masked)
        with torch.no_grad():
            for parameter in resumed.parameters():
                parameter.zero_()
        fit(tmp_path, resumed, schedule=schedule, ckpt_path=tmp_path / "stopped.ckpt")
        assert resumed.seen[0][0] == at
        same(weights_of(resumed), weights_of(straight), rtol=0, atol=0)


def test_rows_train_and_a_resumed_run_ends_with_the_same_bits(tmp_path):
    options = {"rows": {"word_embeddings": [7, 5]}}
    straight, *_ = fit(tmp_path, Module({}), options=options)
    with pytest.raises(KeyError):
        fit(tmp_path, Module({}), options=options, callbacks=[Stop(1)])
    resumed, *_ = fit(tmp_path, Module({}), options=options, ckpt_path=tmp_path / "stopped.ckpt")
    same(weights_of(resumed), weights_of(straight), rtol=0, atol=0)
    found, start = (
        m.bert.embeddings.word_embeddings.weight for m in (resumed.model, tiny_model(NAME))
    )
    moved = (found != start).any(1).nonzero().flatten().tolist()
    assert moved == [5, 7]


class Manual(Module):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch, number):
        loss = super().training_step(batch, number)
        optimizer = self.optimizers()
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def test_manual_optimization(tmp_path):
    module, *_ = fit(tmp_path, Manual())
    same(weights_of(module), plain_loop(), rtol=0, atol=0)
    assert [boundary for _, boundary in module.seen] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_optimizer_whose_steps_lightning_does_not_count_is_told(tmp_path):
    class Uncounted(Manual):
        def optimizers(self):
            return super().optimizers(use_pl_optimizer=False)

    with pytest.warns(UserWarning, match="still at step 0"):
        fit(tmp_path, Uncounted())


def test_what_is_refused(tmp_path):
    class Two(Manual):
        def configure_optimizers(self):
            return [optimizer_of(self.model.bert, None), optimizer_of(self.model.classifier, None)]

    class Heads(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 2)

    with pytest.raises(RuntimeError, match="2 optimizers"):
        fit(tmp_path, Two())
    with pytest.raises(ValueError, match="model, other.*module='model'"):
        fit(tmp_path, Heads())
    fit(tmp_path, Heads(), options={"module": "model"}, max_epochs=1)
    with pytest.raises(RuntimeError, match="in_backward"):
        fit(tmp_path, Manual({"in_backward": True}))
    for module, by_value in ((Clipping, {}), (Module, {"gradient_clip_algorithm": "value"})):
        with pytest.raises(RuntimeError, match="come after backward, and find no gradients"):
            fit(tmp_path, module({"in_backward": True}), gradient_clip_val=0.05, **by_value)
    with pytest.raises(ValueError, match="number of steps is not known"):
        fit(tmp_path, max_epochs=-1)


class Half(Batches):
    """The rows of one rank of two."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def __iter__(self):
        for batch in Batches():
            yield {name: rows[self.rank : self.rank + 1] for name, rows in batch.items()}


def _rank(rank: int, store: str, folder: str) -> None:
    with process_group(rank, store):
        module = Module()
        callback = lightning.ProgtuningCallback(ProgressiveSchedule(4))
        trainer = L.Trainer(
            **{**QUIET, "devices": 2, "strategy": "ddp", "default_root_dir": folder},
            enable_checkpointing=False,
            use_distributed_sampler=False,
            callbacks=[callback],
        )
        trainer.fit(module, Half(rank))
        assert [boundary for _, boundary in module.seen] == [0, 0, 1, 1, 2, 2, 3, 3]
        if rank == 0:
            torch.save(weights_of(module), f"{folder}/weights.pt")


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    run_ranks(_rank, str(tmp_path / "store"), str(tmp_path))
    model = tiny_model(NAME)
    handle = patch_model(model, ProgressiveSchedule(4, STEPS))
    optimizer = optimizer_of(model, None)
    for batch in [*Batches(), *Batches()]:
        model(**{name: rows[:2] for name, rows in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        release_frozen_state(optimizer)
    same(torch.load(tmp_path / "weights.pt"), dict(handle.model.named_parameters()), **CLOSE)
