"""Weak modes: the three sub-modules that see a coarse patch, started from the stock ones."""

import math

import torch
from torch import nn
from torch.func import functional_call

from flexivid.diffusion import PARAMETRISATIONS
from flexivid.model.stock_layer import Weights, bias_of, dense_weight
from flexivid.patches.resize import embedder_to_folded, head_to_folded, resize_embedder, resize_head
from flexivid.patches.sizes import multiple_of, parse_mode


class WeakMode(nn.Module):
    """Embedder, head and patch-size embedding of one coarse patch size, over folded latents.

    `direct` starts from the pseudo-inverse resize of the stock weights; its head predicts all M*C_out channels.
    `snr` starts as the block mean; its head has C_out channels for the coarse prediction, then M*C_out for the
    full-resolution residual on x0, zero at the start.

    Args:
        patch_size: such as `1x4x4` or `1x4x4-guided`, a multiple of the base patch. Raises ValueError otherwise.
        embedder: the stock Conv3d, Conv2d or Linear over patches (channel, p_t, p_h, p_w). head: the stock Linear. Weak
            ones have biases, also where these have none.
        base_patch: (p_t, p_h, p_w).
        channels_last: the rows of the head are ordered (p_t, p_h, p_w, channel), else (channel, p_t, p_h, p_w).
        embedder_channels_last: the same of the columns of a Linear embedder.
    """

    def __init__(
        self,
        patch_size: str,
        embedder: nn.Module,
        head: nn.Linear,
        base_patch: tuple[int, int, int],
        channels_last: bool,
        parametrisation: str,
        embedder_channels_last: bool = False,
    ):
        super().__init__()
        if parametrisation not in PARAMETRISATIONS:
            raise ValueError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {parametrisation!r}")
        self.coarse_patch, self.base_patch = parse_mode(patch_size)[0], base_patch
        self.multiple = multiple_of(self.coarse_patch, base_patch)
        self.channels_last, self.embedder_channels_last = channels_last, embedder_channels_last
        self.parametrisation = parametrisation
        embed_stock, head_stock = dense_weight(embedder), dense_weight(head)
        self.out_channels = len(head_stock) // math.prod(base_patch)

        with torch.no_grad():
            embed_weight = self._coarse_embedder(embed_stock)
            head_weight, head_bias = self._coarse_head(head_stock, bias_of(head, head_stock))
        placed = {"device": embed_stock.device, "dtype": embed_stock.dtype}
        if embed_stock.ndim == 2:
            self.embedder = nn.Linear(embed_weight[0].numel(), len(embed_weight), **placed)
        else:
            # Not the layer's own class, which may be a quantiser's.
            convolution, kernel = {4: nn.Conv2d, 5: nn.Conv3d}[embed_stock.ndim], embed_stock.shape[2:]
            self.embedder = convolution(embed_weight.shape[1], len(embed_weight), kernel, stride=kernel, **placed)
        self.head = nn.Linear(head_weight.shape[1], len(head_weight), **placed)
        self.patch_size_embedding = nn.Parameter(torch.zeros(len(embed_weight), **placed))
        with torch.no_grad():
            self.embedder.weight.copy_(embed_weight)
            self.embedder.bias.copy_(bias_of(embedder, embed_stock))
            self.head.weight.copy_(head_weight)
            self.head.bias.copy_(head_bias)
        # By layer: what the stock one has changed by, as last followed, and the weights that come of it.
        self._followed: dict[str, Weights | None] = {"embedder": None, "head": None}
        self._changed: dict[str, dict[str, torch.Tensor]] = {}

    def _coarse_embedder(self, stock: torch.Tensor) -> torch.Tensor:
        """The linear map from the weight of the stock embedder to that of a training-free weak one."""
        if self.embedder_channels_last:
            patches = stock.reshape(len(stock), *self.base_patch, -1).movedim(-1, 1)
        else:
            patches = stock.reshape(len(stock), -1, *self.base_patch)
        if self.parametrisation == "direct":
            folded = embedder_to_folded(resize_embedder(patches, self.coarse_patch), self.base_patch)
        else:
            blocks = math.prod(self.multiple)
            folded = patches.repeat(1, blocks, 1, 1, 1) / blocks
        if self.embedder_channels_last:
            folded = folded.movedim(1, -1)
        # As the layer has it: a Conv2d knows no frames, a Linear takes whole patches.
        return folded.flatten(1) if stock.ndim == 2 else folded.reshape(len(stock), -1, *stock.shape[2:])

    def _coarse_head(self, weight: torch.Tensor, bias: torch.Tensor) -> Weights:
        """The linear map from the stock head to a training-free weak one."""
        if self.parametrisation == "direct":
            resized = resize_head(weight, bias, self.base_patch, self.coarse_patch, self.channels_last)
            return head_to_folded(*resized, self.coarse_patch, self.base_patch, self.channels_last)
        return tuple(self._with_residual(rows) for rows in (weight, bias))

    def _with_residual(self, rows: torch.Tensor) -> torch.Tensor:
        """Stock head rows, then zero rows for the residual, within every pixel of the base patch."""
        pixels, channels = math.prod(self.base_patch), self.out_channels
        residual_channels = math.prod(self.multiple) * channels
        if not self.channels_last:
            return torch.cat([rows, rows.new_zeros(residual_channels * pixels, *rows.shape[1:])])
        by_pixel = rows.unflatten(0, (pixels, channels))
        return torch.cat([by_pixel, rows.new_zeros(pixels, residual_channels, *rows.shape[1:])], 1).flatten(0, 1)

    @torch.no_grad()
    def follow(self, embedder: Weights | None, head: Weights | None) -> None:
        """From here on the mode has the change of the stock layers too: its own weights, and what becomes of that.

        embedder, head: by how much weight and bias of the stock ones differ from those that the mode's were made of or
        trained beside, None for not at all.
        """
        for name, change in (("embedder", embedder), ("head", head)):
            if change is None and self._followed[name] is None:
                continue
            own = getattr(self, name)
            present = self._changed.get(name, own._parameters)["weight"]
            moved = (present.device, present.dtype) != (own.weight.device, own.weight.dtype)
            if change is self._followed[name] and not moved:
                continue
            self._followed[name] = change
            self._changed.pop(name, None)
            if change is not None:
                weight, bias = (tensor.to(own.weight.device) for tensor in change)
                weight, bias = (
                    (self._coarse_embedder(weight), bias) if name == "embedder" else self._coarse_head(weight, bias)
                )
                self._changed[name] = {
                    "weight": (own.weight + weight).to(own.weight.dtype),
                    "bias": (own.bias + bias).to(own.bias.dtype),
                }

    def _run(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(self, name)
        return functional_call(layer, self._changed[name], x) if name in self._changed else layer(x)

    def embed(self, folded: torch.Tensor) -> torch.Tensor:
        """Folded latents as the stock embedder takes its own -> tokens of the coarse grid, as it gives them."""
        tokens = self._run("embedder", self._with_joined(folded))
        # Under autocast the embedding is in float32, and would take all blocks with it.
        embedding = self.patch_size_embedding.to(tokens.dtype)
        return tokens + (
            embedding if isinstance(self.embedder, nn.Linear) else embedding.view(-1, *[1] * (tokens.ndim - 2))
        )

    def _with_joined(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (..., channel and pixel) of folded latents, behind which a forward may join channels of its own, such
        as the padding mask of Cosmos: those come once, and every block gets them."""
        if not isinstance(self.embedder, nn.Linear) or patches.shape[-1] == self.embedder.in_features:
            return patches
        pixels, blocks = math.prod(self.base_patch), math.prod(self.multiple)
        joined = (self.embedder.in_features - patches.shape[-1]) // (pixels * (blocks - 1))
        latents, beside = patches.unflatten(-1, (-1, pixels)).tensor_split([-joined], -2)
        by_block = latents.unflatten(-2, (blocks, -1))
        beside = beside.unsqueeze(-3).expand(*by_block.shape[:-2], -1, -1)
        return torch.cat([by_block, beside], -2).flatten(-3)

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of the last block -> what the head gives for each."""
        return self._run("head", tokens)
