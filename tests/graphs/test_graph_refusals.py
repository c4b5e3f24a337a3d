"""What cannot be captured or replayed runs eagerly, and the report says why."""

from __future__ import annotations

import pytest
import torch
from graph_pairs import Normed, Pair, bert_batch, patched
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from progtuning_kernels.graphs import captured_module
from progtuning_kernels.graphs.legality import Legality, NotCapturable


def test_a_forward_whose_backward_may_still_come_is_not_overwritten(pair):
    def two_at_once(model, optimizer, handle):
        losses = [model(**bert_batch(seed=seed)).loss for seed in range(2)]
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
        loss = model(**bert_batch()).loss
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
    first = model(**bert_batch()).loss
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward has run since"):
        first.backward()


def test_a_backward_after_another_forward_refuses(pair):
    pair.steps()
    model = pair.models[0]
    first = model(**bert_batch()).loss
    pair.handles[0].freezer.graphs._whole._turns.begin()  # what would replay in between
    with pytest.raises(RuntimeError, match="another captured forward has run since"):
        first.backward()


def test_a_backward_from_another_output_refuses(pair):
    pair.steps()
    with pytest.raises(RuntimeError, match="backward starts from other outputs"):
        pair.models[0](**bert_batch()).logits.sum().backward()


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
    assert any(r.startswith("a hook of test_graph_refusals") for r in pair.report.eager)
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
        def run():
            return model(**bert_batch()).loss

        torch.utils.checkpoint.checkpoint(run, use_reentrant=False).backward()
        optimizer.step()
        optimizer.zero_grad()

    def counted(model, optimizer, handle):
        with FlopCounterMode(display=False) as flops:
            model(**bert_batch()).loss.backward()
        optimizer.zero_grad()
        return flops.get_total_flops()

    def differentiated(model, optimizer, handle):
        values = {name: p.detach() for name, p in model.named_parameters()}
        call = torch.func.functional_call
        return torch.func.grad(lambda v: call(model, v, (), bert_batch()).loss)(values)

    pair.both(checkpointed)
    own, other = pair.both(counted)
    assert own == other > 0
    with Watches():
        pair.models[0](**bert_batch())
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
        pair.both(lambda m, o, h, i=i: m(**bert_batch(), step=i))
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
    handle = patched(model, graph)
    for _ in range(2):
        model(**bert_batch()).loss.backward()
    report = handle.graph_report()
    assert str(report).startswith(state) and not report.replays and not report.nbytes
    assert (type(model) is own) == (graph != "on")
    if graph == "on":
        assert report.eager == {"graphs are captured on a GPU of NVIDIA, not on cpu": 2}
    assert "graphs" in report._repr_html_()


def test_another_value_is_refused():
    with pytest.raises(ValueError, match="graph must be one of"):
        patched(tiny_model("bert-sequence"), "always")
