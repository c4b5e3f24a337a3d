"""What a row is recognised by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached_models import repadded
from tiny_models import BATCH, tiny_inputs

from progtuning_kernels.cache.content_keys import digest_rows, signature
from progtuning_kernels.model.call import Call, UnknownContent


def _digests(inputs: dict[str, Any], **options: Any) -> tuple[bytes, ...]:
    return digest_rows(Call((), (), inputs), b"", **{"unpadded": True, **options}).digests


def test_what_a_row_is_recognised_by():
    inputs = tiny_inputs("bert-sequence")
    base = _digests(inputs)
    assert len(set(base)) == BATCH and all(len(d) == 16 for d in base)
    assert _digests({**inputs, "labels": inputs["labels"] + 1}) == base
    assert _digests({**inputs, "return_dict": True, "num_items_in_batch": torch.tensor(3)}) == base
    assert _digests(repadded(inputs, more=5)) == base
    assert _digests(repadded(inputs, more=5), unpadded=False) != _digests(inputs, unpadded=False)
    assert _digests({"input_ids": inputs["input_ids"]})[0] == base[0]  # no mask: all ones
    ids = inputs["input_ids"].clone()
    ids[2, -1] = 50  # padding
    assert _digests({**inputs, "input_ids": ids}) == base
    ids[2, 0] += 1
    assert _digests({**inputs, "input_ids": ids})[:2] == base[:2]
    assert _digests({**inputs, "input_ids": ids})[2] != base[2]
    for name in ("token_type_ids", "position_ids", "anything"):
        zeros = torch.zeros_like(inputs["input_ids"])
        changed = zeros.clone()
        changed[1, 2] = 1
        one, other = (_digests({**inputs, name: value}) for value in (zeros, changed))
        assert [a == b for a, b in zip(one, other, strict=True)] == [True, False, True]
        assert not set(one) & set(base)
    holes = inputs["attention_mask"].clone()
    holes[0, 3] = 0
    assert _digests({**inputs, "attention_mask": holes})[0] != base[0]
    assert Call((), (), {**inputs, "attention_mask": holes}).spans[0][0] == (0, 11)
    assert _digests({**inputs, "scale": 2.0}) != base
    shared = {**inputs, "position_ids": torch.arange(11)[None]}
    assert not set(_digests(shared)) & set(base)
    pixels = tiny_inputs("vit-image")
    assert len(set(_digests(pixels))) == BATCH
    with pytest.raises(UnknownContent, match="is a list"):
        _ = signature(Call((), (), {**inputs, "images": [1, 2]}))
    with pytest.raises(UnknownContent, match="no argument"):
        _ = Call((), (), {"scale": torch.tensor(1.0)}).size
