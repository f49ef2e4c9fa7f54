"""The identities that the resize of embedder and head must satisfy, and the two mistakes that break them."""

import pytest
import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange

from flexivid.patches.resize import (
    bilinear_matrix,
    embedder_to_folded,
    head_to_folded,
    resize_embedder,
    resize_head,
    resize_matrix,
    temporal_matrix,
)

UP = [
    ((1, 2, 2), (1, 4, 4)),  # Wan, spatial
    ((1, 2, 2), (2, 2, 2)),  # Wan, temporal
    ((1, 2, 2), (2, 4, 4)),
    ((1, 2, 2), (1, 3, 5)),  # rectangle, not a multiple
    ((1, 2, 3), (3, 3, 7)),
    ((2, 2, 2), (3, 4, 4)),  # not a multiple in time
    ((2, 2, 2), (4, 2, 6)),
    ((1, 1, 1), (1, 2, 2)),  # LTX
    ((3, 2, 2), (5, 2, 2)),
    ((1, 4, 4), (1, 5, 9)),
]
DOWN = [((1, 4, 4), (1, 2, 2)), ((4, 4, 4), (2, 2, 2)), ((3, 5, 4), (2, 3, 3)), ((2, 2, 2), (1, 4, 4))]
COARSE = [((1, 2, 2), (1, 2, 2)), ((1, 2, 2), (2, 1, 1)), ((2, 2, 3), (2, 3, 2)), ((1, 1, 1), (1, 2, 2))]  # base, m


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def resize_patch(x, size):
    """Reference resize of patches (..., t, h, w): F.interpolate in space, the temporal matrix in time."""
    frames = F.interpolate(x.flatten(0, -4).flatten(0, 1)[:, None], size=size[1:], mode="bilinear", align_corners=False)
    frames = frames.view(*x.shape[:-2], *size[1:])
    return torch.einsum("ij,...jhw->...ihw", temporal_matrix(x.shape[-3], size[0]), frames)


def fold(x, m):
    return rearrange(x, "b c (t mt) (h mh) (w mw) -> b (mt mh mw c) t h w", mt=m[0], mh=m[1], mw=m[2])


def unfold(x, m):
    return rearrange(x, "b (mt mh mw c) t h w -> b c (t mt) (h mh) (w mw)", mt=m[0], mh=m[1], mw=m[2])


def unpatchify(tokens, grid, p, channels_last):
    rows = "pt ph pw c" if channels_last else "c pt ph pw"
    sizes = dict(zip(("t", "h", "w", "pt", "ph", "pw"), (*grid, *p), strict=True))
    return rearrange(tokens, f"b (t h w) ({rows}) -> b c (t pt) (h ph) (w pw)", **sizes)


def coarse_of(base, m):
    return tuple(p * k for p, k in zip(base, m, strict=True))


@pytest.mark.parametrize("small,large", [((2, 2), (4, 4)), ((2, 3), (7, 5)), ((1, 1), (3, 2)), ((5, 4), (2, 3))])
def test_bilinear_matrix_is_the_resize(small, large):
    x = randn(1, 1, *small)
    expected = F.interpolate(x, size=large, mode="bilinear", align_corners=False)
    torch.testing.assert_close(bilinear_matrix(small, large) @ x.flatten(), expected.flatten())


def test_temporal_matrix_repeats_and_keeps_rank():
    assert torch.equal(temporal_matrix(2, 6), torch.eye(2).double().repeat_interleave(3, 0))
    for small in range(1, 8):
        for large in range(1, 12):
            matrix = temporal_matrix(small, large)
            torch.testing.assert_close(matrix.sum(1), torch.ones(large).double())
            torch.testing.assert_close(matrix.sum(0), torch.full((small,), large / small).double())
            assert torch.linalg.matrix_rank(matrix) == min(small, large)


@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("small,large", UP)
def test_embedder_invariance(small, large, channels):
    """<R x, w'> = <x, w> for every x."""
    x, w = randn(8, channels, *small), randn(5, channels, *small).flip(0)
    fine = torch.einsum("bcthw,dcthw->bd", x, w)
    coarse = torch.einsum("bcthw,dcthw->bd", resize_patch(x, large), resize_embedder(w, large))
    assert (coarse - fine).abs().max() < 1e-10


@pytest.mark.parametrize("small,large", UP)
def test_plain_resize_in_the_embedder_is_wrong(small, large):
    x, w = randn(8, 3, *small), randn(5, 3, *small)
    fine = torch.einsum("bcthw,dcthw->bd", x, w)
    coarse = torch.einsum("bcthw,dcthw->bd", resize_patch(x, large), resize_patch(w, large))
    assert (coarse - fine).abs().max() > 0.1 * fine.abs().max()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("small,large", UP)
