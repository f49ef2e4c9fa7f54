"""A user's LoRA in a pipeline, on the output layer and the patch embedder above all: weak steps have it too."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from families import assert_same_clip, attach, randomise_adapter, tiny, tiny_pipeline
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file
from test_family_pipelines import sample
from torch import nn

import flexivid
from flexivid.model import stock_layer
from flexivid.model.adapter import AdapterConfig, save_adapter
from flexivid.model.hooks import attached
from flexivid.model.lora import add_lora
from flexivid.shapes.embedded import ADAPTER, MODEL

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
WEAK = {"schedule": "1x4x4"}


def saved_adapter(folder, name="wan", rank=4, scale=0.05, **overrides):
    flex = attach(tiny(name, **overrides), ["1x4x4"])
    if rank:
        add_lora(flex, rank=rank)
    randomise_adapter(flex, scale)
    config = AdapterConfig.of(
        flex,
        lora_rank=rank,
        components=["transformer"],
        base_model="tiny",
    )
    save_adapter(folder, config, {"transformer": flex})
    return folder


@pytest.fixture
def adapter(tmp_path):
    return saved_adapter(tmp_path / "adapter")


def lightx2v(seed=3, embedder=True, whole_difference=False) -> dict[str, torch.Tensor]:
    """A LoRA in the names of Wan's own code, of LightX2V and Wan2.2-Distill, that has the head too."""
    generator, state = torch.Generator().manual_seed(seed), {}

    def add(name, down, up, biased):
        state[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.3
        state[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.3
        if biased:
            state[f"diffusion_model.{name}.diff_b"] = torch.randn(up[0], generator=generator) * 0.1

    for block in range(2):
        for layer in "qkvo":
            add(f"blocks.{block}.self_attn.{layer}", (2, 48), (48, 2), whole_difference)
    if whole_difference:
        state["diffusion_model.head.head.diff"] = torch.randn(16, 48, generator=generator) * 0.1
        state["diffusion_model.head.head.diff_b"] = torch.randn(16, generator=generator) * 0.1
    else:
        add("head.head", (2, 48), (16, 2), False)
    return state


def lightning(alpha: float) -> dict[str, torch.Tensor]:
    """A few-step LoRA as Lightning's: blocks alone, in the same names, each with its alpha."""
    state, down = {key: value for key, value in lightx2v().items() if "head" not in key}, "lora_down.weight"
    return state | {key.replace(down, "alpha"): torch.tensor(alpha) for key in state if key.endswith(down)}


def on_embedder(seed=9):
    torch.manual_seed(seed)
    return LoraConfig(r=2, target_modules=["patch_embedding", "to_k"], init_lora_weights=False)


def pipeline(**enable):
    pipe, call = tiny_pipeline("wan")
    if enable:
        flexivid.enable(pipe, **enable)
    return pipe, call | {"num_inference_steps": 4}


def fused_before(states, **enable) -> torch.Tensor:
    """What comes of LoRA that are weights by the time of `enable`."""
    pipe, call = pipeline()
    for index, (state, weight) in enumerate(states):
        pipe.load_lora_weights(dict(state), adapter_name=f"style{index}")
        pipe.set_adapters([f"style{index}"], [weight])
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    flexivid.enable(pipe, **enable)
    return sample(pipe, call)


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_few_step_lora_is_the_base(adapter, lora_first):
    """Four steps without guidance: powerful steps are what the distilled base gives, and weak ones have its LoRA."""
    pipe, call = pipeline()
    call |= {"guidance_scale": 1.0}
    undistilled = sample(pipe, call)
    pipe.load_lora_weights(lightning(1.0), adapter_name="lightning")
    distilled = sample(pipe, call)
    other, _ = pipeline()
    other.load_lora_weights(lightning(2.0), adapter_name="lightning")
    assert not torch.equal(distilled, undistilled) and not torch.equal(distilled, sample(other, call))  # alpha counts

    pipe, _ = pipeline()
    if lora_first:
        pipe.load_lora_weights(lightning(1.0), adapter_name="lightning")
    flexivid.enable(pipe, adapter=adapter, budget=1.0)
    if not lora_first:
        pipe.load_lora_weights(lightning(1.0), adapter_name="lightning")
    assert torch.equal(sample(pipe, call), distilled)
    flexivid.enable(pipe, adapter=adapter, schedule="1x4x4:1,1x2x2:3")
    weak = sample(pipe, call)
    assert weak.isfinite().all() and not torch.equal(weak, distilled)
    flexivid.enable(pipe, adapter=adapter, schedule="1x4x4")
    with_it = sample(pipe, call)
    pipe.set_adapters(["lightning"], [0.0])
    assert (sample(pipe, call) - with_it).abs().max() > 1e-2
    pipe.set_adapters(["lightning"], [1.0])
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), distilled)


