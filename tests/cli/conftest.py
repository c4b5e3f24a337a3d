"""A small run of `progtuning train` for the tests of the command."""

from __future__ import annotations

import pytest


@pytest.fixture
def call(model_folders, text_files, tmp_path):
    """Arguments of a small run on the tiny BERT, and the function that adds to them."""

    def build(*extra: object, model: str = "bert", output: str = "run") -> list[str]:
        fixed = {
            "--train-file": text_files[0],
            "--validation-file": text_files[1],
            "--model": model_folders[model],
            "--output": tmp_path / output,
            "--batch-size": 8,
            "--lr": 3e-3,
            "--max-length": 16,
        }
        # options of files add up
        own = [x for pair in fixed.items() if pair[0] not in extra for x in pair]
        return ["train", *map(str, (*own, *extra))]

    return build
