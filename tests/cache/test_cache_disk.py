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

from progtuning_kernels.cache import disk_rows
from progtuning_kernels.cache.row_store import RowStore

CPU = torch.device("cpu")
WIDTH, LENGTH = 3, 6
FILE = "rows.sqlite"
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
        expected = [hidden_of(level, number, version) for version in range(versions)]
        if any(_read(store, level, number, row) for row in expected):
            found.add((level, number))
        else:  # one that is there but not as it was written is found to be damaged
            assert store.contains(level, [key(number)]) == [False], (level, number)
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
    """What training does with rows that it does not find.

    The first write may show that the file is damaged, and be the one that is lost with it.
    """
    for epoch in range(2):
        rows_found(store, versions=3)
        for level, number in ROWS:
            if store.contains(level, [key(number)]) == [False]:
                assert write(store, level, number) == 1 or not epoch


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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
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


@pytest.mark.parametrize("other", ["fingerprint", "dtype", "version"])
def test_files_of_something_else_are_replaced(folder, other, monkeypatch):
    with monkeypatch.context() as patch:
        if other == "version":
            patch.setattr(disk_rows, "_VERSION", disk_rows._VERSION + 1)
        fingerprint = "other weights" if other == "fingerprint" else "weights"
        dtype = torch.bfloat16 if other == "dtype" else None
        store = open_store(folder, fingerprint, dtype=dtype)
        assert (store.levels(), store.nbytes, store.warnings) == ((), 0, [])
        assert write(store, 1, 0) == 1
        store.close()
    store = open_store(folder)
    assert rows_found(store) == set()
    store.close()


def test_folder_of_an_earlier_version_is_refused_with_a_cure(tmp_path):
    for name in ("index", "rows", "lock"):
        (tmp_path / name).write_bytes(b"progrows")
    with pytest.warns(UserWarning, match="earlier version: delete the folder, or name") as caught:
        store = open_store(tmp_path)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert write(store, 1, 0) == 1 and store.nbytes_by_tier["disk"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "lock", "rows"]


def test_weights_that_change_in_a_run_replace_the_file(folder):
    store = open_store(folder)
    store.bind("other weights")
    assert store.levels() == () and store.nbytes == 0
    write(store, 1, 0)
    store.bind("weights")
    assert rows_found(store) == set()
    store.close()


def test_less_room_than_before_keeps_what_fits(folder):
    store = open_store(folder, max_bytes=200)
    assert 0 < len(rows_found(store)) < len(ROWS) and store.nbytes <= 200
    write(store, 1, 0, 1, 2, 3)
    assert store.nbytes <= 200
    store.close()
    assert open_store(folder).nbytes <= 200


def damage_survived(folder: Path, content: bytes) -> int:
    """Number of rows that are found where the file is `content`, and after they are rebuilt."""
    (folder / FILE).write_bytes(content)
    store = open_store(folder)
    found = len(rows_found(store, versions=2))
    rebuild(store)
    # one in 2,000 flips hides a part of the table from SQLite's search, for as long as it is there
    assert len(rows_found(store, versions=2)) >= len(ROWS) - 2
    store.close()
    store = open_store(folder)  # may find what SQLite had no reason to read before
    rows_found(store, versions=2)
    store.close()
    return found


def test_file_cut_short(folder, quiet):
    content = (folder / FILE).read_bytes()
    sizes = [*range(0, 200, 7), *range(200, len(content), 997), len(content)]
    counts = [damage_survived(folder, content[:size]) for size in sizes]
    assert counts[0] == 0 and counts[-1] == len(ROWS)


