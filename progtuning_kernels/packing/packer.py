"""Packs the forwards of one patched model, wherever that is known to be right and pays."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..model.call import (
    Call,
    UnknownContent,
    argument_names,
    text_configs,
    wanted_of_all_blocks,
)
from ..model.forward_hooks import foreign_hook, own_forward
from ..model.host_copies import HostCopies, waits_for
from ..model.layout import Layout
from . import heads
from .blocks import PackedCall, begin_forward, end_forward, inside_padded
from .kinds import TriedKinds
from .known_mask import known_mask
from .padding_reads import PADDING_READ, looks
from .ranks import Share, as_first, shared_calls
from .recipes import Installed
from .report import PackingReport
from .tokens import (
    GROUPS,
    FedTokens,
    PackedTokens,
    cost_of_group,
    kept_of,
    on_host,
    pack_places,
    padding_follows,
    rounded_up,
)
from .trial import Outcome, Trial, labels_like
from .trial_batch import masks_of, trial_calls

Packing = Literal["auto", "on", "off"]

# Of a batch's places: with more real tokens than this, "auto" leaves the batch padded.
MOST_REAL = 0.95
_MOST_TRIALS = 4  # on batches that show nothing
_NOTHING_YET = (
    "the first training forward with padding tries it (what torch.compile runs as a whole does not)"
)
_ACCELERATES = "as accelerate gives it for its device hooks and regional compilation"
_NO_MASK = "no attention_mask of shape (B, T) was passed"


class Packer:
    """Packing of one model.

    Args:
        mode: "auto" packs where there is enough padding, "on" any padding, "off" nothing.
        place: see `Trial`.

    Attributes:
        groups: of rows of like length, which attend together.
        sharded: parameters are shards.
        sizes: None, or how many numbers of tokens a shape (B, T) may have, for captured graphs:
            some padding is computed on then, and rows do not attend in groups.
        watches: the forward under way looks, in its backward, for what the loop reads at padding.
        on_padding_read: called in the backward that has found the loop to read padding.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        mode: Packing,
        place: Callable[[Collection[nn.Module]], None],
    ) -> None:
        self._model = model
        self._layout = layout
        self._mode = mode
        self._place = place
        self._names = argument_names(model)
        self._outcome = Outcome(decided=False)
        self._trials = 0
        self._installed: Installed | None = None
        self._kinds = TriedKinds()  # beside the installed recipes
        self._tried_from: int | None = None  # boundary of the trial
        # stacks that stay padded whatever a trial says: found out in a backward, or by a run that
        # this one continues
        self._refused: dict[str, str] = {}
        self._watched = 0  # gradients that were looked at since the last trial
        self._closed: dict[str, str] = {}  # verdicts, once the model is unpatched
        self._paused = False
        self.groups = GROUPS
        self.sharded = False
        self.sizes: int | None = None
        self.watches = False
        self.on_padding_read: Callable[[], None] = lambda: None
        # of the forward under way, by stack: its tokens, and whether modules above the blocks
        # run on them, too
        self._packed: dict[str, tuple[PackedTokens, bool]] = {}
        self.busy = False  # a trial is under way; other hooks of the model leave it alone
        self._batches = self._places = self._tokens = 0
        self._padded: Counter[str] = Counter()
        # masks that the caller's own dicts hold and have given way to a known one, by dict and name
        self._replaced: list[tuple[MutableMapping[str, Any], str, Tensor]] = []

    def learn(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        boundary: int,
        share: Share | None = None,
    ) -> None:
        """Try packing before a training forward, unless that is known for all that trains.

        Args:
            share: gives every rank what the first one has. All ranks try on its rows, which takes
                as many forwards everywhere, and do what it does. They try no other kinds of
                arguments later, which need not come on all ranks at once.
        """
        if self._mode == "off" or self.busy:
            return
        if self._installed is not None and self._installed.is_outdated():
            self.remove()
        decided = self._outcome.decided or self._trials == _MOST_TRIALS
        kinds = TriedKinds()
        if decided and self._tried_from is not None and boundary >= self._tried_from:
            if self._installed is not None:
                self.learn_kind(args, kwargs, share)
                return
            if share is not None or self._untried(args, kwargs) is None:
                return
            kinds = self._kinds
        calls = self._trial_calls(args, kwargs)
        if share is None:
            if isinstance(calls, str):
                if self._installed is None:
                    self._outcome = self._nothing_shown(calls)
                return
        else:
            calls = shared_calls(calls, share, next(self._model.parameters()).device)
        trials = 0 if decided else self._trials
        self.remove()
        self._kinds = kinds
        self._trials, self._tried_from, self._watched = 1 + trials, boundary, 0
        if isinstance(calls, str):
            self._outcome = self._nothing_shown(calls)
            return
        with self._trial() as trial:
            outcome = trial.learn(calls)
        self._outcome = outcome if share is None else as_first(outcome, share)
        recipes = {p: r for p, r in self._outcome.recipes.items() if p not in self._refused}
        if recipes:
            self._installed = Installed(self._model, recipes, self._place)
        self._kinds.note(calls[0], _shown(self._outcome))

    def learn_kind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], share: Share | None = None
    ) -> None:
        """Try what packs on arguments of another kind, before a forward that trains or does not."""
        installed = self._installed
        if installed is None or share is not None or self.busy or self._paused or inside_padded():
            return
        if installed.is_outdated() or self._untried(args, kwargs) is None:
            return
        calls = self._trial_calls(args, kwargs)
        if isinstance(calls, str):
            return
        with self._trial(gradients=torch.is_grad_enabled()) as trial:
            found = trial.confirm(calls, installed)
        self._kinds.note(calls[0], _shown(found))
        if found.recipes:
            self._watched = 0  # they may come with another loss
            self._outcome = replace(
                self._outcome,
                makes_cache=self._outcome.makes_cache or found.makes_cache,
                right_only=self._outcome.right_only or found.right_only,
            )

    def _untried(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, if its arguments are of a kind to be tried."""
        try:
            call = Call(self._names, args, kwargs)
            return call if self._kinds.wants_trial(call) else None
        except UnknownContent:  # `begin` leaves it padded
            return None

    @contextmanager
    def _trial(self, *, gradients: bool = True) -> Iterator[Trial]:
        self.busy = True
        try:
            yield Trial(
                self._model, self._layout, self._place, sharded=self.sharded, gradients=gradients
            )
        finally:
            self.busy = False

    def _nothing_shown(self, reason: str) -> Outcome:
        return Outcome(reasons={s.path: reason for s in self._layout.stacks}, decided=False)

    def _trial_calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call] | str:
        """Calls for a trial, or why there are none."""
        try:
            call = Call(self._names, args, kwargs)
            if (reason := self._reason(call)) is not None:
                return reason
            return [*trial_calls(call, self._model)] if masks_of(call) else _NO_MASK
        except UnknownContent as error:
            return str(error)
        except Exception as error:  # of arguments in a form unknown here: training goes on
            return f"no trial can be made of its arguments: {type(error).__name__}: {error}"

    def remove(self) -> None:
        """Take everything out of the model; the next training forward tries again."""
        if self._installed is not None:
            self._installed.remove()
            self._installed = None
        self._outcome = Outcome(decided=False)
        self._trials = 0

    def close(self) -> None:
        """Take everything out of the model for good; the report says what had been found."""
        self._closed = {s.path: self._verdict(s.path) for s in self._layout.stacks}
        self.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards in this context run padded."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def begin(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        host: HostCopies,
        *,
        aside: bool = False,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pack the forward that begins, if it can be; its arguments.

        Args:
            host: what the host knows of them already.
            aside: a forward beside those of the loop, which the report does not count, and of whose
                output nothing is used.
        """
        calls: dict[int, PackedCall] = {}
        self._packed, self.watches = {}, False
        read: dict[str, np.ndarray] = {}
        if self._mode != "off" and not self._paused and not inside_padded():
            try:
                call = Call(self._names, args, kwargs, host)
                reason = self._reason(call, aside=aside)
                reason = reason or self._pack(call, calls, read, aside=aside)
            except UnknownContent as error:
                reason = str(error)
            if reason is not None and not aside:
                self._padded[reason] += 1
        begin_forward(self, calls)
        if read:
            args, kwargs = self._with_known(read, args, kwargs)
        if calls and self._outcome.makes_cache:
            kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    def run_inside(self, call: Call) -> Any:
        """What the model's own forward returns, beside one of the loop that has begun already: the
        hooks of a sharded model expect no other call in it.
        """
        args, kwargs = self.begin(call.args, dict(call.kwargs), call.host, aside=True)
        try:
            return self._model.forward(*args, **kwargs)
        finally:
            self.end()

    @property
    def packs(self) -> bool:
        """Whether the forward that was begun runs packed."""
        return bool(self._packed)

    def fed(self) -> list[FedTokens]:
        """The tokens of the forward that was begun; nothing where it runs padded."""
        if not self._packed:
            return []
        key, tensors = [], []
        for path, (tokens, above) in self._packed.items():
            key.append((path, above, tokens.padded_shape, tokens.count))
            tensors += [tokens.index, tokens.slot]
        return [FedTokens(tuple(key), tuple(tensors), partial(self._using, dict(self._packed)))]

    @contextmanager
    def _using(
        self, packed: Mapping[str, tuple[PackedTokens, bool]], tensors: Sequence[Tensor]
    ) -> Iterator[None]:
        """Have the forward inside run on tokens that stand where `tensors` say."""
        calls: dict[int, PackedCall] = {}
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        made = [PackedTokens(index, slot) for index, slot in pairs]
        for (path, (_, above)), tokens in zip(packed.items(), made, strict=True):
            calls.update(self._installed.calls(path, tokens, above=above))
        begin_forward(made, calls)
        try:
            yield
        finally:
            end_forward(made)
            for tokens in made:
                tokens.forget()

    def end(self) -> None:
        """End the forward that `begin` began."""
        end_forward(self)
        for named, name, mask in self._replaced:
            named[name] = mask
        self._replaced.clear()

    def _with_known(
        self, read: Mapping[str, np.ndarray], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments, with masks that answer from what the host has read of them."""

        def change(name: str, value: Any) -> Any:
            if name in read:
                return known_mask(value, torch.from_numpy(read[name]).view(value.shape))
            if isinstance(value, MutableMapping):  # the caller's, who finds results in it
                for inner in read.keys() & value.keys():
                    self._replaced.append((value, inner, value[inner]))
                    value[inner] = change(inner, value[inner])
            return value

        names = (*self._names, *("" for _ in args[len(self._names) :]))
        return (
            tuple(change(name, value) for name, value in zip(names, args, strict=False)),
            {name: change(name, value) for name, value in kwargs.items()},
        )

    def _reason(self, call: Call, *, aside: bool = False) -> str | None:
        """Why a forward with these arguments runs padded, as far as its mask does not matter."""
        named = call.named
        if (reason := wanted_of_all_blocks(self._model, named)) is not None:
            return reason
        for name in ("past_key_values", "encoder_outputs"):
            if name in named:
                return f"{name} was given"
        wants_cache = named.get("use_cache") is not False and self._outcome.makes_cache
        returned = not aside and not (torch.is_grad_enabled() and self._model.training)
        if named.get("use_cache") is True or (wants_cache and returned):
            return "the output holds keys and values of all blocks: pass use_cache=False"
        for path in self._layout.containers:
            holder = self._model.get_submodule(path)
            if holder.training and getattr(holder, "layerdrop", 0):
                return f"layerdrop of {path or 'the model'}: a block that packs may be left out"
        for path, block in self._blocks():
            if block._compiled_call_impl is not None and (why := self._uncompilable(block)):
                return f"{path} is compiled, and {why}"
            if own_forward(block) is not None:
                return f"{path} has a forward of its own, {_ACCELERATES}"
            if (hooked := foreign_hook(block)) is not None:
                return f"a hook of {hooked} on {path} would see packed tokens"
        return None

    def _uncompilable(self, block: nn.Module) -> str | None:
        """Why a block that is compiled alone cannot run packed."""
        if getattr(block, "gradient_checkpointing", False) and block.training:
            return "checkpointed: its recomputation would not know which tokens it has"
        if _in_one_graph(block._compiled_call_impl):
            return "with fullgraph=True: attention of packed tokens runs between graphs"
        recipes = () if self._installed is None else self._installed.recipes.values()
        if any(recipe.padded for recipe in recipes):
            return "modules inside would run padded"
        return None

    @property
    def _asks_masks(self) -> bool:
        """Whether no compiler stands between a mask and the code that asks it."""
        config = getattr(self._model, "config", None)
        names = {getattr(c, "_attn_implementation", None) for c in text_configs(config)}
        inside = (self._model.get_submodule(path) for path in self._layout.containers)
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in inside):
            return False
        if any(block._compiled_call_impl is not None for _, block in self._blocks()):
            return names <= {"sdpa", "eager"}  # others hand the mask itself to blocks
        return "flex_attention" not in names

    def _blocks(self) -> Iterator[tuple[str, nn.Module]]:
        for path in self._layout.block_paths:
            yield path, self._model.get_submodule(path)

    def _pack(
        self,
        call: Call,
        calls: dict[int, PackedCall],
        read: dict[str, np.ndarray],
        *,
        aside: bool,
    ) -> str | None:
        """Fill `calls`; why none of them, if none. `read` gets the masks that a device gave."""
        masks = masks_of(call)
        if not masks:
            return _NO_MASK
        if self._installed is None:
            return self._outcome_reason()
        if reason := self._kinds.reason(call):
            return reason
        wanted = {
            r.mask: masks[r.mask] for r in self._installed.recipes.values() if r.mask in masks
        }
        on, counts = _read(wanted, call)
        far = {  # a tensor of inference mode has no version, and so none that is known
            name: on[name]
            for name, mask in wanted.items()
            if waits_for(mask.device) and not mask.is_inference()
        }
        if far and self._asks_masks:
            read |= far
        problem = "no mask of these blocks was passed"
        for path, recipe in self._installed.recipes.items():
            mask = masks.get(recipe.mask)
            if mask is None:
                continue
            if path in self._refused:
                problem = self._refused[path]
                continue
            kept = kept_of(on[recipe.mask], counts.get(recipe.mask), columns=recipe.columns)
            real, size = int(kept.sum()), kept.size
            if real == size:
                problem = "the batch has no padding"
                if not on[recipe.mask].all():
                    problem = "labels count at all padding: set them to -100 there"
            elif self._mode == "auto" and real > MOST_REAL * size:
                problem = f"more than {MOST_REAL:.0%} of its places are real tokens"
            elif self._outcome.right_only and not padding_follows(kept):
                problem = "padding stands before the tokens"
            else:
                grouped = recipe.grouped and self.groups > 1 and self.sizes is None
                groups = self.groups if grouped else 1
                if self.sizes is not None:
                    kept = rounded_up(kept, self.sizes)
                    real = int(kept.sum())
                cost = cost_of_group(mask.device, recipe.heads)
                tokens = pack_places(kept, mask.device, groups=groups, cost=cost)
                if self._watched < looks(mask.device):
                    tokens.watch = partial(self._look_at_gradient, path)
                    self.watches = True
                above = real <= heads.MOST_REAL * size
                calls.update(self._installed.calls(path, tokens, above=above))
                self._packed[path] = tokens, above
                if not aside:
                    self._places += size
                    self._tokens += real
        self._batches += bool(calls) and not aside
        return None if calls else problem

    def _look_at_gradient(self, path: str, reads_padding: bool | None) -> None:
        """Leave a stack padded from the next forward on where the loop reads padding: the trial
        sees what the model itself reads alone, so the step under way is wrong.
        """
        self._watched += reads_padding is not None
        if not reads_padding or path in self._refused:
            return
        self._refused[path] = f"{PADDING_READ}, which packing leaves out"
        self.on_padding_read()
        warnings.warn(
            f"{self._refused[path]}: this step's gradient is not that of the padded model, all "
            f'later steps run {path} padded. Leave padding out of the loss, or pass packing="off"',
            stacklevel=2,
        )

    def _outcome_reason(self) -> str:
        if not self._outcome.decided:
            return "packing was not tried yet"
        return "packing does not fit the model, see above"

    def report(self) -> PackingReport:
        if self._mode == "off":
            stacks = {s.path: 'padded: packing="off"' for s in self._layout.stacks}
        else:
            stacks = self._closed or {s.path: self._verdict(s.path) for s in self._layout.stacks}
        recipes = {} if self._installed is None else self._installed.recipes
        return PackingReport(
            stacks,
            bool(recipes.keys() - self._refused.keys()),
            self._batches,
            self._places,
            self._tokens,
            dict(self._padded),
        )

    def _verdict(self, path: str) -> str:
        installed = {} if self._installed is None else self._installed.recipes
        if path in installed and path not in self._refused:
            recipe = installed[path]
            text = "packed"
            if recipe.padded:
                text += f", {len(recipe.padded)} of its modules on padded tokens"
            if recipe.attention:
                text += "; rows of like length attend together" * (
                    recipe.grouped and self.groups > 1
                )
            for above, against in recipe.above.items():
                against = against or heads.reason_for_padding(self._model.get_submodule(above))
                text += f", not {above}: {against}" if against else f", {above} too"
            return text
        reason = self._refused.get(path) or self._outcome.reasons.get(path)
        return f"padded: {reason}" if reason else f"not tried yet: {_NOTHING_YET}"

    def state_dict(self) -> dict[str, str]:
        """Stacks that stay padded, with the reason."""
        return {**self._refused, **(self._outcome.reasons if self._outcome.decided else {})}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Leave padded what the run that this one continues has left padded."""
        self._refused = dict(state)
        self.remove()


def _shown(outcome: Outcome) -> str | None:
    """Why nothing packs, "" if something does, None if that is not known."""
    if outcome.recipes or not outcome.decided:
        return "" if outcome.recipes else None
    return f"packing does not fit these arguments: {next(iter(outcome.reasons.values()))}"


def _read(
    masks: Mapping[str, Tensor], call: Call
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Where each mask is set, and where labels of its shape count.

    The host waits once for all that it does not know yet.
    """
    labels = {name: labels_like(mask, call) for name, mask in masks.items()}
    labels = {name: found for name, found in labels.items() if found is not None}

    def nearest(tensor: Tensor) -> Tensor:
        known = call.host.known(tensor)
        return tensor if known is None else known

    wanted = [nearest(mask) != 0 for mask in masks.values()]
    found = on_host([*wanted, *(nearest(x) != -100 for x in labels.values())])
    return dict(zip(masks, found, strict=False)), dict(
        zip(labels, found[len(masks) :], strict=True)
    )


def _in_one_graph(compiled: Callable[..., Any]) -> bool:
    """Whether `torch.compile` made it to raise where it would need a second graph."""
    held = [cell.cell_contents for cell in compiled.__closure__ or ()]
    names = ("fullgraph", "_one_graph")  # torch has no question for it
    return any(getattr(value, name, False) is True for value in held for name in names)
