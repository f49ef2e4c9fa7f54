"""The schedule that a budget buys.

A schedule is a pure function of (costs, steps, budget, guidance): nothing here knows a model, a scheduler or torch.
Coarse ("weak") patches are cheap, the model's own ("powerful") patch is exact. Three orders:

    weak-first    early steps are weak, late ones powerful (FlexiDiT, arXiv 2502.20126)
    interleaved   powerful steps are spread over all; what the last one knew better than the weak patch size is added to
                  the weak predictions that follow, x0 = x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)]. For that a
                  powerful step runs the weak patch size too.
    reuse         powerful steps, denser at first, and between them steps that compute nothing: they hold the last x0

and with classifier-free guidance three ways to treat its two branches:

    same          both branches of a step run at one patch size
    kept          weak steps after a powerful one run the conditional branch only; what guidance adds is kept from the
                  powerful step, x0_uncond(t) = x0_cond(t) - [x0_cond(t_k) - x0_uncond(t_k)]. A weak step then costs
                  half, and its errors are not multiplied by the guidance scale. With interleaved only, whose powerful
                  steps are then denser at first
    weak-uncond   mixed steps: the conditional branch powerful, the unconditional one weak. With weak-first only

A patch size is written frames x height x width in latent pixels, as in `1x4x4`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Literal

from flexivid.patches.sizes import parse_mode
from flexivid.sampling.schedule import KEPT, REUSED, Schedule

Guidance = Literal["same", "kept", "weak-uncond"]
Order = Literal["interleaved", "weak-first", "reuse"]

DENSER_FIRST = 1.6  # docs/log.md, "Where powerful steps belong when guidance is kept"
REUSE = 2.0  # docs/log.md, "Steps that compute nothing"


class BudgetError(ValueError):
    """A budget that is not a number in (0, 1], or that the patch sizes at hand cannot reach."""


def schedule_for_budget(
    costs: Mapping[str, float],
    steps: int,
    budget: float,
    guidance_branches: int,
    guidance: Guidance = "same",
    order: Order | None = None,
) -> Schedule:
    """The schedule that spends at most `budget` of what the powerful patch size would cost on every forward.

    Args:
        costs: FLOPs of one forward by patch size. The most expensive one is the powerful one.
        steps: number of denoising steps.
        budget: share of the reference, in (0, 1]; the reference is steps x guidance_branches x powerful.
        guidance_branches: forwards a step makes: 2 with classifier-free guidance, else 1.
        guidance: see above; without guidance all are `same`.
        order: see above; None is weak-first where steps are mixed, else interleaved.

    Raises:
        BudgetError: the budget is not a number in (0, 1], or less than the cheapest such schedule costs.
        ValueError: another argument is out of its range, or an order and a guidance do not go together.
    """
    check_budget(budget)
    modes, prices = _sorted_modes(costs)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if guidance_branches not in (1, 2):
        raise ValueError(f"guidance_branches must be 1 or 2 (with guidance), not {guidance_branches}")
    check_order(order, guidance)
    mixes = guidance == "weak-uncond" and guidance_branches == 2
    ways = {"interleaved": _interleaved, "weak-first": _weak_first, "reuse": _reusing}
    way = ways[order or ("weak-first" if mixes else "interleaved")]
    guidance = guidance if guidance_branches == 2 else "same"
    purse = _Purse(modes, prices, steps, guidance_branches, _exact(budget), guidance)
    return Schedule(tuple(way(purse)))


@dataclass(frozen=True)
class _Purse:
    """What there is to spend, and on what. modes: patch sizes from cheapest to most expensive; prices: of them."""

    modes: list[str]
    prices: Mapping[str, Fraction]
    steps: int
    branches: int
    budget: Fraction
    guidance: Guidance

    def all_at(self, mode: str) -> tuple[str, ...]:
        """A step with every branch at one patch size."""
        return (mode,) * self.branches

    def cost(self, *steps: tuple[str, ...]) -> Fraction:
        return sum(self.prices[mode] for mode in Schedule(steps).forwards(self.modes[-1]))

    @property
    def coarsest(self) -> tuple[str, ...]:
        return self.all_at(self.modes[0])

    @property
    def powerful(self) -> tuple[str, ...]:
        return self.all_at(self.modes[-1])

    @property
    def limit(self) -> Fraction:
        """Of all steps together."""
        return self.budget * self.steps * self.cost(self.powerful)

    def too_small(self, cheapest: Fraction) -> BudgetError:
        """The error of a budget below the cheapest schedule. The least it names is rounded up: it must be accepted."""
        least = math.ceil(1000 * cheapest / (self.steps * self.cost(self.powerful))) / 1000
        return BudgetError(
            f"budget {float(self.budget):g} cannot be reached: with {self.modes[0]} as the coarsest patch size the "
            f"least is {least:g}; ask for {least:g} or more, or for modes with a coarser patch size"
        )


def _interleaved(purse: _Purse) -> list[tuple[str, ...]]:
    """As many powerful steps as fit, all others at the cheapest patch size; weak-first where not even one fits.

    With `kept` the weak steps after the first powerful one run their conditional branch only.
    """
    steps, keeps = purse.steps, purse.guidance == "kept"
    kept = (purse.modes[0], KEPT)
    for count in range(min(steps, purse.limit // purse.cost(purse.powerful)), 0, -1):
        usual, *others = denser_first(count, steps) if keeps else evenly_spread(count, steps)
        # Weak steps before the first powerful one run both branches: it comes earlier where that is too much.
        for first in range(usual, -1 if keeps else usual - 1, -1):
            planned = [kept if keeps and index > first else purse.coarsest for index in range(steps)]
            for index in (first, *others):
                planned[index] = purse.powerful
            if purse.cost(*planned) <= purse.limit:
                return planned
    cheapest = steps * purse.cost(purse.coarsest)
    if keeps:
        cheapest = min(cheapest, purse.cost(purse.powerful, *[kept] * (steps - 1)))
    return _weak_first(purse, cheapest)


def _weak_first(purse: _Purse, cheapest: Fraction | None = None) -> list[tuple[str, ...]]:
    """From coarse to fine: as many of the last steps as fit are powerful, all others at the cheapest patch size.

    What is left of the budget then raises the last weak steps, to the finest weak patch size first. With `weak-uncond`
    a mixed step, powerful on the conditional branch and guided by the cheapest patch size on both, takes the place of a
    powerful one; a budget in which every step can be mixed raises the last steps to the powerful patch size on both
    branches, so that the late, fine steps are the last to be guided by weak predictions. Where the cheapest patch size
    costs half the powerful one or more, a mixed step saves nothing and there is none.

    cheapest: of all schedules that were tried before, named where this one does not fit either.
    """
    cost, coarsest = purse.cost, purse.coarsest
    finer = [purse.all_at(mode) for mode in purse.modes[1:]]
    if purse.guidance == "weak-uncond":
        mixed_step = (purse.modes[-1], purse.modes[0])
        if cost(mixed_step) <= purse.budget * cost(purse.powerful):
            coarsest, finer = mixed_step, [purse.powerful]
        elif cost(mixed_step) < cost(purse.powerful):
            finer[-1] = mixed_step
    slack = purse.limit - purse.steps * cost(coarsest)
    if slack < 0:
        raise purse.too_small(purse.steps * cost(coarsest) if cheapest is None else cheapest)
    fine_to_coarse: list[tuple[str, ...]] = []
    for step in reversed(finer):
        left, extra = purse.steps - len(fine_to_coarse), cost(step) - cost(coarsest)
        count = min(left, slack // extra) if extra else left
        slack -= count * extra
        fine_to_coarse += [step] * count
    return [*[coarsest] * (purse.steps - len(fine_to_coarse)), *reversed(fine_to_coarse)]


def _reusing(purse: _Purse) -> list[tuple[str, ...]]:
    """As many powerful steps as fit; all others reuse the last x0."""
    count = min(purse.steps, purse.limit // purse.cost(purse.powerful))
    if not count:
        raise purse.too_small(purse.cost(purse.powerful))
    places = set(reuse_places(count, purse.steps))
    return [purse.powerful if index in places else purse.all_at(REUSED) for index in range(purse.steps)]


def reuse_places(count: int, steps: int) -> list[int]:
    """`count` of `steps` steps, at (steps - 1) u^REUSE for u evenly from 0 to 1, or the next that is free.

    x0 changes most at high noise. The first step has nothing to reuse, and the last one is what is seen.
    """
    return _spaced([(steps - 1) * (k / max(count - 1, 1)) ** REUSE for k in range(count)], steps)


def _spaced(places: list[float], steps: int) -> list[int]:
    """Places that rise, rounded to steps of their own."""
    found: list[int] = []
    for k, place in enumerate(places):
        after, room = found[-1] + 1 if found else 0, steps - len(places) + k  # one step each for those that follow
        found.append(min(max(round(place), after), room))
    return found


def evenly_spread(count: int, steps: int) -> list[int]:
    """`count` of `steps` steps, each in the middle of its share."""
    return [(2 * k + 1) * steps // (2 * count) for k in range(count)]


def denser_first(count: int, steps: int) -> list[int]:
    """`count` of `steps` steps, at 1 + (steps - 3) u^DENSER_FIRST for u evenly from 0 to 1, or the next that is free.

    What guidance adds changes most from step to step at high noise, so that what is kept of it ages fastest there. Not
    at step 0, whose latents hold nothing but noise. The last but one step mends the detail that weak ones have left;
    one or two powerful steps are too few to spend one on that, and are in the middle of their shares.
    """
    shares = [k / (count - 1) if count > 2 else (2 * k + 1) / (2 * count) for k in range(count)]
    return _spaced([1 + max(steps - 3, 0) * u**DENSER_FIRST for u in shares], steps)


def least_budget(costs: Mapping[str, float]) -> float:
    """The least budget that `schedule_for_budget` can meet at any guidance: the cheapest patch size on every step.

    With `kept` and many steps less will do: one powerful step, whose guidance the others keep.

    costs: FLOPs of one forward by patch size. Raises ValueError where they are empty or not positive.
    """
    modes, prices = _sorted_modes(costs)
    least = prices[modes[0]] / prices[modes[-1]]
    # The nearest float may lie just below, and would be refused as a budget.
    return float(least) if _exact(float(least)) >= least else math.nextafter(float(least), math.inf)


def _exact(number: float) -> Fraction:
    """The number as it is written: the float 0.29 is 29/100, so that 29 of 100 is within a budget of 0.29."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(float(number)))


