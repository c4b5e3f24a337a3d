"""Which of transformers' architectures can be cut into units, and where truncation is proved.

Every architecture that transformers builds from its default config is built without memory (on the
meta device) and handed to discovery. Then a shrunken config of it is tried: where such a model runs
on random input, its gradients at every boundary are compared with those of plain freezing, and the
truncation is asserted. Where a model is refused, the cure that the message names is applied to the
letter, and the model tried again. No model of a hub is needed.

    python benchmarks/architectures.py --output benchmarks/results/<device>/architectures.json
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import json
import os
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from rich.progress import track
from stored_results import store
from torch import nn
from torch.utils import _pytree as pytree
from transformers.models.auto import modeling_auto

from progtuning_kernels import (
    FreezePlan,
    MilestoneSchedule,
    TruncationError,
    UnsupportedModelError,
    patch_model,
    register_family,
)
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.model.families import FAMILIES
from progtuning_kernels.model.layout import EMBEDDINGS, Layout, find_layout, parameter_slots

BATCH, TOKENS, VOCABULARY = 2, 8, 101
SECONDS = 60  # of CPU time for one architecture
ROUNDS = 20  # of following a cure
# What makes a config small: the first pattern that an attribute's name fits. Zeros stay.
SMALL: list[tuple[tuple[str, ...], int]] = [
    (("vocab_size",), VOCABULARY),
    (("num_key_value_heads", "num_kv_heads"), 2),
    (("num_attention_heads", "attention_heads", "num_heads", "n_head", "n_heads"), 4),
    (("rotary_dim", "head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    (("q_lora_rank", "kv_lora_rank", "embedding_size", "word_embed_proj_dim"), 16),
    (("num_experts_per_tok", "top_k", "moe_k", "n_group", "topk_group", "moe_topk"), 1),
    (("num_experts", "n_routed_experts", "num_local_experts"), 4),
    (("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 4),
    (("encoder_layers", "decoder_layers"), 2),
    (("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"), 48),
    (
        (
            "hidden_size",
            "true_hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embed_dim",
            "projection_dim",
        ),
        32,
    ),
    (("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    (("max_target_positions",), 64),
    (("image_size",), 32),
    (("patch_size",), 8),
    (("num_mel_bins",), 16),
]
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
DEPTH = 4


class _TooSlow(Exception):
    pass


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow(f"not done within {SECONDS} s of CPU time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def model_classes() -> dict[str, str]:
    """model_type -> the class without a head, or else the first with one."""
    names = sorted(n for n in vars(modeling_auto) if n.endswith("MAPPING_NAMES"))
    names.sort(key=lambda n: n != "MODEL_MAPPING_NAMES")
    classes: dict[str, str] = {}
    for name in names:
        for model_type, cls in getattr(modeling_auto, name).items():
            classes.setdefault(model_type, cls if isinstance(cls, str) else cls[0])
    return {t: c for t, c in sorted(classes.items()) if t in transformers.CONFIG_MAPPING}


def shrink(config: Any) -> Any:
    """The same config with few and narrow layers; configs inside it too."""
    settings: dict[str, Any] = {}
    depth = DEPTH
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "torch_dtype", "dtype"):
            continue
        if hasattr(value, "to_dict"):
            settings[name] = shrink(value).to_dict()
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            settings[name] = [32 if name == "image_size" else 8] * len(value)
        elif isinstance(value, float) and ("drop" in name or name.endswith("_prob")):
            settings[name] = 0.0
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            if name in TOKEN_IDS:
                settings[name] = min(value, 3)
                continue
            for names, small in SMALL:
                if name in names or any(name.endswith("_" + n) for n in names):
                    settings[name] = min(value, small)
                    if ("layers" in name and "encoder" in name) or name == "decoder_layers":
                        depth = 2
                    break
    if getattr(config, "kv_lora_rank", None):  # latent attention has as many of both
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, value in vars(config).items():
        if name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            settings[name] = list(value)[:depth]
    return type(config)(**settings)


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", 32)
    return tuple(size[-2:]) if isinstance(size, list | tuple) else (size, size)


def inputs_of(
    model: nn.Module, config: Any, *, rows: int = BATCH, tokens: int = TOKENS
) -> dict[str, torch.Tensor]:
    """Random inputs of a shrunken model; its text has no padding."""
    generator = torch.Generator().manual_seed(1)
    name = model.main_input_name
    parameters = inspect.signature(model.forward).parameters
    if name == "input_ids":
        ids = torch.randint(4, 90, (rows, tokens), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "attention_mask" not in parameters:
            del inputs["attention_mask"]
        if "pixel_values" in parameters and hasattr(config, "vision_config"):
            height, width = _image_size(config.vision_config)
            inputs["pixel_values"] = torch.randn(rows, 3, height, width, generator=generator)
    elif name == "pixel_values":
        (height, width), channels = _image_size(config), getattr(config, "num_channels", 3)
        inputs = {name: torch.randn(rows, channels, height, width, generator=generator)}
    elif name == "input_values":
        inputs = {name: torch.randn(rows, 16000, generator=generator)}
    else:
        mels = getattr(config, "num_mel_bins", 16)
        inputs = {name: torch.randn(rows, mels, 128, generator=generator)}
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = torch.randint(4, 90, (rows, 5), generator=generator)
    return inputs


def _gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients of the mean square of everything that the model returns in floating point."""
    model.zero_grad()
    outputs = pytree.tree_leaves(dict(model(**inputs)))
    loss = sum(
        t.float().square().mean()
        for t in outputs
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad
    )
    if isinstance(loss, torch.Tensor):
        loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or name == "p"):
                setattr(module, name, 0.0)
    return model