@pytest.mark.parametrize("whole_difference", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_lora_file_with_the_head_before_after_fused_and_unloaded(adapter, whole_difference, trained):
    enable = WEAK | ({"adapter": adapter} if trained else {})
    state = lightx2v(whole_difference=whole_difference)
    pipe, call = pipeline(**enable)
    plain = sample(pipe, call)
    expected = fused_before([(state, 1.0)], **enable)
    assert (expected - plain).abs().max() > 0.05
    pipe.load_lora_weights(dict(state), adapter_name="style")
    assert_same_clip(sample(pipe, call), expected)
    pipe.disable_lora()
    assert torch.equal(sample(pipe, call), plain)
    pipe.enable_lora()
    pipe.fuse_lora()
    assert_same_clip(sample(pipe, call), expected)
    pipe.unfuse_lora()
    assert_same_clip(sample(pipe, call), expected)
    pipe.delete_adapters("style")
    assert_same_clip(sample(pipe, call), plain)
    before, call = pipeline()
    before.load_lora_weights(dict(state), adapter_name="style")
    flexivid.enable(before, **enable)
    assert_same_clip(sample(before, call), expected)
    if not trained:
        before.unload_lora_weights()
        assert torch.equal(sample(before, call), plain)


def test_a_lora_that_is_fused_and_unloaded_between_two_calls():
    """Nothing is left of it but other values at the same place: peft writes them through `.data`."""
    pipe, call = pipeline(**WEAK)
    sample(pipe, call)
    pipe.load_lora_weights(lightx2v(), adapter_name="style")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert_same_clip(sample(pipe, call), fused_before([(lightx2v(), 1.0)], **WEAK))


@pytest.mark.parametrize("trained", [False, True])
def test_several_with_weights_and_a_scale(adapter, trained):
    enable = WEAK | ({"adapter": adapter} if trained else {})
    states = [(lightx2v(3), 0.7), (lightx2v(4, whole_difference=True), -0.4)]
    expected = fused_before(states, **enable)
    pipe, call = pipeline(**enable)
    for index, (state, _) in enumerate(states):
        pipe.load_lora_weights(dict(state), adapter_name=f"style{index}")
    both = ["style0", "style1"]
    pipe.set_adapters(both, [1.0, 1.0])
    assert (sample(pipe, call) - expected).abs().max() > 0.05
    pipe.set_adapters(both, [weight for _, weight in states])
    assert_same_clip(sample(pipe, call), expected)
    if trained:
        with pytest.raises(ValueError, match="attention_kwargs scale would scale flexivid's LoRA too"):
            sample(pipe, call | {"attention_kwargs": {"scale": 0.5}})
        return
    pipe.set_adapters(both, [2 * weight for _, weight in states])
    assert_same_clip(sample(pipe, call | {"attention_kwargs": {"scale": 0.5}}), expected)


def test_adapters_of_another_kind_and_on_the_embedder():
    pipe, call = pipeline(**WEAK)
    pipe.transformer.add_adapter(on_embedder(), "style")
    torch.manual_seed(2)
    pipe.transformer.add_adapter(LoHaConfig(r=2, target_modules=["proj_out"], init_weights=False), "other")
    pipe.transformer.set_adapters(["style", "other"], [1.0, 1.0])
    found = sample(pipe, call)
    fused, _ = pipeline()
    fused.transformer.add_adapter(on_embedder(), "style")
    fused.transformer.fuse_lora()
    fused.transformer.unload_lora()
    torch.manual_seed(2)
    fused.transformer.add_adapter(LoHaConfig(r=2, target_modules=["proj_out"], init_weights=False), "other")
    fused.transformer.fuse_lora()
    fused.transformer.unload_lora()
    flexivid.enable(fused, **WEAK)
    assert_same_clip(found, sample(fused, call))


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_variants_of_lora_on_a_bare_transformer(kind):
    def style():
        torch.manual_seed(4)
        return LoraConfig(r=2, target_modules=["proj_out", "patch_embedding"], init_lora_weights=False, **kind)

    pipe, call = pipeline(**WEAK)
    pipe.transformer.add_adapter(style(), "style")
    found = sample(pipe, call)
    fused, _ = pipeline()
    fused.transformer.add_adapter(style(), "style")
    fused.transformer.fuse_lora()
    fused.transformer.unload_lora()
    flexivid.enable(fused, **WEAK)
    assert_same_clip(found, sample(fused, call))


def test_an_adapter_folder_from_before_takes_the_stock_layers_as_they_are(adapter):
    pipe, call = pipeline(adapter=adapter, **WEAK)
    expected = sample(pipe, call)
    path = adapter / "flexivid.safetensors"
    tensors = load_file(path)
    old = {name: tensor for name, tensor in tensors.items() if ".stock." not in name}
    assert len(tensors) - len(old) == 4
    save_file(old, path)
    pipe, call = pipeline(adapter=adapter, **WEAK)
    assert torch.equal(sample(pipe, call), expected)
    pipe.load_lora_weights(lightx2v(), adapter_name="style")
    assert (sample(pipe, call) - expected).abs().max() > 0.05
    other_shape = {**tensors, "transformer.stock.head.weight": torch.zeros(3, 3)}
    for change in (other_shape, {key: value for key, value in tensors.items() if "stock.head.bias" not in key}):
        save_file(change, path)
        with pytest.raises(flexivid.AdapterError, match="does not fit the model"):
            pipeline(adapter=adapter, **WEAK)


def test_the_embedded_adapter_knows_its_base():
    transformer = WanTransformer3DModel.from_pretrained(MODEL / "transformer")
    tensors = load_file(ADAPTER / "flexivid.safetensors")
    stock = {"embedder": transformer.patch_embedding, "head": transformer.proj_out}
    for name, layer in stock.items():
        for kind in ("weight", "bias"):
            assert torch.equal(tensors[f"transformer.stock.{name}.{kind}"].float(), getattr(layer, kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_precision_of_the_base_is_no_change(adapter, dtype):
    """What an adapter was trained beside is stored in half precision, and the base may be loaded in another."""
    pipe, call = pipeline()
    pipe.transformer.to(dtype)
    flexivid.enable(pipe, adapter=adapter, **WEAK)
    call = {key: value.to(dtype) if torch.is_tensor(value) else value for key, value in call.items()}
    plain = sample(pipe, call)
    mode = attached(pipe.transformer).weak_modes["1x4x4"]
    assert mode._changed == {} and plain.isfinite().all()
    pipe.load_lora_weights(lightx2v(), adapter_name="style")
    assert (sample(pipe, call) - plain).abs().max() > 0.05
    assert mode._changed["head"]["weight"].dtype == dtype and "embedder" not in mode._changed
    pipe.transformer.float()
    call = {key: value.float() if torch.is_tensor(value) else value for key, value in call.items()}
    assert sample(pipe, call).isfinite().all()


def offloads(folder):
    here, groups = torch.device("cpu"), {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    return {
        "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        "groups": lambda pipe: pipe.transformer.enable_group_offload(offload_device=here, **groups),
        "disk": lambda pipe: pipe.transformer.enable_group_offload(offload_to_disk_path=str(folder), **groups),
    }


@pytest.mark.parametrize("kind", ["model", "groups", "disk"])
def test_offloaded_layers_are_followed(kind, tmp_path):
    pipe, call = pipeline(**WEAK)
    plain = sample(pipe, call)
    pipe.load_lora_weights(lightx2v(), adapter_name="style")
    expected = sample(pipe, call)
    pipe, call = pipeline(**WEAK)
    offloads(tmp_path / "here")[kind](pipe)
    assert_same_clip(sample(pipe, call), plain)
    if kind == "disk":
        return  # diffusers itself cannot load a LoRA into it
    pipe, call = pipeline(**WEAK)
    pipe.load_lora_weights(lightx2v(), adapter_name="style")
    offloads(tmp_path)[kind](pipe)
    for _ in range(2):
        assert_same_clip(sample(pipe, call), expected)


def test_a_layer_that_accelerate_brings_for_its_forward_only():
    """Sequential offload, which itself does not run without a GPU."""
    layer, here = nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 2)), nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 2))
    layer.to("meta").forward = here.forward
    layer._hf_hook = SimpleNamespace(execution_device=torch.device("cpu"))
    for found, right in zip(stock_layer.dense_weights(layer), (here.weight, here.bias), strict=True):
        torch.testing.assert_close(found, right)


