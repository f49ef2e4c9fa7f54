"""FLOPs of one forward, counted on the meta device: no weights, no arithmetic, about a second for a large model."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import HOOK_NAME


def flop_counter_mode() -> FlopCounterMode:
    """torch's counter, with the CPU's attention kernel added: it knows every other one and counts that as nothing."""

    def attention(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_attention: attention})


NOT_COUNTED = ("return_dict", "attention_kwargs")


def _of_one_clip(value, batch: int):
    """An argument of `forward` without its values: tensors for one clip. Tables come in tuples, for all clips alike.

    batch: clips in the call. Wan's first and last frame are two rows of image tokens a clip; some tensors have one row
    for all clips.
    """
    if isinstance(value, dict):
        return {name: _of_one_clip(part, batch) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(torch.empty_like(part, device="meta") if torch.is_tensor(part) else part for part in value)
    if not torch.is_tensor(value):
        return value
    dtype = None if value.is_floating_point() else value.dtype  # the twin is in float32
    return torch.empty(_rows(value, batch), *value.shape[1:], dtype=dtype, device="meta")


def _rows(value: torch.Tensor, batch: int) -> int:
    """Rows for one clip: one, or more where a clip has several images."""
    return max(value.shape[0] // batch, 1) if value.ndim else 1


def _shapes(value, batch: int):
    """What an argument's FLOPs depend on, for one clip of `batch`. Tables, in tuples, are for all clips alike."""
    if torch.is_tensor(value):
        return (_rows(value, batch), *value.shape[1:])
    if isinstance(value, dict):
        return tuple((name, _shapes(part, batch)) for name, part in value.items())
    if isinstance(value, (tuple, list)):
        return tuple(tuple(part.shape) if torch.is_tensor(part) else str(part) for part in value)
    return str(value)


class FlopCounter:
    """Counts forwards of a flexible transformer at any of its patch sizes.

    flexivid's heads are included, and its LoRA unless it is merged; a user's own LoRA is not. Works on a
    twin of the transformer on the meta device, built from its config.
    """

    def __init__(self, flex: FlexTransformer):
        with torch.device("meta"):
            twin = type(flex.transformer).from_config(flex.transformer.config)
            self.twin = FlexTransformer(twin, list(flex.weak_modes), flex.parametrisation)
            for name, config in getattr(flex.transformer, "peft_config", {}).items():
                if name.startswith(HOOK_NAME) and not flex.lora.is_merged:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of several adapters, and of copies between meta tensors
                        twin.add_adapter(copy.deepcopy(config), name)
        self.twin.lora.find_layers()
        table = torch.linspace(1, 0, 1000)  # any will do: values cost nothing
        self.twin.diffusion = replace(self.twin.diffusion, alphas_cumprod=table)
        if self.twin.lora.layers:
            twin.set_adapter([])
        self._costs: dict[tuple, dict[str, int]] = {}

    def costs(self, arguments: dict) -> Mapping[str, int]:
        """FLOPs (2 per multiply-add) of one forward of one clip by patch size, with arguments shaped as these."""
        key = self._key(arguments)
        if key not in self._costs:
            self._costs[key] = {patch_size: self._count(arguments, patch_size) for patch_size in self.twin.patch_sizes}
        return self._costs[key]

    def cost_of_adapted(self, arguments: dict, lora: str) -> int:
        """FLOPs of the powerful patch size with a LoRA, such as the one that it has in few-step runs."""
        key, powerful = (lora, *self._key(arguments)), self.twin.powerful
        if key not in self._costs:
            self._costs[key] = {powerful: self._count(arguments, powerful, lora)}
        return self._costs[key][powerful]

    def _key(self, arguments: dict) -> tuple:
        """What the FLOPs of a forward depend on."""
        return tuple((name, _shapes(arguments[name], clips)) for name, clips in self._clips(arguments).items())

    def _clips(self, arguments: dict) -> dict[str, int]:
        """The arguments that count, and of how many clips each holds rows."""
        batch, shared = len(arguments["hidden_states"]), self.twin.family.for_all_clips
        return {name: 1 if name in shared else batch for name in arguments if name not in NOT_COUNTED}

    def _count(self, arguments: dict, patch_size: str, lora: str | None = None) -> int:
        inputs = {name: _of_one_clip(arguments[name], clips) for name, clips in self._clips(arguments).items()}
        self.twin.fix(patch_size, lora)
        # The user's attention backend may not run on meta tensors, or not be known to the counter; and a counter
        # around the user's call is to count what runs, not what is planned.
        with (
            _disable_current_modes(),
            attention_backend("native"),
            self.twin.family.counting(),
            torch.no_grad(),
            flop_counter_mode() as counter,
        ):
            self.twin.transformer(**inputs, return_dict=False)
        return counter.get_total_flops()