def _frozen_by_hand(model: nn.Module, layout: Layout, plan: FreezePlan) -> None:
    on = {EMBEDDINGS: plan.embeddings, layout.head: plan.head, **dict(enumerate(plan.trainable))}
    for slot in parameter_slots(model, layout):
        if not all(on[unit] for unit in slot.units):
            slot.parameter.requires_grad_(False)


def prove(
    build: Callable[[], nn.Module],
    inputs: Callable[[nn.Module], dict[str, Any]],
    blocks: str | list[str] | None = None,
) -> dict[str, Any]:
    """Compare every boundary with plain freezing.

    Args:
        build: makes the model; it gets the same weights every time.
        inputs: makes the model's inputs.
        blocks: as in `patch_model`.

    Returns:
        {"boundaries": how many were proved, "bit_equal": whether gradients agree to the bit}.
    """
    torch.manual_seed(0)
    state = build().state_dict()

    def model() -> nn.Module:
        fresh = without_dropout(build()).train()
        fresh.load_state_dict(state)
        return fresh

    layout = find_layout(model(), blocks)
    batch = inputs(model())
    try:
        gradients = _gradients(model(), batch)
    except Exception:  # of any model's own kind
        if {"input_ids", "pixel_values"} - batch.keys():
            raise
        del batch["pixel_values"]  # it wants image tokens in the text, or patches: text alone
        gradients = _gradients(model(), batch)
    if not gradients:
        raise RuntimeError("the model returns nothing that can be trained")
    # a forward that trains everything shows where bare parameters belong
    with patch_model(model(), MilestoneSchedule({1: 1}), blocks=blocks, packing="off") as handle:
        _gradients(handle.model, batch)
        layout = handle.layout
    proved, bit_equal = 0, True
    for boundary in range(1, layout.num_blocks + 1):
        schedule = MilestoneSchedule({0: boundary}, embeddings="never")
        plan = schedule.plan(0, layout.num_blocks)
        plain, patched = model(), model()
        _frozen_by_hand(plain, layout, plan)
        if not any(p.requires_grad for p in plain.parameters()):
            continue  # a model without head
        torch.manual_seed(2)
        expected = _gradients(plain, batch)
        handle = patch_model(patched, schedule, frozen_mode="train", blocks=blocks, packing="off")
        torch.manual_seed(2)
        found = _gradients(patched, batch)
        if found.keys() != expected.keys():
            names = sorted(found.keys() ^ expected.keys())
            raise TruncationError(
                f"boundary {boundary}: gradients of {names[:2]} in one of the two"
            )
        largest = max((float(g.abs().max()) for g in expected.values()), default=0.0)
        for name, gradient in expected.items():
            # a weight that a batch norm follows has a gradient of rounding errors only
            tolerance = 1e-4 * gradient.abs().max() + 1e-6 * largest
            if (found[name] - gradient).abs().max() > tolerance:
                raise TruncationError(f"boundary {boundary}: gradient of {name} differs")
            bit_equal &= torch.equal(found[name], gradient)
        if expected:
            handle.truncation_report().assert_truncated()
            proved += 1
    return {"boundaries": proved, "bit_equal": bit_equal}


def error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def survey(model_type: str, class_name: str) -> dict[str, Any]:
    """What becomes of one architecture."""
    try:
        with time_limit():
            config = transformers.CONFIG_MAPPING[model_type]()
            cls = getattr(transformers, class_name)
            with torch.device("meta"):
                model = cls(config)
    except Exception as error:
        return {"class": class_name, "status": "not built", "reason": error_line(error)}
    known = dict(FAMILIES)
    try:
        return {"class": class_name} | cured(lambda blocks: _attempt(model, config, blocks))
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)


