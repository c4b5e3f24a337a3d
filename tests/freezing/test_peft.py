"""Adapters freeze with the block they sit in, and PEFT goes on working around them."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable

import peft
import pytest
import torch
from proofs import FixedPlan, enable_checkpointing, frozen_by_hand, gradients
from tiny_models import tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import (
    FreezePlan,
    MaskedAdamW,
    MilestoneSchedule,
    PrefixCache,
    ProgressiveSchedule,
    UnsupportedModelError,
    patch_model,
)
from progtuning_kernels.optim import state_bytes

BLOCKS = 4
BERT, LLAMA = "bert-sequence", "llama-causal-lm"


class _Bottleneck(nn.Module):
    """A linear layer, and a narrow residual branch after it."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense = dense
        self.down, self.up = nn.Linear(dense.out_features, 4), nn.Linear(4, dense.out_features)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        hidden = self.dense(hidden)
        return hidden + self.up(self.down(hidden).relu())


def _with_bottlenecks(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for block in model.bert.encoder.layer:
        block.output.dense = _Bottleneck(block.output.dense)
    model.classifier.requires_grad_(True)
    return model


def _with_biases_only(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def _peft(config: peft.PeftConfig):
    return lambda model: peft.get_peft_model(model, copy.deepcopy(config))


_ADALORA = dict(init_r=4, target_r=2, tinit=0, tfinal=6, deltaT=1, target_modules="all-linear")
ADAPTERS = {
    "lora": _peft(
        peft.LoraConfig(
            task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False
        )
    ),
    "adalora": _peft(peft.AdaLoraConfig(total_step=7, task_type="SEQ_CLS", **_ADALORA)),
    "ia3": _peft(
        peft.IA3Config(
            task_type="SEQ_CLS",
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
        )
    ),
    "bitfit": _with_biases_only,
    "bottleneck": _with_bottlenecks,
}


def _adapted(kind: str, name: str = BERT) -> nn.Module:
    torch.manual_seed(4)
    model = ADAPTERS[kind](tiny_model(name)).train()
    with torch.no_grad():  # adapters that start at zero or one would give none to their partners
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _unit(name: str) -> int:
    """Block that a parameter sits in, -1 for embeddings, BLOCKS for the rest."""
    for i in range(BLOCKS):
        if f".layer.{i}." in name:
            return i
    return -1 if "embeddings" in name else BLOCKS


def _plan(boundary: int) -> FreezePlan:
    return FreezePlan.from_boundary(boundary, BLOCKS, embeddings=boundary == 0)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("boundary", range(BLOCKS + 1))
@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_are_those_of_plain_freezing(kind, boundary):
    inputs = tiny_inputs(BERT)
    schedule = MilestoneSchedule({2: boundary})  # AdaLoRA allocates before
    expected = frozen_by_hand(_adapted(kind), schedule.plan(2, BLOCKS), inputs)
    assert {_unit(name) for name in expected} == {*range(boundary, BLOCKS + 1)}
    model = _adapted(kind)
    handle = patch_model(model, schedule)
    handle.seek(2)
    assert handle.boundary == boundary
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    handle.truncation_report().assert_truncated()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_frozen_blocks_do_not_change_by_one_bit_and_have_no_state(kind):
    model, inputs = _adapted(kind), tiny_inputs(BERT)
    handle = patch_model(model, ProgressiveSchedule(4, 8))
    optimizer = MaskedAdamW(handle.param_groups(lr=0.1, weight_decay=0.1))
    frozen_at: dict[str, torch.Tensor] = {}
    for step in range(8):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                frozen_at.setdefault(name, parameter.detach().clone())
                assert parameter not in optimizer.state
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.advance()
        for name, value in frozen_at.items():
            assert torch.equal(model.get_parameter(name), value), (step, name)
    blocks = {_unit(n) for n in frozen_at if n in dict(handle.model.named_parameters())}
    assert blocks >= {0, 1, 2}
    handle.unpatch()


def test_prompts_that_cannot_freeze_are_refused_in_one_line():
    sequence = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
    for config, message in (
        (
            peft.PromptTuningConfig(**sequence),
            "prompt_tuning trains only what enters below block 0",
        ),
        (
            peft.PromptEncoderConfig(**sequence, encoder_hidden_size=8),
            "p_tuning trains only what enters below block 0",
        ),
        (peft.PrefixTuningConfig(**sequence), "all blocks in one tensor, .* use LoRA or IA3"),
        (
            peft.PrefixTuningConfig(**sequence, prefix_projection=True, encoder_hidden_size=8),
            "all blocks in one tensor",
        ),
    ):
        model = peft.get_peft_model(tiny_model(BERT), config)
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            patch_model(model, ProgressiveSchedule(2, 4))
        assert "\n" not in str(caught.value)
        assert [p.requires_grad for p in model.parameters()] == flags


def test_adalora_allocates_first_and_freezes_afterwards():
    def adapted(total_step: int) -> nn.Module:
        config = peft.AdaLoraConfig(total_step=total_step, task_type="SEQ_CLS", **_ADALORA)
        return peft.get_peft_model(tiny_model(BERT), config).train()

    inputs = tiny_inputs(BERT)
    with pytest.raises(ValueError, match="AdaLoRA moves ranks .* up to step 6 .* step 6 freezes"):
        patch_model(adapted(12), ProgressiveSchedule(2, 12))
    with pytest.raises(ValueError, match="up to step 6"):  # a length that is not known yet
        patch_model(adapted(12), MilestoneSchedule({4: 1})).seek(4)

    model = adapted(12)
    handle = patch_model(model, MilestoneSchedule({7: 2}).bind(12))
    optimizer = MaskedAdamW(handle.param_groups(lr=0.05, weight_decay=0.1))
    for step in range(12):
        model(**inputs).loss.backward()
        optimizer.step()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        model.base_model.update_and_allocate(step)
        assert all(torch.equal(model.get_parameter(n), p) for n, p in before.items())
        optimizer.zero_grad()
        handle.advance()
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) < 4 * len(pattern)  # ranks were dropped


@pytest.mark.parametrize("where", ["bert.embeddings", "1.output.dense", "classifier"])
def test_modules_to_save_belong_to_the_unit_they_sit_in(where):
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=[where])
    model = peft.get_peft_model(tiny_model(BERT), config)
    handle = patch_model(model, MilestoneSchedule({1: 1, 2: 2}))
    saved = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    originals = [p for n, p in model.named_parameters() if "original_module" in n]
    assert saved and originals
    first_frozen = {"bert.embeddings": 1, "1.output.dense": 2, "classifier": 3}[where]
    for step in range(3):
        assert {p.requires_grad for p in saved} == {step < first_frozen}
        assert not any(p.requires_grad for p in originals)
        handle.advance()


