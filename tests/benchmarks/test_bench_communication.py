"""benchmarks/communication.py: two ranks, tiny; no number without a green gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from benchmark_scripts import load_script
from ranks import process_group, run_ranks

from progtuning_kernels.bench import Refused


def rehearse(rank: int, folder: str) -> None:
    script = load_script("communication")
    settings = script.Settings("tiny BERT", rows=2, tokens=16, stages=2, steps=1)
    with process_group(rank, f"{folder}/store"):
        content = script.measure(settings)
        if rank == 0:
            Path(folder, "content.json").write_text(json.dumps(content))

        class OneRanksRows(script.Settings):
            def own(self, batch):
                return {name: tensor[: self.rows] for name, tensor in batch.items()}

        with pytest.raises(Refused, match="off one process"):
            script._gate(OneRanksRows(*vars(settings).values()), "progressive", script._ddp)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_are_compared_with_one_and_timed(tmp_path):
    run_ranks(rehearse, str(tmp_path))
    content = json.loads((tmp_path / "content.json").read_text())
    shown = load_script("communication").table(content)
    assert [line.split(" | ")[0] for line in shown.splitlines()[2:6]] == [
        f"| {strategy}, {method}"
        for strategy in ("ddp", "fsdp2")
        for method in ("full", "progressive")
    ]
    for way, entry in content["ways"].items():
        assert entry["movement_error"] < 1e-3
        boundaries = [stage["boundary"] for stage in entry["stages"]]
        assert boundaries == ([0, 3] if "progressive" in way else [0, 0])
        for stage in entry["stages"]:
            assert stage["share"] == 1 - stage["alone_ms"] / stage["step_ms"]
