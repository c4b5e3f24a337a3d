"""What people reported about training the rows of new tokens alone.

Every test has the name of a public thread. Its first half is what the thread reports, with torch,
transformers or PEFT alone, and asserts the symptom; its second half is the same script with this
library. `rows_alone` is the truth: the dense gradient of the whole weight, of which AdamW gets the
rows, in fp64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft
import torch
from tiny_models import VOCABULARY, tiny_inputs, tiny_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, patch_model
from progtuning_kernels.optim import state_bytes

# a step follows the size of its gradient, so that rounding stays what it is
ADAM = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
NEW = [VOCABULARY, VOCABULARY + 2, VOCABULARY + 1]
OTHERS = slice(0, VOCABULARY)
STEPS = 3


def extended(*, tied: bool = True) -> nn.Module:
    """A tiny Llama with three tokens more, as a script that is about to train them has it."""
    model = tiny_model("llama-causal-lm")
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    torch.manual_seed(1)
    model.resize_token_embeddings(VOCABULARY + len(NEW))
    return model.train()


def embeddings(model: nn.Module) -> Tensor:
    return model.get_input_embeddings().weight


def head(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight


def some_batches() -> Iterator[dict[str, Tensor]]:
    """Each with two of the new tokens, one of which is a target alone."""
    for step in range(STEPS):
        batch = tiny_inputs("llama-causal-lm", seed=step)
        batch["input_ids"][0, 3] = batch["labels"][0, 3] = NEW[step % 2]
        batch["labels"][1, 5] = NEW[2]
        yield batch


def only_embeddings(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    embeddings(model).requires_grad_(True)
    return model


def run(model: nn.Module, optimizer: torch.optim.Optimizer, *, then=None, clip=None) -> None:
    for batch in some_batches():
        model(**batch).loss.backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if then is not None:
            then()


def zero_gradient_of_others(weight: Tensor) -> None:
    def masked(gradient: Tensor) -> Tensor:
        mask = torch.zeros_like(gradient)
        mask[NEW] = 1
        return gradient * mask

    weight.register_hook(masked)


def rows_alone(
    model: nn.Module,
    weights: list[Tensor],
    *,
    batches: Iterable[dict[str, Tensor]] | None = None,
    clip: float | None = None,
) -> None:
    """Train the new rows of `weights` beside whatever else requires grad."""
    model.double()
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not w for w in weights)]
    rows = [nn.Parameter(weight.detach()[NEW].clone()) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = AdamW([*rest, *rows], **ADAM)
    for batch in batches or some_batches():
        model(**batch).loss.backward()
        for weight, own in zip(weights, rows, strict=True):
            own.grad, weight.grad = weight.grad[NEW].clone(), None
        if clip is not None:
            clip_grad_norm_([*rest, *rows], clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, own in zip(weights, rows, strict=True):
                weight[NEW] = own


def with_this_library(model: nn.Module, **options) -> MaskedAdamW:
    """The same run; checks that what stays keeps its bits. Returns the optimizer."""
    clip = options.pop("clip", None)
    rows = options.pop("rows", {"embed_tokens": NEW})
    before = embeddings(model).detach().clone()
    handle = patch_model(model, MilestoneSchedule({}, embeddings="always"), rows=rows)
    groups = handle.param_groups(weight_decay=ADAM["weight_decay"])
    optimizer = MaskedAdamW(groups, **ADAM, max_grad_norm=clip)
    run(model, optimizer, then=handle.advance)
    assert torch.equal(embeddings(model)[OTHERS], before[OTHERS])
    handle.unpatch()
    return optimizer


def assert_rows(model: nn.Module, truth: nn.Module) -> None:
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=1e-5, atol=1e-6)


def test_the_page_lists_these_threads():
    page = (Path(__file__).parent.parent / "docs/tables/threads.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[\S+/(\S+)#(\d+)\]", page.partition("## New tokens")[2], flags=re.M)
    starts = [f"test_{name}_{number}_".lower().replace("-", "_") for name, number in listed]
    tests = [name for name in globals() if re.match(r"test_\w+?_\d+_", name)]
    assert starts and len(starts) == len(tests)
    assert all(map(str.startswith, tests, starts)), (tests, starts)


def test_diffusers_1009_rows_with_a_zeroed_gradient_decay():
    model, before = only_embeddings(extended()), embeddings(extended()).detach()
    zero_gradient_of_others(embeddings(model))
    run(model, AdamW([embeddings(model)], **ADAM))
    shrunk = (1 - ADAM["lr"] * ADAM["weight_decay"]) ** STEPS
    torch.testing.assert_close(embeddings(model)[OTHERS], before[OTHERS] * shrunk)

    model, truth = only_embeddings(extended()), only_embeddings(extended())
    with_this_library(model)
    rows_alone(truth, [embeddings(truth)])
    assert_rows(model, truth)


def test_transformers_29897_rows_with_a_zeroed_gradient_go_on_by_momentum():
    """The embeddings train as a whole at first; then a hook leaves the new rows alone."""
    model = only_embeddings(extended())
    optimizer = AdamW([embeddings(model)], **{**ADAM, "weight_decay": 0.0})
    model(**next(some_batches())).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = embeddings(model).detach().clone()
    zero_gradient_of_others(embeddings(model))
    model(**next(some_batches())).loss.backward()
    optimizer.step()
    moved = (embeddings(model) != before).any(1)
    assert moved[OTHERS].all()

    model = only_embeddings(extended())
    with torch.no_grad():
        embeddings(model).copy_(before)
    truth = only_embeddings(extended())
    truth.load_state_dict(model.state_dict())
    with_this_library(model)
    rows_alone(truth, [embeddings(truth)])
    assert_rows(model, truth)


def test_diffusers_1665_clipping_counts_rows_that_are_put_back():
    """The other rows are copied back after every step, and their gradients scale the new ones'."""
    clip = 1e-2
    model, truth = only_embeddings(extended()), only_embeddings(extended())
    rows_alone(truth, [embeddings(truth)], clip=clip)
    kept = embeddings(model).detach()[OTHERS].clone()  # a second matrix, as large as the first

    @torch.no_grad()
    def put_back() -> None:
        embeddings(model)[OTHERS] = kept

    run(model, AdamW([embeddings(model)], **ADAM), then=put_back, clip=clip)
    moved = [(embeddings(m)[NEW] - embeddings(extended())[NEW]).norm() for m in (model, truth)]
    assert moved[0] < 0.9 * moved[1]

    model = only_embeddings(extended())
    with_this_library(model, clip=clip)
    assert_rows(model, truth)


