"""Runs one patched model's forwards without their prefix wherever their rows are stored.

Before a forward, its rows are looked up (`content_keys.py`, `keyed_rows.py`). What is missing is
computed, and the boundary activations take the place of the prefix (`forward_plan.py`). Which
models can be served so is shown by a trial at the start of every stage (`trial.py`).
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..model.call import Call, UnknownContent, argument_names
from ..model.host_copies import HostCopies
from ..model.layout import Layout
from ..packing import PADDING_READ, looks, padding_read
from ..packing.ranks import shared_calls
from .agreement import ANOTHER_RANK, Ranks, Vote, any_rank
from .break_even import BreakEven, Stopwatch
from .content_keys import Rows, digest_rows, read_content, signature
from .forward_plan import ForwardPlan
from .keyed_rows import KeyedRows
from .prefix_cache import CacheReport, PrefixCache
from .prefix_weights import PrefixWeights
from .reasons import call_reason, stage_reason
from .recorded_levels import Fed
from .row_check import RowCheck, Sample
from .side_forwards import SideForwards
from .stand_ins import Swaps, UnservableError
from .trial import Path, Trial, error_line

_MAX_CHANGES = 8  # of one thing, with no served forward in between; each is learnt anew
_MAX_PATHS = 8  # kinds of arguments in one stage; each costs two forwards
Spans = Sequence[tuple[int, int]]


class PrefixServer:
    """One patched model's cache, which is told of every stage and forward.

    `fixed`: frozen units are held in eval mode; nothing is served otherwise.

    Attributes:
        level: block whose input is stored: the boundary, or the end of the first stack below it.
        rows: what is stored.
        watches: the forward under way looks, in its backward, for what the loop reads at padding.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, cache: PrefixCache, *, fixed: bool
    ) -> None:
        self._model = model
        self._layout = layout
        self._cache = cache
        self._fixed = fixed
        self._weights = PrefixWeights(model, layout)
        self.rows = KeyedRows(model, layout, self._weights, cache)
        self._side = SideForwards(model, layout)
        self._check = RowCheck(self._weights, self._side, self.rows, cache.dtype)
        self._names = argument_names(model)
        self.level = 0
        self._paused = False
        self._reason: str | None = "nothing is frozen yet"  # for the whole stage
        self._off = False  # the reason is that it would not pay
        self._paths: dict[tuple[Any, frozenset[str]], Path] = {}  # by arguments and padding
        self._bypasses: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()  # since a forward was served
        self._served = 0
        self._counts = BreakEven()
        self._watch = Stopwatch("cpu")
        self._ranks: Ranks | None = None  # that gather together
        self._changed: int | None = None  # lowest unit that has, which they do not know yet
        self._stand_ins: Swaps | None = None  # of the forward that comes
        self._failed: Any = None  # the kind of arguments whose trial has raised before it
        self._spans: Spans | None = None  # of the forward's tokens, where rows are without padding
        self._looks = 0  # gradients that were looked at for what the loop reads at padding
        self._padding_read = False  # they have shown that it does
        self.watches = False

    @property
    def busy(self) -> bool:
        """A forward of the server's own is under way; the handle's other hooks leave it alone."""
        return self._side.busy

    def begin_stage(self, boundary: int) -> None:
        """Begin a stage: everything below block `boundary` is frozen."""
        self.remove_stand_ins()
        self._forget_changed()
        self.level = level = min(boundary, self._layout.stacks[0].length)
        self.rows.forget_above(level)  # the blocks in between train now
        self._check.begin_stage(level)
        self._weights.watch(level)
        self._paths.clear()
        self._bypasses.clear()
        self._changes.clear()
        self._counts, self._served, self._off = BreakEven(), 0, False
        self._watch = Stopwatch(next(self._model.parameters()).device.type)
        self._reason = stage_reason(
            self._model, self._layout, self._weights, level, fixed=self._fixed
        )
        if self._reason is None and self._padding_read:
            self._reason, self._off = PADDING_READ, True

    def share_gathers(self, run_inside: Callable[[Call], Any], ranks: Ranks | None) -> None:
        """Follow a model whose parameters are shards, before its stage begins again.

        Args:
            run_inside: runs the model's own forward inside one that has begun.
            ranks: that gather together; None for one alone.
        """
        self._side.call_model = run_inside
        self._ranks = ranks
        self._check.on_any_rank = any_rank(ranks)

    def close(self) -> None:
        self.remove_stand_ins()
        self._paths.clear()
        self.rows.close()

    def remove_stand_ins(self) -> None:
        """Put every module in its own place again, also after a forward that was interrupted."""
        if self._stand_ins is not None:
            self._stand_ins.remove_stand_ins()
        self._stand_ins = self._failed = self._spans = None
        for path in self._paths.values():
            for level in path.levels.values():
                level.forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in this context run as without a cache."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def before_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], host: HostCopies, *, proved: bool
    ) -> None:
        """Look the rows of a forward up, and compute those that are missing.

        `install_stand_ins` then makes the forward take them, once the first training forward of the
        plan, which must run the prefix, has `proved` that nothing is cut off.

        Args:
            host: gets what is read of the arguments.
        """
        if self.busy:
            return
        self.remove_stand_ins()
        if self._reason is None and not self._paused:
            self._check.compare_settings()
            call = Call(self._names, args, kwargs, host)
            prepare = self._prepare if self._ranks is None else self._prepare_together
            try:
                reason = prepare(call, proved=proved)
            except (UnknownContent, UnservableError) as error:
                reason = str(error)
            if reason is not None:
                self._bypasses[reason] += 1

    def fed(self) -> list[Fed]:
        """What the forward that comes is fed in its prefix's place; nothing where that runs."""
        if self._stand_ins is None:
            return []
        levels = {path.levels.get(self.level) for path in self._paths.values()} - {None}
        return [fed for level in levels if (fed := level.fed()) is not None]

    def install_stand_ins(self) -> None:
        """Put the stand-ins of the forward that comes in their places, until `after_forward`."""
        if not self.busy and self._stand_ins is not None:
            self._stand_ins.install_stand_ins()

    def watch_padding(self) -> None:
        """Have the backward of the forward that comes, if it is served and runs padded, look
        whether the loop reads padding: around rows stand zeros, and the trial sees what the model
        itself reads alone.
        """
        self.watches = False
        if self._spans is None:
            return
        for fed in self.fed():
            (hidden,) = fed.tensors
            padded = any(span != (0, hidden.shape[1]) for span in self._spans)
            if padded and self._looks < looks(hidden.device):
                self.watches = True
                # no leaf, which a block might write into
                hidden = hidden.detach().requires_grad_().clone()
                hidden.register_hook(partial(self._look_at_gradient, self._spans))
                fed.key.feed(hidden)

    def _look_at_gradient(self, spans: Spans, gradient: Tensor) -> None:
        rows = [row[start:end] for row, (start, end) in zip(gradient, spans, strict=True)]
        reads = padding_read(gradient, torch.cat(rows))
        self._looks += reads is not None
        if reads:
            self.stop_at_padding()

    def stop_at_padding(self) -> None:
        """Serve no forward any more: the loop reads padding. Called inside a backward."""
        self._padding_read = True

    def after_forward(self, *, raised: bool) -> None:
        """Put every module in its own place again, and note what the forward has shown."""
        if self.busy:
            return
        if self._failed is not None and raised:
            self._paths.pop(self._failed, None)
        if self._reason is None and not self._paused:  # what a forward itself sets does not count
            self._check.note_settings()
        self.remove_stand_ins()

    def _prepare(self, call: Call, *, proved: bool) -> str | None:
        """Plan the forward; why it runs as without a cache, if it does."""
        if (reason := call_reason(self._model, self._weights, call)) is not None:
            return reason
        grads = torch.is_grad_enabled()
        self._look()
        if self._reason is not None or not (grads or self.rows.store.levels()):
            return None  # or read-only, and nothing to read
        if self._check.doubted:
            if (holds := self._check.resolve_doubt(self._context(call))) is None:
                return "a setting of the model has changed: rows are looked at in training first"
            if not holds:
                self._paths.clear()
        path = self._known_path(call)
        if path is None:
            lower = [at for at in self.rows.known_levels() if at < self.level]
            path = self._learn_path(call, lower)
        if (reason := _reason_against(path, grads=grads)) is not None:
            return reason
        self.rows.bind_level(self.level)
        plan = self._plan(call, path, grads=grads)
        self._follow(plan, plan.look_up(), grads=grads, proved=proved)
        return None

    def _prepare_together(self, call: Call, *, proved: bool) -> str | None:
        """The same, with all ranks that gather together: each comes here in every forward."""
        grads = torch.is_grad_enabled()
        while True:
            vote, plan, reason = self._vote(call, grads=grads)
            agreed = vote.together(self._ranks)
            if agreed.changed is not None:
                self._forget_from(agreed.changed)
            if agreed.off:
                if self._reason is None:
                    self._switch_off("another rank has switched it off: its report says why")
                return None
            if agreed.bypass:
                return reason if vote.bypass else ANOTHER_RANK
            if agreed.doubted:
                self._check.drop_all_rows()
                self._check.doubted = False
            elif agreed.unbound:
                self.rows.bind_level(self.level, agreed.stored)
            elif agreed.teacher is not None:
                self._learn_together(call, agreed.teacher, agreed.stored)
            elif agreed.changed is None:
                break
        levels = agreed.levels
        if grads and (out_of_reach := levels & agreed.lacking):
            plan.compute_again(out_of_reach)
            levels = levels - out_of_reach | {0}
        self._follow(plan, levels, grads=grads, proved=proved)
        return None

    def _vote(self, call: Call, *, grads: bool) -> tuple[Vote, ForwardPlan | None, str | None]:
        """What this rank's forward needs, the plan for it, and why it bypasses the cache."""
        self._look()
        vote, plan, reason = Vote(self.level), None, None
        vote.off = self._reason is not None
        vote.doubted = self._check.doubted
        vote.changed, self._changed = self._changed, None
        vote.unbound = self.rows.unbound(self.level)
        vote.stored = {at for at in self.rows.store.levels() if at < self.level}
        try:
            reason = call_reason(self._model, self._weights, call)
            if reason is None and (path := self._known_path(call)) is None:
                vote.teacher = self._ranks.rank
            elif reason is None:
                reason = _reason_against(path, grads=grads)
                if reason is None and not vote.unbound:
                    plan = self._plan(call, path, grads=grads)
                    vote.levels = plan.look_up()
                    known = set() if path.length(call) is None else {*path.levels}
                    vote.lacking = {*range(1, self.level)} - known
        except (UnknownContent, UnservableError) as error:
            reason = str(error)
        vote.bypass = reason is not None or not (grads or self.rows.store.levels())
        return vote, plan, reason

    def _look(self) -> None:
        """Look at what was measured and what has changed."""
        self._watch.poll()
        self._forget_changed()
        if self._reason is None and self._padding_read:
            self._switch_off(
                f"{PADDING_READ}, which stored rows are without: a step that was served had "
                "another gradient. Leave padding out of the loss"
            )
        if self._reason is None and torch.is_grad_enabled():
            if verdict := self._counts.verdict(self.rows.store.rows(self.level)):
                self._switch_off(verdict)

    def _context(self, call: Call) -> tuple[bytes, bool]:
        """What boundary activations depend on beside the call and the weights."""
        precision = _precision(self._model, call.device.type)
        return repr(precision).encode() + self._weights.adapters(), self._model.training

    def _plan(self, call: Call, path: Path, *, grads: bool) -> ForwardPlan:
        context = self._context(call)
        rows, hash_ms = _recognise(call, path, context[0])

        def still_hold(hidden: Tensor) -> bool:
            first = partial(Sample, path, context, call.take([0]), hidden[:1], rows.spans[0])
            if self._check.probe(first, grads=grads, served=self._served):
                return True
            self._bypasses[self._check.problem] += 1
            return False

        return ForwardPlan(
            self.level,
            call,
            path,
            rows,
            hash_ms,
            self._side,
            self.rows,
            self._counts,
            self._watch,
            still_hold,
        )

    def _follow(
        self, plan: ForwardPlan, levels: Collection[int], *, grads: bool, proved: bool
    ) -> None:
        """Do as planned with rows that are, on any rank, at these levels."""
        if grads:
            together = self._ranks is not None
            self._stand_ins = plan.stand_ins_of_training(levels, proved=proved, together=together)
            if self._check.sample is None and plan.computed is not None:
                row, hidden, span = plan.computed
                context = self._context(plan.call)
                self._check.sample = Sample(plan.path, context, plan.call.take([row]), hidden, span)
        else:
            self._stand_ins = plan.stand_ins_of_read(levels)
        if plan.served:
            self._served += 1
            self._changes.clear()
        if grads and self._stand_ins is not None and plan.path.unpadded and plan.path.per_token:
            self._spans = plan.rows.spans

    def _kind(self, call: Call) -> tuple[Any, ...]:
        precision = _precision(self._model, call.device.type)
        return signature(call), precision, self._model.training

    def _known_path(self, call: Call) -> Path | None:
        """How forwards of a kind go; None if that is to be learnt."""
        kind = self._kind(call)
        known = [(s, p) for (other, s), p in self._paths.items() if other == kind]
        if not known or any(path.reason is None for _, path in known):
            read_content(call, frozenset().union(*(path.consumed for _, path in known)))
        padding = _padding(call)
        known.sort(key=lambda pair: pair[0] != padding)  # the same padding first
        for sides, path in known:
            if path.serves(padding, call.size, sides):
                return path
        if len(self._paths) >= _MAX_PATHS:
            return Path(f"more than {_MAX_PATHS} kinds of arguments")
        return None

    def _learn_path(self, call: Call, lower: Collection[int]) -> Path:
        """Learn from one batch how forwards of its kind go, from `lower` levels too."""
        kind, padding = self._kind(call), _padding(call)
        trial = Trial(self._model, self._layout, self._weights, self._side, self.level)
        try:
            path = trial.learn_path(call, lower, padded=bool(padding))
        except Exception as error:  # the forward itself is about to raise the same; or else
            path = Path(f"a trial of its forward raises {error_line(error)}")
            self._failed = kind, padding
        if path.place_found and self.rows.on_disk:  # their keys were made without it
            self._check.drop_all_rows()
        self._paths[kind, padding] = path
        return path

    def _learn_together(self, call: Call, teacher: int, lower: Collection[int]) -> None:
        """Have all ranks learn from the batch of one: they gather for as many forwards."""
        mine = self._ranks.rank == teacher
        share = partial(self._ranks.share, source=teacher)
        given = [replace(call, host=HostCopies())] if mine else ""
        calls = shared_calls(given, share, call.device)
        if isinstance(calls, str):
            if mine:
                self._paths[self._kind(call), _padding(call)] = Path(calls)
            return
        read_content(calls[0])
        self._learn_path(calls[0], lower)

    def _forget_changed(self) -> None:
        """Drop what was computed from weights that are not there any more."""
        change = self._weights.lowest_change()
        if change is None:
            return
        unit, name = change
        self._changes[name] += 1
        self._changed = unit if self._changed is None else min(unit, self._changed)
        self._forget_from(unit)
        self._weights.watch(self.level)
        if self._changes[name] > _MAX_CHANGES and self._reason is None:
            self._switch_off(f"what the prefix reads ({name}) changes between forwards")

    def _forget_from(self, unit: int) -> None:
        self.rows.forget_above(unit)
        if self.level > unit:
            self._check.sample = None
        self._paths.clear()

    def _switch_off(self, verdict: str) -> None:
        self._reason, self._off = verdict, True
        self._check.drop_all_rows()
        warnings.warn(f"the prefix cache is off for this stage: {verdict}", stacklevel=5)

    def report(self) -> CacheReport:
        self._watch.poll()
        store, counts = self.rows.store, self._counts
        state = "on" if self._reason is None else "off" if self._off else "bypassed"
        reason = self._reason or ""
        refusals = {p.reason for p in self._paths.values()} or set(self._bypasses)
        if self._reason is None and refusals and None not in refusals:
            state, reason = "bypassed", "; ".join(sorted(refusals))
        warned = list(store.warnings)
        if any(path.per_token and not path.unpadded for path in self._paths.values()):
            warned.append(
                "the loss or something else above the boundary reads padding: rows are stored with "
                "it, and found again under the same padding only"
            )
        return CacheReport(
            state=state,
            reason=reason,
            level=self.level,
            rows={level: store.rows(level) for level in store.levels()},
            nbytes=store.nbytes,
            nbytes_by_tier=store.nbytes_by_tier,
            hits=counts.hits,
            misses=counts.misses,
            served_steps=self._served,
            prefix_ms=counts.prefix_ms,
            read_ms=counts.read_ms,
            bypasses=dict(self._bypasses),
            warnings=tuple(warned),
        )


