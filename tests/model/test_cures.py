"""What a refusal tells to do is done to the letter, and then the model trains as frozen by hand; or
the refusal says that nothing helps.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from benchmark_scripts import load_script
from torch import nn

from progtuning_kernels import UnsupportedModelError
from progtuning_kernels.model.families import FAMILIES
from progtuning_kernels.model.layout import find_layout

architectures = load_script("architectures")

WIDTH = 4


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """A table of families that the test may add to."""
    monkeypatch.setattr("progtuning_kernels.model.families.FAMILIES", table := dict(FAMILIES))
    for user in ("layout", "cures"):
        monkeypatch.setattr(f"progtuning_kernels.model.{user}.FAMILIES", table)
    return table


def _layer() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, hidden, context=0.0):
        return hidden + self.scale * torch.tanh(self.inner(hidden + context))


def _layers(number: int = 3) -> nn.ModuleList:
    return nn.ModuleList(_Layer() for _ in range(number))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class _Model(nn.Module):
    """Embeddings, then what a trap makes of it, then the head; returns its output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.make()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # (B, C) -> (B, C)
        return {"out": self.run(x)}


class LateEmbedding(_Model):
    def make(self):
        self.layers, self.out = _layers(), nn.Linear(WIDTH, WIDTH)
        self.embed = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class EarlyHead(_Model):
    def make(self):
        self.embed, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = _layers()

    run = LateEmbedding.run


class Configured(EarlyHead):
    """With a config that says nothing of its type."""

    def make(self):
        super().make()
        self.config = SimpleNamespace(hidden_size=WIDTH)


class SomeParts(_Model):
    """One part of a child without forward is embeddings, the other head."""

    def make(self):
        self.around = nn.Module()
        self.around.first, self.around.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = _layers()

    def run(self, x):
        x = self.around.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.around.last(x)


class _Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.norm, self.inner.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner.out(x)


class PartOfTheHead(_Model):
    """The head's own norm is taken of the input."""

    def make(self):
        self.embed, self.layers, self.head = nn.Linear(WIDTH, WIDTH), _layers(), _Head()

    def run(self, x):
        x = self.head.inner.norm(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class BareParameter(_Model):
    """Registered beside a base model, and so taken for head."""

    base_model_prefix = "base"

    def make(self):
        self.base = nn.Module()
        self.base.embed, self.base.layers = nn.Linear(WIDTH, WIDTH), _layers()
        self.shift, self.out = nn.Parameter(torch.ones(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.base.embed(x) + self.shift
        for layer in self.base.layers:
            x = layer(x)
        return self.out(x)


class EarlyAndLate(_Model):
    """One norm before the blocks and after them."""

    def make(self):
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.layers, self.out = _layers(), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.norm(self.embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


class LateAndEarly(EarlyAndLate):
    def make(self):
        super().make()
        norm = self.norm
        del self.norm
        self.norm = norm


class InTheMiddle(_Model):
    """A projection between two blocks, registered before all of them."""

    def make(self):
        self.embed, self.middle = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers, self.out = _layers(4), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.embed(x)
        for i, layer in enumerate(self.layers):
            x = layer(self.middle(x) if i == 2 else x)
        return self.out(x)


class InTheMiddleLate(InTheMiddle):
    def make(self):
        super().make()
        middle = self.middle
        del self.middle
        self.middle = middle


class OtherOrder(_Model):
    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers(4)

    def run(self, x):
        x = self.embed(x)
        for i in (2, 0, 3, 1):
            x = self.layers[i](x)
        return x


class _Marked(_Layer):
    gradient_checkpointing = False


def _marked(number: int = 3) -> nn.ModuleList:
    return nn.ModuleList(_Marked() for _ in range(number))


class ReaderFirst(_Model):
    """The stack that reads the other is registered first, with its norm, and the other's last."""

    def make(self):
        self.readers, self.final = _marked(2), nn.LayerNorm(WIDTH)
        self.embed, self.writers = nn.Linear(WIDTH, WIDTH), _marked(3)
        self.between = nn.LayerNorm(WIDTH)

    def run(self, x):
        x = self.embed(x)
        for layer in self.writers:
            x = layer(x)
        x, context = x * 0.5, self.between(x)
        for layer in self.readers:
            x = layer(x, context)
        return self.final(x)


class SideBySide(_Model):
    """Two stacks that read each other at every depth."""

    def make(self):
        self.embed, self.left, self.right = nn.Linear(WIDTH, WIDTH), _marked(), _marked()

    def run(self, x):
        left = right = self.embed(x)
        for one, other in zip(self.left, self.right, strict=True):
            left = one(left, right)
            right = other(right, left)
        return left + right


class Towers(_Model):
    def make(self):
        self.left, self.right = (nn.ModuleDict({"layers": _layers()}) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        left = right = x
        for one, other in zip(self.left["layers"], self.right["layers"], strict=True):
            left, right = one(left), other(right)
        return self.out(left * right)


class Attributes(_Model):
    """Layers held one by one."""

    def make(self):
        self.embed, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer1, self.layer2, self.layer3 = _Layer(), _Layer(), _Layer()

    def run(self, x):
        return self.out(self.layer3(self.layer2(self.layer1(self.embed(x)))))


class Sequences(_Model):
    """Stages that are sequences, as those of a ResNet."""

    def make(self):
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.stage1 = nn.Sequential(_Layer(), _Layer())
        self.stage2 = nn.Sequential(_Layer(), _Layer())
        self.out = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        return self.out(self.stage2(self.stage1(self.stem(x))))


class NamedLayers(_Model):
    def make(self):
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleDict({"low-1": _Layer(), "high-2": _Layer()})
        self.out = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return self.out(x)


class Whole(nn.Sequential):
    """The model itself is a sequence."""

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh(), _Layer(), _Layer())

    def forward(self, x):
        return {"out": super().forward(x)}


class Mixed(_Model):
    """A small list beside the layers, which stand in a sequence of several kinds."""

    def make(self):
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), _Layer(), nn.Tanh(), _Layer())
        self.heads = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)])

    def run(self, x):
        x = self.body(x)
        return self.heads[0](x) + self.heads[1](x)


