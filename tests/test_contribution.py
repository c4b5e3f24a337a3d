"""What blocks contribute: by hand where that is possible, and nothing of the model changed."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    MilestoneSchedule,
    ProgressiveSchedule,
    measure_contribution,
    patch_model,
)
from progtuning_kernels.model.layout import find_layout

METHODS = ("skip", "gradient", "train")


class Residual(nn.Module):
    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.linear, self.form = nn.Linear(width, width), form

    def forward(self, hidden):
        if self.form == "in place":
            out = hidden.add_(torch.tanh(self.linear(hidden)))
        else:
            out = hidden + torch.tanh(self.linear(hidden))
        return {"tensor": out, "tuple": (out, None), "list": [None, out]}.get(self.form, out)


class Stack(nn.Module):
    """Four residual blocks between an embedding and a linear head."""

    def __init__(self, form: str = "tensor", width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Residual(width, form) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, ids, labels):
        hidden = self.embed(ids).clone()
        for block in self.blocks:
            out = block(hidden)
            hidden = next(x for x in out if x is not None) if isinstance(out, tuple | list) else out
        logits = self.head(hidden.mean(1))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels)})


def stack_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(20, (6, 5), generator=generator) for _ in range(count)]
    return [{"ids": i, "labels": i[:, 0] % 3} for i in ids]


def fitted(model: nn.Module, batches, steps: int = 60, lr: float = 1e-2) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def snapshot(model: nn.Module):
    return (
        {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
        {n: list(m.__dict__) for n, m in model.named_modules()},
        {n: type(m) for n, m in model.named_modules()},
        torch.get_rng_state(),
    )


def assert_same(one, two) -> None:
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(one[0][n], two[0][n]) for n in one[0])
    for name, (flag, grad) in one[1].items():
        assert two[1][name][0] is flag and two[1][name][1] is grad, name
    assert one[2:5] == two[2:5] and torch.equal(one[5], two[5])


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "t5-seq2seq-lm"])
def test_the_model_stays_as_it_was_found(name, method, dropout):
    model = tiny_model(name, dropout=dropout)
    block = model.get_submodule(find_layout(model).block_paths[1])
    next(block.parameters()).requires_grad_(False)
    block.eval()
    other = next(p for p in model.parameters() if p.requires_grad)
    other.grad = torch.ones_like(other)
    before = snapshot(model)
    batches = [tiny_inputs(name, seed=seed) for seed in (1, 2)]
    one, two = (measure_contribution(model, batches, method=method, lr=1e-3) for _ in range(2))
    assert one == two and len(one.values) == 4 and len(set(one.values)) == 4
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was_found_when_the_loss_raises(method):
    model, batches, calls = Stack(), stack_batches(), []
    before = snapshot(model)

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_contribution(model, batches * 2, method=method, loss=loss, steps=6)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "in place"])
def test_a_skipped_block_hands_its_input_on(form):
    torch.manual_seed(1)
    batches = stack_batches()
    model = fitted(Stack(), batches)
    with torch.no_grad():
        model.blocks[2].linear.weight.zero_()
        model.blocks[2].linear.bias.zero_()
    for block in model.blocks:
        block.form = form
    with torch.inference_mode():
        found = measure_contribution(model, batches)
    model.eval()

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches) / len(batches)

    whole = mean_loss()
    assert found.baseline == -whole
    for i, block in enumerate(list(model.blocks)):
        model.blocks[i] = nn.Identity()
        assert found.values[i] == pytest.approx(mean_loss() - whole, abs=1e-6)
        model.blocks[i] = block
    assert found.values[2] == 0 and min(found.values) == 0 < sorted(found.values)[1]


@pytest.mark.parametrize("name", ["llama-causal-lm", "gpt2-causal-lm"])
def test_a_block_without_output_contributes_least(name):
    batch = tiny_inputs(name)
    model = fitted(tiny_model(name), [batch], steps=40, lr=3e-3)
    block = model.get_submodule(find_layout(model).block_paths[1])
    with torch.no_grad():
        for path, parameter in block.named_parameters():
            if any(part in path for part in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    fitted_without = measure_contribution(model, [batch])
    assert fitted_without.values[1] == 0
    assert all(value > 0 for i, value in enumerate(fitted_without.values) if i != 1)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"xlm-sequence"}))
def test_every_family_can_be_skipped(name):
    model = tiny_model(name)
    with torch.no_grad():
        for path in find_layout(model).block_paths:
            for parameter in model.get_submodule(path).parameters():
                parameter.mul_(3)  # as built, a block of DeBERTa changes the loss by less than 1e-6
    found = measure_contribution(model, [tiny_inputs(name)])
    assert len(found.values) == 4 and all(found.values)


def test_t5_keeps_its_relative_bias_when_the_block_that_computes_it_is_skipped():
    model, batch = tiny_model("t5-seq2seq-lm"), tiny_inputs("t5-seq2seq-lm")
    seen = []
    hook = model.encoder.block[1].register_forward_hook(
        lambda module, args, output: seen.append(output[1])
    )
    measure_contribution(model, [batch])
    hook.remove()
    assert all(isinstance(bias, torch.Tensor) and bias.any() for bias in seen)


def test_gradient_is_that_of_autograd():
    name = "bert-sequence"
    model, batches = tiny_model(name), [tiny_inputs(name, seed=seed) for seed in (1, 2, 3)]
    paths = find_layout(model).block_paths
    frozen = model.get_submodule(paths[3]).attention.self.query.weight.requires_grad_(False)
    squares, sizes = [0.0] * 4, [0] * 4
    for batch in batches:
        model.eval().zero_grad()
        model(**batch).loss.backward()
        for i, path in enumerate(paths):
            grads = [p.grad for p in model.get_submodule(path).parameters() if p is not frozen]
            squares[i] += sum(float(g.double().square().sum()) for g in grads)
            sizes[i] = sum(g.numel() for g in grads)
    expected = [math.sqrt(square / 3) for square in squares]
    found = measure_contribution(model, batches, method="gradient")
    assert found.values == pytest.approx(expected, rel=1e-5) and found.baseline is None
    found = measure_contribution(model, batches, method="gradient", relative=True)
    per_parameter = [x / math.sqrt(n) for x, n in zip(expected, sizes, strict=True)]
    assert found.values == pytest.approx(per_parameter, rel=1e-5)


@pytest.mark.parametrize("embeddings", [True, False])
def test_trains_embeddings_head_and_one_block_from_the_same_start(embeddings):
    model, batches = Stack(), stack_batches(4)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    changed, losses = [], []

    def score(model):
        assert not model.training
        changed.append({n for n, p in model.named_parameters() if not torch.equal(p, start[n])})
        with torch.no_grad():
            losses.append(sum(float(model(**batch).loss) for batch in batches) / 4)
        return -losses[-1]

    found = measure_contribution(
        model, batches, method="train", score=score, steps=6, lr=1e-2, embeddings=embeddings
    )
    shared = {"head.weight", "head.bias"} | ({"embed.weight"} if embeddings else set())
    blocks = [{f"blocks.{i}.linear.{kind}" for kind in ("weight", "bias")} for i in range(4)]
    assert changed == [shared, *(shared | block for block in blocks)]
    assert found.values == tuple(losses[0] - loss for loss in losses[1:])
    assert found.baseline == -losses[0]
    default = measure_contribution(
        model, batches, method="train", steps=6, lr=1e-2, embeddings=embeddings
    )
    assert default == found


def test_training_is_plain_adamw_with_a_falling_rate():
    model, batches = Stack(), stack_batches(3)
    torch.manual_seed(0)
    twin = Stack()
    twin.load_state_dict(model.state_dict())
    for block in (twin.blocks[0], twin.blocks[1], twin.blocks[3]):
        block.requires_grad_(False)
    trained = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        optimizer.zero_grad()
        twin(**batches[step % 3]).loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    weights = []

    def score(model):
        weights.append([p.detach().clone() for p in model.parameters()])
        return 0.0

    measure_contribution(
        model, batches, method="train", score=score, steps=5, lr=1e-2, max_grad_norm=0.5
    )
    for ours, theirs in zip(weights[3], twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_updates_inside_backward_stays_out_of_it():
    model, batches = Stack(), stack_batches()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook on .grad ran"))
    for method in METHODS:
        measure_contribution(model, batches, method=method)


def test_progress_reaches_its_end():
    model, batches = Stack(), stack_batches(3)
    for method, total in (("skip", 5), ("gradient", 3), ("train", 5 * 4)):
        seen = []
        measure_contribution(
            model,
            iter(batches),
            method=method,
            steps=4,
            on_progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == [(i + 1, total) for i in range(total)]


def test_weights_fit_a_schedule_and_print():
    model, batches = fitted(Stack(), stack_batches()), stack_batches()
    found = measure_contribution(model, batches, score=lambda model: 0.25)
    assert found.values == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="no block contributes anything by skip"):
        _ = found.weights
    values = iter([5.0, 4.0, 6.0, 5.0, 2.0])
    found = measure_contribution(model, batches, score=lambda model: next(values))
    assert found.values == (1.0, -1.0, 0.0, 3.0) and found.weights == (1.0, 0.0, 0.0, 3.0)
    assert ProgressiveSchedule(2, 10, weights=found.weights).boundaries(4) == (0, 1)
    lines = str(found).splitlines()
    assert lines[0] == "skip: what the score loses without the block (measured from 5)"
    assert [line.split() for line in lines[1:]] == [
        ["block", "0", "1", "#" * 10],
        ["block", "1", "-1", "-" * 10],
        ["block", "2", "0"],
        ["block", "3", "3", "#" * 30],
    ]


def test_adapters_contribute_with_their_block():
    peft = pytest.importorskip("peft")
    model = tiny_model("bert-sequence")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], layers_to_transform=[2])
    model = peft.get_peft_model(model, config)
    batches = [tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)]
    norms = measure_contribution(model, batches, method="gradient").values
    assert [value > 0 for value in norms] == [False, False, True, False]
    gains = measure_contribution(model, batches, method="train", steps=4, lr=1e-2).values
    assert [value != 0 for value in gains] == [False, False, True, False]


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4 * 2**i, 8 * 2**i) for i in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return type("Output", (), {"loss": x.square().mean()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "no batches to measure on"),
        ({"method": "magic"}, "method must be 'skip', 'gradient' or 'train', got 'magic'"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"blocks": "layers"}, "has no module at 'layers'"),
        ({"score": lambda model: math.nan}, "not finite"),
        ({"method": "train", "lr": 1e30, "max_grad_norm": 0}, "not finite"),
        ({"method": "gradient", "loss": lambda m, b: m(**b).loss * math.inf}, "not finite"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(change, message):
    model = Stack()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        measure_contribution(model, **{"batches": stack_batches(), **change})
    assert "\n" not in str(error.value)
    assert_same(before, snapshot(model))


def test_models_that_cannot_be_measured_are_one_clear_error():
    model = Stack()
    handle = patch_model(model, MilestoneSchedule({0: 1}))
    with pytest.raises(ValueError, match="the model is patched"):
        measure_contribution(model, stack_batches())
    handle.unpatch()
    measure_contribution(model, stack_batches())
    with pytest.raises(ValueError, match=r"block 0 turns \(2, 4\) into \(2, 8\)"):
        measure_contribution(Widening(), [{"x": torch.ones(2, 4)}])
    with pytest.raises(ValueError, match="no modules of their own"):
        measure_contribution(tiny_model("xlm-sequence"), [tiny_inputs("xlm-sequence")])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of any block requires grad"):
        measure_contribution(model, stack_batches(), method="gradient")
