"""Budgets over a few steps: they end powerful, there are few of them, and what there is is said."""

import re
import warnings
from fractions import Fraction
from itertools import product

import pytest
from families import tiny_pipeline

import flexivid
from flexivid.sampling.budget import BudgetError, schedule_for_budget
from flexivid.sampling.places import denser_first, evenly_spread, reuse_places
from flexivid.sampling.schedule import REUSED

ALONE = {"1x2x2": 1000}
WEAK = {"1x2x2": 1000, "1x4x4": 119, "2x4x4": 52}
COSTS = {"no weak patch size": ALONE, "one": {"1x2x2": 1000, "1x4x4": 230}, "two": WEAK}
COSTS["guided"] = WEAK | {"1x4x4-guided": 119}
ORDERS = [(None, "same"), ("reuse", "same"), ("interleaved", "same"), ("interleaved", "kept"), ("weak-first", "same")]
ORDERS += [(None, "kept"), ("weak-first", "weak-uncond")]


def share_of(schedule, costs: dict, steps: int, branches: int) -> Fraction:
    return Fraction(schedule.cost(costs), steps * branches * costs["1x2x2"])


@pytest.mark.parametrize("steps", range(2, 9))
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("kind", COSTS)
def test_a_budget_over_few_steps_ends_powerful(kind, branches, steps):
    costs = COSTS[kind]
    for order, guidance in ORDERS:
        before = 0
        for budget in (Fraction(k, 20) for k in range(1, 21)):
            case = (order, guidance, budget)
            try:
                schedule = schedule_for_budget(costs, steps, float(budget), branches, guidance, order, True)
            except BudgetError as error:
                least = Fraction(re.search(r"the least is (\S+);", str(error))[1])
                assert before == 0 and budget < least, case
                accepted = schedule_for_budget(costs, steps, float(least), branches, guidance, order, True)
                assert share_of(accepted, costs, steps, branches) > least - Fraction(1, 1000), case
                continue
            last = schedule.steps[-1]
            assert last[0] == "1x2x2" and (set(last) == {"1x2x2"} or guidance == "weak-uncond"), case
            share = share_of(schedule, costs, steps, branches)
            assert before <= share <= budget, case
            before = share
        assert before == 1, order


def test_what_few_steps_without_guidance_run():
    def planned(costs, budget, steps=4):
        return str(schedule_for_budget(costs, steps, budget, 1, ends_powerful=True))

    for costs in COSTS.values():
        assert planned(costs, 0.75) == "2 x 1x2x2, 1 x reused, 1 x 1x2x2"
        assert planned(costs, 0.6) == planned(costs, 0.5) == "1 x 1x2x2, 2 x reused, 1 x 1x2x2"
    assert planned(WEAK, 0.49) == "3 x 1x4x4, 1 x 1x2x2"
    assert planned(WEAK, 0.3) == "3 x 2x4x4, 1 x 1x2x2"
    assert planned(WEAK, 0.28) == "2 x 2x4x4, 1 x reused, 1 x 1x2x2"
    assert planned(WEAK, 0.263) == "1 x 2x4x4, 2 x reused, 1 x 1x2x2"
    for costs, least in ((WEAK, "0.263"), (ALONE, "0.5")):
        with pytest.raises(BudgetError, match=f"the least is {least};"):
            planned(costs, 0.25)
    assert planned(ALONE, 1, steps=1) == "1 x 1x2x2"
    with pytest.raises(BudgetError, match="the least is 1;"):
        planned(WEAK, 0.9, steps=1)


def test_more_steps_may_end_reused():
    for steps in (8, 9):  # 8 as a part of a longer run, before guidance begins or after it has ended
        assert schedule_for_budget(WEAK, steps, 0.5, 1).steps[-1] == (REUSED,)


def test_places_that_end_with_the_last_step():
    for steps, place in product(range(2, 9), (reuse_places, evenly_spread, denser_first)):
        for count in range(2, steps + 1):
            places = place(count, steps, ends=True)
            assert places == sorted(set(places)) and len(places) == count and places[-1] == steps - 1


# ---- of a pipeline


def plan(pipe, steps: int, guided: bool = False):
    return flexivid.plan(pipe, frames=17, height=64, width=96, steps=steps, text_length=7, guided=guided)


def listed(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[\d.]+\d|\d", text.split("there are ")[1])]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("settings", [{}, {"order": "interleaved"}, {"modes": ["1x4x4", "2x4x4"]}])
def test_a_budget_that_cannot_be_reached_says_which_there_are(settings, guided):
    pipe, _ = tiny_pipeline("wan")
    flexivid.enable(pipe, budget=0.05, **settings)
    with pytest.raises(BudgetError, match="budget 0.05 cannot be reached.*; over 4 steps there are ") as error:
        plan(pipe, 4, guided)
    shares = listed(str(error.value))
    assert shares == sorted(set(shares)) and len(shares) >= 3 and shares[-1] == 1
    costs = flexivid.costs(pipe, frames=17, height=64, width=96, text_length=7)
    for share in shares:
        flexivid.enable(pipe, budget=share, **settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="budget")
            schedule = plan(pipe, 4, guided)
        spent = schedule.cost(costs) / (4 * (1 + guided) * costs["1x2x2"])
        assert share - 0.0011 < spent <= share


def test_rounding_that_leaves_far_less_is_said():
    pipe, _ = tiny_pipeline("wan")
    flexivid.enable(pipe, budget=0.7)
    with pytest.warns(
        UserWarning, match=r"budget 0.7 comes to 0.500 over 4 steps.*; over 4 steps there are 0\.\d+"
    ) as said:
        plan(pipe, 4)
    assert listed(str(said[0].message))[-3:] == [0.5, 0.75, 1]
    flexivid.enable(pipe, budget=0.25)
    with pytest.warns(UserWarning, match="budget 0.25 comes to 0.* over 10 steps.* there are "):
        plan(pipe, 10)
    flexivid.enable(pipe, budget=0.12)
    with pytest.warns(
        UserWarning, match="budget 0.12 comes to 0.100 over 40 steps, which are computed whole or not at all$"
    ):
        plan(pipe, 40)
    for budget, steps in ((0.25, 40), (0.25, 8), (0.5, 4)):
        flexivid.enable(pipe, budget=budget)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="budget")
            assert plan(pipe, steps).steps[-1] == ("1x2x2",) or steps == 40
