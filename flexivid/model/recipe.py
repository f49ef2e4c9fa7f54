"""A few-step recipe: the noise levels at which a distilled adapter runs, and the patch size of every step.

It is made for guidance off, and for the deterministic step of flow matching, x' = x + (sigma' - sigma) v: the one that
diffusers' FlowMatchEulerDiscreteScheduler takes.
"""

from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexivid.patches.sizes import parse_mode


class Recipe(BaseModel):
    """sigmas: of every step, falling from 1. patch_sizes: of every step, as `1x4x4`, the model's own among them or not,
    or guided, as `1x4x4-guided`: one that was trained on from a mode which gives guidance in one forward.

    Raises ValueError for anything else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sigmas: list[float] = Field(min_length=1)
    patch_sizes: list[str] = Field(min_length=1)

    @model_validator(mode="after")
    def _steps_agree(self):
        if len(self.sigmas) != len(self.patch_sizes):
            raise ValueError(f"there are {len(self.sigmas)} sigmas for {len(self.patch_sizes)} patch_sizes")
        if self.sigmas[0] != 1 or self.sigmas[-1] <= 0 or any(a <= b for a, b in pairwise(self.sigmas)):
            raise ValueError(f"sigmas must fall from 1, where a run begins, and stay above 0, not {self.sigmas}")
        for patch_size in self.patch_sizes:
            parse_mode(patch_size)
        return self

    @property
    def steps(self) -> int:
        return len(self.sigmas)
