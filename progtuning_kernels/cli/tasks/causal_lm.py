"""Rows that a decoder learns to go on with: plain text, prompts and completions, or messages."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from ..columns import check_texts, find_columns
from ..errors import UserError, as_user_error
from ..options import TrainOptions
from .plain_text import join_and_cut, perplexity, row_losses

_ROLES = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "response", "output", "answer"),
    "text": ("text", "sentence", "content"),
}

_SPEAKERS = {"human": "user", "gpt": "assistant"}  # of ShareGPT


class CausalLM:
    """Rows of the first kind that they have columns for: messages, prompt and completion, text."""

    processor = "AutoTokenizer"
    metrics = ("perplexity",)
    names = None

    def __init__(self, options: TrainOptions, splits: dict[str, Dataset]) -> None:
        self.max_length = options.max_length
        self.max_new_tokens = options.max_new_tokens
        self.notes: list[str] = []  # on rows, for the user
        self._trainer = options.trainer  # with the options of SFTConfig, by its names
        first = next(iter(splits.values()))
        self.kind = _kind(options.columns, first.column_names, "train" in splits)
        names = ("prompt", "completion") if self.kind == "prompt" else (self.kind,)
        roles = {role: _ROLES[role] for role in names}
        self.columns = find_columns(splits, options.columns, roles, targets=["completion"])
        # lists of messages, or text
        self._chat = self.kind == "messages" or isinstance(first[0][self.columns[self.kind]], list)
        for split, rows in splits.items():
            for role, column in self.columns.items():
                if role == "completion" and split == "predict":
                    continue
                lines = role == "text" and split != "predict"  # of which some may be empty
                if self._chat:
                    _check_messages(rows[column], column, split)
                else:
                    check_texts(rows, column, split, empty="keep" if lines else "error")
                if lines:
                    self._leave_out_empty(rows[column], split)

    def _leave_out_empty(self, texts: Sequence[str | None], split: str) -> None:
        empty = sum(not text or text.isspace() for text in texts)
        if empty == len(texts):
            raise UserError(f"all {split} rows are empty in column {self.columns['text']!r}")
        if empty:
            self.notes.append(f"{empty:,} empty {split} rows are left out")

    @property
    def trainer(self) -> str:
        return "Trainer" if self.kind == "text" else "SFTTrainer"

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Where TRL's defaults differ from the Trainer's."""
        if self.kind == "text":
            return {}
        return {"max_length": self.max_length, "gradient_checkpointing": False, "bf16": False}

    def summary(self) -> str:
        kinds = {"text": "plain text", "prompt": "prompts and completions"}
        return kinds.get(self.kind, "messages")

    def configure(self, config: Any) -> None:
        if config.is_encoder_decoder:
            raise UserError(f"causal-lm needs a decoder; {config.model_type} is for seq2seq")

    def _by_role(self, rows: Dataset) -> Dataset:
        """The columns of the task, under the names of their roles, and "tools" if there are any."""
        roles = {"tools": "tools"} | {name: role for role, name in self.columns.items()}
        roles = {name: role for name, role in roles.items() if name in rows.column_names}
        rows = rows.select_columns([*roles]).rename_columns(roles)
        if self.kind == "messages" and any("from" in m for row in rows["messages"] for m in row):
            return rows.map(lambda row: {"messages": _messages(row["messages"])})
        return rows

    def encode(self, rows: Dataset, processor: Any, model: Any, split: str) -> Dataset:
        """Tokens, and labels that are -100 where the loss is not of them; plain text has none.

        Of "predict", the tokens of a prompt alone.
        """
        if split == "predict":
            encoded = processor(self._prompts(rows, processor), add_special_tokens=not self._chat)
            ids = [own[: self.max_length] for own in encoded["input_ids"]]  # to try the model
            return Dataset.from_dict({"input_ids": ids})
        rows = self._by_role(rows)
        if self.kind == "text":
            return join_and_cut(rows, processor, self.max_length)
        if end := self._trainer.get("eos_token"):
            processor.eos_token = end
        if processor.eos_token is None and not self._chat:
            raise UserError("a completion ends with the tokenizer's end-of-text token: it has none")
        template = self._template(processor)

        def tokens(row: dict[str, Any], index: int) -> dict[str, Any]:
            said = f"{split} row {index + 1}: the chat template refuses it"
            with as_user_error(Exception, said=said):
                ids, marks = self._marked(row, processor, template)
            labels = [i if mark else -100 for i, mark in zip(ids, marks, strict=True)]
            return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

        # SFTTrainer takes assistant_only_loss for rows with messages only
        left_over = {*rows.column_names} - ({self.kind} if self._assistant_only else set())
        encoded = rows.map(
            tokens, with_indices=True, remove_columns=[*left_over], keep_in_memory=True
        )
        learnt = [i for i, y in enumerate(encoded["labels"]) if any(k != -100 for k in y)]
        limit = f"--max-length {self.max_length}"
        if not learnt:
            raise UserError(f"{limit} leaves no {split} row a token to learn: prompts are as long")
        if without := len(encoded) - len(learnt):
            self.notes.append(
                f"{without:,} {split} rows are left out: {limit} leaves them no token to learn"
            )
            encoded = encoded.select(learnt)
        return encoded

    @property
    def _assistant_only(self) -> bool:
        return bool(self._trainer.get("assistant_only_loss"))

    def _template(self, tokenizer: Any) -> str | None:
        """The chat template; it marks what an assistant says where the loss is of that alone."""
        if not self._chat:
            return None
        if path := self._trainer.get("chat_template_path"):
            with as_user_error(OSError, said="--chat-template-path"):
                tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template for messages: take the model's chat variant, "
                "or give --chat-template-path, a .jinja file"
            )
        if not self._assistant_only:
            return tokenizer.chat_template
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if has_generation_markers(tokenizer.chat_template):
            return tokenizer.chat_template
        with as_user_error():
            return get_training_chat_template(tokenizer)

    def _marked(
        self, row: dict[str, Any], tokenizer: Any, template: str | None
    ) -> tuple[list[int], list[int]]:
        """Tokens of a row, and 1 where the loss is of a token: not of a prompt, unless told."""
        prompt, completion = row.get("prompt"), row.get("completion", row.get("messages"))
        if self._chat:
            common = {"chat_template": template, "tools": row.get("tools"), "return_dict": True}
            encoded = tokenizer.apply_chat_template(
                (prompt or []) + completion,
                return_assistant_tokens_mask=self._assistant_only,
                **common,
            )
            before = prompt and tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, **common
            )
        else:
            end = tokenizer.eos_token
            encoded = tokenizer(prompt + completion.removesuffix(end) + end)
            before = tokenizer(prompt)
        ids = encoded["input_ids"]
        marks = encoded["assistant_masks"] if self._assistant_only else [1] * len(ids)
        if before and self._trainer.get("completion_only_loss") is not False:
            # a token may reach over the end of the prompt: then it belongs to the completion
            pairs = zip(before["input_ids"], ids, strict=False)
            start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            marks = [0] * start + marks[start:]
        return ids, marks

    def collator(self, processor: Any, model: Any) -> Callable[[list[dict]], dict]:
        return partial(_padded, padding=processor.pad_token_id)

    def preprocess_logits(self, logits: Any, labels: Any) -> Any:
        """(B, 2): the loss of a row, summed over its predicted tokens, and their number."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        if logits.ndim == 2:  # as `sft_classes` gives them
            return logits
        return row_losses(logits[:, :-1], labels[:, 1:])

    def figures(self, predictions: Any, labels: Any) -> dict[str, float]:
        """predictions (N, 2) as of `preprocess_logits`: every token counts the same.

        The Trainer's own loss is a mean over batches, where a token of a batch of few counts more.
        """
        return {"perplexity": perplexity(predictions)}

    def _prompts(self, rows: Dataset, processor: Any) -> list[str]:
        """What the model is to go on from: messages without an assistant's last."""
        prompts = self._by_role(rows)
        if not self._chat:
            return prompts[self.kind][:]
        template = self._template(processor)
        return [
            processor.apply_chat_template(
                chat[:-1] if chat[-1]["role"] == "assistant" else chat,
                tools=row.get("tools"),
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            for row in prompts
            for chat in [row[self.kind]]
        ]

    def generate(self, model: Any, processor: Any, rows: Dataset) -> list[dict[str, Any]]:
        """What the model says after each row, greedily: the answers to "predict"."""
        from transformers import pipeline

        whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
        tokenizer = copy.deepcopy(processor)  # it is made to pad on the left
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions or math.inf)
        with as_user_error():
            go_on = pipeline("text-generation", whole, tokenizer=tokenizer, device=model.device)
            said = go_on(
                self._prompts(rows, processor),
                batch_size=self._trainer.get("per_device_eval_batch_size", 8),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                add_special_tokens=not self._chat,  # a template has them
                return_full_text=False,
                handle_long_generation="hole",  # leaves out the beginning of a prompt
            )
        return [{"output": first["generated_text"]} for first, *_ in said]


