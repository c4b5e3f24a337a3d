"""Captured training forwards train as eager ones do, bit for bit, whatever comes in between."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from graph_recorder import RecorderPool
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from progtuning_kernels import (
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    patch_model,
    plan_training,
)
from progtuning_kernels.graphs import StageGraphs, captured_module
from progtuning_kernels.graphs.captured_module import CapturedModule
from progtuning_kernels.graphs.legality import Legality, NotCapturable

STEPS, STAGES = 15, 3
REPLAYS = STEPS - STAGES  # the first forward of a stage is eager


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return model


class Run(NamedTuple):
    losses: list[float]
    weights: dict[str, torch.Tensor]
    handle: Any


def _patched(model: nn.Module, graph: str, **options: Any) -> Any:
    schedule = options.pop("schedule", None) or ProgressiveSchedule(STAGES, STEPS)
    options = {"kernels": "off", "packing": "off", **options}
    return patch_model(model, schedule, graph=graph, **options)


def _optimizer(handle: Any, masked: bool = True, **options: Any) -> torch.optim.Optimizer:
    groups = handle.param_groups(lr=1e-3)
    if masked:
        return MaskedAdamW(groups, **{"max_grad_norm": 1.0, **options})
    return torch.optim.AdamW([p for group in groups for p in group["params"]], lr=1e-3)


def _trained(
    name: str, graph: str, *, dropout: bool = True, masked: bool = True, **options: Any
) -> Run:
    torch.manual_seed(0)
    model = tiny_model(name).train()
    model = model if dropout else _without_dropout(model)
    handle = _patched(model, graph, **options)
    optimizer = _optimizer(handle, masked)
    torch.manual_seed(1)
    losses = []
    for step in range(STEPS):
        loss = model(**tiny_inputs(name, seed=step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        losses.append(loss.item())
    return Run(losses, {n: p.detach().clone() for n, p in model.named_parameters()}, handle)


def _assert_same(run: Run, eager: Run) -> None:
    assert run.losses == eager.losses
    assert all(torch.equal(run.weights[name], eager.weights[name]) for name in eager.weights)


class Case(NamedTuple):
    model: str
    dropout: bool
    masked: bool  # the optimizer
    packed: bool
    cached: bool


# every two values of two fields come together in one of these
CASES = [
    Case("bert-sequence", False, True, True, False),
    Case("bert-sequence", True, False, False, True),
    Case("bert-sequence", True, True, True, True),
    Case("gpt2-causal-lm", False, False, True, True),
    Case("gpt2-causal-lm", True, True, False, False),
    Case("llama-causal-lm", False, True, False, True),
    Case("llama-causal-lm", True, False, True, False),
    Case("llama-causal-lm", False, True, True, True),
    Case("vit-image", False, True, False, True),
    Case("vit-image", True, False, False, False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_captured_forwards_train_as_eager_ones_do(case, pools, monkeypatch):
    def trained(graph):
        cache = PrefixCache(max_bytes=1 << 22) if case.cached else None
        packing = "on" if case.packed else "off"
        options = dict(dropout=case.dropout, masked=case.masked, packing=packing, cache=cache)
        return _trained(case.model, graph, **options)

    run = trained("on")
    # the same tokens: a packed forward computes some padding for the sake of graphs
    monkeypatch.setattr(StageGraphs, "captures", property(lambda self: case.packed))
    _assert_same(run, trained("off"))
    report = run.handle.graph_report()
    cached = 2 * case.cached  # the first forward that is served, in the later stages
    looks = 2 * case.packed  # of the first three in the run, for what reads padding
    assert report.replays == REPLAYS - cached - looks
    assert sum(report.eager.values()) == STEPS - report.replays
    if case.packed:
        assert run.handle.packing_report().batches == STEPS
    if case.cached:
        assert run.handle.cache_report().served_steps


def test_every_stage_has_a_pool_of_its_own_and_leaves_nothing(pools):
    refs = []
    model = tiny_model("bert-sequence").train()
    handle = _patched(model, "on")
    optimizer = _optimizer(handle)
    for step in range(STEPS):
        model(**tiny_inputs("bert-sequence", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = handle.graph_report()
        handle.advance()
        if handle.stage > len(refs):
            assert report.captured == 1 and report.nbytes > pools[-1].nbytes > 0
            refs.append(weakref.ref(pools.pop()))
            gc.collect()
            assert refs[-1]() is None
    assert len(refs) == STAGES - 1
    handle.unpatch()
    refs.append(weakref.ref(pools.pop()))
    gc.collect()
    assert refs[-1]() is None and type(model) is type(tiny_model("bert-sequence"))
    assert "forward" not in model.__dict__ and "_progtuning_graphs" not in model.__dict__


class Pair:
    """A captured and an eager model, which are trained alike."""

    def __init__(self, name: str = "bert-sequence", model: nn.Module | None = None, **options: Any):
        self.name = name
        model = tiny_model(name) if model is None else model
        self.models = [model.train(), copy.deepcopy(model).train()]
        optimizer = options.pop("optimizer", {})
        options = {"schedule": ProgressiveSchedule(1, 1000), **options}
        self.handles = [
            _patched(m, graph, **options)
            for m, graph in zip(self.models, ("on", "off"), strict=True)
        ]
        self.optimizers = [_optimizer(handle, **optimizer) for handle in self.handles]
        self.states = [torch.get_rng_state()] * 2

    def both(self, do: Any) -> list[Any]:
        """What `do(model, optimizer, handle)` gives, under one random state for each."""
        found = []
        for i, parts in enumerate(zip(self.models, self.optimizers, self.handles, strict=True)):
            torch.set_rng_state(self.states[i])
            found.append(do(*parts))
            self.states[i] = torch.get_rng_state()
        return found

    def step(self, seed: int = 0, rows: int = 3) -> None:
        batch = {k: v[:rows] for k, v in tiny_inputs(self.name, seed=seed).items()}

        def do(model, optimizer, handle):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
            return loss.item()

        first, second = self.both(do)
        assert first == second

    def steps(self, count: int = 3) -> None:
        for seed in range(count):
            self.step(seed)

    @property
    def report(self) -> Any:
        return self.handles[0].graph_report()

    def check(self) -> None:
        own, other = (dict(m.named_parameters()) for m in self.models)
        assert all(torch.equal(own[name], other[name]) for name in other)
        own, other = (dict(m.named_buffers()) for m in self.models)
        assert all(torch.equal(own[name], other[name]) for name in other)
        assert torch.equal(*self.states)


@pytest.fixture
def pair(pools):
    return Pair()


def _batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    return {k: v[:rows] for k, v in tiny_inputs("bert-sequence", seed=seed).items()}


@settings(max_examples=8)
@given(
    st.lists(
        st.sampled_from(
            "step small accumulate evaluate twice lost keep zeros autocast frozen".split()
        ),
        min_size=4,
        max_size=12,
    )
)
def test_whatever_a_loop_does_the_bits_are_those_of_eager(events):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured_module, "pool_on", RecorderPool)
        pair, kept = Pair(optimizer={"max_grad_norm": None}), ([], [])
        pair.steps(2)
        for i, event in enumerate(events):
            batch = _batch(2 if event == "small" else 3, i)
            pair.both(lambda m, o, h, event=event, batch=batch: _do(event, m, o, h, batch, kept))
            pair.check()
        for own, other in zip(*kept, strict=True):
            assert torch.equal(own, other)


def _do(event, model, optimizer, handle, batch, kept) -> None:
    captured = handle.graph_report().state == "on"
    keep = kept[0 if captured else 1]
    if event == "evaluate":
        model.eval()
        with torch.no_grad():
            keep.append(model(**batch).logits)
        model.train()
        return
    if event == "frozen":
        weight = model.get_parameter("classifier.weight")
        weight.requires_grad_(not weight.requires_grad)
        return
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=event == "autocast")
    with autocast:
        output = model(**batch)
        if event == "twice":
            (output.loss + model(**batch).loss).backward()
        elif event != "lost":
            output.loss.backward()
    if event == "keep":
        keep += [p.grad for p in model.parameters() if p.grad is not None]
    if event not in ("accumulate", "lost"):
        optimizer.step()
        optimizer.zero_grad(set_to_none=event != "zeros")
        handle.advance()
    keep.append(output.loss.detach())


def test_gradients_add_up_over_batches(pair):
    pair.steps()
    for i in range(3):
        pair.both(lambda m, o, h, i=i: m(**_batch(seed=i)).loss.backward())
    grads = pair.both(
        lambda m, o, h: [p.grad.clone() for p in m.parameters() if p.grad is not None]
    )
    assert all(map(torch.equal, *grads))
    assert pair.report.replays == 5
    pair.step()
    pair.check()


def test_the_last_batch_is_another_kind(pair):
    for seed in range(4):
        pair.step(seed)
        pair.step(seed, rows=2)
    pair.check()
    assert (pair.report.captured, pair.report.replays) == (2, 6)


def test_evaluation_in_between_is_eager(pair):
    def evaluate(model, optimizer, handle):
        model.eval()
        with torch.no_grad():
            logits = model(**_batch()).logits
        model.train()
        return logits

    pair.steps()
    assert torch.equal(*pair.both(evaluate))
    with torch.no_grad():  # in training mode, as some loops do
        assert torch.equal(*pair.both(lambda m, o, h: m(**_batch()).loss))
    pair.steps()
    pair.check()
    assert pair.report.replays == 5


@pytest.mark.parametrize("cache_enabled", [True, False])
def test_autocast_is_part_of_the_kind(cache_enabled, pools):
    pair = Pair(model=tiny_model("bert-sequence", dropout=True))

    def do(model, optimizer, handle):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache_enabled):
            loss = model(**_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    pair.steps()
    losses = [pair.both(do) for _ in range(4)]
    assert all(own == other for own, other in losses)
    pair.steps()
    pair.check()
    assert (pair.report.captured, pair.report.replays) == (2, 2 + 3 + 3)


def test_a_loss_scale(pair):
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]

    def do(model, optimizer, handle, scaler):
        loss = model(**_batch()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    scalers = iter(scalers * 4)
    for _ in range(4):
        pair.both(lambda m, o, h: do(m, o, h, next(scalers)))
    pair.check()
    assert pair.report.replays == 3


def test_updates_inside_backward(pools):
    pair = Pair(optimizer={"in_backward": True, "max_grad_norm": None})
    pair.steps(5)
    pair.check()
    assert pair.report.replays == 4


def test_a_checkpoint_goes_on_to_the_bit(pair):
    pair.steps(4)
    saved = [
        copy.deepcopy((m.state_dict(), o.state_dict(), h.state_dict()))
        for m, o, h in zip(pair.models, pair.optimizers, pair.handles, strict=True)
    ]
    pair.steps(2)

    def load(parts):
        def do(model, optimizer, handle):
            weights, state, place = next(parts)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            handle.load_state_dict(place)

        return do

    replays = pair.report.replays
    pair.both(load(iter(saved)))
    pair.steps(3)
    pair.check()
    assert pair.report.replays == replays + 3  # weights are read where they lie


def test_unpatching_and_patching_again(pair):
    pair.steps()
    pair.both(lambda m, o, h: h.unpatch())
    assert pair.models[0].__class__.__mro__ == pair.models[1].__class__.__mro__
    pair.handles = [
        _patched(m, graph, schedule=ProgressiveSchedule(1, 1000))
        for m, graph in zip(pair.models, ("on", "off"), strict=True)
    ]
    pair.steps()
    pair.check()
    assert pair.report.replays == 2


def _moved_weights(model, optimizer, handle):
    for p in model.parameters():
        p.data = p.data.clone()


def _another_head(model, optimizer, handle):
    weight = model.classifier.weight.detach() * 2
    model.classifier.weight.data = weight


def _double_and_back(model, optimizer, handle):
    model.double().float()


def _switched(model, optimizer, handle):
    model.classifier.weight.requires_grad_(False)


def _buffer(model, optimizer, handle):
    model.bert.embeddings.position_ids = model.bert.embeddings.position_ids.clone()


@pytest.mark.parametrize(
    "change", [_moved_weights, _another_head, _double_and_back, _switched, _buffer]
)
def test_what_was_moved_replaced_or_switched_is_captured_anew(change, pair, pools):
    pair.steps()
    before = len(pools)
    pair.both(change)
    pair.steps()
    pair.check()
    assert len(pools) == before + 1
    reason = "a parameter, buffer, module, attribute or hook was added, replaced, moved or switched"
    assert pair.report.eager.get(reason, 0) <= 1


def test_a_stale_address_would_show(pair, monkeypatch):
    pair.steps()
    monkeypatch.setattr(CapturedModule, "changed", False)
    pair.optimizers.clear()  # which keep the old memory alive
    pair.models[0].classifier.weight.data = pair.models[0].classifier.weight.detach().clone()
    assert pair.models[0](**_batch()).loss.isnan()


def test_modes_of_modules_are_part_of_the_kind(pair):
    pair.steps()
    for mode in (False, True, False):
        pair.both(lambda m, o, h, mode=mode: m.bert.encoder.layer[3].train(mode))
        pair.steps()
    pair.check()
    assert pair.report.captured == 2


def test_a_forward_whose_backward_may_still_come_is_not_overwritten(pair):
    def two_at_once(model, optimizer, handle):
        losses = [model(**_batch(seed=seed)).loss for seed in range(2)]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()

    pair.steps()
    for _ in range(2):
        pair.both(two_at_once)
    pair.check()
    assert pair.report.eager["the backward of a forward before it may still come"] == 2


def test_a_loop_that_goes_back_twice_is_eager(pair):
    def do(model, optimizer, handle):
        loss = model(**_batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        pair.both(do)
    pair.check()
    assert pair.report.eager["a forward has two backwards (retain_graph=True)"] == 2


def test_a_second_backward_of_a_replay_refuses(pair):
    pair.steps()
    model = pair.models[0]
    first = model(**_batch()).loss
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward has run since"):
        first.backward()


def test_a_backward_after_another_forward_refuses(pair):
    pair.steps()
    model = pair.models[0]
    first = model(**_batch()).loss
    pair.handles[0].freezer.graphs._whole._turns.begin()  # what would replay in between
    with pytest.raises(RuntimeError, match="another captured forward has run since"):
        first.backward()


def test_a_backward_from_another_output_refuses(pair):
    pair.steps()
    with pytest.raises(RuntimeError, match="backward starts from other outputs"):
        pair.models[0](**_batch()).logits.sum().backward()


def test_a_loop_with_a_loss_of_its_own_starts_from_logits(pools):
    pair = Pair()

    def do(model, optimizer, handle):
        batch = _batch()
        labels = batch.pop("labels")
        loss = nn.functional.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        pair.both(do)
    pair.check()
    assert pair.report.replays == 3


def test_a_weight_written_before_its_backward_raises_as_it_does_in_eager(pair):
    pair.steps()
    for model in pair.models:
        loss = model(**_batch()).loss
        with torch.no_grad():
            model.classifier.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_outputs_and_gradients_that_are_kept_stay_as_they_are(pair):
    pair.steps()

    def do(model, optimizer, handle):
        output = model(**_batch())
        output.loss.backward()
        kept = [output.loss.detach(), output.logits.detach()]
        kept += [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        return kept

    kept = pair.both(do)
    pair.steps()
    assert all(map(torch.equal, *kept))
    pair.check()
    assert pair.report.replays == 6


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.to("meta"),
        lambda x: x.sum().to("meta"),
        lambda x: x.copy_(torch.empty(3, device="meta")),
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
    ],
)
def test_what_a_capture_cannot_record_is_not_tried(run):
    with Legality([x := torch.zeros(3)]), pytest.raises(NotCapturable):
        run(x)


class Normed(nn.Module):
    """A model of blocks with batch norm, whose forward writes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def test_buffers_that_a_forward_writes_get_new_versions(pools):
    pair = Pair(model=Normed())

    def do(model, optimizer, handle):
        model(torch.randn(5, 6)).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        before = [m.blocks[2][1].num_batches_tracked._version for m in pair.models]
        pair.both(do)
        after = [m.blocks[2][1].num_batches_tracked._version for m in pair.models]
        assert all(map(int.__gt__, after, before))
        pair.check()
    assert pair.report.replays == 3


