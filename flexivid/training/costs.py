"""FLOPs of what is learnt, by the shapes of a batch."""

import math
from functools import cached_property

import torch

from flexivid.model.flexible import FlexTransformer
from flexivid.patches.folding import token_grid
from flexivid.sampling.flops import FlopCounter
from flexivid.tensors import on_rows
from flexivid.training.noise import CLEAN, STREAM_TIMESTEP
from flexivid.training.student import arguments_of


class Costs:
    """FLOPs of one clip of a batch, as `FlopCounter` counts them."""

    def __init__(self, flex: FlexTransformer):
        self.flex = flex

    def forward(self, values: tuple, patch_size: str, lora: str | None = None) -> int:
        """Of a forward. values: a batch, the latents first (B, C, T, H, W), and its conditions in the first dictionary.

        lora: of the powerful patch size, None for the stock model.
        """
        arguments = self._arguments(values)
        if lora is not None:
            return self.counter.cost_of_adapted(arguments, lora)
        return self.counter.costs(arguments)[patch_size]

    def learning(self, values: tuple, patch_size: str, lora: str | None = None) -> int:
        """Of a forward and its backward, of the gradients that what is trained needs."""
        return self.counter.cost_of_learning(self._arguments(values), patch_size, self.trained, lora)

    @cached_property
    def counter(self) -> FlopCounter:
        return FlopCounter(self.flex)

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names of the transformer's parameters that are trained: its LoRA, or all."""
        return frozenset(name for name, weight in self.flex.transformer.named_parameters() if weight.requires_grad)

    def _arguments(self, values: tuple) -> dict:
        """Those of a forward; only their shapes count."""
        latents, conditions = values[0], next(value for value in values if isinstance(value, dict))
        grid = token_grid(latents.shape[2:], self.flex.base_patch)
        of_tokens = (math.prod(grid),) if CLEAN in conditions else ()
        if self.flex.family.sequence is not None:  # of one clip: those of a batch have texts of different lengths
            latents, conditions = latents[:1], on_rows(conditions, lambda tensor: tensor[:1])
            conditions |= {STREAM_TIMESTEP: torch.ones(1)}
            # Completed, which reads values: the counter has none.
            return self.flex.family.completed(arguments_of(self.flex.family, latents, torch.zeros(1), conditions))
        return arguments_of(self.flex.family, latents, torch.empty(len(latents), *of_tokens), conditions)
