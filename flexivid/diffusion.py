"""Noise levels of a model, and x0 <-> what its network predicts, for flow matching and VP models.

Notation: x_t = alpha x0 + s eps. Flow matching: alpha = 1 - sigma, s = sigma, the network predicts eps - x0.
`reversed_flow` is the same with a clock that runs from noise to data: the network predicts x0 - eps.
VP: alpha^2 + s^2 = 1, the network predicts eps (`epsilon`) or alpha eps - s x0 (`v_prediction`).

A weak mode predicts one of two ways. `direct` (FlexiDiT, arXiv 2502.20126) feeds the folded latents as they are, at the
same timestep, and unfolds what comes out. `snr` tells the network the truth about averaged noise: with the block mean D
over M independent latents and kappa = M^(-1/2), D x_t = alpha D x0 + s kappa eps'. Divided by c (`normaliser`), that is
a valid noisy latent at s' = s kappa / c. The coarse prediction becomes x0^ = U(x0 of the coarse grid) + residual, and
the output in the model's own terms follows from x_t and x0^, so that the noise which the coarse grid cannot see passes
through exactly.

A flow map (AnyFlow, arXiv 2605.13724; MeanFlow, arXiv 2505.13447) is told a second timestep r < t, and predicts the
mean velocity between: x_r = x_t - (t - r) u. Its coarse pass goes from t' to r' = r kappa / ((1 - r) + r kappa), the
noise level of a mean at r, and all else stays. For (x, t) -> (x / c(t), t kappa / c(t)) is a projective map: it takes
the straight line from x_t to x_r to a straight one, whose end at noise level 0, where c = 1, is the same point. "x0" is
then that end, for the coarse pass and for the fine output alike. And the trajectories that the lines cut short are
those of one probability flow, the same when x is scaled and time renamed. Any other r' belongs to another step.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Prediction = Literal["flow", "reversed_flow", "epsilon", "v_prediction"]
FLOWS = ("flow", "reversed_flow")
PARAMETRISATIONS = ("snr", "direct")
LEAST_LOG_SNR = -40.0  # for tables that end in pure noise


def shift_sigma(sigma: torch.Tensor | float, shift: float) -> torch.Tensor | float:
    """Moves noise levels towards 1, as `flow_shift` does in sampling (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@dataclass(frozen=True)
class Level:
    """How noisy latents are: (alpha, s), float32, of one shape that broadcasts with the latents.

    may_be_clean: s may be 0 somewhere, where nothing is left to predict.
    """

    alpha: torch.Tensor
    s: torch.Tensor
    may_be_clean: bool = True


@dataclass(frozen=True)
class Diffusion:
    """What the network of a model predicts, and when.

    time_scale: timestep = sigma * time_scale for flow matching. alphas_cumprod: (train timesteps,) of the scheduler of
    a VP model, None for flow matching.
    """

    prediction: Prediction
    time_scale: float = 1000.0
    alphas_cumprod: torch.Tensor | None = None

    @property
    def is_flow(self) -> bool:
        return self.prediction in FLOWS

    def level(self, timestep: torch.Tensor) -> Level:
        """The noise level at a timestep; alpha and s have its shape. Raises ValueError without a VP model's table."""
        if self.is_flow:
            s = timestep / self.time_scale
            return self.flow_level(1 - s if self.prediction == "reversed_flow" else s)
        table = self._table(timestep.device)
        position = timestep.clamp(0, len(table) - 1)
        left = position.floor().long().clamp(max=len(table) - 2)
        squared = torch.lerp(table[left], table[left + 1], position - left)
        return Level(squared.sqrt(), (1 - squared).sqrt())

    def flow_level(self, sigma: torch.Tensor) -> Level:
        """The noise level of flow matching at sigma."""
        return Level(1 - sigma, sigma)

    def timestep(self, level: Level) -> torch.Tensor:
        """The (fractional) timestep at a noise level: the inverse of `level`."""
        if self.prediction == "flow":
            return level.s * self.time_scale
        if self.prediction == "reversed_flow":
            return (1 - level.s) * self.time_scale
        return vp_timestep(self._table(level.s.device), level.alpha, level.s)

    def normaliser(self, level: Level, kappa) -> torch.Tensor:
        """c, by which D x_t is divided to be a valid noisy latent: 1 at its own alpha + s, or alpha^2 + s^2."""
        if self.is_flow:
            return level.alpha + level.s * kappa
        return torch.sqrt(level.alpha**2 + (level.s * kappa) ** 2)

    def x0(self, x: torch.Tensor, output: torch.Tensor, level: Level) -> torch.Tensor:
        """x0 that a network's `output` at the noisy latent `x` stands for."""
        alpha, s = level.alpha, level.s
        if self.prediction == "flow":
            return (x - s * output) / (alpha + s)
        if self.prediction == "reversed_flow":
            return (x + s * output) / (alpha + s)
        if self.prediction == "epsilon":
            return (x - s * output) / alpha
        return alpha * x - s * output

    def output(self, x: torch.Tensor, x_0: torch.Tensor, level: Level) -> torch.Tensor:
        """The inverse of `x0`. Where s = 0 (clean tokens) nothing is left to predict: 0, not NaN."""
        alpha, s = level.alpha, _without_zeros(level)
        if self.prediction == "flow":
            output = ((alpha + level.s) * x - x_0) / s
        elif self.prediction == "reversed_flow":
            output = (x_0 - (alpha + level.s) * x) / s
        elif self.prediction == "epsilon":
            output = (x - alpha * x_0) / s
        else:
            output = (alpha * x - x_0) / s
        return _zero_where_clean(output, level)

    def x0_difference(self, output_difference: torch.Tensor, level: Level) -> torch.Tensor:
        """By how much x0 differs where outputs at the same x differ: `x0` is affine in the output."""
        shift = level.s * output_difference
        if self.is_flow:
            shift = shift / (level.alpha + level.s)
        elif self.prediction == "epsilon":
            shift = shift / level.alpha
        return shift if self.prediction == "reversed_flow" else -shift

    def output_difference(self, x0_difference: torch.Tensor, level: Level) -> torch.Tensor:
        """The inverse of `x0_difference`; 0 where s = 0."""
        if self.prediction == "epsilon":
            x0_difference = level.alpha * x0_difference
        shift = _zero_where_clean(x0_difference / _without_zeros(level), level)
        return shift if self.prediction == "reversed_flow" else -shift

    def _table(self, device: torch.device) -> torch.Tensor:
        if self.alphas_cumprod is None:
            raise ValueError("this model's noise levels are in its scheduler: enable its pipeline")
        return self.alphas_cumprod.to(device, torch.float32)


def _without_zeros(level: Level) -> torch.Tensor:
    return torch.where(level.s == 0, torch.ones_like(level.s), level.s) if level.may_be_clean else level.s


def _zero_where_clean(values: torch.Tensor, level: Level) -> torch.Tensor:
    return torch.where(level.s == 0, torch.zeros_like(values), values) if level.may_be_clean else values


def vp_timestep(alphas_cumprod: torch.Tensor, alpha, s) -> torch.Tensor:
    """The (fractional) timestep of a VP model whose log-SNR is that of (alpha, s); interpolated, clamped to the table.

    alphas_cumprod: (train timesteps,), decreasing. alpha and s: (B,). Returns (B,) float32.
    """
    table = (alphas_cumprod.double() / (1 - alphas_cumprod.double())).log().clamp(min=LEAST_LOG_SNR)
    wanted = 2 * (torch.as_tensor(alpha).double() / torch.as_tensor(s).double()).log()
    wanted = wanted.clamp(min=LEAST_LOG_SNR)
    falling = -table
    right = torch.searchsorted(falling, -wanted).clamp(1, len(table) - 1)
    weight = (table[right - 1] - wanted) / (table[right - 1] - table[right])
    return (right - 1 + weight.clamp(0, 1)).float()
