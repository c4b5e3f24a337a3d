"""Rows in memory and on disk against a dictionary: contents, budget, reuse of space, precision."""

from __future__ import annotations

import gc
import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progtuning_kernels.cache import PrefixCache, row_store
from progtuning_kernels.cache.row_store import RowStore, free_cpu_bytes, stored_dtype

CPU = torch.device("cpu")
LOSSY = [torch.bfloat16, torch.float16]


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def any_bits(tokens: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """NaN, infinities, negative zeros and subnormals included."""
    shape = (tokens, width * dtype.itemsize)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8).view(dtype)


def held_bytes(store: RowStore) -> int:
    """What the tensors in memory hold, and the rows of the file."""
    places = [row for rows in store._levels.values() for row in rows.values()]
    disk = store._disk.used if store._disk else 0
    return disk + sum(p.untyped_storage().nbytes() for p in places if isinstance(p, torch.Tensor))


def padded(
    rows: list[torch.Tensor], spans: list[tuple[int, int]], length: int, filler: float
) -> torch.Tensor:
    out = torch.full((len(rows), length, rows[0].shape[1]), filler, dtype=rows[0].dtype)
    for i, (row, (start, end)) in enumerate(zip(rows, spans, strict=True)):
        out[i, start:end] = row
    return out


@st.composite
def _batch(draw: st.DrawFn) -> tuple[int, list[int], int, list[tuple[int, int]], int]:
    level = draw(st.integers(0, 2))
    keys = draw(st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True))
    length = draw(st.integers(1, 7))
    pair = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).map(tuple)
    spans = draw(st.lists(pair, min_size=len(keys), max_size=len(keys)))
    return level, keys, length, spans, draw(st.integers(0, 1000))


@settings(max_examples=200, deadline=None)
@given(
    device=st.sampled_from(["cpu", "auto", "disk"]),
    dtype=st.sampled_from([None, torch.bfloat16]),
    activation=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    width=st.sampled_from([1, 6, 130]),
    budget=st.integers(0, 12_000),
    steps=st.lists(st.tuples(st.sampled_from("wwwrd"), _batch()), max_size=25),
)
def test_store_is_a_dictionary_with_a_budget(
    tmp_path_factory, device, dtype, activation, width, budget, steps
):
    folder = None if device == "cpu" else tmp_path_factory.mktemp("rows")
    kept = stored_dtype(dtype, activation)
    exact = kept == activation
    model: dict[tuple[int, bytes], torch.Tensor] = {}
    store = RowStore(budget, device=device, dtype=dtype, path=folder)
    store.bind("weights")
    for action, (level, numbers, length, spans, seed) in steps:
        keys = [key(number) for number in numbers]
        if action == "w":
            make = any_bits if exact else (lambda *a: any_bits(*a).nan_to_num(0.5, 2, -2) % 3)
            rows = [
                make(end - start, width, activation, seed + i)
                for i, (start, end) in enumerate(spans)
            ]
            before = store.contains(level, keys)
            stored = store.write(level, keys, padded(rows, spans, length, 9.0), spans)
            assert stored == sum(map(store.rows, store.levels())) - len(model)
            for k, row, old, now in zip(
                keys, rows, before, store.contains(level, keys), strict=True
            ):
                if now and not old and (level, k) not in model:
                    model[level, k] = row.to(kept).to(activation)
        elif action == "d":
            whole = seed % 3 == 0
            store.drop(level, None if whole else keys)
            for place in list(model):
                if place[0] == level and (whole or place[1] in keys):
                    del model[place]
        known = {k for place, k in model if place == level}
        assert store.contains(level, keys) == [k in known for k in keys]
        keys = [k for k in keys if k in known]
        if action == "r" and keys:
            rows = [model[level, k] for k in keys]
            starts = [random.Random(seed + i).randrange(3) for i in range(len(keys))]
            spans = [(a, a + len(row)) for a, row in zip(starts, rows, strict=True)]
            shape = (len(keys), max(9, *[end for _, end in spans]), width)
            read = store.read(level, keys, shape, spans, device=CPU, dtype=activation)
            assert bits(read) == bits(padded(rows, spans, shape[1], 0.0))
        sizes = [len(row) * width * kept.itemsize for row in model.values()]
        assert store.nbytes == sum(sizes) == held_bytes(store) <= budget
        assert sum(store.nbytes_by_tier.values()) == store.nbytes
        assert store.levels() == tuple(sorted({place for place, _ in model}))
    store.close()


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_rows_are_kept_in_the_order_of_writing_up_to_the_budget(device, tmp_path):
    hidden = torch.randn(10, 4, 16)
    store = RowStore(7 * 256 + 100, device=device, path=tmp_path)
    store.bind("weights")
    keys, spans = [key(i) for i in range(10)], [(0, 4)] * 10
    for _ in range(3):  # epochs
        store.write(1, keys, hidden, spans)
        assert store.contains(1, keys) == [True] * 7 + [False] * 3
    assert store.write(1, keys[7:], hidden[7:], [(0, 1)] * 3) == 1  # the rest takes a short one
    assert store.nbytes == 7 * 256 + 64
    store.close()


