"""What structure alone gets wrong about a family of models: a table, and how to add to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

EMBEDDINGS = -1  # unit number of the embeddings; blocks are 0..L-1, the head is L


class UnsupportedModelError(ValueError):
    """The model cannot be cut into embeddings, blocks and head; the message says why."""


@dataclass(frozen=True)
class Family:
    """What structure alone gets wrong for one `config.model_type`, or for one class of modules.

    The first five are regular expressions, searched in parameter names and in module paths that end
    in a dot, both as they are in the patched model. Where several match, shared goes before after,
    and these before the others; of those, one that matches a name to its end goes before one that
    matches what is around it, and head before embeddings before first_block. A module of which a
    rule names a part is cut into its parts. Where a rule names a parameter to its end, its module
    is never run without autograd, and may be used above the boundary too.

    Attributes:
        head: these are head although they are registered before the last block.
        after: these run after the stack that they stand beside, though registered before it.
        embeddings: these are embeddings although they are registered after the first block.
        first_block: these run between block 0 and block 1, and belong to block 0.
        shared: every block of the stack that these stand in or beside uses them; they are trainable
            only while all of those blocks are.
        blocks: ends of the paths of the block lists, in the order in which they run.
        beside: names of lists next to the block list whose i-th module belongs to block i.
    """

    head: str | None = None
    after: str | None = None
    embeddings: str | None = None
    first_block: str | None = None
    shared: str | None = None
    blocks: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


_RELATIVE_BIAS = Family(shared=r"relative_attention_bias\.")
_LATE_NORM = Family(embeddings=r"layernorm_embedding\.")
_PER_LAYER = Family(embeddings=r"(^|\.)(ple|embed_tokens_per_layer|per_layer_\w+)\.")
_AUDIO_PROMPTS = Family(embeddings=r"(^|\.)(audio_\w+|num_speakers|duration_delta)_(proj|embed)\.")
_LOGIT_SCALE = Family(head=r"(^|\.)logit_(scale|bias)\b")
# Taken for head structurally: they spread the embeddings over AltUp's four streams.
_ALTUP = Family(embeddings=r"(^|\.)(altup_projections|embed_tokens_per_layer|per_layer_\w+)\.")
_FOUR_LISTS = Family(blocks=("attentions",), beside=("layer_norm1", "ffns", "layer_norm2"))

FAMILIES: dict[str, Family] = {
    # The final norm, and OPT's output projection, are registered before `layers`.
    "opt": Family(after=r"decoder\.(final_layer_norm|project_out)\."),
    **dict.fromkeys(("t5gemma", "t5gemma2"), Family(after=r"\.norm\.")),
    "wav2vec2-conformer": Family(after=r"encoder\.layer_norm\."),
    # Their other encoder norms before `layers`, where it is registered in both.
    **{
        f"{model}EncoderStableLayerNorm": Family(after=r"encoder\.layer_norm\.")
        for model in ("Wav2Vec2", "Hubert", "UniSpeech", "UniSpeechSat", "WavLM")
    },
    "qianfan_ocr_vision": Family(after=r"(^|\.)layernorm\."),
    "jina_embeddings_v3": Family(after=r"(^|\.)pooler\."),
    # Relative positions that every block uses.
    "deberta": Family(shared=r"encoder\.rel_embeddings\."),
    **dict.fromkeys(
        ("deberta-v2", "sew-d"),
        Family(shared=r"encoder\.(rel_embeddings|LayerNorm)\.", first_block=r"encoder\.conv\."),
    ),
    "yolos": Family(shared=r"encoder\.(interpolation|mid_position_embeddings)"),
    "cpmant": Family(
        shared=r"(^|\.)position_bias\.", embeddings=r"(^|\.)(segment|input)_embedding\."
    ),
    "mpnet": Family(shared=r"encoder\.relative_attention_bias\."),
    # Block 0 computes the bias that every block of its stack adds.
    **dict.fromkeys(("t5", "mt5", "longt5", "switch_transformers"), _RELATIVE_BIAS),
    "udop": Family(shared=r"relative_attention_bias\.", embeddings=r"\.cell_2d_embedding\."),
    # The norm over the embeddings is registered after `layers`.
    **dict.fromkeys(("bart", "mbart", "plbart", "mvp", "led", "blenderbot-small"), _LATE_NORM),
    # So are tables of one vector a token and block.
    **dict.fromkeys(("gemma4_text", "embedding_gemma2_text"), _PER_LAYER),
    "gemma3n_text": _ALTUP,
    "git": Family(blocks=("encoder.layer",), embeddings=r"(^|\.)visual_projection\."),
    **dict.fromkeys(("pocket_tts", "gradium_phonon_tts"), _AUDIO_PROMPTS),
    # The temperature of the contrastive loss stands beside the towers.
    **dict.fromkeys(("clip", "siglip", "siglip2", "chinese_clip", "altclip"), _LOGIT_SCALE),
    # No module holds a block: its parts stand in four lists.
    **dict.fromkeys(("xlm", "flaubert"), _FOUR_LISTS),
    # The multimodal stack reads the two others.
    "flava": Family(
        blocks=(
            "text_model.encoder.layer",
            "image_model.encoder.layer",
            "multimodal_model.encoder.layer",
        ),
        head=r"(^|\.)logit_scale\b",
    ),
    # The text model is registered first and reads the images.
    "kosmos-2": Family(blocks=("vision_model.model.encoder.layers", "text_model.model.layers")),
    "kosmos-2.5": Family(blocks=("vision_model.encoder.layer", "text_model.model.layers")),
}


def register_family(model_type: str | type, **rules: Any) -> Family:
    r"""Tell discovery what structure alone gets wrong about one kind of models.

    Rules add to those that the kind has already, those of one field too: patterns are joined by
    "or", lists made longer.

    Args:
        model_type: `model.config.model_type`, or a class or its name, for models without config.
            The model may be of that kind, or hold a module that is.
        **rules: fields of `Family`.

    Returns:
        The rules now in force.

    Raises:
        ValueError: an unknown rule, or a pattern that is no regular expression.
        TypeError: `model_type` is neither a string nor a class.

    Example:
        ```python
        register_family("mine", embeddings=r"^encoder\.late_norm\.")
        register_family("MyEncoder", embeddings=r"^encoder\.late_norm\.")
        ```
    """
    if isinstance(model_type, type):
        model_type = model_type.__name__
    if not isinstance(model_type, str):
        raise TypeError(f"register_family takes a model_type or a class, not {model_type!r}")
    FAMILIES[model_type] = joined(FAMILIES.get(model_type, Family()), rules)
    return FAMILIES[model_type]


def joined(family: Family, rules: Mapping[str, Any]) -> Family:
    """The family with more rules; see `register_family`."""
    names = {field.name for field in fields(Family)}
    new: dict[str, Any] = {}
    for name, rule in rules.items():
        if name not in names:
            raise ValueError(f"unknown rule {name!r}; there is {', '.join(sorted(names))}")
        old = getattr(family, name)
        if name in ("blocks", "beside"):
            added = (rule,) if isinstance(rule, str) else tuple(rule)
            new[name] = tuple(dict.fromkeys(old + added))
            continue
        try:
            re.compile(rule)
            if old is not None:  # a cell of a notebook may run again
                known = old == rule or old.startswith(f"{rule}|") or old.endswith(f"|{rule}")
                rule = old if known else f"{old}|{rule}"
            re.compile(rule)
            new[name] = rule
        except (re.error, TypeError) as error:
            raise ValueError(f"{name}={rule!r} is no regular expression: {error}") from None
    return replace(family, **new)


def ruled_unit(name: str, families: Sequence[Family], head: int) -> int | None:
    """Unit that a family's rules give to a parameter name or to a path that ends in a dot.

    A rule that matches it to its end goes first, then one that so matches a module around it.
    """
    parts = name.removesuffix(".").split(".")
    around = [".".join(parts[:i]) + "." for i in range(len(parts) - 1, 0, -1)]
    exact = (matched_unit(path, families, head, end=r"\Z") for path in (name, *around))
    found = next((unit for unit in exact if unit is not None), None)
    return matched_unit(name, families, head) if found is None else found


def matched_unit(name: str, families: Sequence[Family], head: int, end: str = "") -> int | None:
    for family in families:
        for pattern, unit in (
            (family.head, head),
            (family.embeddings, EMBEDDINGS),
            (family.first_block, 0),
        ):
            if pattern and re.search(f"(?:{pattern}){end}", name):
                return unit
    return None


def is_shared(name: str, families: Sequence[Family]) -> bool:
    return any(f.shared and re.search(f.shared, name) for f in families)


def kinds_of(model: nn.Module) -> list[str]:
    """Names that a family may be registered under: classes and types of the model's modules."""
    kinds: dict[str, None] = {}
    for module in model.modules():
        kinds |= dict.fromkeys(cls.__name__ for cls in type(module).__mro__)
        model_type = getattr(module.__dict__.get("config"), "model_type", None)
        if isinstance(model_type, str):
            kinds[model_type] = None
    return list(kinds)


def kind_of(model: nn.Module) -> str:
    """The name that a rule for this very model is registered under."""
    own = getattr(getattr(model, "config", None), "model_type", None)
    return own if own in kinds_of(model) else type(model).__name__


def register_call(model: nn.Module, rule: str, pattern: str) -> str:
    """The call that gives this model a rule, as a user types it."""
    return f"register_family({kind_of(model)!r}, {rule}=r'{pattern}')"
