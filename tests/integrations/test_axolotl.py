"""The plugin for axolotl, with axolotl where it can be imported, else with a stand-in.

That is `BasePlugin` of axolotl 0.19 as far as the plugin uses it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from tiny_models import tiny_model
from trainers import rows_of, trainer_of, weights_of

pydantic = pytest.importorskip("pydantic")

YAML = """
plugins: [progtuning_kernels.integrations.axolotl.ProgtuningPlugin]
progtuning:
  schedule: progressive
  stages: 4
  packing: off
"""


class _BasePlugin:
    def get_input_args(self) -> str | None: ...

    def add_callbacks_post_trainer(self, cfg, trainer) -> list:
        return []


@pytest.fixture
def axolotl(monkeypatch):
    """The plugin's module, imported anew."""
    name = "progtuning_kernels.integrations.axolotl"
    if importlib.util.find_spec("axolotl") is None:
        base = ModuleType("axolotl.integrations.base")
        base.BasePlugin = _BasePlugin
        for part in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, part, base)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def _validated(plugin, text: str) -> SimpleNamespace:
    """The settings after axolotl's validation, which inherits from what the plugin names."""
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)

    class Base(pydantic.BaseModel):
        plugins: list

    class AxolotlInputConfig(Base, arguments):
        pass

    return SimpleNamespace(**AxolotlInputConfig(**yaml.safe_load(text)).model_dump())


def test_settings_of_the_file_train_as_the_callback_does(axolotl, tmp_path):
    module, _, name = yaml.safe_load(YAML)["plugins"][0].rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    cfg = _validated(plugin, YAML)
    weights, boundaries = [], []
    for own in (False, True):
        trainer = trainer_of(
            tmp_path,
            model=tiny_model("llama-causal-lm"),
            rows=rows_of("llama-causal-lm"),
            callbacks=[axolotl.ProgtuningCallback(_schedule(), packing="off")] if own else [],
        )
        for callback in [] if own else plugin.add_callbacks_post_trainer(cfg, trainer):
            trainer.add_callback(callback)
        trainer.train()
        weights.append(weights_of(trainer))
        boundaries.append([log["boundary"] for log in trainer.state.log_history if "loss" in log])
    assert boundaries == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert all(torch.equal(weight, weights[1][n]) for n, weight in weights[0].items())


def _schedule():
    from progtuning_kernels import ProgressiveSchedule

    return ProgressiveSchedule(4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("stages: 4", "stages: 0"), "stages must be 1 or more"),
        (("packing: off", "packng: off"), "progressive has no setting 'packng'"),
        (("packing: off", "packing: some"), "packing must be"),
        (("schedule: progressive", "schedule: none"), "schedule must be one of"),
    ],
)
def test_wrong_settings_end_with_the_validation(axolotl, changed, message):
    with pytest.raises(ValueError, match=message):
        _validated(axolotl.ProgtuningPlugin(), YAML.replace(*changed))
