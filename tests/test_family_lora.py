"""In every family: what a user does to the patch embedder and the output layer, the weak modes do too."""

import pytest
import torch
from families import TINY, attach, coarse_patch_sizes, every, grid_for, inputs, randomise_adapter, tiny
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from flexivid.model.families import family_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for one in float32
every_family = every(TINY)


def touched(transformer) -> list[str]:
    family = family_of(transformer)
    return [family.embedder, family.head]


def add_style(transformer, seed: int = 7, rank: int = 2, **settings) -> None:
    """A LoRA on embedder and head, with biases where these have, also where diffusers' class takes none."""
    torch.manual_seed(seed)
    targets = "|".join(path.replace(".", r"\.") for path in touched(transformer))
    biased = all(transformer.get_submodule(path).bias is not None for path in touched(transformer))
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, lora_bias=biased, **settings)
    inject_adapter_in_model(config, transformer, "style")
    with torch.no_grad():
        for key, parameter in transformer.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn_like(parameter))


def remove_style(transformer) -> None:
    for path in touched(transformer):
        transformer.set_submodule(path, transformer.get_submodule(path).get_base_layer())


def merge(layer: BaseTunerLayer) -> None:
    """As peft does, which fails at a convolution over single latents."""
    if isinstance(layer.get_base_layer(), torch.nn.Conv3d) and layer.get_base_layer().kernel_size == (1, 1, 1):
        base, down, up = layer.get_base_layer(), layer.lora_A["style"], layer.lora_B["style"]
        scale = layer.scaling["style"]
        base.weight.data += scale * (up.weight.flatten(1) @ down.weight.flatten(1)).view_as(base.weight)
        base.bias.data += scale * up.bias
        layer.merged_adapters.append("style")
    else:
        layer.merge()


def fused(transformer) -> torch.nn.Module:
    """The same model with its LoRA in the weights, and no sign of it."""
    add_style(transformer)
    for path in touched(transformer):
        merge(transformer.get_submodule(path))
    remove_style(transformer)
    return transformer


@torch.no_grad()
def weak(flex, patch_size: str, call: dict) -> torch.Tensor:
    flex.fix(patch_size)
    return flex.transformer(**call, return_dict=False)[0]


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits: peft has frozen stock weights, by which torch chooses how to multiply."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def call_of(transformer) -> dict:
    return inputs(transformer, grid_for(transformer, 5, 3), batch=1)


@every_family
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_a_lora_on_embedder_and_head_is_in_the_weak_modes(name, parametrisation):
    """As if it had been in the weights before, whether it comes before the weak modes or after; gone when it is."""
    modes = coarse_patch_sizes(tiny(name))[-1:]
    call, stock = call_of(tiny(name)), attach(tiny(name), modes, parametrisation)
    expected = attach(fused(tiny(name)), modes, parametrisation)
    before = tiny(name)
    add_style(before)
    before = attach(before, modes, parametrisation)
    after = attach(tiny(name), modes, parametrisation)
    plain = weak(after, modes[0], call)
    assert torch.equal(plain, weak(stock, modes[0], call))
    add_style(after.transformer)
    for flex in (before, after):
        for patch_size in (*modes, flex.powerful, *modes):
            right = weak(expected, patch_size, call)
            torch.testing.assert_close(weak(flex, patch_size, call), right, atol=1e-4, rtol=1e-3)
    assert (weak(after, modes[0], call) - plain).abs().max() > 0.01
    remove_style(after.transformer)
    assert_alike(weak(after, modes[0], call), plain)


@every_family
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_trained_modes_get_what_was_added_since(name, parametrisation):
    """Weak = trained + map(stock now - stock then), by the weights that the map makes of each."""
    modes = coarse_patch_sizes(tiny(name))[-1:]
    call, flex = call_of(tiny(name)), attach(tiny(name), modes, parametrisation)
    randomise_adapter(flex)
    trained = weak(flex, modes[0], call)
    expected, stock = attach(fused(tiny(name)), modes, parametrisation), attach(tiny(name), modes, parametrisation)
    own = flex.weak_modes[modes[0]].state_dict()
    with torch.no_grad():
        for key, parameter in expected.weak_modes[modes[0]].named_parameters():
            parameter.add_(own[key] - stock.weak_modes[modes[0]].state_dict()[key])
    add_style(flex.transformer)
    found = weak(flex, modes[0], call)
    torch.testing.assert_close(found, weak(expected, modes[0], call), atol=1e-4, rtol=1e-3)
    assert (found - trained).abs().max() > 0.01
    assert all(torch.equal(own[key], value) for key, value in flex.weak_modes[modes[0]].state_dict().items())
    layers = [flex.transformer.get_submodule(path) for path in touched(flex.transformer)]
    assert all(isinstance(layer, BaseTunerLayer) and layer.active_adapters == ["style"] for layer in layers)
    for layer in layers:
        layer.enable_adapters(False)
    assert_alike(weak(flex, modes[0], call), trained)
    for layer in layers:
        layer.enable_adapters(True)
        merge(layer)  # leaves no mark in the weights
    torch.testing.assert_close(weak(flex, modes[0], call), found, atol=1e-4, rtol=1e-3)
    remove_style(flex.transformer)
    torch.testing.assert_close(weak(flex, modes[0], call), found, atol=1e-4, rtol=1e-3)


@every_family
def test_weights_that_are_written_are_followed(name):
    """Through `.data`, which leaves no mark, as well as not; and nothing is added while nothing changes."""
    modes = coarse_patch_sizes(tiny(name))[-1:]
    call, flex = call_of(tiny(name)), attach(tiny(name), modes)
    plain, mode = weak(flex, modes[0], call), flex.weak_modes[modes[0]]
    assert mode._changed == {}
    written_to = flex.embedder.weight if flex.embedder.bias is None else flex.embedder.bias
    kept = flex.head.weight.data.clone(), written_to.data.clone()
    flex.head.weight.data *= 1.5
    with torch.no_grad():
        written_to.add_(0.5)
    written = weak(flex, modes[0], call)
    again = attach(flex.transformer.__class__.from_config(flex.transformer.config).eval(), modes)
    again.transformer.load_state_dict(flex.transformer.state_dict())
    torch.testing.assert_close(written, weak(again, modes[0], call), atol=1e-4, rtol=1e-3)
    assert (written - plain).abs().max() > 0.01
    flex.head.weight.data, written_to.data = kept
    assert torch.equal(weak(flex, modes[0], call), plain) and mode._changed == {}
