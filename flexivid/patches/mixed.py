"""One sequence of fine and coarse tokens: which there are, and where each belongs. Tensors only.

A clip is cut into the tokens of a coarse patch size, its blocks; some blocks are cut once more, into the base tokens
that they hold. The sequence has the coarse tokens of the other blocks first, then those base tokens, each kind in the
order of its grid. Every clip of a batch has as many of each, so that shapes are static.
"""

import math
from dataclasses import dataclass

import torch

from flexivid.patches.folding import Folding, Size3


@dataclass(frozen=True)
class Selection:
    """Which blocks are fine, and so which tokens a mixed sequence holds.

    folding: of the coarse patch size. coarse: (B, n) int64, the coarse tokens; fine: (B, m) int64, the base tokens,
    each in the order of its own grid. is_fine: (B, base tokens) bool.
    """

    folding: Folding
    coarse: torch.Tensor
    fine: torch.Tensor
    is_fine: torch.Tensor

    @classmethod
    def of_blocks(cls, folding: Folding, blocks: torch.Tensor, count: int, tokens: int) -> "Selection":
        """blocks: (B, coarse tokens) bool, those that are fine: `count` in each row, which hold `tokens` base tokens.

        Counts are given, not read: that would wait for the device.
        """
        is_fine = blocks[:, folding.on(folding.owners, blocks.device)]
        coarse = _indices(~blocks, blocks.shape[1] - count)
        return cls(folding, coarse, _indices(is_fine, tokens), is_fine)

    def repeated(self, times: int) -> "Selection":
        """For a batch that holds every clip as often, one batch behind the other."""
        coarse, fine, is_fine = (part.repeat(times, 1) for part in (self.coarse, self.fine, self.is_fine))
        return Selection(self.folding, coarse, fine, is_fine)

    @property
    def counts(self) -> tuple[int, int]:
        """Coarse and fine tokens of a clip."""
        return self.coarse.shape[1], self.fine.shape[1]

    def gather(self, coarse: torch.Tensor | None, fine: torch.Tensor | None) -> torch.Tensor:
        """What there is of each token, (B or 1, coarse tokens, ...) and (B or 1, base tokens, ...) -> (B, n + m, ...).

        None for a kind that is not in the sequence.
        """
        parts = [_at(values, index) for values, index in ((coarse, self.coarse), (fine, self.fine)) if index.shape[1]]
        return torch.cat(parts, 1)

    def scatter(self, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, n + m, ...) -> (B, coarse tokens, ...) and (B, base tokens, ...), 0 for tokens not in the sequence."""
        parts = sequence.split(self.counts, 1)
        lengths = math.prod(self.folding.coarse_grid), math.prod(self.folding.grid)
        coarse, fine = (
            part.new_zeros(len(part), length, *part.shape[2:]).scatter(1, _index(index, part), part)
            for part, index, length in zip(parts, (self.coarse, self.fine), lengths, strict=True)
        )
        return coarse, fine

    def fine_latents(self) -> torch.Tensor:
        """(B, 1, T, H, W) bool: which latents lie in fine blocks."""
        patch = self.folding.patch_size
        return to_latents(self.is_fine[:, :, None, None, None, None].expand(-1, -1, 1, *patch), self.folding.grid)


def to_latents(tokens: torch.Tensor, grid: Size3) -> torch.Tensor:
    """(B, tokens of a grid, C, p_t, p_h, p_w) -> (B, C, T, H, W)."""
    by_axis = tokens.unflatten(1, grid).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return by_axis.flatten(6).flatten(4, 5).flatten(2, 3)


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    values = values.expand(len(index), *values.shape[1:])
    return values.gather(1, _index(index, values))


def _index(index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(B, k) over all further axes of `values`."""
    return index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])


def _indices(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Where each row is true, `count` times, rising: (B, count). `nonzero` would wait for the device."""
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :count]
