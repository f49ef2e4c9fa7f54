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

    folded: (B, M*C, T', H', W') float32. timesteps: by argument of `forward`, (B,), or of every coarse token or frame
    if each has its own. mean: the noisy latents of the coarse grid, (B, C, T', H', W'), and level: how noisy those are.
    """

    folded: torch.Tensor
    timesteps: dict[str, torch.Tensor]
    mean: torch.Tensor
    level: Level
    mode: WeakMode

    @classmethod
    def of(cls, call: Call, mode: WeakMode, folding: Folding, diffusion: Diffusion, level: Level) -> "Averaged":
        """level: of the call's latents."""
        latents = call.latents
        # Condition channels carry no noise: they are averaged as they are.
        channels, all_channels = min(mode.out_channels, latents.shape[1]), latents.shape[1]
        # Every block has its own c; the network is told the noise level of one without padding.
        kappa, typical_kappa = folding.noise_gains(latents.device)
        c, coarse_level = _of_mean(level, folding, diffusion, kappa)
        timesteps = {}
        for name, timestep in call.timesteps.items():
            if name == "timestep":
                told = coarse_level if typical_kappa is kappa else _of_mean(level, folding, diffusion, typical_kappa)[1]
            else:
                # Where a flow map goes: to latents whose mean is as noisy as that of latents there (`diffusion`).
                told = _of_mean(call.level_at(diffusion, timestep), folding, diffusion, typical_kappa)[1]
            timesteps[name] = diffusion.timestep(Level(call.by_token(told.alpha), call.by_token(told.s)))

        by_block = folding.fold(latents.float()).unflatten(1, (-1, all_channels))
        noisy = by_block[:, :, :channels]
        folded = noisy / c.unsqueeze(1)
        if channels < all_channels:
            folded = torch.cat([folded, by_block[:, :, channels:]], dim=2)
        return cls(folded.flatten(1, 2), timesteps, noisy.mean(1) / c, coarse_level, mode)

    def x0(self, output: torch.Tensor, diffusion: Diffusion) -> tuple[torch.Tensor, torch.Tensor]:
        """What a weak head gives, (B, C_head, T', H', W') -> x0 of the coarse grid, and the residual, still folded.

        What a model predicts beside its latents, the variance of image models, comes behind that x0 as it is.
        """
        coarse, beside, residual = output.tensor_split([self.mean.shape[1], self.mode.out_channels], dim=1)
        x_0 = diffusion.x0(self.mean, coarse, self.level)
        return torch.cat([x_0, beside], 1) if beside.shape[1] else x_0, residual


def _of_mean(level: Level, folding: Folding, diffusion: Diffusion, kappa: torch.Tensor) -> tuple[torch.Tensor, Level]:
    """c, by which block means of latents at a noise level are divided, and the noise level that these then have."""
    if level.s.shape[2:].numel() > 1:
        level = Level(folding.block_mean(level.alpha), folding.block_mean(level.s), level.may_be_clean)
    c = diffusion.normaliser(level, kappa)
    return c, Level(level.alpha / c, level.s * kappa / c, level.may_be_clean)
