"""`progtuning plan`: folders and config files without weights, and every bad call one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import transformers
import yaml
from cli_calls import one_line_error

from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.plan_command import parse_bytes

_SMALL = ["--seq-len", "16", "--batch-size", "4", "--device", "cpu", "--stages", "2"]


def _planned(capsys, *arguments: object) -> dict:
    """The plan of one stage: a stage more takes half a second."""
    capsys.readouterr()
    main(["plan", *_SMALL, "--stages", "1", "--json", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def test_table_of_a_folder(model_folders, capsys):
    arguments = ["--stages", "4", "--steps", "40", "--memory", "1GiB", "--cache", "auto"]
    main(["plan", "--model", str(model_folders["bert"]), *_SMALL, *arguments])
    out = capsys.readouterr().out
    assert "BertForSequenceClassification, 4 blocks, 4 rows of 16 tokens" in out
    assert "embeddings, blocks 0-3, head" in out and "blocks 3, head" in out
    assert "the peak is stage 1" in out and "fits in 1.00 GiB" in " ".join(out.split())
    assert "cache row" in out and "gradient checkpointing" in out
    assert max(map(len, out.splitlines())) <= 80


def test_ranks_share_the_model_and_the_memory_that_is_needed(model_folders, capsys):
    model = ["--model", str(model_folders["bert"])]
    alone = _planned(capsys, *model)["stages"][0]
    ddp = _planned(capsys, *model, "--ranks", 4)["stages"][0]
    assert alone["traffic"] is None and ddp["weight_bytes"] == alone["weight_bytes"]
    assert ddp["peak_bytes"] == alone["peak_bytes"] + alone["gradient_bytes"]  # the buckets
    assert ddp["traffic"]["sent_bytes"] == 1.5 * alone["gradient_bytes"]
    main(["plan", *model, *_SMALL, "--ranks", "4", "--strategy", "fsdp2", "--memory", "1GiB"])
    out = capsys.readouterr().out
    assert "on each of 4 ranks" in out and "again in backward" in out and "sent: 3/4 of" in out
    assert max(map(len, out.splitlines())) <= 80
    memory = next(
        line.split() for line in out.splitlines() if line.startswith("1  ") and "yes" in line
    )
    weights, peak = float(memory[1]), float(memory[-2])
    assert weights < alone["weight_bytes"] / 2**20 / 3 and peak < alone["peak_bytes"] / 2**20


def test_a_config_file_is_enough(model_folders, tmp_path, capsys):
    shutil.copy(model_folders["gpt2"] / "config.json", tmp_path / "config.json")
    whole = _planned(capsys, "--model", model_folders["gpt2"])
    plan = _planned(capsys, "--model", tmp_path / "config.json")
    assert plan == whole
    assert plan["title"].startswith("GPT2LMHeadModel")  # as the config says
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folders["gpt2"])
    assert plan["full"]["trainable_params"] == sum(p.numel() for p in model.parameters())
    classified = _planned(capsys, "--model", tmp_path / "config.json", "--task", "classification")
    assert classified["title"].startswith("GPT2ForSequenceClassification")


def test_options_reach_the_plan(model_folders, capsys):
    model = ["--model", model_folders["bert"]]
    plain = _planned(capsys, *model)
    stage = plain["stages"][0]
    small = ["--precision", "bf16-pure", "--state-dtype", "bf16", "--embeddings", "never"]
    changed = _planned(capsys, *model, *small)["stages"][0]
    for field in ("weight_bytes", "state_bytes", "trainable_params", "activation_bytes"):
        assert changed[field] < stage[field], field
    masters = ["--precision", "bf16-pure", "--master-weights", "--in-backward"]
    changed = _planned(capsys, *model, *masters, "--gradient-checkpointing")["stages"][0]
    assert changed["state_bytes"] == pytest.approx(1.5 * stage["state_bytes"], rel=0.01)
    assert changed["gradient_bytes"] < stage["gradient_bytes"] / 4
    assert changed["activation_bytes"] < stage["activation_bytes"] / 4
    fused = ["--model", model_folders["bert-without-dropout"]]  # whose kernel keeps its mask
    with_mask, without = (_planned(capsys, *fused, *more) for more in ([], ["--no-padding"]))
    assert without["full"]["activation_bytes"] < with_mask["full"]["activation_bytes"]
    packed = _planned(capsys, *model, "--real-tokens", "0.5")
    assert 0.4 < packed["stages"][0]["step_ratio"] < 0.55 and packed["full"] == plain["full"]
    unpacked = _planned(capsys, *model, "--real-tokens", "0.5", "--packing", "off")
    assert unpacked["stages"] == plain["stages"]
    cast = _planned(capsys, *model, "--bf16")
    assert "autocast to bfloat16" in cast["title"]
    assert cast["stages"][0]["activation_bytes"] < stage["activation_bytes"]
    assert cast["stages"][0]["state_bytes"] == stage["state_bytes"]
    calibrated = _planned(capsys, *model, "--calibrate")
    assert calibrated["calibrated"] and calibrated["stages"][0]["step_ms"] > 0


def test_state_on_the_host_by_the_names_of_python(model_folders, capsys):
    model = ["--model", model_folders["bert"]]
    same = [
        ["--dtype", "bf16", "--optimizer", "adamw-8bit"],
        ["--precision", "bf16-pure", "--state-dtype", "8bit"],
    ]
    moved = ["--state-device", "cpu", "--device", "auto", "--pcie", "2", "--host-bandwidth", "4"]
    one, other = (_planned(capsys, *model, *names, *moved, "--in-backward") for names in same)
    assert one == other and "bfloat16, adamw-8bit on the host, in backward" in one["title"]
    stage = one["stages"][0]
    host = stage["host"]
    assert stage["state_bytes"] == 0 and host["weight_bytes"] == 2 * stage["trainable_params"]
    assert host["to_device_s"] == pytest.approx(host["to_device_bytes"] / 2e9)
    assert host["update_s"] == pytest.approx(host["update_bytes"] / 4e9)
    assert "attention on cuda" in one["notes"][0]  # auto is a GPU, as the state is apart from it
    main(
        ["plan", *map(str, [*model, *_SMALL, *moved]), "--memory", "1GB", "--method", "progressive"]
    )
    out = capsys.readouterr().out
    assert "in host memory, and what a step sends and updates, in MiB:" in out
    assert "the peak of stage 1, in MiB:" in out and "of host memory" in out
    assert max(map(len, out.splitlines())) <= 80


def test_methods_and_schedules(model_folders, tmp_path, capsys):
    model = ["--model", model_folders["bert"]]
    full = _planned(capsys, *model, "--method", "full", "--steps", 9)
    assert [stage["step_ratio"] for stage in full["stages"]] == [1.0]
    lora = _planned(capsys, *model, "--method", "progressive-lora", "--stages", 2, "--steps", 8)
    assert lora["title"].startswith("PeftModelForSequenceClassification, 4 blocks")
    assert lora["stages"][1]["trainable_params"] < lora["stages"][0]["trainable_params"] < 20_000
    file = tmp_path / "run.yaml"  # a file of train, with more in it than a plan needs
    file.write_text(
        "train_file: a\nlr: 1\nstages: 2\nschedule: {schedule: cyclic, blocks: 1, period: 2}\n"
    )
    assert "--stages and --embeddings are for" in one_line_error(capsys, ["plan", str(file)])
    whole = _SMALL[:-2] + ["--stages", "3", "--json"]  # as the default is
    main(["plan", *map(str, model), *whole, "--schedule", "random", "--max-steps", "6000"])
    long = json.loads(capsys.readouterr().out)
    assert len(long["stages"]) == 20 and long["total_steps"] == 400
    assert "the first 20 stages, of 6,000 steps" in long["notes"]
    main(["plan", *map(str, model), *whole, "--schedule", "adaptive", "--max-steps", "9"])
    adaptive = json.loads(capsys.readouterr().out)
    assert len(adaptive["stages"]) == 1 and "decided in training" in adaptive["notes"][-1]
    stalls = tmp_path / "stalls.json"
    stalls.write_text('{"schedule": "plateau", "stages": ["-1", "-2--1"]}')
    main(["plan", *map(str, model), *whole, "--schedule", str(stalls), "--max-steps", "9"])
    equal = json.loads(capsys.readouterr().out)
    assert [s["steps"] for s in equal["stages"]] == [1, 1] and not equal["length_known"]
    main(["plan", *map(str, model), *whole, "--schedule", "0-1"])  # of any length
    assert json.loads(capsys.readouterr().out)["stages"][0]["trains"] == "blocks 0-1, head"


def test_a_dry_run_of_train_shows_the_shares_of_the_plan(model_folders, tmp_path, capsys):
    lengths = [10] * 6 + [4] * 2
    rows = [{"text": " ".join(["w1"] * n), "label": "ab"[i % 2]} for i, n in enumerate(lengths)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", model_folders["bert"], "--stages", 4, "--batch-size", 4]
    data = ["--train-file", file, "--validation-file", file, "--epochs", 2, "--max-length", 32]
    capsys.readouterr()
    host = ["--state-device", "cpu"]
    main(["train", *map(str, [*common, *data]), "--device", "cpu", "--dry-run", *host])
    out = capsys.readouterr().out
    assert "state_device='cpu' changes nothing where the device is a CPU" in out
    whole = yaml.safe_load(out)  # the table is a comment
    assert whole["stages"] == 4 and whole["train_file"] == [str(file)]
    table = re.findall(r"^# (\d) +(\d+) .*M +\S+ +([\d.]+)$", out, re.MULTILINE)
    assert [steps for _, steps, _ in table] == ["1"] * 4  # 2 steps an epoch
    # two batches: 4 rows of 10 tokens, and 2 of 10 with 2 of 4
    assert "blocks compute on 85% of the places" in out
    shape = ["--seq-len", 10, "--steps", 4, "--real-tokens", 0.85]
    plan = _planned(capsys, *common, *shape)
    assert [float(ratio) for _, _, ratio in table] == pytest.approx(
        [stage["step_ratio"] for stage in plan["stages"]], abs=0.001
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model", "nowhere/at-all"], "cannot load the config of 'nowhere/at-all'"),
        (["--stages", "3", "--schedule", "random"], "need the length of the run: --max-steps"),
        (["--stages", "5"], "stages=5 is more than the 4 blocks there are"),
        (["--steps", "1"], "total_steps=1 is fewer than stages=2"),
        (["--seq-len", "64"], "--max-length 64 is above the model's 32 tokens"),
        (["--memory", "9" * 400 + "GB"], "is no size of memory"),
        (["--memory", "lots"], "'lots' is no size of memory: give one such as 24GiB"),
        (["--blocks", "bert.layers"], "has no module at 'bert.layers'"),
        (["--state-dtype", "sgd"], "--state-dtype"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--batch-size", "0"], "--batch-size"),
        (["--real-tokens", "0"], "--real-tokens"),
        (["--real-tokens", "nan"], "--real-tokens"),
        (
            ["--dtype", "fp32", "--precision", "bf16"],
            "--dtype fp32 and --precision bf16 exclude each",
        ),
        (["--state-device", "cpu", "--ranks", "2"], "is planned for one rank: leave ranks=2 out"),
        (["--state-device", "cpu", "--method", "full"], "--state-device is for the progressive"),
        (["--pcie", "nan"], "--pcie"),
        (["--pcie", "50"], "--pcie is of the state on the host: give --state-device cpu as well"),
        (["--host-bandwidth", "50"], "--host-bandwidth is of the state on the host"),
        (["--memory", "24"], "'24' would be 24 bytes: give a unit, such as 24GiB"),
        (["--strategy", "fsdp2"], "strategy 'fsdp2' is for several ranks: give ranks, too"),
        (
            ["--ranks", "2", "--strategy", "zero2", "--state-dtype", "8bit"],
            "ZeRO takes torch.optim.AdamW",
        ),
    ],
)
def test_bad_calls_get_one_line(model_folders, capsys, extra, message):
    model = ["--model", str(model_folders["bert"])]
    assert message in one_line_error(capsys, ["plan", *model, *_SMALL, *extra])


def test_models_that_count_positions_in_other_ways(capsys, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    roberta = transformers.RobertaConfig(**sizes, intermediate_size=16, max_position_embeddings=34)
    roberta.save_pretrained(tmp_path / "roberta")
    arguments = ["plan", "--model", str(tmp_path / "roberta"), "--seq-len"]
    assert "33 is above the model's 32 tokens" in one_line_error(capsys, [*arguments, "33"])
    sizes = {"d_model": 16, "n_layer": 4, "n_head": 2, "d_inner": 16}
    transformers.XLNetConfig(**sizes).save_pretrained(tmp_path / "xlnet")  # which says -1
    main(["plan", "--model", str(tmp_path / "xlnet"), "--seq-len", "32"])
    assert "XLNet" in capsys.readouterr().out


def test_a_plan_needs_no_package_of_training():
    code = (
        "import sys; sys.modules |= dict.fromkeys(['datasets', 'sklearn', 'peft', 'trl'])\n"
        "from progtuning_kernels.cli.models import auto_class\n"
        "from progtuning_kernels.cli import plan_command\n"
        "from progtuning_kernels.cli.tasks import TASKS\n"
        "print(*(auto_class(task).__name__ for task in TASKS))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "AutoModelForCausalLM" in out.stdout and "AutoModelForMaskedLM" in out.stdout


def test_help_has_an_example(capsys):
    main(["plan", "--help"])
    assert "Example: progtuning plan --model" in capsys.readouterr().out


def test_sizes_of_memory():
    sizes = {"24GiB": 24 << 30, "80GB": 80 * 10**9, "1.5 gib": 3 << 29, "512m": 512 * 10**6}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    assert parse_bytes("1000") == 1000
