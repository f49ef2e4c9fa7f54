"""Folding: a coarse patch is a base patch over folded (space-to-depth) latents. DESIGN: the one idea of flexivid.

    (B, C, T, H, W) --pad, fold m--> (B, M*C, T/m_t, H/m_h, W/m_w) --stock forward--> unfold, crop

Padding replicates edges. In time a causal video VAE encodes the first frame alone, so the first latent frame is
its own block: m_t - 1 copies of it in front, copies of the last frame behind. In space the far edge is replicated.
Clips that lie behind one another in time, such as key frames beside the clip that they belong to, share no block.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import torch

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
    all blocks; `centres`: per axis where each coarse token stands, see `token_centres`; `aside`: whether one stands
    elsewhere than on a base token and midway between two; `kappa`: (1, 1, T', H', W') float32, the standard deviation
    of the block mean of unit noise.
    """

    size: Size3
    multiple: Size3
    patch_size: Size3
    sources: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    kept: tuple[slice, ...]
    centres: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    aside: tuple[bool, ...]
    upsampling: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    kappa: torch.Tensor
    _placed: dict = field(default_factory=dict, repr=False, compare=False)  # what was computed here, as asked for

    @property
    def grid(self) -> Size3:
        """Tokens of the base grid per axis."""
        return token_grid(self.size, self.patch_size)

    @property
    def coarse_grid(self) -> Size3:
        """Tokens of the coarse grid per axis."""
        return tuple(len(centres) for centres in self.centres)

    @cached_property
    @torch.inference_mode(False)
    def owners(self) -> torch.Tensor:
        """Which coarse token each base token lies in, (base tokens,) int64, both in the order of their grids.

        Raises ValueError where a coarse token holds a part of a base token only: base patches of several frames, of a
        clip whose first frame is a block of its own.
        """
        by_axis = []
        for sources, patch, length in zip(self.sources, self.patch_size, self.grid, strict=True):
            covered = sources.reshape(len(sources) // patch, -1) // patch
            coarse = torch.arange(len(covered))[:, None].expand_as(covered)
            owner = torch.zeros(length, dtype=torch.long).index_put((covered,), coarse)
            if not torch.equal(owner[covered], coarse):
                raise ValueError("coarse patches of this model end within its own ones, so that the two do not mix")
            by_axis.append(owner)
        (t, h, w), (_, rows, columns) = by_axis, self.coarse_grid
        return ((t[:, None, None] * rows + h[:, None]) * columns + w).flatten()

    @cached_property
    @torch.inference_mode(False)
    def kinds(self) -> dict[int, torch.Tensor]:
        """Coarse tokens by how many base tokens they hold, (n,) int64 each: fewer at the edges of odd grids, and where
        a first frame is a block of its own."""
        held = torch.bincount(self.owners)
        return {int(count): (held == count).nonzero().flatten() for count in held.unique()}

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, C, T' m_t, H' m_h, W' m_w) by replicating edges."""
        for axis, sources in enumerate(self.sources):
            if sources.numel() != self.size[axis]:
                x = x.index_select(axis + 2, self.on(sources, x.device).flatten())
        return x

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, M*C, T', H', W'), channels ordered (m_t, m_h, m_w, C)."""
        x, (m_t, m_h, m_w), (t, h, w) = self.pad(x), self.multiple, self.kappa.shape[2:]
        batch, channels = x.shape[:2]
        blocks = x.reshape(batch, channels, t, m_t, h, m_h, w, m_w).permute(0, 3, 5, 7, 1, 2, 4, 6)
        return blocks.reshape(batch, -1, t, h, w)

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """(B, M*C, T', H', W') -> (B, C, T, H, W): the inverse of `fold`, padding cropped."""
        (m_t, m_h, m_w), (batch, _, t, h, w) = self.multiple, x.shape
        blocks = x.reshape(batch, m_t, m_h, m_w, -1, t, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3)
        x = blocks.reshape(batch, -1, t * m_t, h * m_h, w * m_w)[..., : self.size[1], : self.size[2]]
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
                if self.multiple[axis] > 1 or matrix.shape[0] != matrix.shape[1]:  # else every block is a position
                    matrix, behind = self.on(matrix, x.device, x.dtype), x.shape[axis + 3 :]
                    x = (matrix @ x.flatten(axis + 3)).unflatten(-1, behind) if behind else x @ matrix.T
        return x

    def noise_gains(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """kappa (1, 1, T', H', W') and that of a block without padding, on a device: one and the same if all agree."""
        found = self._placed.get(("kappa", device))
        if found is None:
            with torch.inference_mode(False):
                kappa = self.kappa if self.kappa.min() < self.kappa.max() else self.kappa[:, :, :1, :1, :1]
                kappa = kappa.to(device)
                found = self._placed["kappa", device] = kappa, kappa if kappa.numel() == 1 else kappa.median()
        return found

    def on(self, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One of this folding's tensors on a device, copied there once."""
        key = id(tensor), device, dtype
        if key not in self._placed:
            with torch.inference_mode(False):
                self._placed[key] = tensor.to(device, dtype or tensor.dtype)
        return self._placed[key]


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
    aside = tuple(bool((centre * 2 % 1).any()) for centre in centres)
    return Folding(size, multiple, patch_size, sources, kept[0], centres, aside, upsampling, kappa)
