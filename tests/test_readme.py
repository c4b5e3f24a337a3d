"""README: its snippets run, its table is that of the stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from tiny_models import tiny_inputs, tiny_model

from progtuning_kernels import report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
STORED = sorted((ROOT / "benchmarks" / "results").glob("*/demo/*.json"))


def _python(heading: str) -> list[str]:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_before_and_after_run_and_train(tmp_path):
    before, after, trainer = _python("Before and after")
    loader = [tiny_inputs("bert-sequence", seed=seed) for seed in range(6)]
    weights = []
    for code in (before, after):
        model = tiny_model("bert-sequence")
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        auto = SimpleNamespace(from_pretrained=lambda name, model=model: model)
        names = {"AutoModelForSequenceClassification": auto, "loader": loader, "torch": torch}
        exec(compile(code, "README.md", "exec"), names)
        assert not any(torch.equal(p, start[n]) for n, p in model.named_parameters())
        weights.append(dict(model.named_parameters()))
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, report_to="none", use_cpu=True, save_strategy="no"
    )
    rows = [{k: v[0] for k, v in inputs.items()} for inputs in loader]
    code = trainer.replace("train_dataset=...", "train_dataset=rows")
    names = {"Trainer": transformers.Trainer, "model": tiny_model("bert-sequence"), "args": args}
    exec(compile(code, "README.md", "exec"), names | {"rows": rows})


def test_truncation_snippet_runs():
    from progtuning_kernels import MilestoneSchedule, patch_model

    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model(**tiny_inputs("bert-sequence"))
    (code,) = _python("Did it truncate?")
    exec(compile(code, "README.md", "exec"), {"handle": handle})


def test_optimizer_table_is_that_of_the_stored_results():
    (stored,) = (ROOT / "benchmarks" / "results").glob("*/optimizer.json")
    for result in json.loads(stored.read_text())["results"]:
        times = [f"{result[name]['step_ms']:.1f} ms" for name in ("torch", "progtuning")]
        assert f"| {times[0]} | {times[1]} | {result['ratio']:.2f} |" in README


def test_table_is_that_of_the_stored_results():
    assert STORED
    table = report.markdown_table([report.load_run(path) for path in STORED])
    shown = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    assert table in shown
