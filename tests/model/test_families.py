"""Discovery: the block list, and what lies before and after it, proved by execution order."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from tiny_models import MODELS, tiny_inputs, tiny_model
from torch import nn

from progtuning_kernels import UnsupportedModelError
from progtuning_kernels.model.families import Family, register_family
from progtuning_kernels.model.layout import EMBEDDINGS, find_layout, parameter_slots


class _Plain(nn.Module):
    """A user's own model: no config, experts inside the blocks, a bare parameter in front."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(8))
        self.embed = nn.Linear(8, 8)
        self.layers = nn.ModuleList(self._block() for _ in range(3))
        self.out = nn.Linear(8, 2)

    @staticmethod
    def _block() -> nn.Module:
        block = nn.Linear(8, 8)
        block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        return block


class _Markable(nn.Linear):
    """A block as transformers marks them: it can be checkpointed."""

    gradient_checkpointing = False


def _stack(length: int) -> nn.ModuleList:
    return nn.ModuleList(_Markable(8, 8) for _ in range(length))


class _Encoder(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.embed, self.layers, self.norm = nn.Linear(8, 8), _stack(length), nn.LayerNorm(8)


class _TextFirst(nn.Module):
    """The language model is registered first, and reads what the vision tower computes."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model, self.vision_tower = _Encoder(3), _Encoder(2)
        self.projector = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 8)


@pytest.fixture
def table(monkeypatch):
    """A table of families of the test's own."""
    monkeypatch.setattr("progtuning_kernels.model.families.FAMILIES", table := {})
    monkeypatch.setattr("progtuning_kernels.model.layout.FAMILIES", table)
    return table


@pytest.mark.parametrize("name", [n for n in MODELS if not n.endswith("contrastive")])
def test_units_follow_the_order_of_execution(name):
    model = tiny_model(name)
    layout = find_layout(model)
    assert layout.num_blocks == 4
    blocks = [model.get_submodule(path) for path in layout.block_paths]
    done = []  # how many blocks had finished when a module with parameters of its own first ran
    ran: dict[str, int] = {}
    for block in blocks:
        block.register_forward_hook(lambda *_: done.append(1))

    def note(path: str) -> None:
        ran.setdefault(path, len(done))

    for path, module in model.named_modules():
        if module._parameters:
            module.register_forward_pre_hook(lambda *_, path=path: note(path))
    model(**tiny_inputs(name))
    checked = 0
    for slot in parameter_slots(model, layout):
        path = slot.name.rpartition(".")[0]
        if path not in ran:
            continue
        unit = layout.unit_of(slot.name)
        inside = any(slot.name.startswith(block + ".") for block in layout.block_paths)
        if unit == EMBEDDINGS:  # before a stack: those of a decoder run after the encoder
            assert ran[path] in {stack.first for stack in layout.stacks}, slot.name
        elif inside or len(slot.units) > 1:
            assert ran[path] == unit, slot.name
        else:  # the head, or what follows the last block of an encoder
            assert ran[path] == min(unit + 1, layout.head), slot.name
        checked += 1
    assert checked >= 4 * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-causal-lm", [(EMBEDDINGS, 4)]),
        ("bert-masked-lm", [(EMBEDDINGS, 4)]),
        ("bert-qa", []),
        ("bart-seq2seq-lm", [(EMBEDDINGS, 4)]),
        ("t5-seq2seq-lm", [(EMBEDDINGS, 4), (0, 1), (2, 3)]),
        ("deberta-v2-sequence", [(0, 1, 2, 3)] * 3),
        ("mpnet-sequence", [(0, 1, 2, 3)]),
    ],
)
def test_tied_and_shared_weights_have_every_unit_that_uses_them(name, expected):
    model = tiny_model(name)
    layout = find_layout(model)
    shared = [s for s in parameter_slots(model, layout) if len(s.units) > 1]
    assert [s.units for s in shared] == expected
    total = sum(s.parameter.numel() for s in parameter_slots(model, layout))
    assert total == sum(p.numel() for p in model.parameters())


def test_a_model_that_nobody_listed():
    layout = find_layout(_Plain())
    assert layout.stacks[0].path == "layers" and layout.num_blocks == 3
    assert layout.unit_of("position") == EMBEDDINGS
    assert layout.unit_of("embed.weight") == EMBEDDINGS
    assert layout.unit_of("layers.1.experts.4.bias") == 1
    assert layout.unit_of("out.bias") == layout.head


