"""Arguments of another kind than those of the first trial are tried by themselves."""

from __future__ import annotations

import enum
from typing import ClassVar

import pytest
import torch
import transformers as hf
from packed_models import LEFT, MIXED, RIGHT, batch_of, packed_forwards, patched
from tiny_models import tiny_model
from torch.nn import functional


class Task(enum.Enum):
    FIRST = 1
    ALL = 2


SEES_PADDING = ["all", ["all"] * 4, Task.ALL, torch.tensor(7)]


class Tasks(hf.BertForSequenceClassification):
    """Other tasks than these change nothing about tokens."""

    forwards: ClassVar[list[object]] = []

    def forward(self, input_ids=None, attention_mask=None, task="first", features=None, **more):
        self.forwards.append(task)
        if (task[0] if isinstance(task, list) else task) in ("all", Task.ALL, 7):
            attention_mask = torch.ones_like(attention_mask)
        more.pop("count", None)
        if task == "tokens":
            hidden = self.bert(input_ids, attention_mask).last_hidden_state
            loss = (hidden.pow(2).mean(-1) * attention_mask).sum()
            return hf.modeling_outputs.TokenClassifierOutput(loss=loss, logits=hidden)
        output = super().forward(input_ids, attention_mask, **more)
        if task == "double":
            output.logits = 2 * output.logits
        return output


def _models():
    models = [tiny_model("bert-sequence"), tiny_model("bert-sequence")]
    for model in models:
        model.__class__ = Tasks
    return patched(models[0]), models[1]


def _pair():
    """A model that packs, trained with its first task for a step, and one that does not."""
    handle, padded = _models()
    assert _is_packed(handle, _batch(1))
    return handle, padded


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
    mask = batch["attention_mask"]
    logits = output.logits.detach()
    return {**found, "logits": logits[mask != 0] if logits.shape[:2] == mask.shape else logits}


def _assert_same(handle, padded, batch, **more):
    found, expected = _step(handle.model, batch, **more), _step(padded, batch, **more)
    assert found.keys() == expected.keys()
    largest = max(t.abs().max().item() for t in expected.values())
    for name, tensor in expected.items():
        scale = max(tensor.abs().max().item(), 1e-2 * largest)
        assert (found[name] - tensor).abs().max().item() <= 2e-5 * scale, name


@pytest.mark.parametrize("task", SEES_PADDING, ids=["word", "list", "enum", "scalar"])
def test_a_task_that_sees_padding_runs_padded_and_the_others_packed(task):
    handle, padded = _pair()
    for seed, spans in ((2, RIGHT), (3, LEFT), (4, MIXED)):
        batch = _batch(seed, spans)
        _assert_same(handle, padded, batch, task=task)
        _assert_same(handle, padded, batch, task="double")
        _assert_same(handle, padded, batch)
    assert packed_forwards(handle) == 1 + 2 * 3
    assert "packing does not fit these arguments: packed, an output" in str(handle.packing_report())


@pytest.mark.parametrize("first", ["first", "tokens"])
def test_tasks_that_read_other_columns_all_run_packed(first):
    """One reads the first column, padding or not, and the other no place that is padding."""
    handle, padded = _models()
    for seed in range(1, 4):
        for task in (first, "tokens" if first == "first" else "first"):
            _assert_same(handle, padded, _batch(seed), task=task)
    assert packed_forwards(handle) == 6
    _assert_same(handle, padded, _batch(4, LEFT))


def test_a_first_task_that_sees_padding_keeps_no_other_from_packing():
    handle, padded = _models()
    assert not _is_packed(handle, _batch(1), task="all")
    assert _is_packed(handle, _batch(2))
    _assert_same(handle, padded, _batch(3), task="all")
    assert packed_forwards(handle) == 1


def test_a_kind_is_tried_once():
    handle, _ = _pair()
    _step(handle.model, _batch(2), task="double")
    Tasks.forwards.clear()
    for seed in range(3, 6):
        _step(handle.model, _batch(seed), task="double")
        _step(handle.model, _batch(seed))
    assert Tasks.forwards == ["double", "first"] * 3


