"""Noisy latents as a coarse grid sees them, at the noise level of a mean (`diffusion`)."""

from dataclasses import dataclass

import torch

from flexivid.diffusion import Diffusion, Level
from flexivid.model.call import Call
from flexivid.model.weak_mode import WeakMode
from flexivid.patches.folding import Folding


@dataclass(frozen=True)
class Averaged:
    """What the network of a coarse grid is given.

    folded: (B, M*C, T', H', W') float32. timestep: (B,), or (B, coarse tokens) if each has its own. mean: the noisy
    latents of the coarse grid, (B, C, T', H', W'), and level: how noisy those are.
    """

    folded: torch.Tensor
    timestep: torch.Tensor
    mean: torch.Tensor
    level: Level
    mode: WeakMode

    @classmethod
    def of(cls, call: Call, mode: WeakMode, folding: Folding, diffusion: Diffusion, level: Level) -> "Averaged":
        """level: of the call's latents."""
        latents = call.latents
        # Condition channels carry no noise: they are averaged as they are.
        channels, all_channels = min(mode.out_channels, latents.shape[1]), latents.shape[1]
        of_blocks = level
        if level.s.shape[2:].numel() > 1:
            of_blocks = Level(folding.block_mean(level.alpha), folding.block_mean(level.s), level.may_be_clean)

        def averaged(kappa: torch.Tensor) -> tuple[torch.Tensor, Level]:
            c = diffusion.normaliser(of_blocks, kappa)
            return c, Level(of_blocks.alpha / c, of_blocks.s * kappa / c, level.may_be_clean)

        # Every block has its own c; the network is told the noise level of one without padding.
        kappa, typical_kappa = folding.noise_gains(latents.device)
        c, coarse_level = averaged(kappa)
        told = coarse_level if typical_kappa is kappa else averaged(typical_kappa)[1]
        timestep = diffusion.timestep(Level(call.by_token(told.alpha), call.by_token(told.s)))

        by_block = folding.fold(latents.float()).unflatten(1, (-1, all_channels))
        noisy = by_block[:, :, :channels]
        folded = noisy / c.unsqueeze(1)
        if channels < all_channels:
            folded = torch.cat([folded, by_block[:, :, channels:]], dim=2)
        return cls(folded.flatten(1, 2), timestep, noisy.mean(1) / c, coarse_level, mode)

    def x0(self, output: torch.Tensor, diffusion: Diffusion) -> tuple[torch.Tensor, torch.Tensor]:
        """What a weak head gives, (B, C_head, T', H', W') -> x0 of the coarse grid, and the residual, still folded.

        What a model predicts beside its latents, the variance of image models, comes behind that x0 as it is.
        """
        coarse, beside, residual = output.tensor_split([self.mean.shape[1], self.mode.out_channels], dim=1)
        x_0 = diffusion.x0(self.mean, coarse, self.level)
        return torch.cat([x_0, beside], 1) if beside.shape[1] else x_0, residual
