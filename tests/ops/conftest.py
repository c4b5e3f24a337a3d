"""For the tests of ops: memory that nothing was written to is NaN, or a large integer."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest):
    """Reading what an op allocated before writing it shows."""
    keywords = request.node.keywords
    if "gpu" in keywords or "unpoisoned" in keywords:
        yield
        return
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
