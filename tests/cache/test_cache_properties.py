"""The prefix cache under random batches, paddings, boundaries and weight changes: always a twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proofs import gradients
from tiny_models import VOCABULARY, tiny_model

from progtuning_kernels import FreezePlan, PatchHandle, PrefixCache, patch_model

BLOCKS, SAMPLES = 4, 7
_SETTINGS = settings(
    max_examples=18,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class _Boundaries:
    """A schedule whose step is the boundary: `handle.seek(k)` moves there."""

    total_steps = None

    def plan(self, step: int, num_blocks: int) -> FreezePlan:
        return FreezePlan.from_boundary(step, num_blocks, embeddings=False)

    def stage(self, step: int) -> int:
        return step

    def bind(self, total_steps: int) -> _Boundaries:
        return self


def _samples(name: str) -> list[dict[str, torch.Tensor]]:
    """Samples of other lengths; some differ in token types, or in one token, only."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for i in range(SAMPLES):
        length = 3 + i
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        samples.append({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
    samples[1] = {k: v.clone() for k, v in samples[0].items()}
    samples[1]["token_type_ids"][1:] = 1
    samples[3] = {k: v.clone() for k, v in samples[2].items()}
    samples[3]["input_ids"][-1] = 3 + (samples[2]["input_ids"][-1] - 2) % (VOCABULARY - 3)
    if not name.startswith("bert"):
        for sample in samples:
            del sample["token_type_ids"]
    return samples


def _batch(name: str, rows: list[int], *, left: bool, more: int, mask: bool) -> dict[str, Any]:
    chosen = [_samples(name)[i] for i in rows]
    length = max(len(s["input_ids"]) for s in chosen) + more

    def pad(value: torch.Tensor, fill: int = 0) -> torch.Tensor:
        free = length - len(value)
        return torch.nn.functional.pad(value, (free, 0) if left else (0, free), value=fill)

    batch = {k: torch.stack([pad(s[k]) for s in chosen]) for k in chosen[0]}
    ones = [torch.ones_like(s["input_ids"]) for s in chosen]
    if mask or any(len(one) < length for one in ones):
        batch["attention_mask"] = torch.stack([pad(one) for one in ones])
    if name.endswith("sequence"):
        batch["labels"] = torch.tensor(rows) % 3
    elif name.endswith("token"):
        batch["labels"] = torch.stack([pad(s["input_ids"] % 3, -100) for s in chosen])
    else:
        batch["labels"] = torch.stack([pad(s["input_ids"], -100) for s in chosen])
    return batch


_BATCHES = st.fixed_dictionaries(
    {
        "rows": st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=5),
        "left": st.booleans(),
        "more": st.integers(0, 3),
        "mask": st.booleans(),
    }
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), _BATCHES),
        st.tuples(st.just("train"), _BATCHES),
        st.tuples(st.just("train"), _BATCHES),
        st.tuples(st.just("evaluate"), _BATCHES),
        st.tuples(st.just("move"), st.integers(0, BLOCKS)),
        st.tuples(st.just("change"), st.integers(-1, BLOCKS - 1)),
        st.tuples(st.just("load"), st.integers(1, 3)),
    ),
    min_size=6,
    max_size=16,
)


def _close(found: torch.Tensor, expected: torch.Tensor, scale: float) -> bool:
    """Within 1e-5 of the largest value of its kind: some gradients are nothing but rounding."""
    return float((found - expected).detach().abs().max()) <= 1e-5 * max(scale, 1e-6)


def _assert_twins(cached: PatchHandle, plain: PatchHandle, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        found, expected = (h.model(**batch).loss for h in (cached, plain))
    assert _close(found, expected, float(expected))
    found, expected = (gradients(h.model, batch) for h in (cached, plain))
    assert found.keys() == expected.keys() and found
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert _close(found[name], gradient, scale), name


def _first_tensor(handle: PatchHandle, unit: int) -> torch.Tensor:
    module = handle.model.get_submodule(handle.layout.module_paths(unit)[0])
    return next(p for p in module.parameters() if p.ndim == 2)


# token types of BERT, rows per token of Llama; "bert-token", 10 s more, has both at once
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm"])
def test_cached_and_plain_runs_are_twins(name):
    @_SETTINGS
    @given(_STEPS, st.sampled_from([1 << 24, 3000]))
    def run(steps, budget):
        cached, plain = (
            patch_model(tiny_model(name), _Boundaries(), **options)
            for options in ({"cache": PrefixCache(budget, device="cpu")}, {"packing": "off"})
        )
        for handle in (cached, plain):
            handle.seek(2)
        for kind, value in steps:
            if kind == "train":
                _assert_twins(cached, plain, _batch(name, **value))
                for handle in (cached, plain):  # what is above the boundary trains
                    with torch.no_grad():
                        for p in handle.model.parameters():
                            if p.grad is not None:
                                p.sub_(p.grad, alpha=0.1)
                for one, other in zip(
                    cached.model.parameters(), plain.model.parameters(), strict=True
                ):
                    one.data.copy_(other.data) if one.requires_grad else None
            elif kind == "evaluate":
                batch = _batch(name, **value)
                with torch.no_grad():
                    found, expected = (h.model.eval()(**batch).loss for h in (cached, plain))
                assert _close(found, expected, float(expected))
                for handle in (cached, plain):
                    handle.model.train()
            elif kind == "move":
                for handle in (cached, plain):
                    handle.seek(value)
            elif kind == "change":
                for handle in (cached, plain):
                    with torch.no_grad():
                        _first_tensor(handle, value).add_(0.05)
            else:
                weights = tiny_model(name, seed=value).state_dict()
                for handle in (cached, plain):
                    handle.model.load_state_dict(weights)
        assert cached.cache_report().nbytes <= budget

    run()


@_SETTINGS
@given(st.lists(_BATCHES, min_size=2, max_size=4))
def test_a_second_epoch_of_the_same_batches_is_the_first_to_the_bit(batches):
    cached, plain = (
        patch_model(tiny_model("bert-token"), _Boundaries(), cache=cache, packing="off")
        for cache in (PrefixCache(1 << 24, device="cpu"), None)
    )
    for handle in (cached, plain):
        handle.seek(2)
    batch = _batch("bert-token", **batches[0])
    for _ in range(3):  # a batch that comes again as it was
        found, expected = (gradients(h.model, batch) for h in (cached, plain))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert cached.cache_report().served_steps == 2
    for values in batches[1:] * 2:
        _assert_twins(cached, plain, _batch("bert-token", **values))
    before = cached.cache_report()
    for values in batches[1:]:
        gradients(cached.model, _batch("bert-token", **values))
    assert cached.cache_report().misses == before.misses