def test_what_peft_switches_on_is_frozen_again_at_the_next_step():
    model, inputs = _adapted("lora"), tiny_inputs(BERT)
    model.add_adapter("other", peft.LoraConfig(target_modules=["query", "value"]))
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    below = [
        p for n, p in model.named_parameters() if "lora" in n and "default" in n and _unit(n) < 2
    ]
    above = [
        p for n, p in model.named_parameters() if "lora" in n and "default" in n and _unit(n) >= 2
    ]

    def disable() -> None:
        with model.disable_adapter(), torch.no_grad():
            model(**inputs)

    def select() -> None:
        model.set_adapter("other")
        model.set_adapter("default")

    for trick in (disable, select, model.base_model.enable_adapter_layers):
        trick()
        assert all(p.requires_grad for p in below), "the trap is gone: the test proves nothing"
        model(**inputs).loss.backward()
        assert all(p.grad is None for p in below)  # they run without autograd all the same
        assert all(p.grad is not None for p in above)
        handle.advance()
        assert not any(p.requires_grad for p in below)
        assert all(p.requires_grad for p in above)


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize(("kind", "options"), [("Shira", {"r": 2}), ("Frod", {})])
def test_adapters_that_save_sparse_tensors_are_reported(kind, options):
    config = getattr(peft, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this version of PEFT has no {kind}Config")

    def adapted() -> nn.Module:
        torch.manual_seed(4)
        own = config(task_type="SEQ_CLS", target_modules=["query", "value"], **options)
        return peft.get_peft_model(tiny_model(BERT), own).train()

    inputs = tiny_inputs(BERT)
    expected = frozen_by_hand(adapted(), _plan(2), inputs)
    model = adapted()
    handle = patch_model(model, FixedPlan(_plan(2)))
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    report = handle.truncation_report()
    report.assert_truncated()
    assert report.units[-2].saved_bytes > report.units[-2].activation_bytes > 0


@pytest.mark.parametrize("boundary", [0, 2, 4])
def test_merge_and_save_work_at_any_stage(boundary, tmp_path):
    inputs = tiny_inputs(BERT)
    model, twin = _adapted("lora"), _adapted("lora")
    handle = patch_model(model, MilestoneSchedule({0: min(boundary, 3)}, embeddings="never"))
    plain, patched = (m.eval()(**inputs).logits for m in (twin, model))
    assert torch.equal(plain, patched)
    model.merge_adapter()
    model.unmerge_adapter()
    twin.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "patched")
    loaded = [
        peft.PeftModel.from_pretrained(tiny_model(BERT), tmp_path / kind).state_dict()
        for kind in ("plain", "patched")
    ]
    assert loaded[0].keys() == loaded[1].keys()
    for key, value in loaded[0].items():
        torch.testing.assert_close(loaded[1][key], value)

    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, plain, rtol=1e-4, atol=1e-5)
    handle.unpatch()
    assert {type(b) for b in merged.bert.encoder.layer} == {type(twin.bert.encoder.layer[0])}
    merged.train()
    assert all(module.training for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(**inputs).logits, plain, rtol=1e-4, atol=1e-5)


