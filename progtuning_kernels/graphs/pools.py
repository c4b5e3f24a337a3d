"""The seam to captured graphs: what records operations, and replays them.

Everything else in this folder is written against `Pool` and `Recording`; `CudaPool` is torch's.
They promise what CUDA graphs do: while it records, nothing is computed; a replay runs the same
operations on the same addresses with the same numbers, and draws new random numbers; recordings of
one pool share memory, so that what one of them has computed is good until another is replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

import torch


class Recording(Protocol):
    def replay(self) -> object: ...


class Pool(Protocol):
    """Makes recordings that share memory.

    Attributes:
        nbytes: memory that the recordings keep.
    """

    def warm_up(self) -> AbstractContextManager[None]:
        """Run code as it will run when it is recorded, for what a first run sets up."""
        ...

    def recording(self) -> AbstractContextManager[Recording]:
        """Record the operations inside."""
        ...

    @property
    def nbytes(self) -> int: ...


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a device.

    Autograd's node that adds up a parameter's gradient remembers the stream that it was made on,
    and lives as long as any loss of the parameter's: one of another stream would break a capture.
    """
    return torch.cuda.Stream(device)


class CudaPool:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._id = torch.cuda.graph_pool_handle()
        self._stream = _stream(device)

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        # cuBLAS has a workspace per stream, and a kernel's first launch loads it: forbidden later
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: a loader's thread may pin memory in the meantime
        options = {"pool": self._id, "stream": self._stream, "capture_error_mode": "thread_local"}
        current, cause = torch.cuda.current_stream(self._device), None
        try:
            with torch.cuda.graph(graph, **options):
                try:
                    yield graph
                except BaseException as error:
                    cause = error
                    raise
        except BaseException as error:
            if cause is error:
                raise
            # it could not even be ended, which leaves the stream and the allocator in the capture
            torch.cuda.set_stream(current)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._id)
            raise cause or error from None

    @property
    def nbytes(self) -> int:
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self._id)
        )


def pool_on(device: torch.device) -> Pool | str:
    """A pool, or why there is none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"graphs are captured on a GPU of NVIDIA, not on {device}"
    return CudaPool(device)
