"""`Freezer` puts a plan in force on one model, and keeps it so when the model changes.

PEFT switches flags when another adapter is chosen, and makes modules when one is added; heads and
embeddings are replaced; weights are pruned and renamed; the model moves to another device, or into
a wrapper.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice, zip_longest
from typing import Any

from torch import nn

from .. import freeze_events
from ..cache import PrefixServer
from ..distributed import (
    Wrapper,
    forms_of_shards,
    refuse_flat_parameters,
    shards_of,
    surrounding,
)
from ..graphs import Graph, StageGraphs
from ..model.adapters import adapter_configs, check_adapters, rank_allocation_end
from ..model.derived_classes import without_derived_ancestors
from ..model.families import UnsupportedModelError
from ..model.layout import EMBEDDINGS, Layout
from ..model.rows import TrainedRows
from ..model.structure import Structure
from ..packing import Packer, Packing
from ..schedules import (
    FreezePlan,
    Schedule,
    decides_by_gradients,
    decides_by_score,
    stage_starts,
    steps_to_check,
)
from ..swaps import Kernels, KernelSwaps
from .active_set import ActiveSet, TiedPolicy
from .boundary import Boundary, FrozenMode
from .checkpointing import Checkpointing
from .gradient_norms import GradientNorms

_MOST_STAGES = 256  # whose plans are looked at before training; 0.3 ms each with 400 tensors


@dataclass(frozen=True)
class StageState:
    """What trains under a plan."""

    boundary: int  # the effective one
    active: frozenset[int]  # units that hold an active tensor
    trainable_params: int  # elements that train


class Freezer:
    """Puts one plan after the other in force on one model.

    Args:
        schedule: where the plans come from, to look ahead in it; None to plan without training.
        frozen_mode, tied, only, kernels, packing, graph: as for `patch_model`.
        rows: rows of tensors that train, installed before.

    Attributes:
        norms: gradient norms, for a schedule that decides by them.
        packer: leaves padding out of forwards.
        graphs: captures training forwards, and replays them.
        cache: serves forwards without their prefix.
        plan: the plan in force; there is none before the first `freeze`.
        step: the optimizer step that it is in force for.
        proved: whether a forward has shown, since the flags were set, that nothing is cut off.
        trained: whether a training forward has run.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        schedule: Schedule | None = None,
        *,
        frozen_mode: FrozenMode,
        tied: TiedPolicy,
        only: str | None = None,
        kernels: Kernels = "off",
        packing: Packing = "off",
        graph: Graph = "off",
        rows: TrainedRows | None = None,
        step: int = 0,
    ) -> None:
        self.model = model
        self.layout = layout
        self.rows = TrainedRows(model) if rows is None else rows
        self._note_adapters()
        self.active = ActiveSet(model, layout, tied, only)
        self.swaps = KernelSwaps(model, layout, kernels)
        self.norms: GradientNorms | None = None
        if schedule is not None and decides_by_gradients(schedule):
            self.norms = GradientNorms(model, layout, schedule)
            self.norms.begin_step(step)
        self.cache: PrefixServer | None = None
        self.plan: FreezePlan
        self.step = step
        self.state = StageState(0, frozenset(layout.units), 0)
        self.proved = self.trained = False
        self._schedule = schedule
        self._packing = packing
        self._structure = Structure(model, layout)
        self._boundary = Boundary(model, layout, frozen_mode)
        self.graphs = StageGraphs(model, layout, graph, self._boundary.graph_blocks)
        self._checkpointing = Checkpointing(model, layout)
        self.packer = Packer(model, layout, packing, self._boundary.pack_blocks)
        self._wrapper: Wrapper | None = None
        self._device_type = ""  # that the swaps were chosen for
        self._costs_are_own = True  # until the first rank's are taken over
        self._given: list[weakref.ref[nn.Parameter]] = []  # to an optimizer

    @property
    def boundary(self) -> int:
        return self.state.boundary

    @property
    def frozen(self) -> set[int]:
        """Units that hold no active tensor."""
        return set(self.layout.units) - self.state.active

    @property
    def sharded(self) -> bool:
        return self._wrapper is not None and self._wrapper.sharded

    @property
    def follows_shards(self) -> bool:
        """False between `fully_shard` and the first training forward."""
        return self._wrapper is not None or not shards_of(self.model)

    @property
    def wrapped(self) -> bool:
        return self._wrapper is not None

    @property
    def share(self) -> Callable[[bytes], bytes] | None:
        """Gives every rank what the first one has; None where there is one process."""
        shares = self._wrapper is not None and self._wrapper.on_several_ranks
        return self._wrapper.share if shares else None

    def enter_step(self, step: int, plan: FreezePlan) -> bool:
        """Go to optimizer step `step`, under `plan`; whether flags were set anew."""
        self.rows.hold()
        self.rows.end_step()
        rebuilt = self._rebuilt()
        if rebuilt:
            self._note_modules()
        anew = rebuilt or plan != self.plan
        if anew:
            self.check_plan(step, plan)
        if self.norms is not None:
            self.norms.begin_step(step)
        if anew:
            self.freeze(plan, step)
        else:
            self.step = step
            self.freeze_again()
        return anew

    def end_step(self) -> None:
        """Count the gradient norms of the step just made, if the schedule decides by them."""
        if self.norms is not None:
            self.norms.end_step()

    def freeze(self, plan: FreezePlan, step: int = 0) -> StageState:
        self.plan, self.step = plan, step
        if not self._device_type:
            self._reinstall_swaps()
        if self._wrapper is not None:
            self._wrapper.reshard()
        self.graphs.drop()
        self.active.set_flags(plan)
        self._follow_flags()
        self.proved = False
        return self.state

    def freeze_moved(self) -> None:
        """Freeze by the units that a forward has just shown, before its backward."""
        if self.active.set_flags(self.plan):
            self._follow_flags()
        self.check_known_plans()

    def freeze_again(self) -> None:
        """Freeze what was switched on behind the plan; drop gradients of frozen parameters."""
        self.rows.hold()
        if not self._follow_switches():
            self.active.freeze_again()

    def follow_changes(self) -> None:
        """Before a training forward: follow switched flags and adapters, and before the first one
        under a plan also modules and parameters that came or went.
        """
        self._put_back_stand_ins()
        self._structure.check_blocks()
        self.rows.hold()
        if not self._follow_switches() and not self.proved and self._rebuilt():
            self._note_modules()
            self._freeze_anew()

    def follow_wrapper(self) -> None:
        """Before anything is tried in a training forward: attach what surrounds it."""
        if self._wrapper is not None and self._wrapper.awaits_rebuild:
            self._follow_plan(self._wrapper)
        if not self.proved:
            refuse_flat_parameters(self.model)
            found = surrounding(self.model)
            if found is not None and (self._wrapper is None or not self._wrapper.holds(found)):
                self.attach(found)

    def follow_surroundings(self) -> None:
        """In a training forward: follow its device and gradient checkpointing; and have all ranks
        choose sizes by what the first one has measured.
        """
        if self.active.device.type != self._device_type:
            self._reinstall_swaps()
        if self._costs_are_own and self.swaps.weighs_calls and self.share is not None:
            measured = json.dumps(self.swaps.state_dict()).encode()
            self.load_call_costs(json.loads(self.share(measured)))
            self._costs_are_own = False
        self.truncate_checkpointing()
        self.trained = True

    def truncate_checkpointing(self) -> None:
        """Keep gradient checkpointing from undoing the truncation, whenever it is switched on."""
        if EMBEDDINGS not in self.state.active:
            self._checkpointing.keep_truncated()

    def attach(self, wrapped: nn.Module, timeout: timedelta | None = None) -> None:
        """See `PatchHandle.attach`."""
        wrapper = Wrapper(self.model, self.layout, wrapped, timeout)
        if wrapper.engine is not None and self.norms is not None:
            raise UnsupportedModelError(
                f"{self.norms.schedule!r} decides by whole gradients, and under DeepSpeed no rank "
                "has them: use another schedule, or DistributedDataParallel"
            )
        if (
            decides_by_score(self._schedule)
            and self._schedule.restore_best
            and (wrapper.sharded or wrapper.engine is not None)
        ):
            raise UnsupportedModelError(
                f"{self._schedule!r} puts whole tensors back, and no rank has them under "
                "fully_shard or DeepSpeed: restore_best=False, or DistributedDataParallel"
            )
        self._wrapper = wrapper
        self.packer.sharded = wrapper.sharded
        if self.norms is not None:
            self.norms.reduced_at_end = wrapper.ddp is not None
            self.norms.sharded = wrapper.sharded
        if wrapper.sharded:  # `fully_shard` has replaced parameters
            self._reinstall_swaps()
            if self.norms is not None:
                self.norms.install_norm_hooks()
        self._follow_plan(wrapper)
        if wrapper.sharded and self.cache is not None:
            ranks = wrapper if wrapper.on_several_ranks else None
            self.cache.share_gathers(self.packer.run_inside, ranks)
            self.cache.begin_stage(self.boundary)
        if wrapper.sharded:
            self._refuse_optimizer_of_whole_weights()

    def _follow_plan(self, wrapper: Wrapper) -> None:
        cache = "without a cache" if self.cache is None else "with a cache"
        options = [cache, f'packing="{self._packing}"']
        wrapper.follow(step=self.step, boundary=self.boundary, options=options)

    def give(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note the parameters that an optimizer is about to get."""
        self._given = [weakref.ref(p) for p in parameters]

    def _refuse_optimizer_of_whole_weights(self) -> None:
        """Raise `RuntimeError` if one holds what `fully_shard` has put shards in place of."""
        here = {id(p) for forms in forms_of_shards(self.model) for p in forms}
        here |= {id(p) for p in self.model.parameters()}
        held = [p for ref in self._given if (p := ref()) is not None]
        if any(id(p) not in here for p in held):
            raise RuntimeError(
                "the optimizer holds the weights as they were before fully_shard, and would train "
                "nothing: call handle.param_groups() and make the optimizer after fully_shard"
            )

    def load_call_costs(self, costs: dict[str, Any]) -> None:
        """Choose the sizes from which on ops run by what another run, or rank, has measured."""
        if self.swaps.load_state_dict(costs):
            self._reinstall_swaps()

    def check_plan(self, step: int, plan: FreezePlan) -> None:
        """Raise `ValueError` if nothing would train, or if AdaLoRA would miss gradients."""
        self.active.check_plan(plan)
        if self._allocation_end is None or step > self._allocation_end:
            return
        if any(self.active.frozen_by(plan)):
            raise ValueError(
                f"AdaLoRA moves ranks between all adapters up to step {self._allocation_end} "
                f"(total_step - tfinal), and step {step} freezes some: raise tfinal until that "
                "comes first, or use LoRA"
            )

    def check_known_plans(self) -> None:
        for step, plan in self._known_plans():
            self.check_plan(step, plan)

    def check_structure(self) -> None:
        """Raise `RuntimeError` if the layout does not describe the model any more."""
        if self._rebuilt():
            self._structure.check()

    def frozen_sometime(self) -> set[int]:
        """Units that are frozen now, or by a plan that is known already."""
        if decides_by_gradients(self._schedule):
            return set(self.layout.units)
        plans = [plan for _, plan in self._known_plans()]
        trains = self.active.trains
        return self.frozen | {
            unit for unit in self.layout.units if not all(trains(unit, plan) for plan in plans)
        }

    def restore_model(self) -> None:
        """Put the model back as it was found, but for what the user froze in the meantime."""
        if self.cache is not None:
            self.cache.close()
            self.cache = None
        self.packer.close()
        self._boundary.restore_modules()
        self.swaps.remove_swaps()
        self.graphs.remove()
        if self._wrapper is not None:
            self._wrapper.reshard()  # flags go to the shards, not to weights that are gathered
        self.active.restore_flags()
        if not self.rows.outlives_patch:
            self.rows.remove()
        self._checkpointing.restore_checkpointing()
        if self.norms is not None:
            self.norms.remove_norm_hooks()

    def release_wrapper(self) -> None:
        """Have what is active again reduced again, and tell optimizers of it."""
        if self._wrapper is not None:
            self._wrapper.release()
            self._wrapper = None
        freeze_events.announce()

    def _follow_flags(self) -> None:
        """Adapt everything else to the flags: modules, hooks, wrapper, optimizers, cache."""
        active, boundary = self.active.units, 0
        if EMBEDDINGS not in active:
            blocks = range(self.layout.num_blocks)
            boundary = next((i for i in blocks if i in active), self.layout.num_blocks)
        self.state = StageState(boundary, frozenset(active), self.active.active_params)
        self._boundary.place_modules(self.frozen, boundary)
        if self.norms is not None:
            self.norms.install_norm_hooks()
        if self._wrapper is not None:
            self._follow_plan(self._wrapper)
        freeze_events.announce()
        if self.cache is not None:
            self.cache.begin_stage(boundary)

    def _reinstall_swaps(self) -> None:
        """Swap modules anew; the boundary's classes are derived from those of the swaps."""
        self.graphs.drop()
        self._boundary.restore_modules()
        self.swaps.remove_swaps()
        if self.sharded:  # `fully_shard` has made classes out of those that it found
            for module in self.model.modules():
                cls = without_derived_ancestors(type(module))
                if cls is not type(module):
                    module.__class__ = cls
            self.rows.follow_shards()
        self._device_type = self.active.device.type
        self._costs_are_own = True
        self.swaps.install_swaps(self.active.device)
        self._boundary.place_modules(self.frozen, self.boundary)

    def _follow_switches(self) -> bool:
        """Train what was switched on since, where the plan trains it; whether that is anything."""
        switched = self.active.take_switched(self.plan)
        adapters = adapter_configs(self.model)
        if any(a is not b for a, b in zip_longest(self._adapters, adapters)):
            self._note_adapters()
            self._note_modules()
            self._reinstall_swaps()  # in new modules, and where adapters stand now
        elif not switched:
            return False
        self._freeze_anew()
        return True

    def _freeze_anew(self) -> None:
        self.check_plan(self.step, self.plan)
        self.freeze(self.plan, self.step)

    def _known_plans(self) -> Iterator[tuple[int, FreezePlan]]:
        """Plans of this step, of those to check, and of all before AdaLoRA's ranks are fixed."""
        steps = {self.step, *steps_to_check(self._schedule)}
        if self.active.only is not None and (total := self._schedule.total_steps):
            # a plan in the middle may train just what `only` leaves out
            steps |= {*islice(stage_starts(self._schedule, total), _MOST_STAGES)}
        if self._allocation_end is not None and (total := self._schedule.total_steps):
            steps |= set(range(min(total, self._allocation_end + 1)))
        for step in sorted(steps):
            yield step, self._schedule.plan(step, self.layout.num_blocks)
        if decides_by_score(self._schedule):
            yield from ((self.step, p) for p in self._schedule.plans(self.layout.num_blocks))

    def _note_adapters(self) -> None:
        check_adapters(self.model)
        self._adapters = adapter_configs(self.model)
        self._allocation_end = rank_allocation_end(self.model)

    def _put_back_stand_ins(self) -> None:
        if self.cache is not None:
            self.cache.remove_stand_ins()  # a forward that was interrupted leaves them

    def _rebuilt(self) -> bool:
        """Whether modules or parameters came or went, a cache's stand-ins not counted."""
        if not self._structure.changed:
            return False
        self._put_back_stand_ins()
        return self._structure.changed

    def _note_modules(self) -> None:
        self.packer.remove()
        self._structure.check()
        self.rows.check()
        self.layout.guess_unruled(self.model)
        new = self.active.rescan_parameters()
        self._structure.note()
        if new and self.trained:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            warnings.warn(
                f"{new[0]}{more} came into the model while it was trained: an optimizer that was "
                "made before does not hold it, and leaves it as it is",
                stacklevel=5,
            )
