"""Patch embedding and un-embedding layers that run at several patch sizes from one set of weights.

For a DiT of one's own. The weights are those of the base (powerful) patch size, and every other size uses their
pseudo-inverse resize (FlexiViT, arXiv 2212.08013; FlexiDiT, arXiv 2502.20126), recomputed in each forward, so that
training at any patch size trains the same parameter.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flexivid.patches.resize import PatchSize, apply_to_embedder, apply_to_head, embedder_matrix, resize_matrix

Grid = tuple[int, int, int]


def patch_name(patch_size: tuple[int, ...]) -> str:
    """(1, 4, 4) -> "1x4x4": time, height, width in latent pixels."""
    return "x".join(map(str, patch_size))


class _FlexTubelet(nn.Module):
    """A base patch size, the other sizes, and one precomputed resize matrix for each of those."""

    def __init__(self, patch_size: PatchSize, patch_sizes: list[PatchSize]):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.coarse_sizes = tuple(size for size in dict.fromkeys(map(tuple, patch_sizes)) if size != self.patch_size)

    def _matrix(self, patch_size: PatchSize) -> Tensor:
        return getattr(self, f"resize_{patch_name(patch_size)}")

    def _build_matrices(self):
        weight = self.proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for size in self.coarse_sizes:
            matrix = self.resize_rule(self.patch_size, size).to(weight.device, dtype)
            self.register_buffer(f"resize_{patch_name(size)}", matrix, persistent=False)

    def _apply(self, fn, recurse=True):
        # Rebuilt on every move: `.bfloat16()` must not round the matrices, `.to_empty()` must not leave them unset.
        super()._apply(fn, recurse)
        self._build_matrices()
        return self

    def _choose(self, asked: PatchSize | None) -> PatchSize:
        patch_size = self.patch_size if asked is None else tuple(asked)
        if patch_size != self.patch_size and patch_size not in self.coarse_sizes:
            known = ", ".join(map(patch_name, (self.patch_size, *self.coarse_sizes)))
            raise ValueError(f"patch size {patch_name(patch_size)} is not one of this layer's: {known}")
        return cast(PatchSize, patch_size)  # of three numbers, as this layer's are


class FlexTubeletEmbed(_FlexTubelet):
    """Video or latents to tokens, at any of several patch sizes. `proj` is an ordinary `nn.Conv3d`.

    Args:
        channels: C of the input.
        dim: D of the tokens.
        patch_size: base patch size (p_t, p_h, p_w), whose weights are held. Runs exactly as `proj` does.
        patch_sizes: the patch sizes that `forward` may be asked for, besides the base one. Each has a learned
            patch-size embedding (D,), zero at the start, added to its tokens (FlexiDiT, arXiv 2502.20126).
    """

    resize_rule = staticmethod(embedder_matrix)

    def __init__(self, channels: int, dim: int, patch_size: PatchSize, patch_sizes: list[PatchSize]):
        super().__init__(patch_size, patch_sizes)
        self.proj = nn.Conv3d(channels, dim, self.patch_size, stride=self.patch_size)
        self.size_embedding = nn.ParameterDict(
            {patch_name(size): nn.Parameter(torch.zeros(dim)) for size in self.coarse_sizes}
        )
        self._build_matrices()

    def forward(self, x: Tensor, patch_size: PatchSize | None = None) -> tuple[Tensor, Grid]:
        """(B, C, T, H, W) to tokens (B, N, D) and their grid (n_t, n_h, n_w), N = n_t * n_h * n_w.

        Sizes that are not multiples of the patch are padded by replicating the far edge of each axis.
        Raises ValueError for a patch size that the layer was not built with.
        """
        size = self._choose(patch_size)
        (t, h, w), (p_t, p_h, p_w) = x.shape[2:], size
        x = F.pad(x, (0, -w % p_w, 0, -h % p_h, 0, -t % p_t), mode="replicate")
        if size == self.patch_size:
            tokens = self.proj(x)
        else:
            # FlexiViT: w' = (R^T)^+ w. The bias has no spatial extent and stays.
            weight = apply_to_embedder(self._matrix(size), self.proj.weight, size)
            bias = self.proj.bias + self.size_embedding[patch_name(size)]
            tokens = F.conv3d(x, weight, bias, stride=size)
        return rearrange(tokens, "b d t h w -> b (t h w) d"), tuple(tokens.shape[2:])


class FlexTubeletUnembed(_FlexTubelet):
    """Tokens to video or latents, at any of several patch sizes. `proj` is an ordinary `nn.Linear`.

    Args:
        dim: D of the tokens.
        channels: C of the output.
        patch_size: base patch size (p_t, p_h, p_w), whose weights are held; rows ordered (p_t, p_h, p_w, C).
        patch_sizes: the patch sizes that `forward` may be asked for, besides the base one.
    """

    resize_rule = staticmethod(resize_matrix)

    def __init__(self, dim: int, channels: int, patch_size: PatchSize, patch_sizes: list[PatchSize]):
        super().__init__(patch_size, patch_sizes)
        p_t, p_h, p_w = self.patch_size
        self.proj = nn.Linear(dim, p_t * p_h * p_w * channels)
        self._build_matrices()

    def forward(
        self, tokens: Tensor, grid: Grid, patch_size: PatchSize | None = None, size: tuple[int, int, int] | None = None
    ) -> Tensor:
        """(B, N, D) and their grid to (B, C, T, H, W), cropped to `size` = (T, H, W) where the input was padded.

        Raises ValueError for a patch size that the layer was not built with, einops.EinopsError if N is not the grid's.
        """
        chosen = self._choose(patch_size)
        if chosen == self.patch_size:
            patches = self.proj(tokens)
        else:
            # The coarse output patch is the up-sampled fine one: w' = R w.
            matrix = self._matrix(chosen)
            patches = F.linear(tokens, apply_to_head(matrix, self.proj.weight), apply_to_head(matrix, self.proj.bias))
        sizes = dict(zip(("t", "h", "w", "pt", "ph", "pw"), (*grid, *chosen), strict=True))
        x = rearrange(patches, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", **sizes)
        t, h, w = size or x.shape[2:]
        return x[:, :, :t, :h, :w]
