"""Positions of coarse tokens: rotary tables at the centres of what tokens cover, additive tables interpolated.

A coarse token stands at the centre of the base tokens that it covers, in base-token units, origin on the first frame.
"""

import torch


def middle(table: torch.Tensor, token_sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """An additive table, or positions themselves, at the centres of coarse tokens: the mean of the middle one or two.

    table: (T, H, W, ...) of the base grid; token_sources: per axis (coarse tokens, multiple), the base tokens that
    each coarse token covers. Returns (T', H', W', ...).
    """
    for axis, sources in enumerate(token_sources):
        multiple = sources.shape[1]
        index = sources[:, [(multiple - 1) // 2, multiple // 2]].to(table.device)
        shape = (*table.shape[:axis], *index.shape, *table.shape[axis + 1 :])
        table = table.index_select(axis, index.flatten()).view(shape).mean(axis + 1)
    return table


def centred_rope(
    cos: torch.Tensor, sin: torch.Tensor, sources: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables of a coarse grid from those of the base grid, without knowing the frequencies.

    cos, sin: (T, H, W, ...) of the base grid; sources: as in `middle`. The mean of the unit phasors of the one or two
    middle tokens points at the angle of the centre, exactly once renormalised; a mean over all of more than six would
    turn round at the fastest frequency. Returns two (T', H', W', ...).
    """
    cos, sin = middle(cos, sources), middle(sin, sources)
    length = torch.sqrt(cos**2 + sin**2)
    return cos / length, sin / length


def interpolate_table(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """An additive (learned or sin-cos) position table read at fractional positions, linearly.

    table: (length, D); positions: (n,) in rows of the table. Positions beyond its ends take the end rows: stretch
    positions to [0, length - 1] to serve clips longer than the table. Returns (n, D).
    """
    positions = positions.to(table.device, torch.float64).clamp(0, len(table) - 1)
    left = positions.floor().long().clamp(max=max(len(table) - 2, 0))
    right = (left + 1).clamp(max=len(table) - 1)
    weight = (positions - left).to(table.dtype).unsqueeze(-1)
    return table[left] * (1 - weight) + table[right] * weight


def sincos_table(positions: torch.Tensor, dim: int, theta: float = 10000.0) -> torch.Tensor:
    """Sin-cos embeddings (Vaswani et al. 2017, arXiv 1706.03762) at any positions: (n,) -> (n, dim), sines first."""
    frequencies = theta ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).float()


def stretched_positions(count: int, length: int) -> torch.Tensor:
    """`count` positions spread over a table of `length` rows, centre on centre as in an image resize: (count,)."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * length / count - 0.5).clamp(0, length - 1)


def rope_table(
    positions: torch.Tensor, dim: int, theta: float = 10000.0, trained_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables (Su et al. 2021, arXiv 2104.09864) at any positions, each frequency twice in a row.

    positions: (n,), beyond the trained length too (extended), or squeezed into it by position interpolation (Chen et
    al. 2023, arXiv 2306.15595) if `trained_length` is given and smaller than the span. Returns cos, sin: (n, dim).
    """
    positions = positions.double()
    span = positions.max() + 1
    if trained_length is not None and span > trained_length:
        positions = positions * trained_length / span
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (positions[:, None] * frequencies).repeat_interleave(2, -1)
    return angles.cos().float(), angles.sin().float()
