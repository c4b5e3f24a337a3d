"""LoRA, progressively: adapters of the lowest blocks stop training at every stage.

    python examples/progressive_lora.py
    python examples/progressive_lora.py --model bert-base-uncased --train-file rows.jsonl

Without a file it classifies the docstrings of the installed packages with the MiniLM that the demo
extra brings; rows of a file are {"text": ..., "label": 0}. Prints what every stage costs, and saves
the adapter and the merged model.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from progtuning_kernels import MaskedAdamW, ProgressiveSchedule, patch_model
from progtuning_kernels.cli.docstrings import load_docstrings
from progtuning_kernels.cli.models import minilm_folder, quiet_transformers
from progtuning_kernels.optim import state_bytes


def read_rows(path: Path | None, limit: int) -> list[tuple[str, int]]:
    """(text, label) pairs in random order."""
    if path is None:
        rows = load_docstrings(train_rows=limit, validation_rows=8).train
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [(row["text"], int(row["label"])) for row in map(json.loads, lines)]
    random.Random(0).shuffle(rows)
    return rows[:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="folder or hub id; default: MiniLM")
    parser.add_argument("--train-file", type=Path, help="JSONL with text and label")
    parser.add_argument("--rows", type=int, default=960)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/progressive-lora"))
    args = parser.parse_args()

    quiet_transformers()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.manual_seed(0)
    rows = read_rows(args.train_file, args.rows)
    name = args.model or str(minilm_folder())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1 + max(label for _, label in rows)
    )
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=args.rank, target_modules="all-linear")
    model = get_peft_model(model, config).train()

    # from here on it is the loop of the README: PEFT needs nothing special
    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]
    handle = patch_model(model, ProgressiveSchedule(args.stages, len(batches)))
    optimizer = MaskedAdamW(handle.param_groups(lr=args.lr, weight_decay=0.01), max_grad_norm=1.0)

    columns = ("stage", "first block", "adapter params", "saved for backward", "state", "loss")
    table = Table(*columns, title=f"LoRA on {handle.num_blocks} blocks, {args.stages} stages")
    losses: list[float] = []
    for batch in track(batches, description="training"):
        texts, labels = zip(*batch, strict=True)
        inputs = tokenizer(
            list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        loss = model(**inputs, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if handle.schedule.stage(handle.step + 1) != handle.stage or len(losses) == len(batches):
            report = handle.truncation_report()
            report.assert_truncated()
            table.add_row(
                str(handle.stage + 1),
                str(handle.boundary),
                f"{handle.active_params:,}",
                f"{report.saved_bytes / 2**20:.1f} MiB",
                f"{state_bytes(optimizer) / 2**20:.2f} MiB",
                f"{losses[-1]:.3f}",
            )
        handle.advance()
    console = Console()
    console.print(table)

    handle.unpatch()
    model.save_pretrained(args.output / "adapter")
    model.merge_and_unload().save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")
    console.print(f"adapter and merged model: {args.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