def test_the_weights_are_read_once_in_a_call(monkeypatch):
    pipe, call = pipeline(budget=0.5, order="interleaved")
    sample(pipe, call)
    read, stock = [], stock_layer.dense_weights
    monkeypatch.setattr(stock_layer, "dense_weights", lambda layer: read.append(layer) or stock(layer))
    sample(pipe, call)
    assert len(read) == 2
    pipe.load_lora_weights(lightx2v(), adapter_name="style")

    def halved(pipe, step, timestep, tensors):
        pipe.set_adapters(["style"], [0.5 if step >= 1 else 1.0])
        return tensors

    whole = sample(pipe, call)
    read.clear()
    changed = sample(pipe, call | {"callback_on_step_end": halved})
    assert (changed - whole).abs().max() > 1e-3 and len(read) <= 4


def test_training_does_not_look_at_the_stock_layers(monkeypatch):
    """There they may be shards of several processes."""

    def refuse(*_, **__):
        raise AssertionError("followed in training")

    monkeypatch.setattr(stock_layer.StockLayer, "change", refuse)
    flex = attach(tiny("wan"), ["1x4x4"])
    flex.weak_modes.requires_grad_(True)
    flex.fix("1x4x4")
    pipe, call = tiny_pipeline("wan")
    pipe.register_modules(transformer=flex.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sample(pipe, call).isfinite().all()
    flex.weak_modes.requires_grad_(False)
    with pytest.raises(AssertionError, match="followed in training"):
        sample(pipe, call)
