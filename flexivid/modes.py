"""Weak modes: the three sub-modules that see a coarse patch, started from the stock ones."""

import math

import torch
from torch import nn

from flexivid.parametrisation import PARAMETRISATIONS
from flexivid.resize import embedder_to_folded, head_to_folded, resize_embedder, resize_head
from flexivid.schedules import multiple_of, parse_patch_size


class WeakMode(nn.Module):
    """Embedder, head and patch-size embedding of one coarse patch size, over folded latents.

    `direct` starts from the pseudo-inverse resize of the stock weights; its head predicts all M*C_out channels.
    `snr` starts as the block mean; its head has C_out channels for the coarse prediction, then M*C_out for the
    full-resolution residual on x0, zero at the start.

    Args:
        patch_size: such as `1x4x4`, an integer multiple of the base patch. Raises ValueError otherwise.
        embedder: the stock Conv3d. head: the stock Linear, rows ordered (p_t, p_h, p_w, channel).
    """

    def __init__(self, patch_size: str, embedder: nn.Conv3d, head: nn.Linear, parametrisation: str):
        super().__init__()
        if parametrisation not in PARAMETRISATIONS:
            raise ValueError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {parametrisation!r}")
        base_patch = tuple(embedder.kernel_size)
        coarse_patch = parse_patch_size(patch_size)
        self.multiple = multiple_of(coarse_patch, base_patch)
        self.parametrisation = parametrisation
        self.out_channels = head.out_features // math.prod(base_patch)
        blocks = math.prod(self.multiple)

        with torch.no_grad():
            if parametrisation == "direct":
                embed_weight = embedder_to_folded(resize_embedder(embedder.weight, coarse_patch), base_patch)
                resized = resize_head(head.weight, head.bias, base_patch, coarse_patch)
                head_weight, head_bias = head_to_folded(*resized, coarse_patch, base_patch)
            else:
                embed_weight = embedder.weight.repeat(1, blocks, 1, 1, 1) / blocks
                head_weight, head_bias = (self._with_residual(rows, base_patch) for rows in (head.weight, head.bias))

        placed = {"device": embedder.weight.device, "dtype": embedder.weight.dtype}
        self.embedder = nn.Conv3d(embed_weight.shape[1], embedder.out_channels, base_patch, stride=base_patch, **placed)
        self.head = nn.Linear(head.in_features, len(head_weight), **placed)
        self.patch_size_embedding = nn.Parameter(torch.zeros(embedder.out_channels, **placed))
        with torch.no_grad():
            self.embedder.weight.copy_(embed_weight)
            self.embedder.bias.copy_(embedder.bias)
            self.head.weight.copy_(head_weight)
            self.head.bias.copy_(head_bias)

    def _with_residual(self, rows: torch.Tensor, base_patch: tuple[int, int, int]) -> torch.Tensor:
        """Stock head rows, then zero rows for the residual, within every pixel of the base patch."""
        pixels = rows.unflatten(0, (math.prod(base_patch), self.out_channels))
        residual = pixels.new_zeros(pixels.shape[0], math.prod(self.multiple) * self.out_channels, *pixels.shape[2:])
        return torch.cat([pixels, residual], 1).flatten(0, 1)

    def embed(self, folded: torch.Tensor) -> torch.Tensor:
        """(B, M*C, T', H', W') -> (B, D, tokens of the coarse grid in t, h, w)."""
        tokens = self.embedder(folded)
        # Under autocast the embedding is in float32, and would take all blocks with it.
        return tokens + self.patch_size_embedding.view(-1, 1, 1, 1).to(tokens.dtype)