def test_llama_factory_6186_a_mask_keeps_gradient_and_state_of_all_rows():
    model = only_embeddings(extended())
    weight = embeddings(model)
    zero_gradient_of_others(weight)
    optimizer = AdamW([weight], **ADAM)
    model(**next(some_batches())).loss.backward()
    optimizer.step()
    step_counter = 4
    assert weight.grad.nbytes == weight.nbytes
    assert state_bytes(optimizer) == 2 * weight.nbytes + step_counter

    model = only_embeddings(extended())
    handle = patch_model(
        model, MilestoneSchedule({}, embeddings="always"), rows={"embed_tokens": NEW}
    )
    optimizer = MaskedAdamW(handle.param_groups(), **ADAM)
    model(**next(some_batches())).loss.backward()
    held = [*model.parameters(), *(p for g in optimizer.param_groups for p in g["params"])]
    kept = {p.grad.data_ptr(): p.grad.nbytes for p in held if p.grad is not None}
    rows_bytes = len(NEW) * weight[0].nbytes
    assert sum(kept.values()) == rows_bytes
    optimizer.step()
    assert 2 * rows_bytes <= state_bytes(optimizer) < 2 * rows_bytes + 64


def test_fromage_18_an_untied_head_trains_as_a_whole():
    """A new token needs its row in both weights; only the gradient of the embeddings is zeroed."""
    model = only_embeddings(extended(tied=False))
    head(model).requires_grad_(True)
    before = head(model).detach().clone()
    zero_gradient_of_others(embeddings(model))
    run(model, AdamW([embeddings(model), head(model)], **ADAM))
    assert (head(model) != before).any(1).all()

    model, truth = (extended(tied=False).requires_grad_(False) for _ in range(2))
    before = head(model).detach().clone()
    with_this_library(model, rows={"embed_tokens": NEW, "lm_head": NEW})
    assert torch.equal(head(model)[OTHERS], before[OTHERS])
    rows_alone(truth, [embeddings(truth), head(truth)])
    assert_rows(model, truth)


def test_qlora_214_embeddings_that_train_beside_an_adapter_are_not_saved(tmp_path):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    for patched in (False, True):
        model = peft.get_peft_model(extended(tied=False), lora)
        start = embeddings(model).detach().clone()
        if patched:
            with_this_library(model)
        else:
            embeddings(model).requires_grad_(True)
            run(model, AdamW(model.parameters(), **ADAM))
        moved = (embeddings(model) != start).any(1)
        assert moved[NEW].all() and bool(moved[OTHERS].any()) is not patched
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(extended(tied=False), tmp_path)
        assert torch.equal(embeddings(loaded), embeddings(model)) is patched
