"""The calibrated schedule is the best there is: against trying all of them."""

import itertools

import numpy as np
import pytest

from flexivid.sampling.budget import BudgetError
from flexivid.sampling.calibration import best_schedule, residual_errors, summed_error
from flexivid.sampling.schedule import Schedule

COSTS = {"1x2x2": 1000, "1x4x4": 230, "2x4x4": 140}


POWERFUL = ("1x2x2", "1x2x2")
KINDS = [("1x4x4", "1x4x4"), ("2x4x4", "2x4x4"), ("1x4x4", "kept")]


def all_schedules(steps: int):
    """Every sequence in which one kind of weak step runs between two powerful ones, and guidance is kept from one."""
    for names in itertools.product([POWERFUL, *KINDS], repeat=steps):
        segments = [list(group) for _, group in itertools.groupby(names, lambda n: n == POWERFUL)]
        if "kept" not in names[0] and all(len(set(segment)) == 1 for segment in segments):
            yield Schedule(names)


@pytest.mark.parametrize("budget", [0.8, 0.5, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_schedule_within_the_budget_errs_less(budget, seed):
    steps, source = 6, np.random.default_rng(seed)
    sigmas = np.linspace(1, 0, steps + 1)
    residuals = {}
    for kind in KINDS:
        walk = source.normal(size=(steps, 50)).cumsum(0) + 3 * source.normal(size=50)
        residuals[kind] = residual_errors(walk, sigmas)
    schedule, error = best_schedule(residuals, COSTS, "1x2x2", budget)
    full = 2 * steps * COSTS["1x2x2"]
    assert schedule.cost(COSTS) <= budget * full
    assert summed_error(schedule, residuals) == pytest.approx(error)
    # Costs are rounded up, so that a schedule that just fits may be passed over.
    within = [s for s in all_schedules(steps) if s.cost(COSTS) <= (budget - 0.003) * full]
    assert error <= min(summed_error(s, residuals) for s in within) + 1e-9


def test_kept_guidance_is_used_where_it_errs_less():
    sigmas = np.linspace(1, 0, 9)
    residuals = {("2x4x4", "2x4x4"): residual_errors(np.arange(8.0)[:, None], sigmas)}
    residuals["2x4x4", "kept"] = residual_errors(0.5 * np.arange(8.0)[:, None], sigmas)
    schedule, _ = best_schedule(residuals, COSTS, "1x2x2", 0.5)
    kept = [step == ("2x4x4", "kept") for step in schedule.steps]
    first = schedule.steps.index(POWERFUL)
    assert any(kept) and not any(kept[:first])
    assert set(schedule.steps[first:]) == {POWERFUL, ("2x4x4", "kept")}


def test_the_correction_takes_a_constant_error_away():
    errors = np.ones((4, 10))
    errors[3] += 1
    table = residual_errors(errors, np.array([1.0, 0.75, 0.5, 0.25, 0.0]))
    assert table[0, 1] == table[0, 2] == 0 and table[0, 3] == pytest.approx(1.0)
    assert table[4].tolist() == pytest.approx([0.0625, (0.25 / 0.75) ** 2, 0.25, 4.0])


def test_an_unreachable_budget_is_refused():
    table = residual_errors(np.ones((4, 10)), np.array([1.0, 0.75, 0.5, 0.25, 0.0]))
    with pytest.raises(BudgetError, match="0.140"):
        best_schedule({("2x4x4", "2x4x4"): table}, {"1x2x2": 1000, "2x4x4": 140}, "1x2x2", 0.1)
