"""The cache of a patched model: its life, its settings and its folder."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cached_models import BLOCKS, BUDGET, assert_same, blocks_of, cpu_cache, patched_at
from proofs import FixedPlan, counted_runs, gradients
from tiny_models import BATCH, tiny_inputs, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from progtuning_kernels import (
    FreezePlan,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    patch_model,
)
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.patch import handle_of


def test_trainer(tmp_path):
    rows = []
    for seed in range(4):
        inputs = tiny_inputs("bert-sequence", seed=seed)
        rows += [{k: v[i] for k, v in inputs.items()} for i in range(BATCH)]

    def run(cache: PrefixCache | None) -> tuple[dict[str, torch.Tensor], Any]:
        model = tiny_model("bert-sequence", dropout=True)
        reports = []

        class Callback(ProgtuningCallback):
            def on_train_end(self, args, state, control, **kwargs):
                if cache is not None:
                    reports.append(self.handle.cache_report())
                super().on_train_end(args, state, control, **kwargs)

        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                num_train_epochs=6,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                report_to="none",
                save_strategy="no",
                eval_strategy="epoch",
                disable_tqdm=True,
                use_cpu=True,
                seed=7,
            ),
            train_dataset=rows,
            eval_dataset=rows[:6],
            callbacks=[Callback(ProgressiveSchedule(3), cache=cache)],
        )
        trainer.train()
        assert handle_of(model) is None
        return model.state_dict(), reports

    weights, (report,) = run(cpu_cache())
    assert report.served_steps > 4 and report.hits > 12
    expected, _ = run(None)
    for name, value in expected.items():
        assert torch.allclose(weights[name], value, rtol=1e-4, atol=1e-6), name


def test_resume_finds_the_rows_of_a_folder_again(tmp_path):
    inputs = [tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2)]
    schedule = MilestoneSchedule({0: 1, 2: 3}, embeddings="never")
    cache = {"device": "disk", "path": tmp_path / "rows"}
    model = tiny_model("bert-sequence")
    handle = patch_model(model, schedule, cache=PrefixCache(BUDGET, **cache))
    optimizer = MaskedAdamW(handle.param_groups(lr=1e-2))
    for batch in inputs * 2:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
    state, weights = handle.state_dict(), copy.deepcopy(model.state_dict())
    expected = gradients(model, inputs[0])
    handle.unpatch()

    model = tiny_model("bert-sequence")
    model.load_state_dict(weights)
    handle = patch_model(model, schedule, cache=PrefixCache(BUDGET, **cache))
    handle.load_state_dict(state)
    gradients(model, inputs[1])  # proves
    with counted_runs(blocks_of(handle)) as runs:
        assert_same(gradients(model, inputs[0]), expected)
    assert [runs[i] for i in range(BLOCKS)] == [0, 0, 0, 1]
    handle.unpatch()

    model = tiny_model("bert-sequence", seed=4)
    with patch_model(model, schedule, cache=PrefixCache(BUDGET, **cache)) as handle:
        gradients(model, inputs[0])
        assert handle.cache_report().hits == 0


def test_rows_of_another_data_set_make_room(tmp_path):
    one, other = (tiny_inputs("bert-sequence", seed=seed) for seed in (1, 2))
    rows = {}
    for inputs in (one, other):
        room = PrefixCache(sum(rows.values()) or BUDGET, device="disk", path=tmp_path)
        with patched_at(tiny_model("bert-sequence"), cache=room) as handle:
            for _ in range(3):
                gradients(handle.model, inputs)
            report = handle.cache_report()
            assert report.hits == 2 * BATCH and report.state == "on"
            rows = {2: report.nbytes}


def test_copies_pickles_and_the_unpatched_model_know_of_no_cache():
    handle = patched_at(tiny_model("bert-sequence"), 2, cache=cpu_cache(), packing="off")
    model, inputs = handle.model, tiny_inputs("bert-sequence")
    for _ in range(2):
        gradients(model, inputs)

    def snapshot(model: nn.Module) -> dict[str, Any]:
        return {path: (type(m), set(vars(m))) for path, m in model.named_modules()}

    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    expected = gradients(model, inputs)
    assert handle.cache_report().served_steps == 2
    for copied in copies:
        with counted_runs(list(copied.bert.encoder.layer)) as runs:
            found = gradients(copied, inputs)
        assert all(runs[i] == 1 for i in range(BLOCKS))
        assert_same(found, {k: v for k, v in expected.items() if k in found})
    cache = handle.cache
    handle.unpatch()
    untouched = tiny_model("bert-sequence")
    untouched(**inputs)
    assert snapshot(model) == snapshot(untouched)
    assert handle.cache is None and cache is not None
    with pytest.raises(RuntimeError, match="without a cache|no cache"):
        handle.cache_report()


def test_one_cache_serves_one_model():
    cache = cpu_cache()
    with patched_at(tiny_model("bert-sequence"), 2, cache=cache):
        with pytest.raises(ValueError, match="another patched model"):
            patched_at(tiny_model("bert-sequence"), 2, cache=cache)
    handle = patched_at(tiny_model("bert-sequence", seed=3), 2, cache=cache)
    plain = patched_at(tiny_model("bert-sequence", seed=3), 2)
    inputs = tiny_inputs("bert-sequence")
    for _ in range(2):
        assert_same(gradients(handle.model, inputs), gradients(plain.model, inputs))
    with pytest.raises(ValueError, match="cache must be"):
        patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(2, 4), cache="on")
    with pytest.raises(ValueError, match="max_bytes"):
        PrefixCache(0)


def test_automatic_cache():
    plan = FreezePlan.from_boundary(2, BLOCKS, embeddings=False)
    handle = patch_model(tiny_model("bert-sequence"), FixedPlan(plan), cache="auto")
    for _ in range(2):
        gradients(handle.model, tiny_inputs("bert-sequence"))
    assert handle.cache_report().served_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype_of_stored_rows_is_served(dtype):
    handle = patched_at(tiny_model("bert-sequence"), 2, cache=cpu_cache(dtype=dtype))
    for _ in range(3):
        handle.model(**tiny_inputs("bert-sequence")).loss.backward()
    assert handle.cache_report().hits == 2 * BATCH


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", ["bert-sequence", "llama-causal-lm", "vit-image"])
def test_on_a_gpu(name, device):
    cache = PrefixCache(BUDGET, device=device)
    handle = patched_at(tiny_model(name).cuda(), 2, cache=cache)
    plain = patched_at(tiny_model(name).cuda(), 2)
    batches = [{k: v.cuda() for k, v in tiny_inputs(name, seed=seed).items()} for seed in range(3)]
    for inputs in batches * 3:
        found, expected = gradients(handle.model, inputs), gradients(plain.model, inputs)
        for key, gradient in expected.items():
            assert torch.allclose(found[key], gradient, rtol=1e-3, atol=1e-5), key
    report = handle.cache_report()
    assert report.served_steps == 6 and report.prefix_ms and report.read_ms