def test_head_output_is_the_resized_output(small, large, channels, channels_last):
    pixels = small[0] * small[1] * small[2]
    weight, bias, token = randn(pixels * channels, 6), randn(pixels * channels) + 1, randn(2, 1, 6)
    fine = unpatchify(F.linear(token, weight, bias), (1, 1, 1), small, channels_last)
    new = resize_head(weight, bias, small, large, channels_last)
    coarse = unpatchify(F.linear(token, *new), (1, 1, 1), large, channels_last)
    assert (coarse - resize_patch(fine, large)).abs().max() < 1e-10


@pytest.mark.parametrize("small,large", UP)
def test_pseudo_inverse_in_the_head_is_wrong(small, large):
    kernel = randn(1, 4, *small)  # (D, C, p_t, p_h, p_w): a head's rows laid out as an embedder's kernel
    wrong = resize_embedder(kernel, large)
    assert (wrong - resize_patch(kernel, large)).abs().max() > 0.1 * kernel.abs().max()


@pytest.mark.parametrize("small,large", UP)
def test_constant_patches_keep_their_gain(small, large):
    """On constant patches: embedder gain 1, where plain R has the volume ratio; head gain 1, where pinv has 1/ratio."""
    ratio = (large[0] * large[1] * large[2]) / (small[0] * small[1] * small[2])
    w = randn(5, 3, *small)
    gain = w.sum((2, 3, 4))
    torch.testing.assert_close(resize_embedder(w, large).sum((2, 3, 4)), gain)
    flat = torch.ones_like(w)
    torch.testing.assert_close(resize_patch(flat, large).sum((2, 3, 4)), ratio * flat.sum((2, 3, 4)))
    torch.testing.assert_close(resize_embedder(flat, large).mean((2, 3, 4)), flat.mean((2, 3, 4)) / ratio)
    rows = flat[0, 0].reshape(-1, 1)
    weight, bias = resize_head(rows, None, small, large)
    torch.testing.assert_close(weight, torch.ones_like(weight))
    assert bias is None


@pytest.mark.parametrize("large,small", DOWN)
def test_down_sizing_is_the_least_squares_answer(large, small):
    """No other w' has a smaller expected (<x, w> - <R x, w'>)^2 over white x: the residual is orthogonal to R."""
    w = randn(5, 3, *large)
    new = resize_embedder(w, small)
    matrix = resize_matrix(large, small)
    residual = w.flatten(2) - new.flatten(2) @ matrix
    assert (residual @ matrix.T).abs().max() < 1e-10


def test_time_divides_the_embedder_and_repeats_the_head():
    w = randn(5, 3, 1, 2, 2)
    torch.testing.assert_close(resize_embedder(w, (3, 2, 2)), w.expand(-1, -1, 3, -1, -1) / 3)
    rows = randn(1 * 2 * 2 * 3, 6)
    torch.testing.assert_close(resize_head(rows, rows[:, 0], (1, 2, 2), (2, 2, 2))[0], rows.repeat(2, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computed_in_float32_and_cast_back(dtype):
    w = randn(5, 3, 1, 2, 2).to(dtype)
    expected = resize_embedder(w.double(), (1, 3, 5)).float().to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a matmul would be rounded here
        actual = resize_embedder(w, (1, 3, 5))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("base,m", COARSE)
def test_folded_embedder_equals_coarse_embedder(base, m):
    coarse = coarse_of(base, m)
    w, x = randn(5, 3, *coarse), randn(2, 3, *coarse_of(coarse, (2, 3, 1)))
    raw = F.conv3d(x, w, stride=coarse)
    folded = F.conv3d(fold(x, m), embedder_to_folded(w, base), stride=base)
    torch.testing.assert_close(folded, raw, rtol=0, atol=1e-10)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("base,m", COARSE)
def test_folded_head_equals_coarse_head(base, m, channels_last):
    coarse, grid = coarse_of(base, m), (2, 3, 2)
    rows = 3 * coarse[0] * coarse[1] * coarse[2]
    weight, bias, tokens = randn(rows, 6), randn(rows), randn(2, 12, 6)
    raw = unpatchify(F.linear(tokens, weight, bias), grid, coarse, channels_last)
    folded_head = head_to_folded(weight, bias, coarse, base, channels_last)
    folded = unfold(unpatchify(F.linear(tokens, *folded_head), grid, base, channels_last), m)
    torch.testing.assert_close(folded, raw, rtol=0, atol=1e-10)


def test_folding_refuses_a_patch_that_is_not_a_multiple():
    with pytest.raises(EinopsError):
        embedder_to_folded(randn(5, 3, 1, 3, 3), (1, 2, 2))
    with pytest.raises(EinopsError):
        head_to_folded(randn(27, 6), None, (1, 3, 3), (1, 2, 2))


def test_resize_follows_the_weights_device():
    weight = torch.empty(5, 3, 1, 2, 2, device="meta")
    assert resize_embedder(weight, (2, 4, 4)).shape == (5, 3, 2, 4, 4)
