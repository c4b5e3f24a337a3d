"""Models of `progtuning train`: heads that stay or start anew, and models that cannot be used."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from cli_calls import metrics_of, one_line_error, rows_of, weights_of

from progtuning_kernels.cli.app import main
from progtuning_kernels.cli.predict import tasks_of


@pytest.fixture
def fine_tuned(call, text_files, tmp_path):
    """A function: a classifier of `text_files` whose classes are renamed, and its accuracy."""

    def build(names: list[str]) -> tuple[Path, float]:
        main(call("--epochs", 6, output="first"))
        path = tmp_path / "first/model/config.json"
        config = json.loads(path.read_text())
        assert config["id2label"] == {"0": "high", "1": "low"}
        config["id2label"] = dict(enumerate(names))  # and nothing else, as the command advises
        path.write_text(json.dumps(config))
        return path.parent, metrics_of(tmp_path / "first")["summary"]["metric"]

    return build


@pytest.mark.parametrize(
    ("head", "high", "low"),
    [(["z", "a"], "z", "a"), (["a", "z"], "a", "z"), (["NEG", "POS"], 0, 1)],
)
def test_a_head_of_the_same_classes_goes_on(
    call, fine_tuned, text_files, tmp_path, capsys, head, high, low
):
    folder, accuracy = fine_tuned(head)
    files = []
    for path in text_files:
        text = (
            path.read_text().replace('"high"', json.dumps(high)).replace('"low"', json.dumps(low))
        )
        files.append(tmp_path / path.name)
        files[-1].write_text(text)
    capsys.readouterr()
    arguments = call("--train-file", files[0], "--validation-file", files[1], "--lr", 0)
    main([*arguments, "--model", str(folder)])
    assert metrics_of(tmp_path / "run")["summary"]["metric"] == accuracy > 0.6
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (
        list(config["id2label"].values())
        == head
        == metrics_of(tmp_path / "run")["data"]["label_names"]
    )
    said = f"the checkpoint's classes: 0 is {head[0]}, 1 is {head[1]}"
    assert (said in capsys.readouterr().out) is (head != ["a", "z"])


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        (["a", "c"], ["a", "b"]),
        (["LABEL_0", "LABEL_1"], ["a", "b"]),
        (["a", "b"], ["a", "b", "c"]),
        (["a", "b"], [0.5, 1.5]),
    ],
    ids=str,
)
def test_a_head_of_other_classes_starts_anew(call, fine_tuned, tmp_path, capsys, head, labels):
    folder, _ = fine_tuned(head)
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_of(labels))
    capsys.readouterr()
    kind = ["--problem-type", "regression"] if isinstance(labels[0], float) else []
    files = ["--train-file", path, "--validation-file", path]
    main(call(*files, *kind, "--lr", 0, "--model", folder))
    out = capsys.readouterr().out
    assert f"the head starts anew: the checkpoint's is for {', '.join(head)}" in out
    old = transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    new = weights_of(tmp_path / "run")
    assert not torch.equal(new["classifier.weight"], old["classifier.weight"])
    assert torch.equal(new["bert.pooler.dense.weight"], old["bert.pooler.dense.weight"])


def _folder(path: Path, model, tokenizer) -> Path:
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def test_a_tokenizer_larger_than_the_model(call, capsys, tmp_path, word_tokenizer):
    small = transformers.BertModel(transformers.BertConfig(**_SIZES, vocab_size=60))
    arguments = call("--model", _folder(tmp_path / "small", small, word_tokenizer))
    assert "there are 60 embeddings; model.resize_token_embeddings" in one_line_error(
        capsys, arguments
    )
    small.resize_token_embeddings(len(word_tokenizer))
    _folder(tmp_path / "small", small, None)
    main([*arguments, "--max-steps", "3"])


def test_a_folder_without_the_tokenizers_files(call, capsys, tmp_path):
    for model in ("Bert", "Roberta"):
        config = getattr(transformers, f"{model}Config")(**_SIZES, vocab_size=97)
        path = _folder(tmp_path / model, getattr(transformers, f"{model}Model")(config), None)
        error = one_line_error(capsys, call("--model", path))
        assert "no word of the texts" in error or "no token" in error


def test_weights_that_do_not_fit_get_one_line(call, capsys, tmp_path, word_tokenizer):
    model = transformers.BertModel(transformers.BertConfig(**_SIZES, vocab_size=97))
    path = _folder(tmp_path / "model", model, word_tokenizer)
    whole = json.loads((path / "config.json").read_text())
    for change, message in (
        ({"vocab_size": 120}, "word_embeddings.weight has another shape in its weights"),
        ({"num_hidden_layers": 12}, "its weights lack most of the model"),
    ):
        (path / "config.json").write_text(json.dumps(whole | change))
        assert message in one_line_error(capsys, call("--model", path))
    (path / "config.json").write_text(json.dumps(whole))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    _folder(path, model, None)
    assert "not finite before any training" in one_line_error(capsys, call("--model", path))


def test_models_that_count_positions_in_other_ways(call, capsys, tmp_path, word_tokenizer):
    unlimited = copy.deepcopy(word_tokenizer)
    unlimited.model_max_length = -1
    config = transformers.RobertaConfig(**_SIZES, vocab_size=97, max_position_embeddings=16)
    path = _folder(tmp_path / "roberta", transformers.RobertaModel(config), unlimited)
    error = one_line_error(capsys, call("--model", path, "--max-length", 15))
    assert "--max-length 15 is above the model's 14 tokens" in error
    main(call("--model", path, "--max-length", 14, "--max-steps", 3))
    sizes = {"d_model": 16, "n_layer": 4, "n_head": 2, "d_inner": 16}
    config = transformers.XLNetConfig(**sizes, vocab_size=97)
    path = _folder(tmp_path / "xlnet", transformers.XLNetModel(config), unlimited)
    main(call("--model", path, "--max-steps", 3, output="xlnet-run"))


def test_the_padding_of_the_tokenizer_decides_where_a_decoder_answers(
    call, tmp_path, model_folders
):
    losses = []
    for pad in (0, 9):
        folder = tmp_path / f"pad{pad}"
        shutil.copytree(model_folders["gpt2"], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
        main(call("--model", folder, "--lr", 0, "--max-steps", 3, output=f"run{pad}"))
        losses.append(metrics_of(tmp_path / f"run{pad}")["evaluations"][-1]["loss"])
    assert losses[0] == losses[1]


def test_end_tokens_in_a_text_that_the_model_answers_at(call, capsys, tmp_path, word_tokenizer):
    from tokenizers import processors

    ending = copy.deepcopy(word_tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", 3)]
    )
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 4, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=97, eos_token_id=3, decoder_start_token_id=0)
    path = _folder(tmp_path / "t5", transformers.T5ForConditionalGeneration(config), ending)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows_of(["a", "b"]) + '\n{"text": "w1 [SEP] w2", "label": "a"}\n')
    files = ["--train-file", rows, "--validation-file", rows]
    error = one_line_error(capsys, call("--model", path, *files))
    assert "train row 17 has '[SEP]' 2 times, train row 1 1 times" in error
    rows.write_text(rows.read_text().replace("[SEP] ", ""))
    main(call("--model", path, *files, "--max-steps", 3))


def test_models_that_cannot_be_cut_get_one_line(call, capsys, tmp_path, word_tokenizer):
    config = transformers.AlbertConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        embedding_size=8,
        vocab_size=97,
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path / "albert")
    word_tokenizer.save_pretrained(tmp_path / "albert")
    assert "share weights" in one_line_error(capsys, call("--model", tmp_path / "albert"))
    sizes = dict(d_model=16, d_head=8, d_inner=16, n_head=2, vocab_size=97)
    config = transformers.FunnelConfig(block_sizes=[2, 2], num_decoder_layers=1, **sizes)
    transformers.FunnelBaseModel(config).save_pretrained(tmp_path / "funnel")
    word_tokenizer.save_pretrained(tmp_path / "funnel")
    assert "has no module at 'funnel.encoder.layers'; name what the blocks are" in one_line_error(
        capsys, call("--model", tmp_path / "funnel", "--blocks", "funnel.encoder.layers")
    )
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    word_tokenizer.save_pretrained(tmp_path / "resnet")
    assert "cannot load model" in one_line_error(capsys, call("--model", tmp_path / "resnet"))


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("XLNetForQuestionAnsweringSimple", "question-answering"),
        ("MarianMTModel", "seq2seq"),
        ("GPT2LMHeadModel", "causal-lm"),
        ("BertForTokenClassification", "token-classification"),
    ],
)
def test_the_class_of_a_saved_model_says_its_task(architecture, task):
    assert tasks_of([architecture]) == [task]