@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_change_of_stage_reuses_the_space_of_every_row(device, tmp_path):
    draw = random.Random(0)
    lengths = [draw.randrange(1, 33) for _ in range(512)]
    hidden = torch.randn(2, 512, 32, 16)
    budget = sum(64 * n for n in lengths)  # not a byte more than the rows take
    store = RowStore(budget, device=device, path=tmp_path)
    store.bind("weights")

    def batches():
        order = list(range(512))
        draw.shuffle(order)
        for at in range(0, 512, 16):
            chosen = order[at : at + 16]
            yield chosen, [key(i) for i in chosen], [(0, lengths[i]) for i in chosen]

    for chosen, keys, spans in batches():
        store.write(1, keys, hidden[0, chosen], spans)
    stored = store.rows(1)
    assert stored == 512
    moved = 0
    for chosen, keys, spans in batches():
        there = store.contains(1, keys)
        chosen, keys, spans = (
            [x for x, yes in zip(xs, there, strict=True) if yes] for xs in (chosen, keys, spans)
        )
        store.read(1, keys, (len(keys), 32, 16), spans, device=CPU, dtype=torch.float32)
        store.drop(1, keys)
        moved += store.write(2, keys, hidden[1, chosen], spans)
        assert held_bytes(store) <= budget
    assert moved == stored and store.rows(2) == moved and store.levels() == (2,)
    for chosen, keys, spans in batches():
        for i, k, span in zip(chosen, keys, spans, strict=True):
            if store.contains(2, [k]) == [True]:
                row = store.read(2, [k], (1, 32, 16), [span], device=CPU, dtype=torch.float32)
                assert torch.equal(row[0, : span[1]], hidden[1, i, : span[1]])
    store.drop(2)
    assert (store.nbytes, held_bytes(store), store.levels()) == (0, 0, ())
    if device == "disk":
        assert (tmp_path / "rows.sqlite").stat().st_size < 1 << 17
    store.close()


def test_what_is_not_there_as_asked_for_is_a_key_error():
    store = RowStore(1 << 20)
    store.bind("weights")
    store.write(1, [key(0)], torch.randn(1, 5, 8), [(1, 5)])

    def read(level=1, k=0, width=8, span=(2, 6), length=6):
        shape, spans = (1, length, width), [span]
        return store.read(level, [key(k)], shape, spans, device=CPU, dtype=torch.float32)

    assert read().shape == (1, 6, 8)
    for wrong in (dict(level=2), dict(k=1), dict(width=4), dict(span=(1, 6)), dict(span=(3, 6))):
        with pytest.raises(KeyError):
            read(**wrong)
    with pytest.raises(TypeError, match="floating"):
        store.write(1, [key(1)], torch.ones(1, 5, 8, dtype=torch.int64), [(0, 5)])
    with pytest.raises(RuntimeError, match="bind"):
        RowStore(1 << 20).write(1, [key(0)], torch.randn(1, 5, 8), [(0, 5)])


