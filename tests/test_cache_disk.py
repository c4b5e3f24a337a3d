"""Rows on disk after everything that can happen to a file and to a process: right, or not there."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from progtuning_kernels.cache import disk
from progtuning_kernels.cache.row_store import RowStore

CPU = torch.device("cpu")
WIDTH, LENGTH = 3, 6
ROWS = [(level, number) for level in (1, 2) for number in range(4)]


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def tokens_of(level: int, number: int, version: int = 0) -> int:
    return (level + 2 * number + version) % LENGTH + 1


def hidden_of(level: int, number: int, version: int = 0) -> torch.Tensor:
    """(tokens, WIDTH), other values for every row and version."""
    generator = torch.Generator().manual_seed(1000 * version + 100 * level + number)
    return torch.randn(tokens_of(level, number, version), WIDTH, generator=generator)


def open_store(path: Path, fingerprint: str = "weights", **kwargs) -> RowStore:
    store = RowStore(kwargs.pop("max_bytes", 1 << 20), device="disk", path=path, **kwargs)
    store.bind(fingerprint)
    return store


def write(store: RowStore, level: int, *numbers: int, version: int = 0) -> int:
    hidden = torch.full((len(numbers), LENGTH, WIDTH), 9.0)
    spans = []
    for i, number in enumerate(numbers):
        row = hidden_of(level, number, version)
        hidden[i, : len(row)] = row
        spans.append((0, len(row)))
    return store.write(level, [key(n) for n in numbers], hidden, spans)


def rows_found(store: RowStore, versions: int = 1) -> set[tuple[int, int]]:
    """The rows that are there; each must be what was written to it once, and nothing else."""
    found = set()
    for level, number in ROWS:
        if store.contains(level, [key(number)]) == [True]:
            expected = [hidden_of(level, number, version) for version in range(versions)]
            assert any(_read(store, level, number, row) for row in expected), (level, number)
            found.add((level, number))
    assert sum(map(store.rows, store.levels())) == len(found)
    return found


def _read(store: RowStore, level: int, number: int, expected: torch.Tensor) -> bool:
    spans, shape = [(0, len(expected))], (1, len(expected), WIDTH)
    try:
        read = store.read(level, [key(number)], shape, spans, device=CPU, dtype=torch.float32)
    except KeyError:  # of another length, and so of another version
        return False
    return torch.equal(read[0], expected)


def rebuild(store: RowStore) -> None:
    """What training does with rows that it does not find."""
    for level, number in ROWS:
        if store.contains(level, [key(number)]) == [False]:
            assert write(store, level, number) == 1


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where it can be: ext4 goes to the device whenever one file replaces another."""
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight rows at two levels, written, dropped and written again."""
    store = open_store(tmp_path / "rows of a run")
    for level in (1, 2):
        write(store, level, 0, 1, 2, 3, version=1)
        store.drop(level, [key(2), key(0)])
        assert write(store, level, 0, 2) == 2
        store.drop(level, [key(1), key(3)])
        assert write(store, level, 3, 1) == 2
    store.close()
    return tmp_path / "rows of a run"


def test_rows_are_found_again(folder):
    store = open_store(folder)
    assert store.levels() == (1, 2) and rows_found(store) == set(ROWS) and not store.warnings
    held = store.nbytes
    assert write(store, 1, *range(4)) == 0
    store.drop(1)
    store.close()
    store = open_store(folder)
    assert store.levels() == (2,) and 0 < store.nbytes < held
    rebuild(store)
    store.close()
    assert rows_found(open_store(folder)) == set(ROWS)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "8bit"], ids=str)
def test_bytes_are_those_of_memory(tmp_path, dtype):
    hidden, spans = torch.randn(4, 5, 130), [(0, 5), (2, 4), (0, 1), (5, 5)]
    keys = [key(i) for i in range(4)]
    reads = []
    for path in (None, tmp_path, tmp_path):
        store = RowStore(1 << 20, device="disk" if path else "cpu", dtype=dtype, path=path)
        store.bind("weights")
        store.write(1, keys, hidden, spans)
        for activation in (torch.float32, torch.float16):
            reads += [store.read(1, keys, (4, 5, 130), spans, device=CPU, dtype=activation)]
        store.close()
    for read in reads[2:4], reads[4:]:
        assert torch.equal(read[0], reads[0]) and torch.equal(read[1], reads[1])


@pytest.mark.parametrize("other", ["fingerprint", "dtype", "version", "magic"])
def test_files_of_something_else_are_replaced(folder, other, monkeypatch):
    with monkeypatch.context() as patch:
        if other == "version":
            patch.setattr(disk, "_VERSION", disk._VERSION + 1)
        if other == "magic":
            patch.setattr(disk, "_MAGIC", b"otherfmt")
        fingerprint = "other weights" if other == "fingerprint" else "weights"
        dtype = torch.bfloat16 if other == "dtype" else None
        store = open_store(folder, fingerprint, dtype=dtype)
        assert (store.levels(), store.nbytes, store.warnings) == ((), 0, [])
        assert (folder / "rows").stat().st_size == 0
        assert write(store, 1, 0) == 1
        store.close()
    store = open_store(folder)
    assert rows_found(store) == set()
    store.close()


def test_weights_that_change_in_a_run_replace_the_file(folder):
    store = open_store(folder)
    store.bind("other weights")
    assert store.levels() == () and store.nbytes == 0
    write(store, 1, 0)
    store.bind("weights")
    assert rows_found(store) == set()
    store.close()


def test_less_room_than_before_keeps_what_fits(folder):
    store = open_store(folder, max_bytes=300)
    assert 0 < len(rows_found(store)) < len(ROWS) and store.nbytes <= 300
    assert (folder / "rows").stat().st_size <= 300
    write(store, 1, 0, 1, 2, 3)
    assert store.nbytes <= 300
    store.close()


@pytest.mark.parametrize("name", ["index", "rows"])
def test_file_cut_at_any_byte(folder, tmp_path, name, quiet):
    content = (folder / name).read_bytes()
    counts = []
    for size in range(len(content)):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        (copy / name).write_bytes(content[:size])
        store = open_store(copy)
        counts.append(len(rows_found(store, versions=2)))
        if size % 7 == 0:
            rebuild(store)
            store.close()
            store = open_store(copy)
            assert len(rows_found(store, versions=2)) == len(ROWS)
        store.close()
    assert counts[0] == 0 and len(set(counts)) > 3
    if name == "index":
        assert counts[-1] == len(ROWS) - 1
    else:
        assert counts == sorted(counts)


@pytest.mark.parametrize("name", ["index", "rows"])
def test_any_byte_flipped(folder, tmp_path, name, quiet):
    content = (folder / name).read_bytes()
    damaged = 0
    for at in range(len(content)):
        copy = shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        flipped = content[at] ^ (1 << at % 8)
        (copy / name).write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        store = open_store(copy)
        found = rows_found(store, versions=2)
        damaged += found != set(ROWS)
        if at % 7 == 0:
            rebuild(store)
            assert len(rows_found(store, versions=2)) == len(ROWS)
        store.close()
    # behind the tokens of a row, up to the next multiple of 64, there is nothing
    used = sum(12 * tokens_of(*row) for row in ROWS)
    assert damaged == (used if name == "rows" else len(content))


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(
        st.tuples(st.booleans(), st.sampled_from(ROWS), st.integers(0, 2)), min_size=3, max_size=20
    ),
    data=st.data(),
)
def test_index_and_rows_of_different_moments(tmp_path, quiet, steps, data):
    """A machine that lost power: each file may be as it was at any time, in any mixture."""
    folder = Path(mkdtemp(dir=tmp_path))
    store = open_store(folder)
    moments = []
    for written, (level, number), version in steps:
        if written:
            write(store, level, number, version=version)
        else:
            store.drop(level, [key(number)])
        moments.append({n: (folder / n).read_bytes() for n in ("index", "rows")})
    store.close()
    for name in ("index", "rows"):
        content = bytearray(data.draw(st.sampled_from(moments))[name])
        if content and data.draw(st.booleans()):
            del content[data.draw(st.integers(0, len(content))) :]
        if content and data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(content) - 1))
            content[start : start + 40] = data.draw(st.binary(min_size=1, max_size=40))
        (folder / name).write_bytes(content)
    for _ in range(2):
        store = open_store(folder)
        rows_found(store, versions=3)
        rebuild(store)
        assert rows_found(store, versions=3) == set(ROWS)
        store.close()


def test_row_damaged_during_a_run_is_lost_once(folder):
    store = open_store(folder)
    assert rows_found(store) == set(ROWS)
    with open(folder / "rows", "r+b") as file:
        file.seek(5)
        file.write(b"\xff\x00\xff")
    (victim,) = [row for row in ROWS if store._levels[row[0]][key(row[1])].address == 0]
    level, number = victim
    span = (0, tokens_of(level, number))

    def read():
        shape = (1, LENGTH, WIDTH)
        return store.read(level, [key(number)], shape, [span], device=CPU, dtype=torch.float32)

    with pytest.warns(UserWarning, match="damaged"), pytest.raises(KeyError):
        read()
    assert store.contains(level, [key(number)]) == [False]
    assert write(store, level, number) == 1 and _read(store, *victim, hidden_of(*victim))
    os.truncate(folder / "rows", 0)
    with pytest.raises(KeyError):
        read()
    assert len(store.warnings) == 1
    store.close()


def test_row_in_the_place_of_a_checked_one_is_checked_too(tmp_path):
    store = open_store(tmp_path)
    write(store, 1, 0)
    assert store.contains(1, [key(0)]) == [True]
    store.drop(1)
    write(store, 1, 3)
    (tmp_path / "rows").write_bytes(bytes(64))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.contains(1, [key(3)]) == [False]
    store.close()


def in_fork(work: Callable[[], None]) -> int:
    """Process id of a fork that does `work` and ends with status 0, or 1 if it raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def test_killed_at_every_system_call(tmp_path, quiet):
    """A fork that kills itself in the middle of its n-th write, for every n until it survives."""

    def run(folder: Path, last: int) -> None:
        calls = 0

        def halved(function):
            def call(file, content, *offset):
                nonlocal calls
                calls += 1
                if calls == last:
                    function(file, bytes(content)[: len(content) // 2], *offset)
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(file, content, *offset)

            return call

        disk.os.pwrite, disk.os.write = halved(os.pwrite), halved(os.write)
        store = open_store(folder)
        for level in (1, 2):
            write(store, level, 0, 1, 2, 3, version=1)
            store.drop(level, [key(0), key(2)])
            write(store, level, 0, 2)
        store.close()

    counts = []
    for last in range(1, 100):
        folder = tmp_path / str(last)
        pid = in_fork(lambda folder=folder, last=last: run(folder, last))
        status = os.waitpid(pid, 0)[1]
        store = open_store(folder)
        counts.append(len(rows_found(store, versions=2)))
        rebuild(store)
        assert rows_found(store, versions=2) == set(ROWS)
        store.close()
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    assert counts[0] == 0 and counts[-1] == len(ROWS) and len(counts) > 10


@pytest.mark.parametrize("wait_ms", [1, 5, 20, 50])
def test_killed_from_outside(tmp_path, wait_ms):
    hidden = torch.arange(1000.0)[:, None, None].expand(1000, 4, 64)
    started, start = os.pipe()

    def run() -> None:
        store = open_store(tmp_path, max_bytes=1 << 24)
        os.write(start, b"x")
        for level in range(1000):
            for at in range(0, 1000, 50):
                keys = [key(i) for i in range(at, at + 50)]
                store.write(level, keys, hidden[at : at + 50] + level, [(0, 4)] * 50)

    pid = in_fork(run)
    os.read(started, 1)
    time.sleep(wait_ms / 1000)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    store = open_store(tmp_path, max_bytes=1 << 24)
    for level in store.levels():
        numbers = [i for i in range(1000) if store.contains(level, [key(i)]) == [True]]
        assert len(numbers) == store.rows(level)
        keys, shape = [key(i) for i in numbers], (len(numbers), 4, 64)
        spans = [(0, 4)] * len(numbers)
        read = store.read(level, keys, shape, spans, device=CPU, dtype=torch.float32)
        assert torch.equal(read, hidden[numbers] + level)
    assert not store.warnings  # being killed is no damage
    store.close()
    os.close(started)
    os.close(start)


@pytest.mark.parametrize("calls", range(1, 6))
@pytest.mark.parametrize("half", [False, True])
def test_full_disk_stops_writing_and_nothing_else(tmp_path, monkeypatch, calls, half):
    store = open_store(tmp_path)
    write(store, 1, 0, 1)
    left = calls

    def failing(function):
        def call(file, content, *offset):
            nonlocal left
            left -= 1
            if left == 0 and half:
                return function(file, bytes(content)[: len(content) // 2], *offset)
            if left <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(file, content, *offset)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "pwrite", failing(os.pwrite))
        patch.setattr(disk.os, "write", failing(os.write))
        with pytest.warns(UserWarning, match="No space left") as caught:
            write(store, 1, 2, 3)
            store.drop(1, [key(0)])
            write(store, 1, 0)
            write(store, 2, 0, 1, 2, 3)
    assert len(caught) == len(store.warnings) == 1
    found = rows_found(store)
    assert (1, 1) in found and len(found) < len(ROWS)
    assert write(store, 2, 3) == 0
    store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = open_store(tmp_path)
    assert found - {(1, 0)} <= rows_found(store)
    rebuild(store)
    assert rows_found(store) == set(ROWS)
    store.close()


def test_largest_file_allowed(tmp_path):
    store = open_store(tmp_path)
    write(store, 1, 0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.warns(UserWarning, match="no more rows are written"):
            assert write(store, 1, 2, 3) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rows_found(store) == {(1, 0), (1, 1)}
    store.close()
    store = open_store(tmp_path)
    assert rows_found(store) == {(1, 0), (1, 1)}
    store.close()


def test_folder_has_one_user_at_a_time(folder):
    first = open_store(folder)
    for _ in range(2):
        with pytest.warns(UserWarning, match="another process") as caught:
            second = open_store(folder)
        assert len(caught) == len(second.warnings) == 1
        assert second.levels() == ()
        assert write(second, 1, 0, 1, version=1) == 2  # in its own memory
        assert second.nbytes_by_tier == {"cuda": 0, "cpu": second.nbytes, "disk": 0}
        second.bind("other weights")  # says nothing again
        assert second.levels() == () and len(second.warnings) == 1
        second.close()
    first.drop(2)
    assert rows_found(first) == {row for row in ROWS if row[0] == 1}
    first.close()
    assert open_store(folder).levels() == (1,)


def test_folder_of_another_process(folder):
    held, hold = os.pipe()

    def run() -> None:
        store = open_store(folder)
        os.write(hold, b"x")
        time.sleep(60)
        store.close()

    pid = in_fork(run)
    os.read(held, 1)
    with pytest.warns(UserWarning, match="another process"):
        store = open_store(folder)
    assert store.levels() == () and write(store, 1, 0) == 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    store = open_store(folder)  # a lock goes with its process
    assert rows_found(store) == set(ROWS)
    store.close()
    os.close(held)
    os.close(hold)


def test_fork_leaves_the_folder_alone(folder):
    store = open_store(folder)
    before = {name: (folder / name).read_bytes() for name in ("index", "rows")}

    def run() -> None:
        assert store.contains(1, [key(0)]) == [False]
        assert write(store, 3, 0) == 0
        store.drop(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store.bind("other weights")
        assert write(store, 3, 0) == 1  # in memory
        store.close()

    assert os.waitpid(in_fork(run), 0)[1] == 0
    assert before == {name: (folder / name).read_bytes() for name in ("index", "rows")}
    with pytest.warns(UserWarning, match="another process"):
        open_store(folder).close()
    assert rows_found(store) == set(ROWS)
    store.close()


@pytest.mark.parametrize("reason", ["file in the way", "read-only", "read-only index"])
def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch, reason):
    path = tmp_path / "folder"
    if reason == "file in the way":
        path.write_text("not a folder")
        path = path / "rows"
    else:
        opened = os.open

        def read_only(name, flags, *args):
            if reason == "read-only" or "index" in str(name):
                raise OSError(errno.EROFS, "Read-only file system")
            return opened(name, flags, *args)

        monkeypatch.setattr(disk.os, "open", read_only)
    with pytest.warns(UserWarning, match="kept in memory") as caught:
        store = open_store(path)
    assert len(caught) == len(store.warnings) == 1 and str(path) in store.warnings[0]
    assert write(store, 1, *range(4)) == 4 and write(store, 2, *range(4)) == 4
    assert rows_found(store) == set(ROWS) and store.nbytes_by_tier["disk"] == 0
    store.bind("other weights")
    assert store.levels() == () and len(store.warnings) == 1


def test_folders_are_made(tmp_path):
    store = open_store(tmp_path / "a" / "b")
    assert write(store, 1, 0) == 1
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["index", "lock", "rows"]
    store.close()


def test_index_does_not_grow_from_run_to_run(folder):
    sizes = []
    for _ in range(3):
        store = open_store(folder)
        sizes.append((folder / "index").stat().st_size)
        store.drop(1)
        rebuild(store)
        store.close()
    header = disk._HEADER.size + disk._CRC.size
    assert sizes == [header + disk.RECORD_BYTES * len(ROWS)] * 3
