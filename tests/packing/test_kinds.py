"""Arguments of another kind than those of the first trial are tried by themselves."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import transformers as hf
from packed_models import LEFT, MIXED, RIGHT, batch_of, packed_forwards, patched
from tiny_models import tiny_model


class Tasks(hf.BertForSequenceClassification):
    """`task="all"` attends to padding, too; `task="double"` changes nothing about tokens."""

    forwards: ClassVar[list[str]] = []

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        task="first",
        count=0,
        inputs_embeds=None,
    ):
        self.forwards.append(task)
        mask = torch.ones_like(attention_mask) if task == "all" else attention_mask
        output = super().forward(input_ids, mask, labels=labels, inputs_embeds=inputs_embeds)
        if task == "double":
            output.logits = 2 * output.logits
        return output


def _pair():
    """A model that packs, trained with its first task for a step, and one that does not."""
    models = []
    for _ in range(2):
        model = tiny_model("bert-sequence")
        model.__class__ = Tasks
        models.append(model)
    handle = patched(models[0])
    assert _is_packed(handle, _batch(1))
    return handle, models[1]


def _batch(seed, spans=RIGHT):
    return batch_of("bert-sequence", spans, seed=seed)


def _is_packed(handle, batch, **more):
    """Whether the step with this batch runs packed."""
    before = packed_forwards(handle)
    _step(handle.model, batch, **more)
    return packed_forwards(handle) > before


def _step(model, batch, **more):
    model.zero_grad()
    output = model(**batch, **more)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "logits": output.logits.detach()}


def _assert_same(handle, padded, batch, **more):
    found, expected = _step(handle.model, batch, **more), _step(padded, batch, **more)
    assert found.keys() == expected.keys()
    largest = max(t.abs().max().item() for t in expected.values())
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-2 * largest)
        assert (found[name] - tensor).abs().max().item() <= 2e-5 * scale, name


def test_a_task_that_sees_padding_runs_padded_and_the_others_packed():
    handle, padded = _pair()
    for seed, spans in ((2, RIGHT), (3, LEFT), (4, MIXED)):
        batch = _batch(seed, spans)
        _assert_same(handle, padded, batch, task="all")
        _assert_same(handle, padded, batch, task="double")
        _assert_same(handle, padded, batch)
    assert not _is_packed(handle, _batch(5), task="all")
    assert _is_packed(handle, _batch(5), task="double")
    assert _is_packed(handle, _batch(5))
    assert "arguments as in the first trial pack" in str(handle.packing_report())
    assert packed_forwards(handle) == 1 + 2 * 3 + 2


def test_a_kind_is_tried_once():
    handle, _ = _pair()
    _step(handle.model, _batch(2), task="double")
    Tasks.forwards.clear()
    for seed in range(3, 6):
        _step(handle.model, _batch(seed), task="double")
        _step(handle.model, _batch(seed))
    assert Tasks.forwards == ["double", "first"] * 3


@pytest.mark.parametrize("more", [{}, {"return_dict": True}])
def test_evaluation_needs_no_labels(more):
    handle, padded = _pair()
    batch = _batch(2)
    del batch["labels"]
    with torch.no_grad():
        found = handle.model.eval()(**batch)
        expected = padded.eval()(**batch)
    assert packed_forwards(handle) == 2
    torch.testing.assert_close(found.logits, expected.logits)


def test_evaluation_with_what_no_training_forward_had_runs_padded():
    handle, padded = _pair()
    batch = _batch(2)
    with torch.no_grad():
        found = handle.model.eval()(**batch, task="all")
        expected = padded.eval()(**batch, task="all")
    assert torch.equal(found.logits, expected.logits)
    assert "no training forward with such arguments was tried" in str(handle.packing_report())
    assert packed_forwards(handle) == 1


def test_a_number_that_counts_up_is_not_tried_for_ever():
    handle, padded = _pair()
    for count in range(1, 13):
        Tasks.forwards.clear()
        packed = _is_packed(handle, _batch(2), count=count)
        assert packed == (count <= 8)
        assert (len(Tasks.forwards) == 1) == (count > 8)
    _assert_same(handle, padded, _batch(2), count=20)
    assert _is_packed(handle, _batch(2))


def test_ranks_pack_the_first_kind_alone(monkeypatch):
    """Another one may come on one rank only, which would wait for the others in its trial."""
    handle, padded = _pair()
    monkeypatch.setattr(type(handle.freezer), "share", property(lambda self: bytes))
    handle.freezer.packer.remove()
    assert _is_packed(handle, _batch(1))
    Tasks.forwards.clear()
    assert not _is_packed(handle, _batch(2), task="double")
    assert Tasks.forwards == ["double"]
    _assert_same(handle, padded, _batch(3), task="all")
    assert _is_packed(handle, _batch(4))


def test_arguments_that_need_gradients_are_not_tried_later():
    """They may be outputs of the step under way, with which a stand-in of a forward goes on."""
    handle, padded = _pair()
    batch, logits = _batch(2), []
    ids = batch.pop("input_ids")
    for model in (padded, handle.model):
        vectors = model.get_input_embeddings()(ids)
        Tasks.forwards.clear()
        logits.append(_step(model, batch, inputs_embeds=vectors)["logits"])
        assert len(Tasks.forwards) == 1
    assert torch.equal(*logits)
    assert packed_forwards(handle) == 1
    assert "as the model's own outputs do" in str(handle.packing_report())
