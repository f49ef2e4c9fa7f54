"""Noise levels to train at, and noisy latents, for flow matching and VP models alike."""

from dataclasses import dataclass

import torch

from flexivid.diffusion import Diffusion, Level, shift_sigma
from flexivid.model.family import Family
from flexivid.patches.folding import Size3

# Conditions that are no arguments of a forward: (B, C, T, H, W) that follow the latents' own channels;
# (B, 1, T, H, W), which latents are given without noise; and (B, tokens, C), the noise of a stream such as sound, which
# stands without it in its own argument until `NoiseLevels.state`. (B,) timesteps of that stream, where it has its own
# schedule; (B, 1), how many tokens a text has, where pipelines do not pad it.
CHANNELS, CLEAN, STREAM_NOISE = "channels beside the latents", "clean latents", "noise of the stream"
STREAM_TIMESTEP, TEXT_LENGTH = "timestep of the stream", "tokens of the text"


def uniform_steps_sigma(u: torch.Tensor, sigma_range: tuple[float, float], shift: float) -> torch.Tensor:
    """Noise levels as a sampler visits them: evenly spaced before the shift, within `sigma_range` after it."""
    low, high = (shift_sigma(torch.tensor(bound), 1 / shift) for bound in sigma_range)
    return shift_sigma(low + (high - low) * u, shift)


@dataclass(frozen=True)
class State:
    """Latents in the middle of sampling, and all that a transformer is told of them.

    x_t: (B, C, T, H, W) = alpha x_0 + s noise. timestep: (B,). level: its noise level, (B,) too. Where some latents are
    clean these are (B, tokens) and (B, 1, T, H, W). conditions: what else `predict` is given. unconditional: these for
    the empty caption, where guidance is distilled.
    """

    x_t: torch.Tensor
    timestep: torch.Tensor
    level: Level
    conditions: dict
    unconditional: dict | None = None

    def x0_of(self, diffusion: Diffusion, output: torch.Tensor) -> torch.Tensor:
        """x0 that an output (B, C, T, H, W) stands for."""
        return diffusion.x0(self.x_t, output, self._over_latents())

    def output_of(self, diffusion: Diffusion, x_0: torch.Tensor) -> torch.Tensor:
        """The output that stands for an x0 (B, C, T, H, W): the inverse of `x0_of`."""
        return diffusion.output(self.x_t, x_0, self._over_latents())

    def x0_difference(self, diffusion: Diffusion, difference: torch.Tensor) -> torch.Tensor:
        """By how much x0 differs where outputs differ by `difference`, (B, C, T, H, W)."""
        return diffusion.x0_difference(difference, self._over_latents())

    def _over_latents(self) -> Level:
        return _over_latents(self.level)


def _over_latents(level: Level) -> Level:
    """(B,) -> (B, 1, 1, 1, 1), and (B, 1, T, H, W) as it is."""
    if level.s.ndim > 1:
        return level
    return Level(*(values.view(-1, 1, 1, 1, 1) for values in (level.alpha, level.s)))


def with_stream_noise(
    conditions: dict, family: Family, count: int, generator: torch.Generator, rows: slice = slice(None)
) -> dict:
    """Conditions of these rows of `count` clips, and noise for the stream among them if the family has one.

    It is drawn for all of them, so that it is the same at every number of processes.
    """
    for name in family.streams:
        noise = torch.randn(count, *conditions[name].shape[1:], generator=generator)
        conditions = conditions | {STREAM_NOISE: noise[rows]}
    return conditions


class NoiseLevels:
    """The noise levels that a model is trained at. flow_shift: of its scheduler, in flow matching.

    stream_shift: of the scheduler of a stream that has its own.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        flow_shift: float,
        patch_size: Size3,
        family: Family,
        stream_shift: float | None = None,
    ):
        self.diffusion, self.flow_shift, self.patch_size, self.family = diffusion, flow_shift, patch_size, family
        self.stream_shift = stream_shift

    def drawn(self, u: torch.Tensor, sigma_range: tuple[float, float]) -> torch.Tensor:
        """Timesteps for u in [0, 1], (B,): what a sampler visits, within a range of noise levels.

        In VP models sigma_range is that of the training timesteps, as shares of them.
        """
        if self.diffusion.is_flow:
            return self._timestep(uniform_steps_sigma(u, sigma_range, self.flow_shift))
        low, high = sigma_range
        return self._timestep(low + (high - low) * u)

    def at(self, level: float, count: int) -> torch.Tensor:
        """`count` times the timestep of one noise level, in VP models of one share of the timesteps."""
        return self._timestep(torch.full((count,), level))

    def _timestep(self, level: torch.Tensor) -> torch.Tensor:
        if self.diffusion.is_flow:
            return self.diffusion.timestep(self.diffusion.flow_level(level))
        return level * (len(self.diffusion.alphas_cumprod) - 1)

    def state(self, x_0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> State:
        """x_0, noise: (B, C, T, H, W); timestep: (B,). Latents that the conditions call clean stay x_0.

        A stream is as noisy as the video, and told so, as in sampling: pipelines run it by the same schedule; or as
        noisy as at the same step of its own.
        """
        level = self.diffusion.level(timestep)
        conditions = self._with_streams(conditions, timestep, level)
        if (clean := conditions.get(CLEAN)) is not None:
            level = self.diffusion.flow_level(_over_latents(level).s * ~clean)
            p_t, p_h, p_w = self.patch_size
            timestep = timestep[:, None] * ~clean[:, 0, ::p_t, ::p_h, ::p_w].flatten(1)
        over_latents = _over_latents(level)
        return State(over_latents.alpha * x_0 + over_latents.s * noise, timestep, level, conditions)

    def _with_streams(self, conditions: dict, timestep: torch.Tensor, level: Level) -> dict:
        changed = {name: timestep for name in self.family.timesteps_beside if name in conditions}
        if self.stream_shift is not None:
            level = self.diffusion.flow_level(shift_sigma(level.s, self.stream_shift / self.flow_shift))
            changed[STREAM_TIMESTEP] = self.diffusion.timestep(level)
        alpha, s = (values.view(-1, 1, 1) for values in (level.alpha, level.s))
        for name in self.family.streams:
            changed[name] = alpha * conditions[name] + s * conditions[STREAM_NOISE]
        return {name: value for name, value in conditions.items() if name != STREAM_NOISE} | changed
