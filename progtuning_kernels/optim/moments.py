"""What both moments of one tensor are kept in, and how they get from one form into another.

Codes of 8 bits have one scale per block of 256 elements, and blocks begin with the first element of
a rank's shard: an update then needs nothing of another rank. The scales of all ranks are a DTensor
of (ranks, blocks of the largest shard), so that torch saves and loads them as it does the codes.
Where every shard begins at a multiple of 256 elements of the tensor, the blocks are those of one
process, and another number of ranks takes them over bit for bit; `fully_shard` does that to all
tensors with rows of 256, 768 or 4096 elements. Elsewhere such a move decodes every element by the
block that it was in, and rounds once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.masked_update.bucket import Moments, in_memory_order
from ..ops.masked_update.low_precision import (
    QUANT_BLOCK,
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    residual_of,
    with_residual,
)
from ..sharding import is_sharded, local_of

StateDtype = torch.dtype | Literal["8bit"]
MasterWeights = bool | Literal["8bit"]
_CODES = {"exp_avg_code": torch.int8, "exp_avg_sq_code": torch.uint8}
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
MASTER_KEYS = ("master", "residual")
MOMENT_KEYS = ("exp_avg", "exp_avg_sq", *_CODES, *_SCALES)


def new_moments(p: Tensor, dtype: StateDtype) -> dict[str, Tensor]:
    """Zeros for one parameter; raise `ValueError` for codes of shards that are not rows."""
    if dtype != "8bit":
        return {key: torch.zeros_like(p, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
    ranks, _ = _rows_among(p)
    codes = {key: torch.zeros_like(p, dtype=kind) for key, kind in _CODES.items()}
    return codes | {key: _new_scales(p, ranks) for key in _SCALES}


def _new_scales(p: Tensor, ranks: int) -> Tensor:
    blocks = _blocks_in(_shard_elements(p.shape, ranks))
    if not is_sharded(p):
        return torch.zeros(blocks, dtype=torch.float32, device=p.device)
    from torch.distributed.tensor import DTensor

    own = torch.zeros(1, blocks, dtype=torch.float32, device=p.device)
    sharded: Any = p
    return DTensor.from_local(own, sharded.device_mesh, sharded.placements, run_check=False)


def with_whole_scales(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Scales whole on each rank, by a collective, where torch has cut those of other ranks anew."""
    cut = [k for k in _SCALES if k in saved and is_sharded(saved[k])]
    other = [k for k in cut if saved[k].shape[0] != _rows_among(saved[k])[0]]
    return {**saved, **{key: saved[key].full_tensor() for key in other}}


def check_shapes(saved: Mapping[str, Any], p: Tensor, label: str) -> None:
    """Raise `ValueError` for state of another shape, which `copy_` would spread over the rest."""
    for key, value in saved.items():
        if key not in ("step", *MASTER_KEYS, *MOMENT_KEYS):
            continue
        shape = () if key == "step" else tuple(p.shape)
        if key in _SCALES:
            blocks = _blocks_in(_shard_elements(p.shape, _ranks_of(value)))
            shape = (*value.shape[:-1], blocks) if value.ndim == 2 else (blocks,)
        if value.shape != shape:
            raise ValueError(
                f"the saved {key} of {label} is of shape {tuple(value.shape)}, not {shape}"
            )


def new_master(p: Tensor, like: Tensor, kind: MasterWeights) -> dict[str, Tensor]:
    """What is kept of one parameter beside itself, so that small updates are not lost; as `like`.

    Raises:
        ValueError: a residual for a float16 parameter.
    """
    if not kind or p.dtype not in (torch.bfloat16, torch.float16):
        return {}
    if kind != "8bit":
        return {"master": p.detach().to(like.device).float()}
    if p.dtype == torch.float16:
        raise ValueError(
            'master_weights="8bit" is for bfloat16 parameters, and one is float16: set '
            "master_weights=True"
        )
    return {"residual": torch.zeros_like(like, dtype=torch.int8)}


