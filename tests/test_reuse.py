"""Steps that compute nothing: they hold the last x0."""

from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from families import CONDITIONED, DECODING, STEPS, TINY, assert_same_clip, every, tiny_pipeline
from test_calls import sample

import flexivid
from flexivid.sampling.budget import BudgetError, schedule_for_budget
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.places import fewer_steps, reuse_places
from flexivid.sampling.schedule import REUSED, Schedule, explicit_schedule

COSTS = {"1x2x2": 100, "1x4x4": 20}


@pytest.mark.parametrize("steps, count", [(40, 10), (40, 4), (40, 1), (8, 8), (8, 7), (5, 2), (1, 1)])
def test_places_rise_from_the_first_step_and_are_denser_at_first(steps, count):
    places = reuse_places(count, steps)
    assert places == sorted(set(places)) and len(places) == count and places[0] == 0
    # Few of many steps stop before the last of the detail.
    assert count / steps < 0.25 or places[-1] >= steps - 2 - steps / count
    begun = places[3:] if count > 4 else places  # what comes first may have pairs in a row
    gaps = [after - before for before, after in pairwise(begun)]
    assert gaps == sorted(gaps)


def test_the_places_that_are_nearest_to_full_runs_are_met():
    """docs/log.md, "Places, found by searching": what a search over clips found, to within three steps."""
    found = {3: "0 6 19", 4: "0 1 6 23", 5: "0 1 4 13 29", 6: "0 1 4 9 20 33", 8: "0 1 4 5 10 18 28 36"}
    for count, places in (found | {10: "0 1 3 4 6 10 16 25 33 38"}).items():
        near = zip(reuse_places(count, 40), map(int, places.split()), strict=True)
        # Without the second step 3 dB are gone; of many the third and the fourth stand in a row.
        begun = 1 if count == 3 else 3 if count < 7 else 4
        assert reuse_places(count, 40)[:begun] in ([0], [0, 1, 6], [0, 1, 4], [0, 1, 4, 5], [0, 1, 3, 4])
        assert all(abs(ours - theirs) <= 3 for ours, theirs in near)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.25, 0.1, 0.025])
def test_a_budget_buys_as_many_powerful_steps_as_fit(budget, branches):
    schedule = schedule_for_budget(COSTS, 40, budget, branches, order="reuse")
    powerful = schedule.steps.count(("1x2x2",) * branches)
    assert powerful == int(40 * budget) and schedule.steps.count((REUSED,) * branches) == 40 - powerful
    assert schedule.cost(COSTS) == powerful * branches * 100


def test_what_cannot_be_is_refused():
    with pytest.raises(BudgetError, match="the least is 0.025"):
        schedule_for_budget(COSTS, 40, 0.02, 2, order="reuse")
    with pytest.raises(ValueError, match="there are none"):
        schedule_for_budget(COSTS, 40, 0.5, 2, "kept", "reuse")
    with pytest.raises(ValueError, match="nothing to reuse"):
        explicit_schedule("reused:1,1x2x2:1", 2, 2, list(COSTS))
    with pytest.raises(ValueError, match="not a patch size"):
        Schedule((("1x2x2", "1x2x2"), ("1x2x2", REUSED)))
    schedule = explicit_schedule("1x2x2:1,reused:2,1x4x4:1", 4, 2, list(COSTS))
    assert (
        Schedule.from_json(schedule.to_json()) == schedule == explicit_schedule(schedule.to_text(), 4, 2, list(COSTS))
    )
    assert str(schedule) == "1 x 1x2x2, 2 x reused, 1 x 1x4x4"


def test_under_euler_a_reused_step_goes_on_in_a_straight_line():
    """x_t = (1 - sigma) x0 + sigma noise with both held: v stays, so that fewer steps of the same sigmas are it."""
    pipe, call = tiny_pipeline("wan", FlowMatchEulerDiscreteScheduler(shift=3.0))
    flexivid.enable(pipe, schedule="1x2x2:2,reused:3,1x2x2:3")
    reused, sigmas = sample(pipe, call), pipe.scheduler.sigmas
    flexivid.disable(pipe)

    # Stock steps that skip: the model's output is that of the last computed step.
    stock, outputs = pipe.transformer.forward, []

    def held(*args, **kwargs):
        step = len(outputs) // 2
        outputs.append(outputs[-2] if step in (2, 3, 4) else stock(*args, **kwargs)[0])
        return (outputs[-1],)

    pipe.transformer.forward = held
    assert_same_clip(sample(pipe, call), reused)
    assert len(sigmas) == STEPS + 1


@every(name for name in TINY if name not in ("wan-i2v", "dit"))
def test_every_family_reuses_and_spends_what_it_says(name):
    pipe, call = tiny_pipeline(name)
    if "prompt_attention_mask" in call:  # Mochi computes on valid tokens only, and all are counted
        call |= {key: torch.ones_like(value) for key, value in call.items() if key.endswith("_mask")}
    stock = sample(pipe, call)
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, budget=0.5, order="reuse")
    with flop_counter_mode() as used:
        clip = sample(pipe, call)
    summary = flexivid.summary(pipe)
    outside = full.get_total_flops() - summary.flops_full if name in CONDITIONED + DECODING else 0  # of the VAE
    counted = (used.get_total_flops() - outside) / (full.get_total_flops() - outside)
    # MiniMax-H3 embeds one noise level more in steps after the first, where sound and video are at two.
    assert summary.ratio == pytest.approx(0.5, abs=1e-4 if name == "minimax-h3" else 0) and counted == pytest.approx(
        0.5, abs=0.01
    )
    assert [names[0] == REUSED for names in summary.steps].count(True) == STEPS // 2
    assert clip.isfinite().all() and not torch.equal(clip, stock)
    flexivid.enable(pipe, budget=1.0, order="reuse")
    assert torch.equal(sample(pipe, call), stock)


def test_weak_steps_beside_reused_ones():
    pipe, call = tiny_pipeline("wan")
    flexivid.enable(pipe, schedule="1x2x2:2,1x4x4:1,reused:2,1x4x4/kept:1,reused:1,1x2x2:1")
    assert sample(pipe, call).isfinite().all()
    steps = flexivid.summary(pipe).steps
    assert steps[3:7] == [[REUSED, REUSED], [REUSED, REUSED], ["1x4x4", "kept"], [REUSED, REUSED]]


@pytest.mark.parametrize(
    "steps, share, count", [(100, 0.29, 29), (40, 0.15, 6), (40, 0.124, 4), (40, 0.01, 1), (7, 1.0, 7)]
)
def test_fewer_steps_of_a_share(steps, share, count):
    assert fewer_steps(steps, share) == count
