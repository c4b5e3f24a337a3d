"""Shows, on a few short rows, whether the blocks of a stack can run packed, and how.

The rows run both ways from the same random numbers, without dropout; what the model returns and the
gradients are compared. README.md lists what is found out so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.call import Call
from ..model.forward_hooks import state_kept, with_own_containers
from ..model.layout import Layout
from ..model.outputs import TOLERANCE, compared, difference, has_keys_and_values
from ..model.stacks import Stack
from ..random_state import (
    gpus_of,
    random_state_kept,
    same_torch_state,
    set_torch_state,
    torch_state,
)
from .attention import (
    UnpackableError,
    calls_noted,
    redirect,
    restore,
)
from .blocks import (
    begin_forward,
    end_forward,
    padded,
)
from .heads import HeadsSeen, reason_for_padding
from .recipes import Installed, StackRecipe
from .recording import Recording
from .tokens import GROUPS, kept_places, pack_places, padding_follows
from .trial_batch import masks_of

_GRADIENTS = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_GRADIENT_BYTES = 2**28  # that one side of the comparison may hold
_SHOWS_NOTHING = "all places of its rows are read"
_COLUMNS = ((), (0,), (-1,), (0, -1))  # that a head may read in rows where they are padding


@dataclass(frozen=True)
class Outcome:
    """What a trial has shown."""

    recipes: Mapping[str, StackRecipe] = field(default_factory=dict)  # by path of the stack
    reasons: Mapping[str, str] = field(default_factory=dict)  # of stacks that stay padded
    makes_cache: bool = False  # the model returns keys and values unless told not to
    right_only: bool = False  # holds for batches whose padding follows their tokens
    decided: bool = True  # False where the batch at hand shows nothing


@dataclass
class _Run:
    """What one forward gave."""

    outputs: list[Tensor]
    gradients: list[list[Tensor]]  # of the loss, of all other outputs
    state: list[Tensor]


class Trial:
    """Trials of one model.

    Args:
        place: puts these blocks into the class that runs packed, and all others out.
        sharded: parameters are shards, whose gradients are not looked at.
        gradients: of the forward that is tried for; they are compared then.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        place: Callable[[Collection[nn.Module]], None],
        *,
        sharded: bool = False,
        gradients: bool = True,
    ) -> None:
        self._model = model
        self._layout = layout
        self._place = place
        self._gradients_too = gradients and not sharded
        # a trial runs inside the forward of a sharded model, whose hooks expect no other one in it
        self._call = model.forward if sharded else model
        self._gpus = gpus_of(model)

    def learn(self, calls: Sequence[Call]) -> Outcome:
        """Try every stack on those of `trial_calls`; leaves nothing installed."""
        return self._learn(calls, self._try_all)

    def confirm(self, calls: Sequence[Call], installed: Installed) -> Outcome:
        """Try what is installed on other calls; its recipes, if they fit these, too."""
        return self._learn(calls, partial(self._try_installed, installed))

    def _learn(self, calls: Sequence[Call], tried: Callable[[Call], Outcome]) -> Outcome:
        outcome = Outcome(decided=False)
        with self._without_trace():
            for made in calls:
                parts = _parts_of(self._model)
                try:
                    found = tried(made)
                except UnpackableError as error:
                    found = self._refused(str(error))
                except Exception as error:  # the model's own code, on a batch that we made
                    reason = f"a trial raises {_line(error)}"
                    found = replace(self._refused(reason), decided=False)
                finally:
                    exchanged = _restore_parts(parts)
                if exchanged:
                    return self._refused("it changes its modules with the length of the rows")
                shown = {p: w for p, w in outcome.reasons.items() if _is_silent(found, p)}
                found = replace(found, reasons={**found.reasons, **shown})
                if found.recipes:
                    masks = masks_of(made).values()
                    right = all(padding_follows(mask.ne(0).cpu().numpy()) for mask in masks)
                    return replace(found, right_only=right)
                if found.decided or not outcome.reasons:
                    outcome = found
        return outcome

    def _refused(self, reason: str) -> Outcome:
        return Outcome(reasons={stack.path: reason for stack in self._layout.stacks})

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        with (
            random_state_kept(self._model),
            torch.compiler.set_stance("force_eager"),
            state_kept(self._model),
            _without_dropout_and_recomputation(self._model),
            torch.set_grad_enabled(self._gradients_too),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # the forward itself will give them
            yield
        torch.clear_autocast_cache()

    def _try_all(self, call: Call) -> Outcome:
        if all(_kept(call, name).all() for name in masks_of(call)):
            return Outcome(decided=False)
        call, makes_cache = self._without_cache(call)
        recordings, heads, expected = self._record(call)
        recipes: dict[str, StackRecipe] = {}
        reasons: dict[str, str] = {}
        raised: dict[str, str] = {}  # says less than what a way that runs has shown
        for stack in self._layout.stacks:
            ways = recordings[stack.path].recipes()
            while stack.path not in recipes:
                try:
                    if (recipe := next(ways, None)) is None:
                        break
                    recipes[stack.path] = self._fit(call, recipes, stack, recipe, expected)
                except UnpackableError as error:
                    reasons.setdefault(stack.path, str(error))
                except Exception as error:  # the model's own code
                    raised.setdefault(stack.path, f"packed, its forward raises {_line(error)}")
        reasons = {p: why for p, why in (raised | reasons).items() if p not in recipes}
        return Outcome(self._with_heads(call, recipes, heads, expected), reasons, makes_cache)

    def _try_installed(self, installed: Installed, call: Call) -> Outcome:
        call, makes_cache = self._without_cache(call)
        masks = masks_of(call)
        recipes = [recipe for recipe in installed.recipes.values() if recipe.mask in masks]
        if any(_kept(call, recipe.mask, recipe.columns).all() for recipe in recipes):
            return replace(self._refused(_SHOWS_NOTHING), decided=False)
        with padded():
            expected = self._run(call)
        if problem := self._difference(call, installed, expected):
            return self._refused(problem)
        return Outcome(installed.recipes, makes_cache=makes_cache)

    def _with_heads(
        self, call: Call, recipes: dict[str, StackRecipe], heads: HeadsSeen, expected: _Run
    ) -> dict[str, StackRecipe]:
        """The recipes, with the modules above the blocks that can run packed too."""
        # of two stacks with one mask, the later one
        for mask, path in {recipe.mask: path for path, recipe in recipes.items()}.items():
            for above in heads.of_mask(mask):
                reason = reason_for_padding(self._model.get_submodule(above))
                recipe = recipes[path]
                longer = {
                    **recipes,
                    path: replace(recipe, above={**recipe.above, above: reason or ""}),
                }
                try:
                    problem = "" if reason else self._problem(call, longer, expected)
                except Exception:  # of a head that wants the whole batch
                    continue
                if not problem:
                    recipes = longer
        return recipes

    def _without_cache(self, call: Call) -> tuple[Call, bool]:
        asked = {name: value for name, value in call.kwargs.items() if name != "use_cache"}
        with torch.no_grad(), padded():
            output = self._call_model(replace(call, kwargs=asked))
        if not has_keys_and_values(output):
            return call, False
        return replace(call, kwargs={**call.kwargs, "use_cache": False}), True

    def _record(self, call: Call) -> tuple[dict[str, Recording], HeadsSeen, _Run]:
        """The padded forward, watched."""
        recordings = {
            stack.path: Recording(self._model, self._layout, stack, masks_of(call))
            for stack in self._layout.stacks
        }
        heads = HeadsSeen(self._model, self._layout, masks_of(call))
        attention = [m for r in recordings.values() for m in r.attention_modules]
        try:
            with calls_noted() as seen, heads.watching(), ExitStack() as hooks:
                for module in attention:
                    redirect(module)
                for recording in recordings.values():
                    recording.seen = seen
                    hooks.enter_context(recording.watching())
                begin_forward(self, {})
                try:
                    expected = self._run(call, hooks)
                finally:
                    end_forward(self)
        finally:
            for module in attention:
                restore(module)
        return recordings, heads, expected

    def _fit(
        self,
        call: Call,
        recipes: Mapping[str, StackRecipe],
        stack: Stack,
        recipe: StackRecipe,
        expected: _Run,
    ) -> StackRecipe:
        """The recipe that gives what the padded model gives; raises `UnpackableError`."""
        problem = ""
        for columns in _COLUMNS:
            fitting = replace(recipe, columns=columns)
            if _kept(call, recipe.mask, columns).all():
                problem = problem or _SHOWS_NOTHING
                continue
            problem = self._problem(call, {**recipes, stack.path: fitting}, expected)
            if not problem:
                break
        if problem:
            raise UnpackableError(problem)
        grouped = replace(fitting, grouped=True)
        try:
            worse = self._problem(call, {**recipes, stack.path: grouped}, expected)
        except Exception:  # of code that wants the whole batch
            return fitting
        return fitting if worse else grouped

    def _problem(self, call: Call, recipes: Mapping[str, StackRecipe], expected: _Run) -> str:
        """What differs in a packed forward, "" if nothing does."""
        installed = Installed(self._model, recipes, self._place)
        try:
            return self._difference(call, installed, expected)
        finally:
            installed.remove()

    def _difference(self, call: Call, installed: Installed, expected: _Run) -> str:
        # noise at padding where tokens are unpacked, then zeros, as there will be
        found = self._run_packed(call, installed, noise=1)
        if problem := self._differs(call, expected, found):
            other = self._run_packed(call, installed, noise=2)
            if self._differs(call, found, other):
                problem = "something above the blocks reads hidden states at padding"
            return problem
        with torch.no_grad():
            zeros = self._run_packed(call, installed, noise=None)
        return self._differs(call, replace(expected, gradients=[]), zeros)

    def _run_packed(self, call: Call, installed: Installed, *, noise: int | None) -> _Run:
        calls = {}
        for path, recipe in installed.recipes.items():
            if recipe.mask not in masks_of(call):
                continue
            kept = _kept(call, recipe.mask, recipe.columns)
            device = masks_of(call)[recipe.mask].device
            tokens = pack_places(kept, device, groups=GROUPS if recipe.grouped else 1)
            if noise is not None:
                tokens.noise = torch.Generator("cpu").manual_seed(noise)
            calls.update(installed.calls(path, tokens))
        begin_forward(self, calls)
        try:
            return self._run(call)
        finally:
            end_forward(self)

    def _call_model(self, call: Call) -> Any:
        # some models write into what they are called with
        args, kwargs = with_own_containers((call.args, dict(call.kwargs)), clone=True)
        return self._call(*args, **kwargs)

    def _run(self, call: Call, watched: ExitStack | None = None) -> _Run:
        """Run forward, with which `watched` ends, and backward."""
        state = torch_state(self._gpus)
        output = self._call_model(call)
        if watched is not None:
            watched.close()  # a checkpoint in the model's own code runs blocks a second time
        after = torch_state(self._gpus)
        set_torch_state(state, self._gpus)
        outputs = compared(output)
        return _Run([t.detach() for t in outputs], self._gradients(call, outputs), after)

    def _gradients(self, call: Call, outputs: list[Tensor]) -> list[list[Tensor]]:
        if not torch.is_grad_enabled():
            return []
        generator = torch.Generator("cpu").manual_seed(3)
        masks = list(masks_of(call).values())
        # the loss by itself: beside sums of all logits, what it alone reads would be lost
        totals: dict[bool, Tensor] = {}
        for output in outputs:
            weights = torch.rand(
                output.shape, generator=generator, dtype=torch.float32, device="cpu"
            ).to(output.device)
            if not output.requires_grad:
                continue
            for mask in masks:
                if output.shape[:2] == mask.shape:
                    real = (mask != 0).view(*mask.shape, *(1 for _ in output.shape[2:]))
                    weights = weights * real
                    output = torch.where(real, output, output.detach() * 0)
            part, alone = (output.float() * weights).sum(), output.ndim == 0
            totals[alone] = totals[alone] + part if alone in totals else part
        wanted, size = [], 0
        for path in self._layout.block_paths:  # the lowest first: all others are above it
            for parameter in self._model.get_submodule(path).parameters():
                size += 4 * parameter.numel() * len(totals)
                if parameter.requires_grad and (not wanted or size <= _GRADIENT_BYTES):
                    wanted.append(parameter)
        if not (totals and wanted):
            return []
        found = [
            torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
            for total in totals.values()
        ]
        if all(g is None for part in found for g in part):
            raise UnpackableError(
                "the gradients of its blocks are out of sight: where its code calls "
                "torch.utils.checkpoint, let that be with use_reentrant=False"
            )
        return [
            [
                torch.zeros((), dtype=torch.float32, device=call.device) if g is None else g
                for g in part
            ]
            for part in found
        ]

    def _differs(self, call: Call, expected: _Run, found: _Run) -> str:
        if not same_torch_state(expected.state, found.state):
            return "its blocks draw random numbers for every row or place: packed, they draw others"
        if [t.shape for t in expected.outputs] != [t.shape for t in found.outputs]:
            return "packed, its outputs have other shapes"
        if not expected.outputs:
            return "its output shows no tensor that could be compared"
        low = self._lowest_precision()
        for one, other in zip(expected.outputs, found.outputs, strict=True):
            for mask in masks_of(call).values():
                if one.shape[:2] == mask.shape:
                    one, other = one[mask != 0], other[mask != 0]
            error = difference(one, other)
            if error > max(TOLERANCE.get(one.dtype, 0.0), TOLERANCE.get(low, 0.0)):
                return f"packed, an output differs by {error:.1e}"
        if len(expected.gradients) != len(found.gradients):
            return "packed, gradients are missing"
        for ones, others in zip(expected.gradients, found.gradients, strict=True):
            scales = [g.abs().max().item() for g in ones if g.numel()]
            least = max(1e-2 * max(scales, default=0.0), 1e-30)
            for one, other in zip(ones, others, strict=True):
                if one.shape != other.shape:
                    return "packed, a gradient is missing"
                if not one.numel():
                    continue
                error = (one - other).abs().max().item() / max(one.abs().max().item(), least)
                if not error <= max(_GRADIENTS.get(one.dtype, 0.0), _GRADIENTS.get(low, 0.0)):
                    return f"packed, a gradient differs by {error:.1e}"
        return ""

    def _lowest_precision(self) -> torch.dtype:
        kind = next(self._model.parameters()).device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        dtypes = [p.dtype for p in self._model.parameters() if p.is_floating_point()]
        return max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, 0.0), default=torch.float32)


