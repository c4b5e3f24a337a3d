"""One training step on the meta device: operations and bytes are counted, nothing is computed.

The model's own forward and its autograd graph run, so that no formula of an architecture is needed.
Attention goes to the kernel that would run on the device, and dropout keeps what it keeps there.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..freezing.decay_groups import decay_groups
from ..model.layout import Layout
from ..optim.active_buckets import Member
from ..optim.in_backward import block_of
from .autocast import Autocast

aten = torch.ops.aten

# What attention over groups of rows of like length leaves of its operations, as a power of the
# share of real tokens: README.md, "Real tokens".
_ATTENTION_POWER = 1.5


def _attention_flops(of_d: int, of_d_v: int, *, first: int = 0) -> Callable[..., int]:
    """A counter of attention's operations: (n m) (of_d d + of_d_v d_v) for each batch and head.

    A query is d and a value d_v wide, and the query is argument `first`. All scores of n queries
    and m keys count, causal or not, as torch counts them.
    """

    def count(*shapes: Any, **_: Any) -> int:
        query, key, value = shapes[first : first + 3]
        batch, heads, rows, d = query
        return batch * heads * rows * key[-2] * (of_d * d + of_d_v * value[-1])

    return count


# torch 2.13 leaves the CPU's fused attention out of its count: here it counts as the unfused one,
# whose backward has dQ and dK over d, dP and dV over d_v. The GPU's it counts as here, with the
# scores computed again in backward, but stops at grouped queries.
_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops(2, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flops(4, 4, first=1),
}
for _kind in ("flash", "efficient", "cudnn"):
    _name = f"_scaled_dot_product_{_kind}_attention"
    _FLOPS[getattr(aten, _name)] = _attention_flops(2, 2)
    _FLOPS[getattr(aten, f"{_name}_backward")] = _attention_flops(6, 4, first=1)
_ATTENTION = {*_FLOPS, aten.bmm, aten.baddbmm}  # the latter where a model attends by itself


class TargetKernels(TorchFunctionMode):
    """Lets meta tensors take the paths that real ones would take on `device`, with `autocast`.

    A question about values is answered with no: "is nothing masked?", which transformers asks to
    leave a mask out, is the usual one, and rows have padding.
    """

    def __init__(self, device: torch.device, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._device = device
        self._casts = None if autocast is None else Autocast(autocast, device)
        self.attention: set[str] = set()  # names of the kernels that were taken

    def forward(self) -> AbstractContextManager[None]:
        """What surrounds the forward of a step."""
        return nullcontext() if self._casts is None else self._casts.forward()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._casts is not None:
            args, kwargs = self._casts.arguments(func, args, kwargs)
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.dropout:
            return self._drop(*args, **kwargs)
        return func(*args, **kwargs)

    def _drop(
        self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        """A GPU keeps a byte an element, a CPU the scaled noise in the input's dtype."""
        if training and 0 < p < 1 and self._device.type == "cuda":
            return torch.native_dropout(x, p, True)[0]
        return F.dropout(x, p, training, inplace)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        options: dict[str, Any] = dict(scale=scale, enable_gqa=enable_gqa)
        backend = self._choose((query, key, value, attn_mask), dropout_p, is_causal, options)
        self.attention.add(backend.name.removesuffix("_ATTENTION").lower())
        if backend not in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        ):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, **options
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # as torch does: every fused kernel adds its mask, and keeps it for backward
            added = torch.zeros_like(attn_mask, dtype=query.dtype)
            attn_mask = added.masked_fill_(attn_mask.logical_not(), float("-inf"))
        if self._device.type == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if backend is SDPBackend.FLASH_ATTENTION:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        kernel = (
            aten._scaled_dot_product_efficient_attention
            if backend is SDPBackend.EFFICIENT_ATTENTION
            else aten._scaled_dot_product_cudnn_attention
        )
        return kernel(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]

    def _choose(
        self, inputs: tuple[Any, ...], dropout_p: float, is_causal: bool, options: dict[str, Any]
    ) -> SDPBackend:
        query, _, _, mask = inputs
        if query.ndim != 4:
            return SDPBackend.MATH
        # a GPU that is not there cannot be asked which kernel it takes
        if self._device.type == "cpu" or torch.cuda.is_available():

            def row_of(t: torch.Tensor | None) -> torch.Tensor | None:
                # its memory is never touched: the choice does not depend on the size of the batch
                if t is None:
                    return None
                one, where = (1, *t.shape[1:]), self._device
                row = torch.empty_strided(one, t.stride(), dtype=t.dtype, device=where)
                return row.requires_grad_(t.requires_grad)

            choose: Any = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]
            rows = map(row_of, inputs)
            return SDPBackend(choose(*rows, dropout_p, is_causal, **options))
        half = query.dtype in (torch.bfloat16, torch.float16)
        if half and mask is None and query.shape[-1] <= 256:
            return SDPBackend.FLASH_ATTENTION
        return SDPBackend.MATH if options["enable_gqa"] else SDPBackend.EFFICIENT_ATTENTION


