"""Folding, padding, cropping, and the maths of block means."""

import math

import pytest
import torch
import torch.nn.functional as F

from flexivid.patches.folding import block_sources, folding_for

SIZES = [(1, 2, 2), (5, 16, 16), (4, 6, 10), (21, 10, 6), (2, 2, 14)]
MULTIPLES = [(1, 2, 2), (2, 1, 1), (2, 2, 2), (3, 1, 4), (4, 4, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("causal", [True, False])
def test_unfold_inverts_fold(size, multiple, causal):
    x = torch.randn(2, 3, *size)
    folding = folding_for(size, multiple, (1, 2, 2), causal)
    folded = folding.fold(x)
    assert folded.shape[1] == 3 * math.prod(multiple)
    assert all(length % patch == 0 for length, patch in zip(folded.shape[2:], (1, 2, 2), strict=True))
    assert torch.equal(folding.unfold(folded), x)


def test_first_frame_is_its_own_block():
    assert block_sources(5, 2, causal=True).tolist() == [[0, 0], [1, 2], [3, 4]]
    assert block_sources(6, 2, causal=True).tolist() == [[0, 0], [1, 2], [3, 4], [5, 5]]
    assert block_sources(5, 2).tolist() == [[0, 1], [2, 3], [4, 4]]


@pytest.mark.parametrize(
    ("length", "multiple", "patch", "causal", "centres"),
    [
        (5, 2, 1, True, [0, 1.5, 3.5]),  # 0 | 1 2 | 3 4
        (7, 4, 1, True, [0, 2.5, 5.5]),  # 0 | 1 2 3 4 | 5 6
        (6, 3, 1, True, [0, 2, 4.5]),  # 0 | 1 2 3 | 4 5
        (6, 4, 1, False, [1.5, 4.5]),  # 0 1 2 3 | 4 5
        (10, 4, 2, False, [1.5, 4]),  # of two latents a token: 0 1 2 3 | 4
        (10, 2, 2, True, [0.25, 2, 3.75]),  # latents 0 1 2 | 3 4 5 6 | 7 8 9
        (8, 3, 2, True, [0.5, 2.5]),  # latents 0 1 2 3 | 4 5 6 7
        (8, 2, 2, True, [0.25, 2, 3.25]),  # latents 0 1 2 | 3 4 5 6 | 7, the end of the last base token
    ],
)
def test_tokens_stand_at_the_centre_of_what_they_cover(length, multiple, patch, causal, centres):
    folding = folding_for((length, 2, 2), (multiple, 1, 1), (patch, 2, 2), causal)
    assert folding.centres[0].tolist() == centres and folding.centres[1].tolist() == [0]


def test_kappa_is_the_measured_noise_of_block_means():
    """Padded blocks average fewer independent noises; kappa must say so for each block."""
    folding = folding_for((5, 6, 10), (2, 2, 2), (1, 2, 2), True)
    noise = torch.randn(20000, 1, 5, 6, 10, generator=torch.Generator().manual_seed(0))
    measured = folding.block_mean(noise).std(0)
    assert torch.allclose(measured, folding.kappa[0], rtol=0.03)
    assert folding.kappa.min().item() == pytest.approx(8**-0.5)
    assert folding.kappa[0, 0, 0, 0, 0].item() == pytest.approx(4**-0.5)  # frame 1 alone: 4 latents, not 8


def test_upsampling_is_trilinear_where_nothing_is_padded():
    x = torch.randn(1, 2, 3, 4, 5, dtype=torch.float64)
    folding = folding_for((6, 8, 10), (2, 2, 2), (1, 1, 1), False)
    expected = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
    assert torch.allclose(folding.upsample(x), expected, atol=1e-12)


def test_upsampling_keeps_linear_motion_of_the_first_frame_block():
    """Block centres are 0, 1.5, 3.5 for 1 | 2 3 | 4 5: a ramp in time is reproduced between them."""
    folding = folding_for((5, 2, 2), (2, 1, 1), (1, 2, 2), True)
    ramp = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(1, 1, 5, 2, 2)
    upsampled = folding.upsample(folding.block_mean(ramp))
    assert torch.allclose(upsampled[0, 0, :4, 0, 0], torch.arange(4.0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_constants_survive_down_and_up(size, multiple):
    x = torch.full((1, 2, *size), 3.0)
    folding = folding_for(size, multiple, (1, 2, 2), True)
    assert torch.allclose(folding.upsample(folding.block_mean(x)), x)
