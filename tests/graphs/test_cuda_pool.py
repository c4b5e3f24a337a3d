"""What `CudaPool` asks of torch, in which order; no GPU is needed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from progtuning_kernels.graphs import pools

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch):
    calls: list[str] = []
    current = Stream("current", calls)

    @contextlib.contextmanager
    def on(stream):
        calls.append(f"on {stream.name}")
        try:
            yield
        finally:
            calls.append(f"off {stream.name}")

    @contextlib.contextmanager
    def graph(recording, *, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ((0, 7), "thread_local")
        calls.append(f"capture {recording.name} on {stream.name}")
        try:
            yield
        finally:
            calls.append(f"captured {recording.name}")
            if "a read" in calls:
                raise RuntimeError("operation failed due to a previous error during capture")

    made = iter("ab")
    for name, value in {
        "graph_pool_handle": lambda: (0, 7),
        "Stream": lambda device: Stream("side", calls),
        "current_stream": lambda device: current,
        "stream": on,
        "set_stream": lambda stream: calls.append(f"set {stream.name}"),
        "current_device": lambda: 0,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(name=next(made)),
        "memory_snapshot": lambda: [
            {"total_size": 5, "segment_pool_id": [0, 7]},
            {"total_size": 9, "segment_pool_id": (0, 0)},
            {"total_size": 2, "segment_pool_id": (0, 7)},
        ],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    pools._stream.cache_clear()
    yield calls
    pools._stream.cache_clear()


def test_a_warm_up_runs_on_the_stream_of_the_captures(calls):
    pool = pools.CudaPool(DEVICE)
    with pool.warm_up():
        calls.append("run")
    with pool.recording() as recording:
        calls.append("record")
    assert recording.name == "a"
    assert calls == [
        *("side waits for current", "on side", "run", "off side", "current waits for side"),
        *("capture a on side", "record", "captured a"),
    ]


def test_a_capture_that_cannot_be_ended_leaves_stream_and_allocator(calls, monkeypatch):
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *of: calls.append(of), raising=False
    )
    pool = pools.CudaPool(DEVICE)
    with pytest.raises(ValueError, match="what went wrong at first"), pool.recording():
        calls.append("a read")
        raise ValueError("what went wrong at first")
    assert calls[-2:] == ["set current", (0, (0, 7))]


def test_a_warm_up_that_raises_is_waited_for(calls):
    with pytest.raises(ValueError), pools.CudaPool(DEVICE).warm_up():
        raise ValueError
    assert calls[-1] == "current waits for side"


def test_pools_of_a_device_share_their_stream_and_count_their_own_memory(calls):
    assert pools.CudaPool(DEVICE)._stream is pools.CudaPool(DEVICE)._stream
    assert pools.CudaPool(DEVICE).nbytes == 7


def test_where_there_is_a_pool(calls, monkeypatch):
    assert isinstance(pools.pool_on(DEVICE), pools.CudaPool)
    assert (
        pools.pool_on(torch.device("cpu")) == "graphs are captured on a GPU of NVIDIA, not on cpu"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "not on cuda:0" in pools.pool_on(DEVICE)
