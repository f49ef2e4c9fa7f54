"""Whatever is done with the names of adapters between two calls, flexivid's are active in weak steps and only there."""

import pytest
import torch
from families import assert_same_clip, clip_distance, tiny, tiny_pipeline
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from test_family_pipelines import sample
from test_user_lora import lightx2v, saved_adapter

import flexivid

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
OURS = "flexivid-1x4x4"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved_adapter(tmp_path_factory.mktemp("adapter"), scale=0.3)


def add_style(pipe, name="style", targets=("to_q", "to_k")):
    torch.manual_seed(6)
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    pipe.transformer.add_adapter(config, name)


def delete(pipe):
    pipe.delete_adapters("style")


def set_all(pipe):
    pipe.set_adapters(pipe.get_list_adapters()["transformer"], 0.5)
    pipe.delete_adapters("style")


def fuse_after_deletion(pipe):
    pipe.delete_adapters("style")
    pipe.fuse_lora()
    pipe.unfuse_lora()


def fuse_all(pipe):
    pipe.delete_adapters("style")
    pipe.fuse_lora(adapter_names=pipe.get_list_adapters()["transformer"])


def none_active(pipe):
    pipe.transformer.set_adapters([])  # that of the pipeline fails, in diffusers


def toggled(pipe):
    pipe.disable_lora()
    pipe.delete_adapters("style")
    pipe.enable_lora()


def disabled(pipe):
    pipe.disable_lora()


def by_layer(pipe):
    pipe.delete_adapters("style")
    pipe.transformer.set_adapter(OURS)


def by_hand(pipe):
    for layer in pipe.transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._active_adapter = [OURS]


WAYS = [delete, set_all, fuse_after_deletion, fuse_all, none_active, toggled, disabled, by_layer, by_hand]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("merge_lora", [False, True])
def test_without_the_users_adapter_it_is_as_before(adapter, way, merge_lora):
    """Powerful steps to the bit, weak ones too: ours were neither lost nor scaled."""
    pipe, call = tiny_pipeline("wan")
    call["num_inference_steps"] = 3
    stock = sample(pipe, call)
    flexivid.enable(pipe, adapter=adapter, merge_lora=merge_lora, schedule="1x2x2:1,1x4x4:2")
    expected = sample(pipe, call)
    add_style(pipe)
    assert not torch.equal(sample(pipe, call), expected)
    way(pipe)
    if way is not by_hand:
        assert OURS not in pipe.get_active_adapters()
    for _ in range(2):
        assert torch.equal(sample(pipe, call), expected)
    flexivid.enable(pipe, adapter=adapter, merge_lora=merge_lora, budget=1.0)
    way(pipe)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.disable(pipe)
    if "style" in getattr(pipe.transformer, "peft_config", {}):
        pipe.unload_lora_weights()
    assert torch.equal(sample(pipe, call), stock)


def state_of(pipe) -> dict:
    """All that a user could see of adapters in a transformer."""
    transformer = pipe.transformer
    return {
        "requires_grad": {name: p.requires_grad for name, p in transformer.named_parameters()},
        "types": {name: type(module) for name, module in transformer.named_modules()},
        "config": list(getattr(transformer, "peft_config", {})),
        "loaded": bool(transformer._hf_peft_config_loaded),
        # What differs from the class: hooks of compilation leave an attribute of the class's own value.
        "own": sorted(
            name
            for name, value in vars(transformer).items()
            if value is not getattr(type(transformer), name, vars)
            and name not in ("_diffusers_hook", "forward", "_hf_peft_config_loaded")
        ),
        "layers": [
            (layer.active_adapters, layer.disable_adapters, layer.merged_adapters, sorted(vars(layer)))
            for layer in transformer.modules()
            if isinstance(layer, BaseTunerLayer)
        ],
    }


