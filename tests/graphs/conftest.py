"""Graphs are captured by a recorder on the CPU, and its pools are listed."""

from __future__ import annotations

import pytest
import torch
from graph_pairs import Pair
from graph_recorder import RecorderPool

from progtuning_kernels.graphs import captured_module


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[RecorderPool]:
    made: list[RecorderPool] = []

    def pool_on(device: torch.device) -> RecorderPool:
        made.append(RecorderPool(device))
        return made[-1]

    monkeypatch.setattr(captured_module, "pool_on", pool_on)
    return made


@pytest.fixture
def pair(pools):
    return Pair()
