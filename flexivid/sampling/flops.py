"""FLOPs of one forward, counted on the meta device: no weights, no arithmetic, and of blocks that are alike one."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flexivid.model.call import Call, parts_of
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import HOOK_NAME
from flexivid.model.mixed import predict_mixed
from flexivid.patches.choose import largest
from flexivid.patches.sizes import is_mixed_size, parse_mixed_size
from flexivid.sampling.schedule import WITH_RESIDUAL
from flexivid.sampling.twin import each_once, without_hooks, without_weights


def flop_counter_mode() -> FlopCounterMode:
    """torch's counter, with the CPU's attention kernel added: it knows every other one and counts that as nothing."""

    def attention(query_shape, key_shape, value_shape, *args, **kwargs) -> int:
        return sdpa_flop_count(query_shape, key_shape, value_shape)

    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={cpu_attention: attention})


def flops_text(flops: float) -> str:
    """FLOPs as people write them, to three digits: `1.23 TFLOP`. flops: above 0."""
    digits, exponent = f"{flops:.2e}".split("e")
    thousands = min(max(int(exponent) // 3, 0), 6)
    value = float(f"{digits}e{int(exponent) - 3 * thousands}")
    return f"{value:g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[thousands]}FLOP"


NOT_COUNTED = ("return_dict", "attention_kwargs")


def _of_one_clip(value, batch: int):
    """An argument of `forward` without its values: tensors for one clip, also in lists. Tables come in tuples, for all
    clips alike.

    batch: clips in the call. Wan's first and last frame are two rows of image tokens a clip; some tensors have one row
    for all clips.
    """
    if isinstance(value, dict):
        return {name: _of_one_clip(part, batch) for name, part in value.items()}
    if isinstance(value, list):
        return [_of_one_clip(part, batch) for part in value]
    if isinstance(value, tuple):
        return _without_values(value)
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
    if isinstance(value, list):
        return tuple(_shapes(part, batch) for part in value)
    return _table_shapes(value) if isinstance(value, tuple) else str(value)


def _without_values(table):
    """A table, or tables in tuples."""
    if isinstance(table, tuple):
        return tuple(map(_without_values, table))
    return torch.empty_like(table, device="meta") if torch.is_tensor(table) else table


def _table_shapes(table):
    if isinstance(table, tuple):
        return tuple(map(_table_shapes, table))
    return tuple(table.shape) if torch.is_tensor(table) else str(table)


class _Costs(dict):
    """FLOPs by patch size, and of mixed ones too, which are counted when they are asked for."""

    def __init__(self, modes: Iterable[str], count: Callable[[str], int]):
        super().__init__((mode, count(mode)) for mode in modes)
        self._count, self._mixed = count, {}

    def __missing__(self, name: str) -> int:
        if not is_mixed_size(name):
            raise KeyError(name)
        if name not in self._mixed:
            self._mixed[name] = self._count(name)
        return self._mixed[name]


class _MixedPatchSize:
    """The runner of a forward at a mixed patch size, without values. name: also `with residual`, see `Schedule`."""

    def __init__(self, name: str):
        self.size, self.has_residual = parse_mixed_size(name.removesuffix(WITH_RESIDUAL)), name.endswith(WITH_RESIDUAL)

    def run(self, flex: FlexTransformer, call: Call):
        mode, latents, residual = flex.weak_modes[self.size.coarse], call.latents, None
        folding = flex.family.folding(call.arguments, mode.multiple, flex.base_patch)
        selection = largest(latents.new_empty(len(latents), math.prod(folding.coarse_grid)), folding, self.size.share)
        if self.has_residual:
            residual = latents.new_empty(len(latents), math.prod(folding.grid), len(mode.patch_size_embedding))
        level = call.level(flex.diffusion)
        return predict_mixed(flex, call, self.size.coarse, selection, flex.diffusion, level, residual)


# Forwards that were counted in this process: a model that is enabled again, at another budget, is not counted again.
_counted: dict[tuple, int] = {}


class FlopCounter:
    """Counts forwards of a flexible transformer at any of its patch sizes.

    flexivid's heads are included, and its LoRA unless it is merged; a user's own LoRA is not: all as it is now. Works
    on a twin of the transformer on the meta device, built from its config.
    """

    def __init__(self, flex: FlexTransformer):
        self._flex, self._patch_sizes, self._parametrisation = flex, flex.patch_sizes, flex.parametrisation
        self._adapters = {
            name: copy.deepcopy(config)
            for name, config in getattr(flex.transformer, "peft_config", {}).items()
            if name.startswith(HOOK_NAME) and not flex.lora.is_merged
        }
        adapters = [(name, repr(config)) for name, config in self._adapters.items()]
        stock = flex.transformer
        self._model = flex.family, type(stock), repr(stock.config), flex.parametrisation, *adapters
        self._costs: dict[tuple, Mapping[str, int]] = {}
        self._known: dict[tuple, tuple] = {}

    @cached_property
    def _twin(self) -> FlexTransformer:
        """The transformer without weights. Made once something is to be counted."""
        with torch.device("meta"):
            transformer = without_weights(self._flex.transformer)
            twin = FlexTransformer(transformer, self._patch_sizes[:-1], self._parametrisation)
            for name, config in self._adapters.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of several adapters, and of copies between meta tensors
                    transformer.add_adapter(config, name)
        twin.lora.find_layers()
        table = torch.linspace(1, 0, 1000)  # any will do: values cost nothing
        twin.diffusion = replace(twin.diffusion, alphas_cumprod=table)
        if twin.lora.layers:
            transformer.set_adapter([])
        return twin

    @cached_property
    def _unhooked(self) -> list[nn.Module]:
        return without_hooks(self._twin.transformer)

    def costs(self, arguments: dict) -> Mapping[str, int]:
        """FLOPs (2 per multiply-add) of one forward of one clip by patch size, with arguments shaped as these.

        Those of mixed patch sizes are found there too, though it does not list them.
        """
        arguments = self._flex.family.completed(arguments)
        key = self._key(arguments)
        if key not in self._costs:
            self._costs[key] = _Costs(self._patch_sizes, partial(self._cost, key, self._inputs(arguments)))
        return self._costs[key]

    def cost_of_adapted(self, arguments: dict, lora: str) -> int:
        """FLOPs of the powerful patch size with a LoRA, such as the one that it has in few-step runs."""
        return self._cost(self._key(arguments), self._inputs(arguments), self._patch_sizes[-1], lora)

    def cost_of_learning(
        self, arguments: dict, patch_size: str, trained: frozenset[str], lora: str | None = None
    ) -> int:
        """FLOPs of one forward of one clip at a patch size and of its backward, without gradients that nobody needs.

        trained: names of the transformer's parameters that have a gradient; weak modes have one. lora: of the powerful
        patch size, as in `cost_of_adapted`.
        """
        key = self._model, self._key(arguments), patch_size, lora, trained
        if key not in _counted:
            twin = self._twin
            for name, parameter in twin.transformer.named_parameters():
                parameter.requires_grad_(name in trained)
            twin.weak_modes.requires_grad_(True)
            try:
                _counted[key] = self._count(self._inputs(arguments), patch_size, lora, learns=True)
            finally:
                twin.transformer.requires_grad_(False)
                twin.weak_modes.requires_grad_(False)
        return _counted[key]

    def _key(self, arguments: dict) -> tuple:
        """What the FLOPs of a forward depend on."""
        return tuple((name, _shapes(arguments[name], clips)) for name, clips in self._clips(arguments).items())

    def _clips(self, arguments: dict) -> dict[str, int]:
        """The arguments that count, and of how many clips each holds rows."""
        batch, shared = len(arguments["hidden_states"]), self._flex.family.for_all_clips
        return {name: 1 if name in shared else batch for name in arguments if name not in NOT_COUNTED}

    def _inputs(self, arguments: dict) -> dict:
        """Arguments without values, of one clip."""
        return {name: _of_one_clip(arguments[name], clips) for name, clips in self._clips(arguments).items()}

    def _cost(self, call: tuple, inputs: dict, patch_size: str, lora: str | None = None) -> int:
        """call: the key of its arguments, whose shapes the inputs have."""
        key = self._model, call, patch_size, lora
        if key not in _counted:
            _counted[key] = self._count(inputs, patch_size, lora)
        return _counted[key]

    def _count(self, inputs: dict, patch_size: str, lora: str | None = None, learns: bool = False) -> int:
        twin = self._twin
        # LoRA of a patch size, and of which tokens, is nothing that inputs tell.
        known = {} if twin.lora.layers else self._known
        if is_mixed_size(patch_size):
            twin.runner = _MixedPatchSize(patch_size)
        else:
            twin.fix(patch_size, lora)
        # The user's attention backend may not run on meta tensors, or not be known to the counter; and a counter
        # around the user's call is to count what runs, not what is planned.
        with (
            _disable_current_modes(),
            attention_backend("native"),
            twin.family.counting(),
            torch.set_grad_enabled(learns),
            flop_counter_mode() as counter,
            each_once(() if learns else self._unhooked, counter, known) as flops,  # gradients go through all of them
        ):
            outputs = twin.transformer(**inputs, return_dict=False)
            if learns:
                parts_of(outputs)[0].sum().backward()
            return flops()
