"""Updates inside backward: the same training, one block's gradients alive where that is exact."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, patch_model
from progtuning_kernels.ops.masked_update.bucket import Bucket
from progtuning_kernels.optim.active_buckets import Member
from progtuning_kernels.optim.in_backward import BackwardHooks, block_of

OPTIONS = dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


class Blocks(nn.Module):
    """Four equal blocks and a head; `unused` gets no gradient."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.head = nn.Linear(width, 3)
        self.unused = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def loss_of(model: nn.Module, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return model(torch.randn(5, 16, generator=generator)).square().mean() * scale


def pair() -> tuple[Blocks, Blocks]:
    torch.manual_seed(1)
    model = Blocks()
    return model, copy.deepcopy(model)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_blocks_come_from_names():
    def block(name: str | None) -> str:
        return block_of(Member(torch.zeros(1), 7, 0, name))

    assert block("bert.encoder.layer.3.attention.self.query.weight") == "bert.encoder.layer.3"
    assert block("encoder.block.11.layer.0.DenseReluDense.wi.weight") == "encoder.block.11"
    assert block("model.layers.2.mlp.experts.1.up.weight") == "model.layers.2"
    assert block("0.weight") == "0"
    assert block("bert.embeddings.word_embeddings.weight") == "bert.embeddings.word_embeddings"
    assert block("w2v.weight") == "w2v"  # a digit inside a word is none
    assert block(None) == "parameter 7"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("nonfinite", ["skip", "ignore"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_trains_as_without(max_grad_norm, nonfinite, named):
    inside, after = pair()
    options = dict(OPTIONS, max_grad_norm=max_grad_norm, nonfinite=nonfinite)
    parameters = inside.named_parameters() if named else inside.parameters()
    early = MaskedAdamW(parameters, in_backward=True, **options)
    late = MaskedAdamW(after.parameters(), **options)
    for step in range(5):
        for model, optimizer in ((inside, early), (after, late)):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        if early.grad_norm is not None:
            torch.testing.assert_close(early.grad_norm, late.grad_norm, rtol=1e-6, atol=0)
        for p, q in zip(inside.parameters(), after.parameters(), strict=True):
            # the norm is rounded once more where it is made of blocks' norms
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        if max_grad_norm is None:
            assert_same(inside, after)
    assert inside.unused.weight not in early.state and inside.unused.weight.grad is None


class GradientMeter:
    """Most bytes of gradients alive at once. Made before the optimizer, whose hooks run later."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.peak_bytes = model, 0
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, _: torch.Tensor) -> None:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.peak_bytes = max(self.peak_bytes, sum(grad.nbytes for grad in grads))


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"nonfinite": "ignore"}, 1),
        ({"nonfinite": "skip"}, 1),
        ({"max_grad_norm": 0.1, "clip_mode": "per_block"}, 1),
        ({"max_grad_norm": 0.1, "clip_mode": "previous_norm"}, 1),
        ({"max_grad_norm": 0.1, "clip_mode": "exact"}, 4),
    ],
)
def test_peak_gradient_memory_is_one_blocks_where_exactness_allows(options, blocks):
    model = Blocks()
    meter = GradientMeter(model)
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS, **options)
    for step in range(3):
        meter.peak_bytes = 0
        loss_of(model, step).backward()
        block = sum(p.nbytes for p in model.layers[0].parameters())
        head = sum(p.nbytes for p in model.head.parameters())
        assert meter.peak_bytes == (block if blocks == 1 else 4 * block + head)
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Tensors in the bucket of every update call."""
    found = []
    update = Bucket.update

    def counted(self: Bucket, *args, **options) -> None:
        found.append(len(self.params))
        update(self, *args, **options)

    monkeypatch.setattr(Bucket, "update", counted)
    return found


def test_one_call_per_block(calls):
    model = Blocks()
    optimizer = MaskedAdamW(
        model.named_parameters(), in_backward=True, nonfinite="ignore", **OPTIONS
    )
    loss_of(model, 0).backward()
    assert calls == [2] * 5  # head, then four blocks of weight and bias
    optimizer.step()
    assert len(calls) == 5


def test_accumulation_acts_on_the_last_micro_batch_only():
    inside, after = pair()
    early = MaskedAdamW(inside.named_parameters(), in_backward=True, **OPTIONS)
    late = MaskedAdamW(after.parameters(), **OPTIONS)
    for step in range(3):
        before = [p.detach().clone() for p in inside.parameters()]
        for micro in range(3):
            loss_of(after, 10 * step + micro, 1 / 3).backward()
            if micro < 2:
                with early.accumulate():
                    loss_of(inside, 10 * step + micro, 1 / 3).backward()
                assert all(map(torch.equal, inside.parameters(), before))
            else:
                loss_of(inside, 10 * step + micro, 1 / 3).backward()
        for optimizer in (early, late):
            optimizer.step()
            optimizer.zero_grad()
        assert_same(inside, after)


def test_a_block_that_only_an_earlier_micro_batch_used_is_updated_by_step():
    inside, after = pair()
    early = MaskedAdamW(inside.named_parameters(), in_backward=True, **OPTIONS)
    late = MaskedAdamW(after.parameters(), **OPTIONS)
    for model, optimizer in ((inside, early), (after, late)):
        with optimizer.accumulate():
            model.unused(torch.ones(16)).sum().backward()
        loss_of(model, 0).backward()
        optimizer.step()
    assert early.state[inside.unused.weight]["step"] == 1
    assert_same(inside, after)


def test_a_forgotten_accumulate_is_an_error_with_the_cure():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"updated already in this step.*accumulate\(\)"):
        loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 2).backward()


def test_a_block_of_which_some_have_no_gradient_is_updated_when_backward_ends():
    model = Blocks()
    model.layers[3].unused = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    loss_of(model, 0).backward()
    assert optimizer.state[model.layers[3].weight]["step"] == 1
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert optimizer.state[model.layers[3].weight]["step"] == 1


def test_a_tensor_that_left_its_group_is_not_updated():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    group, left = optimizer.param_groups[0], model.layers[2].weight
    place = group["param_names"].index("layers.2.weight")
    assert group["params"].pop(place) is left and group["param_names"].pop(place)
    before = left.detach().clone()
    loss_of(model, 0).backward()  # its hook is still there
    optimizer.step()
    assert torch.equal(left, before) and left.grad is not None


def test_stage_changes_move_the_hooks():
    models, optimizers, handles = [], [], []
    for in_backward in (True, False):
        model = tiny_model("bert-sequence")
        handle = patch_model(model, ProgressiveSchedule(4, 8))
        optimizer = MaskedAdamW(
            handle.param_groups(weight_decay=0.1), lr=0.01, eps=1e-3, in_backward=in_backward
        )
        models.append(model)
        handles.append(handle)
        optimizers.append(optimizer)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(8):
        for model, handle, optimizer in zip(models, handles, optimizers, strict=True):
            frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
            torch.manual_seed(3)
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            now = [p for p in model.parameters() if not p.requires_grad]
            assert all(map(torch.equal, frozen, now))
            handle.advance()
        assert_same(*models)
        active = sum(p.requires_grad for p in models[0].parameters())
        hooks = [bool(p._post_accumulate_grad_hooks) for p in models[0].parameters()]
        assert sum(hooks) == active
        assert (
            optimizers[0]
            .state.keys()
            .isdisjoint(p for p in models[0].parameters() if not p.requires_grad)
        )


def test_a_non_finite_block_is_skipped_and_the_step_counted_once():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    before = [p.detach().clone() for p in model.parameters()]
    handle = model.layers[1].weight.register_hook(lambda g: torch.full_like(g, float("nan")))
    loss_of(model, 0).backward()
    optimizer.step()
    handle.remove()
    after = dict(zip([n for n, _ in model.named_parameters()], before, strict=True))
    assert optimizer.skipped_steps == 1 and optimizer.grad_norm.isnan()
    for name, p in model.named_parameters():
        kept = name.startswith(("layers.1", "unused"))
        assert torch.equal(p, after[name]) == kept, name


def test_exact_clipping_skips_the_whole_step():
    model = Blocks()
    optimizer = MaskedAdamW(
        model.named_parameters(), in_backward=True, max_grad_norm=1.0, **OPTIONS
    )
    before = [p.detach().clone() for p in model.parameters()]
    model.layers[1].weight.register_hook(lambda g: torch.full_like(g, float("inf")))
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(map(torch.equal, model.parameters(), before))


def test_previous_norm_and_per_block_clip_by_what_they_say():
    for clip_mode in ("previous_norm", "per_block"):
        inside, after = pair()
        early = MaskedAdamW(
            inside.named_parameters(),
            in_backward=True,
            max_grad_norm=0.01,
            clip_mode=clip_mode,
            **OPTIONS,
        )
        late = MaskedAdamW(after.parameters(), **OPTIONS)
        previous = None
        for step in range(3):
            loss_of(inside, step).backward()
            early.step()
            loss_of(after, step).backward()
            units = [list(layer.parameters()) for layer in (*after.layers, after.head)]
            norms = [nn.utils.get_total_norm([p.grad for p in unit]) for unit in units]
            for unit, norm in zip(units, norms, strict=True):
                by = norm if clip_mode == "per_block" or previous is None else previous
                for p in unit:
                    p.grad *= min(1.0, 0.01 / (float(by) + 1e-6))
            late.step()
            late.zero_grad()
            previous = torch.stack(norms).norm()
            torch.testing.assert_close(early.grad_norm, previous, rtol=1e-5, atol=0)
            for p, q in zip(inside.parameters(), after.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad_step", [0, 1, 2])
def test_a_step_that_is_not_finite_does_not_clip_the_next_one(bad_step):
    """Divided by the norm of such a step, every gradient would be NaN."""
    model = Blocks()
    optimizer = MaskedAdamW(
        model.named_parameters(),
        in_backward=True,
        max_grad_norm=0.01,
        clip_mode="previous_norm",
        **OPTIONS,
    )
    last_good = None
    for step in range(4):
        loss_of(model, step, float("nan") if step == bad_step else 1.0).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        if step == bad_step and last_good is not None:
            assert optimizer.state_dict()["masked"]["previous_norm"] == last_good
        elif step != bad_step:
            last_good = optimizer.grad_norm
    assert optimizer.skipped_steps == 1
    moved = optimizer.state[model.head.weight]
    assert moved["step"] == 3 and moved["exp_avg"].norm() > 0


def test_a_resumed_run_clips_by_the_norm_before():
    straight, other = pair()
    options = dict(OPTIONS, in_backward=True, max_grad_norm=0.01, clip_mode="previous_norm")
    first = MaskedAdamW(straight.named_parameters(), **options)
    loss_of(straight, 0).backward()
    first.step()
    other.load_state_dict(straight.state_dict())
    second = MaskedAdamW(other.named_parameters(), **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((straight, first), (other, second)):
        loss_of(model, 1).backward()
        optimizer.step()
    assert_same(straight, other)


def test_gradients_changed_after_backward_are_normed_again():
    inside, after = pair()
    options = dict(OPTIONS, max_grad_norm=0.05)
    early = MaskedAdamW(inside.named_parameters(), in_backward=True, **options)
    late = MaskedAdamW(after.parameters(), **options)
    for model, optimizer in ((inside, early), (after, late)):
        loss_of(model, 0).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(3.0)
        optimizer.step()
    assert_same(inside, after)
    torch.testing.assert_close(early.grad_norm, late.grad_norm, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}], ids=str)
def test_groups_that_change_between_steps_count_in_the_next_backward(options):
    """A tensor that moves to another group, and one that is replaced."""
    runs = []
    for in_backward in (True, False):
        model = pair()[0]
        named = list(model.named_parameters())
        groups = [{"params": named[:4]}, {"params": named[4:], "lr": 1e-3}]
        optimizer = MaskedAdamW(groups, in_backward=in_backward, **OPTIONS, **options)
        for step in range(5):
            first, second = optimizer.param_groups
            if step == 1:
                for key in ("params", "param_names"):
                    second[key].insert(0, first[key].pop())
            if step == 3:
                assert second["param_names"][1] == "layers.2.weight"
                model.layers[2].weight = second["params"][1] = nn.Parameter(torch.eye(16))
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.parameters())
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_an_option_written_into_a_group_is_refused_before_an_update():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize=True"):
        loss_of(model, 0).backward()
    assert all(map(torch.equal, model.parameters(), before))


