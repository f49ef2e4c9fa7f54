"""Bases that are stored or run otherwise: fp8 layerwise casting, fused projections, quantised embedders and heads."""

import pytest
import torch
from families import assert_same_clip, tiny, tiny_pipeline
from peft import LoraConfig
from test_family_pipelines import sample
from test_user_lora import saved_adapter
from torch import nn

import flexivid
from flexivid.model.hooks import attached

WEAK = {"schedule": "1x4x4"}
FP8 = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}


@pytest.fixture
def adapter(tmp_path):
    return saved_adapter(tmp_path / "adapter", scale=0.3)


def in_bfloat16(name="wan"):
    pipe, call = tiny_pipeline(name)
    pipe.transformer.to(torch.bfloat16)
    call["num_inference_steps"] = 2
    return pipe, {key: value.bfloat16() if torch.is_tensor(value) else value for key, value in call.items()}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("first", ["casting", "enable"])
def test_layerwise_casting(adapter, first, everything):
    """In either order, also where the user has embedder and head in fp8; the LoRA is not made in it."""
    casting = FP8 | ({"skip_modules_pattern": ("norm",)} if everything else {})
    pipe, call = in_bfloat16()
    flexivid.enable(pipe, adapter=adapter, **WEAK)
    exact = sample(pipe, call)
    flexivid.disable(pipe)
    plain = sample(pipe, call)
    for step in ("casting", "enable") if first == "casting" else ("enable", "casting"):
        if step == "casting":
            pipe.transformer.enable_layerwise_casting(**casting)
        else:
            flexivid.enable(pipe, adapter=adapter, **WEAK)
    found = sample(pipe, call)
    # fp8 rounds by a few percent; without the LoRA it would be another clip.
    assert (found - exact).abs().mean() < 0.3 * (exact - plain).abs().mean()
    lora = {parameter.dtype for name, parameter in pipe.transformer.named_parameters() if "lora_" in name}
    assert lora == ({torch.float8_e4m3fn} if everything and first == "enable" else {torch.bfloat16})
    modes = attached(pipe.transformer).weak_modes
    assert {parameter.dtype for parameter in modes.parameters()} == {torch.bfloat16}


def test_merge_lora_of_a_base_in_fp8_is_refused(adapter):
    pipe, call = in_bfloat16()
    stock = sample(pipe, call)
    pipe.transformer.enable_layerwise_casting(**FP8)
    with pytest.raises(ValueError, match="these are quantised: enable without it"):
        flexivid.enable(pipe, adapter=adapter, merge_lora=True, **WEAK)
    assert not hasattr(pipe.transformer, "peft_config") and sample(pipe, call).shape == stock.shape


@pytest.mark.parametrize(
    ("name", "merge_lora"),
    [("wan", False), ("wan", True), ("cogvideox-5b", False), ("ltx", False), ("sana-video", False)],
)
def test_fused_projections(name, merge_lora, tmp_path):
    """LoRA on queries, keys and values counts in weak steps, fused before or after; powerful ones stay fused."""
    enable = {"adapter": saved_adapter(tmp_path, name, scale=0.3), "merge_lora": merge_lora}
    pipe, call = tiny_pipeline(name)
    call["num_inference_steps"] = 2
    flexivid.enable(pipe, **enable, **WEAK)
    weak = sample(pipe, call)
    pipe.transformer.fuse_qkv_projections()
    assert_same_clip(sample(pipe, call), weak)
    flexivid.disable(pipe)
    fused = sample(pipe, call)
    assert (fused - weak).abs().max() > 0.05
    flexivid.enable(pipe, **enable, **WEAK)
    assert_same_clip(sample(pipe, call), weak)
    flexivid.enable(pipe, **enable, budget=1.0)
    assert torch.equal(sample(pipe, call), fused)
    pipe.transformer.unfuse_qkv_projections()
    flexivid.enable(pipe, **enable, **WEAK)
    assert_same_clip(sample(pipe, call), weak)


def test_processors_that_someone_else_has_fused_are_refused(tmp_path):
    pipe, call = tiny_pipeline("cogvideox-5b")
    flexivid.enable(pipe, adapter=saved_adapter(tmp_path, "cogvideox-5b"), **WEAK)
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.original_attn_processors = None
    with pytest.raises(RuntimeError, match="call unfuse_qkv_projections"):
        sample(pipe, call)


class Int8(nn.Module):
    """As a quantiser's layer: the weight is an integer tensor with a scale, and no parameter in floating point."""

    def __init__(self, layer: nn.Module, breaks: bool = False):
        super().__init__()
        names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride")
        vars(self).update({name: getattr(layer, name) for name in names if hasattr(layer, name)})
        self.scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("weight", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.bias, self.kind, self.breaks = layer.bias, type(layer), breaks

    def forward(self, x):
        if self.breaks:
            raise NotImplementedError("no kernel for this")
        weight = self.weight.to(x.dtype) * self.scale
        if self.kind is nn.Linear:
            return nn.functional.linear(x, weight, self.bias)
        convolution = nn.functional.conv2d if self.kind is nn.Conv2d else nn.functional.conv3d
        return convolution(x, weight, self.bias, stride=self.stride)


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
@pytest.mark.parametrize("name", ["wan", "cogvideox-5b", "cogvideox-1.5", "mochi", "ltx"])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_quantised_embedder_and_head(name, parametrisation):
    pipe, call = tiny_pipeline(name)
    call["num_inference_steps"] = 2
    weak = {"schedule": "2x4x4" if name == "cogvideox-1.5" else "1x4x4", "parametrisation": parametrisation}
    flexivid.enable(pipe, **weak)
    expected = sample(pipe, call)
    family = attached(pipe.transformer).family
    flexivid.disable(pipe)
    plain = sample(pipe, call)
    for path in (family.embedder, family.head):
        pipe.transformer.set_submodule(path, Int8(pipe.transformer.get_submodule(path)))
    quantised = sample(pipe, call)
    flexivid.enable(pipe, **weak)
    found = sample(pipe, call)
    assert (found - expected).abs().max() < 5 * (quantised - plain).abs().max() + 0.02  # a rounding, no more
    assert {p.dtype for p in attached(pipe.transformer).weak_modes.parameters()} == {torch.float32}


def test_one_that_cannot_be_asked_is_refused_by_enable():
    pipe, call = tiny_pipeline("cogvideox-5b")
    stock = pipe.transformer.patch_embed.proj
    pipe.transformer.patch_embed.proj = Int8(stock, breaks=True)
    with pytest.raises(ValueError, match=r"Int8 can be neither read nor asked for \(no kernel for this\)"):
        flexivid.enable(pipe, **WEAK)
    pipe.transformer.patch_embed.proj = stock
    assert sample(pipe, call).isfinite().all()


def test_a_users_lora_on_a_head_in_fp8():
    torch.manual_seed(4)
    style = LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False)
    transformer = tiny("wan").to(torch.bfloat16)
    pipe, call = in_bfloat16()
    pipe.register_modules(transformer=transformer)
    transformer.enable_layerwise_casting(**FP8, skip_modules_pattern=("norm",))
    flexivid.enable(pipe, **WEAK)
    plain = sample(pipe, call)
    transformer.add_adapter(style, "style")
    transformer.proj_out.lora_A.to(torch.bfloat16), transformer.proj_out.lora_B.to(torch.bfloat16)
    assert (sample(pipe, call) - plain).abs().max() > 0.05
