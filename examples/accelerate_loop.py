"""Fine-tune a Hugging Face model to classify text, with a loop of your own and Accelerate.

    python examples/accelerate_loop.py --model bert-base-uncased --train-file train.jsonl
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --model ... --train-file ...

Rows of the file are {"text": ..., "label": ...}. Without the lines marked `# progtuning` the same
script fine-tunes the whole model in every step.
"""

import argparse
import json
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)

from progtuning_kernels import ProgressiveSchedule, patch_model  # progtuning


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--train-file", required=True, help="JSONL with text and label")
    parser.add_argument("--output", default="runs/accelerate-loop")
    parser.add_argument("--max-length", type=int, default=128, help="tokens")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        mixed_precision=args.mixed_precision,
        cpu=args.cpu,
    )
    set_seed(args.seed)

    with open(args.train_file, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    labels = sorted({str(row["label"]) for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=args.max_length)
    dataset = [
        {"input_ids": ids, "attention_mask": mask, "label": labels.index(str(row["label"]))}
        for ids, mask, row in zip(
            encoded["input_ids"], encoded["attention_mask"], rows, strict=True
        )
    ]
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    base = accelerator.unwrap_model(model)
    steps = args.epochs * math.ceil(len(loader) / args.accumulate)
    # a prepared scheduler moves once per process at every step
    ticks = steps * accelerator.num_processes
    scheduler = accelerator.prepare(
        get_scheduler("linear", optimizer, num_warmup_steps=ticks // 10, num_training_steps=ticks)
    )
    # torch's AdamW leaves frozen tensors alone (they have no gradient) but keeps their moments;
    # progtuning_kernels.MaskedAdamW in its place, or release_frozen_state, gives the memory back
    handle = patch_model(base, ProgressiveSchedule(3, steps))  # progtuning

    progress = tqdm(total=steps, disable=not accelerator.is_local_main_process)
    model.train()
    for _ in range(args.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                progress.set_postfix(loss=f"{loss.item():.3f}")
                progress.update()
                handle.advance()  # progtuning
    progress.close()

    accelerator.wait_for_everyone()
    base.save_pretrained(
        args.output, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
