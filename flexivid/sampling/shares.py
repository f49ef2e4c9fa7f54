"""What a budget comes to: steps are computed whole, so that over a few of them there are few shares to spend."""

import math
import warnings
from collections.abc import Callable

from flexivid.sampling.purse import BudgetError
from flexivid.sampling.schedule import Schedule

LISTED_STEPS = 12  # of a run whose shares are few enough to be named
FAR_LESS = 0.875

# budget -> a schedule, and the share that it costs
Buy = Callable[[float], tuple[Schedule, float]]


def reachable(buy: Buy) -> list[float]:
    """The shares that schedules cost at any budget, from the least up, rounded up: each buys its schedule."""
    found, budget = [], 1.0
    while True:
        try:
            share = float(buy(budget)[1])
        except BudgetError:
            return sorted(set(found))
        found.append(math.ceil(1000 * share - 1e-6) / 1000)
        budget = share - 1e-9


def schedule_of(buy: Buy, budget: float, steps: int) -> Schedule:
    """The schedule that a budget buys. Warns where that costs far less, and says what there is.

    Raises BudgetError where it buys none, likewise.
    """
    try:
        schedule, share = buy(budget)
    except BudgetError as error:
        raise BudgetError(f"{error}{_listed(buy, steps)}") from None
    if share < FAR_LESS * budget:
        warnings.warn(
            f"budget {budget:g} comes to {share:.3f} over {steps} steps, which are computed whole or not at all"
            f"{_listed(buy, steps)}",
            stacklevel=2,
        )
    return schedule


def _listed(buy: Buy, steps: int) -> str:
    if steps > LISTED_STEPS:
        return ""
    *others, last = map("{:g}".format, reachable(buy))
    return f"; over {steps} steps there are {', '.join(others)} and {last}" if others else f"; there is only {last}"
