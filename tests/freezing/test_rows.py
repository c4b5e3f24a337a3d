"""Rows of tensors that train: their gradient is the plain model's, and all other rows keep their
bits.
"""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial
from typing import Any

import hypothesis
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from proofs import enable_checkpointing, gradients
from tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from progtuning_kernels import (
    CheckpointError,
    MaskedAdamW,
    MilestoneSchedule,
    PatchHandle,
    PrefixCache,
    ProgressiveSchedule,
    load_checkpoint,
    patch_model,
    save_checkpoint,
)
from progtuning_kernels.cache.break_even import BreakEven
from progtuning_kernels.model.families import UnsupportedModelError
from progtuning_kernels.swaps.deferred_logits import DeferredLogits, defer
from progtuning_kernels.swaps.kinds import language_model_head

NEW = [96, 5, 9, 40, 41, 3]  # of which the inputs hold some, and some twice
OTHERS = sorted({*range(VOCABULARY)} - {*NEW})
HANDLE = "_progtuning_handle"  # None in a copy
ALL = MilestoneSchedule({0: 0})
BOTH = {"embed_tokens": NEW, "lm_head": [7, 5]}


def example(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Any]]:
    inputs = {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in tiny_inputs(name).items()
    }
    return tiny_model(name).to(dtype), inputs


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all that trains."""
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "name, rows",
    [
        ("llama-causal-lm", BOTH),
        ("gpt2-causal-lm", {"lm_head": NEW}),
        ("bert-masked-lm", {"bert.embeddings.word_embeddings.weight": range(3, 50)}),
        ("gemma3-causal-lm", {"embed_tokens": torch.tensor(NEW)}),  # scaled after the lookup
        ("t5-seq2seq-lm", {"shared": NEW}),  # of encoder, decoder and head
        ("bart-seq2seq-lm", {"shared": NEW}),
        ("roberta-sequence", {"word_embeddings": [1, *NEW]}),  # 1 is its padding
        ("bert-sequence", {"position_embeddings": [0, 4], "token_type_embeddings": [0]}),
        ("bert-sequence", {"classifier": [2], "layer.2.attention.self.query": [0, 31]}),
    ],
)
def test_gradients_are_those_of_the_plain_model(name, rows):
    (model, inputs), (patched, _) = example(name), example(name)
    expected = gradients(model, inputs)
    loss = model(**inputs).loss
    patch_model(patched, ALL, rows=rows, packing="off")
    assert torch.equal(patched(**inputs).loss, loss)
    found = gradients(patched, inputs)
    for key, ids in rows.items():
        held = (n for n in expected if f".{key}." in f".{n}.")
        here = next(held, "transformer.wte.weight")  # GPT-2's head has it, too
        leaf, whole = found.pop(f"{here}_rows"), expected.pop(here)
        chosen = torch.tensor(sorted(torch.as_tensor(list(ids)).tolist()))
        torch.testing.assert_close(leaf, whole[chosen], rtol=1e-12, atol=1e-16)
        assert leaf.abs().sum() > 0
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


OPTIMIZERS = {
    "adamw": lambda h: torch.optim.AdamW(h.param_groups(weight_decay=0.1), lr=1e-2),
    "sgd": lambda h: torch.optim.SGD(h.model.parameters(), lr=1e-2, weight_decay=0.1, momentum=0.9),
    "masked": lambda h: MaskedAdamW(
        h.param_groups(weight_decay=0.1), lr=1e-2, max_grad_norm=1.0, on_freeze="release"
    ),
    "in backward": lambda h: MaskedAdamW(
        h.param_groups(weight_decay=0.1), lr=1e-2, in_backward=True
    ),
    "8 bit": lambda h: MaskedAdamW(
        h.param_groups(weight_decay=0.1), lr=1e-2, state_dtype="8bit", on_freeze="offload"
    ),
    "masters": lambda h: MaskedAdamW(
        h.param_groups(weight_decay=0.1), lr=1e-2, master_weights=True
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_all_other_rows_keep_their_bits_and_state_is_of_the_rows(kind):
    model, inputs = example(
        "llama-causal-lm", torch.bfloat16 if kind == "masters" else torch.float32
    )
    start = {k: v.clone() for k, v in model.state_dict().items()}
    steps = 20 if kind == "sgd" else 6
    with patch_model(model, ProgressiveSchedule(2, steps), rows=BOTH) as handle:
        optimizer = OPTIMIZERS[kind](handle)
        states: set[tuple[int, ...]] = set()
        for step in range(steps):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of = dict(model.named_parameters())["model.embed_tokens.weight_rows"]
            assert of.requires_grad == (2 * step < steps)
            states |= {
                v.shape
                for own in optimizer.state.values()
                for v in own.values()
                if torch.is_tensor(v) and v.ndim == 2
            }
            handle.advance()
        assert kind in ("sgd", "adamw", "8 bit") or not optimizer.state.get(of)
        assert (len(NEW), 32) in states and (VOCABULARY, 32) not in states
    for name, ids in (("model.embed_tokens.weight", NEW), ("lm_head.weight", [7, 5])):
        changed = (model.state_dict()[name] != start[name]).any(dim=1).nonzero().flatten()
        assert changed.tolist() == sorted(ids)


def test_rows_end_where_the_whole_tensor_would_take_them():
    (plain, inputs), (model, _) = example("gpt2-causal-lm"), example("gpt2-causal-lm")
    start = plain.transformer.wte.weight.detach().clone()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    with patch_model(model, ALL, rows={"wte": NEW}, packing="off") as handle:
        of_rows = torch.optim.AdamW(handle.param_groups(weight_decay=0.1), lr=1e-2)
        of_rows.param_groups[1]["weight_decay"] = 0.1  # of biases and norms, as there
        for _ in range(4):
            for one, its in ((plain, optimizer), (model, of_rows)):
                one(**inputs).loss.backward()
                its.step()
                its.zero_grad()
            with torch.no_grad():
                plain.transformer.wte.weight[OTHERS] = start[OTHERS]
            handle.advance()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-9, atol=1e-12)


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(found):
            if torch.is_tensor(t) and not func.is_view:
                self.seen.add(tuple(t.shape))
        return found


@pytest.mark.parametrize("rows", [None, NEW])
def test_backward_makes_nothing_of_the_size_of_the_tensor(rows):
    model, inputs = example("gpt2-causal-lm", torch.float32)
    if rows is not None:
        patch_model(model, ALL, rows={"wte": rows})
        model(**inputs)  # the forward that proves
    loss = model(**inputs).loss
    with _Shapes() as shapes:
        loss.backward()
    whole = {(VOCABULARY, 32), (32, VOCABULARY)} & shapes.seen
    assert bool(whole) == (rows is None)
    if rows is not None:
        assert (len(rows), 32) in shapes.seen and model.transformer.wte.weight.grad is None


@pytest.mark.parametrize(
    "mode", ["reentrant", "checkpointed", "autocast", "compiled", "packed", "hooked"]
)
def test_gradients_are_the_same_in_every_mode(mode):
    model, inputs = example("llama-causal-lm", torch.float32)
    around = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()
    if mode == "autocast":
        with around:
            whole = gradients(model, inputs)
        expected = {
            f"{n}_rows": whole[n][sorted(BOTH[k])]
            for k, n in (
                ("embed_tokens", "model.embed_tokens.weight"),
                ("lm_head", "lm_head.weight"),
            )
        }
    if mode == "hooked":  # as by accelerate
        for part in (model.model.embed_tokens, model.lm_head):
            part.forward = partial(type(part).forward, part)
    handle = patch_model(model, ALL, rows=BOTH, packing="on" if mode == "packed" else "off")
    gradients(model, inputs)
    if mode != "autocast":
        expected = gradients(model, inputs)
    if mode in ("reentrant", "checkpointed"):
        enable_checkpointing(model, use_reentrant=mode == "reentrant")
    if mode == "compiled":
        for part in (model.model.embed_tokens, model.lm_head):
            part.compile(backend="eager", fullgraph=True)
    if mode in ("packed", "hooked"):
        handle.unpatch()
        for part in (model.model.embed_tokens, model.lm_head):
            vars(part).pop("forward", None)
        patch_model(model, ALL, rows=BOTH, packing="off")
    with around:
        found = gradients(model, inputs)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_the_gradient_of_a_gradient_is_that_of_the_plain_model():
    (model, inputs), (patched, _) = example("llama-causal-lm"), example("llama-causal-lm")
    patch_model(patched, ALL, rows=BOTH, packing="off")
    for one in (model, patched):
        one.set_attn_implementation("eager")  # the others have no second derivative
        embedded = one.get_input_embeddings()(inputs["input_ids"])
        loss = one(inputs_embeds=embedded, labels=inputs["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
        gradient.square().sum().backward()
    for part, ids in (("embed_tokens", NEW), ("lm_head", [7, 5])):
        whole, leaf = (
            next(p.grad for n, p in one.named_parameters() if f"{part}.{name}" in n)
            for one, name in ((model, "weight"), (patched, "weight_rows"))
        )
        torch.testing.assert_close(leaf, whole[sorted(ids)], rtol=1e-10, atol=1e-16)


def test_settle_writes_rows_that_an_average_has_replaced():
    model, inputs = example("llama-causal-lm")
    handle = patch_model(model, ALL, rows={"embed_tokens": NEW})
    model(**inputs).loss.backward()
    handle.advance()
    model.model.embed_tokens.weight_rows.data.fill_(0.25)  # past the version counter
    handle.settle()
    assert model.model.embed_tokens.weight[NEW].unique().tolist() == [0.25]


def test_outputs_may_be_written_into_and_evaluation_is_as_ever():
    model, inputs = example("phi-causal-lm")  # whose head has a bias
    expected = model(**inputs).logits.detach()
    patch_model(model, ALL, rows=BOTH, packing="off")
    embedded = model.model.embed_tokens(inputs["input_ids"]).mul_(2)
    logits = model(**inputs).logits
    logits[..., 0] = 0
    (embedded.sum() + logits.sum()).backward()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_use_that_gives_the_rows_no_gradient_is_refused():
    model, inputs = example("llama-causal-lm")
    kept = model.model.embed_tokens.weight  # read in a forward, the module would give it a route
    model.lm_head.register_forward_hook(lambda module, args, output: output + kept.sum())
    handle = patch_model(model, ALL, rows={"embed_tokens": NEW})
    with pytest.raises(UnsupportedModelError, match="embed_tokens.weight is used by other code"):
        model(**inputs)
    assert not model.model.embed_tokens.weight.requires_grad
    handle.unpatch()
    patch_model(model, ALL)
    model(**inputs).loss.backward()


def snapshot(model: nn.Module) -> dict[str, Any]:
    held = {
        name: (type(m), {k: v for k, v in vars(m).items()}, dict(m._parameters))
        for name, m in model.named_modules()
    }
    return {**held, "flags": [p.requires_grad for p in model.parameters()]}


@pytest.mark.parametrize("name", ["gpt2-causal-lm", "bert-masked-lm"])
def test_unpatch_leaves_the_model_as_found_with_the_trained_rows(name):
    model, inputs = example(name)
    before, start = snapshot(model), copy.deepcopy(model.state_dict())
    key = "wte" if "gpt2" in name else "word_embeddings"
    with patch_model(model, ALL, rows={key: NEW}) as handle:
        optimizer = torch.optim.SGD(handle.param_groups(), lr=1.0)
        model(**inputs).loss.backward()
        optimizer.step()
    assert snapshot(model) == before
    weight = model.get_input_embeddings().weight.detach()
    changed = (weight != next(v for k, v in start.items() if f"{key}.weight" in k)).any(dim=1)
    assert changed.nonzero().flatten().tolist() == sorted(NEW)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_state_dicts_are_those_of_an_ordinary_model(copied):
    (model, inputs), (other, _) = example("gpt2-causal-lm"), example("gpt2-causal-lm")
    handle = patch_model(model, ALL, rows={"wte": NEW})
    optimizer = torch.optim.SGD(handle.param_groups(), lr=1.0)
    leaf = model.transformer.wte.weight_rows

    def step() -> Tensor:  # nothing brings tensor and rows together after it
        model(**inputs).loss.backward()
        optimizer.step()
        return leaf.detach().clone()

    found, state = step(), model.state_dict()
    assert [*state] == [*other.state_dict()]
    assert torch.equal(state["transformer.wte.weight"][sorted(NEW)], found)
    found, twin = step(), copied(model)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert torch.equal(twin.lm_head.weight[sorted(NEW)], found)
    for one, ordinary in zip(twin.modules(), other.modules(), strict=True):
        assert type(one) is type(ordinary) and vars(one).keys() - {HANDLE} == vars(ordinary).keys()
    twin(**inputs).loss.backward()

    fresh, _ = example("gpt2-causal-lm")
    patch_model(fresh, ALL, rows={"wte": NEW})
    assert str(fresh.load_state_dict(state)) == "<All keys matched successfully>"
    leaf = dict(fresh.named_parameters())["transformer.wte.weight_rows"]
    assert torch.equal(leaf, state["transformer.wte.weight"][sorted(NEW)])
    with torch.no_grad():
        fresh.transformer.wte.weight.fill_(0.25)
        fresh(**inputs)
    assert leaf.unique().tolist() == [0.25]


def test_new_rows_may_get_their_start_after_patching_past_the_version_counter():
    model, inputs = example("llama-causal-lm")
    handle = patch_model(model, ALL, rows={"embed_tokens": NEW})
    model.model.embed_tokens.weight.data[NEW] = 0.5
    optimizer = torch.optim.SGD(handle.param_groups(), lr=0.0)
    model(**inputs).loss.backward()
    optimizer.step()
    handle.unpatch()
    assert model.model.embed_tokens.weight[NEW].unique().tolist() == [0.5]


def run(steps: range, folder: Any, *, load: bool, ids: Any = NEW) -> tuple[nn.Module, PatchHandle]:
    model, _ = example("llama-causal-lm", torch.bfloat16)
    handle = patch_model(model, ProgressiveSchedule(2, 8), rows={"embed_tokens": ids})
    groups = handle.param_groups(weight_decay=0.1)
    optimizer = MaskedAdamW(groups, lr=1e-2, master_weights=True)
    if load:
        load_checkpoint(folder, handle, optimizer)
    for step in steps:
        model(**tiny_inputs("llama-causal-lm", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        if step == 2 and not load:
            save_checkpoint(folder, handle, optimizer)
    return model, handle


def test_a_run_that_goes_on_has_the_same_bits_and_other_rows_are_refused(tmp_path):
    whole, handle = run(range(6), tmp_path, load=False)
    resumed, _ = run(range(3, 6), tmp_path, load=True)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CheckpointError, match=r"trains of model.embed_tokens.weight is rows \[\[3"):
        run(range(0), tmp_path, load=True, ids=[4, *NEW[1:]])
    other = patch_model(tiny_model("llama-causal-lm"), ProgressiveSchedule(2, 8))
    with pytest.raises(ValueError, match="saved while these rows trained"):
        other.load_state_dict(handle.state_dict())


def test_a_cache_serves_the_rows_as_they_were_trained(monkeypatch):
    monkeypatch.setattr(BreakEven, "verdict", lambda self, rows: None)  # on, whatever it saves
    losses = []
    for cache in (None, PrefixCache(1 << 24, device="cpu")):
        model, inputs = example("llama-causal-lm", torch.float32)
        handle = patch_model(model, ProgressiveSchedule(2, 8), rows=BOTH, cache=cache)
        optimizer = torch.optim.SGD(handle.param_groups(), lr=0.5)
        for _ in range(8):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.advance()
            losses.append(loss.item())
    assert handle.cache_report().hits == 9, handle.cache_report()
    assert losses[:8] == losses[8:]


def test_an_optimizer_that_does_not_hold_the_rows_is_warned_of():
    model, inputs = example("llama-causal-lm")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = patch_model(model, ALL, rows={"embed_tokens": NEW})
    with pytest.warns(UserWarning, match="embed_tokens.weight have not changed in 8 steps") as seen:
        for _ in range(9):
            model(**inputs).loss.backward()
            optimizer.step()
            handle.advance()
    assert len(seen) == 1


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_loop_that_puts_all_other_rows_back_after_a_fused_update(evaluates):
    ended = []
    for fused in (False, True):
        model, inputs = example("llama-causal-lm", torch.float32)
        with patch_model(model, ALL, rows={"embed_tokens": NEW}, kernels="off") as handle:
            weight = model.get_input_embeddings().weight
            before = weight.detach().clone()
            optimizer = torch.optim.AdamW(handle.param_groups(lr=0.1), fused=fused)
            for _ in range(3):
                model(**inputs).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():  # as textual inversion does
                    weight[OTHERS] = before[OTHERS]
                    if evaluates:
                        model(**inputs)
                handle.advance()
        assert torch.equal(weight[OTHERS], before[OTHERS])
        assert not torch.isclose(weight[NEW], before[NEW]).all(dim=1).any()
        ended.append(weight.detach())
    assert torch.allclose(*ended, atol=1e-5)


def test_rows_train_though_peft_freezes_the_base_before_or_after():
    for late in (False, True):
        model, inputs = example("llama-causal-lm")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        outer = model if late else peft.get_peft_model(model, config)
        handle = patch_model(outer, ALL, rows={"embed_tokens": NEW})
        outer = peft.get_peft_model(model, config) if late else outer
        outer(**inputs).loss.backward()
        names = [n for n, p in handle.model.named_parameters() if p.grad is not None]
        assert next(n for n in names if "lora" not in n).endswith("embed_tokens.weight_rows")
        assert handle.active_params == sum(p.numel() for p in outer.parameters() if p.requires_grad)
        handle.unpatch()
        assert not model.get_input_embeddings().weight.requires_grad or late


def test_a_module_in_modules_to_save_goes_by_its_own_name():
    model, inputs = example("bert-sequence")
    rows = {"classifier": [1]}
    adapted = partial(peft.LoraConfig, target_modules=["query"])
    wrapped = peft.get_peft_model(copy.deepcopy(model), adapted())
    with pytest.raises(UnsupportedModelError, match="modules_to_save of the adapter's config"):
        patch_model(wrapped, ALL, rows=rows)
    model = peft.get_peft_model(model, adapted(modules_to_save=["classifier"]))
    patch_model(model, ALL, rows=rows)
    model(**inputs).loss.backward()
    assert model.classifier.modules_to_save["default"].weight_rows.grad.abs().sum() > 0


def test_what_counts_is_the_rows():
    model, inputs = example("gpt2-causal-lm")
    total = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    handle = patch_model(model, MilestoneSchedule({0: 2}), rows={"wte": NEW}, tied="head_only")
    assert handle.trainable_params == handle.active_params == len(NEW) * 32
    gradients(model, inputs)
    report = handle.truncation_report()
    report.assert_truncated()
    assert sum(unit.params for unit in report.units) == total
    assert report.units[-1].active_names == ("transformer.wte.weight_rows",)
    assert [p.shape for group in handle.param_groups() for p in group["params"]].count(
        (VOCABULARY, 32)
    ) == 0


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    ids=st.sets(st.integers(0, 10), min_size=1),
    tokens=st.lists(st.integers(0, 10), max_size=9),
    padding=st.sampled_from([None, 0, 10]),
    bias=st.booleans(),
)
def test_any_rows_and_any_tokens(ids, tokens, padding, bias):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 3, padding_idx=padding)
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.head = nn.Linear(3, 11, bias=bias)
            self.head.weight = self.table.weight

        def forward(self, tokens):
            x = self.table(tokens)
            for layer in self.layers:
                x = layer(x).tanh()
            return self.head(x)

    plain = Model().double()
    patched = copy.deepcopy(plain)
    given_tokens = torch.tensor(tokens, dtype=torch.int64)
    upstream = torch.randn(len(tokens), 11, dtype=torch.float64)
    plain(given_tokens).backward(upstream)
    patch_model(patched, ALL, rows={"table": list(ids)})
    patched(given_tokens).backward(upstream)
    expected = plain.table.weight.grad[sorted(ids)]
    torch.testing.assert_close(patched.table.weight_rows.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("reader", ["loss", "logits"])
def test_a_deferred_head_gives_the_gradient_of_its_rows(reduction, reader):
    hidden = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(33, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 33, (40,)).index_fill(0, torch.tensor([3]), -100)
    ids = torch.tensor([2, 7, 32])
    leaf = weight.detach()[ids].requires_grad_()
    upstream = torch.randn(40, dtype=torch.float64)

    def grads(logits: Tensor, of: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        loss = (loss * upstream).sum() if reduction == "none" else loss
        return torch.autograd.grad(loss, [hidden, of, bias])

    expected = grads(F.linear(hidden, weight, bias), weight)
    deferred = defer(hidden, weight.detach(), bias, (), (leaf, ids))
    found = grads(deferred if reader == "loss" else deferred + 0, leaf)
    for a, b in zip(found, (expected[0], expected[1][ids], expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_swapped_head_defers_the_logits_of_its_rows():
    model, _ = example("llama-causal-lm")
    hidden = torch.randn(5, 7, 32, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(35)
    patch_model(model, ALL, rows=BOTH)
    leaf = model.lm_head.weight_rows
    found = []
    for logits in (
        model.lm_head(hidden),
        language_model_head(model.lm_head).forward(model.lm_head, hidden),
    ):
        loss = F.cross_entropy(logits.view(35, -1), labels)
        found.append(torch.autograd.grad(loss, [hidden, leaf]))
    assert isinstance(logits, DeferredLogits) and logits._logits is None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "rows, error, said",
    [
        ([3], TypeError, "maps names"),
        ({"embed_tokens": []}, ValueError, "there are none"),
        ({"embed_tokens": [4, 4]}, ValueError, "4 is there twice"),
        ({"embed_tokens": [-1]}, ValueError, "from 0 to 96: -1 is out of range"),
        ({"embed_tokens": [97]}, ValueError, "97 is out of range"),
        ({"embed_tokens": [1.0]}, ValueError, "float"),
        ({"embed_tokens": [True]}, ValueError, "bool"),
        ({"embed_tokens": torch.tensor(3)}, ValueError, "not iterable"),
        ({"embed_tokens": torch.ones(2, 2, dtype=torch.int64)}, ValueError, "list"),
        ({"embed_tokens": "12"}, ValueError, "str"),
        ({"nothing": [1]}, ValueError, "no parameter 'nothing'.*embeddings are model.embed_tokens"),
        ({"q_proj": [1]}, ValueError, "4 names end in 'q_proj', such as model.layers.0"),
        ({"model.norm": [1]}, UnsupportedModelError, "no matrix"),
        ({"embed_tokens": [1], "model.embed_tokens.weight": [2]}, ValueError, "name it once"),
    ],
)
def test_what_cannot_train_is_refused(rows, error, said):
    model = tiny_model("llama-causal-lm")
    before = snapshot(model)
    with pytest.raises(error, match=said):
        patch_model(model, ALL, rows=rows)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "option, value", [("max_norm", 1.0), ("sparse", True), ("scale_grad_by_freq", True)]
)
def test_lookups_that_touch_all_rows_are_refused(option, value):
    model = tiny_model("llama-causal-lm")
    setattr(model.model.embed_tokens, option, value)
    with pytest.raises(UnsupportedModelError, match=f"{option}={value}.*: set it to"):
        patch_model(model, ALL, rows={"embed_tokens": NEW})


def test_a_tensor_that_is_replaced_is_noticed():
    model, inputs = example("llama-causal-lm")
    handle = patch_model(model, ALL, rows={"embed_tokens": NEW})
    model(**inputs)
    model.resize_token_embeddings(VOCABULARY + 4)  # writes into the modules that are there
    inputs["input_ids"][0, 3] = VOCABULARY + 3
    gradients(model, inputs)
    model.set_input_embeddings(nn.Embedding(VOCABULARY, 32, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="embed_tokens.weight, of which rows train, was"):
        handle.advance()
