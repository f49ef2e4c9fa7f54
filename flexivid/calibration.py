"""The schedule with the least measured error for a budget: dynamic programming over powerful steps and weak modes.

In an interleaved schedule a weak step at t errs by e_m(t) - e_m(k), where e_m = x0_weak - x0_powerful, m is its weak
mode and k the last powerful step (`schedules.py`). Errors of steps are taken to add up, each with the weight with which
the step moves the latents. Pure functions; `eval/calibrate.py` measures the errors.
"""

import math
from collections.abc import Mapping

import numpy as np

from flexivid.schedules import BudgetError, Schedule

UNITS = 4000  # of cost that the budget is divided into; costs are rounded up, so that the budget holds


def step_weights(sigmas: np.ndarray) -> np.ndarray:
    """How much an error of x0 moves the latents at each step, squared.

    x moves by (sigma_next - sigma) v, and v errs by e / sigma. sigmas: (steps + 1,), the last one 0. Returns (steps,).
    """
    return np.square(np.diff(sigmas) / sigmas[:-1])


def residual_errors(weak_errors: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """What each weak step would add to the squared error of the latents, for every powerful step before it.

    weak_errors: e_m(t) of one weak mode along a full run, guidance applied, (steps, elements). sigmas: noise levels,
    (steps + 1,), the last one 0. Returns (steps + 1, steps): row k for a last powerful step k, the last row for none.
    """
    steps = len(weak_errors)
    residuals = np.empty((steps + 1, steps))
    for k in range(steps):
        residuals[k] = np.square(weak_errors - weak_errors[k]).mean(1)
    residuals[steps] = np.square(weak_errors).mean(1)
    return residuals * step_weights(sigmas)


def best_schedule(
    residuals: Mapping[str, np.ndarray], costs: Mapping[str, float], powerful: str, budget: float, branches: int
) -> tuple[Schedule, float]:
    """The schedule of least summed error whose forwards cost at most `budget` of the all-powerful run, and that error.

    residuals: by weak mode what `residual_errors` returns. costs: of one forward by patch size, the powerful one too.
    Between two powerful steps one weak mode runs. Raises BudgetError if no schedule is that cheap.
    """
    steps = next(iter(residuals.values())).shape[1]
    unit = budget * steps * costs[powerful] / UNITS
    prices = {mode: cost / unit for mode, cost in costs.items()}
    modes = list(residuals)
    # least[i, c]: least error of the steps before i at a cost of c units or less, where step i is powerful, or the end.
    # came_from[i, c]: the powerful step before i (`steps` for none), the cost up to it, the weak mode in between.
    least = np.full((steps + 1, UNITS + 1), np.inf)
    came_from = np.zeros((steps + 1, UNITS + 1, 3), dtype=int)

    def reach(start: int, end: int, before: np.ndarray, last: int) -> None:
        """Weak steps from `start` up to the powerful step `end`. before: least error by cost, up to `start`."""
        count, end_price = end - start, prices[powerful] if end < steps else 0.0
        compares = 1 if count and last < steps else 0
        for number, mode in enumerate(modes):
            price = math.ceil((count + compares) * prices[mode] + end_price - 1e-9)
            if price > UNITS:
                continue
            errors = before[: UNITS + 1 - price] + residuals[mode][last, start:end].sum()
            (better,) = np.nonzero(errors < least[end, price:])
            least[end, price + better] = errors[better]
            came_from[end, price + better] = np.stack(
                [np.full_like(better, last), better, np.full_like(better, number)], 1
            )

    for end in range(steps + 1):
        reach(0, end, np.zeros(UNITS + 1), steps)
    for last in range(steps):
        for end in range(last + 1, steps + 1):
            reach(last + 1, end, least[last], last)
    cost = int(np.argmin(least[steps]))
    error = float(least[steps, cost])
    if math.isinf(error):
        cheapest = min(costs[mode] for mode in modes) / costs[powerful]
        raise BudgetError(f"budget {budget} cannot be reached: the cheapest patch size on every step is {cheapest:.3f}")
    names, end = [powerful] * steps, steps
    while True:
        last, cost, number = came_from[end, cost].tolist()
        start = 0 if last == steps else last + 1
        names[start:end] = [modes[number]] * (end - start)
        if last == steps:
            return Schedule(tuple((name,) * branches for name in names)), error
        end = last
