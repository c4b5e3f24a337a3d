"""`--add-tokens` and `--train-new-tokens`: tokens that a vocabulary lacks, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .errors import UserError, as_user_error


def read_tokens(given: Sequence[str]) -> list[str]:
    """The tokens that `--add-tokens` names: of files, one a line, and of lists with commas."""
    tokens: list[str] = []
    for one in given:
        path = Path(one)
        if path.is_file():
            with as_user_error(OSError, UnicodeDecodeError, said=f"--add-tokens {one}"):
                lines = path.read_text(encoding="utf-8").splitlines()
        elif path.suffix == ".txt":
            raise UserError(f"--add-tokens {one}: there is no such file")
        else:
            lines = [token.strip() for token in one.split(",")]
        found = [line for line in lines if line.strip()]
        if not found:
            raise UserError(f"--add-tokens {one!r} names no token")
        tokens += found
    for token in tokens:
        if tokens.count(token) > 1:
            raise UserError(f"--add-tokens names {token!r} twice")
    return tokens


def add_to_vocabulary(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Ids that the tokens get; they are no special tokens, so that decoded texts show them."""
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise UserError(
                f"--add-tokens: {token!r} is in the vocabulary already, as {known[token]}"
            )
    tokenizer.add_tokens([*tokens])
    return tokenizer.convert_tokens_to_ids([*tokens])


def make_room(model: Any, size: int, *, weights: bool) -> None:
    """Rows for a vocabulary of `size`, drawn about the mean of the others as transformers does."""
    with as_user_error(Exception, said="the vocabulary of this model cannot grow"):
        if size > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(size, mean_resizing=weights)


def rows_of(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """`rows` of `patch_model`: the ids in the embeddings, and in an LM head of its own weight."""
    layers: list[nn.Module] = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not layers[0].weight:
        layers.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)]: [*ids] for layer in layers}
