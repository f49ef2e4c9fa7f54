"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: one adapter a weak mode, next to whatever the user has."""

import warnings

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from flexivid.flexible import HOOK_NAME, FlexTransformer


def add_lora(flex: FlexTransformer, rank: int) -> None:
    """Adds one idle LoRA per weak mode, of `rank`, to self-attention and feed-forward layers.

    The user's active adapters stay active. Raises ValueError if they are fused into the weights, or if the
    class takes no adapters.
    """
    transformer = flex.transformer
    if flex.family.lora_targets is None:
        raise ValueError(f"{type(transformer).__name__} of diffusers takes no LoRA; the objective `shared` needs none")
    layers = [layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("a LoRA is fused into this model: call unload_lora_weights() after fuse_lora(), then enable")
    active = transformer.active_adapters() if transformer._hf_peft_config_loaded else []
    flex.requires_grad_before = {id(p): p.requires_grad for p in transformer.parameters()}
    for patch_size in flex.weak_modes:
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=flex.family.lora_targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            transformer.add_adapter(config, adapter_name=flex.lora_name(patch_size))
    transformer.set_adapter(active)
    flex.find_lora_layers()


def remove_lora(flex: FlexTransformer) -> None:
    """Deletes flexivid's adapters; peft's wrappers go too if no other adapter needs them."""
    transformer = flex.transformer
    ours = [name for name in getattr(transformer, "peft_config", {}) if name.startswith(f"{HOOK_NAME}-")]
    if not ours:
        return
    if len(ours) == len(transformer.peft_config):
        transformer.unload_lora()
    else:
        active = [name for name in transformer.active_adapters() if name not in ours]
        transformer.delete_adapters(ours)
        transformer.set_adapter(active)
        # Layers that only ours had adapted keep an empty wrapper, which would show in the state_dict keys.
        for name, layer in list(transformer.named_modules()):
            if isinstance(layer, BaseTunerLayer) and not layer.lora_A:
                transformer.set_submodule(name, layer.base_layer)
    # peft freezes the model when the first adapter is added, and the user's adapters when ours are toggled.
    for parameter in transformer.parameters():
        parameter.requires_grad_(flex.requires_grad_before.get(id(parameter), parameter.requires_grad))