def test_evaluation_needs_no_labels_and_no_trial():
    handle, padded = _pair()
    batch = _batch(2)
    del batch["labels"]
    Tasks.forwards.clear()
    with torch.no_grad():
        found = handle.model.eval()(**batch, return_dict=True)
        expected = padded.eval()(**batch)
    assert len(Tasks.forwards) == 2
    assert packed_forwards(handle) == 2
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_tried_without_gradients_and_training_again(around):
    handle, padded = _pair()
    batch = _batch(2)
    for task in ("all", "double"):
        with around():
            found = handle.model.eval()(**batch, task=task)
            expected = padded.eval()(**batch, task=task)
        torch.testing.assert_close(found.logits, expected.logits)
    assert packed_forwards(handle) == 2
    Tasks.forwards.clear()
    _assert_same(handle, padded, batch, task="double")
    assert len(Tasks.forwards) > 2
    assert packed_forwards(handle) == 3


def test_a_loss_without_labels_that_comes_later_is_looked_at():
    handle, _ = _pair()
    for seed in range(2, 6):
        _step(handle.model, _batch(seed))
    batch = _batch(6)
    del batch["labels"]
    with pytest.warns(UserWarning, match="the loss reads .* at padding"):
        handle.model(**batch, task="tokens").logits.mean(1).pow(2).sum().backward()


def test_a_number_that_counts_up_is_tried_four_times():
    handle, padded = _pair()
    for count in range(1, 8):
        Tasks.forwards.clear()
        assert _is_packed(handle, _batch(2), count=count)
        assert (len(Tasks.forwards) == 1) == (count > 4)
    _assert_same(handle, padded, _batch(2), count=20)


def test_words_are_not_tried_for_ever():
    handle, _ = _pair()
    packed = [_is_packed(handle, _batch(2), task=f"{number}") for number in range(20)]
    assert packed == [number < 15 for number in range(20)]
    Tasks.forwards.clear()
    assert not _is_packed(handle, _batch(2), task="new")
    assert Tasks.forwards == ["new"]
    assert "no forward with such arguments was tried" in str(handle.packing_report())
    assert _is_packed(handle, _batch(2), task="3")


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


def test_outputs_of_the_step_under_way_are_not_tried():
    """A stand-in of a forward would go on with what a trial returns."""
    handle, _ = _pair()
    batch = _batch(2)
    features = {"embeddings": handle.model.get_input_embeddings()(batch["input_ids"])}
    Tasks.forwards.clear()
    assert not _is_packed(handle, batch, features=features)
    assert Tasks.forwards == ["first"]


def test_vectors_that_need_gradients_run_packed():
    handle, padded = _pair()
    batch, found = _batch(2), []
    ids = batch.pop("input_ids")
    for model in (handle.model, padded):
        vectors = model.get_input_embeddings()(ids)
        found.append(_step(model, batch, inputs_embeds=vectors)["logits"])
    torch.testing.assert_close(*found)
    assert packed_forwards(handle) == 2


def test_keys_and_values_of_evaluation_are_whole_after_training_without():
    model, padded = tiny_model("llama-causal-lm"), tiny_model("llama-causal-lm").eval()
    handle = patched(model)
    batch = batch_of("llama-causal-lm", LEFT)
    model(**batch, use_cache=False).loss.backward()
    assert packed_forwards(handle) == 1
    del batch["labels"]
    with torch.no_grad():
        found, expected = model.eval()(**batch), padded(**batch)
    one, other = (output.past_key_values.layers[0].keys for output in (found, expected))
    assert torch.equal(one, other)


def test_a_loss_of_logits_is_as_good_as_one_of_labels():
    handle, padded = _pair()
    batch = _batch(2)
    labels = batch.pop("labels")
    for model in (handle.model, padded):
        model.zero_grad()
        functional.cross_entropy(model(**batch).logits, labels).backward()
    one, other = (model.classifier.weight.grad for model in (handle.model, padded))
    torch.testing.assert_close(one, other)
    assert packed_forwards(handle) == 2