def test_a_language_model_comes_after_the_towers_that_it_reads():
    layout = find_layout(_TextFirst())
    assert [s.path for s in layout.stacks] == ["vision_tower.layers", "language_model.layers"]
    assert [list(s.blocks) for s in layout.stacks] == [[0, 1], [2, 3, 4]]
    for name, unit in (
        ("vision_tower.embed.weight", EMBEDDINGS),
        ("vision_tower.layers.1.weight", 1),
        ("vision_tower.norm.weight", 1),
        ("projector.weight", 1),
        ("language_model.embed.weight", EMBEDDINGS),
        ("language_model.layers.0.weight", 2),
        ("language_model.norm.weight", layout.head),
    ):
        assert layout.unit_of(name) == unit, name


def test_the_depth_in_the_config_chooses_among_lists():
    model = _TextFirst()
    model.config = SimpleNamespace(num_hidden_layers=3)
    layout = find_layout(model)
    assert [s.path for s in layout.stacks] == ["language_model.layers"]
    model.config = SimpleNamespace(num_hidden_layers=3, is_encoder_decoder=True)
    assert len(find_layout(model).stacks) == 2


def test_an_encoder_by_the_name_of_a_base_model_is_none():
    model = nn.Module()
    model.base_model_prefix = "model"
    model.embeddings, model.model, model.norm = nn.Linear(8, 8), nn.Module(), nn.LayerNorm(8)
    model.model.layer = _stack(3)
    layout = find_layout(model)
    assert layout.unit_of("embeddings.weight") == EMBEDDINGS
    assert layout.unit_of("norm.weight") == layout.head
    model.model = _Encoder(3)  # with embeddings of its own it is one
    assert find_layout(model).unit_of("embeddings.weight") == 3


def test_lists_named_by_a_family(table):
    model = _TextFirst()
    model.config = SimpleNamespace(model_type="homemade")
    table["homemade"] = Family(blocks=("language_model.layers", "vision_tower.layers"))
    assert [s.path for s in find_layout(model).stacks] == [
        "language_model.layers",
        "vision_tower.layers",
    ]
    model.vision_tower.gates = _stack(2)
    table["homemade"] = Family(blocks=("vision_tower.layers",), beside=("gates",))
    layout = find_layout(model)
    assert layout.module_paths(1) == ("vision_tower.layers.1", "vision_tower.gates.1")
    assert layout.unit_of("vision_tower.gates.0.weight") == 0


def test_a_second_rule_adds_to_the_first(table):
    model = _Plain()
    model.late, model.later = nn.Linear(8, 8), nn.Linear(8, 8)
    register_family("_Plain", embeddings=r"^late\.", beside="gates")
    family = register_family("_Plain", embeddings=r"^later\.", beside=["norms"])
    assert family.beside == ("gates", "norms")
    layout = find_layout(model)
    assert [layout.unit_of(f"{name}.bias") for name in ("late", "later", "out")] == [-1, -1, 3]
    assert register_family("_Plain", embeddings=r"^late\.", beside="gates") == family
    assert table == {"_Plain": family}


def test_rules_count_for_a_class_and_for_what_is_derived_from_it(table):
    class Derived(_Plain):
        pass

    register_family("_Plain", head=r"(^|\.)embed\.")
    whole = nn.Module()
    whole.first, whole.inner = nn.Linear(8, 8), Derived()
    assert find_layout(Derived()).unit_of("embed.weight") == 3
    assert find_layout(whole).unit_of("inner.embed.weight") == 3
    assert find_layout(_TextFirst()).unit_of("vision_tower.embed.weight") == EMBEDDINGS


def test_a_rule_names_a_part_and_the_closest_rule_counts(table):
    model = _Plain()
    model.out = nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    register_family("_Plain", embeddings=r"^out\.1\.")
    layout = find_layout(model)
    assert layout.module_paths(EMBEDDINGS) == ("embed", "out.1")
    assert layout.module_paths(layout.head) == ("out.0",)
    register_family("_Plain", head=r"^out\.1\.0\.", embeddings=r"^out\.0\.bias$")
    layout = find_layout(model)
    units = {name: layout.unit_of(name) for name, _ in model.out.named_parameters(prefix="out")}
    assert units == {
        "out.0.weight": layout.head,
        "out.0.bias": EMBEDDINGS,
        "out.1.0.weight": layout.head,
        "out.1.0.bias": layout.head,
        "out.1.1.weight": EMBEDDINGS,
        "out.1.1.bias": EMBEDDINGS,
    }
    # a parameter alone: nothing runs without autograd for its sake
    assert layout.module_paths(EMBEDDINGS) == ("embed", "out.1.1")