def copy_master(target: Mapping[str, Tensor], saved: Mapping[str, Any], p: Tensor) -> None:
    """Fill what `new_master` has made for p from a saved master, of either kind, where there is
    one.
    """
    kinds: dict[str, tuple[str, torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
        "residual": ("master", torch.float32, residual_of),
        "master": ("residual", torch.int8, with_residual),
    }
    for key in target.keys() & kinds.keys():
        other, dtype, convert = kinds[key]
        if key in saved:
            target[key].copy_(saved[key])
        elif other in saved:
            theirs = local_of(torch.empty_like(target[key], dtype=dtype).copy_(saved[other]))
            own = local_of(p).detach().to(theirs.device)
            local_of(target[key]).copy_(convert(own, theirs))


def moments_in(state: Mapping[str, Tensor]) -> Moments:
    """Moments of a shard, or of a whole tensor; a shard may have fewer blocks than the largest."""
    if "exp_avg" in state:
        return Moments(state["exp_avg"], state["exp_avg_sq"])
    codes = [state[key] for key in _CODES]
    blocks = _blocks_in(codes[0].numel())
    return Moments(*codes, *(state[key].view(-1)[:blocks] for key in _SCALES))


def wide_moments(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Both moments decoded: in float64 where they are in it, else in float32."""
    if "exp_avg" in state:
        m, v = state["exp_avg"], state["exp_avg_sq"]
        wide = torch.promote_types(m.dtype, torch.float32)
        return m.to(wide), v.to(wide)
    decoders = (decode_exp_avg, decode_exp_avg_sq)
    m, v = (_decoded(state, *form) for form in zip(_CODES, _SCALES, decoders, strict=True))
    return m, v


def _decoded(
    state: Mapping[str, Any], code: str, scale: str, decode: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Codes in float32, by scales of any number of ranks."""
    codes, scales = state[code], state[scale]
    # blocks run through memory, whatever the order of the dimensions
    own = in_memory_order(local_of(codes))
    ranks, rank = _rows_among(codes)
    first = rank * _shard_elements(codes.shape, ranks)
    shard = _shard_elements(codes.shape, _ranks_of(scales))  # elements, of the saved ones
    rows, above = local_of(scales).to(own.device), rank if is_sharded(scales) else 0
    rows = rows.view(-1, rows.shape[-1])
    parts, at = [own.new_empty(0, dtype=torch.float32)], 0
    while at < own.numel():
        writer, place = divmod(first + at, shard)
        taken = min(shard - place, own.numel() - at)
        inside = place % QUANT_BLOCK  # elements of the first block that lie before this part
        part = torch.nn.functional.pad(own[at : at + taken], (inside, 0))
        blocks = rows[writer - above, place // QUANT_BLOCK :][: _blocks_in(part.numel())]
        parts.append(decode(part, blocks)[inside:])
        at += taken
    wide = torch.empty_like(codes, dtype=torch.float32)
    in_memory_order(local_of(wide)).copy_(torch.cat(parts))
    return wide


def copy_moments(target: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Fill `target`, which `new_moments` has made; moments of the same kind keep their bits."""
    if "exp_avg" in target and "exp_avg" in saved:
        for key, value in target.items():
            value.copy_(saved[key])
        return
    if "exp_avg" in target:
        for key, wide in zip(target, wide_moments(saved), strict=True):
            target[key].copy_(wide)
        return
    own = moments_in({key: local_of(value) for key, value in target.items()})
    code, sq_code, scale, sq_scale = own
    assert scale is not None and sq_scale is not None
    ranks, rank = _rows_among(target["exp_avg_code"])
    if "exp_avg" not in saved and _same_blocks(
        target["exp_avg_code"].shape, ranks, _ranks_of(saved["exp_avg_scale"])
    ):
        for key in _CODES:
            target[key].copy_(saved[key])
        for key, mine in zip(_SCALES, (scale, sq_scale), strict=True):
            theirs = local_of(saved[key]).reshape(-1)
            before = 0 if is_sharded(saved[key]) else rank * target[key].shape[-1]
            mine.copy_(theirs[before:][: mine.numel()])
        return
    m, v = (
        in_memory_order(local_of(torch.empty_like(target[key], dtype=torch.float32).copy_(wide)))
        for key, wide in zip(_CODES, wide_moments(saved), strict=True)
    )
    # rounds to nearest: once, it is unbiased
    halfway = torch.full((v.numel(),), 2**15, dtype=torch.int64, device=v.device)
    for codes, scales, (encoded, largest) in (
        (code, scale, encode_exp_avg(m)),
        (sq_code, sq_scale, encode_exp_avg_sq(v, halfway)),
    ):
        in_memory_order(codes).copy_(encoded)
        scales.copy_(largest)


def _rows_among(t: Tensor) -> tuple[int, int]:
    """Number of ranks that a tensor's rows are cut among, and which of them this one is.

    (1, 0) for a tensor that is whole. Raises `ValueError` for shards of another kind.
    """
    ranks, own = 1, 0
    if is_sharded(t):
        sharded: Any = t
        cut = [i for i, kind in enumerate(sharded.placements) if not kind.is_replicate()]
        if len(cut) > 1 or not all(sharded.placements[i].is_shard(0) for i in cut):
            raise ValueError(
                f"8-bit moments of a tensor that is sharded as {sharded.placements}: only rows, as "
                "fully_shard cuts them, have blocks that can go to another number of ranks; use "
                "state_dtype=torch.bfloat16"
            )
        for i in cut:
            ranks, own = sharded.device_mesh.size(i), sharded.device_mesh.get_local_rank(i)
    return ranks, own


def _same_blocks(shape: Sequence[int], *ranks: int) -> bool:
    """Whether blocks begin at the same elements of a tensor, cut among these numbers of ranks."""
    return len(set(ranks)) == 1 or all(
        n == 1 or _shard_elements(shape, n) % QUANT_BLOCK == 0 for n in ranks
    )


def _shard_elements(shape: Sequence[int], ranks: int) -> int:
    """Elements of the first rank's shard; later ones have as many, until no rows are left."""
    rows, *others = shape or (1,)
    return -(-rows // ranks) * math.prod(others)


def _blocks_in(elements: int) -> int:
    return -(-elements // QUANT_BLOCK)


def _ranks_of(scales: Tensor) -> int:
    return scales.shape[0] if scales.ndim == 2 else 1
