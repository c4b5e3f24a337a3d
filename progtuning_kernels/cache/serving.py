"""Runs one patched model's forwards without their prefix wherever their rows are stored.

Before a forward, its rows are looked up. What is missing is computed for the missing rows only, in
a forward that ends at the boundary, or for all rows in the forward itself where that is cheaper;
then the boundary activations take the place of the prefix. Which models can be served so is not
taken on trust: at the start of every stage one batch runs both ways, from the same random numbers,
and all outputs are compared; and what the prefix computes from is followed through it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..model.forward_hooks import buffers_kept, tensors_in
from ..model.layout import Layout
from .break_even import BreakEven, Stopwatch
from .content_keys import READ_ABOVE, READ_BY_BATCHES, Call, Rows, UnknownContent
from .prefix_cache import CacheReport, PrefixCache
from .prefix_inputs import Extremes, Follow, place_of
from .prefix_weights import PrefixWeights
from .stand_ins import Catch, Level, Recording, StopForward, Swaps, UnservableError

# Largest difference, relative to the largest value, between a served forward and a plain one. The
# kernels above the boundary get the same input, so that on CPU there is none.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Between a stored row and the same row computed anew, in another batch and another precision.
_STORED_TOLERANCE = {None: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2, "8bit": 1e-1}
_PROBE_EVERY = 256  # served forwards; one row each
_MAX_CHANGES = 8  # of one thing, with no served forward in between; each is learnt anew
_MAX_PATHS = 8  # kinds of arguments in one stage; each costs two forwards
_KEYS_AND_VALUES = ("past_key_values", "cache_params", "mems")
_MUST_BE_OFF = ("output_hidden_states", "output_attentions", "output_router_logits")
_LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


@dataclass
class _Path:
    """How forwards with one kind of arguments go.

    Attributes:
        reason: why they are not served; None where they are.
        levels: boundary activations that they can start from.
        unpadded: rows are stored without padding. False where something above the boundary reads
            the hidden states of padding.
        draws: code around the prefix draws random numbers, to no effect (BART's layerdrop of 0).
        consumed: arguments of `READ_ABOVE` that the prefix reads all the same.
        keys_and_values: the output holds those of all blocks.
        dtype: of the boundary activations.
        width: C.
        alone: it was learnt from one row, which does not show whether rows depend on others.
        per_token: T of the boundary activations is that of the token ids.
        lengths: T by the shapes of one sample, where it is not.
    """

    reason: str | None = None
    levels: dict[int, Level] = field(default_factory=dict)
    unpadded: bool = True
    draws: bool = False
    consumed: frozenset[str] = frozenset()
    keys_and_values: bool = False
    dtype: torch.dtype = torch.float32
    width: int = 0
    alone: bool = False
    per_token: bool = True
    lengths: dict[Any, int] = field(default_factory=dict)

    def length(self, call: Call) -> int | None:
        return call.tokens if self.per_token else self.lengths.get(call.shapes(self.consumed))


@dataclass(frozen=True)
class _Sample:
    """A row as it was computed once, to be computed again when something may have changed.

    Attributes:
        context: precision, adapters and mode that it was computed with.
        call: its arguments.
        hidden: its boundary activations, (1, T, C).
        span: of its tokens.
    """

    path: _Path
    context: tuple[Any, ...]
    call: Call
    hidden: torch.Tensor
    span: tuple[int, int]

    def holds(self, server: PrefixServer) -> bool:
        tolerance = max(_STORED_TOLERANCE[None], _TOLERANCE.get(self.path.dtype, 0.0))
        try:
            computed = server.compute(self.path, self.call)
        except Exception:  # a setting under which it does not even run
            return False
        return _close_rows(computed, self.hidden, [self.span], tolerance)


class PrefixServer:
    """One patched model's cache: what the handle tells about stages and forwards.

    Args:
        model: the patched model; sub-forwards call it, so that whatever wraps its forward applies.
        layout: its cut into units.
        cache: what to keep where.
        fixed: whether frozen units are held in eval mode; nothing is served otherwise.

    Attributes:
        level: block whose input is stored: the boundary, or the end of the first stack below it.
        busy: a forward of the server's own is under way; the handle's other hooks leave it alone.
    """

    def __init__(
        self, model: nn.Module, layout: Layout, cache: PrefixCache, *, fixed: bool
    ) -> None:
        self._model = model
        self._layout = layout
        self._cache = cache
        self._fixed = fixed
        self._store = cache.open()
        self._weights = PrefixWeights(model, layout)
        self._names = _argument_names(model)
        self.level = 0
        self.busy = False
        self._paused = False
        self._reason: str | None = "nothing is frozen yet"  # for the whole stage
        self._off = False  # the reason is that it would not pay
        self._tokens: dict[int, bytes] = {}  # by level: stands for the weights below it
        self._bound: str | None = None
        self._paths: dict[tuple[Any, frozenset[str]], _Path] = {}  # by arguments and padding
        self._bypasses: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()  # since a forward was served
        self._served = 0
        self._counts = BreakEven()
        self._watch = Stopwatch("cpu")
        self._pending: list[Swaps | Catch] = []  # of the forward that comes
        self._failed: tuple[Any, str] | None = None  # what could not be learnt for it, and why
        self._grads_before: bool | None = None
        self._settings: list[tuple[str, Any]] | None = None  # after the last forward
        self._doubted = False  # they have changed since a row was looked at
        self._sample: _Sample | None = None
        self._foreign: set[int] = set()  # levels with rows of an earlier process
        self._expected: str | None = None  # fingerprint that those should be bound to

    # stages

    def move(self, boundary: int) -> None:
        """Begin a stage: everything below block `boundary` is frozen."""
        self._finish()
        self._forget_changed()
        self.level = level = min(boundary, self._layout.stacks[0].length)
        for stored in self._store.levels():
            if stored > level:  # the blocks in between train now
                self._forget(stored)
        self._tokens = {at: token for at, token in self._tokens.items() if at <= level}
        if self._settings not in (None, self._weights.settings()):
            self._doubted = True
        self._settings = None  # more modules are watched from here
        self._weights.watch(level)
        self._paths.clear()
        self._sample = None
        self._bypasses.clear()
        self._changes.clear()
        self._counts, self._served, self._off = BreakEven(), 0, False
        parameter = next(self._model.parameters())
        self._watch = Stopwatch(parameter.device.type)
        self._reason = self._stage_reason()

    def _stage_reason(self) -> str | None:
        """Why nothing can be served in this stage."""
        model, config = self._model, getattr(self._model, "config", None)
        if not self.level:
            return "nothing below the boundary is frozen"
        if (kind := next(model.parameters()).device.type) not in ("cpu", "cuda", "meta"):
            return f"the random numbers of {kind} devices are not watched"
        if not self._fixed:
            return 'frozen_mode="train": frozen units are no fixed function'
        if (name := self._weights.trainable(self.level)) is not None:
            return f"{name} trains below the boundary"
        peft = getattr(model, "peft_config", None)
        if isinstance(peft, dict) and any(
            getattr(c, "is_prompt_learning", False) for c in peft.values()
        ):
            return "prefix tuning gives frozen blocks keys and values that train"
        if model._compiled_call_impl is not None:
            return "the model is compiled whole: compile its blocks"
        for module in (config, *(model.get_submodule(p) for p in self._layout.containers)):
            for name in _LAYERDROP:
                if getattr(module, "__dict__", {}).get(name):
                    return f"{name} leaves out blocks at random"
        for part in _configs(config):
            for name in ("rope_parameters", "rope_scaling"):
                if kind := _batch_dependent_rope(getattr(part, name, None)):
                    return f"{kind} position frequencies depend on the longest row of a batch"
        return None

    def close(self) -> None:
        self._finish()
        self._paths.clear()
        self._cache.close(self._store)

    def put_back(self) -> None:
        """Every module in its own place again, also after a forward that was interrupted."""
        self._finish()

    def manifest(self) -> dict[str, str | None]:
        """Where rows are kept, and what for: for a checkpoint."""
        path = self._cache.path
        return {"path": None if path is None else os.fspath(path), "fingerprint": self._bound}

    def expect(self, manifest: dict[str, str | None]) -> None:
        """Take over the manifest of the run that this one continues; warn of rows out of reach.

        Rows are found by what they were computed from. One folder is found again under the same
        name, or wherever that name leads to now.
        """
        there, here = manifest["path"], self._cache.path
        if there is None:
            return
        if here is None or (there != os.fspath(here) and not _same_folder(there, here)):
            warnings.warn(
                f"the rows of the prefix cache are in {there}, this run's cache is "
                f"{'in memory' if here is None else f'in {os.fspath(here)}'}: rows are computed "
                "anew",
                stacklevel=4,
            )
            return
        self._expected = manifest["fingerprint"]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in this context run as without a cache."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    # one forward

    def before_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, proved: bool
    ) -> dict[str, Any]:
        """Look the rows of a forward up, and compute what is missing if that is cheap.

        `install` then makes the forward take what there is.

        Args:
            args: positional arguments of the model.
            kwargs: its keyword arguments.
            proved: the plan's first training forward, which must run the prefix, is over.

        Returns:
            The keyword arguments without the id column.
        """
        ids = None
        if (column := self._cache.id_column) is not None and column in kwargs:
            kwargs = dict(kwargs)
            ids = kwargs.pop(column)
        if self.busy:
            return kwargs
        self._finish()
        if self._reason is None and not self._paused:
            if self._settings not in (None, self._weights.settings()):
                self._doubted = True
            call = Call(self._names, args, kwargs)
            try:
                reason = self._bypass(call) or self._prepare(call, ids, proved=proved)
            except UnknownContent as unknown:
                reason = str(unknown)
            if reason is not None:
                self._bypasses[reason] += 1
        return kwargs

    def install(self) -> None:
        """Put the stand-ins of the forward that comes in their places, until `after_forward`."""
        if not self.busy:
            for swaps in self._pending:
                swaps.install()

    def after_forward(self, *, raised: bool) -> None:
        """Every module in its own place again."""
        if self.busy:
            return
        if self._failed is not None and not raised:
            kind, reason = self._failed
            self._paths[kind] = _Path(reason)
        if self._reason is None and not self._paused:  # what a forward itself sets does not count
            self._settings = self._weights.settings()
        self._finish()

    def prefetch(self, kwargs: Mapping[str, Any]) -> None:
        """Start reading the rows of a batch that comes soon. A hint, and never an error.

        Args:
            kwargs: the model's arguments, on any device; on a GPU their content has to be waited
                for.
        """
        if self._reason is not None or self._paused or not self._store.rows(self.level):
            return
        kwargs = dict(kwargs)
        column = self._cache.id_column
        ids = None if column is None else kwargs.pop(column, None)
        call = Call(self._names, (), kwargs)
        context = _context(self._model, next(self._model.parameters()).device.type)
        try:
            if self._bypass(call) is not None:
                return
            kind = (call.signature, context, self._model.training)
            path = self._known_path(kind, _padding(call), call.size)
            if path is None or path.reason is not None:
                return
            rows = self._rows(call, ids, self.salt(context), path)
        except UnknownContent:
            return
        self._store.prefetch(self.level, self.keys(self.level, rows))

    def _finish(self) -> None:
        """Every module in its own place again, also after a forward that was interrupted."""
        for swaps in self._pending:
            swaps.restore()
        self._pending, self._failed = [], None
        for path in self._paths.values():
            for level in path.levels.values():
                level.forget()

    def _bypass(self, call: Call) -> str | None:
        """Why these arguments want the blocks below the boundary to run."""
        if (name := self._weights.hooked()) is not None:
            return f"a forward hook on {name} wants it to run"
        named = call.named
        for name in ("past_key_values", "inputs_embeds", "encoder_outputs"):
            if name in named:
                return f"{name} was given"
        if named.get("use_cache") is True:
            return "use_cache=True: keys and values of all blocks are wanted"
        config = getattr(self._model, "config", None)
        for name in _MUST_BE_OFF:
            if named.get(name, any(getattr(c, name, False) for c in _configs(config))):
                return f"{name}: those of all blocks are wanted"
        mask = named.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", None) != 2:
            return "attention_mask is not of shape (B, T)"
        return None

    def _prepare(self, call: Call, ids: Any, *, proved: bool) -> str | None:
        """Plan the forward; why it runs as without a cache, if it does."""
        grads = torch.is_grad_enabled()
        self._watch.poll()
        self._forget_changed()
        if self._reason is not None:
            return None
        if grads and (verdict := self._counts.verdict(self._store.rows(self.level))):
            self._switch_off(verdict)
            return None
        if not grads and not any(map(self._store.rows, self._store.levels())):
            return None  # read-only, and nothing to read
        context = _context(self._model, call.device.type)
        if self._doubted and not self._look_again((self.salt(context), self._model.training)):
            return "a setting of the model has changed: rows are looked at in training first"
        kind = (call.signature, context, self._model.training)
        padding = _padding(call)
        path = self._known_path(kind, padding, call.size)
        if path is None:
            if len(self._paths) >= _MAX_PATHS:
                return f"more than {_MAX_PATHS} kinds of arguments"
            try:
                path = self._learn(call, padded=bool(padding))
            except Exception as error:  # the forward itself is about to raise the same; or else
                self._failed = (kind, padding), f"a trial of its forward raises {_line(error)}"
                return None
            self._paths[kind, padding] = path
        if path.reason is not None:
            return path.reason
        if not grads and path.keys_and_values:
            return "the output holds keys and values of all blocks: pass use_cache=False"
        started = time.perf_counter()
        rows = self._rows(call, ids, self.salt(context), path)
        hash_ms = (time.perf_counter() - started) * 1e3 if call.device.type == "cpu" else 0.0
        self._bind()
        if not path.unpadded or not path.per_token:
            length = path.length(call)
            rows = Rows(rows.digests, ((0, length or 0),) * call.size)
        _Forward(self, call, path, rows, hash_ms, grads=grads, proved=proved).plan()
        return None

    def _known_path(self, kind: Any, padding: frozenset[str], rows: int) -> _Path | None:
        """One that has been checked with padding on the same sides, or on more of them, and with
        more than one row where `rows` are more.
        """
        path = self._paths.get((kind, padding))
        if path is not None and not (path.alone and rows > 1):
            return path
        for (other, sides), path in self._paths.items():
            checked = path.reason is None and path.unpadded and not (path.alone and rows > 1)
            if other == kind and sides > padding and checked:
                return path
        return None

    def salt(self, context: tuple[Any, ...]) -> bytes:
        """What stored rows depend on beside weights and arguments."""
        return repr(context).encode() + self._weights.adapters()

    def _rows(self, call: Call, ids: Any, salt: bytes, path: _Path) -> Rows:
        if ids is None:
            if self._cache.id_column is not None:
                self._bypasses[f"no {self._cache.id_column!r}: recognised by content"] += 1
            return call.rows(salt, unpadded=path.unpadded, consumed=path.consumed)
        listed = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
        if len(listed) != call.size:
            raise UnknownContent(f"{len(listed)} identifiers for {call.size} rows")
        return call.identified(listed, salt, unpadded=path.unpadded)

    # weights

    def _forget_changed(self) -> None:
        """Drop what was computed from weights that are not there any more."""
        change = self._weights.lowest_change()
        if change is None:
            return
        unit, name = change
        self._changes[name] += 1
        for level in {*self._store.levels(), *self._tokens}:
            if level > unit:
                self._forget(level)
        if unit <= 0:
            self._bound = None
        self._paths.clear()
        self._weights.watch(self.level)
        if self._changes[name] > _MAX_CHANGES and self._reason is None:
            self._switch_off(f"what the prefix reads ({name}) changes between forwards")

    def _look_again(self, context: tuple[Any, ...]) -> bool:
        """Drop all rows if a setting that has changed is one that the prefix reads.

        Returns:
            Whether that could be found out: not where rows come from another precision or mode.
        """
        sample = self._sample
        if sample is not None and sample.context != context:
            return False
        self._doubted = False
        holds = sample is not None and sample.holds(self)
        for level in self._store.levels():
            if not holds or level < self.level:  # those below hold other things
                self._forget(level)
        if not holds:
            self._paths.clear()
        return True

    def _forget(self, level: int) -> None:
        if level == self.level:
            self._sample = None
        self._store.drop(level)
        self._tokens.pop(level, None)
        self._foreign.discard(level)

    def _bind(self) -> None:
        """Tell the store whose rows it holds; only a folder on disk makes that expensive."""
        if self._bound is None:
            config = getattr(self._model, "config", None)
            about = f"{type(self._model).__name__}{self._layout.block_paths}{config!r}".encode()
            # embeddings and block 0 are below every level: later stages keep what is stored
            weights = os.urandom(64) if self._cache.path is None else self._weights.fingerprint(1)
            self._bound = hashlib.blake2b(about + weights, digest_size=16).hexdigest()
            self._store.bind(self._bound)
            self._foreign = {level for level in self._store.levels() if self._store.rows(level)}
            if self._expected not in (None, self._bound):
                warnings.warn(
                    f"{self._cache.path} held rows of another model, configuration or version of "
                    "its weights: they were dropped",
                    stacklevel=5,
                )
            self._expected = None
        for level in {self.level, *self._store.levels()}:
            if level <= self.level and level not in self._tokens:
                kept = self._cache.path is not None
                self._tokens[level] = self._weights.fingerprint(level) if kept else os.urandom(16)

    def keys(self, level: int, rows: Rows) -> list[bytes]:
        return rows.keys(self._tokens[level])

    def store_rows(
        self, level: int, keys: Sequence[bytes], hidden: torch.Tensor, spans: Sequence[Any]
    ) -> bool:
        """Whether there was room for all of them."""
        absent = self._store.contains(level, keys).count(False)
        stored = self._store.write(level, keys, hidden, spans) if absent else 0
        if stored < absent and level in self._foreign and not self._counts.hits:
            # rows of another data set or other weights fill the folder
            self._store.drop(level)
            self._foreign.discard(level)
            stored += self._store.write(level, keys, hidden, spans)
        refused = max(0, absent - stored)
        self._counts.refused += refused
        return not refused

    def _switch_off(self, verdict: str) -> None:
        self._reason, self._off = verdict, True
        for level in self._store.levels():
            self._forget(level)
        warnings.warn(f"the prefix cache is off for this stage: {verdict}", stacklevel=5)

    # learning how the model runs

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For forwards that nobody asked for: no gradients, and no trace in buffers or in random
        numbers.
        """
        device = next(self._model.parameters()).device
        random_state, host = _random_state(device), _host_random_state()
        values = (value for module in self._model.modules() for value in vars(module).values())
        own = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
        self.busy = True
        try:
            with (
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
                buffers_kept(self._model),
            ):
                yield
        finally:
            self.busy = False
            # autocast keeps the weights that it has cast, here without a way back to their gradient
            # (up to torch 2.10 the forward to come would then train nothing that it shares)
            torch.clear_autocast_cache()
            _set_random_state(random_state, device)
            _set_host_random_state(host)
            for generator, state in own:
                generator.set_state(state)

    def _run(self, call: Call) -> Any:
        """A forward of its own; the caller's dicts and tensors stay as they are."""
        own = call.changed(lambda _, v: v.clone() if isinstance(v, torch.Tensor) else v)
        forwards = [(m.__dict__, m.__dict__.get("forward")) for m in self._model.modules()]
        try:
            return self._model(*own.args, **own.kwargs)
        except BaseException:
            # transformers 5.0 gives blocks a forward that captures hidden states, and takes it back
            # where nothing raises only
            for own_dict, forward in forwards:
                if forward is None:
                    own_dict.pop("forward", None)
                else:
                    own_dict["forward"] = forward
            raise

    def _learn(self, call: Call, *, padded: bool) -> _Path:
        """Run one batch both ways.

        Raises:
            Exception: whatever the model raises when it runs plainly.
        """
        path = _Path(alone=call.size == 1)
        device = next(self._model.parameters()).device
        recording = Recording(lambda: (_random_state(device), _host_random_state()))
        with self._aside():
            start, host = recording.random_state()
            with recording.watching(self._model, self._layout, self.level):
                inside, around = self._weights.held_inside(), self._weights.held_around()
                expected = self._run(call)
            end = _random_state(device)
            lower = {at for at in self._store.levels() if at in self._tokens and at < self.level}
            try:
                for at in sorted({self.level, *lower}, reverse=True):
                    level = Level(self._model, self._layout, at, recording, call.size)
                    state, host_state = level.random_state
                    if host_state != host:
                        raise UnservableError(
                            "code below the boundary draws random numbers of Python or numpy"
                        )
                    path.draws |= not _equal_states(state, start)
                    path.levels[at] = level
                top = path.levels[self.level]
                path.dtype, path.width = top.hidden.dtype, top.hidden.shape[2]
                path.per_token = top.hidden.shape[1] == call.tokens
                path.keys_and_values = _has_keys_and_values(expected)
                if written := _written(inside, self._weights.held_inside()):
                    name = next(iter(written))[1]
                    raise UnservableError(f"code below the boundary keeps a tensor in {name}")
                # what the model keeps of a forward is an output too
                kept = _written(around, self._weights.held_around())
                expected = (expected, [kept[key].clone() for key in sorted(kept)])
                self._find_inputs(path, call)
                path.lengths[call.shapes(path.consumed)] = top.hidden.shape[1]
                choices = (True, False) if padded and path.per_token else (path.per_token,)
                for path.unpadded in choices:
                    problems = (
                        self._compare(path, at, call, expected, start, end, device)
                        for at in path.levels
                    )
                    problem = next(filter(None, problems), None)
                    if problem is None:
                        break
                if problem is not None:
                    if top.others:
                        problem += f" (block {self.level - 1} hands on {top.others} more tensor(s))"
                    raise UnservableError(problem)
            except UnservableError as unservable:
                path.reason = str(unservable)
            except Exception as error:  # the model's own code, in a forward that ends early
                path.reason = f"a forward up to the boundary raises {_line(error)}"
        for level in path.levels.values():
            level.hidden = None
        return path

    def _find_inputs(self, path: _Path, call: Call) -> None:
        """Compute the boundary activations again, and watch what they are computed from.

        Raises:
            UnservableError: they are no function of arguments and watched tensors alone.
        """
        top = path.levels[self.level].hidden
        tolerance = _TOLERANCE.get(path.dtype, 0.0)

        def same(again: torch.Tensor) -> bool:
            return _difference(top, again) <= tolerance

        def watched(call: Call) -> tuple[torch.Tensor, Follow]:
            follow = Follow(call.tensors, self._weights.tensors)
            with follow.watching():
                return self.compute(path, call), follow

        again, follow = watched(call)
        fixed = same(again)
        if path.draws:
            for high in (False, True):
                with Extremes(high=high):
                    fixed = fixed and same(self.compute(path, call))
        if not fixed:
            raise UnservableError(
                "the prefix is no fixed function: dropout outside the frozen modules, or another "
                "state that a forward changes"
            )
        for name in sorted(follow.escaped & call.tensors.keys() - READ_BY_BATCHES):
            raise UnservableError(
                f"code below the boundary takes values of {name} for a number, a branch or a shape"
            )
        half = call.size // 2
        part, another = watched(call.take(range(half, call.size)))
        spans = call.spans[0][half:] if path.per_token else None
        if not _close_rows(part, top[half:], spans, max(tolerance, _STORED_TOLERANCE[None])):
            raise UnservableError("the prefix computes a row from other rows of its batch")
        path.consumed = follow.read_by(again) & READ_ABOVE
        plain = READ_ABOVE & call.named.keys() - call.tensors.keys()
        if plain:  # a number or a flag cannot be watched: the prefix must do without
            try:
                without = call.changed(lambda name, value: None if name in plain else value)
                if not same(self.compute(path, without)):
                    path.consumed |= plain
            except Exception:  # of the model's own code: it cannot do without them
                path.consumed |= plain
        for tensor in follow.foreign_to(again):
            if not another.has_seen(tensor):
                continue  # made in each forward, where nothing is seen of it: in a script
            place = place_of(tensor, self._model)
            if place is None:
                raise UnservableError(
                    f"the prefix reads a tensor of shape {tuple(tensor.shape)} that is no argument "
                    "and that no module holds"
                )
            if tensor.requires_grad:
                raise UnservableError(f"the prefix reads {place[1]}, which trains")
            if self._weights.watch_place(place) and self._cache.path is not None:
                for at in self._store.levels():
                    self._forget(at)  # their keys were made without it

    def _compare(
        self,
        path: _Path,
        at: int,
        call: Call,
        expected: Any,
        start: tuple[Any, ...],
        end: tuple[Any, ...],
        device: torch.device,
    ) -> str | None:
        """What differs when the forward starts from the boundary activations of level `at`."""
        level = path.levels[at]
        hidden, real = level.hidden.clone(), None
        if path.unpadded and call.tokens is not None:
            real = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for row, (first, last) in enumerate(call.spans[0]):
                real[row, first:last] = True
            hidden[~real] = 0
        _set_random_state(start, device)
        swaps = level.feed(hidden)
        around = self._weights.held_around()
        try:
            with swaps.installed():
                found = self._run(call)
                kept = _written(around, self._weights.held_around())
                found = (found, [kept[key] for key in sorted(kept)])
        except Exception as error:  # the model's own code wants more than a stand-in gives
            return f"without the prefix its forward raises {_line(error)}"
        fed = level.was_fed
        level.forget()
        if not fed:
            return f"block {at - 1} is not called through its list"
        if not _equal_states(end, _random_state(device)):
            return "without the prefix other random numbers are drawn"
        expected, found = _outputs(expected), _outputs(found)
        if not expected:
            return "its output shows no tensor that could be compared"
        if [t.shape for t in expected] != [t.shape for t in found]:
            return "without the prefix its outputs have other shapes"
        for one, other in zip(expected, found, strict=True):
            if real is not None and one.shape[:2] == real.shape:
                one, other = one[real], other[real]  # nothing reads the rest
            if (found_error := _difference(one, other)) > _TOLERANCE.get(one.dtype, 0.0):
                return (
                    f"an output differs by {found_error:.1e} without the prefix: something above "
                    "the boundary reads more than the hidden states"
                )
        return None

    def compute(
        self, path: _Path, call: Call, source: tuple[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Boundary activations (B, T, C) of all rows of `call`, by a forward that ends there.

        Args:
            source: a lower level and its boundary activations, to start from.
        """
        taken: list[torch.Tensor] = []

        def receive(hidden: torch.Tensor) -> None:
            taken.append(hidden.clone())
            raise StopForward

        device = next(self._model.parameters()).device
        random_state = _random_state(device) if path.draws else None
        before, self.busy = self.busy, True
        swaps = [path.levels[self.level].take(receive)]
        if source is not None:
            at, hidden = source
            swaps.append(path.levels[at].feed(hidden))
        try:
            for entry in swaps:
                entry.install()
            with torch.no_grad():
                self._run(call)
        except StopForward:
            pass
        finally:
            for entry in swaps:
                entry.restore()
            self.busy = before
            torch.clear_autocast_cache()
            if random_state is not None:
                _set_random_state(random_state, device)
        if not taken:
            raise UnservableError(f"block {self.level - 1} is not called through its list")
        return taken[0]

    # reporting

    def report(self) -> CacheReport:
        self._watch.poll()
        store, counts = self._store, self._counts
        state = "on" if self._reason is None else "off" if self._off else "bypassed"
        reason = self._reason or ""
        refusals = {p.reason for p in self._paths.values()}
        refusals = refusals or set(self._bypasses)
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
            rows={level: store.rows(level) for level in sorted(store.levels())},
            nbytes=store.nbytes,
            nbytes_by_tier=dict(store.nbytes_by_tier),
            hits=counts.hits,
            misses=counts.misses,
            served_steps=self._served,
            prefix_ms=counts.prefix_ms,
            read_ms=counts.read_ms,
            codec_error=store.error,
            bypasses=dict(self._bypasses),
            warnings=tuple(warned),
        )


class _Forward:
    """Plans one forward of a server: what to read, what to compute first, what to store."""

    def __init__(
        self,
        server: PrefixServer,
        call: Call,
        path: _Path,
        rows: Rows,
        hash_ms: float,
        *,
        grads: bool,
        proved: bool,
    ) -> None:
        self._server = server
        self._call = call
        self._path = path
        self._rows = rows
        self._hash_ms = hash_ms
        self._grads = grads
        self._proved = proved
        self._level = server.level
        self._keys = server.keys(self._level, rows)
        self._length = path.length(call)
        self._lower: set[int] = set()  # levels below that hold some of the rows

    def plan(self) -> None:
        server, size = self._server, self._call.size
        if self._length is None:  # a shape that was not seen yet
            if self._grads:
                self._take()
            return
        best = self._best_levels()
        self._lower = set(best) - {0, self._level}
        missing = best.count(0)
        if self._grads:
            server._counts.hits += size - missing
            server._counts.misses += missing
        levels = set(best)
        if not self._proved and self._grads:
            self._take()
        elif len(levels) == 1 and not missing:
            (level,) = levels
            self._serve_one(level)
        elif not self._grads:
            return  # read-only: nothing is computed in advance
        elif 2 * missing > size:
            self._take()
        else:
            self._serve_mixed(best)

    def _best_levels(self) -> list[int]:
        """For each row, the highest level that holds it; 0 where none does."""
        server = self._server
        best = [0] * self._call.size
        for level in sorted(self._path.levels, reverse=True):
            if level not in server._tokens or not server._store.rows(level):
                continue
            there = server._store.contains(level, server.keys(level, self._rows))
            best = [b or (level if found else 0) for b, found in zip(best, there, strict=True)]
            if all(best):
                break
        return best

    def _read(self, level: int, rows: Sequence[int] | None = None) -> torch.Tensor | None:
        """(len(rows), T, C), all rows by default; None where the store has lost one."""
        server = self._server
        keys, spans = server.keys(level, self._rows), self._rows.spans
        if rows is not None:
            keys, spans = [keys[i] for i in rows], [spans[i] for i in rows]
        shape = (len(keys), self._length, self._path.width)
        started = server._watch.now()
        try:
            hidden = server._store.read(
                level, keys, shape, spans, device=self._call.device, dtype=self._path.dtype
            )
        except KeyError:
            server._store.drop(level, keys)
            return None
        count = len(keys)
        hash_ms = self._hash_ms * count / self._call.size
        server._watch.stop(started, lambda ms: server._counts.add_read(ms + hash_ms, count))
        return hidden

    def _serve_one(self, level: int) -> None:
        """All rows from one level; those of a lower one move up on the way."""
        hidden = self._read(level)
        if hidden is None:
            return self._take() if self._grads else None
        if level == self._level and not self._holds(hidden):
            return self._take() if self._grads else None
        self._feed(level, hidden)
        if self._grads and level < self._level:
            self._take(whole=False)

    def _serve_mixed(self, best: Sequence[int]) -> None:
        """Missing rows by a forward of their own that ends at the boundary, the rest read."""
        server, path = self._server, self._path
        there = [i for i, level in enumerate(best) if level == self._level]
        parts: list[tuple[list[int], torch.Tensor]] = []
        if there:
            if (hidden := self._read(self._level, there)) is None:
                return self._take()
            parts.append((there, hidden))
        for level in sorted(set(best) - {self._level}):
            rows = [i for i, at in enumerate(best) if at == level]
            source = None
            if level:
                if (hidden := self._read(level, rows)) is None:
                    return self._take()
                source = (level, hidden)
            computed = server.compute(path, self._call.take(rows), source)
            if level:
                keys = server.keys(level, self._rows)
                server._store.drop(level, [keys[i] for i in rows])
            keys, spans = [self._keys[i] for i in rows], [self._rows.spans[i] for i in rows]
            server.store_rows(self._level, keys, computed, spans)
            parts.append((rows, self._without_padding(computed, spans)))
        whole = parts[0][1].new_empty((self._call.size, self._length, path.width))
        for rows, hidden in parts:
            whole[torch.tensor(rows, dtype=torch.long, device=whole.device)] = hidden
        return self._feed(self._level, whole)

    @staticmethod
    def _without_padding(hidden: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Zeros where a read row has zeros, so that a batch does not depend on what was stored."""
        for row, (start, end) in zip(hidden, spans, strict=True):
            row[:start] = 0
            row[end:] = 0
        return hidden

    def _feed(self, level: int, hidden: torch.Tensor) -> None:
        self._server._pending.append(self._path.levels[level].feed(hidden))
        self._server._served += 1
        self._server._changes.clear()

    def _take(self, *, whole: bool = True) -> None:
        """Store what arrives at the boundary in the forward that comes; rows leave lower levels.

        Args:
            whole: it runs the whole prefix, and shows what that costs.
        """
        server, path = self._server, self._path
        started = server._watch.now() if whole else None

        def receive(hidden: torch.Tensor) -> None:
            size = hidden.shape[0]
            if started is not None:
                server._watch.stop(started, lambda ms: server._counts.add_prefix(ms, size))
            spans = self._rows.spans
            if self._length is None:
                self._length = hidden.shape[1]
                path.lengths[self._call.shapes(path.consumed)] = self._length
                spans = ((0, self._length),) * size
            if server._sample is None:
                context = _context(server._model, self._call.device.type)
                server._sample = _Sample(
                    path,
                    (server.salt(context), server._model.training),
                    self._call.take([0]),
                    hidden[:1].clone(),
                    spans[0],
                )
            for level in self._lower:  # first: a full store has no room for a row twice
                server._store.drop(level, server.keys(level, self._rows))
            if server.store_rows(self._level, self._keys, hidden, spans):
                if server._counts.wants_reads:
                    self._rows = Rows(self._rows.digests, spans)
                    self._read(self._level)

        server._pending.append(path.levels[self._level].take(receive))

    def _holds(self, hidden: torch.Tensor) -> bool:
        """Whether a stored row is still what the prefix computes; looked at now and then.

        Writes through `tensor.data`, as some averages of weights make them between training and
        evaluation, leave no other trace.
        """
        server = self._server
        changed = server._grads_before not in (None, self._grads)
        server._grads_before = self._grads
        if not changed and (server._served + 1) % _PROBE_EVERY:
            return True
        computed = server.compute(self._path, self._call.take([0]))
        start, end = self._rows.spans[0]
        tolerance = max(
            _STORED_TOLERANCE[server._cache.dtype], _TOLERANCE.get(self._path.dtype, 0.0)
        )
        if _difference(computed[0, start:end], hidden[0, start:end]) <= tolerance:
            return True
        for level in server._store.levels():
            server._forget(level)
        server._bypasses["stored rows did not fit the weights any more: dropped"] += 1
        server._bind()
        self._keys = server.keys(self._level, self._rows)
        return False


def _argument_names(model: nn.Module) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)


def _padding(call: Call) -> frozenset[str]:
    """Sides on which some row of a batch has padding."""
    spans, tokens = call.spans[0], call.tokens or 0
    left = ["left"] if any(start for start, _ in spans) else []
    right = ["right"] if any(end < tokens for _, end in spans) else []
    return frozenset(left + right)


def _configs(config: Any) -> list[Any]:
    """A model's config and that of its text part."""
    if config is None or isinstance(config, dict):
        return []
    text = getattr(config, "get_text_config", None)
    return [config] if text is None else [config, text()]


def _same_folder(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _batch_dependent_rope(rope: Any) -> str | None:
    if not isinstance(rope, Mapping):
        return None
    for kind in (rope.get("rope_type"), rope.get("type")):
        if kind in ("dynamic", "longrope"):
            return kind
    return next(filter(None, map(_batch_dependent_rope, rope.values())), None)


def _context(model: nn.Module, device_type: str) -> tuple[Any, ...]:
    """What the activations depend on beside arguments and weights: the precision of the call."""
    autocast = None
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        autocast = torch.get_autocast_dtype(device_type)
    # accelerate puts autocast into a forward of the instance's own
    return (autocast, "forward" in model.__dict__)


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def _host_random_state() -> tuple[Any, ...]:
    """Of Python's and numpy's global generators: wav2vec2 draws its masks from numpy's."""
    name, words, *rest = np.random.get_state()
    return random.getstate(), (name, words.tobytes(), *rest)


def _set_host_random_state(state: tuple[Any, ...]) -> None:
    own, (name, words, *rest) = state
    random.setstate(own)
    np.random.set_state((name, np.frombuffer(words, np.uint32), *rest))


def _random_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    state = (torch.get_rng_state(),)
    # a model may be spread over several
    return state if device.type != "cuda" else (*state, *torch.cuda.get_rng_state_all())


def _set_random_state(state: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _equal_states(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _is_past(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def _has_keys_and_values(output: Any) -> bool:
    if isinstance(output, Mapping) and output.get("past_key_values") is not None:
        return True
    return any(map(_is_past, pytree.tree_leaves(output, is_leaf=_is_past)))


def _written(before: dict[Any, torch.Tensor], now: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    return {key: tensor for key, tensor in now.items() if before.get(key) is not tensor}


def _outputs(outcome: tuple[Any, list[torch.Tensor]]) -> list[torch.Tensor]:
    """Tensors of an output, keys and values left out, which the prefix makes itself, and those that
    the model has kept.
    """
    output, kept = outcome
    if isinstance(output, Mapping):
        output = {k: v for k, v in output.items() if k not in _KEYS_AND_VALUES}
    leaves = pytree.tree_leaves(output, is_leaf=_is_past)
    return [*tensors_in([leaf for leaf in leaves if not _is_past(leaf)]), *kept]


def _close_rows(one: torch.Tensor, other: torch.Tensor, spans: Any, tolerance: float) -> bool:
    """Whether rows (B, T, C) are the same within their spans, all of them if None."""
    if spans is None:
        return _difference(one, other) <= tolerance
    pairs = zip(one, other, spans, strict=True)
    return all(_difference(a[s:e], b[s:e]) <= tolerance for a, b, (s, e) in pairs)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinite where only one is finite."""
    if not one.numel():
        return 0.0
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    error = torch.where(same, 0.0, (one - other).abs())
    scale = one[one.isfinite()].abs().max().clamp_min(1e-30) if one.isfinite().any() else 1.0
    worst = float((error / scale).max())
    return float("inf") if worst != worst else worst
