"""The snr parametrisation: valid noisy latents, exact inverses, finite at zero noise."""

import pytest
import torch

from flexivid.diffusion import Diffusion, Level, vp_timestep
from flexivid.patches.folding import folding_for
from flexivid.patches.positions import centred_rope, interpolate_table, rope_table, sincos_table, stretched_positions

PREDICTIONS = ["flow", "epsilon", "v_prediction"]


def level_of(prediction, sigma) -> Level:
    """sigma is s / (alpha + s) of flow matching, s / alpha of a VP model (Karras et al. 2022, arXiv 2206.00364)."""
    if prediction in ("flow", "reversed_flow"):
        return Level(1 - sigma, sigma)
    alpha = 1 / torch.sqrt(1 + sigma**2)
    return Level(alpha, sigma * alpha)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.9])
def test_outputs_and_x0_are_inverse(prediction, sigma):
    diffusion, level = Diffusion(prediction), level_of(prediction, torch.tensor(sigma, dtype=torch.float64))
    x, x_0 = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    output = diffusion.output(x, x_0, level)
    assert torch.allclose(diffusion.x0(x, output, level), x_0, atol=1e-12)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "reversed_flow"])
@pytest.mark.parametrize("clean", [False, True])
def test_differences_are_those_of_two_predictions(prediction, clean):
    """x0 is affine in the output: what is added to one is known in the other, at any x, also where s = 0."""
    sigma = torch.tensor([0.0 if clean else 0.2, 0.6], dtype=torch.float64).view(2, 1)
    diffusion, level = Diffusion(prediction), level_of(prediction, sigma)
    x, first, second = torch.randn(3, 2, 50, dtype=torch.float64)
    difference = diffusion.x0(x, first, level) - diffusion.x0(x, second, level)
    assert torch.allclose(diffusion.x0_difference(first - second, level), difference, atol=1e-12)
    back = diffusion.output_difference(difference, level)
    assert torch.allclose(back[int(clean) :], (first - second)[int(clean) :], atol=1e-12)
    assert not clean or (back[0] == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_perfect_x0_gives_the_true_target(prediction):
    level = level_of(prediction, torch.tensor(0.7, dtype=torch.float64))
    alpha, s = level.alpha, level.s
    x_0, noise = torch.randn(2, 50, dtype=torch.float64)
    x_t = alpha * x_0 + s * noise
    target = {"flow": noise - x_0, "epsilon": noise, "v_prediction": alpha * noise - s * x_0}[prediction]
    assert torch.allclose(Diffusion(prediction).output(x_t, x_0, level), target, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("multiple", [(1, 2, 2), (2, 2, 2)])
def test_the_rescaled_mean_is_a_valid_noisy_latent(prediction, multiple):
    """D x_t / c = alpha' D x0 + s' eps' with unit eps' and (alpha', s') on the model's own noise schedule."""
    folding = folding_for((5, 6, 6), multiple, (1, 2, 2), True)
    level = level_of(prediction, torch.tensor(0.8))
    alpha, s = level.alpha, level.s
    c = Diffusion(prediction).normaliser(level, folding.kappa)
    new_alpha, new_s = alpha / c, s * folding.kappa / c
    on_schedule = new_alpha + new_s if prediction == "flow" else new_alpha**2 + new_s**2
    assert torch.allclose(on_schedule, torch.ones_like(c), atol=1e-6)
    noise = torch.randn(4000, 1, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    measured = (folding.block_mean(s * noise) / c / new_s).std(0)
    assert torch.allclose(measured, torch.ones_like(measured), atol=0.06)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_tokens_are_finite(prediction):
    s = torch.tensor([0.0, 0.5]).view(2, 1)
    alpha = 1 - s if prediction == "flow" else torch.sqrt(1 - s**2)
    x = torch.randn(2, 3, requires_grad=True)
    output = Diffusion(prediction).output(x, torch.randn(2, 3), Level(alpha, s))
    output.sum().backward()
    assert output.isfinite().all() and x.grad.isfinite().all() and (output[0] == 0).all()


def test_vp_timestep_has_equal_log_snr():
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    at = torch.tensor([0, 10, 500, 999])
    alpha, s = alphas_cumprod[at].sqrt(), (1 - alphas_cumprod[at]).sqrt()
    assert torch.allclose(vp_timestep(alphas_cumprod, alpha, s), at.float(), atol=1e-3)
    halved_noise = vp_timestep(alphas_cumprod, alpha, s / 2)
    assert (halved_noise[1:] < at[1:]).all() and (halved_noise >= 0).all()


def test_centred_rope_is_the_table_at_the_centres():
    grid, dim = (5, 6, 7), 16
    positions = [torch.arange(n, dtype=torch.float64) for n in grid]
    tables = [rope_table(p, dim) for p in positions]

    def spread(which):
        parts = [
            t[which].view(*[n if a == axis else 1 for a, n in enumerate(grid)], dim) for axis, t in enumerate(tables)
        ]
        return torch.cat([part.expand(*grid, dim) for part in parts], -1)

    folding = folding_for(grid, (2, 2, 3), (1, 1, 1), True)
    cos, sin = centred_rope(spread(0), spread(1), folding.centres, folding.aside)
    centres = [torch.tensor([0.0, 1.5, 3.5]), torch.tensor([0.5, 2.5, 4.5]), torch.tensor([1.0, 4.0, 6.0])]
    for axis, at in enumerate(centres):
        expected_cos, expected_sin = rope_table(at, dim)
        index = [0, 0, 0, slice(axis * dim, (axis + 1) * dim)]
        index[axis] = slice(None)
        assert torch.allclose(cos[tuple(index)], expected_cos, atol=1e-5)
        assert torch.allclose(sin[tuple(index)], expected_sin, atol=1e-5)


def test_additive_tables_are_read_at_fractional_positions():
    table = torch.arange(10.0)[:, None].expand(10, 4)
    assert torch.allclose(
        interpolate_table(table, torch.tensor([0.5, 2.25, 9.0, 12.0]))[:, 0], torch.tensor([0.5, 2.25, 9, 9])
    )
    longer = interpolate_table(table, stretched_positions(20, 10))
    assert longer.shape == (20, 4) and (longer[1:, 0] >= longer[:-1, 0]).all()
    fine = sincos_table(torch.arange(8.0), 12)
    assert torch.allclose(sincos_table(torch.tensor([3.0]), 12)[0], fine[3])


def test_rope_position_interpolation_stays_inside_the_trained_range():
    cos, _ = rope_table(torch.arange(20.0), 8, trained_length=10)
    expected, _ = rope_table(torch.arange(20.0) / 2, 8)
    assert torch.allclose(cos, expected)
