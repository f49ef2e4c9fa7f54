"""What a budget is, and what it is spent on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from flexivid.sampling.schedule import Schedule

Guidance = Literal["same", "kept", "weak-uncond"]


class BudgetError(ValueError):
    """A budget that is not a number in (0, 1], or that the patch sizes at hand cannot reach."""


@dataclass(frozen=True)
class Purse:
    """What there is to spend, and on what.

    modes: patch sizes from cheapest to most expensive. prices: of them and of guided ones. guided: the finest of these
    that is coarser than the model's own patch size; fine_guided: the one of that size. ends: the last step has to be
    powerful.
    """

    modes: list[str]
    prices: Mapping[str, Fraction]
    steps: int
    branches: int
    budget: Fraction
    guidance: Guidance
    guided: str | None = None
    fine_guided: str | None = None
    ends: bool = False

    def all_at(self, mode: str) -> tuple[str, ...]:
        """A step with every branch at one patch size."""
        return (mode,) * self.branches

    def cost(self, *steps: tuple[str, ...]) -> Fraction:
        return sum((self.prices[mode] for mode in Schedule(steps).forwards(self.modes[-1])), Fraction())

    @property
    def coarsest(self) -> tuple[str, ...]:
        return self.all_at(self.modes[0])

    @property
    def powerful(self) -> tuple[str, ...]:
        return self.all_at(self.modes[-1])

    @property
    def affordable(self) -> int:
        """Powerful steps that fit."""
        return min(self.steps, self.limit // self.cost(self.powerful))

    @property
    def limit(self) -> Fraction:
        """Of all steps together."""
        return self.budget * self.steps * self.cost(self.powerful)

    def too_small(self, cheapest: Fraction | float) -> BudgetError:
        """The error of a budget below the cheapest schedule. The least it names is rounded up: it must be accepted."""
        least = math.ceil(1000 * cheapest / (self.steps * self.cost(self.powerful))) / 1000
        return BudgetError(
            f"budget {float(self.budget):g} cannot be reached: with {self.modes[0]} as the coarsest patch size the "
            f"least is {least:g}; ask for {least:g} or more, or for modes with a coarser patch size"
        )


def exact(number: float) -> Fraction:
    """The number as it is written: the float 0.29 is 29/100, so that 29 of 100 is within a budget of 0.29."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(float(number)))