class _SaysCpu(TorchFunctionMode):
    """Meta tensors say that they are on the CPU, and go back to the meta device if sent there.

    Up to transformers 5.0 rotary embeddings ask whether autocast is on for the device of their
    input, which torch refuses to answer for "meta".
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if func == torch.Tensor.device.__get__:
                return torch.device("cpu")
            args, kwargs = pytree.tree_map_only(
                torch.device, lambda _: torch.device("meta"), (args, kwargs)
            )
        return func(*args, **(kwargs or {}))

    def surround(self, module: nn.Module) -> None:
        """Be in force while `module` runs."""
        module.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        module.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)


Kind = tuple[str, int]  # dtype and shape of a tensor in words, and the bytes of its storage


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that are alive and were not there before."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.live = self.peak = 0  # now, and the most so far
        before = (*model.parameters(), *model.buffers(), *pytree.tree_leaves(inputs))
        tensors = [t for t in before if isinstance(t, torch.Tensor)]
        self._before = [t.untyped_storage() for t in tensors]  # held: addresses are used again
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._before}
        self._kinds: dict[int, Kind] = {}  # of what is alive
        self._at_peak: Counter[Kind] | None = None  # None: what is alive is the most so far

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(output):
            if isinstance(t, torch.Tensor):
                self._note(t)
        return output

    def _note(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            if self._at_peak is None:
                self._at_peak = self.at_peak()
            del self._known[key], self._kinds[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self._kinds[key] = f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}", size
        self.live += size
        if self.live > self.peak:
            self.peak, self._at_peak = self.live, None

    def at_peak(self) -> Counter[Kind]:
        """What was alive when it was most."""
        return Counter(self._kinds.values()) if self._at_peak is None else self._at_peak


@dataclass(frozen=True)
class StepFlops:
    """Operations of one micro-batch: matmuls, convolutions and attention, of real tokens."""

    forward: int
    prefix: int  # the part of `forward` below the boundary
    prefix_output: torch.Tensor | None  # hidden states at the boundary; None without a prefix
    backward: int  # with what checkpointing computes again
    attention: frozenset[str]  # names of the kernels


def meta_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the meta device, in train mode, with floating-point parameters of `dtype`."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        for t in own:
            if not isinstance(t, torch.Tensor) or id(t) in memo:
                continue
            if isinstance(t, nn.Parameter):
                wanted = dtype if t.is_floating_point() else t.dtype
                empty = torch.empty_like(t, device="meta", dtype=wanted)
                memo[id(t)] = nn.Parameter(empty, requires_grad=t.requires_grad)
            else:
                memo[id(t)] = torch.empty_like(t, device="meta")
    copied: Any = copy.deepcopy(model, memo).train()
    if hasattr(copied, "tie_weights") and all(p.is_meta for p in model.parameters()):
        copied.tie_weights()  # transformers 5.0 leaves that out of a model built on the meta device
    for module in copied.modules():
        if module._buffers and next(module.parameters(), None) is None:  # as rotary embeddings are
            _SaysCpu().surround(module)
    return copied


def loss_of(output: Any) -> torch.Tensor:
    """What backward starts from: the loss, or the sum of what a model without a loss returns."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    for t in pytree.tree_leaves(output):
        if isinstance(t, torch.Tensor) and t.requires_grad:
            return t.sum()
    raise ValueError("nothing in the model's output requires grad")


