"""The schedule that a budget buys.

A schedule is a pure function of (costs, steps, budget, guidance): nothing here knows a model, a scheduler or torch.
Coarse ("weak") patches are cheap, the model's own ("powerful") patch is exact. Three orders:

    reuse         powerful steps, denser at first, and between them steps that compute nothing: they hold the last x0.
                  Where a guided patch size is at hand (`1x4x4-guided`, one forward for both guidance branches), the
                  first ones of small budgets run at it. Where one of the model's own patch size is (`1x2x2-guided`),
                  they run at that alone, or, if few of its steps fit, after coarser ones
    weak-first    early steps are weak, late ones powerful (FlexiDiT, arXiv 2502.20126)
    interleaved   powerful steps are spread over all; what the last one knew better than the weak patch size is added to
                  the weak predictions that follow, x0 = x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)]. For that a
                  powerful step runs the weak patch size too.

and with classifier-free guidance three ways to treat its two branches:

    same          both branches of a step run at one patch size
    kept          weak steps after a powerful one run the conditional branch only; what guidance adds is kept from the
                  powerful step, x0_uncond(t) = x0_cond(t) - [x0_cond(t_k) - x0_uncond(t_k)]. A weak step then costs
                  half, and its errors are not multiplied by the guidance scale. With interleaved only, whose powerful
                  steps are then denser at first
    weak-uncond   mixed steps: the conditional branch powerful, the unconditional one weak. With weak-first only

Runs of few steps end powerful in any order: no later step would mend what a weak or reused last one leaves.
A patch size is written frames x height x width in latent pixels, as in `1x4x4`.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from numbers import Real
from typing import Literal

from flexivid.patches.sizes import GUIDED, parse_mode
from flexivid.sampling.places import denser_first, evenly_spread, places_after_guided, places_of_guided
from flexivid.sampling.purse import BudgetError, Guidance, Purse, exact
from flexivid.sampling.schedule import KEPT, REUSED, Schedule, powerful_of

Order = Literal["interleaved", "weak-first", "reuse"]

LEAST_COMPUTED = 3
# docs/log.md, "Guided first steps"
GUIDED_STEPS = 8
GUIDED_BELOW = 5
# docs/log.md, "Guided steps at the model's own patch size"
GUIDED_FIRST = 0.1


def schedule_for_budget(
    costs: Mapping[str, float],
    steps: int,
    budget: float,
    guidance_branches: int,
    guidance: Guidance = "same",
    order: Order | None = None,
    ends_powerful: bool = False,
) -> Schedule:
    """The schedule that spends at most `budget` of what the powerful patch size would cost on every forward.

    Args:
        costs: FLOPs of one forward by patch size, guided ones among them. The most expensive one is the powerful one.
        steps: number of denoising steps.
        budget: share of the reference, in (0, 1]; the reference is steps x guidance_branches x powerful.
        guidance_branches: forwards a step makes: 2 with classifier-free guidance, else 1.
        guidance: see above; without guidance all are `same`.
        order: see above; None is weak-first where steps are mixed, interleaved for `kept`, else reuse, or interleaved
            where hardly a step would be left to reuse; over few steps reuse, or weak-first if one powerful step fits.
        ends_powerful: whether the last step has to be powerful, as that of a run of few steps has.

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
    ways = {"interleaved": _interleaved, "weak-first": _weak_first, "reuse": _reusing, None: _usual}
    if order is None and guidance_branches == 2:
        order = {"weak-uncond": "weak-first", "kept": "interleaved", "same": None}[guidance]
    way = ways[order]
    guidance = guidance if guidance_branches == 2 else "same"
    guided = [mode for mode in modes if mode.endswith(GUIDED)] if guidance_branches == 2 else []
    modes = [mode for mode in modes if not mode.endswith(GUIDED)]
    own = modes[-1] + GUIDED
    coarse = next((mode for mode in reversed(guided) if mode != own), None)
    fine = own if own in guided else None
    purse = Purse(modes, prices, steps, guidance_branches, exact(budget), guidance, coarse, fine, ends_powerful)
    return Schedule(tuple(way(purse)))


