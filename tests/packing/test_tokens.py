"""Which tokens are kept, where they stand, and that packing and padding are gathers, both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from progtuning_kernels.packing.tokens import (
    kept_places,
    pack_places,
    pad_heads,
    padding_follows,
    rounded_up,
    take_places,
)

CPU = torch.device("cpu")


@st.composite
def _masks(draw):
    """(B, T): padding on the right, the left, both sides, in holes, everywhere; rows of a token."""
    columns = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["span", "right", "left", "holes", "none", "one", "full"]))
        start, stop = sorted((draw(st.integers(0, columns)), draw(st.integers(0, columns))))
        row = np.zeros(columns, dtype=np.int64)
        if kind == "span":
            row[start:stop] = 1
        elif kind == "right":
            row[:stop] = 1
        elif kind == "left":
            row[start:] = 1
        elif kind == "holes":
            row[:] = draw(st.lists(st.integers(0, 1), min_size=columns, max_size=columns))
        elif kind == "one":
            row[draw(st.integers(0, columns - 1))] = 1
        elif kind == "full":
            row[:] = 1
        rows.append(row)
    return torch.tensor(np.array(rows))


_DTYPES = st.sampled_from([torch.int64, torch.bool, torch.float32, torch.float64, torch.uint8])
_GROUPS = st.sampled_from([1, 2, 4, 8])
_COSTS = st.sampled_from([0.0, 5.0, 1e9])


def _expected_places(mask, labels, columns):
    """By hand, place by place."""
    rows, size = mask.shape
    kept = np.zeros((rows, size), dtype=bool)
    for row in range(rows):
        for at in range(size):
            kept[row, at] = bool(mask[row, at])
            if labels is not None:
                kept[row, at] |= bool(labels[row, at] != -100)
                kept[row, at] |= at + 1 < size and bool(labels[row, at + 1] != -100)
            kept[row, at] |= at in {c % size for c in columns}
        if not mask[row].any():
            kept[row] = True
    return kept


@given(
    mask=_masks(),
    dtype=_DTYPES,
    columns=st.sampled_from([(), (0,), (-1,), (0, -1)]),
    seed=st.none() | st.integers(0, 99),
)
def test_kept_places(mask, dtype, columns, seed):
    labels = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(5, mask.shape, generator=generator)
        labels[torch.rand(mask.shape, generator=generator) < 0.6] = -100
    given_mask = mask.to(dtype)
    before = given_mask.clone()
    kept = kept_places(given_mask, labels, columns)
    assert kept.dtype == bool
    assert np.array_equal(kept, _expected_places(mask, labels, columns))
    assert torch.equal(given_mask, before)


@given(mask=_masks())
def test_padding_follows(mask):
    expected = all("01" not in "".join(map(str, row)) for row in mask.tolist())
    assert padding_follows(mask.numpy().astype(bool)) == expected


@given(mask=_masks(), groups=_GROUPS, cost=_COSTS)
def test_every_kept_place_is_packed_once(mask, groups, cost):
    kept = kept_places(mask)
    tokens = pack_places(kept, CPU, groups=groups, cost=cost)
    places = np.flatnonzero(kept)
    assert sorted(tokens.index.tolist()) == places.tolist()
    assert tokens.count == len(places) and tokens.padded_shape == mask.shape
    slot = tokens.slot.flatten()
    assert torch.equal(slot[tokens.index], torch.arange(tokens.count))
    # what stands at padding is of the same row: NaN in one row spoils no other
    rows = torch.arange(mask.shape[0]).repeat_interleave(mask.shape[1])
    assert torch.equal(tokens.index[slot] // mask.shape[1], rows)


@given(mask=_masks(), groups=_GROUPS, cost=_COSTS)
def test_groups_hold_all_tokens_once(mask, groups, cost):
    kept = kept_places(mask)
    tokens = pack_places(kept, CPU, groups=groups, cost=cost)
    assert len(tokens.groups) <= groups
    if groups == 1 or mask.shape[0] == 1:
        assert tokens.groups == ()
    if not tokens.groups:
        return
    at, rows_seen = 0, []
    for group in tokens.groups:
        assert group.first == at < group.last
        at = group.last
        rows_seen += group.rows.tolist()
        start, stop = group.columns
        width, size = stop - start, group.last - group.first
        assert len(group.slot) == len(group.rows) * width
        assert torch.equal(group.slot[group.index], torch.arange(size))
        # each of its tokens stands at the place in the batch that the whole index names
        row, column = group.index // width, group.index % width + start
        place = group.rows[row] * mask.shape[1] + column
        assert torch.equal(place, tokens.index[group.first : group.last])
        rows_of_slots = torch.arange(len(group.rows)).repeat_interleave(width)
        assert torch.equal(row[group.slot], rows_of_slots)
    assert at == tokens.count
    assert sorted(rows_seen) == list(range(mask.shape[0]))
    # groups are made because they leave less: rows times columns squared, and the cost of each
    area = sum(len(g.rows) * (g.columns[1] - g.columns[0]) ** 2 + cost for g in tokens.groups)
    assert area < mask.shape[0] * mask.shape[1] ** 2 + cost


def test_groups_leave_the_least_area():
    """Against every way to cut the rows, longest first."""
    lengths = [9, 9, 7, 4, 4, 3, 1]
    kept = np.arange(9)[None] < np.array(lengths)[:, None]
    tokens = pack_places(kept[[3, 0, 6, 2, 1, 5, 4]], CPU, groups=3)
    found = sum(len(g.rows) * (g.columns[1] - g.columns[0]) ** 2 for g in tokens.groups)
    best = min(
        a * lengths[0] ** 2 + (b - a) * lengths[a] ** 2 + (7 - b) * lengths[b] ** 2
        for a in range(1, 6)
        for b in range(a + 1, 7)
    )
    assert (found, len(tokens.groups)) == (best, 3)


def _values(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@given(mask=_masks(), groups=_GROUPS)
def test_pack_and_unpack(mask, groups):
    rows, columns = mask.shape
    kept = torch.tensor(kept_places(mask))
    tokens = pack_places(kept.numpy(), CPU, groups=groups)
    padded = _values(rows, columns, 3)
    packed = tokens.pack(padded)
    assert packed.shape == (1, tokens.count, 3)
    assert torch.equal(packed[0], padded.flatten(0, 1)[tokens.index])
    assert torch.equal(tokens.unpack(packed), padded * kept[..., None])
    assert torch.equal(tokens.pad(packed)[kept], padded[kept])
    shared = _values(1, columns, 3, seed=1)  # of all rows, as position embeddings are
    assert torch.equal(
        tokens.pack(shared)[0], shared.expand(rows, -1, -1).flatten(0, 1)[tokens.index]
    )


@given(mask=_masks(), groups=_GROUPS, heads=st.integers(1, 3), tokens_first=st.booleans())
def test_heads_are_padded_in_either_layout(mask, groups, heads, tokens_first):
    kept = torch.tensor(kept_places(mask))
    tokens = pack_places(kept.numpy(), CPU, groups=groups, cost=0.0)
    count, rows = tokens.count, mask.shape[0]
    packed = _values(1, count, heads, 2).transpose(1, 2)  # (1, heads, N, width)
    if not tokens_first:
        packed = packed.contiguous()
    padded = pad_heads(packed, tokens.slot.flatten(), tokens.index, rows)
    assert padded.shape == (rows, heads, mask.shape[1], 2)
    expected = packed[0].transpose(0, 1)
    assert torch.equal(padded.transpose(1, 2).flatten(0, 1)[tokens.index], expected)
    assert torch.equal(take_places(padded.transpose(1, 2), tokens.index)[0], expected)
    for group in tokens.groups:
        part = packed[:, :, group.first : group.last]
        made = pad_heads(part, group.slot, group.index, len(group.rows)).transpose(1, 2)
        assert torch.equal(take_places(made, group.index)[0], part[0].transpose(0, 1))


def _both_ways(mask):
    """Functions of one tensor, ours and by plain indexing, and the shape of that tensor."""
    kept = kept_places(mask)
    tokens = pack_places(kept, CPU, groups=4, cost=0.0)
    rows, columns = mask.shape
    flat, index = tokens.slot.flatten(), tokens.index
    real = torch.tensor(kept)
    count = tokens.count

    def unpack(x):
        made = x.new_zeros(rows * columns, x.shape[2])
        made[index] = x[0]
        return made.view(rows, columns, -1)

    def pad_real(x):  # gradients that come to padding are dropped
        return torch.where(real[..., None], x[0][flat].view(rows, columns, -1), 0.0)

    def pad_heads_real(x):
        made = x[0][:, flat].view(x.shape[1], rows, columns, -1).transpose(0, 1)
        return torch.where(real[:, None, :, None], made, 0.0)

    return {
        "pack": (tokens.pack, lambda x: x.flatten(0, 1)[index][None], (rows, columns, 2)),
        "unpack": (tokens.unpack, unpack, (1, count, 2)),
        "pad": (tokens.pad, pad_real, (1, count, 2)),
        "pad_heads": (
            lambda x: pad_heads(x, flat, index, rows),
            pad_heads_real,
            (1, 3, count, 2),
        ),
        "take_places": (
            lambda x: take_places(x, index),
            lambda x: x.flatten(0, 1)[index][None],
            (rows, columns, 2),
        ),
    }


@pytest.mark.parametrize("name", ["pack", "unpack", "pad", "pad_heads", "take_places"])
@given(mask=_masks())
def test_gradients_are_those_of_plain_indexing(name, mask):
    ours, plain, shape = _both_ways(mask)[name]
    found = []
    for function in (ours, plain):
        x = _values(*shape)
        made = function(x)
        weights = _values(*made.shape, seed=2).detach()
        # the square makes the gradient depend on x, so that it has a gradient itself
        (first,) = torch.autograd.grad(
            (made.square() * weights).sum(), x, create_graph=True, allow_unused=True
        )
        (second,) = torch.autograd.grad((first**3).sum(), x)
        found.append((first, second))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0)


@given(mask=_masks())
def test_no_gradient_comes_from_padding(mask):
    """NaN there reaches neither a token nor the gradient of one."""
    kept = torch.tensor(kept_places(mask))
    tokens = pack_places(kept.numpy(), CPU, groups=1)
    packed = _values(1, tokens.count, 2)
    padded = tokens.pad(packed)
    spoilt = torch.where(kept[..., None], 1.0, torch.nan).expand_as(padded)
    padded.backward(spoilt)
    assert torch.equal(packed.grad, torch.ones_like(packed))
    x = _values(*mask.shape, 2)
    tokens.pack(x).sum().backward()
    assert torch.equal(x.grad, kept[..., None].expand_as(x).double())


@given(mask=_masks(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.int64]))
def test_other_dtypes_keep_every_bit(mask, dtype):
    tokens = pack_places(kept_places(mask), CPU, groups=4)
    padded = (torch.arange(mask.numel()) % 251).view(*mask.shape, 1).to(dtype)
    packed = tokens.pack(padded)
    assert packed.dtype == dtype
    assert torch.equal(packed[0], padded.flatten(0, 1)[tokens.index])
    assert torch.equal(tokens.pad(packed).flatten(0, 1)[tokens.index], packed[0])
    assert tokens.unpack(packed).dtype == dtype


def test_what_all_blocks_get_is_packed_once():
    tokens = pack_places(np.array([[True, True], [True, False]]), CPU, groups=1)
    positions = torch.arange(4).view(2, 2)
    assert tokens.pack_once(positions) is tokens.pack_once(positions)
    trains = _values(2, 2, 3)  # a recomputation repeats all of a forward: its graph is not kept
    assert tokens.pack_once(trains) is not tokens.pack_once(trains)
    # two tensors, one after the other at one address
    for value in range(20):
        made = torch.full((2, 2), value)
        assert tokens.pack_once(made).tolist() == [[value] * 3]
        del made


@given(mask=_masks(), sizes=st.integers(1, 9))
def test_rounded_up_there_are_few_numbers_of_tokens(mask, sizes):
    kept = mask.numpy().astype(bool)
    more = rounded_up(kept, sizes)
    step = -(-kept.size // sizes)
    assert more[kept].all() and more.sum() - kept.sum() < step
    assert more.sum() in (*range(0, kept.size, step), kept.size)