def _backward(loss: torch.Tensor) -> None:
    # `loss.backward()` leaves every torch function mode for as long as it runs, and what a
    # checkpoint computes again would then take other kernels than before
    run, start = torch.autograd.graph._engine_run_backward, torch.ones_like(loss)
    run((loss,), (start,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def update_blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    """Trained parameters, in the parts that an update inside backward takes at a time, in the order
    of `handle.param_groups()`.
    """
    blocks: dict[str, list[nn.Parameter]] = defaultdict(list)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    for group in decay_groups([*names], None):
        for p in group["params"]:
            blocks[block_of(Member(p, 0, 0, names[p]))].append(p)
    return [*blocks.values()]


@contextmanager
def _gradients_dropped(model: nn.Module, blocks_alive: int) -> Iterator[None]:
    """Drop a block's gradients when so many blocks, itself included, have all of theirs."""
    complete: deque[list[nn.Parameter]] = deque()

    def awaiting(members: list[nn.Parameter]) -> Callable[[nn.Parameter], None]:
        waiting = set(members)

        def note(arrived: nn.Parameter) -> None:
            waiting.discard(arrived)
            if not waiting:
                complete.append(members)
            if len(complete) == blocks_alive:
                for member in complete.popleft():
                    member.grad = None

        return note

    with ExitStack() as stack:
        for members in update_blocks(model):
            note = awaiting(members)
            for parameter in members:
                stack.callback(parameter.register_post_accumulate_grad_hook(note).remove)
        yield


def count_flops(
    model: nn.Module,
    layout: Layout,
    inputs: Mapping[str, Any],
    *,
    boundary: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    real_tokens: float = 1.0,
) -> StepFlops:
    """Count the operations of a forward and a backward that would run on `device`.

    Args:
        real_tokens: share of the batch's places that blocks compute on; the others are padding.
    """
    kernels = TargetKernels(device, autocast)
    counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
    prefix, hidden = 0, None

    def leave_prefix(_: nn.Module, args: Any, output: Any) -> None:
        nonlocal prefix, hidden
        prefix = counted()
        hidden = output if isinstance(output, torch.Tensor) else output[0]

    def counted(outside: int = 0) -> int:
        """So far, with `outside` the blocks on padding too."""
        ops = counter.get_flop_counts().get("Global", {})
        attention = sum(count for op, count in ops.items() if op in _ATTENTION)
        linear = sum(ops.values()) - attention - outside
        return round(real_tokens * linear + real_tokens**_ATTENTION_POWER * attention) + outside

    with ExitStack() as stack:
        if boundary:
            last = model.get_submodule(layout.block_paths[boundary - 1])
            stack.callback(last.register_forward_hook(leave_prefix).remove)
        stack.enter_context(kernels)
        stack.enter_context(counter)
        with kernels.forward():
            loss = loss_of(model(**inputs))
        modules = counter.get_flop_counts()
        blocks = (f"{type(model).__name__}.{path}" for path in layout.block_paths)
        inside = sum(sum(modules[name].values()) for name in blocks if name in modules)
        outside = counter.get_total_flops() - inside
        forward = counted(outside)
        _backward(loss)
    model.zero_grad(set_to_none=True)
    # a product has two in backward: torch's counter loses the modules of some of these
    backward = counted(min(3 * outside, counter.get_total_flops())) - forward
    return StepFlops(forward, prefix, hidden, backward, frozenset(kernels.attention))


def live_at_peak(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    gradient_blocks: int | None,
) -> Counter[Kind]:
    """Activations, temporaries and gradients that are alive in one step when they are most.

    Args:
        gradient_blocks: the blocks whose gradients are alive at a time; None: all.
    """
    # a step of its own: torch's counter of operations keeps what a checkpoint computes again alive
    memory = LiveBytes(model, inputs)
    with ExitStack() as stack:
        if gradient_blocks is not None:
            stack.enter_context(_gradients_dropped(model, gradient_blocks))
        kernels = stack.enter_context(TargetKernels(device, autocast))
        stack.enter_context(memory)
        with kernels.forward():
            loss = loss_of(model(**inputs))
        _backward(loss)
    found = memory.at_peak()
    model.zero_grad(set_to_none=True)
    return found
