"""State on the host: the same bits as on the device, by copies that are late, and counted."""

from __future__ import annotations

import copy
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pretend_cuda import CPU, PretendCuda
from tiny_models import tiny_inputs, tiny_model
from torch import Tensor, nn

from progtuning_kernels import CyclicBlockSchedule, MaskedAdamW, patch_model
from progtuning_kernels.ops.masked_update.bucket import Bucket
from progtuning_kernels.optim import state_bytes

OPTIONS = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


class LateCopies:
    """Copies between a "device" and a "host" that are both this CPU: each runs late, in the order
    of its way, in a thread of that way, and its bytes are counted. Who waits is late, too.
    """

    def __init__(self, on_host: tuple[Tensor, ...] = ()) -> None:
        self.bytes: Counter[str] = Counter()
        self.under_way, self.most_under_way = 0, 0  # copies to the host that nobody waited for
        self._on_host = set(map(id, on_host))
        self._random = random.Random(1)
        self._ways = {way: ThreadPoolExecutor(1) for way in ("to_host", "to_device")}
        self._returning: list[Future] = []

    def is_away(self, t: Tensor) -> bool:
        return isinstance(t, nn.Parameter) and id(t) not in self._on_host

    def memory_like(self, t: Tensor) -> Tensor:
        return torch.full_like(t, float("nan") if t.is_floating_point() else 255, device="cpu")

    def _later(self, way: str, pairs: list[tuple[Tensor, Tensor]]) -> Future:
        delay_s = self._random.random() * 1e-3

        @torch.no_grad()
        def run() -> None:
            time.sleep(delay_s)
            for target, source in pairs:
                target.copy_(source)
                self.bytes[way] += source.nbytes

        return self._ways[way].submit(run)

    def to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], Any]:
        if not pairs:
            return lambda: None
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        copied, delays_s = self._later("to_host", pairs), [self._random.random() * 1e-3]

        def arrived() -> None:
            copied.result()
            while delays_s:
                time.sleep(delays_s.pop())
                self.under_way -= 1

        return arrived

    def to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._returning.append(self._later("to_device", pairs))

    def follow_device(self) -> None:
        pass

    def join(self) -> None:
        while self._returning:
            self._returning.pop().result()