@pytest.mark.parametrize(
    "settings_",
    [
        dict(max_bytes=-1),
        dict(max_bytes=0),
        dict(device="gpu"),
        dict(dtype=torch.int8),
        dict(dtype="4bit"),
        dict(device="disk"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings_):
    with pytest.raises(ValueError):
        PrefixCache(**{"max_bytes": 1, **settings_})


def test_sample_that_is_twice_in_a_batch_is_stored_once():
    store = RowStore(1 << 20)
    store.bind("weights")
    hidden = torch.randn(1, 3, 8).expand(2, 3, 8)
    assert store.write(1, [key(0)] * 2, hidden, [(0, 3)] * 2) == store.rows(1) == 1
    read = store.read(1, [key(0)] * 2, (2, 3, 8), [(0, 3)] * 2, device=CPU, dtype=torch.float32)
    assert torch.equal(read, hidden)


def test_other_weights_drop_everything_in_memory():
    store = RowStore(1 << 20)
    store.bind("weights")
    hidden = torch.randn(2, 3, 8)
    store.write(1, [key(0), key(1)], hidden, [(0, 3)] * 2)
    store.bind("weights")
    assert store.rows(1) == 2
    store.bind("other weights")
    assert (store.levels(), store.nbytes, held_bytes(store)) == ((), 0, 0)
    assert store.write(1, [key(0)], hidden[:1], [(0, 3)]) == 1


def test_rows_do_not_hang_on_the_tensor_they_came_from():
    hidden = torch.randn(1, 3, 8, requires_grad=True)
    store = RowStore(1 << 20)
    store.bind("weights")
    store.write(1, [key(0)], hidden, [(0, 3)])
    expected = hidden.detach().clone()
    with torch.no_grad():
        hidden.zero_()
    read = store.read(1, [key(0)], (1, 3, 8), [(0, 3)], device=CPU, dtype=torch.float32)
    assert torch.equal(read, expected) and not read.requires_grad
    read.zero_()
    again = store.read(1, [key(0)], (1, 3, 8), [(0, 3)], device=CPU, dtype=torch.float32)
    assert torch.equal(again, expected)


def test_rows_of_several_dtypes_are_read_in_one_batch():
    store = RowStore(1 << 20)
    store.bind("weights")
    hidden = torch.randn(3, 4, 8)
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        store.write(1, [key(i)], hidden[i : i + 1].to(dtype), [(0, 4)])
    keys = [key(i) for i in (2, 0, 1)]
    read = store.read(1, keys, (3, 4, 8), [(0, 4)] * 3, device=CPU, dtype=torch.float32)
    expected = [hidden[2].half().float(), hidden[0], hidden[1].bfloat16().float()]
    assert torch.equal(read, torch.stack(expected))


def test_a_dtype_that_saves_nothing_is_not_used():
    hidden = torch.randn(1, 3, 8).bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        store = RowStore(1 << 20, dtype=dtype)
        store.bind("weights")
        store.write(1, [key(0)], hidden, [(0, 3)])
        read = store.read(1, [key(0)], (1, 3, 8), [(0, 3)], device=CPU, dtype=torch.bfloat16)
        assert torch.equal(read, hidden)


@pytest.mark.parametrize("dtype", LOSSY, ids=str)
def test_rows_that_the_dtype_cannot_hold_are_not_stored(dtype):
    hidden = torch.randn(5, 3, 8)
    hidden[1, 2, 3] = float("nan")
    hidden[3, 0, 0] = float("inf")
    hidden[4, 1, 1] = 1e5  # float16 ends at 65,504
    store = RowStore(1 << 20, dtype=dtype)
    store.bind("weights")
    keys, spans = [key(i) for i in range(5)], [(0, 3)] * 5
    with pytest.warns(UserWarning, match="cannot hold"):
        stored = store.write(1, keys, hidden, spans)
    there = [True, False, True, False, dtype != torch.float16]
    assert (store.contains(1, keys), stored) == (there, sum(there))
    assert store.nbytes == stored * 3 * 8 * dtype.itemsize
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per kind
        assert store.write(1, keys, hidden, spans) == 0
    assert len(store.warnings) == 1


def test_memory_that_others_need_is_left_to_them(monkeypatch, tmp_path):
    hidden, spans = torch.randn(10, 8, 8), [(0, 8)] * 10  # rows of 256 bytes
    keys = [key(i) for i in range(10)]
    store = RowStore(1 << 20)
    store.bind("weights")
    monkeypatch.setattr(row_store, "free_cpu_bytes", lambda: 1100)
    assert store.write(1, keys, hidden, spans) == 2  # half
    monkeypatch.setattr(row_store, "free_cpu_bytes", lambda: 600)
    assert store.write(1, keys, hidden, spans) == 0  # of 600 and those that are there
    monkeypatch.setattr(row_store, "free_cpu_bytes", lambda: 1 << 30)
    assert store.write(1, keys, hidden, spans) == 8

    monkeypatch.setattr(row_store, "free_cpu_bytes", lambda: 0)
    for device, bytes_ in (("cpu", 256), ("auto", 0)):
        store = RowStore(1 << 20, device=device)
        store.bind("weights")
        store.write(1, keys[:1], hidden[:1], spans[:1])
        assert store.nbytes == bytes_  # "cpu": the budget is the user's word
    store = RowStore(1 << 20, path=tmp_path)
    store.bind("weights")
    assert store.write(1, keys[:1], hidden[:1], spans[:1]) == 1
    assert store.nbytes_by_tier == {"cuda": 0, "cpu": 0, "disk": 256}
    store.close()


def test_free_memory_is_what_the_machine_says():
    assert 1 << 20 < free_cpu_bytes() < 1 << 50


def test_free_memory_that_the_system_does_not_tell_is_no_endless_budget(monkeypatch):
    def no_such_file(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(row_store.Path, "read_text", no_such_file)
    assert free_cpu_bytes() == 4 << 30


def test_no_memory_is_no_error(monkeypatch):
    store = RowStore(1 << 20)
    store.bind("weights")
    hidden = torch.randn(1, 3, 8)

    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", refuse)
        assert store.write(1, [key(0)], hidden, [(0, 3)]) == 0
    assert store.contains(1, [key(0)]) == [False]


def test_close_gives_memory_back_and_can_be_called_again():
    store = RowStore(1 << 20)
    store.bind("weights")
    store.write(1, [key(0)], torch.randn(1, 3, 8), [(0, 3)])
    store.close()
    store.close()
    assert (store.nbytes, store.contains(1, [key(0)])) == (0, [False])
    with pytest.raises(RuntimeError, match="bind"):
        store.write(1, [key(0)], torch.randn(1, 3, 8), [(0, 3)])


def _gpu_store(device: str, dtype=None, path=None) -> RowStore:
    store = RowStore(1 << 28, device=device, dtype=dtype, path=path)
    store.bind("weights")
    return store


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["auto", "cuda", "cpu", "disk"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_gpu_rows_are_those_of_the_cpu(device, dtype, tmp_path):
    hidden = torch.randn(16, 32, 256)
    keys, spans = [key(i) for i in range(16)], [(i, 32) for i in range(16)]
    reads = []
    for source in (hidden, hidden.cuda()):
        path = tmp_path / source.device.type
        store = _gpu_store("cpu" if source is hidden else device, dtype, path)
        assert store.write(1, keys, source, spans) == 16
        for reader in (CPU, source.device):
            read = store.read(1, keys, hidden.shape, spans, device=reader, dtype=torch.float32)
            assert read.device.type == reader.type
            reads.append(read.cpu())
        if source is not hidden:
            tier = {"auto": "cuda"}.get(device, device)
            assert store.nbytes_by_tier[tier] == store.nbytes > 0
        store.close()
    for read in reads[1:]:
        torch.testing.assert_close(read, reads[0], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gpu_copies_are_ordered_whatever_overwrites_what(device):
    store = _gpu_store(device)
    keys, spans = [key(i) for i in range(32)], [(0, 128)] * 32
    shape = (32, 128, 1024)
    hidden = torch.empty(shape, device="cuda")
    store.read(1, [], (0, 128, 1024), [], device=hidden.device, dtype=torch.float32)
    other = torch.cuda.Stream()
    for step in range(20):
        hidden.fill_(step)
        store.write(step, keys, hidden, spans)
        hidden.fill_(-1)  # while the copy to pinned memory may be under way
        junk = [torch.full(shape, -2.0, device="cuda") for _ in range(3)]  # reuses freed memory
        del junk
        with torch.cuda.stream(other if step % 3 == 0 else torch.cuda.current_stream()):
            read = store.read(step, keys, shape, spans, device=hidden.device, dtype=torch.float32)
            assert bool((read == step).all()), step
        store.drop(step)  # the next write takes the same space


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gpu_reads_never_wait(device):
    store = _gpu_store(device)
    hidden = torch.randn(8, 16, 64, device="cuda")
    keys, spans = [key(i) for i in range(8)], [(0, 16)] * 8
    if device == "cpu":  # waits for the copy
        store.write(1, keys, hidden, spans)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if device == "cuda":
            store.write(1, keys, hidden, spans)
        read = store.read(1, keys, hidden.shape, spans, device=hidden.device, dtype=hidden.dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(read, hidden)


@pytest.mark.gpu
def test_gpu_memory_takes_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(row_store, "free_gpu_bytes", lambda device: 3 << 20)
    store = _gpu_store("auto")
    for i in range(20):
        store.write(1, [key(i)], torch.randn(1, 64, 1024, device="cuda"), [(0, 64)])
    used = store.nbytes_by_tier
    assert used["cuda"] == 0 and used["cpu"] == 20 * 64 * 1024 * 4
    store.close()
    gc.collect()
