"""The calibrated schedule is the best there is: against trying all of them."""

import itertools

import numpy as np
import pytest

from flexivid.sampling.budget import BudgetError
from flexivid.sampling.calibration import GAIN, best_schedule, hold_errors, predicted_error
from flexivid.sampling.schedule import REUSED, Schedule

COSTS = {"1x2x2": 1000, "1x4x4": 230, "1x4x4-guided": 230}
POWERFUL = ("1x2x2", "1x2x2")
WEAK, GUIDED, HELD = ("1x4x4", "1x4x4"), ("1x4x4-guided",) * 2, (REUSED,) * 2


def measured(steps: int, seed: int):
    source = np.random.default_rng(seed)
    x0 = source.normal(size=(steps, 30)).cumsum(0)
    errors = {POWERFUL: np.zeros_like(x0)}
    for kind, size in ((WEAK, 1.5), (GUIDED, 1.0)):
        errors[kind] = size * source.normal(size=x0.shape)
    return x0, errors


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3, 0.2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_schedule_within_the_budget_errs_less(budget, seed):
    steps = 6
    tables = hold_errors(*measured(steps, seed))
    schedule, error = best_schedule(tables, COSTS, "1x2x2", budget)
    full = 2 * steps * COSTS["1x2x2"]
    assert schedule.cost(COSTS) <= budget * full
    assert predicted_error(schedule, tables) == pytest.approx(error)
    every = (
        Schedule(names) for names in itertools.product([POWERFUL, WEAK, GUIDED, HELD], repeat=steps) if names[0] != HELD
    )
    # Costs are rounded up, so that a schedule that just fits may be passed over.
    within = [s for s in every if s.cost(COSTS) <= (budget - 0.005) * full]
    assert error <= min(predicted_error(s, tables) for s in within) + 1e-9


def test_errors_are_those_of_the_formula():
    x0, errors = measured(5, 3)
    tables = hold_errors(x0, errors)
    for kind, k, j in ((POWERFUL, 0, 1), (POWERFUL, 1, 4), (GUIDED, 0, 3), (WEAK, 2, 3)):
        left = sum(x0[k] + errors[kind][k] - x0[i] for i in range(k, j))
        assert tables[kind][k, j] == pytest.approx((GAIN / 5) ** 2 * np.square(left).mean(), abs=1e-9)
    assert tables[POWERFUL][4, 5] == 0 and tables[POWERFUL][2, 5] == pytest.approx(np.square(x0[2] - x0[4]).mean())
    assert np.isinf(tables[WEAK][3, 2])


def test_what_does_not_change_is_computed_once():
    x0 = np.ones((6, 10))
    x0[:2] = [[5.0], [3.0]]
    tables = hold_errors(x0, {POWERFUL: np.zeros_like(x0)})
    schedule, error = best_schedule(tables, COSTS, "1x2x2", 0.5)
    assert schedule.steps == (POWERFUL, POWERFUL, POWERFUL, HELD, HELD, HELD) and error == pytest.approx(0, abs=1e-9)


def test_an_unreachable_budget_is_refused():
    tables = hold_errors(np.ones((4, 10)), {POWERFUL: np.zeros((4, 10))})
    with pytest.raises(BudgetError, match=r"0\.250"):
        best_schedule(tables, COSTS, "1x2x2", 0.1)
