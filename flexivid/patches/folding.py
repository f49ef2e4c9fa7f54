"""Folding: a coarse patch is a base patch over folded (space-to-depth) latents. DESIGN: the one idea of flexivid.

    (B, C, T, H, W) --pad, fold m--> (B, M*C, T/m_t, H/m_h, W/m_w) --stock forward--> unfold, crop

Padding replicates edges. In time a causal video VAE encodes the first frame alone, so the first latent frame is
its own block: m_t - 1 copies of it in front, copies of the last frame behind. In space the far edge is replicated.
Clips that lie behind one another in time, such as key frames beside the clip that they belong to, share no block.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from einops import rearrange

Size3 = tuple[int, int, int]


def token_grid(size: Size3, patch_size: Size3) -> Size3:
    """Tokens per axis of latents of `size` (T, H, W)."""
    return tuple(length // patch for length, patch in zip(size, patch_size, strict=True))


def block_sources(length: int, multiple: int, unit: int = 1, causal: bool = False) -> torch.Tensor:
    """Which positions of an axis each block covers, padding being copies of the edges.

    length: positions; multiple: positions a block covers; unit: the number of blocks is padded to a multiple of it;
    causal: the first position is a block of its own. Returns (blocks, multiple), int64.
    """
    front = multiple - 1 if causal else 0
    total = math.ceil((front + length) / (multiple * unit)) * multiple * unit
    return (torch.arange(total) - front).clamp(0, length - 1).view(-1, multiple)


def block_centres(sources: torch.Tensor, causal: bool) -> torch.Tensor:
    """The centre of what each block really covers, (blocks,) float64, in positions of the axis, strictly increasing."""
    blocks, multiple = sources.shape
    first = -(multiple - 1) if causal else 0
    nominal = first + multiple * torch.arange(blocks, dtype=torch.float64) + (multiple - 1) / 2
    only_copies = nominal - (multiple - 1) / 2 > sources.max()
    return torch.where(only_copies, nominal, sources.double().mean(1))


def token_centres(sources: torch.Tensor, patch: int) -> torch.Tensor:
    """The centre of what each coarse token really covers, (coarse tokens,) float64, in tokens of the base grid.

    sources: (blocks, multiple) of an axis; patch: base patch size on it, and so blocks a coarse token.
    """
    covered = sources.double().view(-1, patch * sources.shape[1])
    middle = (covered.amin(1) + covered.amax(1)) / 2
    return (middle - (patch - 1) / 2) / patch


def noise_gain(sources: torch.Tensor) -> torch.Tensor:
    """kappa of an axis: standard deviation of the block mean of independent unit noise, (blocks,) float64.

    m^(-1/2) for a full block; more where copies fill the block, since copies share their noise.
    """
    counts = torch.nn.functional.one_hot(sources, int(sources.max()) + 1).sum(1).double()
    return (counts / sources.shape[1]).square().sum(1).sqrt()


def interpolation_matrix(centres: torch.Tensor, length: int) -> torch.Tensor:
    """(length, blocks) float64: linear interpolation from block centres to positions 0 ... length - 1.

    Constant beyond the outermost centres; for full blocks it is `F.interpolate(align_corners=False)`.
    """
    blocks = len(centres)
    if blocks == 1:
        return torch.ones(length, 1, dtype=torch.float64)
    position = torch.arange(length, dtype=torch.float64).clamp(centres[0], centres[-1])
    left = (torch.searchsorted(centres, position, right=True) - 1).clamp(0, blocks - 2)
    weight = (position - centres[left]) / (centres[left + 1] - centres[left])
    one_hot = torch.nn.functional.one_hot
    return (1 - weight)[:, None] * one_hot(left, blocks) + weight[:, None] * one_hot(left + 1, blocks)


@dataclass(frozen=True)
class Folding:
    """How latents of `size` are folded by `multiple` for a model of base `patch_size`. All three are (t, h, w).

    `sources`: per axis the (blocks, multiple) positions of each block; `kept`: the frames of each clip among those of
    all blocks; `centres`: per axis where each coarse token stands, see `token_centres`; `kappa`: (1, 1, T', H', W')
    float32, the standard deviation of the block mean of unit noise.
    """

    size: Size3
    multiple: Size3
    patch_size: Size3
    sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    kept: tuple[slice, ...]
    centres: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    upsampling: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    kappa: torch.Tensor

    @property
    def grid(self) -> Size3:
        """Tokens of the base grid per axis."""
        return token_grid(self.size, self.patch_size)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C, T' m_t, H' m_h, W' m_w) by replicating edges."""
        for axis, sources in enumerate(self.sources):
            if sources.numel() != self.size[axis]:
                x = x.index_select(axis + 2, sources.flatten().to(x.device))
        return x

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, M*C, T', H', W'), channels ordered (m_t, m_h, m_w, C)."""
        m_t, m_h, m_w = self.multiple
        pattern = "b c (t mt) (h mh) (w mw) -> b (mt mh mw c) t h w"
        return rearrange(self.pad(x), pattern, mt=m_t, mh=m_h, mw=m_w)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M*C, T', H', W') -> (B, C, T, H, W): the inverse of `fold`, padding cropped."""
        m_t, m_h, m_w = self.multiple
        pattern = "b (mt mh mw c) t h w -> b c (t mt) (h mh) (w mw)"
        x = rearrange(x, pattern, mt=m_t, mh=m_h, mw=m_w)[..., : self.size[1], : self.size[2]]
        clips = [x[:, :, frames] for frames in self.kept]
        return clips[0] if len(clips) == 1 else torch.cat(clips, 2)

    def block_mean(self, x: torch.Tensor) -> torch.Tensor:
        """D: (B, C, T, H, W) -> (B, C, T', H', W')."""
        return self.fold(x).unflatten(1, (math.prod(self.multiple), -1)).mean(1)

    def upsample(self, x: torch.Tensor) -> torch.Tensor:
        """U: (B, C, T', H', W') -> (B, C, T, H, W), trilinear between the centres of what the blocks cover."""
        # Autocast would round the product, and x0 is divided by the noise level later.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            for axis, matrix in enumerate(self.upsampling):
                x = torch.tensordot(x, matrix.to(x.device, x.dtype), dims=([axis + 2], [1])).movedim(-1, axis + 2)
        return x


def _fold_axis(stretches: tuple[int, ...], multiple: int, patch: int, causal: bool):
    """(sources, upsampling, kept) of an axis of stretches that lie behind one another and share no block."""
    sources, upsampling, kept = [], [], []
    for start, length in zip(accumulate(stretches, initial=0), stretches, strict=False):
        blocks = block_sources(length, multiple, patch, causal)
        first = sum(part.numel() for part in sources) + (multiple - 1 if causal else 0)
        sources.append(blocks + start)
        upsampling.append(interpolation_matrix(block_centres(blocks, causal), length))
        kept.append(slice(first, first + length))
    return torch.cat(sources), torch.block_diag(*upsampling), tuple(kept)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors are used in training too
def folding_for(
    size: Size3, multiple: Size3, patch_size: Size3, causal: bool, clips: tuple[int, ...] | None = None
) -> Folding:
    """The folding of latents of `size` (T, H, W). Raises ValueError if they are no multiple of the base patch size.

    clips: frames of each clip, where several lie behind one another in time.
    """
    if any(length % patch for length, patch in zip(size, patch_size, strict=True)):
        raise ValueError(f"latents of size {size} cannot be cut into the model's own patches of {patch_size}")
    stretches = [clips or size[:1], size[1:2], size[2:]]
    folded = [_fold_axis(stretches[axis], multiple[axis], patch_size[axis], causal and axis == 0) for axis in range(3)]
    sources, upsampling, kept = zip(*folded, strict=True)
    centres = tuple(token_centres(blocks, patch) for blocks, patch in zip(sources, patch_size, strict=True))
    kappa = torch.einsum("t,h,w->thw", *map(noise_gain, sources)).float()[None, None]
    return Folding(size, multiple, patch_size, sources, kept[0], centres, upsampling, kappa)
