"""Which blocks of a clip are cut finely: those in which the coarse grid loses most."""

import torch

from flexivid.patches.folding import Folding
from flexivid.patches.mixed import Selection


def detail(x_0: torch.Tensor, folding: Folding) -> torch.Tensor:
    """What a coarse grid does not hold of a clip, ||(I - U D) x0||^2 of each block, a mean over what it covers.

    x_0: (B, C, T, H, W). Returns (B, coarse tokens) float32, in the order of the coarse grid.
    """
    x_0 = x_0.float()
    lost = (x_0 - folding.upsample(folding.block_mean(x_0))).square().sum(1, keepdim=True)
    (t, h, w), (p_t, p_h, p_w) = folding.coarse_grid, folding.patch_size
    by_token = folding.block_mean(lost).reshape(-1, t, p_t, h, p_h, w, p_w)
    return by_token.mean((2, 4, 6)).flatten(1)


def largest(scores: torch.Tensor, folding: Folding, share: float) -> Selection:
    """The blocks with the largest scores (B, coarse tokens): a share of each kind, rounded.

    A kind is the blocks that hold as many base tokens (`Folding.kinds`), so that every choice comes to as many tokens.
    """
    fine, count, tokens = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device), 0, 0
    for held, blocks in folding.kinds.items():
        chosen, blocks = round(share * len(blocks)), folding.on(blocks, scores.device)
        fine.scatter_(1, blocks[scores[:, blocks].topk(chosen, dim=1).indices], True)
        count, tokens = count + chosen, tokens + chosen * held
    return Selection.of_blocks(folding, fine, count, tokens)
