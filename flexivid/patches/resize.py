"""Resizing a DiT's patch embedder and output head to other patch sizes, as pure functions of the weights.

Let R be the linear map that up-samples a patch of the old size to the new size: bilinear in space, box overlap in
time (for integer multiples that is plain repetition). Then

    embedder   w' = (R^T)^+ w    so that <R x, w'> = <x, w>: the coarse token of an up-sampled patch is the fine token
    head       w' = R w          so that the coarse output is the up-sampled fine output

The embedder is the pseudo-inverse (PI) resize of FlexiViT (arXiv 2212.08013), which FlexiDiT
(arXiv 2502.20126) uses to start weak patch sizes from a pretrained powerful one. The two rules are not
interchangeable: R in the embedder multiplies constant patches by the ratio of the patch volumes, (R^T)^+ in the head
divides them by it.

The matrices are built in float64 on the CPU. Weights are resized in float32 (float64 if they are float64) and
returned in their own dtype. Patches are vectorised in the order (time, height, width), width fastest.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

PatchSize = tuple[int, int, int]


def bilinear_matrix(small: tuple[int, int], large: tuple[int, int]) -> Tensor:
    """Matrix B of the bilinear resize (half-pixel centres, no antialias): B @ vec(patch) = vec(resize(patch)).

    Returns (large_h * large_w, small_h * small_w), float64. `large` may also be the smaller of the two.
    """
    pixels = small[0] * small[1]
    basis = torch.eye(pixels, dtype=torch.float64, device="cpu").view(pixels, 1, *small)
    return F.interpolate(basis, size=tuple(large), mode="bilinear", align_corners=False).flatten(1).T


def temporal_matrix(small: int, large: int) -> Tensor:
    """Matrix of the resize in time: each new step is the mean of the old steps it overlaps, (large, small), float64.

    An integer multiple m repeats every step m times, so its pseudo-inverse repeats and divides by m. Any other ratio
    blends at the seams. Rows sum to 1 and columns to large / small, so the gain on static patches is kept both ways,
    and the rank is full, so up-sizing is exact for every ratio.
    """
    # Integer units of 1 / (small * large), so that repetition comes out as exact ones.
    new, old = torch.arange(large, device="cpu")[:, None] * small, torch.arange(small, device="cpu") * large
    overlap = torch.minimum(new + small, old + large) - torch.maximum(new, old)
    return overlap.clamp(min=0).double() / small


def resize_matrix(patch_size: PatchSize, new_patch_size: PatchSize) -> Tensor:
    """R, which takes vec(patch) to vec(resized patch): the Kronecker product of time and space.

    Returns (P_t*P_h*P_w, p_t*p_h*p_w), float64.
    """
    in_time = temporal_matrix(patch_size[0], new_patch_size[0])
    in_space = bilinear_matrix(tuple(patch_size[1:]), tuple(new_patch_size[1:]))
    return torch.kron(in_time, in_space.contiguous())


def embedder_matrix(patch_size: PatchSize, new_patch_size: PatchSize) -> Tensor:
    """(R^T)^+, which takes vec(kernel) to vec(resized kernel), w' = (R^T)^+ w (PI-resize).

    Returns (P_t*P_h*P_w, p_t*p_h*p_w), float64.
    """
    return torch.linalg.pinv(resize_matrix(patch_size, new_patch_size).T)


def apply_to_embedder(matrix: Tensor, weight: Tensor, patch_size: PatchSize) -> Tensor:
    """Resize an embedder (D, C, p_t, p_h, p_w) to (D, C, *patch_size) with a matrix from `embedder_matrix`."""
    return _resize_pixels(matrix, weight.flatten(2)).unflatten(2, patch_size)


def apply_to_head(matrix: Tensor, rows: Tensor, channels_last: bool = True) -> Tensor:
    """Resize head rows, the weight (p_t*p_h*p_w*C, D) or the bias (p_t*p_h*p_w*C,), with a `resize_matrix`."""
    pixels = matrix.shape[1]
    axis, split = (0, (pixels, -1)) if channels_last else (1, (-1, pixels))
    resized = _resize_pixels(matrix, rows.unflatten(0, split).movedim(axis, -1))
    return resized.movedim(-1, axis).flatten(0, 1)


def resize_embedder(weight: Tensor, patch_size: PatchSize) -> Tensor:
    """Pseudo-inverse resize of a patch embedder, w' = (R^T)^+ w (FlexiViT, arXiv 2212.08013).

    Args:
        weight: (D, C, p_t, p_h, p_w), the kernel of the patch-embedding convolution. Its bias needs no change.
        patch_size: the new (P_t, P_h, P_w), any positive integers. Up-sizing keeps <R x, w'> = <x, w> for every x;
            down-sizing minimises its expected square error over white x. Without antialias, a bilinear resize by less
            than 1/2 skips pixels in space, and so does the kernel.

    Returns: (D, C, P_t, P_h, P_w).
    """
    return apply_to_embedder(embedder_matrix(tuple(weight.shape[2:]), patch_size), weight, patch_size)


def resize_head(
    weight: Tensor,
    bias: Tensor | None,
    patch_size: PatchSize,
    new_patch_size: PatchSize,
    channels_last: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Resize an output head so that the patch it predicts is the resized patch: R applied to the rows.

    Args:
        weight: (p_t*p_h*p_w*C, D). Rows ordered (p_t, p_h, p_w, C), or (C, p_t, p_h, p_w) with channels_last=False.
        bias: (p_t*p_h*p_w*C,), or None for a head without one.

    Returns: weight (P_t*P_h*P_w*C, D) and bias (P_t*P_h*P_w*C,), rows in the same order.

    Raises: RuntimeError if the rows are not a multiple of the patch's pixels.
    """
    matrix = resize_matrix(patch_size, new_patch_size)
    new_bias = None if bias is None else apply_to_head(matrix, bias, channels_last)
    return apply_to_head(matrix, weight, channels_last), new_bias