class OnlyLinears(_Model):
    def make(self):
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        return self.second(torch.tanh(self.first(x)))


class SharedInside(_Model):
    """All blocks hold one module."""

    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()
        for layer in self.layers:
            layer.inner = self.layers[0].inner
        self.out = nn.Linear(WIDTH, WIDTH)

    run = LateEmbedding.run


class SharedTensor(_Model):
    """Two blocks hold one tensor."""

    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()
        self.layers[2].inner.weight = self.layers[0].inner.weight
        self.out = nn.Linear(WIDTH, WIDTH)

    run = LateEmbedding.run


class Twice(_Model):
    """One module as two blocks."""

    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()
        self.layers.append(self.layers[0])

    def run(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Loop(_Model):
    def make(self):
        self.embed, self.layers = nn.Linear(WIDTH, WIDTH), _layers()

    def run(self, x):
        x = self.embed(x)
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return x


class OneLinear(_Model):
    def make(self):
        self.only = nn.Linear(WIDTH, WIDTH)

    def run(self, x):
        return self.only(x)


CURED = [
    LateEmbedding,
    EarlyHead,
    Configured,
    SomeParts,
    PartOfTheHead,
    EarlyAndLate,
    LateAndEarly,
    InTheMiddle,
    InTheMiddleLate,
    OtherOrder,
    ReaderFirst,
    SideBySide,
    Towers,
    Attributes,
    Sequences,
    NamedLayers,
    Whole,
    Mixed,
    OnlyLinears,
    SharedInside,
    SharedTensor,
]


def _followed(build, inputs=None) -> dict:
    inputs = inputs or {"x": _random(3, WIDTH)}

    def attempt(blocks):
        try:
            return {
                "status": "proved",
                **architectures.prove(build, lambda _: dict(inputs), blocks),
            }
        except UnsupportedModelError as error:
            assert "\n" not in str(error)
            return {"status": "refused", "reason": str(error)}

    return architectures.cured(attempt)


@pytest.mark.parametrize("build", CURED)
def test_the_cure_works(build):
    row = _followed(build)
    assert row["status"] == "refused" and row["cure"] == "works", row
    assert row["cured"]["boundaries"] >= 1


def test_a_bare_parameter_needs_no_cure():
    row = _followed(BareParameter)
    assert row == {"status": "proved", "boundaries": 3, "bit_equal": True}


@pytest.mark.parametrize("build", [Twice, Loop, OneLinear])
def test_where_there_is_no_cure_it_says_so(build):
    row = _followed(build)
    assert row["cure"] == "none" and not row["cures"], row


_IDS = torch.randint(4, 90, (2, 8), generator=torch.Generator().manual_seed(0))
_SIZES = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_hidden_layers=2,
)
_DETECTOR = dict(
    encoder_hidden_dim=32,
    encoder_ffn_dim=32,
    encoder_attention_heads=4,
    d_model=32,
    num_queries=10,
    decoder_in_channels=[32] * 3,
    decoder_ffn_dim=32,
    decoder_layers=3,
    decoder_attention_heads=4,
    num_denoising=0,
    anchor_image_size=None,
)


