"""Noise levels to train at, and noisy latents, for flow matching and VP models alike."""

from dataclasses import dataclass

import torch

from flexivid.diffusion import FLOWS, noise_level, predicted_x0, timestep_at
from flexivid.model.family import Family


def shift_sigma(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Moves noise levels towards 1, as `flow_shift` does in sampling (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def uniform_steps_sigma(u: torch.Tensor, sigma_range: tuple[float, float], shift: float) -> torch.Tensor:
    """Noise levels as a sampler visits them: evenly spaced before the shift, within `sigma_range` after it."""
    low, high = (shift_sigma(torch.tensor(bound), 1 / shift) for bound in sigma_range)
    return shift_sigma(low + (high - low) * u, shift)


@dataclass(frozen=True)
class State:
    """Latents in the middle of sampling, and all that a transformer is told of them.

    x_t: (B, C, T, H, W) = alpha x_0 + s noise. timestep, alpha, s: (B,). conditions: the other arguments of `forward`.
    """

    x_t: torch.Tensor
    timestep: torch.Tensor
    alpha: torch.Tensor
    s: torch.Tensor
    conditions: dict

    def x0_of(self, family: Family, output: torch.Tensor) -> torch.Tensor:
        """x0 that an output (B, C, T, H, W) stands for."""
        return self._x0_at(family, self.x_t, output)

    def x0_difference(self, family: Family, difference: torch.Tensor) -> torch.Tensor:
        """By how much x0 differs where outputs differ by `difference`, (B, C, T, H, W)."""
        # x0 is affine in the output, so that at x = 0 a difference of outputs becomes the difference of x0.
        return self._x0_at(family, torch.zeros_like(difference), difference)

    def _x0_at(self, family: Family, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        alpha, s = (level.view(-1, 1, 1, 1, 1) for level in (self.alpha, self.s))
        return predicted_x0(family.prediction, x, output, alpha, s)


class NoiseLevels:
    """The noise levels of one model. alphas_cumprod: of the scheduler of a VP model."""

    def __init__(self, family: Family, flow_shift: float, alphas_cumprod: torch.Tensor | None):
        self.family, self.flow_shift, self.alphas_cumprod = family, flow_shift, alphas_cumprod

    def drawn(self, u: torch.Tensor, sigma_range: tuple[float, float]) -> torch.Tensor:
        """Timesteps for u in [0, 1], (B,): what a sampler visits, within a range of noise levels.

        In VP models sigma_range is that of the training timesteps, as shares of them.
        """
        if self.family.prediction in FLOWS:
            return self._timestep(uniform_steps_sigma(u, sigma_range, self.flow_shift))
        low, high = sigma_range
        return self._timestep(low + (high - low) * u)

    def at(self, level: float, count: int) -> torch.Tensor:
        """`count` times the timestep of one noise level, in VP models of one share of the timesteps."""
        return self._timestep(torch.full((count,), level))

    def _timestep(self, level: torch.Tensor) -> torch.Tensor:
        if self.family.prediction in FLOWS:
            return timestep_at(self.family.prediction, 1 - level, level, self.family.time_scale, None)
        return level * (len(self.alphas_cumprod) - 1)

    def alpha_s(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = self.alphas_cumprod
        table = table if table is None else table.to(timestep.device, torch.float32)
        return noise_level(self.family.prediction, timestep, self.family.time_scale, table)

    def state(self, x_0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> State:
        """x_0, noise: (B, C, T, H, W); timestep: (B,)."""
        alpha, s = self.alpha_s(timestep)
        x_t = alpha.view(-1, 1, 1, 1, 1) * x_0 + s.view(-1, 1, 1, 1, 1) * noise
        return State(x_t, timestep, alpha, s, conditions)
