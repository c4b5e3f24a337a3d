"""What a step keeps on the host and moves there and back: optim/host_state.py has the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

_GRADIENT_ALIGNMENT = 64  # bytes, of a gradient in its block's staging
_NORM_BYTES = 4


@dataclass(frozen=True)
class HostRates:
    """Bytes a second, as `plan_training` takes them in GB/s."""

    pcie: float
    memory: float


@dataclass(frozen=True)
class HostPlan:
    """What a stage keeps in host memory, and what a step moves, with `state_device="cpu"`.

    Attributes:
        state_bytes: of the optimizer's state, in host memory.
        weight_bytes: of the copies of active weights there, which the update works on.
        staging_bytes: of the buffers there that gradients arrive in.
        to_host_bytes: of gradients, and norms, that a step sends to the host.
        to_device_bytes: of new weights that it sends back.
        update_bytes: of host memory that the update reads and writes.
        to_host_s: seconds for `to_host_bytes`.
        to_device_s: seconds for `to_device_bytes`.
        update_s: seconds for `update_bytes`.
        beside_backward_s: seconds that backward must take at least, so that what runs beside it
            makes no step longer: with updates inside backward the slowest of both directions and
            the update, which run at once, or of gradients alone where exact clipping waits for all
            of them; 0 otherwise.
        after_backward_s: seconds of what comes after backward in any case. The update of the block
            that is complete last comes on top.
    """

    state_bytes: int
    weight_bytes: int
    staging_bytes: int
    to_host_bytes: int
    to_device_bytes: int
    update_bytes: int
    to_host_s: float
    to_device_s: float
    update_s: float
    beside_backward_s: float
    after_backward_s: float

    @property
    def host_bytes(self) -> int:
        """All that lies in host memory."""
        return self.state_bytes + self.weight_bytes + self.staging_bytes


def update_bytes_of(p: Tensor, state: Mapping[str, Tensor]) -> int:
    """What the update of one tensor reads and writes: gradient, weight, moments, master."""
    kept = sum(t.nbytes for key, t in state.items() if key != "step")
    # beside a master the weight is written only
    return p.nbytes + 2 * kept + (1 if "master" in state else 2) * p.nbytes


def plan_host(
    blocks: Sequence[Sequence[Tensor]],
    states: Mapping[Tensor, Mapping[str, Tensor]],
    rates: HostRates,
    *,
    in_backward: bool,
    exact: bool,
) -> HostPlan:
    """Of one stage.

    Args:
        blocks: active tensors as they are updated together, in the order of the groups.
        states: what the optimizer keeps for each.
        exact: gradients wait for the norm of all of them.
    """
    sizes = [
        sum(-(-p.nbytes // _GRADIENT_ALIGNMENT) * _GRADIENT_ALIGNMENT for p in block)
        for block in blocks
    ]
    staging = (
        sum(sizes) if in_backward and exact else sum(max(sizes[i::2], default=0) for i in (0, 1))
    )
    kinds = [{p.dtype for p in block} for block in blocks]
    # one a block and dtype; the norm of gradients that wait on the host is taken there
    norms = 0 if exact else sum(map(len, kinds))
    norms = norms if in_backward else len(set().union(*kinds))
    weights = sum(p.nbytes for p in states)
    down, update = (
        weights + _NORM_BYTES * norms,
        sum(update_bytes_of(*item) for item in states.items()),
    )
    down_s, up_s, update_s = down / rates.pcie, weights / rates.pcie, update / rates.memory
    beside, after = 0.0, max(down_s, up_s, update_s)
    if in_backward:
        beside, after = (down_s, max(up_s, update_s)) if exact else (after, 0.0)
    return HostPlan(
        state_bytes=sum(t.nbytes for state in states.values() for t in state.values()),
        weight_bytes=weights,
        staging_bytes=staging,
        to_host_bytes=down,
        to_device_bytes=weights,
        update_bytes=update,
        to_host_s=down_s,
        to_device_s=up_s,
        update_s=update_s,
        beside_backward_s=beside,
        after_backward_s=after,
    )
