"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: one adapter a weak mode, next to whatever the user has."""

import warnings
from collections.abc import Iterable
from functools import partial, update_wrapper
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flexivid.model.hooks import HOOK_NAME
from flexivid.model.surroundings import check_merging

if TYPE_CHECKING:
    from flexivid.model.flexible import FlexTransformer


class LoraSwitch:
    """Turns flexivid's LoRA on and off as patch sizes change, and leaves the user's adapters alone.

    layers: those of the transformer that hold flexivid's LoRA, once `find_layers` was called.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.layers: list[BaseTunerLayer] = []
        self.requires_grad_before: dict[int, bool] = {}
        self._merged: dict[str, list[nn.Parameter]] = {}
        self._unmerged: list[nn.Parameter] = []
        self._active: str | None = None

    @staticmethod
    def name_of(patch_size: str) -> str:
        """peft's name of the adapter of a weak mode."""
        return f"{HOOK_NAME}-{patch_size}"

    def find_layers(self) -> None:
        """To be called once flexivid's LoRA is added."""
        layers = (layer for layer in self.transformer.modules() if isinstance(layer, BaseTunerLayer))
        self.layers = [layer for layer in layers if any(name.startswith(HOOK_NAME) for name in layer.lora_A)]

    def save_pretrained(self, *args, **kwargs) -> None:
        """Stands in for the transformer's own: saves the model without ours, and as if peft had not wrapped it for us.

        Layers that the user's adapters wrap too are saved as diffusers saves those.
        """
        weights = self.transformer.state_dict()
        for name, layer in self.transformer.named_modules():
            if layer in self.layers:
                for key in [key for key in weights if key.startswith(f"{name}.")]:
                    if f".{HOOK_NAME}-" in key:
                        del weights[key]
                    elif all(adapter.startswith(HOOK_NAME) for adapter in layer.lora_A):
                        weights[key.replace(f"{name}.base_layer.", f"{name}.")] = weights.pop(key)
        self.transformer.state_dict = lambda: weights
        try:
            type(self.transformer).save_pretrained(self.transformer, *args, **kwargs)
        finally:
            del self.transformer.state_dict

    @property
    def is_merged(self) -> bool:
        return bool(self._merged)

    @torch.no_grad()
    def merge(self, patch_sizes: Iterable[str]) -> None:
        """Keeps, for every weak mode, a copy of the adapted weights with its LoRA added: no LoRA cost in a forward."""
        if any(type(layer.get_base_layer().weight) is not nn.Parameter for layer in self.layers):
            raise ValueError("merge_lora copies weights, and these are quantised: enable without it")
        for patch_size in patch_sizes:
            self._merged[patch_size] = []
            for layer in self.layers:
                stock = layer.get_base_layer().weight
                # Without weights (on the meta device) peft still puts its own on the CPU.
                merged = stock + layer.get_delta_weight(self.name_of(patch_size)).to(stock.device)
                self._merged[patch_size].append(nn.Parameter(merged, requires_grad=False))

    def switch(self, patch_size: str | None) -> None:
        """Makes ours active in a weak mode only, None for the powerful one; whatever else is active stays so."""
        if not self.layers or patch_size == self._active:
            return
        if patch_size is not None:
            if self.name_of(patch_size) not in getattr(self.transformer, "peft_config", {}):
                raise RuntimeError("flexivid's LoRA was unloaded with the others; call flexivid.enable again")
            for layer in self.layers:
                if layer.merged or layer.disable_adapters:
                    raise RuntimeError("LoRA is fused or disabled, so flexivid's cannot run: unfuse or enable it again")
        if self.is_merged:
            self._swap_merged(patch_size)
            return
        # Set before the switch to a weak mode and after the one back, so that an interrupted one is seen to be undone.
        self._active = patch_size or self._active
        ours = [] if patch_size is None else [self.name_of(patch_size)]
        for layer in self.layers:
            # Not `set_adapter`: it also walks all parameters to set requires_grad, 5 ms a switch on the embedded model,
            # and so takes the gradients from a student whose teacher runs after it.
            layer._active_adapter = [name for name in layer.active_adapters if not name.startswith(HOOK_NAME)] + ours
        self._active = patch_size

    def _swap_merged(self, patch_size: str | None) -> None:
        """Puts the merged weights of a mode in the place of the stock ones, or the stock ones back."""
        linears = [layer.get_base_layer() for layer in self.layers]
        if patch_size is not None:
            if any(hasattr(linear, "_hf_hook") for linear in linears):
                raise RuntimeError("sequential offload would undo merge_lora in every forward: enable without it")
            check_merging(self.transformer)
            if self._active is None:
                self._unmerged = [linear.weight for linear in linears]
            self._active = patch_size
            for weight, stock in zip(self._merged[patch_size], self._unmerged, strict=True):
                weight.data = weight.data.to(stock.device, stock.dtype)
        for linear, weight in zip(linears, self._merged.get(patch_size, self._unmerged), strict=True):
            linear.weight = weight
        self._active = patch_size


def add_lora(flex: "FlexTransformer", rank: int) -> None:
    """Adds one idle LoRA per weak mode, of `rank`, to self-attention and feed-forward layers.

    The user's active adapters stay active. Raises ValueError if they are fused into the weights, or if the class takes
    no adapters.
    """
    transformer = flex.transformer
    if flex.family.lora_targets is None:
        raise ValueError(f"{type(transformer).__name__} of diffusers takes no LoRA")
    layers = [layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("a LoRA is fused into this model: call unload_lora_weights() after fuse_lora(), then enable")
    active = transformer.active_adapters() if transformer._hf_peft_config_loaded else []
    flex.lora.requires_grad_before = {id(p): p.requires_grad for p in transformer.parameters()}
    for patch_size in flex.weak_modes:
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=flex.family.lora_targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            transformer.add_adapter(config, adapter_name=flex.lora.name_of(patch_size))
    transformer.set_adapter(active)
    flex.lora.find_layers()
    # Pipelines look at what it takes.
    transformer.save_pretrained = update_wrapper(partial(flex.lora.save_pretrained), transformer.save_pretrained)


def remove_lora(flex: "FlexTransformer") -> None:
    """Deletes flexivid's adapters; peft's wrappers go too if no other adapter needs them."""
    transformer = flex.transformer
    ours = [name for name in getattr(transformer, "peft_config", {}) if name.startswith(f"{HOOK_NAME}-")]
    if not ours:
        return
    vars(transformer).pop("save_pretrained", None)
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
        parameter.requires_grad_(flex.lora.requires_grad_before.get(id(parameter), parameter.requires_grad))