def test_bytes_flipped(folder, quiet):
    """The header byte by byte, whatever is not zero, and a part of the rest."""
    content = (folder / FILE).read_bytes()
    places = [at for at in range(len(content)) if at < 100 or content[at] or at % 997 == 0]
    counts = []
    for at in places[:100] + places[100::3]:
        flipped = content[at] ^ (1 << at % 8)
        counts.append(damage_survived(folder, content[:at] + bytes([flipped]) + content[at + 1 :]))
    assert min(counts) == 0 and 1 < len(set(counts))


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
def test_file_of_any_moment_with_damage(tmp_path, quiet, steps, data):
    """A machine that lost power: pages may be as they were at any time, in any mixture."""
    folder = Path(mkdtemp(dir=tmp_path))
    store = open_store(folder)
    moments = []
    for written, (level, number), version in steps:
        if written:
            write(store, level, number, version=version)
        else:
            store.drop(level, [key(number)])
        moments.append((folder / FILE).read_bytes())
    store.close()
    content = bytearray(data.draw(st.sampled_from(moments)))
    for page in range(0, len(content), 16384):
        other = data.draw(st.sampled_from(moments))[page : page + 16384]
        content[page : page + len(other)] = other
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    if content and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + 40] = data.draw(st.binary(min_size=1, max_size=40))
    (folder / FILE).write_bytes(content)
    for _ in range(2):
        store = open_store(folder)
        rows_found(store, versions=3)
        rebuild(store)
        assert rows_found(store, versions=3) == set(ROWS)
        store.close()


def test_row_damaged_during_a_run_is_lost_once(folder):
    store = open_store(folder)
    victim = level, number = ROWS[0]
    place = store._levels[level][key(number)]
    with store._disk._file as file:
        file.execute(
            "UPDATE contents SET content = zeroblob(?) WHERE number = ?",
            (place.nbytes, place.number),
        )
    span = (0, tokens_of(level, number))

    def read():
        shape = (1, LENGTH, WIDTH)
        return store.read(level, [key(number)], shape, [span], device=CPU, dtype=torch.float32)

    with pytest.warns(UserWarning, match="damaged"), pytest.raises(KeyError):
        read()
    assert store.contains(level, [key(number)]) == [False]
    assert rows_found(store) == set(ROWS[1:])
    assert write(store, level, number) == 1 and _read(store, *victim, hidden_of(*victim))
    assert len(store.warnings) == 1
    store.close()


def test_file_damaged_during_a_run_is_replaced(folder, quiet):
    store = open_store(folder)
    store._disk._file.execute("PRAGMA cache_size = 0")  # else SQLite looks no more
    (folder / FILE).write_bytes(bytes(1 << 16))
    rebuild(store)
    assert rows_found(store) == set(ROWS)
    store.close()
    store = open_store(folder)
    rebuild(store)
    assert rows_found(store) == set(ROWS)
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


def test_killed_in_a_transaction(tmp_path, quiet):
    """A fork that kills itself at the n-th of SQLite's steps, until it survives."""
    hidden = torch.arange(20.0)[:, None, None].expand(20, 64, 512)  # rows of 128 KB
    spans = [(0, 64)] * 20

    def run(folder: Path, last: int) -> None:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)

        store = open_store(folder, max_bytes=1 << 24)
        store._disk._file.execute("PRAGMA cache_size = 1")  # pages are written at once
        store._disk._file.set_progress_handler(count, 7)
        for level in (1, 2):
            keys = [key(i) for i in range(20)]
            store.write(level, keys, hidden + level, spans)
            store.drop(level, keys[:5])
            store.write(level, keys, hidden + level, spans)
        store.close()

    counts, interrupted = [], 0
    for last in range(1, 400, 5):
        folder = tmp_path / str(last)
        status = os.waitpid(in_fork(lambda f=folder, n=last: run(f, n)), 0)[1]
        interrupted += (folder / f"{FILE}-journal").stat().st_size > 0
        store = open_store(folder, max_bytes=1 << 24)
        counts.append(sum(map(store.rows, store.levels())))
        for level in (1, 2):
            numbers = [i for i in range(20) if store.contains(level, [key(i)]) == [True]]
            keys, shape = [key(i) for i in numbers], (len(numbers), 64, 512)
            read = store.read(
                level, keys, shape, spans[: len(keys)], device=CPU, dtype=torch.float32
            )
            assert torch.equal(read, hidden[numbers] + level)
        assert not store.warnings
        store.close()
        shutil.rmtree(folder)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    assert counts[0] == 0 and counts[-1] == 40 and interrupted > 3


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