def _attempt(model: nn.Module, config: Any, blocks: str | list[str] | None) -> dict[str, Any]:
    """Cut the model, and prove its shrunken twin."""
    cls = type(model)
    try:
        layout = find_layout(model, blocks)
    except UnsupportedModelError as error:
        return {"status": "refused", "reason": str(error)}
    row = {"status": "cut", "stacks": {s.path: s.length for s in layout.stacks}}
    try:
        with time_limit():
            small = shrink(config)
            proof = prove(lambda: cls(small), lambda model: inputs_of(model, small), blocks)
            row |= {"status": "proved", **proof}
    except UnsupportedModelError as error:
        row |= {"status": "refused at the first forward", "reason": str(error)}
    except TruncationError as error:
        row |= {"status": "wrong", "reason": error_line(error)}
    except Exception as error:  # the shrunken config does not fit, or the input is another
        row |= {"reason": error_line(error)}
    return row


def printed_cure(message: str) -> str | None:
    """The call or argument that a refusal names; None where it names none."""
    found = re.search(
        r"register_family\('[^']*', \w+=r'[^']*'\)|blocks=('[^']*'|\[[^]]*\])", message
    )
    return None if found is None else found.group()


def cured(attempt: Callable[[str | list[str] | None], dict[str, Any]]) -> dict[str, Any]:
    """What becomes of a model, and of the cures that its refusals name, followed to the letter.

    `FAMILIES` keeps the rules that they registered.

    Args:
        attempt: tries the model with these `blocks`; returns a row with "status" and "reason".

    Returns:
        The row of the first attempt. Where that is refused, "cures" holds what was passed or
        called in turn, "cured" the row of the last attempt, and "cure" what came of it: it "works",
        to the proof; "cuts" the model, which then did not run; is "repeated"; is said to be "none";
        or is "not said".
    """
    blocks: str | list[str] | None = None
    row = first = attempt(blocks)
    cures: list[str] = []
    while row["status"].startswith("refused"):
        cure = printed_cure(row["reason"])
        if cure is None:
            outcome = "none" if "there is no cure" in row["reason"] else "not said"
            break
        if cure in cures or len(cures) == ROUNDS:
            outcome = "repeated"
            break
        cures.append(cure)
        if cure.startswith("blocks="):
            blocks = ast.literal_eval(cure.removeprefix("blocks="))
        else:
            eval(cure, {"register_family": register_family})
        row = attempt(blocks)
    else:
        if not cures or row["status"] == "wrong":
            return row
        outcome = "works" if row["status"] == "proved" else "cuts"
    return first | {"cure": outcome, "cures": cures} | ({"cured": row} if cures else {})


def summary(content: dict[str, Any]) -> str:
    """A stored survey in a few sentences, for the docs."""
    rows = list(content["architectures"].values())
    counts = Counter(row["status"] for row in rows)
    late = counts["refused at the first forward"]
    cut = counts["cut"] + counts["proved"] + late
    built = cut + counts["refused"] + counts["wrong"]
    stacks = Counter(min(len(row["stacks"]), 3) for row in rows if "stacks" in row)
    proved = [row for row in rows if row["status"] == "proved"]
    rounded = sum(not row["bit_equal"] for row in proved)
    boundaries = sum(row["boundaries"] for row in proved)
    cures = Counter(row["cure"] for row in rows if "cure" in row)
    followed = (
        f"What a refusal tells to call was called, to the letter: {cures['works']} models then "
        f"proved right, {cures['cuts']} more were cut and did not run, for {cures['none']} the "
        f"refusal says that nothing helps, and for {cures['repeated'] + cures['not said']} it led "
        "nowhere. "
    )
    version = content["meta"]["versions"]["transformers"]
    return (
        f"Of the {built} architectures that transformers {version} builds from its default "
        f"configs, {cut} are cut into units ({stacks[1]} have one stack, {stacks[2]} two, "
        f"{stacks[3]} more) and {counts['refused']} are refused with a reason. {len(proved)} of "
        f"them also ran, shrunken, on random input: at all {boundaries:,} boundaries the gradients "
        f"were those of plain freezing ({rounded} to rounding, the others to the bit) and nothing "
        f"was left below; {counts['wrong']} were wrong, {late} refused by the first forward. "
        f"{followed if cures else ''}The "
        "rest did not run on a blindly shrunken config; for them your first forward decides. "
        "(`benchmarks/architectures.py`)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; without it only a summary")
    parser.add_argument("--only", nargs="*", help="model types")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    classes = model_classes()
    chosen = {t: classes[t] for t in args.only} if args.only else classes
    rows = {t: survey(t, c) for t, c in track(chosen.items(), description="architectures")}
    for model_type, row in rows.items():
        if args.only or row["status"] in ("wrong", "refused at the first forward"):
            print(model_type, json.dumps(row))
    counts = Counter(row["status"] for row in rows.values())
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    if args.output:
        meta = provenance(torch.device("cpu"))
        store({"meta": meta, "architectures": rows}, args.output)


if __name__ == "__main__":
    main()
