import json
import math
import random
from fractions import Fraction
from functools import partial

import pytest

from flexivid.patches.sizes import format_patch_size, multiple_of, parse_patch_size
from flexivid.sampling.budget import BudgetError, least_budget, schedule_for_budget
from flexivid.sampling.places import denser_first
from flexivid.sampling.schedule import Schedule, explicit_schedule

# Whatever the number of steps is, the last one may be weak; what few steps add is in test_few_step_budgets.py.
weak_first = partial(schedule_for_budget, order="weak-first", ends_powerful=False)
interleaved = partial(schedule_for_budget, order="interleaved", ends_powerful=False)

# FLOPs of one Wan2.1-1.3B forward at 480x832x81, and the ratios of its coarse modes.
WAN = {"1x2x2": 283_000_000_000_000, "1x4x4": 33_677_000_000_000, "2x4x4": 14_716_000_000_000}


# ---- patch sizes


def test_patch_size_round_trip():
    assert parse_patch_size("1x4x4") == (1, 4, 4)
    assert parse_patch_size("2x16x8") == (2, 16, 8)
    assert format_patch_size((1, 4, 4)) == "1x4x4"
    assert format_patch_size(parse_patch_size("2x16x8")) == "2x16x8"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4x4", "2 numbers instead of 3"),
        ("4", "1 number instead of 3"),
        ("1x2x2x2", "4 numbers instead of 3"),
        ("1x0x4", "at least 1"),
        ("abc", "is not a patch size"),
        ("", "is not a patch size"),
        ("1x-2x4", "is not a patch size"),
        ("1x2.0x4", "is not a patch size"),
        ("1x_2x4", "is not a patch size"),
        ("1x4x4 ", "is not a patch size"),
    ],
)
def test_bad_patch_size_says_what_is_wrong_and_what_is_right(text, says):
    with pytest.raises(ValueError) as error:
        parse_patch_size(text)
    assert repr(text) in str(error.value) and says in str(error.value) and "1x4x4" in str(error.value)


def test_multiple_of():
    assert multiple_of((1, 4, 4), (1, 2, 2)) == (1, 2, 2)
    assert multiple_of((2, 2, 2), (1, 2, 2)) == (2, 1, 1)
    assert multiple_of((1, 2, 2), (1, 2, 2)) == (1, 1, 1)
    assert multiple_of((2, 6, 4), (1, 2, 2)) == (2, 3, 2)


@pytest.mark.parametrize("patch_size", [(1, 3, 3), (1, 1, 1), (1, 2, 3), (0, 2, 2)])
def test_no_multiple_names_patch_sizes_that_are(patch_size):
    with pytest.raises(ValueError) as error:
        multiple_of(patch_size, (1, 2, 2))
    assert str(error.value) == (
        f"{format_patch_size(patch_size)} is not an integer multiple of the model's own patch size 1x2x2; "
        "for example 1x4x4, 2x2x2 or 2x4x4 would be"
    )


# ---- Schedule


def test_schedule_text_cost_and_json():
    schedule = Schedule((("2x4x4", "2x4x4"),) * 3 + (("1x2x2", "2x4x4"),) + (("1x2x2", "1x2x2"),))
    assert str(schedule) == "3 x 2x4x4, 1 x 1x2x2/2x4x4, 1 x 1x2x2"
    assert str(Schedule((("1x4x4",),) * 2)) == "2 x 1x4x4"
    # The mixed step runs 2x4x4 on both branches, for its guidance.
    assert schedule.cost({"2x4x4": 1, "1x2x2": 100}) == 8 * 1 + 3 * 100
    assert schedule.to_json() == [["2x4x4", "2x4x4"]] * 3 + [["1x2x2", "2x4x4"], ["1x2x2", "1x2x2"]]
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_integer_costs_are_summed_exactly():
    assert Schedule((("1x2x2", "1x2x2"),) * 40).cost({"1x2x2": 2**60 + 1}) == 80 * (2**60 + 1)


def test_cost_names_a_missing_patch_size():
    with pytest.raises(ValueError, match=r"no cost is given for 2x4x4; there are costs for 1x2x2"):
        Schedule((("2x4x4",), ("1x2x2",))).cost({"1x2x2": 1})


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [[]],
        ["1x4x4"],
        [[1, 4, 4]],
        {"1x4x4": 3},
        None,
        [["1x4x4"], ["1x4x4", "1x4x4"]],
        [["1x4x4"] * 3],
        [["4x4"]],
    ],
)
def test_from_json_refuses_what_is_no_schedule(steps):
    with pytest.raises(ValueError):
        Schedule.from_json(steps)