def test_full_disk_stops_writing_and_nothing_else(tmp_path):
    store = open_store(tmp_path)
    write(store, 1, 0, 1)
    (pages,) = store._disk._file.execute("PRAGMA page_count").fetchone()
    store._disk._file.execute(f"PRAGMA max_page_count = {pages}")  # SQLITE_FULL, as a device gives
    large, spans = torch.ones(2, 1000, 8), [(0, 1000)] * 2
    with pytest.warns(UserWarning, match="disk is full") as caught:
        assert store.write(3, [key(0), key(1)], large, spans) == 0
        store.drop(1, [key(0)])
        assert write(store, 1, 0) == write(store, 2, 0, 1, 2, 3) == 0
    assert len(caught) == len(store.warnings) == 1
    assert rows_found(store) == {(1, 1)}
    store.close()
    store = open_store(tmp_path)
    assert {(1, 1)} <= rows_found(store)
    rebuild(store)
    assert rows_found(store) == set(ROWS)
    store.close()


def test_largest_file_allowed(tmp_path):
    store = open_store(tmp_path)
    write(store, 1, 0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / FILE).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.warns(UserWarning, match="no more rows are written"):
            assert store.write(3, [key(0)], torch.ones(1, 9000, 8), [(0, 9000)]) == 0
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
    before = (folder / FILE).read_bytes()

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not _read(store, 1, 0, hidden_of(1, 0))
            assert write(store, 3, 0) == 0
            store.drop(2)
            store.bind("other weights")
        assert write(store, 3, 0) == 1  # in memory
        store.close()

    assert os.waitpid(in_fork(run), 0)[1] == 0
    assert before == (folder / FILE).read_bytes()
    with pytest.warns(UserWarning, match="another process"):
        open_store(folder).close()
    assert rows_found(store) == set(ROWS)
    store.close()


@pytest.mark.parametrize("reason", ["file in the way", "read-only", "folder for a file"])
def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch, reason, quiet):
    path = tmp_path / "folder"
    if reason == "file in the way":
        path.write_text("not a folder")
        path = path / "rows"
    elif reason == "folder for a file":
        (path / FILE).mkdir(parents=True)
    else:

        def read_only(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", read_only)
    store = open_store(path)
    assert "kept in memory" in store.warnings[-1] and str(path) in store.warnings[-1]
    said = len(store.warnings)
    assert write(store, 1, *range(4)) == 4 and write(store, 2, *range(4)) == 4
    assert rows_found(store) == set(ROWS) and store.nbytes_by_tier["disk"] == 0
    store.bind("other weights")
    assert store.levels() == () and len(store.warnings) == said


def test_folders_are_made(tmp_path):
    store = open_store(tmp_path / "a" / "b")
    assert write(store, 1, 0) == 1
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {FILE, f"{FILE}-journal"}
    store.close()


def test_file_does_not_grow_from_run_to_run(folder):
    sizes = []
    for _ in range(3):
        store = open_store(folder)
        sizes.append((folder / FILE).stat().st_size)
        store.drop(1)
        rebuild(store)
        store.close()
    assert len(set(sizes)) == 1


def test_a_file_gives_its_space_back_when_the_last_row_goes(tmp_path):
    store = open_store(tmp_path)
    store.write(1, [key(0)], torch.ones(1, 9000, 8), [(0, 9000)])
    size = (tmp_path / FILE).stat().st_size
    assert size > 9000 * 32
    store.drop(1)
    assert (tmp_path / FILE).stat().st_size < size / 4
    store.close()
