"""One trial for all ranks: on the rows of the first one, and with what it has found."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import torch

from ..model.call import Call
from .trial import Outcome

Share = Callable[[bytes], bytes]  # gives every rank what the first one has


def shared_calls(calls: list[Call] | str, share: Share, device: torch.device) -> list[Call] | str:
    """The first rank's calls for a trial, on `device`, or its reason for none."""
    received = pickle.loads(share(_sent(calls)))
    if isinstance(received, str):
        return received
    return [
        call.changed(lambda _, v: v.to(device) if isinstance(v, torch.Tensor) else v)
        for call in received
    ]


def _sent(calls: list[Call] | str) -> bytes:
    if isinstance(calls, str):
        return pickle.dumps(calls)
    on_host = [
        c.changed(lambda _, v: v.detach().cpu() if isinstance(v, torch.Tensor) else v)
        for c in calls
    ]
    try:
        return pickle.dumps(on_host)
    except Exception as error:  # of the arguments' own code
        return pickle.dumps(f"its arguments cannot be sent to other ranks: {error}")


def as_first(outcome: Outcome, share: Share) -> Outcome:
    """What the first rank has found, with the recipes of this one for what packs on both."""
    own = [*outcome.recipes], replace(outcome, recipes={})
    packs, first = pickle.loads(share(pickle.dumps(own)))
    return replace(
        first,
        recipes={path: recipe for path, recipe in outcome.recipes.items() if path in packs},
        reasons={**outcome.reasons, **first.reasons},
    )
