"""Weak modes: the three sub-modules that see a coarse patch, started from the stock ones."""

import math

import torch
from torch import nn

from flexivid.diffusion import PARAMETRISATIONS
from flexivid.patches.resize import embedder_to_folded, head_to_folded, resize_embedder, resize_head
from flexivid.patches.sizes import multiple_of, parse_patch_size


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer in floating point, whatever a quantiser has made of it."""
    if type(layer.weight) is nn.Parameter or not isinstance(layer, nn.Linear):
        return layer.weight
    # Quantisers store weights in their own ways, but every layer can be asked what it does to unit vectors: long ones,
    # beside which the bias is small, since the sum is rounded to the layer's precision.
    length, bias = 1024, layer.bias
    output = layer(length * torch.eye(layer.in_features, device=bias.device, dtype=bias.dtype))
    return ((output.float() - bias.float()) / length).T.to(bias.dtype)


class WeakMode(nn.Module):
    """Embedder, head and patch-size embedding of one coarse patch size, over folded latents.

    `direct` starts from the pseudo-inverse resize of the stock weights; its head predicts all M*C_out channels.
    `snr` starts as the block mean; its head has C_out channels for the coarse prediction, then M*C_out for the
    full-resolution residual on x0, zero at the start.

    Args:
        patch_size: such as `1x4x4`, an integer multiple of the base patch. Raises ValueError otherwise.
        embedder: the stock Conv3d, Conv2d or Linear over patches (channel, p_t, p_h, p_w). head: the stock Linear.
        base_patch: (p_t, p_h, p_w).
        channels_last: the rows of the head are ordered (p_t, p_h, p_w, channel), else (channel, p_t, p_h, p_w).
    """

    def __init__(
        self,
        patch_size: str,
        embedder: nn.Module,
        head: nn.Linear,
        base_patch: tuple[int, int, int],
        channels_last: bool,
        parametrisation: str,
    ):
        super().__init__()
        if parametrisation not in PARAMETRISATIONS:
            raise ValueError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {parametrisation!r}")
        coarse_patch = parse_patch_size(patch_size)
        self.multiple = multiple_of(coarse_patch, base_patch)
        self.parametrisation = parametrisation
        self.out_channels = head.out_features // math.prod(base_patch)
        blocks = math.prod(self.multiple)

        with torch.no_grad():
            embed_stock, head_stock = dense_weight(embedder), dense_weight(head)
            stock = embed_stock.reshape(len(embed_stock), -1, *base_patch)
            if parametrisation == "direct":
                embed_weight = embedder_to_folded(resize_embedder(stock, coarse_patch), base_patch)
                resized = resize_head(head_stock, head.bias, base_patch, coarse_patch, channels_last)
                head_weight, head_bias = head_to_folded(*resized, coarse_patch, base_patch, channels_last)
            else:
                embed_weight = stock.repeat(1, blocks, 1, 1, 1) / blocks
                head_weight, head_bias = (
                    self._with_residual(rows, base_patch, channels_last) for rows in (head_stock, head.bias)
                )

        placed = {"device": embed_stock.device, "dtype": embed_stock.dtype}
        if isinstance(embedder, nn.Linear):
            self.embedder = nn.Linear(embed_weight[0].numel(), len(embed_weight), **placed)
        else:
            convolution, kernel = type(embedder), embedder.kernel_size
            self.embedder = convolution(embed_weight.shape[1], len(embed_weight), kernel, stride=kernel, **placed)
        self.head = nn.Linear(head.in_features, len(head_weight), **placed)
        self.patch_size_embedding = nn.Parameter(torch.zeros(len(embed_weight), **placed))
        with torch.no_grad():
            self.embedder.weight.copy_(embed_weight.reshape(self.embedder.weight.shape))
            self.embedder.bias.copy_(embedder.bias)
            self.head.weight.copy_(head_weight)
            self.head.bias.copy_(head_bias)

    def _with_residual(self, rows: torch.Tensor, base_patch: tuple[int, int, int], channels_last: bool) -> torch.Tensor:
        """Stock head rows, then zero rows for the residual, within every pixel of the base patch."""
        pixels, channels = math.prod(base_patch), self.out_channels
        residual_channels = math.prod(self.multiple) * channels
        if not channels_last:
            return torch.cat([rows, rows.new_zeros(residual_channels * pixels, *rows.shape[1:])])
        by_pixel = rows.unflatten(0, (pixels, channels))
        return torch.cat([by_pixel, rows.new_zeros(pixels, residual_channels, *rows.shape[1:])], 1).flatten(0, 1)

    def embed(self, folded: torch.Tensor) -> torch.Tensor:
        """Folded latents as the stock embedder takes its own -> tokens of the coarse grid, as it gives them."""
        tokens = self.embedder(folded)
        # Under autocast the embedding is in float32, and would take all blocks with it.
        embedding = self.patch_size_embedding.to(tokens.dtype)
        return tokens + (
            embedding if isinstance(self.embedder, nn.Linear) else embedding.view(-1, *[1] * (tokens.ndim - 2))
        )
