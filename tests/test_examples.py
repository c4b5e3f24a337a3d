"""The examples run as the README calls them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from progtuning_kernels import ProgressiveSchedule

EXAMPLES = Path(__file__).parent.parent / "examples"
MARK = "# progtuning"
BLOCKS = 4


def test_progressive_lora(model_folders, tmp_path):
    rows = [{"text": f"w{i % 90} w3 w7", "label": int(i % 90 < 45)} for i in range(48)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--model", model_folders["bert"], "--train-file", tmp_path / "rows.jsonl"]
    arguments += ["--batch-size", 4, "--stages", 4, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "progressive_lora.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), "a first run should print no warnings"
    numbers = [line.split("│")[1:7] for line in done.stdout.splitlines() if "│" in line]
    stages = [[cell.strip() for cell in row] for row in numbers]
    assert [row[:2] for row in stages] == [["1", "0"], ["2", "1"], ["3", "2"], ["4", "3"]]
    for column in (2, 3, 4):  # adapter parameters, saved bytes, optimizer state
        values = [float(row[column].split()[0].replace(",", "")) for row in stages]
        assert values == sorted(values, reverse=True) and values[0] > values[-1]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()


@contextmanager
def _differentiated_blocks() -> Iterator[list[bool]]:
    """Whether the output of a block requires grad, for every block that a training forward runs."""
    seen: list[bool] = []

    def look(module, inputs, output):
        if isinstance(module, BertLayer | GPT2Block) and torch.is_grad_enabled():
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden.requires_grad)

    hook = register_module_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


SCRIPTS = {  # name: (model folder, what loads the result, micro-batches per step)
    "trainer_classification": ("bert", AutoModelForSequenceClassification, 1),
    "trainer_causal_lm": ("gpt2", AutoModelForCausalLM, 2),
    "accelerate_loop": ("bert", AutoModelForSequenceClassification, 2),
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.usefixtures("no_accelerator_of_another_test", "padded")  # forwards are counted
def test_a_working_script_and_three_lines(
    name, marked, model_folders, text_files, tmp_path, monkeypatch
):
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines(keepends=True)
    ours = [line for line in lines if line.rstrip().endswith(MARK)]
    assert 1 <= len(ours) <= 3
    assert not any("progtuning" in line for line in _code(lines) if line not in ours)
    script = tmp_path / f"{name}.py"
    script.write_text("".join(line for line in lines if marked or line not in ours))

    kind, auto_model, window = SCRIPTS[name]
    train, validation = text_files
    arguments = ["--batch-size", "8", "--epochs", "1", "--lr", "1e-3"]
    if name == "trainer_causal_lm":
        train, validation = (_as_text(path, tmp_path) for path in (train, validation))
        arguments += ["--block-size", "16"]
    if window > 1:
        arguments += ["--accumulate", str(window)]
    if name != "accelerate_loop":
        arguments += ["--validation-file", str(validation)]
    output = tmp_path / "out"
    arguments += ["--model", str(model_folders[kind]), "--train-file", str(train)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments, "--output", str(output)])
    with _differentiated_blocks() as seen:
        runpy.run_path(str(script), run_name="__main__")

    forwards = len(seen) // BLOCKS
    steps = -(-forwards // window)
    assert steps >= 3
    schedule = ProgressiveSchedule(3, steps)
    boundaries = [schedule.plan(i // window, BLOCKS).boundary for i in range(forwards)]
    assert boundaries[0] == 0 < boundaries[-1]
    expected = [block >= k if marked else True for k in boundaries for block in range(BLOCKS)]
    assert seen == expected

    model, loading = auto_model.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    before = auto_model.from_pretrained(model_folders[kind])
    assert any(
        not torch.equal(weight, before.get_parameter(name))
        for name, weight in model.base_model.named_parameters(prefix=model.base_model_prefix)
    )


def _code(lines: list[str]) -> list[str]:
    """Lines of a script after its docstring, comments left out."""
    end = next(i for i, line in enumerate(lines) if i and line.startswith('"""'))
    return [line for line in lines[end + 1 :] if not line.lstrip().startswith("#")]


def _as_text(rows: Path, folder: Path) -> Path:
    path = folder / f"{rows.stem}.txt"
    path.write_text("\n".join(json.loads(row)["text"] for row in rows.read_text().splitlines()))
    return path
