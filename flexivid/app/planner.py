"""What a budget buys, by the pipeline's configs alone: at once, and beside a clip that is sampled."""

import argparse
from dataclasses import dataclass
from threading import Lock

from diffusers import DiffusionPipeline

import flexivid
from flexivid.commands.sample_options import sizes_of
from flexivid.patches.sizes import GUIDED
from flexivid.running import call_of, enabled_runner
from flexivid.sampling.few_steps import FewStepRunner
from flexivid.sampling.places import fewer_steps
from flexivid.sampling.schedule import Schedule
from flexivid.stock_pipelines import set_guidance_scale

MOST_STEPS = 200  # that a strip can show


@dataclass(frozen=True)
class Plan:
    """schedule: of one clip. patch_sizes: all that the model has here, the finest first. flops_full, flops_used: of the
    stock call, and of this one. full_steps: of the stock call."""

    schedule: Schedule
    patch_sizes: tuple[str, ...]
    flops_full: int
    flops_used: int
    full_steps: int

    @property
    def steps(self) -> int:
        """Of the schedule."""
        return len(self.schedule.steps)

    @property
    def share(self) -> float:
        return self.flops_used / self.flops_full

    @property
    def fewer_steps(self) -> int:
        """Plain steps that cost no more, or one where all cost more."""
        return fewer_steps(self.full_steps, self.share)


class Planner:
    """pipe: without weights, enabled with a budget, or the recipe of a few-step adapter, for these arguments."""

    def __init__(self, pipe: DiffusionPipeline, arguments: argparse.Namespace):
        self._pipe, self._arguments = pipe, arguments
        self._runner = enabled_runner(pipe)
        self._lock = Lock()  # the runner is one, those who move their dials are many
        # As in a call: guided patch sizes are bought for the scale that they were trained for only.
        set_guidance_scale(pipe, arguments.guidance_scale)
        pipe._guidance_scale = arguments.guidance_scale

    def plan(self, budget: float | None, steps: int) -> Plan:
        """budget: None for a recipe. Raises BudgetError for a budget that cannot be reached, ValueError for more steps
        than a page shows, or others than those of the recipe."""
        if steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS} on this page, not {steps}")
        call = sizes_of(self._arguments) | {"steps": steps}
        sizes = {name: call[name] for name in ("frames", "height", "width", "text_length")}
        with self._lock:
            self._runner.budget = budget  # enabling anew would read the adapter again
            schedule = flexivid.plan(self._pipe, **call)
            costs, own = flexivid.costs(self._pipe, **sizes), self._costs_of_run(sizes)
        powerful = self._runner.powerful
        # A temporal patch may cost more on few frames: it is never bought.
        others = {name: cost for name, cost in costs.items() if cost < costs[powerful] or name.endswith(GUIDED)}
        stock = costs[powerful] * self._clips(steps, call["guided"])  # of as many steps
        branches = steps * len(schedule.steps[0])
        used = stock * schedule.cost({powerful: costs[powerful]} | others | own) // (branches * costs[powerful])
        patch_sizes = (powerful, *sorted(others, key=others.get, reverse=True))
        full_steps = self._arguments.full.get("steps", steps)
        return Plan(schedule, patch_sizes, round(stock / self._arguments.share), used, full_steps)

    def _costs_of_run(self, sizes: dict) -> dict[str, int]:
        """Of one forward, where it costs other than by a budget."""
        runner = self._runner
        if not isinstance(runner, FewStepRunner):
            return {}
        return runner.own_costs(call_of(self._pipe, runner, **sizes))

    def _clips(self, steps: int, guided: bool) -> int:
        """Clips that go through the transformer in a stock call of these."""
        family, forwards = self._runner.family, self._runner.usual_forwards(steps, guided)
        if family.guidance == "batched" and not family.more_forwards:
            return steps * (2 if guided else 1)
        return sum(count - 1 + forwards.clips for count in forwards.counts)
