"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: one adapter a weak mode, next to whatever the user has.

In few-step runs the powerful patch size has one too, under its own name.
"""

import warnings
from collections.abc import Iterable
from functools import partial, update_wrapper
from types import MethodType
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flexivid.model.hooks import HOOK_NAME
from flexivid.model.stock_layer import CASTING, hook_of
from flexivid.model.surroundings import check_merging

if TYPE_CHECKING:
    from flexivid.model.flexible import FlexTransformer


MISSING = object()  # an attribute that was not there


class LoraSwitch:
    """Turns flexivid's LoRA on and off as patch sizes change, and leaves the user's adapters alone.

    layers: those of the transformer that hold flexivid's LoRA, once `find_layers` was called. requires_grad_before:
    by name of the stock model's parameter, what it was before there was any; None where there never was.
    """

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer
        self.layers: list[BaseTunerLayer] = []
        self.requires_grad_before: dict[str, bool] | None = None
        self._attentions: dict[str, nn.Module] = {}
        self._merged: dict[str, list[nn.Parameter]] = {}
        self._linears: list[nn.Module] = []  # whose weights these are copies of
        self._is_eager = True
        self._put_back: list[tuple[dict, str, object]] = []

    @staticmethod
    def name_of(patch_size: str) -> str:
        """peft's name of the adapter of a weak mode, or of whatever else has one."""
        return f"{HOOK_NAME}-{patch_size}"

    def find_layers(self) -> None:
        """To be called once flexivid's LoRA is added."""
        self.layers, self._attentions = [], {}
        for name, layer in self.transformer.named_modules():
            if isinstance(layer, BaseTunerLayer) and any(map(is_ours, layer._get_available_adapters())):
                self.layers.append(layer)
                attention, _, projection = name.rpartition(".")
                if projection in ("to_q", "to_k", "to_v"):
                    self._attentions[attention] = self.transformer.get_submodule(attention)

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
                    elif all(map(is_ours, layer.lora_A)):
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
        self._linears = [layer.get_base_layer() for layer in self.layers]
        weights = [linear.weight for linear in self._linears]
        if any(type(weight) is not nn.Parameter or weight.dtype.itemsize == 1 for weight in weights):
            raise ValueError("merge_lora copies weights, and these are quantised: enable without it")
        if any(layer.merged for layer in self.layers):
            raise ValueError("a LoRA is fused into these weights: call unload_lora_weights() after fuse_lora()")
        for patch_size in patch_sizes:
            self._merged[patch_size] = []
            for layer, stock in zip(self.layers, weights, strict=True):
                # Without weights (on the meta device) peft still puts its own on the CPU.
                merged = stock + layer.get_delta_weight(self.name_of(patch_size)).to(stock.device)
                self._merged[patch_size].append(nn.Parameter(merged, requires_grad=False))

    def switch(self, patch_size: str | None, anew: bool = True, tokens: tuple[int, int] | None = None) -> None:
        """Makes one of ours active, that of a weak mode, or none for None; whatever else is active stays so.

        anew: look at what surrounds the model, too; that is enough once a call of a pipeline. tokens: of a mixed
        sequence, how many coarse ones come first, which take it, and how many fine ones follow, which do not. Raises
        ValueError for merged weights there, which all tokens would take.
        """
        # Attributes are set where they lie: through a module that takes longer than the layer itself, for small ones.
        for attributes, name, value in reversed(self._put_back):
            if value is MISSING:
                del attributes[name]
            else:
                attributes[name] = value
        self._put_back.clear()
        for layer in self.layers:
            if vars(layer)["_active_adapter"] and any(map(is_ours, layer.active_adapters)):
                layer._active_adapter = _of_the_user(layer.active_adapters)
        if patch_size is None or not self.layers or (tokens is not None and not tokens[0]):
            return
        if self.name_of(patch_size) not in getattr(self.transformer, "peft_config", {}):
            raise RuntimeError("flexivid's LoRA was unloaded with the others; call flexivid.enable again")
        self._part_projections()
        if tokens is not None:
            if self.is_merged:
                raise ValueError("merge_lora gives all tokens one set of weights, and mixed steps need two: leave it")
            self._activate(self.name_of(patch_size))
            for layer in self.layers if tokens[1] else ():
                self._limit(layer, self.name_of(patch_size), *tokens)
        elif self.is_merged:
            if anew:
                check_merging(self.transformer)
                # A compiled block sees through peft's wrappers, and would be compiled once more without them.
                self._is_eager = all(module._compiled_call_impl is None for module in self.transformer.modules())
            self._swap_merged(patch_size)
        else:
            self._activate(self.name_of(patch_size))

    def _set(self, attributes: dict, name: str, value) -> None:
        """Until the next switch. Noted first, so that an interrupted switch is undone too."""
        self._put_back.append((attributes, name, attributes.get(name, MISSING)))
        attributes[name] = value

    def _activate(self, ours: str) -> None:
        """Not by `set_adapter` of peft: it also walks all parameters to set requires_grad, 5 ms a switch on the
        embedded model, and so takes the gradients from a student whose teacher runs after it.
        """
        for layer in self.layers:
            users = layer.active_adapters
            if layer.disable_adapters:
                if layer.merged:
                    layer.unmerge()  # as its forward does
                self._set(vars(layer), "_disable_adapters", False)
                users = []
            if layer.merged:
                # Fused: part of the weights, and the layer's forward would be these alone.
                self._set(vars(layer), "merged_adapters", [])
                users = []
            self._set(vars(layer), "_active_adapter", [*users, ours])
            if layer.scaling[ours] != 1:  # a weight that `set_adapters` gave to all
                layer.scaling[ours] = 1.0

    def _limit(self, layer: BaseTunerLayer, ours: str, coarse: int, fine: int) -> None:
        """Gives the coarse tokens, which come first, what our LoRA adds in a layer, and the fine ones nothing."""
        down, up = layer.lora_A[ours], layer.lora_B[ours]
        self._set(vars(down), "forward", lambda x: type(down).forward(down, x[:, :coarse]))
        self._set(vars(up), "forward", lambda x: nn.functional.pad(type(up).forward(up, x), (0, 0, 0, fine)))

    def _part_projections(self) -> None:
        """Queries, keys and values that `fuse_qkv_projections` has joined run apart, where our LoRA is."""
        for name, attention in self._attentions.items():
            attributes = vars(attention)
            if attributes.get("fused_projections"):
                self._set(attributes, "fused_projections", False)
            held = attributes if "processor" in attributes else attention._modules  # some are modules
            if "Fused" in type(held.get("processor")).__name__:
                before = getattr(self.transformer, "original_attn_processors", None) or {}
                if f"{name}.processor" not in before:
                    raise RuntimeError("fused projections would skip flexivid's LoRA: call unfuse_qkv_projections()")
                self._set(held, "processor", before[f"{name}.processor"])

    def _swap_merged(self, patch_size: str) -> None:
        """Puts the merged weights of a mode in the place of the stock ones."""
        if any(layer.merged for layer in self.layers):
            raise RuntimeError("a LoRA was fused after merge_lora had copied the weights: unfuse it, or enable again")
        if any("_hf_hook" in vars(linear) for linear in self._linears):
            raise RuntimeError("sequential offload would undo merge_lora in every forward: enable without it")
        for layer, linear, weight in zip(self.layers, self._linears, self._merged[patch_size], strict=True):
            stock = linear._parameters["weight"]
            if weight.device != stock.device or weight.dtype != stock.dtype:
                weight.data = weight.data.to(stock.device, stock.dtype)
            self._set(linear._parameters, "weight", weight)
            attributes = vars(layer)
            if self._is_eager and not attributes["_active_adapter"] and "forward" not in attributes:
                self._set(attributes, "forward", linear)  # a wrapper that is idle takes as long as a small layer


