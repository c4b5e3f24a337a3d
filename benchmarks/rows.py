"""Training the rows of new tokens alone: four ways, interleaved in one process.

    python benchmarks/rows.py [--output FOLDER]    # a Llama of 2 blocks, 128 k tokens and 300 new
    python benchmarks/rows.py --table FOLDER       # the table of the docs

The model is frozen but for the rows of the new tokens in embeddings and LM head, one weight (tied)
or two. A step is forward, backward, update and `zero_grad`; everybody takes the same batch in turn.
`state_bytes` and `gradient_bytes` are what the optimizer keeps and what lies in `.grad` before the
update. `peak_bytes` is the most that torch's CPU allocator holds at once in a step, above what it
holds before it; weights and state are there before.

The reference takes the dense gradient of the weights in float64, and gives its rows to AdamW. How
far the new rows end from it (relative to how far they move) and how many of the other rows have
moved at all is in the table: torch's ways move all of them.

Prediction, V = 128,556 rows of d = 512 in float32, k = 300 of them new: W = V d 4 = 263 MB, R = k d
4 = 0.61 MB. torch keeps 2 W of state and W of gradients, of each weight; PEFT and this library 2 R
and R. PEFT puts the rows into a copy of W for every use, keeps the head's until backward, and
makes a dense gradient of each: at least W more at the peak. This library makes none: what a step
allocates are the logits (256 tokens x V x 4 = 132 MB) with their gradient and what the loss makes
of them. Of the head's three products torch and PEFT compute the weight's gradient (2 x 256 V d
operations) for all rows, this library for k of V: at most 3 / 2 = 1.5 x faster where the head is
all, and as much more as writing W, 2 W of state and W of gradients takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import TrainableTokensConfig, get_peft_model
from stored_results import store
from torch import Tensor, nn

from progtuning_kernels import MaskedAdamW, MilestoneSchedule, patch_model
from progtuning_kernels.bench import Refused
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.optim import state_bytes

HYPER = dict(lr=1e-3, weight_decay=0.01)
GATE_STEPS, TOLERANCE = 3, 1e-3
MB = 1e6


@dataclass(frozen=True)
class Settings:
    vocabulary: int = field(default=128_256, metadata={"help": "tokens that there were"})
    new: int = field(default=300, metadata={"help": "tokens that were added"})
    width: int = field(default=512, metadata={"help": "of the model"})
    blocks: int = field(default=2, metadata={"help": "of the model"})
    rows: int = field(default=4, metadata={"help": "of a batch"})
    tokens: int = field(default=64, metadata={"help": "of a row"})
    rounds: int = field(default=12, metadata={"help": "timed steps of everybody"})

    @property
    def ids(self) -> list[int]:
        return list(range(self.vocabulary, self.vocabulary + self.new))

    def model(self, *, tied: bool) -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary + self.new,
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(1, self.width // 64),
            max_position_embeddings=self.tokens,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).requires_grad_(False).train()

    def batch(self, number: int) -> dict[str, Tensor]:
        """Every fourth token is a new one."""
        draw = torch.Generator().manual_seed(number)
        shape = (self.rows, self.tokens)
        old = torch.randint(self.vocabulary, shape, generator=draw)
        new = torch.randint(self.new, shape, generator=draw) + self.vocabulary
        ids = torch.where(torch.rand(shape, generator=draw) < 0.25, new, old)
        return {"input_ids": ids, "labels": ids}


@dataclass
class Way:
    """A model that trains its new rows, and what its step is made of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    weights: Callable[[], list[Tensor]]  # embeddings and LM head with the trained rows in place
    before_update: Callable[[], object] = lambda: None
    after_step: Callable[[], object] = lambda: None

    def backward(self, batch: Mapping[str, Tensor]) -> None:
        self.model(**batch).loss.backward()
        self.before_update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_step()

    def step(self, batch: Mapping[str, Tensor]) -> None:
        self.backward(batch)
        self.update()

    def gradient_bytes(self) -> int:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = {id(p): p.grad for p in (*held, *self.model.parameters())}
        return sum(grad.nbytes for grad in gradients.values() if grad is not None)


def _weights(model: Any) -> list[Tensor]:
    both = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    return list({id(weight): weight for weight in both}.values())  # once where they are tied


def full(settings: Settings, *, tied: bool) -> Way:
    model = settings.model(tied=tied)
    weights = [weight.requires_grad_(True) for weight in _weights(model)]
    optimizer = torch.optim.AdamW(weights, **HYPER, fused=True)
    return Way(model, optimizer, lambda: weights)


def zeroed(settings: Settings, *, tied: bool) -> Way:
    """The gradient of every other row is zeroed after backward."""
    way = full(settings, tied=tied)

    def zero() -> None:
        for weight in way.weights():
            weight.grad[: settings.vocabulary] = 0

    way.before_update = zero
    return way


def with_peft(settings: Settings, *, tied: bool) -> Way:
    targets = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = TrainableTokensConfig(token_indices=settings.ids, target_modules=targets)
    with warnings.catch_warnings():
        # PEFT 0.21 warns of a tied LM head, though it trains the rows there, too
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(settings.model(tied=tied), config)
    rows = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(rows, **HYPER, fused=True)

    def weights() -> list[Tensor]:
        both = model.get_input_embeddings(), model.get_output_embeddings()
        layers = [both[0]] if tied else both
        return [layer.get_merged_weights(layer.active_adapters) for layer in layers]

    return Way(model, optimizer, weights)


