"""The gate before any number: a step in every stage against plain torch, without dropout.

In float32 everything is asked for. In bfloat16, where a rounding turns the sign of a small gradient
and with it AdamW's first update, the updates are checked in float32 on a tiny shape of the same
kind, losses and gradients on the shape and in the precision that are measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from training import Provider, Refused, Session, Work, free, groups, trains

GATE_SAMPLE = 65_536  # elements of a tensor that are compared, spread over all of it
# relative errors: loss, gradient. On a GPU sums come in another order; bfloat16 has 2^-8
TOLERANCES = {"cpu": (1e-6, 1e-5), "cuda": (1e-4, 1e-3), "bf16": (1e-2, 5e-2)}


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // GATE_SAMPLE)].float().clone()


def _relative(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Euclidean norm of the difference over that of what is right, over all tensors."""
    apart = torch.stack([(found[n] - right[n]).norm() for n in right]).norm()
    return (apart / torch.stack([t.norm() for t in right.values()]).norm()).item()


@dataclass
class _Truth:
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    moved: dict[str, Tensor] = field(default_factory=dict)


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
        self._truths: dict[tuple[bool, float], _Truth] = {}
        self.strict: Gate | None = None
        precision = work.device.type
        if work.precision != "fp32":
            precision = "bf16"
            tiny = "tiny Llama" if work.sizes.is_causal else "tiny BERT"
            tokens = min(work.tokens, 32)
            self.strict = Gate(replace(work, shape=tiny, precision="fp32", tokens=tokens), rows)
        self.loss_tolerance, self.gradient_tolerance = TOLERANCES[precision]

    def _truth(self, planned: bool, clip: float) -> _Truth:
        if (planned, clip) in self._truths:
            return self._truths[planned, clip]
        truth = self._truths[planned, clip] = _Truth()
        model = self.work.model()
        before = {name: _sample(p) for name, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(groups(model), lr=self.work.lr)
        for stage, boundary in enumerate(self.work.boundaries):
            with self.work.autocast():
                loss = model(**self.batches[stage]).loss
            loss.backward()
            for name, p in model.named_parameters():
                if planned and not trains(name, stage, boundary):
                    p.grad = None
            truth.losses.append(loss.item())
            truth.gradients.append(
                {n: _sample(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            )
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        truth.moved = {n: _sample(p) - before[n] for n, p in model.named_parameters()}
        return truth

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
            check = self._check_rule if provider.same_rule else self._check_learning
            return errors | check(provider, session)
        finally:
            session.close()
            del session
            free(self.work.device, compiled=provider.compiles)

    def _check_rule(self, provider: Provider, session: Session) -> dict[str, float]:
        clip = math.inf if provider.clips_otherwise else self.work.clip
        truth = self._truth(provider.follows_plan, clip)
        # a compiled module's own name is no part of its parameters' names
        parameters = {n.replace("_orig_mod.", ""): p for n, p in session.model.named_parameters()}
        before = {name: _sample(p) for name, p in parameters.items()}
        losses, gradients = [], []
        for step, batch in enumerate(self.batches):
            session.begin(step)
            loss = session.backward(batch).item()
            losses.append(abs(loss - truth.losses[step]) / abs(truth.losses[step]))
            # weights that were updated in 8 bits are other weights from the second step on
            exact = not step or provider.movement_tolerance <= 0.05
            if not losses[-1] <= max(self.loss_tolerance, 0.0 if exact else 1e-3):
                raise Refused(
                    f"gate is red: loss {loss:.7g} in stage {step + 1}, plain torch has "
                    f"{truth.losses[step]:.7g}"
                )
            if provider.keeps_gradients:
                found = {n: _sample(p.grad) for n, p in parameters.items() if p.grad is not None}
                right = truth.gradients[step]
                if wrong := sorted(found.keys() ^ right.keys()):
                    raise Refused(
                        f"gate is red: in stage {step + 1}, {len(wrong)} tensors have a gradient "
                        f"and should not, or the reverse: {wrong[0]}"
                    )
                gradients.append(_relative(found, right))
                if not gradients[-1] <= max(self.gradient_tolerance, 0.0 if exact else 1e-2):
                    raise Refused(
                        f"gate is red: gradients of stage {step + 1} are {gradients[-1]:.1e} off"
                    )
            session.update()
        errors = {"loss_error": max(losses)}
        if gradients:
            errors["gradient_error"] = max(gradients)
        if self.strict is None:
            moved = {name: _sample(p) - before[name] for name, p in parameters.items()}
            movement = errors["movement_error"] = _relative(moved, truth.moved)
            if not movement <= provider.movement_tolerance:
                raise Refused(
                    f"gate is red: the updates move {movement:.1e} off plain torch's AdamW"
                )
        return errors

    def _check_learning(self, provider: Provider, session: Session) -> dict[str, float]:
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
