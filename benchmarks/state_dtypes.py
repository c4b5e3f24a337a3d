"""Training loss by state dtype: what 8-bit and bf16 moments cost in quality, from finished runs.

    for kind in fp32 bf16 8bit; do
      progtuning train --train-file train.jsonl --validation-file dev.jsonl --stages 1 \\
        --state-dtype $kind --logging-steps 1 --output runs/$kind
    done
    python benchmarks/state_dtypes.py runs/fp32 runs/bf16 runs/8bit [--output FOLDER]

The runs differ in the state dtype alone: same rows, same order, same dropout. The first is the
baseline. Figures: mean training loss of the last epoch and of the last 100 steps, the largest
difference in any one step, metric and loss on the validation rows, peak bytes of state.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from stored_results import store


def summary(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    losses = [step["loss"] for step in run["steps"]]
    others = [step["loss"] for step in baseline["steps"]]
    if len(losses) != len(others):
        raise SystemExit("the runs have different numbers of steps")
    epoch = len(losses) // run["config"]["epochs"]
    last = run["evaluations"][-1]
    return {
        "state_dtype": run["config"]["state_dtype"],
        "steps": len(losses),
        "last_epoch_loss": statistics.mean(losses[-epoch:]),
        "last_100_steps_loss": statistics.mean(losses[-100:]),
        "largest_step_difference": max(abs(a - b) for a, b in zip(losses, others, strict=True)),
        "validation_metric": last["metric"],
        "validation_loss": last["loss"],
        "peak_state_bytes": run["summary"]["peak_state_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--output", type=Path, help="write state_dtypes.json into this folder")
    arguments = parser.parse_args()
    runs = [json.loads((folder / "metrics.json").read_text()) for folder in arguments.runs]
    rows = [summary(run, runs[0]) for run in runs]
    for row in rows:
        print(
            f"{row['state_dtype']:5} last epoch {row['last_epoch_loss']:.4f}  last 100 steps "
            f"{row['last_100_steps_loss']:.4f}  largest difference in a step "
            f"{row['largest_step_difference']:.4f}  metric {row['validation_metric']:.4f}  "
            f"state {row['peak_state_bytes'] / 2**20:.1f} MiB"
        )
    if arguments.output is not None:
        config = {k: runs[0]["config"][k] for k in ("model", "epochs", "batch_size", "lr")}
        content = {"meta": runs[0]["meta"], "data": runs[0]["data"], "config": config}
        store(content | {"runs": rows}, arguments.output / "state_dtypes.json")


if __name__ == "__main__":
    main()
