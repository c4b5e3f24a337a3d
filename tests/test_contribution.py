"""What blocks contribute: by hand where that is possible, and nothing of the model changed."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    MilestoneSchedule,
    ProgressiveSchedule,
    measure_contribution,
    patch_model,
)
from progtuning_kernels.model.layout import find_layout


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


class Stack(nn.Module):
    """Four residual blocks between an embedding and a linear head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Residual(width) for _ in range(4))
        self.head = nn.Linear(width, 3)

    def forward(self, ids, labels):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden.mean(1))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels)})


def stack_batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(20, (6, 5), generator=generator) for _ in range(count)]
    return [{"ids": i, "labels": i[:, 0] % 3} for i in ids]


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
@pytest.mark.parametrize("name", ["bert-sequence", "gpt2-causal-lm", "t5-seq2seq-lm"])
def test_the_model_stays_as_it_was_found(name, dropout):
    model = tiny_model(name, dropout=dropout)
    block = model.get_submodule(find_layout(model).block_paths[1])
    next(block.parameters()).requires_grad_(False)
    block.eval()
    other = next(p for p in model.parameters() if p.requires_grad)
    other.grad = torch.ones_like(other)
    before = snapshot(model)
    batches = [tiny_inputs(name, seed=seed) for seed in (1, 2)]
    one, two = (measure_contribution(model, batches, lr=1e-3) for _ in range(2))
    assert one == two and len(one.values) == 4 and len(set(one.values)) == 4
    assert_same(before, snapshot(model))


def test_the_model_stays_as_it_was_found_when_the_loss_raises():
    model, batches, calls = Stack(), stack_batches(), []
    before = snapshot(model)

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return model(**batch).loss

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_contribution(model, batches * 2, loss=loss, steps=6)
    assert_same(before, snapshot(model))


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
        model, batches, score=score, steps=6, lr=1e-2, embeddings=embeddings
    )
    shared = {"head.weight", "head.bias"} | ({"embed.weight"} if embeddings else set())
    blocks = [{f"blocks.{i}.linear.{kind}" for kind in ("weight", "bias")} for i in range(4)]
    assert changed == [shared, *(shared | block for block in blocks)]
    assert found.values == tuple(losses[0] - loss for loss in losses[1:])
    assert found.baseline == -losses[0]
    default = measure_contribution(model, batches, steps=6, lr=1e-2, embeddings=embeddings)
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

    measure_contribution(model, batches, score=score, steps=5, lr=1e-2, max_grad_norm=0.5)
    for ours, theirs in zip(weights[3], twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_an_optimizer_that_updates_inside_backward_stays_out_of_it():
    model, batches = Stack(), stack_batches()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook on .grad ran"))
    measure_contribution(model, batches)


def test_progress_reaches_its_end():
    seen = []
    measure_contribution(
        Stack(),
        iter(stack_batches(3)),
        steps=4,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i + 1, 20) for i in range(20)]


def test_weights_fit_a_schedule_and_print():
    model, batches = Stack(), stack_batches()
    found = measure_contribution(model, batches, score=lambda model: 0.25)
    assert found.values == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="no block contributes anything"):
        _ = found.weights
    values = iter([5.0, 6.0, 4.0, 5.0, 8.0])
    found = measure_contribution(model, batches, score=lambda model: next(values))
    assert found.values == (1.0, -1.0, 0.0, 3.0) and found.weights == (1.0, 0.0, 0.0, 3.0)
    assert ProgressiveSchedule(2, 10, weights=found.weights).boundaries(4) == (0, 1)
    lines = str(found).splitlines()
    assert lines[0] == "what the score gains over 5 when the block trains as well"
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
    gains = measure_contribution(model, batches, steps=4, lr=1e-2).values
    assert [value != 0 for value in gains] == [False, False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "no batches to measure on"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"blocks": "layers"}, "has no module at 'layers'"),
        ({"score": lambda model: math.nan}, "not finite"),
        ({"lr": 1e30, "max_grad_norm": 0}, "not finite"),
    ],
)
def test_what_cannot_be_measured_is_one_clear_error(change, message):
    model = Stack()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        measure_contribution(model, **{"batches": stack_batches(), **change})
    assert "\n" not in str(error.value)
    assert_same(before, snapshot(model))


def test_a_patched_model_is_one_clear_error():
    model = Stack()
    handle = patch_model(model, MilestoneSchedule({0: 1}))
    with pytest.raises(ValueError, match="the model is patched"):
        measure_contribution(model, stack_batches())
    handle.unpatch()
    assert len(measure_contribution(model, stack_batches()).values) == 4
