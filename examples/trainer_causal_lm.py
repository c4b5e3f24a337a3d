"""Fine-tune a Hugging Face causal language model on a text file, with the `Trainer`.

    python examples/trainer_causal_lm.py --model gpt2 --train-file corpus.txt --output out

The text is cut into pieces of equal length. Without the lines marked `# progtuning` the same
script fine-tunes the whole model in every step.
"""

import argparse
import math

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from progtuning_kernels import ProgressiveSchedule  # progtuning
from progtuning_kernels.integrations.hf_trainer import ProgtuningCallback  # progtuning


def read_pieces(path, tokenizer, length):
    """The file's tokens, every line ended, in pieces of `length`; the rest is left out."""
    with open(path, encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    tokens = [token for line in encoded for token in line + end]
    pieces = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--train-file", required=True, help="plain text")
    parser.add_argument("--validation-file", help="the same; evaluated at the end")
    parser.add_argument("--output", default="runs/trainer-causal-lm")
    parser.add_argument("--block-size", type=int, default=512, help="tokens of a piece")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    evaluation = None
    if args.validation_file:
        evaluation = read_pieces(args.validation_file, tokenizer, args.block_size)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=read_pieces(args.train_file, tokenizer, args.block_size),
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[ProgtuningCallback(ProgressiveSchedule(stages=3))],  # progtuning
    )
    trainer.train()
    if evaluation is not None:
        print(f"perplexity: {math.exp(trainer.evaluate()['eval_loss']):.2f}")
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