class Blocks(nn.Module):
    """Three blocks of 4,096 elements, which 8 bits are for, one tensor in another order of memory,
    an odd head, and a tensor without gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.layers[1].weight = nn.Parameter(self.layers[1].weight.detach().t().contiguous().t())
        self.head = nn.Linear(64, 3)
        self.unused = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    return model(x.to(dtype)).float().square().mean() * 3


def make(dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(1)
    return Blocks().to(dtype)


def on_host(model: nn.Module, parameters: Any = None, **options: Any) -> MaskedAdamW:
    parameters = model.named_parameters() if parameters is None else parameters
    optimizer = MaskedAdamW(parameters, **OPTIONS | options, state_device="cpu")
    optimizer._host.copies = LateCopies()
    return optimizer


def assert_same_state(a: MaskedAdamW, b: MaskedAdamW) -> None:
    saved, other = a.state_dict()["state"], b.state_dict()["state"]
    assert saved.keys() == other.keys()
    for i in saved:
        assert saved[i].keys() == other[i].keys()
        for key, value in saved[i].items():
            assert torch.equal(value, other[i][key]), (i, key)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


BFLOAT16 = torch.bfloat16
EXACT = {"max_grad_norm": 0.5}
PREVIOUS = {"max_grad_norm": 0.5, "clip_mode": "previous_norm", "in_backward": True}
RUNS = [
    (torch.float32, {}),
    (torch.float32, EXACT),
    (torch.float32, {"max_grad_norm": 1e6}),
    (torch.float32, {"nonfinite": "ignore", "zero_grads": True}),
    (torch.float32, {"in_backward": True}),
    (torch.float32, {"in_backward": True, "nonfinite": "ignore"}),
    (torch.float32, PREVIOUS),
    (torch.float32, PREVIOUS | {"clip_mode": "per_block"}),
    (torch.float32, EXACT | {"in_backward": True, "state_dtype": "8bit"}),
    (BFLOAT16, EXACT | {"master_weights": True}),
    (BFLOAT16, EXACT | {"in_backward": True, "state_dtype": "8bit", "stochastic_rounding": True}),
    (BFLOAT16, PREVIOUS | {"state_dtype": BFLOAT16, "stochastic_rounding": True}),
    (BFLOAT16, PREVIOUS | {"state_dtype": "8bit", "master_weights": True}),
    (BFLOAT16, {"in_backward": True, "state_dtype": "8bit", "master_weights": "8bit"}),
    (torch.float64, EXACT),
]


@pytest.mark.parametrize(("dtype", "options"), RUNS)
def test_has_the_bits_of_an_update_on_the_device(dtype, options):
    model, twin = make(dtype), make(dtype)
    moved = on_host(model, seed=3, **options)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS | options, seed=3)
    for step in range(5):
        for m, optimizer in ((model, moved), (twin, stays)):
            m.layers[0].requires_grad_(step not in (2, 3))
            if step == 4:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
            loss_of(m, step).backward()
            optimizer.step()
            if not options.get("zero_grads"):
                optimizer.zero_grad()
        assert_same(model, twin)
        assert_same_state(moved, stays)
        assert (moved.grad_norm is None) == (stays.grad_norm is None)
        assert moved.grad_norm is None or torch.equal(moved.grad_norm, stays.grad_norm)
    assert moved._host.copies.bytes["to_device"] > 0
    assert model.unused.weight not in moved.state


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("on_freeze", ["release", "keep", "offload"])
def test_bytes_fall_with_the_active_set(in_backward, on_freeze):
    model, twin = make(), make()
    options = dict(on_freeze=on_freeze, in_backward=in_backward)
    optimizer = on_host(model, **options)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, **options)
    copies, seen = optimizer._host.copies, []
    for step in range(6):
        for m in (model, twin):
            m.layers[:2].requires_grad_(step not in (2, 3))
        copies.bytes.clear()
        for m, o in ((model, optimizer), (twin, stays)):
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
        report = optimizer.host_report()
        assert report.state_bytes == state_bytes(stays)
        active = [p for n, p in model.named_parameters() if p.requires_grad and "unused" not in n]
        assert report.gradient_bytes_to_host == sum(p.nbytes for p in active)
        assert report.weight_bytes_to_device == copies.bytes["to_device"]
        assert report.weight_bytes_to_device == report.gradient_bytes_to_host
        assert report.weight_bytes == report.gradient_bytes_to_host
        # the first step of a tensor fetches its weight
        news = [sum(p.nbytes for p in active), 0, 0, 0, sum(p.nbytes for p in active[:4]), 0]
        assert report.weight_bytes_to_host == news[step]
        moved = report.gradient_bytes_to_host + report.weight_bytes_to_host
        assert copies.bytes["to_host"] == moved
        block, head = 4 * 64 * 65, 4 * 64 * 3 + 64  # its bias is padded
        assert report.staging_bytes == (block + head if step in (2, 3) else 2 * block)
        seen.append(report)
    assert_same(model, twin)
    assert seen[2].gradient_bytes_to_host < seen[1].gradient_bytes_to_host
    if on_freeze == "release":
        assert seen[2].state_bytes < seen[1].state_bytes


def test_exact_clipping_in_backward_keeps_the_gradients_on_the_host():
    model = make()
    optimizer = on_host(model, **EXACT, in_backward=True)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()
    assert optimizer.host_report().staging_bytes == 3 * 4 * 64 * 65 + 4 * 64 * 3 + 64
    assert not torch.equal(model.head.weight, before[-4])
    loss_of(model, 1).backward()
    optimizer.zero_grad()  # drops them, as gradients on the device
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_kept_gradients_are_added_to_and_dropped_as_those_of_the_device():
    model, twin = make(), make()
    moved = on_host(model, **EXACT, in_backward=True)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, **EXACT, in_backward=True)
    for m, optimizer in ((model, moved), (twin, stays)):
        for step in range(2):
            loss_of(m, 3).backward()
            optimizer.zero_grad()  # this step is left out
            loss_of(m, step).backward()
            m.layers[0].requires_grad_(step == 0)  # blocks take other buffers
            with optimizer.accumulate():  # after the kept one
                loss_of(m, step + 5).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, twin)
    assert_same_state(moved, stays)


def test_stages_of_a_patched_model():
    inputs, results = tiny_inputs("bert-sequence"), []
    for state_device in ("cpu", None):
        model = tiny_model("bert-sequence")
        handle = patch_model(model, CyclicBlockSchedule(1, 2))
        optimizer = MaskedAdamW(
            handle.param_groups(weight_decay=0.1),
            **OPTIONS | PREVIOUS,
            state_dtype="8bit",
            on_freeze="offload",
            state_device=state_device,
        )
        if state_device is not None:
            optimizer._host.copies = LateCopies()
        for _ in range(9):
            torch.manual_seed(3)
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
        results.append((model, optimizer))
    (model, moved), (twin, stays) = results
    assert_same(model, twin)
    assert_same_state(moved, stays)


@pytest.mark.parametrize("options", [PREVIOUS, EXACT | {"in_backward": True}])
def test_gradients_of_two_blocks_are_on_their_way_at_most(options):
    """More would pile up on the device where copies are slower than backward."""
    model = make()
    optimizer = on_host(model, **options)
    for step in range(3):
        optimizer._host.copies.most_under_way = 0
        loss_of(model, step).backward()
        optimizer.step()
    assert optimizer._host.copies.most_under_way == 2


def test_clipping_may_begin_and_end_later():
    """As under the Trainer, whose callback hands its norm over."""
    model, twin = make(), make()
    moved = on_host(model, in_backward=True)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, in_backward=True)
    for step, max_grad_norm in enumerate((None, 0.5, 0.5, None, 0.5)):
        for m, optimizer in ((model, moved), (twin, stays)):
            optimizer.max_grad_norm = max_grad_norm
            loss_of(m, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(model, twin)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_happens_to_kept_gradients_before_the_step(frozen):
    """A rate, a state that is loaded and a tensor that freezes count as they do on the device."""
    model, twin = make(), make()
    moved = on_host(model, **EXACT, in_backward=True)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, **EXACT, in_backward=True)
    fresh = copy.deepcopy(stays.state_dict())
    for step in range(3):
        for m, optimizer in ((model, moved), (twin, stays)):
            loss_of(m, step).backward()
            if step == 1:
                optimizer.load_state_dict(fresh)
                optimizer.param_groups[0]["lr"] = 0.01
                m.layers[2].requires_grad_(not frozen)
            optimizer.step()
            optimizer.zero_grad()
            m.requires_grad_(True)
    assert_same(model, twin)
    assert_same_state(moved, stays)


@pytest.mark.parametrize("options", [EXACT, {}])
def test_grad_scaler(options):
    runs = []
    for make_optimizer in (on_host, None):
        model = make()
        if make_optimizer is None:
            optimizer = MaskedAdamW(model.named_parameters(), **OPTIONS, **options)
        else:
            optimizer = make_optimizer(model, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
        for step in range(4):
            scale = float("inf") if step == 1 else 1.0
            scaler.scale(loss_of(model, step) * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        runs.append((model, optimizer.skipped_steps, scaler.get_scale()))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:] and runs[0][1] == 1


def test_grad_scaler_is_refused_in_backward():
    model = make()
    optimizer = on_host(model, **EXACT, in_backward=True)
    loss_of(model, 0).backward()
    optimizer.grad_scale = torch.tensor(8.0)
    with pytest.raises(RuntimeError, match="train in bfloat16, or in_backward=False"):
        optimizer.step()
    del optimizer.grad_scale
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0))
    scaler.unscale_(optimizer)  # finds no gradients
    with pytest.raises(RuntimeError, match="train in bfloat16, or in_backward=False"):
        scaler.step(optimizer)


@pytest.mark.parametrize("options", [{}, {"in_backward": True}, EXACT | {"in_backward": True}])
def test_a_step_that_is_not_finite_is_skipped_and_counted(options):
    model, twin = make(), make()
    moved = on_host(model, **options)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, **options)
    for m, optimizer in ((model, moved), (twin, stays)):
        for step in range(3):
            hook = None
            if step == 1:
                weight = m.layers[1].weight
                hook = weight.register_hook(lambda grad: torch.full_like(grad, float("nan")))
            loss_of(m, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if hook is not None:
                hook.remove()
    assert_same(model, twin)
    assert moved.skipped_steps == stays.skipped_steps == 1


@pytest.mark.parametrize("options", [{}, {"in_backward": True}, EXACT | {"in_backward": True}])
def test_accumulation_closures_and_weights_written_from_outside(options):
    model, twin = make(), make()
    moved = on_host(model, **options)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, **options)
    weights = copy.deepcopy(make().state_dict())
    for m, optimizer in ((model, moved), (twin, stays)):
        with optimizer.accumulate():
            m.unused(torch.ones(64)).sum().backward()  # in the first micro-batch alone
            loss_of(m, 0).backward()
        loss_of(m, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        m.load_state_dict(weights)

        def closure(m: nn.Module = m) -> Tensor:
            loss = loss_of(m, 2)
            loss.backward()
            return loss

        assert optimizer.step(closure).ndim == 0
        optimizer.zero_grad()
        m.head.weight.data = m.head.weight.data * 2
        loss_of(m, 3).backward()
        optimizer.step()
    assert_same(model, twin)
    assert_same_state(moved, stays)


@pytest.mark.parametrize("options", [{}, {"in_backward": True, "state_dtype": "8bit"}])
@pytest.mark.parametrize("to_host", [False, True])
def test_a_run_goes_on_where_its_state_did_not_lie(to_host, options):
    straight = make()
    optimizer = MaskedAdamW(straight.named_parameters(), **OPTIONS, **options)
    other = make()
    first = MaskedAdamW(other.named_parameters(), **OPTIONS, **options)
    first = first if to_host else on_host(other, **options)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(first.state_dict())
            if to_host:
                first = on_host(other, **options)
            else:
                first = MaskedAdamW(other.named_parameters(), **OPTIONS, **options)
            first.load_state_dict(saved)
        for m, o in ((straight, optimizer), (other, first)):
            loss_of(m, step).backward()
            o.step()
            o.zero_grad()
    assert_same(straight, other)
    assert_same_state(optimizer, first)


def test_torchs_optimizer_takes_the_state_over_and_gives_it_back():
    model = make()
    optimizer = on_host(model)
    loss_of(model, 0).backward()
    optimizer.step()
    torchs = torch.optim.AdamW(model.parameters(), lr=1.0)
    torchs.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        torchs.state[model.head.weight]["exp_avg"], optimizer.state[model.head.weight]["exp_avg"]
    )
    back = on_host(model)
    back.load_state_dict(torchs.state_dict())
    assert_same_state(back, optimizer)


def test_parameters_of_the_host_are_updated_where_they_are():
    model, twin, third = make(), make(), make()
    mixed, plain = on_host(model, **EXACT), on_host(third, **EXACT)
    mixed._host.copies = LateCopies(on_host=tuple(model.layers[1].parameters()))
    plain._host.copies = LateCopies(on_host=tuple(third.parameters()))
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, **EXACT)
    for step in range(3):
        for m, optimizer in ((model, mixed), (twin, stays), (third, plain)):
            loss_of(m, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(model, twin)
    assert_same(third, twin)
    assert plain._host.copies.bytes.total() == 0
    assert plain.host_report().weight_bytes == plain.host_report().staging_bytes == 0
    report, inside = mixed.host_report(), sum(p.nbytes for p in model.layers[1].parameters())
    whole = sum(p.nbytes for n, p in model.named_parameters() if "unused" not in n)
    assert report.gradient_bytes_to_host == whole - inside
    with pytest.raises(ValueError, match="state_device='cpu'"):
        stays.host_report()


@pytest.mark.parametrize("in_backward", [False, True])
def test_what_goes_wrong_in_the_thread_is_raised(in_backward, monkeypatch):
    model = make()
    optimizer = on_host(model, in_backward=in_backward)

    def broken(*args: Any, **options: Any) -> None:
        raise ArithmeticError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "update", broken)
        with pytest.raises(ArithmeticError, match="out of luck"):
            loss_of(model, 0).backward()
            optimizer.step()
    optimizer.step()  # of what is left
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()


def test_a_backward_that_broke_off_leaves_nothing():
    model, twin = make(), make()
    moved = on_host(model, in_backward=True)
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS, in_backward=True)

    def broken(gradient: Tensor) -> None:
        raise ArithmeticError("out of luck")

    for m, optimizer in ((model, moved), (twin, stays)):
        hook = m.layers[0].weight.register_hook(broken)
        with pytest.raises(ArithmeticError):
            loss_of(m, 0).backward()
        hook.remove()
        optimizer.zero_grad()
        optimizer.step()
        loss_of(m, 1).backward()
        optimizer.step()
    assert_same(model, twin)
    assert torch.equal(moved.grad_norm, stays.grad_norm)


def test_a_copied_optimizer_has_a_thread_of_its_own():
    model = make()
    optimizer = on_host(model, in_backward=True)
    loss_of(model, 0).backward()
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    other._host.copies = LateCopies()
    for m, o in ((model, optimizer), (twin, other)):
        loss_of(m, 1).backward()
        o.step()
    assert_same(model, twin)


def test_options_that_are_refused():
    with pytest.raises(ValueError, match="state_device must be None or 'cpu'"):
        MaskedAdamW(make().parameters(), state_device="disk")
    with pytest.raises(ValueError, match="state_device is a setting of the whole optimizer"):
        MaskedAdamW([{"params": make().parameters(), "state_device": "cpu"}])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = on_host(embedding)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


class AtOnce:
    """The thread of an optimizer, run where it is asked: `PretendCuda` is of one thread."""

    def submit(self, run: Callable[[], Any]) -> Future:
        done: Future = Future()
        done.set_result(run())
        return done


@pytest.mark.parametrize(
    ("options", "norms"), [({}, 1), (PREVIOUS, 4), (EXACT | {"in_backward": True}, 0)]
)
def test_on_a_gpu_the_host_waits_for_events_alone(options, norms):
    """Real values through streams, events and pinned memory, which are pretended; the model comes
    from the CPU, and goes back.
    """
    twin = make()
    stays = MaskedAdamW(twin.named_parameters(), **OPTIONS | options)
    for step in range(4):
        loss_of(twin, step).backward()
        stays.step()
        stays.zero_grad()
    with PretendCuda() as pretend:
        model = make()
        optimizer = MaskedAdamW(model.named_parameters(), **OPTIONS | options, state_device="cpu")
        optimizer._host._worker = AtOnce()
        for step, device in enumerate(("cpu", "cuda", "cuda", "cpu")):
            model.to(device)
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05, device=device)
            pretend.events.clear()
            x = torch.randn(5, 64, generator=torch.Generator().manual_seed(step)).to(device)
            (model(x).float().square().mean() * 3).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(t.device == CPU for s in optimizer.state.values() for t in s.values())
            waits = [e for e in pretend.events if e.kind != "pinned" and e.owner == "ours"]
            assert {event.what for event in waits} == (
                {"Event.synchronize"} if device == "cuda" else set()
            )
            # norms, and the rate of each of four blocks
            moved = optimizer.host_report().number_bytes_to_host
            assert moved == (4 * (norms + 4) if device == "cuda" else 0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # a GPU takes norms in its own way
