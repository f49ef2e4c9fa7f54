"""Positions for the tokens of `FlexTubeletEmbed`, which agree at every patch size and serve clips of any length."""

from typing import Literal

import torch
from torch import Tensor, nn

from flexivid.patches.positions import interpolate_table, rope_table, sincos_table, stretched_positions
from flexivid.patches.resize import PatchSize
from flexivid.patches.tubelet import Grid


class FlexTubeletPositions(nn.Module):
    """A token stands at the centre of what it covers, in base tokens, whatever its patch size.

    Args:
        kind: `additive`, one learned table an axis, which starts as sin-cos, for tokens to be added to; `rope`, rotary
            tables with a share of the channels for each axis.
        dim: D of the tokens; for `rope` that of a head, a multiple of 6.
        patch_size: base patch size (p_t, p_h, p_w).
        lengths: base tokens an axis (t, h, w) that a table holds, or that rotary positions are trained on. Beyond them
            additive tables are stretched over the clip.
        interpolate: rotary positions beyond `lengths` are squeezed into them (position interpolation, Chen et al. 2023,
            arXiv 2306.15595) instead of going on.

    Raises ValueError for another kind or a dim that does not fit it.
    """

    def __init__(
        self,
        kind: Literal["additive", "rope"],
        dim: int,
        patch_size: PatchSize,
        lengths: Grid,
        interpolate: bool = False,
    ):
        super().__init__()
        if kind not in ("additive", "rope"):
            raise ValueError(f"kind must be additive or rope, not {kind!r}")
        unit = 2 if kind == "additive" else 6
        if dim % unit:
            raise ValueError(f"dim of {kind} positions must be a multiple of {unit}, not {dim}")
        self.kind, self.dim, self.interpolate = kind, dim, interpolate
        self.patch_size, self.lengths = tuple(patch_size), tuple(lengths)
        if kind == "additive":
            self.tables = nn.ParameterList(
                nn.Parameter(sincos_table(torch.arange(length), dim)) for length in self.lengths
            )

    def forward(
        self, size: tuple[int, int, int], patch_size: PatchSize | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """For the tokens of a clip of `size` (T, H, W), before padding, at a patch size, by default the base one.

        Returns (N, D) to be added to tokens (B, N, D), or cos and sin (N, D), float32 on the CPU, in which each
        frequency stands twice in a row, N = n_t * n_h * n_w of `FlexTubeletEmbed`.
        """
        by_axis = [self._on_axis(axis, size[axis], (patch_size or self.patch_size)[axis]) for axis in range(3)]
        grid = [len(rows if self.kind == "additive" else rows[0]) for rows in by_axis]

        def spread(rows: Tensor, axis: int) -> Tensor:
            """(n, D) of one axis -> (n_t, n_h, n_w, D)."""
            return rows.view(*[-1 if i == axis else 1 for i in range(3)], rows.shape[1]).expand(*grid, -1)

        if self.kind == "additive":
            return sum(spread(rows, axis) for axis, rows in enumerate(by_axis)).flatten(0, 2)
        return tuple(
            torch.cat([spread(tables[i], axis) for axis, tables in enumerate(by_axis)], -1).flatten(0, 2)
            for i in range(2)
        )

    def _on_axis(self, axis: int, size: int, patch: int) -> Tensor | tuple[Tensor, Tensor]:
        base, length = self.patch_size[axis], self.lengths[axis]
        first = torch.arange(0, size, patch, dtype=torch.float64)
        last = (first + patch).clamp(max=size) - 1
        centres = ((first + last) / 2 - (base - 1) / 2) / base
        span = -(-size // base)
        if self.kind == "rope":
            return rope_table(centres, self.dim // 3, trained_length=length if self.interpolate else None, span=span)
        table = self.tables[axis]
        if span > length:
            table = interpolate_table(table, stretched_positions(span, length))
        return interpolate_table(table, centres)