class Reads(nn.Module):
    """A head with a line that a capture refuses."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * (1 if x.sum().item() < 1e9 else 0)


@pytest.mark.parametrize("name", ["bert-sequence", "llama-sequence", "gpt2-sequence"])
def test_blocks_are_captured_where_a_forward_cannot_be(name, pools):
    model = tiny_model(name)
    head = "classifier" if name.startswith("bert") else "score"
    setattr(model, head, Reads(getattr(model, head)))
    pair = Pair(name, model, schedule=ProgressiveSchedule(2, 12))
    with pytest.warns(UserWarning, match="runs eagerly: it cannot be captured") as warned:
        for seed in range(12):
            pair.step(seed % 3)
    pair.check()
    report = pair.report
    assert report.replays == 0
    # of six steps of a stage, one proves, one tries the whole, and one begins its blocks' kinds
    assert report.block_replays == 2 * 4 * 4
    assert report.captured == 4
    assert "by blocks" in str(report) and f"in {head}, {__file__}:" in str(report)
    assert len(warned) == 2
    pair.handles[0].unpatch()
    assert all("_progtuning_graphs" not in m.__dict__ for m in model.modules())


def test_blocks_are_captured_above_cached_rows(pools):
    model = tiny_model("bert-sequence")
    model.classifier = Reads(model.classifier)
    cache = PrefixCache(max_bytes=1 << 22)
    pair = Pair(model=model, schedule=MilestoneSchedule({0: 2}))
    pair.both(lambda m, o, h: h.unpatch())
    pair.handles = [
        _patched(m, graph, schedule=MilestoneSchedule({0: 2}), cache=c)
        for m, graph, c in zip(
            pair.models, ("on", "off"), (cache, PrefixCache(max_bytes=1 << 22)), strict=True
        )
    ]
    with pytest.warns(UserWarning, match="a BertForSequenceClassification runs eagerly") as warned:
        for _ in range(6):
            pair.step()
    pair.check()
    assert len(warned) == 1 and pair.handles[0].cache_report().served_steps
    assert pair.report.block_replays and pair.report.captured == 2


def test_a_block_that_cannot_be_captured_runs_as_it_is(pools):
    model = tiny_model("bert-sequence")
    block = model.bert.encoder.layer[3]
    block.output.dense = Reads(block.output.dense)
    pair = Pair(model=model)
    with pytest.warns(UserWarning, match="runs eagerly"):
        pair.steps(6)
    pair.check()
    assert pair.report.block_replays == 4 * 3
    assert any("in output.dense" in reason for reason in pair.report.eager)


def test_an_exception_in_the_middle_of_a_capture_is_eager_from_there_on(pair):
    pair.step()
    dense = pair.models[0].bert.pooler.dense
    run, calls = dense.forward, []

    def breaks(x):
        calls.append(x)
        if len(calls) == 1:  # the first call from here on captures
            raise MemoryError("no room")
        return run(x)

    dense.forward = breaks
    with pytest.warns(UserWarning, match="it cannot be captured: no room in bert.pooler"):
        pair.steps()
    pair.check()


def test_hooks_and_checkpointing_are_not_captured(pools):
    pair = Pair()
    seen = []
    pair.models[0].bert.pooler.register_forward_hook(lambda *_: seen.append(1))
    pair.steps()
    pair.check()
    assert len(seen) == 3 and pair.report.replays == 0
    assert any(r.startswith("a hook of test_stage_graphs") for r in pair.report.eager)
    pair = Pair("llama-causal-lm")
    pair.both(lambda m, o, h: m.gradient_checkpointing_enable())
    pair.steps()
    pair.check()
    assert "gradient checkpointing is on" in pair.report.eager


def test_the_arguments_of_a_call_stay_as_they_are(pools):
    class Writes(Normed):
        def forward(self, x):
            return super().forward(x.clone()) + x.add_(1).sum() * 0

    pair = Pair(model=Writes())
    given = torch.zeros(5, 6)

    def do(model, optimizer, handle):
        x = given + torch.randn(5, 6)
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        return x

    with pytest.warns(UserWarning, match="it writes into an argument|writes into an argument"):
        for _ in range(4):
            assert torch.equal(*pair.both(do))
    pair.check()


def _hooked(model):
    model.bert.pooler.register_forward_hook(lambda module, args, output: output * 1.5)


def _hooked_backward(model):
    model.bert.pooler.register_full_backward_hook(lambda module, found, given: (found[0] * 2,))


def _other_dropout(model):
    model.bert.encoder.layer[3].output.dropout.p = 0.5


def _other_head(model):
    torch.manual_seed(3)
    model.classifier = nn.Linear(32, 3)


def _longer_output(model):
    dense = model.bert.encoder.layer[3].output.dense
    model.bert.encoder.layer[3].output.dense = nn.Sequential(dense, nn.Tanh())


def _other_forward(model):
    dense = model.bert.pooler.dense
    dense.forward = lambda x: nn.Linear.forward(dense, x) * 2


@pytest.mark.parametrize(
    "change",
    [_hooked, _hooked_backward, _other_dropout, _other_head, _longer_output, _other_forward],
)
def test_what_a_module_is_by_now_is_what_runs(change, pair):
    pair.steps()
    pair.both(lambda model, optimizer, handle: change(model))
    pair.steps(4)
    pair.check()
    assert sum(pair.report.eager.values()) > 2


def test_a_hook_that_was_removed_is_in_the_way_no_more(pair):
    hooks = [m.bert.pooler.register_forward_hook(lambda m, a, out: out * 1.5) for m in pair.models]
    pair.steps()
    for hook in hooks:
        hook.remove()
    pair.steps(4)
    pair.check()
    assert pair.report.replays >= 3


class Counts(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Averages(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean * 0.9 + x.detach().mean(0)
        return super().forward(x - self.mean)


class Remembers(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.seen = [torch.zeros(6)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.seen[-1] * 0.9 + x.detach().mean(0))
        return super().forward(x - self.seen[-1])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Counts, "its forward sets Counts.calls"),
        (Averages, "its forward sets Averages.mean"),
        (Remembers, "takes a tensor that is no argument"),
    ],
)
def test_a_forward_with_a_memory_runs_eagerly(model, reason, pools):
    pair = Pair(model=model())

    def do(model, optimizer, handle):
        loss = model(torch.randn(5, 6))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    with pytest.warns(UserWarning, match=reason):
        for _ in range(5):
            own, other = pair.both(do)
            assert own == other
    pair.check()
    assert not pair.report.replays and pair.report.block_replays


class Watches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_what_watches_a_forward_sees_all_of_it(pair):
    pair.steps()

    def checkpointed(model, optimizer, handle):
        run = lambda: model(**_batch()).loss  # noqa: E731
        torch.utils.checkpoint.checkpoint(run, use_reentrant=False).backward()
        optimizer.step()
        optimizer.zero_grad()

    def counted(model, optimizer, handle):
        with FlopCounterMode(display=False) as flops:
            model(**_batch()).loss.backward()
        optimizer.zero_grad()
        return flops.get_total_flops()

    def differentiated(model, optimizer, handle):
        values = {name: p.detach() for name, p in model.named_parameters()}
        call = torch.func.functional_call
        return torch.func.grad(lambda v: call(model, v, (), _batch()).loss)(values)

    pair.both(checkpointed)
    own, other = pair.both(counted)
    assert own == other > 0
    with Watches():
        pair.models[0](**_batch())
    assert pair.report.eager["a TorchDispatchMode would miss what is replayed"]
    own, other = pair.both(differentiated)
    assert all(torch.equal(own[name], other[name]) for name in own)
    pair.steps()
    pair.check()


def test_a_gradient_that_is_differentiated_is_eager(pools):
    pair = Pair(model=Normed())

    def do(model, optimizer, handle):
        x = torch.randn(5, 6, requires_grad=True)
        loss = model(x)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        pair.both(do)
    pair.check()
    assert not pair.report.replays


def test_numbers_that_never_come_again_leave_room_for_kinds(pools, monkeypatch):
    monkeypatch.setattr(captured_module, "MOST_KINDS", 1)
    pair = Pair()
    for i in range(6):
        pair.both(lambda m, o, h, i=i: m(**_batch(), step=i))
    pair.steps()
    pair.check()
    assert pair.report.replays == 2


def test_more_kinds_than_are_kept_run_eagerly(pair, monkeypatch):
    monkeypatch.setattr(captured_module, "MOST_KINDS", 2)
    for rows in (1, 2, 3) * 3:
        pair.step(rows=rows)
    pair.check()
    assert pair.report.captured == 2
    assert sum("pad_to_multiple_of" in r for r in pair.report.eager) == 1


def test_the_report_on_truncation_counts_an_eager_forward(pair):
    pair.steps()
    reports = pair.both(lambda m, o, h: h.truncation_report())
    assert reports[0].nodes == reports[1].nodes > 10
    pair.steps()
    pair.check()


@pytest.mark.parametrize(
    ("graph", "state"),
    [
        ("off", 'graphs: off: graph="off"'),
        ("auto", 'graphs: off: graph="auto" captures where a stored result'),
        ("on", "graphs: on"),
    ],
)
def test_the_report_without_a_gpu(graph, state):
    model = tiny_model("bert-sequence").train()
    own = type(model)
    handle = _patched(model, graph)
    for _ in range(2):
        model(**_batch()).loss.backward()
    report = handle.graph_report()
    assert str(report).startswith(state) and not report.replays and not report.nbytes
    assert (type(model) is own) == (graph != "on")
    if graph == "on":
        assert report.eager == {"graphs are captured on a GPU of NVIDIA, not on cpu": 2}
    assert "graphs" in report._repr_html_()


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="graph must be one of"):
        _patched(tiny_model("bert-sequence"), "always")


def test_a_copy_of_the_model_is_an_ordinary_model(pair):
    pair.steps()
    twin = copy.deepcopy(pair.models[0])
    with contextlib.suppress(AttributeError):
        assert twin.__dict__["_progtuning_graphs"] is None
    assert torch.equal(twin.eval()(**_batch()).logits, pair.models[1].eval()(**_batch()).logits)


def test_what_a_stage_keeps_is_what_was_planned(pools):
    model = tiny_model("bert-sequence").train()
    schedule = ProgressiveSchedule(STAGES, STEPS)
    batch = _batch()
    plan = plan_training(model, schedule, batch_size=3, seq_len=11)
    handle = _patched(model, "on", schedule=schedule)
    compared = set()
    for _ in range(STEPS):
        model(**batch).loss.backward()
        model.zero_grad()
        stage, whole = plan.stages[handle.stage], handle.freezer.graphs._whole
        if whole.captured:
            assert whole._gradients.nbytes == stage.gradient_bytes
            # the recorder gives no memory back within a recording: temporaries count, too
            assert handle.graph_report().nbytes > stage.graph_bytes
            compared.add(handle.stage)
        handle.advance()
    assert len(compared) == STAGES
