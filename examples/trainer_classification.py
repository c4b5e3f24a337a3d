"""Fine-tune a Hugging Face model to classify text, with the `Trainer`.

    python examples/trainer_classification.py --model bert-base-uncased \
        --train-file train.jsonl --validation-file dev.jsonl --output out

Rows of a file are {"text": ..., "label": ...}. Without the lines marked `# progtuning` the same
script fine-tunes the whole model in every step.
"""

import argparse
import json

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from progtuning_kernels import ProgressiveSchedule  # progtuning
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback  # progtuning


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def accuracy(prediction):
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--train-file", required=True, help="JSONL with text and label")
    parser.add_argument("--validation-file", help="the same; evaluated after every epoch")
    parser.add_argument("--output", default="runs/trainer-classification")
    parser.add_argument("--max-length", type=int, default=128, help="tokens")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rows = read_rows(args.train_file)
    labels = sorted({str(row["label"]) for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )

    def encode(rows):
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=args.max_length)
        return [
            {"input_ids": ids, "attention_mask": mask, "label": labels.index(str(row["label"]))}
            for ids, mask, row in zip(
                encoded["input_ids"], encoded["attention_mask"], rows, strict=True
            )
        ]

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=2 * args.batch_size,
            learning_rate=args.lr,
            weight_decay=0.01,
            logging_steps=10,
            eval_strategy="epoch" if args.validation_file else "no",
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=encode(rows),
        eval_dataset=encode(read_rows(args.validation_file)) if args.validation_file else None,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(stages=3))],  # progtuning
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