def _small(model_type: str) -> tuple[dict, dict]:
    """Settings of a small config, and inputs, of a type whose default config is refused."""
    images = {"pixel_values": _random(2, 3, 64, 64)}
    if model_type.startswith("rt_detr"):
        backbone = hf.CONFIG_MAPPING["rt_detr_resnet"](
            embedding_size=8,
            hidden_sizes=[8, 16, 24, 32],
            depths=[1] * 4,
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        return dict(backbone_config=backbone, encoder_in_channels=[16, 24, 32], **_DETECTOR), images
    if model_type in ("d_fine", "deimv2", "pp_doclayout_v4"):
        backbone = hf.CONFIG_MAPPING["hgnet_v2"](
            embedding_size=8,
            stem_channels=[3, 8, 8],
            hidden_sizes=[16] * 4,
            depths=[1] * 4,
            stage_in_channels=[8, 16, 16, 16],
            stage_mid_channels=[8] * 4,
            stage_out_channels=[16] * 4,
            stage_num_blocks=[1] * 4,
            stage_numb_of_layers=[1] * 4,
            stage_kernel_size=[3] * 4,
            stage_downsample=[False, True, True, True],
            stage_light_block=[False] * 4,
            out_features=["stage2", "stage3", "stage4"],
        )
        points = 2 if model_type.startswith("pp") else [2] * 3
        settings = dict(encoder_in_channels=[16] * 3, decoder_n_points=points, **_DETECTOR)
        return dict(backbone_config=backbone, **settings), images
    if model_type.startswith("vibevoice"):
        settings = dict(hidden_size=8, num_filters=4, downsampling_ratios=[2, 2], depths=[2, 1, 1])
        if model_type.endswith("tokenizer"):
            return settings, {"input_values": _random(2, 1, 64)}
        shape = (2, 8, 16) if model_type.endswith("decoder") else (2, 1, 64)
        return settings, {"hidden_states": _random(*shape)}
    if model_type == "dac":
        ratios = dict(downsampling_ratios=[2, 2], upsampling_ratios=[2, 2])
        codes = dict(n_codebooks=2, codebook_size=16, codebook_dim=4)
        sizes = dict(encoder_hidden_size=8, decoder_hidden_size=32)
        return {**ratios, **codes, **sizes}, {"input_values": _random(2, 1, 64)}
    if model_type == "encodec":
        codes = dict(codebook_size=16, codebook_dim=16, upsampling_ratios=[2, 2])
        sizes = dict(num_filters=4, hidden_size=16, num_lstm_layers=1)
        return {**codes, **sizes}, {"input_values": _random(2, 1, 400)}
    if model_type == "lxmert":
        layers = dict(l_layers=2, x_layers=2, r_layers=2, visual_feat_dim=16)
        visual = {"visual_feats": _random(2, 5, 16), "visual_pos": _random(2, 5, 4)}
        return {**_SIZES, **layers}, {"input_ids": _IDS, **visual}
    if model_type == "zamba":
        mixers = dict(attn_layer_period=3, attn_layer_offset=1, n_mamba_heads=2, mamba_d_state=4)
        heads = dict(num_key_value_heads=4, attention_head_dim=16, attention_hidden_size=64)
        sizes = dict(num_hidden_layers=6, mamba_dt_rank=4, use_mamba_kernels=False)
        return {**_SIZES, **mixers, **heads, **sizes}, {"input_ids": _IDS}
    if model_type == "zamba2":
        kinds = ["hybrid"] * 2 + ["mamba"] * 4
        mixers = dict(hybrid_layer_ids=[0, 1], num_mem_blocks=1, adapter_rank=2, chunk_size=8)
        heads = dict(n_mamba_heads=4, mamba_headdim=16, mamba_d_state=4, mamba_ngroups=1)
        more = dict(num_hidden_layers=6, layers_block_type=kinds, use_mem_rope=True)
        return {**_SIZES, **mixers, **heads, **more}, {"input_ids": _IDS}
    if model_type == "clvp":
        ends = dict(bos_token_id=98, eos_token_id=99)
        tower = {**_SIZES, **ends, "hidden_size": 128, "projection_dim": 32}
        decoder = {**_SIZES, **ends, "num_mel_attn_blocks": 2, "feature_size": 16, "n_inner": 48}
        settings = dict(text_config=tower, speech_config=tower, decoder_config=decoder)
        inputs = {"input_ids": _IDS, "input_features": _random(2, 16, 32)}
        return dict(**settings, projection_dim=32), inputs
    if model_type == "lightglue":
        points = dict(
            model_type="superpoint",
            encoder_hidden_sizes=[8] * 4,
            decoder_hidden_size=16,
            keypoint_decoder_dim=65,
            descriptor_decoder_dim=32,
            max_keypoints=8,
            keypoint_threshold=-1.0,
        )
        sizes = dict(descriptor_dim=32, num_hidden_layers=2, num_attention_heads=4)
        never = dict(depth_confidence=-1.0, width_confidence=-1.0)
        pair = {"pixel_values": _random(2, 2, 3, 64, 64).abs()}
        return dict(keypoint_detector_config=points, **sizes, **never), pair
    assert model_type == "fastspeech2_conformer_with_hifigan"
    sides = [
        {f"{side}_layers": 1, f"{side}_linear_units": 32, f"{side}_num_attention_heads": 2}
        for side in ("encoder", "decoder")
    ]
    predictors = {f"{kind}_predictor_channels": 8 for kind in ("duration", "energy", "pitch")}
    speech = dict(hidden_size=32, vocab_size=101, num_mel_bins=8, speech_decoder_postnet_units=8)
    voice = dict(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    )
    labels = {
        "spectrogram_labels": _random(2, 16, 8),
        "duration_labels": torch.full((2, 8), 2),
        "pitch_labels": _random(2, 8, 1),
        "energy_labels": _random(2, 8, 1),
    }
    settings = dict(model_config={**sides[0], **sides[1], **predictors, **speech})
    inputs = {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS), **labels}
    return dict(**settings, vocoder_config=voice), inputs


