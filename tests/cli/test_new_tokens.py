"""`--add-tokens` and `--train-new-tokens`: what trains, what is saved, and what is refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from cli_calls import broken_off, one_line_error
from tiny_folders import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from progtuning_kernels.cli.app import main

TOKENS = ["<a>", "<b c>", "<d>", "<e>", "<,>"]
FIRST = 94  # of their ids; the models have 97 rows
IN_ROWS = [FIRST, FIRST + 2]


@pytest.fixture(scope="module")
def files(tmp_path_factory, text_files):
    """Rows with two of five new tokens, the tokens, and a model with a head of its own."""
    folder = tmp_path_factory.mktemp("new-tokens")
    for path in text_files:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps({"text": f"<a> {row['text']} <d>"}) for row in rows]
        (folder / path.name).write_text("\n".join(lines) + "\n")
    (folder / "tokens.txt").write_text("\n".join(TOKENS) + "\n\n")
    save_model(folder / "llama", "llama-causal-lm")
    save_model(folder / "gpt2", "gpt2-causal-lm")
    return folder


@pytest.fixture
def run(files, tmp_path):
    def arguments(name: str, method: str, *extra: object, output: str = "run") -> list[str]:
        fixed = ["--train-file", files / "train.jsonl", "--validation-file"]
        fixed += [files / "validation.jsonl", "--task", "causal-lm", "--model", files / name]
        fixed += ["--output", tmp_path / output, "--batch-size", 8, "--lr", 3e-3, "--max-length"]
        fixed += [16, "--max-steps", 6, "--checkpoint-every", 4, "--method", method]
        fixed += ["--add-tokens", files / "tokens.txt", "--device", "cpu", *extra]
        return ["train", *map(str, fixed)]

    return arguments


def both(model) -> list[torch.Tensor]:
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    return [layer.weight.detach() for layer in layers]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    ("name", "method"),
    [("gpt2", "progressive"), ("llama", "progressive-lora"), ("llama", "lora")],
)
def test_rows_of_new_tokens_train_and_no_others(run, files, tmp_path, name, method):
    wanted = run(name, method, "--train-new-tokens")
    main(wanted)
    folder = tmp_path / "run/model"
    model, start = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, files / name))
    if method == "progressive-lora":
        again = run(name, method, "--train-new-tokens", output="again")
        with broken_off(5):
            main(again)
        main([*again, "--resume"])
        resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "again/model").state_dict()
        assert all(torch.equal(w, resumed[n]) for n, w in model.state_dict().items())
    for found, before in zip(both(model), both(start), strict=True):
        assert torch.equal(found[:FIRST], before[:FIRST]) and len(found) == FIRST + len(TOKENS)
    assert (both(model)[0][IN_ROWS[0]] != both(start)[0][IN_ROWS[0]]).all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == list(range(FIRST, FIRST + len(TOKENS)))

    if method != "progressive":  # the adapter holds the rows, too
        start.resize_token_embeddings(len(tokenizer))
        adapted = peft.PeftModel.from_pretrained(start, tmp_path / "run/adapter")
        merged = adapted.merge_and_unload().state_dict()
        assert all(torch.equal(w, merged[n]) for n, w in model.state_dict().items())


def test_what_a_run_says_of_its_tokens(run, tmp_path, capsys):
    main(run("llama", "progressive", "--train-new-tokens", "--stages", 1))
    said = capsys.readouterr().out
    assert "tokens added: 5, from id 94 on" in said
    assert "in no training row: 3 of the 5 tokens added" in said
    options = ["--add-tokens", "a,b,c,d,e", "--train-new-tokens", "--task", "causal-lm"]
    options += ["--max-length", "16"]
    model = str(tmp_path / "run/model/config.json")
    # of the plan, which knows no tokenizer, in a vocabulary that has the tokens of the run
    main(["plan", "--model", model, "--stages", "1", "--max-steps", "6", "--json", *options])
    plan = json.loads(capsys.readouterr().out)
    (planned,) = plan["stages"]
    assert "lm_head.weight: 5 of 104 rows train, and no others" in plan["notes"]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    whole = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").parameters()
    )
    # embeddings and LM head of 99 rows of 32, of which 5 train
    active = whole - 2 * 94 * 32
    assert metrics["stages"][0]["active_params"] == planned["trainable_params"] == active
    assert planned["gradient_bytes"] == 4 * active


def test_bad_tokens_are_refused_in_one_line(run, files, tmp_path, capsys):
    (tmp_path / "none.txt").write_text("\n \n")
    for options, message in (
        (["--add-tokens", "w3"], "'w3' is in the vocabulary already, as 7"),
        (["--add-tokens", "<x>,<x>"], "names '<x>' twice"),
        (["--add-tokens", " , "], "names no token"),
        (["--add-tokens", tmp_path / "none.txt"], "names no token"),
        (["--add-tokens", "missing.txt"], "missing.txt: there is no such file"),
        (["--train-new-tokens", "--method", "full"], "--method full trains every row"),
        (["--method", "lora"], "would stay as they were drawn: give --train-new-tokens"),
        (["--embeddings", "never"], "take first_stage or always"),
    ):
        line = one_line_error(capsys, run("gpt2", "progressive", *options))
        assert message in line
    without = [a for a in run("gpt2", "progressive") if a != str(files / "tokens.txt")]
    without.remove("--add-tokens")
    assert "rows of --add-tokens" in one_line_error(capsys, [*without, "--train-new-tokens"])