def test_lists_of_lists_and_single_modules_are_blocks():
    model = _Plain()
    model.layers = nn.ModuleList([_stack(2), _stack(1), nn.Linear(8, 8)])
    layout = find_layout(model, "layers")
    assert layout.block_paths == ("layers.0.0", "layers.0.1", "layers.1.0", "layers.2")
    layout = find_layout(model, ["embed", "layers.0", "out"])
    assert layout.block_paths == ("embed", "layers.0.0", "layers.0.1", "out")
    assert layout.unit_of("layers.1.0.weight") == 2 and layout.unit_of("out.bias") == 3
    for blocks in (["layers", "layers.1"], ["layers.0.1", "layers.0"], ["embed", "embed"]):
        with pytest.raises(UnsupportedModelError, match="twice"):
            find_layout(model, blocks)


def test_what_stands_between_stages_belongs_to_the_stage_before():
    model = nn.Module()
    model.shrink = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
    model.stages = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(3))
    model.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
    layout = find_layout(model)
    assert [s.path for s in layout.stacks] == ["stages.0", "stages.1", "stages.2"]
    assert [layout.unit_of(f"shrink.{i}.bias") for i in range(3)] == [EMBEDDINGS, 1, 3]
    assert [layout.unit_of(f"norms.{i}.bias") for i in range(3)] == [1, 3, layout.head]


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (lambda: hf.MobileViTModel(hf.MobileViTConfig()), "encoder.layer"),
        (lambda: hf.SwiftFormerModel(hf.SwiftFormerConfig()), "encoder.network"),
        (lambda: hf.MgpstrForSceneTextRecognition(hf.MgpstrConfig()), "mgp_str.encoder.blocks"),
    ],
)
def test_one_list_that_is_most_of_a_model_holds_its_blocks(model, path):
    with torch.device("meta"):
        assert [s.path for s in find_layout(model()).stacks] == [path]


def test_blocks_of_a_sequential_go_by_their_names():
    model = _Plain()
    model.layers = nn.Sequential(OrderedDict(low=nn.Linear(8, 8), high=nn.Linear(8, 8)))
    layout = find_layout(model, "layers")
    assert layout.block_paths == ("layers.low", "layers.high")
    assert layout.unit_of("layers.high.weight") == 1


def test_block_10_is_not_block_1():
    model = hf.BertModel(hf.BertConfig(hidden_size=8, num_hidden_layers=12, num_attention_heads=2))
    layout = find_layout(model)
    assert layout.unit_of("encoder.layer.10.output.dense.weight") == 10


def test_opt_registers_its_final_norm_before_the_blocks():
    config = hf.OPTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=16,
        vocab_size=50,
        word_embed_proj_dim=8,
    )
    layout = find_layout(hf.OPTForCausalLM(config))
    assert layout.unit_of("model.decoder.final_layer_norm.weight") == layout.head
    assert layout.unit_of("model.decoder.project_out.weight") == layout.head
    assert layout.unit_of("model.decoder.project_in.weight") == EMBEDDINGS
    assert "model.decoder.final_layer_norm" not in layout.module_paths(EMBEDDINGS)


def test_udop_registers_its_embedding_of_boxes_after_the_blocks():
    with torch.device("meta"):
        layout = find_layout(hf.UdopModel(hf.UdopConfig(num_layers=2)))
    assert layout.unit_of("encoder.cell_2d_embedding.x_position_embeddings.weight") == EMBEDDINGS


def test_refusals_are_one_clear_line():
    albert = hf.AlbertForSequenceClassification(
        hf.AlbertConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            embedding_size=8,
            vocab_size=50,
        )
    )
    shared = _Plain()
    shared.layers[2] = shared.layers[0]
    two = nn.ModuleDict({"a": _Plain(), "b": _Plain()})
    for model, blocks, message in (
        (albert, None, "share weights"),
        (shared, None, r"share weights \(blocks \[0, 2\]"),
        (nn.Linear(3, 3), None, "no list of blocks found"),
        (two, None, r"cannot tell which list holds the blocks among a.layers \(3\), b.layers"),
        (two, "b.layer", "has no module at 'b.layer'"),
        (two, "b.out", "is a Linear, not a list of blocks"),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            find_layout(model, blocks)
        assert "\n" not in str(caught.value)
    assert find_layout(two, "b.layers").num_blocks == 3


def test_a_rule_may_be_given_for_a_class(monkeypatch):
    class Late(nn.Module):
        pass

    monkeypatch.setattr("progtuning_kernels.model.families.FAMILIES", table := {})
    register_family(Late, embeddings=r"^late\.")
    assert table["Late"].embeddings == r"^late\."
    with pytest.raises(TypeError, match="a model_type or a class, not None"):
        register_family(None, embeddings=r"^late\.")