LEFT = {
    "all unloaded": lambda pipe: pipe.unload_lora_weights(),
    "ours deleted": lambda pipe: pipe.delete_adapters(OURS),
    "every name deleted": lambda pipe: pipe.delete_adapters(pipe.get_list_adapters()["transformer"]),
    "nothing": lambda pipe: None,
}


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("styled", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_disable_gives_back_the_stock_transformer(adapter, tmp_path, left, styled, trainable):
    """Its parameters to the optimiser, its way to be saved, its layers, as if flexivid had never been there."""
    pipes = [tiny_pipeline("wan")[0] for _ in range(2)]
    for pipe in pipes:
        pipe.transformer.requires_grad_(trainable)
        if styled:
            add_style(pipe)
    stock, pipe = pipes
    call = tiny_pipeline("wan")[1] | {"num_inference_steps": 2}
    flexivid.enable(pipe, adapter=adapter, budget=0.7, order="interleaved")
    sample(pipe, call)
    LEFT[left](pipe)
    if left != "nothing":
        with pytest.raises(RuntimeError, match="flexivid's LoRA was unloaded with the others; call flexivid.enable"):
            sample(pipe, call)
    if styled and left in ("all unloaded", "every name deleted"):
        stock.unload_lora_weights()
    flexivid.disable(pipe)
    assert state_of(pipe) == state_of(stock)
    assert torch.equal(sample(pipe, call), sample(stock, call))
    for name, each in (("ours", pipe), ("stock", stock)):
        each.transformer.save_pretrained(tmp_path / name)
    ours, expected = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("ours", "stock"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


def test_what_else_is_done_with_a_lora_while_enabled(adapter, tmp_path):
    """Saved, loaded into a bare transformer, swapped in place, loaded again under a name that was deleted."""
    pipe, call = tiny_pipeline("wan")
    pipe.load_lora_weights(lightx2v(3), adapter_name="style")
    flexivid.enable(pipe, adapter=adapter, budget=0.7, order="interleaved")
    first = sample(pipe, call)
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert len(layers) == 18 and not any(
        "flexivid" in key for key in load_file(tmp_path / "pytorch_lora_weights.safetensors")
    )
    pipe.load_lora_weights(lightx2v(4), adapter_name="style", hotswap=True)
    second = sample(pipe, call)
    assert clip_distance(second, first) > 1e-3
    pipe.delete_adapters("style")
    pipe.transformer.load_lora_adapter(
        str(tmp_path), adapter_name="style", weight_name="pytorch_lora_weights.safetensors"
    )
    assert_same_clip(sample(pipe, call), first)
    pipe.delete_adapters("style")
    pipe.load_lora_weights(lightx2v(4), adapter_name="style")
    assert_same_clip(sample(pipe, call), second)
    fresh, _ = tiny_pipeline("wan")
    fresh.load_lora_weights(lightx2v(4), adapter_name="other")
    flexivid.enable(fresh, adapter=adapter, budget=0.7, order="interleaved")
    assert_same_clip(sample(fresh, call), second)


def test_a_fused_lora_may_be_there_before_and_merge_lora_says_why_not(adapter):
    pipe, call = tiny_pipeline("wan")
    add_style(pipe)
    flexivid.enable(pipe, adapter=adapter, schedule="1x4x4")
    expected = sample(pipe, call)
    flexivid.disable(pipe)
    pipe.fuse_lora()
    stock = sample(pipe, call)
    flexivid.enable(pipe, adapter=adapter, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, adapter=adapter, schedule="1x4x4")
    assert_same_clip(sample(pipe, call), expected)
    with pytest.raises(ValueError, match="a LoRA is fused into these weights: call unload_lora_weights"):
        flexivid.enable(pipe, adapter=adapter, schedule="1x4x4", merge_lora=True)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


def test_gradients_of_a_users_training_are_where_they_were():
    """peft freezes the base with the first adapter that is added, ours."""
    transformer = tiny("wan")
    before = {name: p.requires_grad for name, p in transformer.named_parameters()}
    assert all(before.values())
    flexivid.enable(transformer, schedule="1x4x4")
    flexivid.disable(transformer)
    assert {name: p.requires_grad for name, p in transformer.named_parameters()} == before
