"""Positions for a DiT of one's own: the same place at every patch size, clips longer than the table."""

import pytest
import torch

from flexivid import FlexTubeletEmbed, FlexTubeletPositions

BASE, LENGTHS = (1, 2, 2), (5, 4, 6)


def positions(kind: str, **settings) -> FlexTubeletPositions:
    return FlexTubeletPositions(kind, 24, BASE, LENGTHS, **settings)


@pytest.mark.parametrize("size", [(5, 8, 12), (7, 9, 11)])
@pytest.mark.parametrize("patch", [BASE, (2, 4, 4), (3, 2, 6), (1, 1, 1)])
def test_there_is_one_for_every_token(size, patch):
    tokens, _ = FlexTubeletEmbed(3, 24, BASE, [patch])(torch.randn(1, 3, *size), patch)
    assert positions("additive")(size, patch).shape == tokens[0].shape
    assert all(table.shape == tokens[0].shape for table in positions("rope")(size, patch))


def test_additive_tables_are_read_at_the_centres():
    module = positions("additive")
    base = module((5, 8, 12)).view(5, 4, 6, 24)
    corners = base[:4].unflatten(2, (3, 2)).unflatten(1, (2, 2)).unflatten(0, (2, 2)).mean((1, 3, 5))
    coarse = module((4, 8, 12), (2, 4, 4)).view(2, 2, 3, 24)
    torch.testing.assert_close(coarse, corners)
    torch.testing.assert_close(base[3, 2, 1], module.tables[0][3] + module.tables[1][2] + module.tables[2][1])
    # The last token of an odd clip holds one frame, and stands there.
    odd = module((5, 8, 12), (2, 2, 2)).view(3, 4, 6, 24)
    torch.testing.assert_close(odd[2], base[4])


def test_rotary_positions_are_those_of_the_centres():
    module = positions("rope")
    base, coarse = (torch.complex(*module((6, 8, 12), patch)) for patch in (BASE, (2, 4, 4)))
    base, coarse = base.view(3, 2, 2, 2, 3, 2, 24), coarse.view(3, 2, 3, 24)
    torch.testing.assert_close(coarse**8, base.permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5).prod(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("patch", [BASE, (2, 2, 2)])
def test_clips_longer_than_the_table(patch):
    long, span = (20, 2, 2), 20 // patch[0]
    additive = positions("additive")
    stretched = additive(long, patch)
    assert stretched.shape == (span, 24)
    rows = additive.tables[0].detach() + additive.tables[1][0] + additive.tables[2][0]
    torch.testing.assert_close(stretched[0], rows[0], atol=0.2, rtol=0)
    torch.testing.assert_close(stretched[-1], rows[-1], atol=0.2, rtol=0)

    # Rotary positions go on, or are squeezed by as much at every patch size.
    on, squeezed = (torch.complex(*positions("rope", interpolate=flag)(long, patch))[:, :8] for flag in (False, True))
    centres = patch[0] * torch.arange(span) + (patch[0] - 1) / 2
    frequencies = (10000.0 ** (-torch.arange(0, 8, 2) / 8)).repeat_interleave(2)
    for found, at in ((on, centres), (squeezed, centres * 5 / 20)):
        angles = at[:, None] * frequencies
        torch.testing.assert_close(found, torch.complex(angles.cos(), angles.sin()), atol=1e-5, rtol=0)


def test_tables_are_trained_at_every_patch_size():
    for size, patch in (((5, 8, 12), (2, 4, 4)), ((11, 8, 12), BASE)):
        module = positions("additive")
        module(size, patch).square().sum().backward()
        assert all(table.grad is not None and table.grad.any() for table in module.tables)
    assert not list(positions("rope").parameters())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="kind must be additive or rope, not 'sincos'"):
        FlexTubeletPositions("sincos", 24, BASE, LENGTHS)
    with pytest.raises(ValueError, match="dim of rope positions must be a multiple of 6, not 16"):
        FlexTubeletPositions("rope", 16, BASE, LENGTHS)
