"""Makes the small batch on which packing is tried, from rows of the batch at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.call import MASK, Call, text_configs

DECODER_MASK = "decoder_attention_mask"
_MOST_TOKENS = 16  # of a row
_ROWS = 4


def masks_of(call: Call) -> dict[str, Tensor]:
    """Masks (B, T) of a forward, by name; one of several sequences a row is flattened to that."""
    found = {}
    for name in (MASK, DECODER_MASK):
        mask = call.tensors.get(name)
        if mask is not None and mask.ndim in (2, 3):
            found[name] = mask.flatten(0, -2)
    return found


def trial_calls(call: Call, model: nn.Module) -> Iterator[Call]:
    """Calls with a few short rows, the most telling first.

    Rows are full, padded on the right, on the left, and on both sides of one token; then with all
    padding on the right; then some rows as they are. Sizes differ from each other and from every
    size of the model, so that a dimension can be told by its size.
    """
    taken = _sizes_of(model)
    for sides in ("both", "right"):
        made = _shortened(call, model, taken, sides)
        if made is not None:
            yield made
    yield _as_they_are(call)


def _sizes_of(model: nn.Module) -> set[int]:
    sizes = {size for p in model.parameters() for size in p.shape}
    for config in text_configs(getattr(model, "config", None)):
        sizes |= {v for v in vars(config).values() if isinstance(v, int)}
    return sizes | {1, _ROWS}


def _as_they_are(call: Call) -> Call:
    masks = masks_of(call)
    lengths = next(iter(masks.values())).ne(0).sum(-1).view(call.size, -1).sum(1)
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    return call.take(sorted({longest, shortest, call.size - 1}))


def _shortened(call: Call, model: nn.Module, taken: set[int], sides: str) -> Call | None:
    masks = masks_of(call)
    taken = set(taken)
    per_token: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, mask in masks.items():
        if call.tensors[name].ndim != 2 or mask.shape[0] != call.size:
            return None
        chosen = _choose(mask.ne(0).cpu().numpy(), taken, sides)
        if chosen is None:
            return None
        taken |= {chosen[0].shape[1], int((chosen[0] >= 0).sum())}
        per_token[name] = chosen
    (rows, *_), first = [c[1] for c in per_token.values()], next(iter(masks))
    index = torch.as_tensor(rows, dtype=torch.long, device=call.device)

    def change(name: str, value: Any) -> Any:
        if not call.has_rows(name):
            return value
        of = DECODER_MASK if DECODER_MASK in masks and _is_decoders(name) else first
        value = value.index_select(0, index)
        if value.ndim < 2 or value.shape[1] != masks[of].shape[1]:
            return value
        columns = torch.as_tensor(per_token[of][0], dtype=torch.long, device=value.device)
        picked = columns.clamp(min=0).view(*columns.shape, *(1 for _ in value.shape[2:]))
        made = value.gather(1, picked.expand(-1, -1, *value.shape[2:]))
        padding = columns < 0
        return made.masked_fill(
            padding.view(picked.shape), _at_padding(name, call, masks[of], model)
        )

    return call.changed(change)


def _is_decoders(name: str) -> bool:
    return name.startswith("decoder") or name == "labels"


def _choose(kept: np.ndarray, taken: set[int], sides: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Columns of the batch that stand at each place of a row, -1 at padding, and the rows' numbers.

    Rows keep their first and last token.
    """
    tokens = next(
        (t for t in range(min(kept.shape[1], _MOST_TOKENS), 4, -1) if t not in taken), None
    )
    if tokens is None:
        return None
    sized = taken | {tokens}
    pairs = ((a, b) for a in range(tokens - 1, 2, -1) for b in range(2, a))
    lengths = next(((a, b) for a, b in pairs if tokens + a + b + 1 not in sized), None)
    if lengths is None:
        return None
    a, b = lengths
    counts = kept.sum(1)
    best = np.argsort(-counts, kind="stable")
    if counts[best[0]] == 0:
        return None
    rows = np.array([best[min(i, int((counts > 0).sum()) - 1)] for i in range(_ROWS)])
    spans = {
        "both": [(0, tokens), (0, a), (tokens - b, tokens), (tokens // 2, tokens // 2 + 1)],
        "right": [(0, tokens), (0, a), (0, b), (0, 1)],
    }[sides]
    columns = np.full((_ROWS, tokens), -1)
    for at, (row, (start, stop)) in enumerate(zip(rows, spans, strict=True)):
        places = np.flatnonzero(kept[row])
        spread = np.linspace(0, len(places) - 1, stop - start).round().astype(int)
        columns[at, start:stop] = places[spread]
    return columns, rows


def _at_padding(name: str, call: Call, mask: Tensor, model: nn.Module) -> Any:
    """What stands at padding in an argument that is per token."""
    if name in (MASK, DECODER_MASK):
        return 0
    value = call.tensors[name]
    if value.is_floating_point() or value.dtype is torch.bool:
        return 0
    if "label" in name:
        return -100  # with labels there, every place would be kept, and nothing shown
    there = (mask == 0).nonzero()
    if len(there):
        at = value[there[0][0], there[0][1]]
        return at.flatten()[0].item()
    if name in ("input_ids", "decoder_input_ids"):
        for config in text_configs(getattr(model, "config", None)):
            if isinstance(number := getattr(config, "pad_token_id", None), int):
                return number
    return 0
