"""Which of transformers' architectures pack their tokens, and whether they are right then.

Shrunken models, as in architectures.py, run one training forward and backward, padded and packed,
on rows of different lengths that are padded on the right. Outputs at real tokens and all gradients
are compared.

    python benchmarks/packing_architectures.py \\
        --output benchmarks/results/<device>/packing_architectures.json

The file is written after every architecture; the same call goes on where an earlier one stopped.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import error_line, inputs_of, model_classes, shrink, time_limit, without_dropout
from rich.progress import track
from stored_results import store
from torch import Tensor, nn

from progtuning_kernels import MilestoneSchedule, UnsupportedModelError, patch_model
from progtuning_kernels.cli.provenance import provenance
from progtuning_kernels.model.outputs import compared, difference

LENGTHS = {
    ("input_ids", "attention_mask"): (12, 9, 6, 3),
    ("decoder_input_ids", "decoder_attention_mask"): (10, 2, 7, 4),
}
OUTPUTS, GRADIENTS = 1e-5, 1e-4  # most difference, of the largest value of the tensor
SCHEDULE = MilestoneSchedule({0: 0})  # everything trains


def padded_batch(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Inputs with masks; without any where the model takes none for text."""
    batch = inputs_of(model, config, rows=4, tokens=12)
    padding = getattr(config, "pad_token_id", None) or 0
    parameters = inspect.signature(model.forward).parameters
    for (ids, mask), lengths in LENGTHS.items():
        if ids not in batch or mask not in parameters:
            continue
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (B, T)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(4, 90, real.shape, generator=generator)
        batch |= {ids: tokens.where(real, padding), mask: real.long()}
    return batch


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs at real tokens, and the gradients of a sum of them with random weights."""
    masks = [batch[mask].bool() for _, mask in LENGTHS if mask in batch]
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(2)
    outputs, loss = [], torch.zeros(())
    for output in compared(model(**batch)):
        real = next((mask for mask in masks if output.shape[:2] == mask.shape), None)
        outputs.append(output if real is None else output[real])
        if output.is_floating_point() and output.requires_grad:
            loss = loss + (outputs[-1] * torch.randn(outputs[-1].shape, generator=generator)).sum()
    if not loss.requires_grad:
        raise RuntimeError("the model returns nothing that can be trained")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if not all(t.isfinite().all() for t in gradients.values()):
        raise RuntimeError("its gradients are not finite")
    return [output.detach() for output in outputs], gradients


def problem(
    expected: tuple[list[Tensor], dict[str, Tensor]], found: tuple[list[Tensor], dict[str, Tensor]]
) -> str | None:
    """What differs; None where nothing does."""
    if [t.shape for t in expected[0]] != [t.shape for t in found[0]]:
        return "outputs have other shapes"
    worst = max((difference(*pair) for pair in zip(expected[0], found[0], strict=True)), default=0)
    if worst > OUTPUTS:
        return f"an output differs by {worst:.1e}"
    if expected[1].keys() != found[1].keys():
        return f"gradients of {sorted(expected[1].keys() ^ found[1].keys())[:2]} in one of the two"
    largest = max(float(g.abs().max()) for g in expected[1].values() if g.numel())
    for name, gradient in expected[1].items():
        # some gradients are rounding errors only, as those of the biases of keys are
        tolerance = GRADIENTS * gradient.abs().max() + 1e-6 * largest
        if gradient.numel() and (error := (found[1][name] - gradient).abs().max()) > tolerance:
            return f"gradient of {name} differs by {error / gradient.abs().max():.1e}"
    return None


def survey(model_type: str, class_name: str) -> dict[str, Any]:
    """What becomes of one architecture."""
    row: dict[str, Any] = {"class": class_name, "status": "not built"}
    try:
        with time_limit():
            config = shrink(transformers.CONFIG_MAPPING[model_type]())
            torch.manual_seed(0)
            model = without_dropout(getattr(transformers, class_name)(config)).train()
            row["status"] = "does not run"
            batch = padded_batch(model, config)
            if not any(mask in batch for _, mask in LENGTHS):
                return row | {"status": "no mask"}
            try:
                run(copy.deepcopy(model), batch)
            except Exception:  # of any model's own kind
                if "pixel_values" not in batch:
                    raise
                del batch["pixel_values"]  # it wants image tokens in the text, or patches
                run(copy.deepcopy(model), batch)
            row["status"] = "refused"
            padded, packed = copy.deepcopy(model), copy.deepcopy(model)
            patch_model(padded, SCHEDULE, packing="off")
            expected = run(padded, batch)
            row["status"] = "raises"
            handle = patch_model(packed, SCHEDULE, packing="on")
            start = time.process_time()
            found = run(packed, batch)
            row["first_step_cpu_s"] = round(time.process_time() - start, 2)
            report = handle.packing_report()
            row |= {"stacks": dict(report.stacks), "left_padded": list(report.padded)}
            row["status"] = "packed" if report.batches else "padded"
            if (reason := problem(expected, found)) is not None:
                row |= {"status": "wrong", "reason": reason}
    except UnsupportedModelError as error:
        row |= {"status": "refused", "reason": str(error)}
    except Exception as error:  # the shrunken config does not fit, or the input is another
        row["reason"] = error_line(error)
    return row


def has_padded_modules(row: dict[str, Any]) -> bool:
    """Whether modules inside packed blocks run on padding."""
    return any("modules on padded tokens" in text for text in row["stacks"].values())


def summary(content: dict[str, Any]) -> str:
    """A stored survey in two sentences, for the note."""
    rows = content["architectures"].values()
    counts = Counter(row["status"] for row in rows)
    parts = sum(row["status"] == "packed" and has_padded_modules(row) for row in rows)
    ran = counts["packed"] + counts["padded"] + counts["wrong"] + counts["raises"]
    return (
        f"Of the {ran} architectures of transformers "
        f"{content['meta']['versions']['transformers']} that run, shrunken, on text with a mask, "
        f"{counts['packed']} pack ({parts} of them with modules inside their blocks on padded "
        f"tokens), and {counts['padded']} stay padded with a reason; {counts['wrong']} were wrong, "
        f"{counts['raises']} raised. {counts['no mask']} more take no mask of text. "
        "(`benchmarks/packing_architectures.py`)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; without it only a summary")
    parser.add_argument("--only", nargs="*", help="model types")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    content = {"meta": provenance(torch.device("cpu")), "architectures": {}}
    if args.output and args.output.exists():
        stored = json.loads(args.output.read_text())
        if stored["meta"]["commit"] == content["meta"]["commit"]:
            content["architectures"] = stored["architectures"]
    classes, rows = model_classes(), content["architectures"]
    left = [t for t in args.only or classes if t not in rows]
    for model_type in track(left, description="architectures"):
        row = rows[model_type] = survey(model_type, classes[model_type])
        if args.only or row["status"] in ("wrong", "raises"):
            print(model_type, json.dumps(row), flush=True)
        if args.output:
            store(content, args.output)
    print(summary(content))


if __name__ == "__main__":
    main()