def test_lora_on_the_top_blocks_only_raises_the_effective_boundary():
    config = peft.LoraConfig(target_modules=["query"], layers_to_transform=[2, 3])
    model = peft.get_peft_model(tiny_model(BERT), config)
    handle = patch_model(model, MilestoneSchedule({1: 1, 2: 3}))
    model(**tiny_inputs(BERT))
    for boundary, planned in ((2, 0), (2, 1), (3, 3)):
        assert (handle.boundary, handle.plan.boundary) == (boundary, planned)
        report = handle.truncation_report()
        assert report.boundary == boundary
        report.assert_truncated()
        assert [unit.active > 0 for unit in report.units[:-1]] == [
            i >= boundary for i in range(-1, 4)
        ]
        handle.advance()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("patched_first", [True, False])
def test_checkpointing_an_adapted_model_stays_truncated(patched_first, reentrant):
    inputs = tiny_inputs(LLAMA)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = tiny_model(LLAMA)
    model.config.use_cache = False
    torch.manual_seed(3)
    twin = peft.get_peft_model(copy.deepcopy(model), config)
    model = peft.get_peft_model(model, config)
    model.load_state_dict(twin.state_dict())
    expected = frozen_by_hand(twin, _plan(2), inputs)
    if not patched_first:
        enable_checkpointing(model, use_reentrant=reentrant)
    handle = patch_model(model, FixedPlan(_plan(2)))
    if patched_first:
        enable_checkpointing(model, use_reentrant=reentrant)
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    handle.truncation_report().assert_truncated()


def test_state_of_frozen_adapters_is_released():
    model, inputs = _adapted("lora"), tiny_inputs(BERT)
    handle = patch_model(model, ProgressiveSchedule(4, 4, embeddings="never"))
    optimizer = MaskedAdamW(handle.param_groups(lr=0.01))
    sizes = []
    for _ in range(4):
        model(**inputs).loss.backward()
        optimizer.step()
        sizes.append(state_bytes(optimizer))
        assert sizes[-1] >= 8 * handle.active_params
        handle.advance()
    steps = [a - b for a, b in itertools.pairwise(sizes)]
    assert len(set(steps)) == 1 and steps[0] > 0  # one block's adapters less at every stage


def _lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **options})


def _with_two_adapters(**options) -> nn.Module:
    torch.manual_seed(4)
    model = peft.get_peft_model(tiny_model(LLAMA), _lora(init_lora_weights=False, **options))
    model.add_adapter("other", _lora(target_modules="all-linear", init_lora_weights=False))
    return model.train()


def _turn(model: nn.Module, step: int) -> None:
    model.set_adapter(["default", "other"][step % 2])


def _switch(model: nn.Module, step: int) -> None:
    if step == 2:
        model.set_adapter("other")


def _both(model: nn.Module, step: int) -> None:
    if step == 2:
        model.base_model.set_adapter(["default", "other"])


def _add(model: nn.Module, step: int) -> None:
    if step == 2:
        torch.manual_seed(9)
        model.add_adapter("third", _lora(target_modules="all-linear", init_lora_weights=False))
        model.set_adapter("third")


def _delete(model: nn.Module, step: int) -> None:
    if step == 2:
        model.set_adapter("other")
        model.delete_adapter("default")


def _weigh(model: nn.Module, step: int) -> None:
    if step == 2:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mix", combination_type="cat")
        model.set_adapter("mix")


def _reload(model: nn.Module, step: int) -> None:
    if step == 2:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, selected_adapters=["default"])
            model.load_adapter(folder, "loaded", is_trainable=True)
        model.set_adapter("loaded")