def ours(settings: Settings, *, tied: bool, **options: Any) -> Way:
    model = settings.model(tied=tied)
    rows = {"embed_tokens": settings.ids} | ({} if tied else {"lm_head": settings.ids})
    schedule = MilestoneSchedule({}, embeddings="always")
    handle = patch_model(model, schedule, rows=rows, packing="off", **options)
    optimizer = MaskedAdamW(handle.param_groups(**HYPER))
    return Way(model, optimizer, lambda: _weights(model), after_step=handle.advance)


def ours_without_kernels(settings: Settings, *, tied: bool) -> Way:
    return ours(settings, tied=tied, kernels="off")


WAYS: dict[str, Callable[..., Way]] = {
    "torch AdamW, all rows train": full,
    "torch AdamW, gradient of the others zeroed": zeroed,
    "PEFT, `trainable_token_indices`": with_peft,
    "this library, `rows=`": ours,
    'this library, `rows=`, `kernels="off"`': ours_without_kernels,
}
BASELINE = next(iter(WAYS))


def reference(settings: Settings, *, tied: bool) -> list[Tensor]:
    """New rows of every weight after the gate's steps, in float64."""
    model = settings.model(tied=tied).double()
    weights = [weight.requires_grad_(True) for weight in _weights(model)]
    rows = [nn.Parameter(weight.detach()[settings.ids]) for weight in weights]
    optimizer = torch.optim.AdamW(rows, **HYPER)
    for number in range(GATE_STEPS):
        model(**settings.batch(number)).loss.backward()
        for weight, own in zip(weights, rows, strict=True):
            own.grad, weight.grad = weight.grad[settings.ids], None
        optimizer.step()
        with torch.no_grad():
            for weight, own in zip(weights, rows, strict=True):
                weight[settings.ids] = own
    return [own.detach() for own in rows]


def gate(settings: Settings, way: Way, right: Sequence[Tensor], before: Sequence[Tensor]) -> dict:
    """Error of the new rows, and the number of others that have moved, after the gate's steps."""
    for number in range(GATE_STEPS):
        way.step(settings.batch(number))
    error, moved = 0.0, 0
    others = settings.vocabulary
    for weight, truth, start in zip(way.weights(), right, before, strict=True):
        weight = weight.detach()
        moved += int((weight[:others] != start[:others]).any(1).sum())
        distance = (weight[others:] - truth).norm() / (truth - start[others:]).norm()
        error = max(error, float(distance))
    return {"row_error": error, "others_moved": moved}


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that the CPU's allocator holds at once during `step`, above what it held before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(settings: Settings, *, tied: bool) -> Iterator[dict[str, Any]]:
    right = reference(settings, tied=tied)
    before = [weight.clone() for weight in _weights(settings.model(tied=tied))]
    ways = {name: build(settings, tied=tied) for name, build in WAYS.items()}
    found = {name: gate(settings, way, right, before) for name, way in ways.items()}
    for name, own in found.items():
        red = not own["row_error"] <= TOLERANCE or own["others_moved"]
        if red and name.startswith("this library"):
            raise Refused(f"gate is red: {name}: {own}")
    times_ms: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(settings.rounds):
        batch = settings.batch(number)
        for name, way in ways.items():
            started = time.perf_counter()
            way.step(batch)
            times_ms[name].append((time.perf_counter() - started) * 1e3)
    for name, way in ways.items():
        step_ms = statistics.median(times_ms[name])
        pairs = zip(times_ms[name], times_ms[BASELINE], strict=True)
        batch = settings.batch(0)
        way.backward(batch)
        gradient_bytes = way.gradient_bytes()
        way.update()
        yield {
            "way": name,
            "tied": tied,
            **found[name],
            "state_bytes": state_bytes(way.optimizer),
            "gradient_bytes": gradient_bytes,
            "peak_bytes": peak_bytes(lambda way=way, batch=batch: way.step(batch)),
            "step_ms": step_ms,
            "share": statistics.median(own / all_rows for own, all_rows in pairs),
        }


def table(content: Mapping[str, Any]) -> str:
    """Markdown: bytes, milliseconds, and what became of new and other rows."""
    total = content["settings"]["vocabulary"]
    lines = [
        "| | state (MB) | gradients (MB) | peak of a step (MB) | step (ms) | / all rows "
        "| error of new rows | other rows moved |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    head = None
    for row in content["ways"]:
        if row["tied"] is not head:
            head = row["tied"]
            lines.append(f"| **LM head {'tied' if head else 'of its own'}** |{' |' * 7}")
        cells = [f"{row[f'{name}_bytes'] / MB:,.1f}" for name in ("state", "gradient", "peak")]
        cells += [f"{row['step_ms']:,.0f}", f"{row['share']:.2f}", f"{row['row_error']:.0e}"]
        moved = row["others_moved"] / (total * (1 if head else 2))
        cells.append(f"{moved:.0%}" if moved else "0")
        lines.append(f"| {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for setting in fields(Settings):
        about = f"{setting.metadata['help']} (%(default)s)"
        parser.add_argument(f"--{setting.name}", type=int, default=setting.default, help=about)
    parser.add_argument("--output", type=Path, help="write rows.json in this folder")
    parser.add_argument("--table", type=Path, help="print a stored result, measure nothing")
    options = vars(parser.parse_args())
    output, stored = options.pop("output"), options.pop("table")
    if stored is not None:
        print(table(json.loads((stored / "rows.json").read_text())))
        return
    settings = Settings(**options)
    content: dict[str, Any] = {
        "meta": provenance(torch.device("cpu")),
        "settings": asdict(settings),
        "ways": [],
    }
    for tied in (True, False):
        content["ways"] += measure(settings, tied=tied)
    print(table(content))
    if output is not None:
        store(content, output / "rows.json")


if __name__ == "__main__":
    main()
