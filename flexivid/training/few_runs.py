"""Runs of a few-step student and of its guided teacher, and how far apart their distributions are."""

import math

import torch

from flexivid.diffusion import shift_sigma
from flexivid.model.flexible import FlexTransformer
from flexivid.model.recipe import Recipe
from flexivid.training.few_student import FAKE, STUDENT, TEACHER
from flexivid.training.noise import NoiseLevels, State


def distribution_gradient(x_0: torch.Tensor, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """By how much a student's clips x_0 (B, C, T, H, W) are to go down, in DMD2 (arXiv 2405.14867; DMD's eq. 8).

    fake, real: x0 that the fake score and the teacher predict of the clips, noised again. Their difference is that of
    the scores of two distributions, the student's and the teacher's: 0 where these agree. Divided by the mean distance
    to the teacher's x0, clip by clip, it is of one size at every noise level.
    """
    return (fake - real) / (x_0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)


class Runs:
    """Deterministic runs of the recipe's noise levels, by Euler's step: what its scheduler will take.

    guidance_scale: of the teacher.
    """

    def __init__(self, flex: FlexTransformer, levels: NoiseLevels, recipe: Recipe, guidance_scale: float):
        self.flex, self.levels, self.recipe, self.guidance_scale = flex, levels, recipe, guidance_scale

    def state(self, x_t: torch.Tensor, sigma: float, conditions: dict) -> State:
        """Latents (B, C, T, H, W) that are at a noise level."""
        timestep = self.levels.at(sigma, len(x_t)).to(x_t.device)
        return State(x_t, timestep, self.levels.diffusion.level(timestep), conditions)

    def step(self, x_t: torch.Tensor, output: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        """x' = x + (sigma' - sigma) v."""
        change = following - sigma
        return x_t + (-change if self.levels.diffusion.prediction == "reversed_flow" else change) * output

    def student(self, model: torch.nn.Module, noise: torch.Tensor, conditions: dict, stop: int) -> torch.Tensor:
        """x0 of the student's run from noise (B, C, T, H, W) that is ended by its step `stop`: gradients of that alone.

        Stopped anywhere, every step learns to end a run (Self-Forcing, arXiv 2506.08009).
        """
        sigmas, learns, x_t = self.recipe.sigmas, torch.is_grad_enabled(), noise
        for index in range(stop + 1):
            with torch.set_grad_enabled(learns and index == stop):
                x_0, output = self.student_step(model, x_t, conditions, index)
            if index < stop:
                x_t = self.step(x_t, output, *sigmas[index : index + 2])
        return x_0

    def student_step(self, model, x_t: torch.Tensor, conditions: dict, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(x0, output of the network) of one step of the student at its x_t."""
        state = self.state(x_t, self.recipe.sigmas[index], conditions)
        output = model(STUDENT, self.recipe.patch_sizes[index], x_t, state.timestep, conditions)
        return state.x0_of(self.levels.diffusion, output), output

    @torch.no_grad()
    def teacher(self, model, noise: torch.Tensor, conditions: dict, empty: dict | None, steps: int) -> torch.Tensor:
        """The guided teacher's run from noise, (recipe steps + 1, B, C, T, H, W): at the recipe's noise levels, and x0.

        It has `steps`, or as many more as go evenly between these.
        """
        shift, states, x_t = self.levels.flow_shift, [], noise
        ends = shift_sigma(torch.tensor([*self.recipe.sigmas, 0.0], dtype=torch.float64), 1 / shift)
        within = torch.linspace(0, 1, math.ceil(steps / self.recipe.steps) + 1, dtype=torch.float64)
        for high, low in zip(ends[:-1], ends[1:], strict=True):
            states.append(x_t)
            sigmas = shift_sigma(high + (low - high) * within, shift).tolist()
            for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
                output = self.guided(model, self.state(x_t, sigma, conditions), empty)
                x_t = self.step(x_t, output, sigma, following)
        return torch.stack([*states, x_t])

    def guided(self, model: torch.nn.Module, state: State, empty: dict | None) -> torch.Tensor:
        """The teacher's output with classifier-free guidance. empty: conditions without a caption, None for none."""
        conditional = self._score(model, TEACHER, state)
        if empty is None or self.guidance_scale == 1:
            return conditional
        without = self._score(model, TEACHER, State(state.x_t, state.timestep, state.level, empty))
        return without + self.guidance_scale * (conditional - without)

    def fake(self, model: torch.nn.Module, state: State) -> torch.Tensor:
        """The output of the fake score."""
        return self._score(model, FAKE, state)

    def _score(self, model: torch.nn.Module, who: str, state: State) -> torch.Tensor:
        return model(who, self.flex.powerful, state.x_t, state.timestep, state.conditions)
