"""The public tubelet layers: exact at the base patch size, one shared parameter at every other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexivid.patches.resize import resize_embedder, resize_head
from flexivid.patches.tubelet import FlexTubeletEmbed, FlexTubeletUnembed

BASE = (1, 2, 2)
COARSE = [(1, 4, 4), (2, 4, 4), (2, 2, 2), (3, 5, 3), (1, 1, 1)]


@pytest.fixture
def layers():
    torch.manual_seed(0)
    sizes = [BASE, *COARSE]
    return FlexTubeletEmbed(3, 16, BASE, sizes), FlexTubeletUnembed(16, 3, BASE, sizes)


def test_base_size_is_conv3d_and_linear_bit_for_bit(layers):
    embed, unembed = layers
    x = torch.randn(2, 3, 4, 8, 6)
    conv = nn.Conv3d(3, 16, BASE, stride=BASE)
    conv.load_state_dict(embed.proj.state_dict())
    tokens, grid = embed(x)
    assert grid == (4, 4, 3)
    assert torch.equal(tokens, conv(x).flatten(2).transpose(1, 2))
    assert torch.equal(embed(x, BASE)[0], tokens)
    patches = unembed.proj(tokens).view(2, 4, 4, 3, 1, 2, 2, 3)
    expected = patches.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(2, 3, 4, 8, 6)
    assert torch.equal(unembed(tokens, grid), expected)


@pytest.mark.parametrize("size", COARSE)
def test_coarse_size_uses_the_resized_weights(layers, size):
    embed, unembed = layers
    x = torch.randn(2, 3, *(2 * p for p in size))
    tokens, grid = embed(x, size)
    expected = F.conv3d(x, resize_embedder(embed.proj.weight, size), embed.proj.bias, stride=size)
    torch.testing.assert_close(tokens, expected.flatten(2).transpose(1, 2))
    assert grid == (2, 2, 2)
    head = resize_head(unembed.proj.weight, unembed.proj.bias, BASE, size)
    corner = F.linear(tokens[:, 0], *head).view(2, *size, 3).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(unembed(tokens, grid, size)[:, :, : size[0], : size[1], : size[2]], corner)


def test_upsampled_video_gives_the_same_tokens(layers):
    """Up-sampled patch by patch, a video has the same tokens at the coarse size as the original at the base size."""
    embed, unembed = (layer.double() for layer in layers)
    patch = torch.randn(1, 3, 1, 2, 2, dtype=torch.float64)
    large = F.interpolate(patch[:, :, 0], size=(4, 4), mode="bilinear")[:, :, None].expand(-1, -1, 2, -1, -1)
    fine, grid = embed(patch)
    coarse, _ = embed(large, (2, 4, 4))
    assert (coarse - fine).abs().max() < 1e-10
    expected = F.interpolate(unembed(fine, grid)[:, :, 0], size=(4, 4), mode="bilinear")
    assert (unembed(fine, grid, (1, 4, 4))[:, :, 0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("size", [BASE, *COARSE])
def test_odd_shapes_are_padded_by_replication_and_cropped(layers, size):
    embed, unembed = layers
    shape = (5, 7, 9)
    x = torch.randn(2, 3, *shape)
    tokens, grid = embed(x, size)
    assert grid == tuple(-(-n // p) for n, p in zip(shape, size, strict=True))
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], 16)
    index = [torch.arange(g * p).clamp(max=n - 1) for n, g, p in zip(shape, grid, size, strict=True)]
    padded = x[:, :, index[0]][:, :, :, index[1]][..., index[2]]
    assert torch.equal(tokens, embed(padded, size)[0])
    out = unembed(tokens, grid, size, shape)
    assert out.shape == x.shape
    assert torch.equal(out, unembed(tokens, grid, size)[:, :, :5, :7, :9])


@pytest.mark.parametrize("size", [BASE, *COARSE])
def test_gradients_reach_the_base_weights(layers, size):
    embed, unembed = layers
    tokens, grid = embed(torch.randn(1, 3, 5, 7, 9), size)
    unembed(tokens, grid, size).square().mean().backward()
    for parameter in (*embed.proj.parameters(), *unembed.proj.parameters()):
        assert parameter.grad.abs().sum() > 0
    for other in COARSE:
        grad = embed.size_embedding["x".join(map(str, other))].grad
        assert (grad is not None and grad.abs().sum() > 0) == (other == size)


def test_patch_size_embedding_is_zero_at_first_and_added_to_coarse_tokens_only(layers):
    embed, _ = layers
    x = torch.randn(1, 3, 4, 8, 8)
    base, coarse = embed(x)[0], embed(x, (1, 4, 4))[0]
    assert all(not parameter.any() for parameter in embed.size_embedding.values())
    nn.init.ones_(embed.size_embedding["1x4x4"])
    torch.testing.assert_close(embed(x, (1, 4, 4))[0], coarse + 1)
    assert torch.equal(embed(x)[0], base)


def test_matrices_stay_out_of_the_state_dict_and_survive_casts(layers):
    embed, unembed = layers
    assert set(unembed.state_dict()) == {"proj.weight", "proj.bias"}
    assert {k.split(".")[0] for k in embed.state_dict()} == {"proj", "size_embedding"}
    half = copy.deepcopy(embed).bfloat16()
    assert torch.equal(half.get_buffer("resize_2x4x4"), embed.get_buffer("resize_2x4x4"))
    with torch.device("meta"):
        empty = FlexTubeletEmbed(3, 16, BASE, COARSE)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(embed.state_dict())
    x = torch.randn(1, 3, 4, 8, 8)
    assert torch.equal(empty(x, (2, 4, 4))[0], embed(x, (2, 4, 4))[0])


def test_unknown_patch_size_is_named(layers):
    embed, unembed = layers
    with pytest.raises(ValueError, match="1x8x8.*1x2x2, 1x4x4"):
        embed(torch.randn(1, 3, 1, 8, 8), (1, 8, 8))
    with pytest.raises(ValueError, match="1x8x8"):
        unembed(torch.randn(1, 1, 16), (1, 1, 1), (1, 8, 8))
