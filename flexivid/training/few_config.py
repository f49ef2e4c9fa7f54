"""The settings of objective `few`."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from flexivid.diffusion import shift_sigma
from flexivid.model.recipe import Recipe
from flexivid.patches.sizes import parse_mode
from flexivid.training.section import Fraction, Positive, Section, ShippedPath


class FewConfig(Section):
    """Distribution-matching distillation (DMD2, arXiv 2405.14867) of a few steps, each at its patch size."""

    patch_sizes: list[str] = Field(
        ["2x4x4", "1x4x4", "1x4x4", "1x2x2"],
        min_length=1,
        description="patch size of every step of the student; guided ones, such as 1x2x2-guided, have the guidance "
        "that they learn already where `adapter` has them",
    )
    sigmas: list[float] | None = Field(
        None, description="noise level of every step, falling from 1; by default evenly spaced, shifted by flow_shift"
    )
    guidance_scale: float = Field(
        5.0, ge=1, description="of the teacher, which the student has in its weights; not where a model embeds guidance"
    )
    parametrisation: Literal["snr", "direct"] = Field("snr", description="of the weak patch sizes, see `distill`")
    rank: Positive = Field(32, description="LoRA rank of every patch size, and of the fake score")
    adapter: ShippedPath | None = Field(
        None, description="adapter folder that the patch sizes start from, of the same rank and parametrisation"
    )
    fake_updates: Positive = Field(
        5, description="steps that train the fake score, before each that trains the student"
    )
    fake_lr: float = Field(4e-4, gt=0, description="peak learning rate of the fake score; optim.lr is the student's")
    sigma_range: tuple[Fraction, Fraction] = Field(
        (0.02, 0.98), description="noise levels at which the two scores are compared, and the fake one is trained"
    )
    warmup_steps: int = Field(
        0, ge=0, description="first steps, that bring the student to the ends of the teacher's own runs"
    )
    warmup_every: Positive = Field(100, description="steps after which the teacher's runs are made anew")
    warmup_clips: Positive = Field(
        16, description="clips of such a run; it has `validation.steps`, or as many more as the student's go into"
    )

    @model_validator(mode="after")
    def _steps_make_a_recipe(self):
        if self.sigmas is not None:
            self.recipe(1.0)
        guided = [mode for mode in self.patch_sizes if parse_mode(mode)[1]]
        if guided and self.guidance_scale == 1:
            raise ValueError(f"{guided[0]} gives guidance: guidance_scale must be above 1")
        low, high = self.sigma_range
        if not 0 < low < high < 1:
            raise ValueError(f"sigma_range must rise and lie between 0 and 1, not be {low:g} to {high:g}")
        return self

    def recipe(self, flow_shift: float) -> Recipe:
        """The steps of the student, as its adapter will hold them. Raises ValueError if they are none."""
        count = len(self.patch_sizes)
        evenly = shift_sigma(1 - torch.arange(count, dtype=torch.float64) / count, flow_shift).tolist()
        return Recipe(sigmas=self.sigmas or [round(sigma, 6) for sigma in evenly], patch_sizes=self.patch_sizes)
