"""The schedule with the least measured error for a budget: dynamic programming over powerful steps and weak modes.

In an interleaved schedule a weak step at t errs by e(t) - e(k), k being the last powerful step (`budget.py`). With
guidance of scale s, e = e_u + s (e_c - e_u) where both branches run, e_b = x0_weak - x0_powerful of a branch; where
guidance is kept, e = e_c - (s - 1) d, d = x0_c - x0_u of the powerful mode. Errors of steps are taken to add up, each
with the weight with which the step moves the latents. Pure functions; `eval/calibrate.py` measures the errors.
"""

import math
from collections.abc import Mapping

import numpy as np

from flexivid.sampling.budget import BudgetError
from flexivid.sampling.schedule import KEPT, Schedule

UNITS = 4000  # of cost that the budget is divided into; costs are rounded up, so that the budget holds


def step_weights(sigmas: np.ndarray) -> np.ndarray:
    """How much an error of x0 moves the latents at each step, squared.

    x moves by (sigma_next - sigma) v, and v errs by e / sigma. sigmas: (steps + 1,), the last one 0. Returns (steps,).
    """
    return np.square(np.diff(sigmas) / sigmas[:-1])


def residual_errors(weak_errors: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """What each weak step would add to the squared error of the latents, for every powerful step before it.

    weak_errors: e(t) of one kind of weak step along a full run, (steps, elements). sigmas: noise levels, (steps + 1,),
    the last one 0. Returns (steps + 1, steps): row k for a last powerful step k, the last row for none.
    """
    steps = len(weak_errors)
    residuals = np.empty((steps + 1, steps))
    for k in range(steps):
        residuals[k] = np.square(weak_errors - weak_errors[k]).mean(1)
    residuals[steps] = np.square(weak_errors).mean(1)
    return residuals * step_weights(sigmas)


def best_schedule(
    residuals: Mapping[tuple[str, ...], np.ndarray], costs: Mapping[str, float], powerful: str, budget: float
) -> tuple[Schedule, float]:
    """The schedule of least summed error whose forwards cost at most `budget` of the all-powerful run, and that error.

    residuals: by kind of weak step, `("1x4x4", "kept")`, what `residual_errors` returns. costs: of one forward by patch
    size, the powerful one too. Between two powerful steps all are of one kind; before the first none keeps guidance.
    Raises BudgetError if no schedule is that cheap.
    """
    kinds, branches = list(residuals), len(next(iter(residuals)))
    steps = residuals[kinds[0]].shape[1]
    powerful_step = (powerful,) * branches
    powerful_cost, *kind_costs = (Schedule((step,)).cost(costs) for step in (powerful_step, *kinds))
    unit = budget * steps * powerful_cost / UNITS
    # least[i, c]: least error of the steps before i at a cost of c units or less, where step i is powerful, or the end.
    # came_from[i, c]: the powerful step before i (`steps` for none), the cost up to it, the kind of step in between.
    least = np.full((steps + 1, UNITS + 1), np.inf)
    came_from = np.zeros((steps + 1, UNITS + 1, 3), dtype=int)

    def reach(start: int, end: int, before: np.ndarray, last: int) -> None:
        """Weak steps from `start` up to the powerful step `end`. before: least error by cost, up to `start`."""
        count, end_price = end - start, powerful_cost / unit if end < steps else 0.0
        compares = 1 if count and last < steps else 0
        for number, kind in enumerate(kinds):
            if count and last == steps and KEPT in kind:
                continue
            spent = math.ceil((count + compares) * kind_costs[number] / unit + end_price - 1e-9)
            if spent > UNITS:
                continue
            errors = before[: UNITS + 1 - spent] + residuals[kind][last, start:end].sum()
            (better,) = np.nonzero(errors < least[end, spent:])
            least[end, spent + better] = errors[better]
            came_from[end, spent + better] = np.stack(
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
        whole = (cost for kind, cost in zip(kinds, kind_costs, strict=True) if KEPT not in kind)
        cheapest = min(whole) / powerful_cost
        raise BudgetError(f"budget {budget} cannot be reached: the cheapest patch size on every step is {cheapest:.3f}")
    planned, end = [powerful_step] * steps, steps
    while True:
        last, cost, number = came_from[end, cost].tolist()
        start = 0 if last == steps else last + 1
        planned[start:end] = [kinds[number]] * (end - start)
        if last == steps:
            return Schedule(tuple(planned)), error
        end = last


def summed_error(schedule: Schedule, residuals: Mapping[tuple[str, ...], np.ndarray]) -> float:
    """What `best_schedule` makes least, of any schedule of the kinds of `residuals` and powerful steps."""
    total, last = 0.0, len(schedule.steps)
    for step, kind in enumerate(schedule.steps):
        if kind not in residuals:
            last = step
        else:
            total += residuals[kind][last, step]
    return float(total)
