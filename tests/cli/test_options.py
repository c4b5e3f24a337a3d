"""Options of a run: the command line and files say the same, and every bad call gets one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from cli_calls import one_line_error
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Seq2SeqTrainingArguments

from progtuning_kernels.cli import train as train_module
from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.config import as_yaml, build_schedule, training_arguments
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.options import TRAINER_DEFAULTS, ShownOfTrainer, TrainOptions
from progtuning_kernels.cli.tasks import TASKS

DATA = ("--train-file", "a.jsonl", "--validation-file", "b.jsonl")


@pytest.fixture
def parsed(monkeypatch):
    """The options that a call comes to; nothing is trained."""
    found: list[TrainOptions] = []
    monkeypatch.setattr(train_module, "run", lambda options, **_: found.append(options))

    def parse(*arguments: object) -> TrainOptions:
        main(["train", *map(str, arguments)])
        return found.pop()

    return parse


def _file(folder: Path, content: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(content)
    return path


@pytest.mark.parametrize("command", [[], ["train"], ["plan"]])
def test_help_is_there_without_torch_and_fits_a_terminal(command):
    code = (
        "import sys; from progtuning_kernels.cli.app import main\n"
        f"try: main({[*command, '--help']})\n"
        "finally: assert not {'torch', 'transformers', 'yaml'} & sys.modules.keys()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert max(map(len, out.stdout.splitlines())) <= 80
    if command == ["train"]:
        titles = ("Data and task:", "Method and schedule:", "Training:", "Memory and precision:")
        assert all(f"\n{title}\n" in out.stdout for title in titles)
        shown = [f.name for c in (TrainOptions, ShownOfTrainer) for f in dataclasses.fields(c)]
        for name in set(shown) - {"trainer"}:
            assert f"--{name.replace('_', '-')}" in out.stdout, name


def test_names_of_the_trainer_and_short_names_are_one(parsed):
    short = parsed(*DATA, "--lr", "1e-4", "--epochs", 2, "--batch-size", 8, "--accumulate", 2)
    long = parsed(
        *(*DATA, "--learning_rate", "1e-4", "--num-train-epochs", 2),
        *("--per_device_train_batch_size=8", "--gradient_accumulation_steps", 2),
    )
    assert short == long and short.of_trainer("learning_rate") == 1e-4
    more = ("--warmup", 0.1, "--output", "x", "--keep-checkpoints", 3, "--checkpoint-every", 0)
    options = parsed(*DATA, *more, "--task", "classification", "--text-column", "s")
    assert options.output == Path("x") and options.task == "text-classification"
    assert options.columns == {"text": "s"} and options.trainer["save_strategy"] == "no"
    assert options == parsed(
        *DATA,
        *("--warmup_steps", 0.1, "--output_dir", "x", "--save_total_limit", 3),
        *("--save_steps", 0, "--column", "text=s"),
    )
    files = ("--train-file", "a", "--train-file", "c", "--validation-split", 0.1)
    assert parsed(*files).train_file == ("a", "c")


def test_every_option_of_the_trainer_is_taken(parsed):
    given = ("--adam_beta1", "0.8", "--dataloader-num-workers=2", "--full_determinism")
    options = parsed(*DATA, *given, "--label_names", "y", "--label_names", "z", "--fp16", "no")
    trainer = {k: v for k, v in options.trainer.items() if k not in TRAINER_DEFAULTS}
    assert trainer == {
        "adam_beta1": 0.8,
        "dataloader_num_workers": 2,
        "full_determinism": True,
        "label_names": ("y", "z"),
        "fp16": False,
    }
    assert parsed(*DATA, "--assistant_only_loss").trainer["assistant_only_loss"] is True  # of TRL


def test_the_command_line_goes_before_a_file(parsed, tmp_path):
    file = _file(
        tmp_path,
        "train_file: a.jsonl\nvalidation-file: [b.jsonl]\nlr: 1e-4\nepochs: 2\npacking: off\n"
        "save_strategy: no\ncolumns: {text: s}\nadam_beta1: 0.8\nmetric:\nanneal: true\n"
        "schedule: {schedule: random, blocks: 1, period: 5}\n",
    )
    options = parsed(file, "--epochs", 5, "--no-anneal")
    assert options.train_file == ("a.jsonl",) and options.validation_file == ("b.jsonl",)
    assert options.of_trainer("learning_rate") == 1e-4  # which YAML 1.1 reads as a text
    assert options.of_trainer("num_train_epochs") == 5 and options.anneal is False
    assert options.packing == "off" and options.trainer["save_strategy"] == "no"  # as YAML: False
    assert options.columns == {"text": "s"} and options.trainer["adam_beta1"] == 0.8
    assert repr(build_schedule(options, 9)).startswith("RandomBlockSchedule(blocks=1, period=5")
    as_json = _file(tmp_path, '{"train_file": "a.jsonl", "validation_split": 0.2}', "run.json")
    assert parsed(as_json).validation_split == 0.2


def _values(hint: Any, name: str) -> st.SearchStrategy:
    if name == "task":
        return st.sampled_from(TASKS)
    if name == "columns":
        return st.dictionaries(st.sampled_from(["text", "label"]), st.text("aé: #'", min_size=1))
    if name == "schedule":
        mapping = {"schedule": "milestones", "steps": {0: 2, 10: 3}}
        return st.sampled_from(["random", "a.toml", mapping])
    kind = next(k for k in (*get_args(hint), hint) if k is not type(None))
    if get_origin(hint) is Literal or get_origin(kind) is Literal:
        return st.sampled_from(get_args(hint if get_origin(hint) is Literal else kind))
    if get_origin(hint) is tuple:
        return st.lists(st.text("ab.1é", min_size=1), max_size=2).map(tuple)
    return {
        bool: st.booleans(),
        int: st.integers(2, 2**31),
        float: st.floats(1e-9, 1),
        str: st.sampled_from(["1e-4", "no", "null", "a b", "7", "#x", "é"]),
    }[kind]


def _any_options() -> st.SearchStrategy[TrainOptions]:
    hints = get_type_hints(TrainOptions)
    trainer = get_type_hints(ShownOfTrainer)
    del hints["trainer"], trainer["bf16"]
    own = st.fixed_dictionaries({}, optional={k: _values(v, k) for k, v in hints.items()})
    of_trainer = st.fixed_dictionaries({}, optional={k: _values(v, k) for k, v in trainer.items()})
    return st.builds(lambda o, t: TrainOptions(**o, trainer=TRAINER_DEFAULTS | t), own, of_trainer)


@settings(max_examples=25)
@given(_any_options())
def test_a_written_configuration_is_read_back(tmp_path_factory, options):
    file = _file(tmp_path_factory.mktemp("config"), as_yaml(options))
    found: list[TrainOptions] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "run", lambda options, **_: found.append(options))
        patch.setattr(TrainOptions, "check", lambda self: None)  # any options, also useless ones
        patch.setattr("progtuning_kernels.cli.app.choose_device", lambda name: "cpu")
        main(["train", str(file)])
    assert {k: v for k, v in found[0].trainer.items() if v != ()} == {
        k: v for k, v in options.trainer.items() if v != ()
    }
    assert dataclasses.replace(found[0], trainer={}) == dataclasses.replace(options, trainer={})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate: 1", "run.yaml: there is no option 'lerning_rate'; did you mean learning"),
        ("dry_run: true", "there is no option 'dry_run'"),
        ("lr: 1\nlearning_rate: 2", "learning_rate is there under another name, too"),
        ("lr: fast", "run.yaml: Invalid value for '--learning-rate' / '--lr': 'fast'"),
        ("stages: 2.5", "run.yaml: Invalid value for '--stages': '2.5'"),
        ("stages: 0", "0 is not in the range"),
        ("packing: maybe", "'maybe' is not one of 'auto', 'on', 'off'"),
        ("adam_beta1: x", "could not convert string to float"),
        ("columns: {text: ''}", "--column takes ROLE=NAME"),
        ("- 1", "run.yaml: expected options, one per line"),
        ("a: [", "run.yaml: while parsing"),
        ("batch_size: [1, 2]", "run.yaml: batch_size takes one value, got [1, 2]"),
        ("schedule: [a]", "run.yaml: schedule takes one value, got ['a']"),
        ("schedule: {schedule: random}\ntrain_file: a\nvalidation_file: b", "random needs"),
    ],
)
def test_bad_files_get_one_line(tmp_path, capsys, monkeypatch, content, message):
    monkeypatch.setattr(train_module, "run", lambda options, **_: build_schedule(options, 9))
    file = _file(tmp_path, content)
    assert message in one_line_error(capsys, ["train", str(file)])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning-rat", 1], "No such option '--learning-rat'. (Did you mean one of: '--learn"),
        (["nowhere.yaml"], "No such file or directory: nowhere.yaml"),
        (["run.txt"], "run.txt: expected a .toml, .yaml, .yml or .json file"),
        (["--lr", "nan"], "nan is no number"),
        (["--warmup", "inf"], "inf is no number"),
        (["--seed", 2**63], "--seed"),
        (["--column", "text"], "--column takes ROLE=NAME, such as text=sentence, got 'text'"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--method", "full", "--state-dtype", "8bit"], "--method full uses torch's AdamW"),
        (["--method", "lora", "--packing", "on"], "--packing on is for the progressive methods"),
        (["--method", "lora", "--cache", "auto"], "--cache is for the progressive methods"),
        (["--schedule", "random", "--stages", 2], "are for the progressive schedule"),
        (["--load-in-4bit"], "--load-in-4bit needs --method lora"),
        (["--master-weights"], "--master-weights needs --precision bf16-pure"),
        (["--bf16", "--precision", "fp32"], "--bf16 True and --precision fp32 exclude each other"),
        (["--fp16", "--precision", "bf16"], "--fp16 and --precision bf16 exclude each other"),
        (["--tokens-per-batch", 99, "--batch-size", 4], "--tokens-per-batch and --batch-size"),
        (["--early-stopping-patience", 1, "--eval-strategy", "no"], "need evaluations"),
        (["--load-best-model-at-end", "--save-strategy", "no"], "needs checkpoints"),
        (["--dataloader-drop-last"], "--dataloader-drop-last is left to the command"),
        (["--resume-from-checkpoint", "x"], "--resume goes on from the newest checkpoint"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--device", "tpu"], "--device is auto, cpu, cuda or cuda:1, got 'tpu'"),
    ],
)
def test_bad_calls_get_one_line(tmp_path, capsys, monkeypatch, extra, message):
    monkeypatch.chdir(tmp_path)
    _file(tmp_path, "", "run.txt")
    assert message in one_line_error(capsys, ["train", *DATA, *map(str, extra)])


def test_arguments_of_the_trainer(parsed, tmp_path):
    options = parsed(*DATA, "--output", tmp_path, "--lr", 1e-3, "--batch-size", 4, "--bf16")
    args = training_arguments(options, seed=7)
    assert (args.learning_rate, args.weight_decay, args.seed) == (1e-3, 0.01, 7)
    assert args.per_device_eval_batch_size == 4 and args.report_to == []
    assert args.bf16 and args.eval_strategy == "no" and args.save_steps == 200
    if not torch.cuda.is_available():
        assert args.use_cpu and not training_arguments(parsed(*DATA)).bf16
    best = parsed(*DATA, "--load-best-model-at-end", "--output", tmp_path)
    args = training_arguments(best)
    assert args.load_best_model_at_end and args.metric_for_best_model == "loss"
    assert args.greater_is_better is False
    every = ("--eval-strategy", "epoch", "--save-strategy", "epoch", "--load-best-model-at-end")
    lowest = parsed(*DATA, *every, "--metric-for-best-model", "perplexity", "--output", tmp_path)
    assert training_arguments(lowest).greater_is_better is False
    stops = parsed(*DATA, "--early-stopping-patience", 1, "--output", tmp_path)
    assert training_arguments(stops).metric_for_best_model == "loss"
    with pytest.raises(UserError, match="--fp16 needs a GPU"):
        training_arguments(parsed(*DATA, "--fp16", "--device", "cpu", "--output", tmp_path))
    generates = parsed(*DATA, "--predict_with_generate", "--output", tmp_path)
    assert training_arguments(generates, Seq2SeqTrainingArguments).predict_with_generate
    with pytest.raises(UserError, match="predict_with_generate is no option of TrainingArguments"):
        training_arguments(generates)
    with pytest.raises(UserError, match="warm"):
        training_arguments(parsed(*DATA, "--lr_scheduler_type", "warm", "--output", tmp_path))


def test_one_gpu_of_several_is_the_only_one_that_cuda_shows(parsed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for shown, device, left in (("", "cuda:1", "1"), ("5,6,7,8", "cuda:1", "6"), ("", "auto", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        parsed(*DATA, "--device", device)
        assert torch.cuda.os.environ["CUDA_VISIBLE_DEVICES"] == left


def test_yaml_is_plain():
    options = TrainOptions(train_file=("a",), trainer={"report_to": ("none",)})
    assert yaml.safe_load(as_yaml(options))["train_file"] == ["a"]