def _kept(call: Call, name: str, columns: Sequence[int] = ()) -> np.ndarray:
    mask = masks_of(call)[name]
    return kept_places(mask, labels_like(mask, call), columns)


def _is_silent(outcome: Outcome, path: str) -> bool:
    return outcome.reasons.get(path) == _SHOWS_NOTHING


def labels_like(mask: Tensor, call: Call) -> Tensor | None:
    labels = call.tensors.get("labels")
    if labels is None or labels.shape != mask.shape or labels.is_floating_point():
        return None
    return labels


def _parts_of(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """Every module with the modules in it and its plain attributes."""
    plain = int, float, str, type(None)
    return [
        (m, dict(m._modules), {k: v for k, v in vars(m).items() if isinstance(v, plain)})
        for m in model.modules()
    ]


def _restore_parts(parts: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]) -> bool:
    """Put back what a forward has changed; whether it has exchanged modules.

    BigBird goes over to full attention for good when it meets short rows.
    """
    exchanged = any(module._modules != inner for module, inner, _ in parts)
    for module, inner, plain in parts:
        module._modules.clear()
        module._modules.update(inner)
        vars(module).update(plain)
    return exchanged


@contextmanager
def _without_dropout_and_recomputation(model: nn.Module) -> Iterator[None]:
    """No module drops anything, whatever its mode, or is checkpointed, which may hide gradients."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        own = module.__dict__
        for name, value in own.items():
            drops = name == "p" and "dropout" in type(module).__name__.lower()
            if isinstance(value, float) and (drops or "drop" in name):
                before.append((own, name, value))
            elif name == "gradient_checkpointing" and value is True:
                before.append((own, name, value))
    try:
        for own, name, value in before:
            own[name] = type(value)(0)
        yield
    finally:
        for own, name, value in before:
            own[name] = value


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