def embedder_to_folded(weight: Tensor, base_patch: PatchSize) -> Tensor:
    """Rewrite a coarse embedder over latents as an embedder with the base patch over folded latents.

    The fold is `b c (t mt) (h mh) (w mw) -> b (mt mh mw c) t h w`: pixel kt * m_t + mt of the coarse patch is pixel kt
    of the base patch in folded channel (mt, mh, mw, c).

    Args:
        weight: (D, C, m_t*p_t, m_h*p_h, m_w*p_w).
        base_patch: (p_t, p_h, p_w).

    Returns: (D, m_t*m_h*m_w*C, p_t, p_h, p_w), the same entries in another order.

    Raises: einops.EinopsError if the coarse patch is not a multiple of the base patch.
    """
    kt, kh, kw = base_patch
    pattern = "d c (kt mt) (kh mh) (kw mw) -> d (mt mh mw c) kt kh kw"
    return rearrange(weight, pattern, kt=kt, kh=kh, kw=kw)


def head_to_folded(
    weight: Tensor,
    bias: Tensor | None,
    patch_size: PatchSize,
    base_patch: PatchSize,
    channels_last: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Rewrite a coarse head over latents as a head with the base patch over folded latents (see `embedder_to_folded`).

    Args:
        weight: (m_t*p_t*m_h*p_h*m_w*p_w*C, D). Rows ordered (time, height, width, C), or (C, time, height, width)
            with channels_last=False.
        bias: its bias, or None.
        patch_size: the coarse (m_t*p_t, m_h*p_h, m_w*p_w).
        base_patch: (p_t, p_h, p_w).

    Returns: weight and bias with permuted rows: (p_t, p_h, p_w, (m_t m_h m_w C)), or ((m_t m_h m_w C), p_t, p_h, p_w)
        with channels_last=False.

    Raises: einops.EinopsError if the rows do not divide so, or the coarse patch is not a multiple of the base patch.
    """
    if channels_last:
        pattern = "(kt mt kh mh kw mw c) ... -> (kt kh kw mt mh mw c) ..."
    else:
        pattern = "(c kt mt kh mh kw mw) ... -> (mt mh mw c kt kh kw) ..."
    sizes = dict(zip(("kt", "kh", "kw"), base_patch, strict=True))
    sizes |= {m: large // base for m, large, base in zip(("mt", "mh", "mw"), patch_size, base_patch, strict=True)}
    return rearrange(weight, pattern, **sizes), None if bias is None else rearrange(bias, pattern, **sizes)


def _resize_pixels(matrix: Tensor, pixels: Tensor) -> Tensor:
    """matrix (P, p) on the last axis of (..., p). Not a matmul, which autocast or TF32 would round."""
    dtype = torch.float64 if pixels.dtype == torch.float64 else torch.float32
    matrix = matrix.to(pixels.device, dtype)
    return (pixels.to(dtype).unsqueeze(-2) * matrix).sum(-1).to(pixels.dtype)
