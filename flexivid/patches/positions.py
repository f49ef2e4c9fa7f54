"""Positions of coarse tokens: tables and coordinates of the base grid, read at the centres of what tokens cover.

Centres are in base-token units, origin on the first frame, as `Folding.centres` has them.
"""

import torch


def _beside(centre: torch.Tensor, table: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table at the two base tokens nearest to each centre, and the second one's share, which broadcasts to both.

    Where a last token holds only the end of a base patch its centre lies beyond those of all base tokens: share > 1.
    """
    left = centre.floor().long().clamp(max=max(table.shape[axis] - 2, 0))
    right = (left + 1).clamp(max=table.shape[axis] - 1)
    share = (centre - left).view(-1, *[1] * (table.ndim - axis - 1))
    return *(table.index_select(axis, index.to(table.device)) for index in (left, right)), share.to(table.device)


def middle(table: torch.Tensor, centres: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """An additive table, or positions themselves, at the centres of coarse tokens: linear between base tokens.

    table: (T, H, W, ...) of the base grid; centres: per axis (coarse tokens,). Returns (T', H', W', ...).
    """
    for axis, centre in enumerate(centres):
        left, right, share = _beside(centre, table, axis)
        table = (1 - share).to(table.dtype) * left + share.to(table.dtype) * right
    return table


def centred_rope(
    cos: torch.Tensor, sin: torch.Tensor, centres: tuple[torch.Tensor, ...], aside: tuple[bool, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables of a coarse grid from those of the base grid, without knowing the frequencies.

    cos, sin: (T, H, W, ...) of the base grid; centres: as in `middle`; aside: per axis, whether one lies elsewhere than
    on a base token and midway between two, as with base patches of several frames. Midway the mean of the two unit
    phasors points at the angle of the centre, exactly once renormalised; a mean over more than six tokens would turn
    round at the fastest frequency. Elsewhere a phasor is turned by a share of the angle. Returns two (T', H', W', ...).
    """
    centres = list(centres)
    for axis, centre in enumerate(centres):
        if aside[axis]:
            cos, sin = _turned(cos, sin, centre, axis)
            centres[axis] = torch.arange(len(centre))
    cos, sin = middle(cos, centres), middle(sin, centres)
    length = torch.sqrt(cos**2 + sin**2)
    return cos / length, sin / length


def _turned(cos: torch.Tensor, sin: torch.Tensor, centre: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables at any place of one axis: a base token's phasor, turned by a share of the angle to the next one."""
    left, right, share = _beside(centre, torch.complex(cos.float(), sin.float()), axis)
    angle = share * (right * left.conj()).angle()
    phasor = left * torch.complex(angle.cos(), angle.sin())
    return phasor.real.to(cos.dtype), phasor.imag.to(sin.dtype)


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
    positions: torch.Tensor,
    dim: int,
    theta: float = 10000.0,
    trained_length: int | None = None,
    span: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables (Su et al. 2021, arXiv 2104.09864) at any positions, each frequency twice in a row.

    positions: (n,), beyond the trained length too (extended), or squeezed into it by position interpolation (Chen et
    al. 2023, arXiv 2306.15595) if `trained_length` is given and smaller than the span, by default of the positions.
    Returns cos, sin: (n, dim).
    """
    positions = positions.double()
    span = positions.max() + 1 if span is None else span
    if trained_length is not None and span > trained_length:
        positions = positions * trained_length / span
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = (positions[:, None] * frequencies).repeat_interleave(2, -1)
    return angles.cos().float(), angles.sin().float()