def sft_classes() -> tuple[type, type]:
    """`SFTTrainer`, whose evaluation also gives what `CausalLM.figures` reads, and `SFTConfig`."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        needed = "messages and completions need TRL, on Python 3.11 or later: pip install trl"
        raise UserError(needed) from None

    class TokenWeighted(SFTTrainer):
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """TRL writes a README.md beside the checkpoints."""

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            # of the loss alone: TRL computes the logits of a batch a second time for metrics
            loss, *_ = super().prediction_step(model, inputs, True, ignore_keys)
            labels = inputs["labels"].to(loss.device)
            tokens = (labels[:, 1:] != -100).sum(-1)
            return loss, torch.stack([loss * tokens, tokens], -1), labels

    TokenWeighted.__name__ = SFTTrainer.__name__
    return TokenWeighted, SFTConfig


def _kind(given: dict[str, str], present: Sequence[str], labelled: bool) -> str:
    for role in ("messages", "prompt", "text"):
        if role in given:
            return role

    def has(role: str) -> bool:
        return role in given or any(name in present for name in _ROLES[role])

    if has("messages"):
        return "messages"
    return "prompt" if has("prompt") and (not labelled or has("completion")) else "text"


def _check_messages(rows: Sequence[Any], column: str, split: str) -> None:
    for number, messages in enumerate(rows, 1):
        where = f"{split} row {number}"
        if not isinstance(messages, list) or not messages:
            raise UserError(f"{where}: {short(messages)} in {column!r} is no list of messages")
        for place, message in enumerate(_messages(messages), 1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"{where}: message {place} of {column!r} has no role")
            if not message.get("content") and not message.get("tool_calls"):
                raise UserError(f"{where}: message {place} of {column!r} has no content")


def _messages(found: Sequence[Any]) -> list[Any]:
    """Messages with role and content, also of rows as ShareGPT's, which have from and value."""
    return [
        {"role": _SPEAKERS.get(one["from"], one["from"]), "content": one.get("value")}
        if isinstance(one, dict) and isinstance(one.get("from"), str)
        else one
        for one in found
    ]


def _padded(rows: list[dict[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """(B, T) each, padded on the right; rows without labels have their tokens for them."""
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row.get("labels", row["input_ids"])) for row in rows]
    masks = [torch.ones_like(own) for own in ids]
    columns = {"input_ids": (ids, padding), "attention_mask": (masks, 0), "labels": (labels, -100)}
    return {name: pad_sequence(own, True, value) for name, (own, value) in columns.items()}