def _usual(purse: Purse) -> list[tuple[str, ...]]:
    """By reuse; where that leaves too few steps to compute, weak ones between them, if the budget buys these."""
    if purse.ends:
        return _usual_to_the_end(purse)
    has_guided = purse.fine_guided is not None or (purse.guided is not None and purse.affordable)
    if purse.affordable >= LEAST_COMPUTED or has_guided:
        return _reusing(purse)
    try:
        return _interleaved(purse)
    except BudgetError:
        if not purse.affordable:
            one, weak = purse.cost(purse.powerful), purse.steps * purse.cost(purse.coarsest)
            raise purse.too_small(min(one, weak)) from None
        return _reusing(purse)


def _usual_to_the_end(purse: Purse) -> list[tuple[str, ...]]:
    """By reuse; where a single powerful step fits, the last one, as many of those before it as fit are weak.

    docs/log.md, "Few steps without guidance".
    """
    if purse.affordable >= 2 or purse.guided is not None:
        return _reusing(purse)
    powerful, coarsest, before = purse.cost(purse.powerful), purse.cost(purse.coarsest), purse.steps - 1
    weak = min((purse.limit - powerful) // coarsest, before)
    if weak == before:
        return _weak_first(purse)
    if weak < 1:
        raise purse.too_small(powerful + (coarsest if before else 0))
    return [*[purse.coarsest] * weak, *[purse.all_at(REUSED)] * (before - weak), purse.powerful]


def _interleaved(purse: Purse) -> list[tuple[str, ...]]:
    """As many powerful steps as fit, all others at the cheapest patch size; weak-first where not even one fits.

    With `kept` the weak steps after the first powerful one run their conditional branch only.
    """
    steps, keeps = purse.steps, purse.guidance == "kept"
    kept = (purse.modes[0], KEPT)
    for count in range(purse.affordable, 0, -1):
        usual, *others = (denser_first if keeps else evenly_spread)(count, steps, purse.ends)
        # Weak steps before the first powerful one run both branches: it comes earlier where that is too much.
        earliest = 0 if keeps and (others or not purse.ends) else usual
        for first in range(usual, earliest - 1, -1):
            planned = [kept if keeps and index > first else purse.coarsest for index in range(steps)]
            for index in (first, *others):
                planned[index] = purse.powerful
            if purse.cost(*planned) <= purse.limit:
                return planned
    if not keeps:
        return _weak_first(purse)
    ending = [purse.powerful] if purse.ends and steps > 1 else []
    return _weak_first(purse, purse.cost(purse.powerful, *[kept] * (steps - 1 - len(ending)), *ending))


def _weak_first(purse: Purse, cheapest: Fraction | float = math.inf) -> list[tuple[str, ...]]:
    """From coarse to fine: as many of the last steps as fit are powerful, all others at the cheapest patch size.

    What is left of the budget then raises the last weak steps, to the finest weak patch size first. With `weak-uncond`
    a mixed step, powerful on the conditional branch and guided by the cheapest patch size on both, takes the place of a
    powerful one; a budget in which every step can be mixed raises the last steps to the powerful patch size on both
    branches, so that the late, fine steps are the last to be guided by weak predictions. Where the cheapest patch size
    costs half the powerful one or more, a mixed step saves nothing and there is none.

    cheapest: what a schedule costs that was tried before, named where this one does not fit and costs no less.
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
    least_extra = cost(finer[-1]) - cost(coarsest) if purse.ends and coarsest[0] != purse.modes[-1] else 0
    if slack < least_extra:
        raise purse.too_small(min(cheapest, purse.steps * cost(coarsest) + least_extra))
    fine_to_coarse: list[tuple[str, ...]] = []
    for step in reversed(finer):
        left, extra = purse.steps - len(fine_to_coarse), cost(step) - cost(coarsest)
        count = min(left, slack // extra) if extra else left
        slack -= count * extra
        fine_to_coarse += [step] * count
    return [*[coarsest] * (purse.steps - len(fine_to_coarse)), *reversed(fine_to_coarse)]


def _reusing(purse: Purse) -> list[tuple[str, ...]]:
    """As many powerful steps as fit; all others reuse the last x0.

    Where these are few, guided steps take the place of one of them, and come before all others: the layout, which they
    decide, asks for many steps and little detail. Over few steps they take what is left: one powerful step less would
    be far less than was asked.
    """
    powerful, guided, early_step, least = purse.affordable, 0, purse.powerful, purse.cost(purse.powerful)
    if purse.ends and purse.steps > 1:  # the first step has nothing to reuse
        least += least if purse.guided is None else purse.cost(purse.all_at(purse.guided))
    is_small = powerful < min(GUIDED_BELOW, purse.steps)
    if purse.fine_guided is not None and is_small and not purse.ends:
        return _all_guided(purse, purse.all_at(purse.fine_guided))
    if purse.limit < least:
        raise purse.too_small(least)
    if purse.guided is not None and is_small:
        powerful = powerful if purse.ends else max(powerful - 1, 1)
        left = purse.limit - powerful * purse.cost(purse.powerful)
        early_step = purse.all_at(purse.guided)
        guided = min(GUIDED_STEPS, left // purse.cost(early_step))
    early, late = places_after_guided(guided, powerful, purse.steps, purse.ends)
    planned = [purse.all_at(REUSED)] * purse.steps
    for place in early:
        planned[place] = early_step
    for place in late:
        planned[place] = purse.powerful
    return planned


def _all_guided(purse: Purse, fine: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Guided steps alone, as many at the model's own patch size as fit; where these are few, a few coarser ones first.

    docs/log.md, "Guided steps at the model's own patch size".
    """
    coarse, price, first = fine, purse.cost(fine), 0
    if purse.limit < price:
        raise purse.too_small(price)
    if purse.guided is not None and purse.limit // price < GUIDED_BELOW:
        coarse = purse.all_at(purse.guided)
        first = min(round(purse.steps * GUIDED_FIRST), (purse.limit - price) // purse.cost(coarse))
    count = min(purse.steps - first, (purse.limit - first * purse.cost(coarse)) // price)
    planned = [*[coarse] * first, *[purse.all_at(REUSED)] * (purse.steps - first)]
    for place in places_of_guided(first, count, purse.steps):
        planned[place] = fine
    return planned


def least_budget(costs: Mapping[str, float]) -> float:
    """The least budget that `schedule_for_budget` can meet at any guidance: the cheapest patch size on every step.

    With `kept` and many steps less will do: one powerful step, whose guidance the others keep. Few steps take more:
    the last one is powerful.

    costs: FLOPs of one forward by patch size. Raises ValueError where they are empty or not positive.
    """
    modes, prices = _sorted_modes(costs)
    least = prices[modes[0]] / prices[powerful_of(costs)]
    # The nearest float may lie just below, and would be refused as a budget.
    return float(least) if exact(float(least)) >= least else math.nextafter(float(least), math.inf)


def check_order(order: Order | None, guidance: Guidance | None) -> None:
    """Raises ValueError for an order or a guidance that there is not, and for two that do not go together."""
    if guidance not in (None, "same", "kept", "weak-uncond"):
        raise ValueError(f"guidance must be same, kept or weak-uncond, not {guidance!r}")
    if order not in (None, "interleaved", "weak-first", "reuse"):
        raise ValueError(f"order must be reuse, interleaved or weak-first, not {order!r}")
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
    return modes, {name: exact(cost) for name, cost in costs.items()}
