"""The schedule with the least measured error for a budget: dynamic programming over computed steps and their kinds.

A computed step of kind q at k predicts p = x0(k) + e_q(k), x0 being the powerful prediction with guidance along a full
run and e_q what a kind of weak step errs by. Steps that reuse hold it until the next computed one. A clip then errs by

    (GAIN / steps)^2 sum over holds of || sum over steps i of p - x0(i) ||^2  +  || p_last - x0(end) ||^2,

the last hold in the second term only.
An error of x0 in one step moves the latents a little, later steps take most of that back, and within a hold they add up
in one direction; the last prediction is what is seen. Pure functions; `flexivid calibrate` measures x0 and the errors.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from flexivid.sampling.budget import BudgetError
from flexivid.sampling.schedule import REUSED, Schedule

UNITS = 100  # of cost that a powerful step has; those of others are rounded up, so that the budget holds
GAIN = 1.6  # of one step's x0 in the clip, times the number of steps: docs/log.md, "Where computed steps belong"

Kind = tuple[str, ...]


def hold_errors(x0: np.ndarray, errors: Mapping[Kind, np.ndarray]) -> dict[Kind, np.ndarray]:
    """What every hold adds to the squared error of a clip, by kind of its computed step.

    x0: guided predictions along a full run, (steps, elements). errors: e_q, likewise; zero for the powerful kind.
    Returns for each kind (steps, steps + 1): [k, j] for a step computed at k and held until the step before j.
    """
    steps, elements = x0.shape
    gain = (GAIN / steps) ** 2 / elements
    sums = np.concatenate([np.zeros((1, elements)), x0.cumsum(0)])
    between = sums @ sums.T
    found = {}
    for kind, error in errors.items():
        held = x0 + error
        squares, products = np.square(held).sum(1), held @ sums.T
        table = np.full((steps, steps + 1), np.inf)
        for k in range(steps):
            j = np.arange(k + 1, steps)
            held_sum = products[k, j] - products[k, k]
            of_steps = between[j, j] - 2 * between[j, k] + between[k, k]
            table[k, j] = gain * ((j - k) ** 2 * squares[k] - 2 * (j - k) * held_sum + of_steps).clip(0)
            table[k, steps] = np.square(held[k] - x0[-1]).mean()
        found[kind] = table
    return found


def best_schedule(
    tables: Mapping[Kind, np.ndarray], costs: Mapping[str, float], powerful: str, budget: float
) -> tuple[Schedule, float]:
    """The schedule of least error whose forwards cost at most `budget` of the all-powerful run, and that error.

    tables: what `hold_errors` returns. costs: of one forward by patch size. Raises BudgetError if none is that cheap.
    """
    kinds, steps = list(tables), len(next(iter(tables.values())))
    branches = len(kinds[0])
    prices = [Schedule((kind,)).cost(costs) for kind in kinds]
    whole = Schedule(((powerful,) * branches,)).cost(costs)
    units = [math.ceil(price / whole * UNITS - 1e-9) for price in prices]
    limit = math.floor(budget * steps * UNITS + 1e-9)
    # least[j, c]: least error of the steps before j at a cost of c units or less. came_from: computed step and kind
    least = np.full((steps + 1, limit + 1), np.inf)
    came_from = np.zeros((steps + 1, limit + 1, 2), dtype=int)
    least[0] = 0
    for j in range(1, steps + 1):
        for k in range(j):
            for number, kind in enumerate(kinds):
                spent = units[number]
                if spent > limit:
                    continue
                errors = least[k, : limit + 1 - spent] + tables[kind][k, j]
                (better,) = np.nonzero(errors < least[j, spent:])
                least[j, spent + better] = errors[better]
                came_from[j, spent + better] = k, number
    error, cost, j = float(least[steps, limit]), limit, steps
    if math.isinf(error):
        raise BudgetError(f"budget {budget:g} cannot be reached: one step costs {min(prices) / whole / steps:.3f}")
    planned: list[Kind] = [(REUSED,) * branches] * steps
    while j:
        k, number = came_from[j, cost]
        planned[k], cost, j = kinds[number], cost - units[number], k
    return Schedule(tuple(planned)), error


def predicted_error(schedule: Schedule, tables: Mapping[Kind, np.ndarray]) -> float:
    """What `best_schedule` makes least, of any schedule of the kinds of `tables` and reused steps."""
    computed: Sequence[int] = [index for index, step in enumerate(schedule.steps) if step in tables]
    ends = [*computed[1:], len(schedule.steps)]
    return float(sum(tables[schedule.steps[k]][k, j] for k, j in zip(computed, ends, strict=True)))
