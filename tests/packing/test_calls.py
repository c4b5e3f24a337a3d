"""Every call of a block has the tokens of its own forward, whatever runs before its backward."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from packed_models import LEFT, MIXED, RIGHT, batch_of, packed_forwards, patched, run
from proofs import enable_checkpointing, frozen_by_hand
from tiny_models import BOUNDARIES, tiny_model
from torch.utils.checkpoint import checkpoint

from progtuning_kernels import CyclicBlockSchedule, MilestoneSchedule, patch_model
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.packing.blocks import begin_forward, end_forward

NAMES = ["bert-sequence", "llama-causal-lm", "gpt2-causal-lm", "mpnet-sequence", "t5-seq2seq-lm"]
CHECKPOINTING = ["none", "plain", "reentrant"]


def _model(name, checkpointing="none"):
    model = tiny_model(name)
    if checkpointing != "none":
        enable_checkpointing(model, use_reentrant=checkpointing == "reentrant")
    return model


def _assert_same(found, expected, tolerance=2e-5):
    """Gradients of packed tokens are sums over tokens in another order."""
    assert found.keys() == expected.keys() and expected
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1e-2 * largest)
        assert (found[name] - gradient).abs().max().item() <= tolerance * scale, name


def _gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _two_forwards(model, batches, order):
    """One backward after two forwards, or two, the later forward first."""
    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    if order == "together":
        (losses[0] + 2 * losses[1]).backward()
    else:
        (2 * losses[1]).backward()
        losses[0].backward()
    return _gradients(model)


def _pair(name):
    """Two batches of the same shape and as many tokens, which stand at other places."""
    return batch_of(name, RIGHT, seed=1), batch_of(name, LEFT, seed=2)


@pytest.mark.parametrize("order", ["together", "later first"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", NAMES)
def test_two_forwards_before_backward(name, checkpointing, order):
    if name.startswith("mpnet") and checkpointing != "none":
        pytest.skip("MPNet has no gradient checkpointing")
    batches = _pair(name)
    model = _model(name, checkpointing)
    handle = patched(model)
    run(model, batches[0])
    before = packed_forwards(handle)
    found = _two_forwards(model, batches, order)
    assert packed_forwards(handle) == before + 2
    _assert_same(found, _two_forwards(_model(name), batches, order))


@pytest.mark.parametrize("order", ["together", "later first"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_one_packed_and_one_not(checkpointing, order):
    """An evaluation or a batch without padding between a forward and its backward."""
    name = "bert-sequence"
    batches = batch_of(name, RIGHT), batch_of(name, [(0, 11)] * 4, seed=2)
    for pair in (batches, batches[::-1]):
        model = _model(name, checkpointing)
        patched(model)
        run(model, batches[0])
        _assert_same(_two_forwards(model, pair, order), _two_forwards(_model(name), pair, order))


@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("boundary", [0, 1, 3])
def test_checkpointed(name, checkpointing, boundary):
    if name.startswith("mpnet"):
        pytest.skip("MPNet has no gradient checkpointing")
    batch = batch_of(name, MIXED)
    model, padded = _model(name, checkpointing), _model(name)
    handle = patched(model, boundary)
    for _ in range(2):
        found = run(model, batch)
    assert packed_forwards(handle) == 2
    _assert_same(found.gradients, frozen_by_hand(padded, handle.plan, batch))


def _runs_its_blocks_checkpointed(model, use_reentrant):
    """Has the code that calls the blocks call `checkpoint(block, ...)` itself."""
    holder = model.bert.encoder

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        for layer in self.layer:
            hidden_states = checkpoint(
                layer, hidden_states, attention_mask, use_reentrant=use_reentrant
            )
        return type(output)(last_hidden_state=hidden_states)

    output = holder(torch.zeros(1, 2, 32))
    holder.forward = types.MethodType(forward, holder)
    return model


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("forwards", ["one", "two"])
def test_checkpoint_around_a_block_in_the_models_own_code(use_reentrant, forwards):
    name = "bert-sequence"
    model = _runs_its_blocks_checkpointed(tiny_model(name), use_reentrant)
    padded = tiny_model(name)
    handle = patched(model)
    batches = _pair(name)
    run(model, batches[0])
    if (
        use_reentrant
    ):  # such a checkpoint calls blocks with other tensors, of which nothing is known
        assert "use_reentrant=False" in str(handle.packing_report())
    else:
        assert packed_forwards(handle) == 1
    if forwards == "one":
        _assert_same(run(model, batches[1]).gradients, run(padded, batches[1]).gradients)
    else:
        for order in ("together", "later first"):
            found = _two_forwards(model, batches, order)
            _assert_same(found, _two_forwards(padded, batches, order))


@pytest.mark.parametrize("order", ["together", "later first"])
def test_two_forwards_that_give_their_first_block_the_same_tensor(order):
    """The same embeddings under two masks, as for a question about different parts of a text."""
    name = "bert-sequence"
    batches = [{**b, "input_ids": batch_of(name, RIGHT)["input_ids"]} for b in _pair(name)]
    model, padded = tiny_model(name), tiny_model(name)
    given = model.bert.embeddings(batches[0]["input_ids"]).detach()
    for each in (model, padded):
        each.bert.embeddings.forward = lambda *args, **kwargs: given
        each.bert.embeddings.requires_grad_(False)
    handle = patched(_runs_its_blocks_checkpointed(model, use_reentrant=False))
    run(model, batches[0])
    found = _two_forwards(model, batches, order)
    assert packed_forwards(handle) == 3
    _assert_same(found, _two_forwards(padded, batches, order))


@pytest.mark.parametrize("blocks", [1, 4])
def test_the_same_embeddings_in_a_forward_that_does_not_pack(blocks):
    name = "llama-causal-lm"
    model = tiny_model(name)
    model.model.layers = model.model.layers[:blocks]
    padded = copy.deepcopy(model)
    handle = patched(model)
    batch = batch_of(name, MIXED)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    run(model, batch)
    batch["output_hidden_states"] = True
    _assert_same(run(model, batch).gradients, run(padded, batch).gradients, 0.0)
    assert packed_forwards(handle) == 1


def test_a_checkpoint_around_several_blocks():
    name = "bert-sequence"
    model, padded = tiny_model(name), tiny_model(name)
    holder = model.bert.encoder

    def two(first, second, hidden, mask):
        return second(first(hidden, mask), mask)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        for at in (0, 2):
            hidden_states = checkpoint(
                two, *self.layer[at : at + 2], hidden_states, attention_mask, use_reentrant=False
            )
        return type(output)(last_hidden_state=hidden_states)

    output = holder(torch.zeros(1, 2, 32))
    holder.forward = types.MethodType(forward, holder)
    handle = patched(model)
    batches = _pair(name)
    run(model, batches[0])
    for order in ("together", "later first"):
        found = _two_forwards(model, batches, order)
        _assert_same(found, _two_forwards(padded, batches, order))
    assert packed_forwards(handle) == 5


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "mpnet-sequence"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda: MilestoneSchedule({0: 4, 1: 3, 2: 1, 3: 0, 4: -1, 5: 2, 6: 0}),
        lambda: CyclicBlockSchedule(1, 1, order="descending"),
        lambda: CyclicBlockSchedule(2, 1, order="random"),
    ],
    ids=["down and up", "one block in turn", "two blocks in turn"],
)
@pytest.mark.parametrize("checkpointing", ["none", "plain"])
def test_blocks_that_thaw_train(name, schedule, checkpointing):
    """At every stage: gradients of the padded model with the same parameters frozen."""
    if name.startswith("mpnet"):
        checkpointing = "none"
    model = _model(name, checkpointing)
    handle = patch_model(model, schedule(), packing="on", kernels="off")
    stages = set()
    for step in range(8):
        batch = batch_of(name, (MIXED, RIGHT, LEFT)[step % 3], seed=step)
        before = packed_forwards(handle)
        found = run(model, batch)
        assert packed_forwards(handle) == before + 1
        _assert_same(found.gradients, frozen_by_hand(tiny_model(name), handle.plan, batch))
        handle.truncation_report().assert_truncated()
        stages.add(handle.plan)
        handle.advance()
    assert len(stages) >= 2


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_nothing_below_the_boundary_has_a_gradient_path(boundary):
    model = tiny_model("bert-sequence")
    handle = patched(model, boundary)
    run(model, batch_of("bert-sequence", MIXED))
    entering = {}
    blocks = [model.get_submodule(path) for path in handle.layout.block_paths]
    for i, block in enumerate(blocks):
        first = next(m for m in block.modules() if m is not block and m._parameters)
        first.register_forward_pre_hook(
            lambda m, args, i=i: entering.update({i: args[0].requires_grad})
        )
    model.zero_grad()
    model(**batch_of("bert-sequence", MIXED)).loss.backward()
    assert not any(entering[i] for i in range(min(boundary + 1, 4)) if boundary)
    report = handle.truncation_report()
    report.assert_truncated()
    assert all((u.nodes, u.saved_bytes) == (0, 0) for u in report.prefix)


@pytest.mark.parametrize(("spans", "fills"), [(MIXED, (0.0, 1e4)), (RIGHT, (0.0, torch.nan))])
def test_nothing_comes_from_padding(spans, fills):
    """Whatever the embeddings at padding are, gradients of real tokens stay, and theirs are 0."""
    name = "bert-token"
    batch = batch_of(name, spans)
    mask = batch["attention_mask"]
    model = tiny_model(name)
    handle = patched(model)
    run(model, batch)
    found = []
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    for fill in fills:
        given = embedded.masked_fill((mask == 0)[..., None], fill).requires_grad_()
        model.zero_grad()
        loss = model(**batch, inputs_embeds=given).loss
        loss.backward()
        gradient = given.grad.nan_to_num()  # BERT's norm of a row of NaN gives 0 x NaN
        assert not gradient[mask == 0].any()
        assert gradient[mask != 0].any(1).all()
        found.append((loss, gradient))
    assert packed_forwards(handle) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _last_of(model):
    return model.get_submodule(find_layout(model).block_paths[-1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["block", "attention", "head"])
def test_an_interrupted_forward_leaves_nothing_behind(error, where):
    name = "bert-sequence"
    model, padded = tiny_model(name), tiny_model(name)
    handle = patched(model)
    first = batch_of(name, RIGHT)
    run(model, first)
    last = _last_of(model)
    inside = {"block": last.output, "attention": last.attention.self, "head": model.classifier}
    own = inside[where].forward

    def fail(*args, **kwargs):
        raise error("in the middle")

    inside[where].forward = fail
    for again in (first, batch_of(name, LEFT)):
        with pytest.raises(error, match="in the middle"):
            model(**again)
        inside[where].forward, kept = own, inside[where].forward
        del inside[where].__dict__["forward"]
        # another model's forward, then its own, padded otherwise
        other = tiny_model(name)
        with torch.no_grad():
            other(**again)
        batch = batch_of(name, MIXED, seed=4)
        _assert_same(run(model, batch).gradients, run(padded, batch).gradients)
        inside[where].forward = kept
    del inside[where].__dict__["forward"]
    handle.unpatch()
    _assert_same(run(model, first).gradients, run(padded, first).gradients, 0.0)


def test_a_trial_that_is_interrupted_leaves_nothing_behind():
    name = "bert-sequence"
    model, padded = tiny_model(name), tiny_model(name)
    batch = batch_of(name, RIGHT)
    handle = patched(model)
    last = _last_of(model)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    last.output.forward = fail
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    del last.output.__dict__["forward"]
    _assert_same(run(model, batch).gradients, run(padded, batch).gradients)
    assert packed_forwards(handle) == 1


def test_a_teacher_called_inside_a_hook():
    """The forward of another patched model, and of the same one, inside a packed block."""
    name = "bert-sequence"
    student, teacher, padded = (tiny_model(name, seed=s) for s in (0, 1, 0))
    expected_of_teacher = copy.deepcopy(teacher)
    handles = patched(student), patched(teacher)
    ours, others = batch_of(name, RIGHT), batch_of(name, LEFT, seed=3)
    run(student, ours), run(teacher, others)
    expected = run(padded, ours)
    seen = []

    def call_teacher(module, args, output):
        with torch.no_grad():
            seen.append(teacher(**others).logits)

    call_teacher.__module__ = "torch.nn"  # a hook that packing takes for one that sees no token
    hook = _last_of(student).output.register_forward_hook(call_teacher)
    before = [packed_forwards(h) for h in handles]
    found = run(student, ours)
    hook.remove()
    assert [packed_forwards(h) for h in handles] == [n + 1 for n in before]
    _assert_same(found.gradients, expected.gradients)
    assert torch.equal(seen[0], expected_of_teacher(**others).logits)


def test_a_model_called_inside_its_own_forward():
    name = "bert-sequence"
    model, padded = tiny_model(name), tiny_model(name)
    handle = patched(model)
    ours, others = batch_of(name, RIGHT), batch_of(name, LEFT, seed=3)
    run(model, ours)
    expected = run(padded, ours)
    seen = []

    def call_again(module, args, output):
        if not seen:
            seen.append(None)
            with torch.no_grad():
                seen[0] = model(**others).logits

    call_again.__module__ = "torch.nn"
    hook = model.bert.encoder.layer[1].output.register_forward_hook(call_again)
    before = packed_forwards(handle)
    found = run(model, ours)
    hook.remove()
    assert packed_forwards(handle) == before + 2
    _assert_same(found.gradients, expected.gradients)
    assert torch.equal(seen[0], padded(**others).logits)


def test_what_an_interrupted_forward_leaves_does_not_reach_a_recomputation():
    begin_forward("one of another model", {})
    try:
        test_a_checkpoint_around_several_blocks()
    finally:
        end_forward("one of another model")