class Reentrant(Blocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=True)
        return self.head(x)


def test_reentrant_checkpointing_is_refused():
    model = Reentrant()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(model, 0).backward()
    optimizer.zero_grad()


def test_a_backward_that_broke_off_leaves_nothing(calls):
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)

    def broken(gradient: torch.Tensor) -> None:
        raise ArithmeticError("out of luck")

    for parameter in model.layers[0].parameters():  # the other one's gradient may have come
        handle = parameter.register_hook(broken)
        with pytest.raises(ArithmeticError):
            loss_of(model, 0).backward()
        handle.remove()
        optimizer.step()  # updates what is left, and forgets
        optimizer.zero_grad()
        calls.clear()
        loss_of(model, 1).backward()
        optimizer.step()
        assert calls == [2] * 5


def test_zero_grad_forgets_a_backward_that_broke_off():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)

    def broken(gradient: torch.Tensor) -> None:
        raise ArithmeticError("out of luck")

    handle = model.layers[0].weight.register_hook(broken)
    with pytest.raises(ArithmeticError):
        loss_of(model, 0).backward()
    handle.remove()
    optimizer.zero_grad()
    with optimizer.accumulate():
        loss_of(model, 1).backward()


def test_a_group_added_later_is_updated_inside_the_next_backward():
    model = Blocks()
    named = list(model.named_parameters())
    optimizer = MaskedAdamW(named[:4], in_backward=True, **OPTIONS)
    optimizer.add_param_group({"params": named[4:8]})
    loss_of(model, 0).backward()
    assert [p.grad is None for _, p in named[:10]] == [True] * 8 + [False] * 2