def check_order(order: Order | None, guidance: Guidance | None) -> None:
    """Raises ValueError for an order or a guidance that there is not, and for two that do not go together."""
    if guidance not in (None, "same", "kept", "weak-uncond"):
        raise ValueError(f"guidance must be same, kept or weak-uncond, not {guidance!r}")
    if order not in (None, "interleaved", "weak-first", "reuse"):
        raise ValueError(f"order must be interleaved or weak-first, or reuse, not {order!r}")
    if guidance == "kept" and order == "weak-first":
        raise ValueError("kept guidance goes with interleaved only: weak-first has no powerful step to keep it from")
    if guidance in ("kept", "weak-uncond") and order == "reuse":
        raise ValueError(f"{guidance} is about weak steps, and with the order reuse there are none")
    if guidance == "weak-uncond" and order == "interleaved":
        # The correction of the conditional branch does not do for the other one: docs/log.md.
        raise ValueError("weak-uncond goes with weak-first only: interleaved needs both branches of a powerful step")


def check_budget(budget: float) -> None:
    if not isinstance(budget, Real) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise BudgetError(f"budget must be a number above 0 and up to 1, the share of the full FLOPs, not {budget!r}")


def _sorted_modes(costs: Mapping[str, float]) -> tuple[list[str], dict[str, Fraction]]:
    """The patch sizes from cheapest to most expensive (the coarser first where they cost the same), exact costs."""
    if not costs:
        raise ValueError("costs is empty: it needs the FLOPs of one forward for every patch size")
    for name, cost in costs.items():
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"the cost of {name} must be a positive number of FLOPs, not {cost}")
    modes = sorted(costs, key=lambda name: (costs[name], -math.prod(parse_mode(name)[0])))
    return modes, {name: _exact(cost) for name, cost in costs.items()}