# ---- budgets


def random_cases(count):
    """Costs of 1 to 5 modes, integers or floats, coarser always cheaper; budgets drawn where they can be reached."""
    rng = random.Random(0)
    names = ["1x2x2", "1x4x4", "2x4x4", "2x8x8", "4x8x8"]
    for _ in range(count):
        modes = names[: rng.randint(1, 5)]
        draw = rng.choice([lambda: rng.randint(1, 50), lambda: rng.randint(10**12, 10**16), rng.random])
        values = sorted({draw() for _ in modes}, reverse=True)
        costs = list(zip(modes, values, strict=False))
        rng.shuffle(costs)
        costs = dict(costs)
        low = least_budget(costs)
        budget = rng.choice([low, 1.0, rng.uniform(low, 1), max(low, round(rng.uniform(low, 1), 2))])
        yield costs, rng.randint(1, 60), budget, rng.choice([1, 2]), rng.choice(["same", "weak-uncond"])


def written(number):
    """A float as its decimal digits say, which is how a budget is meant."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(number))


def exact_cost(steps, costs):
    mixed = [step[1] for step in steps if len(set(step)) == 2]
    return sum(written(costs[name]) for name in [name for step in steps for name in step] + mixed)


def test_schedules_within_budget_monotone_and_maximal():
    for case in random_cases(500):
        costs, steps, budget, branches, guidance = case
        schedule = weak_first(costs, steps, budget, branches, guidance)
        order = sorted(costs, key=costs.get)
        cheapest, powerful = order[0], order[-1]
        limit = written(budget) * steps * branches * written(costs[powerful])

        assert len(schedule.steps) == steps and {len(step) for step in schedule.steps} == {branches}, case
        assert exact_cost(schedule.steps, costs) <= limit, case
        conditional = [costs[step[0]] for step in schedule.steps]
        assert conditional == sorted(conditional), case

        ladder = [(name,) * branches for name in order]
        if guidance == "weak-uncond" and branches == 2:
            mixed = (powerful, cheapest)
            if exact_cost([mixed] * steps, costs) <= limit:
                ladder = [mixed, ladder[-1]]
            elif exact_cost([mixed], costs) < exact_cost([ladder[-1]], costs):
                ladder = [*ladder[:-1], mixed]
        assert set(schedule.steps) <= set(ladder), case
        # As many of the finest kind as fit, and then no step could have been finer.
        count = schedule.steps.count(ladder[-1])
        if count < steps:
            one_more = [ladder[-1]] * (count + 1) + [ladder[0]] * (steps - count - 1)
            assert exact_cost(one_more, costs) > limit, case
            left = limit - exact_cost(schedule.steps, costs)
            for step in set(schedule.steps[: steps - count]):
                for finer in ladder[ladder.index(step) + 1 : -1]:
                    assert exact_cost([finer], costs) - exact_cost([step], costs) > left, case
        assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("powerful", [283.1e12, 0.1, 1 / 3, 3 * 10**17 + 1])
def test_full_budget_is_all_powerful(branches, powerful):
    costs = {"1x4x4": powerful / 7, "1x2x2": powerful}
    for steps in range(1, 61):
        for budget in (1.0, 1):
            schedule = schedule_for_budget(costs, steps, budget, branches)
            assert schedule.steps == (("1x2x2",) * branches,) * steps


def test_a_budget_that_is_met_exactly_is_used():
    # .29 x 100 is 28.999999999999996 in floating point.
    assert str(weak_first({"1x2x2": 10, "1x4x4": 1}, 10, 0.28, 1)) == "8 x 1x4x4, 2 x 1x2x2"
    assert str(weak_first({"1x2x2": 100, "1x4x4": 29}, 7, 0.29, 1)) == "7 x 1x4x4"
    assert str(weak_first({"1x2x2": 1.0, "1x4x4": 0.2}, 40, 0.6, 2)) == "20 x 1x4x4, 20 x 1x2x2"
    assert str(weak_first({"1x2x2": 1.0, "1x4x4": 0.2}, 40, 0.599, 2)) == "21 x 1x4x4, 19 x 1x2x2"


def test_wan_at_a_quarter():
    schedule = weak_first(WAN, 40, 0.25, 2)
    assert str(schedule) == "27 x 2x4x4, 5 x 1x4x4, 8 x 1x2x2"
    assert schedule.cost(WAN) / (80 * WAN["1x2x2"]) <= 0.25


def test_weak_uncond_mixes_the_powerful_steps():
    costs = {"1x2x2": 100, "1x4x4": 20}
    schedule = schedule_for_budget(costs, 10, 0.4, 2, "weak-uncond")
    # 40 for a weak step, 140 for a mixed one, 800 in all.
    assert schedule.to_json() == [["1x4x4", "1x4x4"]] * 6 + [["1x2x2", "1x4x4"]] * 4
    assert schedule.cost(costs) == 800


def test_weak_uncond_at_large_budgets_keeps_late_steps_powerful():
    costs = {"1x2x2": 100, "1x4x4": 20}
    # 140 for a mixed step, 200 for a powerful one, 2000 in all.
    for budget, expected in (
        (0.7, "10 x 1x2x2/1x4x4"),
        (0.8, "7 x 1x2x2/1x4x4, 3 x 1x2x2"),
        (1.0, "10 x 1x2x2"),
    ):
        assert str(schedule_for_budget(costs, 10, budget, 2, "weak-uncond")) == expected


def test_weak_uncond_without_guidance_is_same():
    for costs, steps, budget, _, _ in random_cases(200):
        args = costs, steps, budget, 1
        settings = {"order": None, "ends_powerful": False}
        assert schedule_for_budget(*args, "weak-uncond", **settings) == schedule_for_budget(*args, "same", **settings)


def test_one_mode_runs_only_at_full_budget():
    assert str(schedule_for_budget({"1x2x2": 7}, 4, 1.0, 2)) == "4 x 1x2x2"
    assert str(schedule_for_budget({"1x2x2": 7}, 4, 0.99, 2, ends_powerful=True)) == "2 x 1x2x2, 1 x reused, 1 x 1x2x2"
    with pytest.raises(BudgetError, match="the least is 1;"):
        interleaved({"1x2x2": 7}, 4, 0.99, 2)


def test_equal_costs_go_to_the_finer_patch():
    costs = {"1x2x2": 10, "1x4x4": 10, "2x4x4": 1}
    assert str(weak_first(costs, 2, 1.0, 1)) == "2 x 1x2x2"
    assert str(weak_first({"1x2x2": 10, "1x4x4": 1, "2x2x2": 1}, 3, 0.4, 1)) == "2 x 2x2x2, 1 x 1x2x2"


@pytest.mark.parametrize("budget", [0, 0.0, -1, 1.5, math.nan, math.inf, "0.5", None, True, 1j])
def test_budget_must_be_a_share(budget):
    with pytest.raises(BudgetError, match="budget must be a number above 0 and up to 1"):
        schedule_for_budget(WAN, 40, budget, 2)


@pytest.mark.parametrize(("guidance", "order"), [("same", "interleaved"), ("weak-uncond", "weak-first")])
def test_unreachable_budget_names_the_least(guidance, order):
    costs = {"1x2x2": 100_000, "1x4x4": 33_000, "2x4x4": 14_249}
    with pytest.raises(BudgetError) as error:
        schedule_for_budget(costs, 40, 0.1, 2, guidance, order)
    # .14249 is named as .143: .142 would be refused in its turn.
    assert str(error.value).startswith(
        "budget 0.1 cannot be reached: with 2x4x4 as the coarsest patch size the least is 0.143; ask for 0.143 or more"
    )
    assert schedule_for_budget(costs, 40, 0.143, 2, guidance, order).steps[0] == ("2x4x4", "2x4x4")
    with pytest.raises(BudgetError):
        schedule_for_budget(costs, 40, 0.142, 2, guidance, order)


def test_the_least_with_kept_guidance_is_one_powerful_step():
    costs = {"1x2x2": 100_000, "2x4x4": 14_249}  # (2 + .14249 + 39 x .14249) / 80 = .0962
    with pytest.raises(BudgetError, match="the least is 0.097"):
        schedule_for_budget(costs, 40, 0.096, 2, "kept")
    steps = schedule_for_budget(costs, 40, 0.097, 2, "kept").steps
    assert steps == (("1x2x2", "1x2x2"), *[("2x4x4", "kept")] * 39)
    # Of two steps one powerful one would cost more than none.
    with pytest.raises(BudgetError, match="the least is 0.143"):
        interleaved(costs, 2, 0.1, 2, "kept")


def test_least_budget_is_accepted_and_anything_less_is_not():
    for costs, steps, _, branches, guidance in random_cases(300):
        least, order = least_budget(costs), "interleaved" if guidance == "same" else "weak-first"
        settings = {"guidance": guidance, "order": order, "ends_powerful": False}
        assert schedule_for_budget(costs, steps, least, branches, **settings).steps
        with pytest.raises(BudgetError, match="cannot be reached"):
            schedule_for_budget(costs, steps, least * (1 - 1e-12), branches, **settings)
    assert least_budget({"1x2x2": 100, "1x4x4": 20}) == 0.2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"costs": {}}, "costs is empty"),
        ({"costs": {"1x2x2": 0}}, "must be a positive number of FLOPs"),
        ({"costs": {"1x2x2": math.nan}}, "must be a positive number of FLOPs"),
        ({"costs": {"fine": 1}}, "is not a patch size"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance_branches": 3}, "guidance_branches must be 1 or 2"),
        ({"guidance": "weak"}, "guidance must be same, kept or weak-uncond"),
        ({"order": "fine-first"}, "order must be reuse, interleaved or weak-first"),
        ({"order": "interleaved", "guidance": "weak-uncond"}, "weak-uncond goes with weak-first only"),
        ({"order": "weak-first", "guidance": "kept"}, "kept guidance goes with interleaved only"),
    ],
)
def test_other_arguments_out_of_range(change, says):
    arguments = {"costs": WAN, "steps": 40, "budget": 0.5, "guidance_branches": 2, "guidance": "same"} | change
    with pytest.raises(ValueError, match=says) as error:
        schedule_for_budget(**arguments)
    assert not isinstance(error.value, BudgetError)


# ---- interleaved


def test_interleaved_spreads_powerful_steps_and_pays_for_their_comparison():
    costs = {"1x2x2": 100, "1x4x4": 50, "2x4x4": 14}
    schedule = interleaved(costs, 40, 0.25, 2)
    weak, powerful = ("2x4x4", "2x4x4"), ("1x2x2", "1x2x2")
    assert [index for index, step in enumerate(schedule.steps) if step == powerful] == [5, 15, 25, 35]
    assert set(schedule.steps) == {weak, powerful}
    # 4 powerful steps, 36 weak ones, 4 comparisons, on two branches each.
    assert schedule.cost(costs) == 2 * (4 * 100 + 36 * 14 + 4 * 14)
    assert [schedule.compared(5, "1x2x2", branch) for branch in (0, 1)] == [("2x4x4",)] * 2
    assert schedule.compared(6, "1x2x2", 0) == ()


def test_kept_guidance_pays_for_one_branch_of_weak_steps():
    costs = {"1x2x2": 100, "1x4x4": 50, "2x4x4": 14}
    schedule = schedule_for_budget(costs, 40, 0.25, 2, "kept")
    powerful, weak, kept = ("1x2x2", "1x2x2"), ("2x4x4", "2x4x4"), ("2x4x4", "kept")
    # Before the first powerful step there is no guidance to keep.
    assert schedule.steps[:3] == (weak, powerful, kept)
    assert [schedule.steps.count(step) for step in (powerful, weak, kept)] == [7, 1, 32]
    # Comparisons are for the branch that is corrected.
    assert schedule.cost(costs) == 7 * (200 + 14) + 28 + 32 * 14
    assert [schedule.compared(1, "1x2x2", branch) for branch in (0, 1)] == [("2x4x4",), ()]
    assert schedule.gives_guidance(1, "1x2x2") and not schedule.gives_guidance(2, "1x2x2")
    # 7 powerful steps cost 2006.8 of 2000 if the first is the second of 40, and less if it is the first.
    costs = {"1x2x2": 100, "2x4x4": 14.8}
    steps = schedule_for_budget(costs, 40, 0.25, 2, "kept").steps
    assert [index for index, step in enumerate(steps) if step == powerful] == [0, 3, 7, 13, 20, 29, 38]
    assert schedule_for_budget(costs, 40, 0.25, 1, "kept") == schedule_for_budget(costs, 40, 0.25, 1)
    assert explicit_schedule(schedule.to_text(), 40, 2, WAN) == Schedule.from_json(schedule.to_json()) == schedule


def test_powerful_steps_are_denser_first():
    assert denser_first(7, 40) == [1, 3, 7, 13, 20, 29, 38]
    assert denser_first(1, 40) == [13] and denser_first(2, 40) == [5, 24] and denser_first(3, 40) == [1, 13, 38]
    for steps in range(1, 50):
        for count in range(1, steps + 1):
            places = denser_first(count, steps)
            assert len(set(places)) == count and places == sorted(places) and set(places) <= set(range(steps))
            assert 0 not in places or count == steps


def test_guidance_may_be_kept_beside_a_powerful_conditional_branch():
    schedule = explicit_schedule("1x2x2:1,2x4x4/kept:1,1x2x2/kept:1,1x4x4/kept:1,1x2x2:1", 5, 2, WAN)
    # Each powerful conditional branch corrects the weak ones up to the next; guidance stays that of the first step.
    assert [schedule.compared(i, "1x2x2", 0) for i in range(5)] == [("2x4x4",), (), ("1x4x4",), (), ()]
    assert [schedule.gives_guidance(i, "1x2x2") for i in range(5)] == [True, False, False, False, False]
    assert sorted(schedule.forwards("1x2x2")) == ["1x2x2"] * 5 + ["1x4x4"] * 2 + ["2x4x4"] * 2


def test_what_a_powerful_step_is_compared_with():
    schedule = explicit_schedule("1x2x2:2,2x4x4:1,1x4x4:1,1x2x2/1x4x4:1,2x4x4:1,1x2x2:1", 7, 2, WAN)
    # Not before another powerful step, not after the last weak one; a mixed step does not end the run of weak ones.
    assert [schedule.compared(i, "1x2x2", 1) for i in range(7)] == [(), ("2x4x4", "1x4x4"), (), (), (), (), ()]
    names = schedule.forwards("1x2x2")
    assert [names.count(name) for name in ("1x2x2", "1x4x4", "2x4x4")] == [7, 6, 6]


def test_interleaved_keeps_the_budget_with_as_many_powerful_steps_as_fit():
    for costs, steps, budget, branches, _ in random_cases(300):
        schedule = interleaved(costs, steps, budget, branches)
        exact = {name: written(cost) for name, cost in costs.items()}
        order = sorted(costs, key=costs.get)
        limit = written(budget) * steps * branches * exact[order[-1]]

        def spent(steps, exact=exact, powerful=order[-1]):
            return sum(exact[name] for name in Schedule(tuple(steps)).forwards(powerful))

        assert spent(schedule.steps) <= limit
        lone = [(order[-1 if i == steps // 2 else 0],) * branches for i in range(steps)]
        if spent(lone) > limit:
            assert schedule == weak_first(costs, steps, budget, branches)
            continue
        assert set(schedule.steps) <= {(order[0],) * branches, (order[-1],) * branches}
        count = schedule.steps.count((order[-1],) * branches)
        places = [i for i, step in enumerate(schedule.steps) if step[0] == order[-1]]
        if len(order) > 1 and count < steps:
            gaps = {b - a for a, b in zip(places, places[1:], strict=False)}
            assert not gaps or max(gaps) - min(gaps) <= 1
            one_more = {int((k + 0.5) * steps / (count + 1) + 1e-9) for k in range(count + 1)}
            assert spent((order[-1 if i in one_more else 0],) * branches for i in range(steps)) > limit


# ---- explicit schedules


def test_explicit_schedule():
    text = "2x4x4:30, 1x4x4:5,1x2x2:5"
    assert str(explicit_schedule(text, 40, 2, WAN)) == "30 x 2x4x4, 5 x 1x4x4, 5 x 1x2x2"
    assert explicit_schedule(text, 40, 1, WAN).steps[0] == ("2x4x4",)
    assert explicit_schedule("2x4x4:1,1x2x2/2x4x4:1", 2, 2, WAN).to_json() == [["2x4x4", "2x4x4"], ["1x2x2", "2x4x4"]]


@pytest.mark.parametrize(
    ("text", "branches", "says"),
    [
        ("2x4x4:30,1x2x2:5", 2, "adds up to 35 steps, but there are 40"),
        ("1x2x2:41", 2, "adds up to 41 steps, but there are 40"),
        ("2x4x4", 2, "'2x4x4' in the schedule is not patch size:number of steps"),
        ("2x4x4:", 2, "'2x4x4:' in the schedule is not"),
        ("2x4x4:40,", 2, "'' in the schedule is not"),
        ("", 2, "'' in the schedule is not"),
        ("2x4x4:0,1x2x2:40", 2, "'2x4x4:0' in the schedule is not"),
        ("2x4x4:-5,1x2x2:45", 2, "'2x4x4:-5' in the schedule is not"),
        ("2x4x4:half", 2, "'2x4x4:half' in the schedule is not"),
        ("4x4:40", 2, "'4x4' is not a patch size: it has 2 numbers"),
        ("1x8x8:40", 2, "1x8x8 in the schedule is not a patch size of this model: 1x2x2, 1x4x4, 2x4x4"),
        ("1x2x2/2x4x4:40", 1, "names 2 patch sizes, but this run has no guidance"),
        ("1x2x2/2x4x4/2x4x4:40", 2, "names 3 patch sizes, but this run has two branches"),
        ("1x2x2/:40", 2, "'' is not a patch size"),
    ],
)
def test_bad_explicit_schedule(text, branches, says):
    with pytest.raises(ValueError) as error:
        explicit_schedule(text, 40, branches, WAN)
    assert says in str(error.value)