def test_accumulate_gives_back_to_what_decided_before():
    """The Trainer's callback decides for the Trainer."""
    optimizer = MaskedAdamW(Blocks().named_parameters(), in_backward=True)
    optimizer.accumulating = decides = lambda: True
    with optimizer.accumulate():
        assert optimizer.accumulating()
    assert optimizer.accumulating is decides


def test_grad_scaler_came_too_late():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model, 0)).backward()
    optimizer.grad_scale = torch.tensor(8.0)
    with pytest.raises(RuntimeError, match="clip_mode='exact'"):
        optimizer.step()


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="clip_mode='per_block' is for in_backward=True"):
        MaskedAdamW(Blocks().parameters(), clip_mode="per_block")
    with pytest.raises(ValueError, match="zero_grads keeps the gradients that in_backward"):
        MaskedAdamW(Blocks().parameters(), in_backward=True, zero_grads=True)
    with pytest.raises(ValueError, match="clip_mode must be one of"):
        MaskedAdamW(Blocks().parameters(), in_backward=True, clip_mode="sometimes")


def test_a_copied_model_and_optimizer_go_on_together():
    model = Blocks()
    optimizer = MaskedAdamW(model.named_parameters(), in_backward=True, **OPTIONS)
    loss_of(model, 0).backward()
    optimizer.step()
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        loss_of(m, 1).backward()
        o.step()
    assert_same(model, twin)


