"""What a trial finds out about a prefix: what it reads, and whether that alone decides it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cached_models import BLOCKS, blocks_of, cpu_cache, patched_at, rows_entering
from proofs import counted_runs, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import PatchHandle, UnsupportedModelError, random_state
from progtuning_kernels.cache import side_forwards, trial
from progtuning_kernels.model.call import Call, UnknownContent


def test_stages_without_a_fixed_prefix_are_bypassed():
    inputs = tiny_inputs("bert-sequence")

    def reason(handle: PatchHandle) -> str:
        for _ in range(2):
            gradients(handle.model, inputs)
        report = handle.cache_report()
        assert report.state == "bypassed" and report.served_steps == 0
        assert report.reason in str(handle.truncation_report())
        return report.reason

    assert "nothing below" in reason(patched_at(tiny_model("bert-sequence"), 0, cache=cpu_cache()))
    model = tiny_model("bert-sequence", dropout=True)
    assert "frozen_mode" in reason(patched_at(model, 2, cache=cpu_cache(), frozen_mode="train"))
    model = tiny_model("bert-masked-lm")
    handle = patched_at(model, 2, cache=cpu_cache(), tied="head_only")
    inputs = tiny_inputs("bert-masked-lm")
    assert "trains below" in reason(handle)


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("bart-sequence", lambda m: setattr(m.model.encoder, "dropout", 0.5), "no fixed function"),
        ("bart-sequence", lambda m: setattr(m.model.encoder, "layerdrop", 0.5), "layerdrop"),
        (
            "llama-causal-lm",
            lambda m: setattr(m.config, "rope_parameters", {"rope_type": "dynamic"}),
            "dynamic",
        ),
        ("t5-sequence", lambda m: setattr(m.transformer.encoder.dropout, "p", 0.5), None),
    ],
)
def test_prefixes_that_depend_on_chance_or_on_the_batch_are_refused(name, change, reason):
    model = tiny_model(name)
    change(model)
    boundary = 2
    handle = patched_at(model, boundary, cache=cpu_cache())
    inputs = tiny_inputs(name)
    for _ in range(2):
        model(**inputs).loss.backward()
    report = handle.cache_report()
    if reason is None:  # that module belongs to block 1, which is held in eval mode
        assert report.served_steps == 1
    else:
        assert report.served_steps == 0 and reason in report.reason


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class OwnModel(nn.Module):
    """Four blocks; `read(model, x, y)` is what happens to the embeddings (B, T, C) before them."""

    def __init__(self, read: Callable[..., torch.Tensor] = lambda model, x, y: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.table = nn.Embedding(50, 16), nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(OwnBlock() for _ in range(BLOCKS))
        self.head = nn.Linear(16, 11)
        self.read = read

    def run(self, ids: torch.Tensor, y: Any = None) -> torch.Tensor:
        x = self.read(self, self.embed(ids), y)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.run(input_ids)


class _Labelled(OwnModel):
    def forward(self, input_ids: torch.Tensor, labels: Any) -> torch.Tensor:
        return self.run(input_ids, labels)


class _Conditioned(OwnModel):
    def forward(self, input_ids: torch.Tensor, condition: Any) -> torch.Tensor:
        return self.run(input_ids, condition)


class _ClassLabelled(OwnModel):
    def forward(self, input_ids: torch.Tensor, class_labels: Any) -> torch.Tensor:
        return self.run(input_ids, class_labels)


def cached_and_untouched(model: OwnModel) -> tuple[PatchHandle, nn.Module]:
    """A model patched with a cache, in training mode, and a copy that is left alone."""
    untouched = copy.deepcopy(model)
    return patched_at(model.train(), 2, cache=cpu_cache()), untouched.train()


def own_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(seed))


def _embedded(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + model.table(y)[:, None]


def _through_a_copy(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = y.to(torch.float64)
    return x * (y > 4).to(x.dtype)[:, None, None]


def _through_an_index(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + model.table.weight[y][:, None]


def _through_numpy(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + torch.tensor(y.numpy() * 0.5, dtype=x.dtype)[:, None, None]


def _through_a_number(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * float(y.sum())


def _through_a_branch(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * 2 if (y > 4).any() else x


def _through_a_shape(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * len(y[y > 4])


def _summed(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y.sum()


def _written_into(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(y), dtype=x.dtype)
    out.copy_(y)
    return x + out[:, None, None]


@pytest.mark.parametrize("cls", [_Labelled, _ClassLabelled])
@pytest.mark.parametrize(
    "read",
    [
        _embedded,
        _through_a_copy,
        _through_an_index,
        _written_into,
    ],
)
def test_labels_that_the_prefix_reads_are_in_the_key(cls, read):
    handle, untouched = cached_and_untouched(cls(read))
    labels = torch.tensor([[1, 2, 7, 8], [1, 2, 3, 4], [1, 2, 7, 8], [10, 2, 7, 8]])
    for y in labels:
        assert torch.equal(handle.model(own_ids(), y), untouched(own_ids(), y))
    report = handle.cache_report()
    assert report.hits == 2 + 4 + 3 and report.rows == {2: 4 + 2 + 1}


@pytest.mark.parametrize(
    "read", [_through_numpy, _through_a_number, _through_a_branch, _through_a_shape, _summed]
)
@pytest.mark.parametrize("cls", [_Labelled, _Conditioned])
def test_what_a_whole_batch_is_computed_from_is_refused(cls, read):
    handle, untouched = cached_and_untouched(cls(read))
    labels = torch.tensor([[1, 2, 7, 8], [1, 2, 3, 4], [1, 2, 7, 8]])
    for y in labels:
        assert torch.equal(handle.model(own_ids(), y), untouched(own_ids(), y))
    report = handle.cache_report()
    assert report.served_steps == 0 and report.state == "bypassed"
    assert "other rows" in report.reason or "below the boundary takes values" in report.reason


def _above_only(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    model.shifted = y.to(torch.int32).roll(1)  # as decoders make their inputs of labels
    return x


def test_labels_that_the_prefix_does_not_read_share_a_row():
    handle, untouched = cached_and_untouched(_Labelled(_above_only))
    for y in torch.tensor([[1, 2, 7, 8], [1, 2, 3, 4], [0, 0, 0, 0]]):
        assert torch.equal(handle.model(own_ids(), y), untouched(own_ids(), y))
    report = handle.cache_report()
    assert report.served_steps == 2 and report.rows == {2: 4}


@pytest.mark.parametrize("read", [lambda m, x, y: x * (1 if y is None else y), lambda m, x, y: x])
def test_plain_values_are_left_out_of_the_key_where_the_prefix_does_without(read):
    handle, untouched = cached_and_untouched(_Labelled(read))
    for y in (2, 3, 2, 3):
        assert torch.equal(handle.model(own_ids(), y), untouched(own_ids(), y))
    reads = not torch.equal(untouched(own_ids(), 2), untouched(own_ids(), 3))
    assert handle.cache_report().served_steps == (2 if reads else 3)


class _Counted(OwnModel):
    def forward(self, input_ids: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        return self.run(input_ids) / num_items_in_batch


def test_a_count_that_differs_in_every_batch_is_one_kind_of_arguments():
    handle, untouched = cached_and_untouched(_Counted())
    for count in range(1, 12):
        assert torch.equal(handle.model(own_ids(), count), untouched(own_ids(), count))
    assert handle.cache_report().served_steps == 10


_ELSEWHERE = torch.ones(16)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_tensor_that_is_set_on_the_model_is_watched(in_place):
    handle, untouched = cached_and_untouched(OwnModel(lambda model, x, y: x + model.condition))
    conditions = [torch.full((16,), float(value)) for value in (1, 1, 2, 2, 3)]
    for model in (handle.model, untouched):
        model.condition = conditions[0].clone()
    for i, condition in enumerate(conditions):
        for model in (handle.model, untouched):
            if in_place and i % 2 == 0:
                model.condition.copy_(condition)
            elif i % 2 == 0:
                model.condition = condition.clone()
        assert torch.equal(handle.model(own_ids()), untouched(own_ids()))
    assert handle.cache_report().served_steps == 2


@pytest.mark.parametrize("carrier", [lambda model: model, lambda model: model.config])
def test_a_number_that_is_set_between_forwards_is_noticed_where_the_prefix_reads_it(carrier):
    class Configured(OwnModel):
        def __init__(self) -> None:
            super().__init__(lambda model, x, y: x * carrier(model).scale)
            self.config = SimpleNamespace()
            carrier(self).scale = 1.0

    handle, untouched = cached_and_untouched(Configured())
    with counted_runs(blocks_of(handle)) as runs:
        for step, scale in enumerate((1.0, 1.0, 2.0, 2.0, 2.0, 1.0)):
            for model in (handle.model, untouched):
                carrier(model).scale, carrier(model).step = scale, step  # one that nobody reads
            if step:
                handle.truncation_report()  # a forward of another kind hides no change
            for seed in range(2):
                assert torch.equal(handle.model(own_ids(seed)), untouched(own_ids(seed)))
    report = handle.cache_report()
    assert report.served_steps == 6 and report.rows == {2: 8}, runs


def test_a_tensor_that_nobody_can_watch_is_refused():
    handle, untouched = cached_and_untouched(OwnModel(lambda model, x, y: x + _ELSEWHERE))
    for _ in range(2):
        assert torch.equal(handle.model(own_ids()), untouched(own_ids()))
    assert "that no module holds" in handle.cache_report().reason
    model = OwnModel(lambda model, x, y: x + model.head.weight.mean())
    handle = patched_at(model, 2, cache=cpu_cache())
    with pytest.raises(UnsupportedModelError):  # by the proof
        handle.model(own_ids())
    assert "weight, which trains" in handle.cache_report().reason


def test_random_numbers_of_the_device_are_watched(monkeypatch):
    """Another generator of the CPU plays the one of a GPU."""
    own = torch.Generator()

    def set_state(state: list[torch.Tensor], gpus: Any) -> None:
        torch.set_rng_state(state[0])
        own.set_state(state[1])

    for module in (random_state, side_forwards, trial):
        monkeypatch.setattr(
            module, "torch_state", lambda gpus=(): [torch.get_rng_state(), own.get_state()]
        )
        monkeypatch.setattr(module, "set_torch_state", set_state)

    def dropout(model: OwnModel, x: torch.Tensor, y: Any) -> torch.Tensor:
        return x * (torch.rand(x.shape, generator=own) > 0.3) / 0.7

    handle, untouched = cached_and_untouched(OwnModel(dropout))
    for step in range(3):
        own.manual_seed(step)
        found = handle.model(own_ids())
        own.manual_seed(step)
        assert torch.equal(found, untouched(own_ids()))
    assert "no fixed function" in handle.cache_report().reason

    def to_no_effect(model: OwnModel, x: torch.Tensor, y: Any) -> torch.Tensor:
        return x if torch.rand([], generator=own) < 0.0 else x + 1

    handle, untouched = cached_and_untouched(OwnModel(to_no_effect))
    for step in range(3):
        own.manual_seed(step)
        found, after = handle.model(own_ids()), own.get_state()
        own.manual_seed(step)
        assert torch.equal(found, untouched(own_ids())) and torch.equal(after, own.get_state())
    assert handle.cache_report().served_steps == 2


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(4) < 0.01,
        lambda: torch.rand(4) > 0.99,
        lambda: torch.rand(4, dtype=torch.bfloat16) > 0.99,
        lambda: torch.rand_like(torch.ones(4)) < 0.01,
        lambda: torch.empty(4).uniform_() < 0.01,
        lambda: torch.bernoulli(torch.full((4,), 0.01)) == 1,
        lambda: torch.empty(4).bernoulli_(0.01) == 1,
    ],
)
def test_what_happens_by_chance_and_seldom_is_noticed(draw):
    def label_dropout(model: OwnModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + model.table(torch.where(draw(), 10, y))[:, None]

    handle, _ = cached_and_untouched(_ClassLabelled(label_dropout))
    handle.model(own_ids(), torch.tensor([1, 2, 3, 4]))
    assert "no fixed function" in handle.cache_report().reason


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_and_numpy_are_watched(draw):
    handle, untouched = cached_and_untouched(OwnModel(lambda model, x, y: x * draw()))
    for step in range(3):
        results = []
        for model in (handle.model, untouched):
            random.seed(step), np.random.seed(step)
            results.append(model(own_ids()))
        assert torch.equal(*results)
    assert "Python or numpy" in handle.cache_report().reason


def test_masks_that_wav2vec2_draws_are_new_in_every_step():
    model = tiny_model("wav2vec2-audio")
    model.config.update({"apply_spec_augment": True, "mask_time_prob": 0.3, "mask_time_length": 2})
    handle, untouched = cached_and_untouched(model)
    values = tiny_inputs("wav2vec2-audio")["input_values"]
    for step in range(3):
        results = []
        for one in (handle.model, untouched):
            np.random.seed(step)
            results.append(one(values).logits)
        assert torch.equal(*results)
    assert handle.cache_report().state == "bypassed"


def test_a_model_called_with_one_dict_into_which_it_writes():
    class Sentences(OwnModel):
        def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            features["sentence_embedding"] = self.run(features["input_ids"])
            return features

    handle, untouched = cached_and_untouched(Sentences())
    several = torch.cat([own_ids(), own_ids(1)])
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [3, 4, 0, 1], [3, 4, 0, 1]):
        batch = {"input_ids": several[rows]}
        found = handle.model(batch)
        assert found is batch and list(found) == ["input_ids", "sentence_embedding"]
        expected = untouched({"input_ids": several[rows]})["sentence_embedding"]
        assert torch.equal(found["sentence_embedding"], expected)
    assert handle.cache_report().served_steps == 2 and handle.cache_report().rows == {2: 8}
    handle.model(transformers.BatchEncoding({"input_ids": several[[5, 4]]}))
    batch = {"input_ids": torch.cat([several[:3], own_ids(9)[:1]])}  # one row is missing
    with rows_entering(handle.model.blocks[0]) as entered:
        assert list(handle.model(batch)) == ["input_ids", "sentence_embedding"]
    assert entered == [1] and handle.cache_report().served_steps == 4
    with pytest.raises(KeyError, match="input_ids"):
        handle.model({})  # the model's own error
    with pytest.raises(UnknownContent, match="two arguments"):
        _ = Call(("one",), ({"a": 1},), {"a": 2}).named


def test_a_forward_without_a_tensor_is_left_to_the_model():
    handle, _ = cached_and_untouched(OwnModel())
    with pytest.raises(TypeError, match="embedding"):
        handle.model(None)
    assert "no argument is a tensor" in str(handle.cache_report())


@contextmanager
def counted_trials(monkeypatch) -> Iterator[list[Any]]:
    trials: list[Any] = []
    learn = trial.Trial.learn_path
    monkeypatch.setattr(
        trial.Trial,
        "learn_path",
        lambda self, call, *args, **options: (
            trials.append(call) or learn(self, call, *args, **options)
        ),
    )
    yield trials


def test_a_trial_that_fails_alone_is_remembered(monkeypatch):
    def with_gradients(model: OwnModel, x: torch.Tensor, y: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            raise RuntimeError("train me\nplease")
        return x

    handle, untouched = cached_and_untouched(OwnModel(with_gradients))
    with counted_trials(monkeypatch) as trials:
        with pytest.raises(IndexError):
            handle.model(own_ids() + 100)  # no trial will do: nothing is remembered
        for _ in range(3):
            assert torch.equal(handle.model(own_ids()), untouched(own_ids()))
        assert len(trials) == 2
    report = handle.cache_report()
    assert report.state == "bypassed"
    assert report.reason == "a trial of its forward raises RuntimeError: train me"


def test_a_prefix_that_changes_in_every_forward_switches_it_off(monkeypatch):
    handle, untouched = cached_and_untouched(OwnModel())
    with counted_trials(monkeypatch) as trials, pytest.warns(UserWarning, match="changes between"):
        for _ in range(20):
            for model in (handle.model, untouched):
                with torch.no_grad():
                    model.blocks[1].linear.weight.add_(0.01)
            assert torch.equal(handle.model(own_ids()), untouched(own_ids()))
    assert len(trials) < 10
    report = handle.cache_report()
    assert report.state == "off" and "block 1" in report.reason


def test_a_model_that_a_stand_in_does_not_fit_is_learnt_once(monkeypatch):
    sizes = dict(hidden_size=32, num_layers=BLOCKS, num_heads=4)
    words = dict(input_vocab_size=50, output_vocab_size=50, n_codes_total=4, n_codes_given=1)
    model = transformers.BarkFineModel(transformers.BarkFineConfig(**sizes, **words))
    inputs = {"codebook_idx": 2, "input_ids": torch.randint(3, 50, (3, 6, 4))}
    handle, untouched = cached_and_untouched(model)
    with counted_trials(monkeypatch) as trials:
        for _ in range(3):
            assert torch.equal(handle.model(**inputs)[0], untouched(**inputs)[0])
    assert len(trials) == 1
    report = handle.cache_report()
    assert report.served_steps == 2 or report.state == "bypassed"


class _Gathering(OwnBlock):
    """A block that does something beside its work, as `does(block, x)` says."""

    does: Callable[..., Any] = staticmethod(lambda block, x: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.does(self, x)
        return super().forward(x)


def _served_as_untouched(model: nn.Module, change: Callable[..., None] = lambda m, e: None) -> str:
    handle, untouched = cached_and_untouched(model)
    for epoch in range(4):
        for each in (handle.model, untouched):
            change(each, epoch)
        for seed in range(3):
            assert torch.equal(handle.model(own_ids(seed)), untouched(own_ids(seed)))
    return handle.cache_report().reason


def test_trials_leave_no_trace_in_buffers_generators_and_inputs():
    class Tracing(OwnModel):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(16)
            self.register_buffer("mean", torch.zeros(()))
            self.generator = torch.Generator()

        def __deepcopy__(self, memo):
            return Tracing()

        def forward(self, input_ids):
            x = self.embed(input_ids)
            input_ids.clamp_(min=1)
            for block in self.blocks:
                x = block(x)
            self.mean = 0.5 * self.mean + 1
            noise = torch.rand(11, generator=self.generator)
            return self.head(self.norm(x.mean(1))) * self.mean + noise

    torch.manual_seed(0)
    model = Tracing()
    handle, untouched = cached_and_untouched(model)
    untouched.load_state_dict(model.state_dict())
    for seed in range(4):
        one, other = own_ids(seed), own_ids(seed)
        assert torch.equal(handle.model(one), untouched(other)) and torch.equal(one, other)
    handle.unpatch()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(untouched.named_buffers())[name]), name


def test_rows_that_are_computed_before_a_forward_leave_no_trace_in_buffers():
    class Counting(OwnModel):
        def __init__(self):
            super().__init__()
            self.register_buffer("forwards", torch.zeros(()))

        def forward(self, input_ids):
            self.forwards += 1
            return self.run(input_ids)

    handle, untouched = cached_and_untouched(Counting())
    for seed in (0, 1, 2, 0, 1):
        assert torch.equal(handle.model(own_ids(seed)), untouched(own_ids(seed)))
    assert handle.model.forwards == 5 and handle.cache_report().served_steps == 2


@pytest.mark.parametrize("kept", ["attribute", "hook", "integers"])
def test_what_a_frozen_block_hands_on_beside_its_output_keeps_it_running(kept):
    class Reading(OwnModel):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(_Gathering() for _ in range(BLOCKS))

        def forward(self, input_ids):
            out = super().forward(input_ids)
            return out if kept != "attribute" else out + self.blocks[0].seen.mean()

    if kept == "attribute":
        _Gathering.does = staticmethod(lambda block, x: setattr(block, "seen", x.detach() * 1))
    model = Reading()
    if kept == "hook":
        model.blocks[0].register_forward_hook(lambda module, args, output: None)
    reason = _served_as_untouched(model)
    _Gathering.does = staticmethod(lambda block, x: None)
    expected = {"attribute": "keeps a tensor in seen", "hook": "a forward hook on _Gathering"}
    assert expected.get(kept, "") in reason


def test_a_number_inside_a_frozen_block_is_watched():
    class Scaled(OwnBlock):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    model = OwnModel()
    model.blocks = nn.ModuleList(Scaled() for _ in range(BLOCKS))
    model.blocks[0].scale = 1.0
    _served_as_untouched(model, lambda m, epoch: setattr(m.blocks[0], "scale", 1.0 + epoch // 2))


def test_a_batch_of_one_row_does_not_vouch_for_larger_ones():
    handle, untouched = cached_and_untouched(
        OwnModel(lambda model, x, y: x - x.mean(0, keepdim=True))
    )
    for seed in (0, 1, 2, 0, 1, 2):
        rows = 1 if seed == 0 else 3
        ids = own_ids(seed)[:rows]
        assert torch.equal(handle.model(ids), untouched(ids))


def test_an_output_that_shows_no_tensor_is_not_compared():
    class Opaque:
        __slots__ = ("logits",)

    class Opaquely(OwnModel):
        def forward(self, input_ids):
            output = Opaque()
            output.logits = super().forward(input_ids)
            return output

    handle, _ = cached_and_untouched(Opaquely())
    handle.model(own_ids())
    handle.model(own_ids())
    assert "shows no tensor" in handle.cache_report().reason


def test_what_the_model_keeps_of_the_prefix_stays_new():
    class Keeping(OwnModel):
        def forward(self, input_ids):
            x = self.embed(input_ids)
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 0:
                    self.kept = x.detach()
            return self.head(x.mean(1))

    handle, untouched = cached_and_untouched(Keeping())
    for seed in (0, 1, 0, 1, 0, 1):
        assert torch.equal(handle.model(own_ids(seed)), untouched(own_ids(seed)))
        assert torch.equal(handle.model.kept, untouched.kept)
    assert handle.cache_report().state == "bypassed"