def _reference_logits(model: nn.Module, step: int) -> None:
    with model.disable_adapter(), torch.no_grad():
        model(**tiny_inputs(LLAMA))


def _merge_for_an_evaluation(model: nn.Module, step: int) -> None:
    model.merge_adapter()
    with torch.no_grad():
        model(**tiny_inputs(LLAMA))
    model.unmerge_adapter()


def _train(
    act: Callable[[nn.Module, int], None],
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer],
    **options,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Six steps, patched or (without options) frozen by hand; what they end with, and losses."""
    handle, schedule = None, MilestoneSchedule({0: 1, 4: 2}, embeddings="never")
    if options:
        handle = patch_model(model, schedule, **options)
    optimizer, losses = optimizer(model.parameters(), lr=1e-3), []
    for step in range(6):
        act(model, step)
        inputs = tiny_inputs(LLAMA, seed=step % 2)
        if handle is None:
            plan = schedule.plan(step, BLOCKS)
            for name, parameter in model.named_parameters():
                block = _unit(name.replace(".layers.", ".layer."))
                if block < BLOCKS and not (block >= 0 and plan.trainable[block]):
                    parameter.requires_grad_(False)
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.advance()
    if handle is not None:
        handle.truncation_report().assert_truncated()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, losses


_KEEPING = functools.partial(MaskedAdamW, weight_decay=0.01, on_freeze="keep")


@pytest.mark.parametrize(
    "act",
    [
        _turn,
        _switch,
        _both,
        _add,
        _delete,
        _weigh,
        _reload,
        _reference_logits,
        _merge_for_an_evaluation,
    ],
)
@pytest.mark.parametrize(
    ("adapter", "optimizer", "cached"),
    [
        ({}, torch.optim.AdamW, False),
        ({"layers_to_transform": [3]}, _KEEPING, True),  # the others reach lower
        ({"use_dora": True}, functools.partial(_KEEPING, in_backward=True), False),
    ],
)
def test_adapters_switched_while_patched_train_as_when_frozen_by_hand(
    act, adapter, optimizer, cached
):
    expected, losses = _train(act, _with_two_adapters(**adapter), torch.optim.AdamW)
    cache = PrefixCache(2**24, device="cpu") if cached else None
    options = {"kernels": "on", "cache": cache}
    found, same = _train(act, _with_two_adapters(**adapter), optimizer, **options)
    assert same == pytest.approx(losses, abs=1e-5)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_micro_batches_of_two_adapters_in_one_step_keep_both_gradients():
    model, twin = _with_two_adapters(), _with_two_adapters()
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    for adapter in ("default", "other"):
        for each in (model, twin):
            each.set_adapter(adapter)
            each(**tiny_inputs(LLAMA)).loss.backward()
    expected = dict(twin.named_parameters())
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {".default." in name for name in got} == {True, False}
    assert all(torch.equal(grad, expected[name].grad) for name, grad in got.items())
    model.set_adapter("default")
    handle.unpatch()
    above = [p for n, p in model.named_parameters() if ".layers.3." in n and "lora" in n]
    assert {p.requires_grad for p in above} == {True, False}


@pytest.mark.parametrize("add", ["inject", "wrap"])
def test_first_adapters_of_a_patched_model_freeze_with_their_blocks(add):
    def lora(model: nn.Module, *, trains: bool | None = None) -> set[str]:
        named = [(n.removeprefix("base_model.model."), p) for n, p in model.named_parameters()]
        return {n for n, p in named if "lora" in n and trains in (None, p.requires_grad)}

    model, inputs = tiny_model(LLAMA), tiny_inputs(LLAMA)
    handle = patch_model(model, MilestoneSchedule({0: 2, 2: 3}))
    model(**inputs).loss.backward()
    if add == "wrap":
        called = peft.get_peft_model(model, _lora())
    else:
        called, _ = model, model.add_adapter(_lora(), "first")
    with pytest.warns(UserWarning, match="came into the model while it was trained"):
        called(**inputs).loss.backward()
        handle.advance()
    for boundary in (2, 3):
        above = {n for n in lora(called) if int(n.split(".")[2]) >= boundary}
        assert above == {n for n in lora(called, trains=True)}
        assert sum(p.requires_grad for p in called.parameters()) == len(above) > 0
        called.zero_grad()
        called(**inputs).loss.backward()
        assert all(p.grad is not None for p in called.parameters() if p.requires_grad)
        handle.advance()
    handle.unpatch()
    assert lora(called, trains=True) == lora(called)
    assert sum(p.requires_grad for p in called.parameters()) == len(lora(called))