def is_ours(adapter: str) -> bool:
    return adapter.startswith(f"{HOOK_NAME}-")


def _of_the_user(adapters: Iterable[str]) -> list[str]:
    return [name for name in adapters if not is_ours(name)]


def _set_adapter(layer: BaseTunerLayer, adapter_names: str | list[str], inference_mode: bool = False) -> None:
    """Stands in for the layer's own: a list of all adapters, or what peft makes active after a deletion, has ours."""
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    type(layer).set_adapter(layer, _of_the_user(names), inference_mode)


def _merge(layer: BaseTunerLayer, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Stands in for the layer's own: ours are not fused into the weights of the powerful mode."""
    names = layer.active_adapters if adapter_names is None else adapter_names
    type(layer).merge(layer, safe_merge, _of_the_user(names))


STAND_INS = {"set_adapter": _set_adapter, "merge": _merge}


def _stock_names(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names without peft's wrappers."""
    return {name.replace(".base_layer.", "."): parameter for name, parameter in transformer.named_parameters()}


def _restore_requires_grad(transformer: nn.Module, before: dict[str, bool]) -> None:
    """peft freezes the model when the first adapter is added, and the user's adapters when ours are toggled.

    By that torch chooses how to multiply by a weight, even without gradients: stock steps would differ in last bits.
    """
    for name, parameter in _stock_names(transformer).items():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def add_lora(flex: "FlexTransformer", rank: int, more: Iterable[str] = ()) -> None:
    """Adds one idle LoRA per weak mode, of `rank`, to self-attention and feed-forward layers. more: names of others.

    The user's active adapters stay active, fused ones in the weights. Raises ValueError if the class takes no adapters.
    """
    transformer = flex.transformer
    if flex.family.lora_targets is None:
        raise ValueError(f"{type(transformer).__name__} of diffusers takes no LoRA")
    active = transformer.active_adapters() if transformer._hf_peft_config_loaded else []
    flex.lora.requires_grad_before = {name: p.requires_grad for name, p in _stock_names(transformer).items()}
    fused = [layer for layer in transformer.modules() if isinstance(layer, BaseTunerLayer) and layer.merged]
    before = [layer.merged_adapters for layer in fused]
    try:
        for layer in fused:
            layer.merged_adapters = []  # else peft takes them out of the weights
        for patch_size in (*flex.weak_modes, *more):
            _add(transformer, flex.lora.name_of(patch_size), rank, flex.family.lora_targets)
    finally:
        for layer, adapters in zip(fused, before, strict=True):
            layer.merged_adapters = adapters
    transformer.set_adapter(active)
    _restore_requires_grad(transformer, flex.lora.requires_grad_before)
    flex.lora.find_layers()
    for layer in flex.lora.layers:
        for name, stand_in in STAND_INS.items():
            setattr(layer, name, MethodType(stand_in, layer))
        # peft makes them as the layer is stored, and under layerwise casting (fp8) nothing can be computed in that.
        casting = hook_of(layer.get_base_layer(), CASTING)
        if casting is not None:
            for part in (layer.lora_A, layer.lora_B):
                part.to(casting.compute_dtype)
    # Pipelines look at what it takes.
    transformer.save_pretrained = update_wrapper(partial(flex.lora.save_pretrained), transformer.save_pretrained)


def _add(transformer: nn.Module, name: str, rank: int, targets: str) -> None:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=True, target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
        transformer.add_adapter(config, adapter_name=name)


def remove_lora(flex: "FlexTransformer") -> None:
    """Deletes flexivid's adapters, or what a user has left of them; peft's wrappers go where no other adapter is."""
    transformer, requires_grad = flex.transformer, flex.lora.requires_grad_before
    if requires_grad is None:
        return
    vars(transformer).pop("save_pretrained", None)
    transformer.delete_adapters([name for name in getattr(transformer, "peft_config", {}) if is_ours(name)])
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            for stand_in in STAND_INS:
                vars(layer).pop(stand_in, None)
            # An empty wrapper would show in the state_dict keys.
            if not layer._get_available_adapters():
                transformer.set_submodule(name, layer.base_layer)
    if not transformer._hf_peft_config_loaded:
        vars(transformer).pop("_hf_peft_config_loaded", None)
    _restore_requires_grad(transformer, requires_grad)
