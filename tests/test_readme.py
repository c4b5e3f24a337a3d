"""README: its snippets run, its table is that of the stored results."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import peft
import torch
import transformers
from family_table import family_table
from tiny_models import tiny_inputs, tiny_model
from torch.nn.parallel import DistributedDataParallel

from progtuning_kernels import (
    MaskedAdamW,
    MilestoneSchedule,
    ProgressiveSchedule,
    annealed_lr,
    patch_model,
    register_family,
    report,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
STORED = sorted((ROOT / "benchmarks" / "results").glob("*/demo/*.json"))


def _python(heading: str) -> list[str]:
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_before_and_after_run_and_train(tmp_path):
    before, after, trainer, adapters = _python("Before and after")
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

    names |= vars(peft) | {"model": tiny_model("bert-sequence"), "loader": loader}
    names |= {"patch_model": patch_model, "ProgressiveSchedule": ProgressiveSchedule}
    exec(compile(adapters, "README.md", "exec"), names)
    assert names["handle"].boundary == 0 and ".lora_" in str([*names["model"].state_dict()])


def test_families_snippet_runs(monkeypatch):
    monkeypatch.setattr("progtuning_kernels.model.families.FAMILIES", table := {})
    (code,) = _python("Families")
    names = {"register_family": register_family, "patch_model": patch_model}
    names |= {"model": tiny_model("bart-seq2seq-lm").model, "schedule": ProgressiveSchedule(2, 4)}
    exec(compile(code, "README.md", "exec"), names)
    assert names["handle"].num_blocks == 4
    assert table["my_model"].embeddings == r"^encoder\.late_norm\."


def test_truncation_snippet_runs():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    model(**tiny_inputs("bert-sequence"))
    (code,) = _python("Did it truncate?")
    exec(compile(code, "README.md", "exec"), {"handle": handle})


def _between(name: str) -> str:
    return README.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]


def test_table_of_families_is_that_of_the_tests():
    assert _between("families") == family_table()


def _benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_optimizer_table_is_that_of_the_stored_results():
    optimizer = _benchmark("optimizer")
    tables = [
        optimizer.table(json.loads(path.read_text()))
        for path in sorted(RESULTS.glob("*/optimizer.json"))
    ]
    assert tables and all(table in _between("optimizer") for table in tables)


def test_cache_table_is_that_of_the_stored_results():
    prefix_cache = _benchmark("prefix_cache")
    tables = [
        prefix_cache.table(json.loads(path.read_text()))
        for path in sorted(RESULTS.glob("*/prefix_cache.json"))
    ]
    assert tables and all(table in _between("cache") for table in tables)


def test_dropout_table_is_that_of_the_stored_results():
    dropout = _benchmark("dropout")
    tables = [
        dropout.table(json.loads(path.read_text())) for path in RESULTS.glob("*/dropout.json")
    ]
    assert tables and all(table in _between("dropout") for table in tables)


def test_training_table_is_that_of_the_stored_results():
    plot = _benchmark("plot")
    tables = [plot.table(plot.load(folder.parent)) for folder in RESULTS.glob("*/training")]
    assert tables and all(table in _between("training") for table in tables)


def test_packing_table_is_that_of_the_stored_results():
    plot = _benchmark("plot")
    stored = [plot.load_packing(folder) for folder in RESULTS.iterdir() if folder.is_dir()]
    tables = [plot.packing_table(contents) for contents in stored if contents]
    assert tables and all(table in _between("packing") for table in tables)


def test_study_tables_are_those_of_the_stored_results():
    study = _benchmark("accuracy_study")
    folders = [folder.parent for folder in RESULTS.glob("*/accuracy")]
    assert folders and all(study.table(folder) in _between("accuracy") for folder in folders)
    folders = [folder.parent for folder in RESULTS.glob("*/contribution")]
    shown = _between("contribution")
    assert folders and all(study.contribution_table(folder) in shown for folder in folders)


def test_cache_snippet_runs():
    (code,) = _python("The prefix cache")
    names = {"patch_model": patch_model, "ProgressiveSchedule": ProgressiveSchedule, "steps": 6}
    names["model"] = tiny_model("bert-sequence")
    exec(compile(code, "README.md", "exec"), names)
    names["model"](**tiny_inputs("bert-sequence")).loss.backward()
    assert names["handle"].cache_report().state == "bypassed"  # nothing is frozen in stage 1


def test_several_processes_snippet_trains(tmp_path):
    (code,) = _python("Several processes")
    model = tiny_model("bert-sequence")
    names = {"patch_model": patch_model, "ProgressiveSchedule": ProgressiveSchedule, "steps": 6}
    names |= {"DistributedDataParallel": DistributedDataParallel, "MaskedAdamW": MaskedAdamW}
    names |= {"model": model, "loader": [tiny_inputs("bert-sequence", seed=i) for i in range(6)]}
    start = model.classifier.weight.detach().clone()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        exec(compile(code, "README.md", "exec"), names)
    finally:
        torch.distributed.destroy_process_group()
    assert names["handle"].step == 6 and not torch.equal(model.classifier.weight, start)


def test_checkpoints_snippet_saves_and_finds(tmp_path):
    (code,) = _python("Checkpoints")
    for found in (None, {"epoch": 0}):
        handle = patch_model(tiny_model("bert-sequence"), ProgressiveSchedule(2, 4))
        optimizer = MaskedAdamW(handle.param_groups())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        names = {"handle": handle, "optimizer": optimizer, "scheduler": scheduler}
        names["folder"] = tmp_path
        exec(compile(code, "README.md", "exec"), names)
        assert names["extra"] == found


def test_schedules_snippet_runs():
    (code,) = _python("Schedules")
    code = code.replace("ProgressiveSchedule(12,", "ProgressiveSchedule(4,")  # of 4 blocks
    names = {"patch_model": patch_model, "ProgressiveSchedule": ProgressiveSchedule}
    names |= {"annealed_lr": annealed_lr, "MaskedAdamW": MaskedAdamW, "total_steps": 8}
    names |= {"LambdaLR": torch.optim.lr_scheduler.LambdaLR, "model": tiny_model("bert-sequence")}
    exec(compile(code, "README.md", "exec"), names)
    for _ in range(3):
        names["scheduler"].step()
    assert len({group["lr"] for group in names["optimizer"].param_groups}) > 2


def test_optimizer_snippet_trains():
    model = tiny_model("bert-sequence")
    handle = patch_model(model, MilestoneSchedule({0: 2}))
    names = {"handle": handle, "MaskedAdamW": MaskedAdamW}
    (code,) = _python("The optimizer")
    exec(compile(code, "README.md", "exec"), names)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    model(**tiny_inputs("bert-sequence")).loss.backward()
    names["optimizer"].step()
    after = [p for p in model.parameters() if p.requires_grad]
    assert not any(map(torch.equal, before, after)) and names["optimizer"].skipped_steps == 0


def test_survey_of_architectures_is_the_stored_one():
    architectures = _benchmark("architectures")
    (stored,) = RESULTS.glob("*/architectures.json")
    stored = json.loads(stored.read_text())
    assert " ".join(_between("architectures").split()) == architectures.summary(stored)


def test_survey_of_packing_is_the_stored_one():
    _benchmark("architectures")  # which the other imports
    survey = _benchmark("packing_architectures")
    (stored,) = RESULTS.glob("*/packing_architectures.json")
    shown = " ".join(_between("packing-architectures").split())
    assert shown == survey.summary(json.loads(stored.read_text()))


def test_table_is_that_of_the_stored_results():
    assert STORED
    table = report.markdown_table([report.load_run(path) for path in STORED])
    shown = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    assert table in shown
