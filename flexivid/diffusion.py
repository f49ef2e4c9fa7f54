"""What a weak mode predicts: `direct` (FlexiDiT, arXiv 2502.20126) or `snr`, for flow matching and VP models.

Notation: x_t = alpha x0 + s eps. Flow matching: alpha = 1 - sigma, s = sigma, the network predicts eps - x0.
`reversed_flow` is the same with a clock that runs from noise to data: the network predicts x0 - eps.
VP: alpha^2 + s^2 = 1, the network predicts eps (`epsilon`) or alpha eps - s x0 (`v_prediction`).

`direct` feeds the folded latents as they are, at the same timestep, and unfolds what comes out.

`snr` tells the network the truth about averaged noise. With the block mean D over M independent latents and
kappa = M^(-1/2), D x_t = alpha D x0 + s kappa eps'. Divided by c, that is a valid noisy latent at s' = s kappa / c:

    flow: c = alpha + s kappa        VP: c = sqrt(alpha^2 + s^2 kappa^2)

The coarse prediction becomes x0^ = U(x0 of the coarse grid) + residual, and the output in the model's own terms
follows from x_t and x0^, so that the noise which the coarse grid cannot see passes through exactly.
"""

from typing import Literal

import torch

Prediction = Literal["flow", "reversed_flow", "epsilon", "v_prediction"]
FLOWS = ("flow", "reversed_flow")
PARAMETRISATIONS = ("snr", "direct")
LEAST_LOG_SNR = -40.0  # for tables that end in pure noise


def normaliser(prediction: Prediction, alpha, s, kappa) -> torch.Tensor:
    """c, by which D x_t is divided to be a valid noisy latent. Arguments broadcast."""
    if prediction in FLOWS:
        return alpha + s * kappa
    return torch.sqrt(alpha**2 + (s * kappa) ** 2)


def predicted_x0(prediction: Prediction, x, output, alpha, s) -> torch.Tensor:
    """x0 that a network's `output` at the noisy latent `x` stands for."""
    if prediction == "flow":
        return (x - s * output) / (alpha + s)
    if prediction == "reversed_flow":
        return (x + s * output) / (alpha + s)
    if prediction == "epsilon":
        return (x - s * output) / alpha
    return alpha * x - s * output


def output_for_x0(prediction: Prediction, x, x_0, alpha, s) -> torch.Tensor:
    """The inverse of `predicted_x0`. Where s = 0 (clean tokens) nothing is left to predict: 0, not NaN."""
    s = torch.as_tensor(s, dtype=x.dtype, device=x.device)
    safe_s = torch.where(s == 0, torch.ones_like(s), s)
    if prediction == "flow":
        output = ((alpha + s) * x - x_0) / safe_s
    elif prediction == "reversed_flow":
        output = (x_0 - (alpha + s) * x) / safe_s
    elif prediction == "epsilon":
        output = (x - alpha * x_0) / safe_s
    else:
        output = (alpha * x - x_0) / safe_s
    return torch.where(s == 0, torch.zeros_like(output), output)


def noise_level(
    prediction: Prediction, timestep: torch.Tensor, time_scale: float, alphas_cumprod: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, s) at a timestep, both of its shape. alphas_cumprod: (train timesteps,) of a VP model's scheduler."""
    if prediction in FLOWS:
        s = timestep / time_scale
        s = 1 - s if prediction == "reversed_flow" else s
        return 1 - s, s
    position = timestep.clamp(0, len(alphas_cumprod) - 1)
    left = position.floor().long().clamp(max=len(alphas_cumprod) - 2)
    squared = torch.lerp(alphas_cumprod[left], alphas_cumprod[left + 1], position - left)
    return squared.sqrt(), (1 - squared).sqrt()


def timestep_at(
    prediction: Prediction, alpha, s, time_scale: float, alphas_cumprod: torch.Tensor | None
) -> torch.Tensor:
    """The (fractional) timestep at a noise level: the inverse of `noise_level`."""
    if prediction == "flow":
        return s * time_scale
    if prediction == "reversed_flow":
        return (1 - s) * time_scale
    return vp_timestep(alphas_cumprod, alpha, s)


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


def sigma_to_alpha_s(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, s) of a VP model from a k-diffusion style sigma = s / alpha (Karras et al. 2022, arXiv 2206.00364)."""
    alpha = 1 / torch.sqrt(1 + sigma**2)
    return alpha, sigma * alpha