def _reason_against(path: Path, *, grads: bool) -> str | None:
    if path.reason is None and not grads and path.keys_and_values:
        return "the output holds keys and values of all blocks: pass use_cache=False"
    return path.reason


def _recognise(call: Call, path: Path, salt: bytes) -> tuple[Rows, float]:
    """The rows of a batch, whose content the host has read, and the milliseconds it took."""
    started = time.perf_counter()
    rows = digest_rows(call, salt, unpadded=path.unpadded, consumed=path.consumed)
    hash_ms = (time.perf_counter() - started) * 1e3
    if not (path.unpadded and path.per_token):
        rows = Rows(rows.digests, ((0, path.length(call) or 0),) * call.size)
    return rows, hash_ms


def _padding(call: Call) -> frozenset[str]:
    """Sides on which some row of a batch has padding."""
    spans, tokens = call.spans[0], call.tokens or 0
    left, right = any(s for s, _ in spans), any(e < tokens for _, e in spans)
    return frozenset(["left"] * left + ["right"] * right)


def _precision(model: nn.Module, device_type: str) -> tuple[Any, ...]:
    """What the activations depend on beside arguments and weights."""
    autocast = None
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        autocast = torch.get_autocast_dtype(device_type)
    # accelerate puts autocast into a forward of the instance's own
    return (autocast, "forward" in model.__dict__)
