"""The table of families in the docs, made from the models that the tests run.

python tests/support/family_table.py
"""

from __future__ import annotations

from collections import defaultdict

from tiny_models import BOUNDARIES, CHECKPOINTED, GENERATING, IN_EVERY_MODE, MODELS, tiny_model

from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots

NAMES = {
    "bert": "BERT",
    "bart": "BART",
    "clip": "CLIP vision",
    "deberta": "DeBERTa",
    "deberta-v2": "DeBERTa-v2, v3",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "gemma3n_text": "Gemma 3n",
    "fsmt": "FSMT",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX",
    "hubert": "HuBERT",
    "modernbert": "ModernBERT",
    "mpnet": "MPNet",
    "opt": "OPT",
    "phi3": "Phi-3",
    "qwen2": "Qwen 2",
    "qwen2_moe": "Qwen 2 MoE",
    "qwen3": "Qwen 3",
    "qwen3_moe": "Qwen 3 MoE",
    "roberta": "RoBERTa",
    "siglip": "SigLIP",
    "t5": "T5",
    "vit": "ViT",
    "wav2vec2": "Wav2Vec2",
    "xlm": "XLM",
    "xlm-roberta": "XLM-RoBERTa",
}


HEADS = {
    "causal-lm": "causal LM",
    "masked-lm": "masked LM",
    "seq2seq-lm": "sequence to sequence",
    "speech-lm": "speech to text",
    "sequence": "sequence",
    "token": "token",
    "qa": "question answering",
    "image": "image",
    "audio": "audio",
    "contrastive": "contrastive",
}


def _shared(name: str) -> list[str]:
    """What several units of the tiny model use."""
    model = tiny_model(name)
    layout = find_layout(model)
    found = []
    for slot in parameter_slots(model, layout):
        if len(slot.units) > 1:
            owner = slot.name.split(".")[-2]
            users = "embeddings, head" if EMBEDDINGS in slot.units else "blocks of a stack"
            found.append(f"`{owner}` ({users})")
    return found


def family_table() -> str:
    """One row a family; the numbers are boundaries proved, summed over the heads."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in MODELS:
        families[tiny_model(name).config.model_type].append(name)
    rows = []
    for model_type, names in families.items():
        tried = len(BOUNDARIES) * len(names)
        checkpointed = len(BOUNDARIES) * len(set(names) & set(CHECKPOINTED))
        beyond = ["precisions, outputs"] if set(names) & set(IN_EVERY_MODE) else []
        beyond += ["generate"] if set(names) & set(GENERATING) else []
        heads = dict.fromkeys(text for n in names for end, text in HEADS.items() if n.endswith(end))
        cells = [
            NAMES.get(model_type, model_type.capitalize()),
            ", ".join(heads),
            str(tried),
            str(checkpointed or "has none"),
            str(tried),
            ", ".join(beyond),
            ", ".join(dict.fromkeys(shared for name in names for shared in _shared(name))),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    head = ["Family", "Heads", "Plain", "Checkpointing", "LoRA", "Also", "Shared or tied"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---|---|"]
    return "\n".join([*lines, *sorted(rows, key=str.casefold)])


if __name__ == "__main__":
    print(family_table())
