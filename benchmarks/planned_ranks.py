"""What every rank sends and keeps in a step, from 8 to 1,024 ranks, without a GPU or weights.

    python benchmarks/planned_ranks.py   # the table of docs/guides/several-processes.md

Shapes and flags decide these bytes, so that a Llama of 70 billion parameters takes seconds:
`progtuning_kernels/planner/README.md` has the rules, and `tests/planner/test_planned_ranks.py`
compares them with bytes that were counted on 2 and 4 ranks.
"""

from __future__ import annotations

from typing import Any, get_args

import torch

from progtuning_kernels import ProgressiveSchedule
from progtuning_kernels.freezing.freezer import Freezer
from progtuning_kernels.model.layout import find_layout
from progtuning_kernels.planner.ranks import Ranks, Strategy
from progtuning_kernels.planner.stage_meter import Options, StageMeter

COUNTS = (8, 64, 1024)
SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
STAGES = 4


def table() -> str:
    """Markdown: GiB that a rank sends in a step and keeps, in the first stage and in the last."""
    from transformers import LlamaConfig, LlamaForCausalLM

    schedule = ProgressiveSchedule(STAGES, STAGES)
    heads = [f"{what}, stage {stage}" for what in ("sent", "kept") for stage in (1, STAGES)]
    lines = [f"| model | ranks | strategy | {' | '.join(heads)} |"]
    lines.append(f"|---|---:|---|{'---:|' * len(heads)}")
    for name, shape in SHAPES.items():
        config = LlamaConfig(
            **shape,
            vocab_size=128256,
            num_attention_heads=shape["hidden_size"] // 128,
            num_key_value_heads=8,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        layout = find_layout(model)
        freezer = Freezer(model, layout, tied="frozen", frozen_mode="eval")
        plans = [schedule.plan(step, layout.num_blocks) for step in (0, STAGES - 1)]
        for count in COUNTS:
            for strategy in get_args(Strategy):
                options = Options(
                    "adamw", False, False, None, model.device, ranks=Ranks(count, strategy)
                )
                meter = StageMeter(model, layout, freezer, {}, options)
                stages = [meter.bytes_without_a_step(plan) for plan in plans]
                kept = (sum(v for v in stage.values() if isinstance(v, int)) for stage in stages)
                sent = (stage["traffic"].sent_bytes for stage in stages)
                cells = [f"{size / 2**30:,.1f}" for size in (*sent, *kept)]
                lines.append(f"| {' | '.join([name, f'{count:,}', strategy, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
