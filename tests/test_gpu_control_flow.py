"""Training takes a GPU's branches, and the host waits for it no more often than it has to.

No GPU is needed: see pretend_cuda.py and unlaunched_kernels.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pytest
import torch
from pretend_cuda import PretendCuda
from proofs import FixedPlan
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import FreezePlan, MaskedAdamW, PrefixCache, backend, patch_model
from progtuning_kernels.graphs import captured_module
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.optim import masked_adamw

pytest.importorskip("triton")
from unlaunched_kernels import Kernels, unlaunched

# Reads of the GPU that a forward makes, beside those of transformers: packing and the cache share
# one copy of the batch.
READS = 1
# Compiled kernels of a name, whatever sizes the batches have: for what is demanded, and for checks.
# One more, and it is compiled for a size.
MOST_VARIANTS = {"norm.forward_kernel": 4}
MOST_VARIANTS_OF_OTHERS = 2

Loop = Literal["plain", "scaler", "accumulated", "in_backward", "in_backward_accumulated"]


class Case(NamedTuple):
    """How a model is trained. optimizer: the implementation of its update."""

    model: Literal["bert-sequence", "llama-causal-lm", "t5-seq2seq-lm"]
    optimizer: Literal["native", "triton", "reference"]
    loop: Loop
    cached: bool
    packed: bool
    clipped: bool
    coded: bool  # moments in 8 bits


# every two values of two fields come together in one of these
CASES = [
    Case("t5-seq2seq-lm", "triton", "plain", False, False, True, False),
    Case("llama-causal-lm", "reference", "in_backward", True, True, True, True),
    Case("bert-sequence", "native", "accumulated", False, True, False, False),
    Case("t5-seq2seq-lm", "native", "in_backward", True, False, False, True),
    Case("bert-sequence", "reference", "in_backward_accumulated", True, False, True, True),
    Case("llama-causal-lm", "triton", "scaler", False, False, True, True),
    Case("t5-seq2seq-lm", "reference", "scaler", True, False, False, False),
    Case("t5-seq2seq-lm", "triton", "in_backward_accumulated", False, True, False, True),
    Case("llama-causal-lm", "native", "plain", True, True, True, True),
    Case("llama-causal-lm", "reference", "accumulated", True, False, True, False),
    Case("llama-causal-lm", "native", "in_backward_accumulated", False, False, False, False),
    Case("bert-sequence", "reference", "plain", False, True, False, True),
    Case("bert-sequence", "triton", "in_backward", False, False, False, False),
    Case("t5-seq2seq-lm", "triton", "accumulated", True, True, False, True),
    Case("bert-sequence", "native", "scaler", False, True, False, False),
]
NORMS = {"bert-sequence": "layer_norm", "llama-causal-lm": "rms_norm", "t5-seq2seq-lm": "rms_norm"}


def _plan(model: nn.Module, boundary: int = 2) -> FixedPlan:
    blocks = find_layout(model).num_blocks
    return FixedPlan(FreezePlan.from_boundary(boundary, blocks, embeddings=False))


@contextlib.contextmanager
def _gpu(monkeypatch: pytest.MonkeyPatch, optimizer: str) -> Iterator[tuple[PretendCuda, Kernels]]:
    if optimizer == "native" and backend.native_extension() is None:
        pytest.skip("the extension is not built")
    with PretendCuda() as pretend, unlaunched(pretend, native=optimizer == "native") as kernels:
        if optimizer == "reference":
            update = backend.OPS["masked_update"]
            monkeypatch.setitem(
                backend.OPS, "masked_update", backend.Op("masked_update", (update.reference,))
            )
        yield pretend, kernels


def _optimizer(handle: Any, case: Case) -> MaskedAdamW:
    in_backward = case.loop.startswith("in_backward")
    return MaskedAdamW(
        handle.param_groups(lr=1e-3, weight_decay=0.01),
        max_grad_norm=1.0 if case.clipped else None,
        state_dtype="8bit" if case.coded else torch.float32,
        in_backward=in_backward,
        clip_mode="previous_norm" if in_backward and case.clipped else "exact",
    )


def _train(
    model: nn.Module, optimizer: MaskedAdamW, loop: Loop, batches: list[Any], scaler: Any
) -> None:
    """One step for each batch, or with all of them."""
    last = len(batches) - 1
    for i, batch in enumerate(batches):
        accumulates = loop.endswith("accumulated") and i < last
        with optimizer.accumulate() if accumulates else contextlib.nullcontext():
            loss = model(**batch).loss
            (loss if scaler is None else scaler.scale(loss)).backward()
        if accumulates:
            continue
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


@functools.cache
def _own_reads(name: str, forwards: int) -> Counter[str]:
    """Reads of the model without us, in as many forwards and backwards."""
    with PretendCuda() as pretend:
        model = pretend.put(tiny_model(name))
        for seed in range(forwards):
            model(**pretend.put(tiny_inputs(name, seed=seed))).loss.backward()
        return pretend.lines("read")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_waits_for_the_gpu_no_more_than_it_has_to(case, monkeypatch):
    monkeypatch.setattr(masked_adamw, "SMALLEST_8BIT", 1024)
    with _gpu(monkeypatch, case.optimizer) as (pretend, kernels):
        model = pretend.put(tiny_model(case.model))
        known, fresh = (pretend.put(tiny_inputs(case.model, seed=seed)) for seed in (1, 2))
        handle = patch_model(
            model,
            _plan(model),
            packing="on" if case.packed else "off",
            kernels="on",
            cache=PrefixCache(max_bytes=1 << 20) if case.cached else None,
        )
        optimizer = _optimizer(handle, case)
        scaler = torch.amp.GradScaler("cuda") if case.loop == "scaler" else None
        _train(model, optimizer, case.loop, [known, known], scaler)
        # by the optimizer, whose tables are made at its first step; trials of others do copy so
        of_optimizer = ("progtuning_kernels/optim/", "progtuning_kernels/ops/masked_")
        at_first = [
            event
            for event in pretend.events
            if event.kind != "pinned" and any(part in event.line for part in of_optimizer)
        ]
        pretend.events.clear()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        _train(model, optimizer, case.loop, [known, fresh], scaler)
        events = list(pretend.events)
        packed = handle.packing_report().batches
        served = handle.cache_report().hits if case.cached else 0
        moved = [n for n, p in model.named_parameters() if (p != before[n]).any()]
        assert optimizer.skipped_steps == 0
    assert moved and all(p.requires_grad for n, p in model.named_parameters() if n in moved)
    assert packed == (4 if case.packed else 0) and bool(served) == case.cached

    waits = [event for event in events if event.kind != "pinned"]
    ours = [event for event in waits if event.owner == "ours"]
    assert {event.kind for event in ours} <= {"read"}, ours
    assert not at_first, at_first
    forwards = 2 + case.cached
    assert len(ours) <= READS * 2 * (case.packed or case.cached), ours  # two batches
    theirs = Counter(e.line for e in waits if e.owner != "ours" and e.kind == "read")
    assert not theirs - _own_reads(case.model, forwards), theirs

    chosen = {(op, name) for op, name, device in kernels.choices if device == "cuda"}
    assert ("masked_update", case.optimizer) in chosen
    assert (NORMS[case.model], "triton") in chosen
    assert not kernels.cpu_calls, kernels.cpu_calls
    natively = {op for op, name in chosen if name == "native"}
    assert natively <= ({"masked_update", "masked_norm"} if case.optimizer == "native" else set())
    by_reference = {op for op, name in chosen if name == "reference"}
    assert by_reference == ({"masked_update"} if case.optimizer == "reference" else set())


@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_replayed_step_waits_no_more(name, packing, monkeypatch):
    # the pretended GPU is a mode of torch's, which captured graphs leave alone
    monkeypatch.setattr(captured_module, "_surroundings", lambda: None)
    with _gpu(monkeypatch, "triton") as (pretend, _):
        model = pretend.put(tiny_model(name))
        handle = patch_model(model, _plan(model), packing=packing, kernels="off", graph="on")
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=1.0)
        for seed in (1, 1, 1, 2):
            replays = handle.graph_report().replays
            pretend.events.clear()
            _train(model, optimizer, "plain", [pretend.put(tiny_inputs(name, seed=seed))], None)
        assert handle.graph_report().replays == replays + 1 >= 2
        waits = [e for e in pretend.events if e.kind != "pinned"]
    assert len(waits) <= READS * (packing == "on"), waits


def test_every_two_values_come_together_in_a_case():
    values = [sorted({case[i] for case in CASES}) for i in range(len(Case._fields))]
    for (i, first), (j, second) in itertools.combinations(enumerate(values), 2):
        found = {(case[i], case[j]) for case in CASES}
        assert found == set(itertools.product(first, second)), (i, j)


@pytest.mark.parametrize("optimizer", ["native", "triton"])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_the_training_is_real(name, optimizer, monkeypatch):
    trained = []
    for gpu in (False, True):
        context = _gpu(monkeypatch, optimizer) if gpu else contextlib.nullcontext((None, None))
        with context as (pretend, kernels):
            model, batch = tiny_model(name), tiny_inputs(name)
            if gpu:
                pretend.put(model), pretend.put(batch)
            handle = patch_model(model, _plan(model, 1), kernels="on" if gpu else "off")
            optimizer_ = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=0.1)
            _train(model, optimizer_, "plain", [batch] * 3, None)
        trained.append({n: p.detach() for n, p in model.named_parameters()})
    launches = kernels.launches
    assert launches["norm.backward_kernel"] and launches["norm.forward_kernel"]
    update = "masked_update_cuda" if optimizer == "native" else "masked_update.masked_update_kernel"
    assert launches[update] == 3
    if optimizer == "triton":
        norms = ("gradient_partials_kernel", "decision_kernel", "prepare_kernel")
        assert [launches[f"masked_update.{name}"] for name in norms] == [3, 3, 3]
    for key, expected in trained[0].items():
        torch.testing.assert_close(trained[1][key], expected, rtol=1e-3, atol=2e-5, msg=key)


def _batch(name: str, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Real tokens are of other lengths in every row."""
    ids = torch.randint(3, 97, (rows, tokens))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, max(1, tokens - row) :] = 0
    labels = ids.masked_fill(mask == 0, -100) if name.endswith("lm") else torch.arange(rows) % 3
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("name", "packing"), [("bert-sequence", "on"), ("llama-causal-lm", "off")])
def test_kernels_are_not_compiled_anew_for_other_sizes(name, packing, monkeypatch):
    sizes = [(1 + i % 7, 1 + (5 * i) % 31) for i in range(50)]
    assert len(set(sizes)) == 50
    with _gpu(monkeypatch, "triton") as (pretend, kernels):
        model = pretend.put(tiny_model(name))
        handle = patch_model(model, _plan(model, 3), packing=packing, kernels="on")
        optimizer = MaskedAdamW(handle.param_groups(lr=1e-3), max_grad_norm=1.0)
        for rows, tokens in [(3, 11), *sizes]:
            batch = pretend.put(_batch(name, rows, tokens))
            _train(model, optimizer, "plain", [batch], None)
    for kernel, variants in kernels.variants.items():
        most = MOST_VARIANTS.get(kernel, MOST_VARIANTS_OF_OTHERS)
        assert variants <= most, f"{kernel} was compiled {variants} times, not {most}"
    assert kernels.launches["norm.backward_kernel"] >= 50
    assert kernels.launches["masked_update.masked_update_kernel"] == 51
