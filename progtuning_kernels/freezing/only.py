"""A static mask beside the plan: which parameters may train at all, by a regular expression."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection

from torch import nn

# Parts that wrappers inside a model put into its names, which nobody writes into a pattern.
_WRAPPED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def compile_only(only: str) -> re.Pattern[str]:
    """Raise `TypeError` or `ValueError` for what is no regular expression."""
    if not isinstance(only, str):
        raise TypeError(f"only must be a regular expression, a text, got {only!r}")
    try:
        return re.compile(only)
    except re.error as error:
        raise ValueError(f"only={only!r} is no regular expression: {error}") from error


def matches(pattern: re.Pattern[str], name: str) -> bool:
    """Whether it is found in a qualified name, as it is or without the parts of wrappers."""
    return any(map(pattern.search, {name, _WRAPPED.sub("", name)}))


def check_only(pattern: re.Pattern[str], model: nn.Module, left: Collection[str]) -> None:
    """Raise `ValueError` if it lets nothing train; warn of a tied parameter that it matches by
    another name than its first, by which `named_parameters` calls it.

    Args:
        left: names of the parameters that it leaves trainable, with rows that train by themselves.
    """
    only, names = f"only={pattern.pattern!r}", defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    found = [first for first, *_ in names.values() if matches(pattern, first)]
    hints = [
        f"{other} goes by the name {first}"
        for first, *others in names.values()
        for other in others
        if first not in found and matches(pattern, other)
    ]
    hint = "; ".join(["", *hints])
    if not found:
        every = [first for first, *_ in names.values()]
        like = " and ".join(dict.fromkeys(every[:1] + every[len(every) // 2 :][:1])) or "none"
        raise ValueError(f"{only} matches no parameter, of names like {like}{hint}")
    if not left:
        raise ValueError(
            f"{only} matches {len(found)} parameters, such as {found[0]}, and none of them was "
            f"trainable when the model was patched{hint}"
        )
    if hints:
        warnings.warn(f"{only} freezes a tied parameter{hint}: add that to train it", stacklevel=6)


def check_same_only(saved: str | None, only: str | None) -> None:
    """Raise `ValueError` where a run goes on with another mask: its optimizer has no state for what
    it would train, and loses the rest.
    """
    if saved != only:
        raise ValueError(f"saved with only={saved!r}, this run has only={only!r}: pass the same")
