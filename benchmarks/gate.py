"""The gate before any number: a step in every stage against plain torch, without dropout.

In float32 everything is asked for. In bfloat16, where a rounding turns the sign of a small gradient
and with it AdamW's first update, the updates are checked in float32 on a tiny shape of the same
kind, losses and gradients on the shape and in the precision that are measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from training import Provider, Work, free, trains

from progtuning_kernels.bench import (
    DECAY,
    TOLERANCES,
    Refused,
    Session,
    Trace,
    compare,
    plain_session,
    trace,
)
from progtuning_kernels.freezing.decay_groups import decay_groups


class Gate:
    """One step in every stage, without dropout, against plain torch.

    The truth freezes nothing: a fully trainable model's gradients, of which those that the plan
    freezes are thrown away before torch's AdamW. Losses, gradients (which tensors have one, and its
    values) and the movement of all weights have to be the same. Providers with another rule have
    to start from the same loss, and to lower it on a batch that is repeated.
    """

    def __init__(self, work: Work, rows: int) -> None:
        self.work = replace(
            work, rows=rows, dropout=0.0, batches=1, epochs=1, lr=1e-4, forced_kernels=True
        )
        self.batches = [self.work.epoch(stage)[0] for stage in range(work.stages)]
        self._truths: dict[tuple[bool, float], Trace] = {}
        self.strict: Gate | None = None
        precision = work.device.type
        if work.precision != "fp32":
            precision = "bf16"
            tiny = "tiny Llama" if work.sizes.is_causal else "tiny BERT"
            tokens = min(work.tokens, 32)
            self.strict = Gate(replace(work, shape=tiny, precision="fp32", tokens=tokens), rows)
        self.loss_tolerance, self.gradient_tolerance = TOLERANCES[precision]

    def _truth(self, planned: bool, clip: float) -> Trace:
        if (planned, clip) not in self._truths:

            def counts(stage: int, name: str) -> bool:
                return not planned or trains(name, stage, self.work.boundaries[stage])

            model = self.work.model()
            groups = decay_groups(list(model.parameters()), DECAY)
            optimizer = torch.optim.AdamW(groups, lr=self.work.lr)
            session = plain_session(replace(self.work, clip=clip), model, optimizer)
            self._truths[planned, clip] = trace(session, self.batches, counts=counts)
        return self._truths[planned, clip]

    def check(self, provider: Provider) -> dict[str, float]:
        """The errors found.

        Raises:
            Refused: the gate is red.
        """
        errors = {} if self.strict is None else self.strict.check(provider)
        with_rule = replace(provider, lr=self.work.lr) if provider.same_rule else provider
        clip = math.inf if provider.clips_otherwise else self.work.clip
        session = with_rule.session(replace(self.work, clip=clip))
        try:
            if not provider.same_rule:
                return errors | self._check_learning(session)
            return errors | compare(
                trace(session, self.batches, passes=provider.passes),
                self._truth(provider.follows_plan, clip),
                loss_tolerance=self.loss_tolerance,
                gradient_tolerance=self.gradient_tolerance if provider.keeps_gradients else None,
                movement_tolerance=provider.movement_tolerance,
                compares_movement=self.strict is None,
            )
        finally:
            session.close()
            del session
            free(self.work.device, compiled=provider.compiles)

    def _check_learning(self, session: Session) -> dict[str, float]:
        truth, losses = self._truth(False, self.work.clip), []
        for step in range(12):
            losses.append(session.step(step, self.batches[0]).item())
        error = abs(losses[0] - truth.losses[0]) / abs(truth.losses[0])
        if not error <= self.loss_tolerance:
            raise Refused(
                f"gate is red: it starts from loss {losses[0]:.7g}, plain torch from "
                f"{truth.losses[0]:.7g}"
            )
        if not losses[-1] < losses[0]:
            raise Refused(f"gate is red: loss {losses[0]:.4f} has become {losses[-1]:.4f}")
        return {"loss_error": error, "loss_fell_by": losses[0] - losses[-1]}
