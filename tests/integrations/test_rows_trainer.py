"""Rows of new tokens under the Trainer and TRL, with and without LoRA: stopped, saved, gone on."""

from __future__ import annotations

import copy
from types import MethodType, SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from test_rows_threads import (
    NEW,
    OTHERS,
    assert_rows,
    embeddings,
    extended,
    head,
    rows_alone,
    with_this_library,
)
from tiny_folders import word_tokenizer
from tiny_models import VOCABULARY, tiny_inputs, tiny_model
from trainers import sft_trainer, trainer_of
from transformers import TrainerCallback

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, ProgressiveSchedule
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback
from progtuning_kernels.model.families import UnsupportedModelError
from progtuning_kernels.patch import handle_of, patch_model

BOTH = {"embed_tokens": NEW, "lm_head": NEW}
LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def rows() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (32, 9), generator=draw)
    ids[:, 2] = torch.tensor(NEW).repeat(11)[:32]
    return [{"input_ids": row, "labels": row} for row in ids]


def model_of(adapted: bool):
    model = extended(tied=False)
    if not adapted:
        return model
    torch.manual_seed(2)
    return peft.get_peft_model(model, LORA)


def trainer_with_rows(folder, *, adapted: bool, wanted=BOTH, callbacks=(), **arguments):
    callback = ProgtuningCallback(ProgressiveSchedule(2), rows=wanted)
    return trainer_of(
        folder,
        model=model_of(adapted),
        rows=rows(),
        steps=6,
        callbacks=[callback, *callbacks],
        save_strategy="steps",
        save_steps=2,
        **arguments,
    )


class StopsAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2  # of stage 1, where the rows train


def assert_rows_alone_have_moved(model) -> None:
    start = extended(tied=False)
    for of in (embeddings, head):
        assert torch.equal(of(model)[OTHERS], of(start)[OTHERS])
        assert (of(model)[NEW] != of(start)[NEW]).any(1).all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("adapted", "optimizer"), [(False, None), (True, (MaskedAdamW, {"weight_decay": 0.1}))]
)
def test_a_run_with_rows_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, adapted, optimizer):
    options = {"adapted": adapted, "optimizer": optimizer}
    straight = trainer_with_rows(tmp_path / "straight", **options)
    straight.train()
    trainer_with_rows(tmp_path / "run", **options, callbacks=[StopsAfter()]).train()
    resumed = trainer_with_rows(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert handle_of(resumed.model) is None
    others = trainer_with_rows(tmp_path / "run", **options, wanted={**BOTH, "lm_head": [5, 6, 7]})
    with pytest.raises(ValueError, match="saved while these rows trained"):
        others.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert_rows_alone_have_moved(resumed.model)
    expected = straight.model.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in resumed.model.state_dict().items())

    resumed.save_model(str(tmp_path / "saved"))  # of LoRA the adapter, after the end of the patch
    if adapted:
        loaded = peft.PeftModel.from_pretrained(extended(tied=False), tmp_path / "saved")
        assert all(torch.equal(w, expected[n]) for n, w in loaded.state_dict().items())
        merged = resumed.model.merge_and_unload()
        assert torch.equal(embeddings(merged), embeddings(loaded))


def test_an_optimizer_that_does_not_know_the_rows_is_refused(tmp_path):
    schedule = MilestoneSchedule({}, embeddings="always")
    late = ProgtuningCallback(schedule, rows={"embed_tokens": NEW})
    model = extended()
    trainer = trainer_of(tmp_path, model=model, rows=rows(), steps=2)
    trainer.add_callback(late)
    trainer.create_optimizer()
    with pytest.raises(RuntimeError, match=r"call callback.hold_rows\(model\) before it is made"):
        trainer.train()

    trainer = trainer_of(tmp_path, model=model, rows=rows(), steps=2)  # cleans up
    trainer.add_callback(late)
    late.hold_rows(model)  # the cure
    trainer.train()
    assert torch.equal(embeddings(model)[OTHERS], embeddings(extended())[OTHERS])
    assert not torch.equal(embeddings(model)[NEW], embeddings(extended())[NEW])
    with pytest.raises(RuntimeError, match="give the callback to a new Trainer's constructor"):
        trainer.train()  # its optimizer is that of the first call


def test_a_callback_that_trained_nothing_leaves_no_rows_to_the_next(tmp_path):
    model = extended()
    schedule = MilestoneSchedule({}, embeddings="always")
    trainer_of(
        tmp_path, model=model, callbacks=[ProgtuningCallback(schedule, rows={"embed_tokens": [1]})]
    )
    trainer_of(tmp_path, model=model, callbacks=[ProgtuningCallback(schedule)])
    assert [*model.state_dict()] == [*extended().state_dict()]
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in extended().named_parameters()}


def test_a_loss_that_takes_the_weight_of_the_head_trains_its_rows():
    """As TRL's: it calls the backbone, and multiplies by `lm_head.weight` itself."""
    model, truth = (extended(tied=False).requires_grad_(False) for _ in range(2))

    def by_hand(self, input_ids, labels, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state[:, :-1]
        logits = hidden @ self.lm_head.weight.T
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))

    for m in (model, truth):
        m.forward = MethodType(by_hand, m)
    with_this_library(model, rows=BOTH)
    rows_alone(truth, [embeddings(truth), head(truth)])
    assert_rows(model, truth)
    assert_rows_alone_have_moved(model)


def test_sft_with_lora_trains_and_saves_the_rows(tmp_path):
    pytest.importorskip("trl")
    new = [5, 9]
    callback = ProgtuningCallback(
        ProgressiveSchedule(2), rows={"embed_tokens": new, "lm_head": new}
    )
    trainer = sft_trainer(
        tmp_path, word_tokenizer(), callbacks=[callback], peft_config=LORA, max_steps=4
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama-causal-lm"), tmp_path / "saved")
    start = tiny_model("llama-causal-lm")
    for of in (embeddings, head):
        moved = (of(loaded) != of(start)).any(1).nonzero().flatten().tolist()
        assert moved == new
        assert torch.equal(of(loaded), of(trainer.model))


def test_rows_that_peft_would_not_save_are_refused(tmp_path):
    schedule = MilestoneSchedule({}, embeddings="always")
    model = extended()
    model.add_adapter(LORA)  # of transformers
    with pytest.raises(UnsupportedModelError, match="use peft.get_peft_model"):
        patch_model(model, schedule, rows={"embed_tokens": NEW})

    def adapted(**more):
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], **more)
        return peft.get_peft_model(tiny_model("llama-sequence"), lora)

    model = adapted()
    with pytest.raises(UnsupportedModelError, match="name its module in modules_to_save"):
        patch_model(model, schedule, rows={"layers.0.mlp.up_proj": [3]})
    assert "save_pretrained" not in vars(model)
    model = adapted(modules_to_save=["up_proj"])  # the cure
    name = "layers.0.mlp.up_proj.modules_to_save.default"
    handle = patch_model(model, schedule, rows={name: [3]})
    weight = model.get_parameter(f"base_model.model.model.{name}.weight")
    rows_of_it = next(p for n, p in model.named_parameters() if n.endswith("weight_rows"))
    with torch.no_grad():
        rows_of_it.fill_(7.0)
    model(**tiny_inputs("llama-sequence")).loss.backward()
    assert (weight[3] == 7).all() and (weight[2] != 7).all()
    copy.deepcopy(model).save_pretrained(tmp_path)
    handle.unpatch()
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama-sequence"), tmp_path)
    assert torch.equal(loaded.get_parameter(f"base_model.model.model.{name}.weight"), weight)