REFUSED = """clvp d_fine dac deimv2 encodec fastspeech2_conformer_with_hifigan lightglue lxmert
pp_doclayout_v4 rt_detr rt_detr_v2 vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder
vibevoice_acoustic_tokenizer_encoder zamba zamba2""".split()


def _class_of(model_type: str) -> type[nn.Module]:
    if model_type not in hf.CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    return getattr(hf, architectures.model_classes()[model_type])


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_cure_of_an_architecture_works(model_type):
    cls = _class_of(model_type)
    settings, inputs = _small(model_type)
    model = cls(hf.CONFIG_MAPPING[model_type](**settings))
    row = _followed(lambda: copy.deepcopy(model), inputs)
    assert row["status"] == "refused" and row["cure"] == "works", row


@pytest.mark.parametrize("model_type", ["glm_image_vqmodel", "pp_doclayout_v3"])
def test_the_cure_of_an_architecture_cuts_it(model_type):
    cls = _class_of(model_type)  # one has no forward, the other wants more than random numbers
    with torch.device("meta"):
        model = cls(hf.CONFIG_MAPPING[model_type]())

    def attempt(blocks):
        try:
            return {"status": "cut", "blocks": find_layout(model, blocks).num_blocks}
        except UnsupportedModelError as error:
            return {"status": "refused", "reason": str(error)}

    row = architectures.cured(attempt)
    assert row["cure"] == "cuts" and row["cured"]["blocks"] > 1


@pytest.mark.parametrize("model_type", ["albert", "hrm_text"])
def test_an_architecture_without_cure_is_told_so(model_type):
    cls = _class_of(model_type)
    shrunken = architectures.shrink(hf.CONFIG_MAPPING[model_type]())
    row = _followed(lambda: cls(shrunken), {"input_ids": _IDS})
    assert row["cure"] == "none" and not row["cures"], row