def test_gradients_that_grad_scaler_has_unscaled_are_clipped_by_their_own_norm():
    results = []
    for in_backward in (False, True):
        p = nn.Parameter(torch.ones(1000))
        optimizer = MaskedAdamW([p], lr=0.1, max_grad_norm=0.1, in_backward=in_backward)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            scaler.scale((p * torch.arange(1000) / 1000 * (step + 1)).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append((p.detach(), optimizer.grad_norm))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_a_dropped_optimizer_updates_nothing_more():
    model = Blocks()
    for lr in (1.0, 0.0):  # the second takes the place of the first
        optimizer = MaskedAdamW(model.named_parameters(), lr=lr, in_backward=True)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert len(optimizer.state) == len(before) - 2  # it has seen every gradient


def test_hooks_of_several_threads_wait_for_each_other(monkeypatch):
    """Backward has a thread for each GPU, and an update may wait for the host."""
    inside, most = [], []

    def update(table):
        inside.append(table)
        time.sleep(2e-3)
        most.append(len(inside))
        inside.pop()

    hooks = BackwardHooks(lambda: True, update, list)
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
    hooks.install_hooks([Member(p, i, 0, None) for i, p in enumerate(weights)])
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 1)
    hooks._graph_task = 1
    with ThreadPoolExecutor(4) as threads:
        for p in weights:
            (hook,) = p._post_accumulate_grad_hooks.values()
            threads.submit(hook, p)
    assert most == [1] * 4
