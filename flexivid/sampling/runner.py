"""The runner of a pipeline: answers every forward of its transformers by the run of the present call."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import groupby

from diffusers import DiffusionPipeline, ModularPipeline

from flexivid.diffusion import Diffusion
from flexivid.model.call import Call
from flexivid.model.flexible import FlexTransformer
from flexivid.model.mixed import check_mixing
from flexivid.model.surroundings import check_caches, check_call, drop_cached
from flexivid.patches.sizes import GUIDED, is_mixed_size, parse_mixed_size, parse_mode
from flexivid.sampling.budget import BudgetError, schedule_for_budget
from flexivid.sampling.clock import Clock, Position
from flexivid.sampling.flops import FlopCounter
from flexivid.sampling.forwards import (
    Forwards,
    calls_branches_apart,
    costs_of_branches,
    forwards_of,
    usual_forwards,
)
from flexivid.sampling.mixing import Mixing
from flexivid.sampling.observe import Forward, Observer
from flexivid.sampling.places import is_few
from flexivid.sampling.run import Run
from flexivid.sampling.schedule import KEPT, Schedule, explicit_schedule, is_guided, is_reused
from flexivid.sampling.shares import schedule_of
from flexivid.sampling.summary import Summary

SAME_SCALE = 0.01  # guidance scales that differ by less are one


class PipelineRunner:
    """Runs the transformers of one pipeline by a budget or an explicit schedule, resolved anew for every call.

    run: the present or the last call. observer: sees what runs.
    """

    def __init__(self, pipe, flexes: dict[str, FlexTransformer], budget, schedule, guidance=None, order=None):
        # Not held alive: a transformer may outlive the pipeline that it was enabled through, in another one.
        self._pipe, self.flexes = weakref.ref(pipe), flexes
        self.budget, self.schedule, self.guidance, self.order = budget, schedule, guidance, order
        # Where there are two transformers they share their shape, so one of them is counted.
        self.counter = FlopCounter(flex := next(iter(flexes.values())))
        self.powerful, self.family, self._diffusion = flex.powerful, flex.family, flex.diffusion
        self.clock = Clock(self.family)
        self._run: Run | None = None
        self.observer: Observer | None = None
        # One transformer's corrections serve the other, so that one runner serves both: both predict the x0 of a clip.
        for each in flexes.values():
            each.runner = self

    @property
    def pipe(self) -> DiffusionPipeline | ModularPipeline | None:
        """None once it is gone."""
        return self._pipe()

    @property
    def summary(self) -> Summary | None:
        """Of the present or the last call."""
        return self._run and self._run.summary

    def run(self, flex: FlexTransformer, call: Call):
        """The output of one forward of a transformer. A call that fails leaves nothing behind."""
        check_call(flex.transformer, self.pipe)
        try:
            at = self.clock.read(self.pipe, call)
            call.branch = at.branch
            costs = self.costs(call.arguments)
            run = self._keep_planned(call, at, costs)
            call = self.clock.aimed(self.pipe, call, at, run.reused_after(at.step))
            if self.observer is None:
                return run.forward(flex, call, at, costs)
            return self._observed(flex, call, at, costs)
        except BaseException:
            self.clock.forget()
            if self._run is not None:
                self._run.drop()
            raise

    def costs(self, arguments: dict) -> Mapping[str, int]:
        """FLOPs of one forward of one clip by patch size, with arguments of `forward` shaped as these."""
        return self.counter.costs(arguments)

    def attach(self) -> None:
        """Whatever else than the transformers has to change in the pipeline: in most runs nothing."""

    def detach(self) -> None:
        """Undoes `attach`."""

    def forwards(self, steps: int) -> Forwards:
        """Of the call that runs. Raises ValueError for guidance that is not supported."""
        return forwards_of(self.pipe, self.family, steps)

    def usual_forwards(self, steps: int, guided: bool) -> Forwards:
        """Of a call to come, with or without guidance. Raises ValueError likewise."""
        return usual_forwards(self.pipe, self.family, steps, guided)

    def plan(self, arguments: dict, forwards: Forwards) -> Schedule:
        """The schedule of a call whose forwards are shaped as these. Raises ValueError if it cannot be met."""
        self.family.check(arguments)
        costs, steps = self.costs(arguments), len(forwards.counts)
        if self.schedule is None:
            return schedule_of(partial(self._buy, arguments, forwards), self.budget, steps)
        if isinstance(self.schedule, Schedule):
            text = self.schedule.to_text()
        else:
            text = self.schedule if ":" in self.schedule else f"{self.schedule}:{steps}"
        schedule = explicit_schedule(text, steps, forwards.branches, list(costs))
        check_guidance(schedule, self.powerful, forwards)
        if any(map(is_guided, schedule.steps)) and not calls_branches_apart(self.pipe, self.family):
            raise ValueError(
                f"guided patch sizes need a pipeline that calls its guidance branches apart, as {text} asks"
            )
        for name in schedule.mixed_sizes:
            for flex in self.flexes.values():
                check_mixing(flex, parse_mixed_size(name))
            costs[name]  # what cannot be mixed on these sizes does not come to be counted
        return schedule

    def bought(self, arguments: dict, forwards: Forwards, budget: float) -> Schedule:
        """What a budget buys of such a call. Raises BudgetError for one that cannot be reached."""
        return self._buy(arguments, forwards, budget)[0]

    def _buy(self, arguments: dict, forwards: Forwards, budget: float) -> tuple[Schedule, float]:
        counts, of_step = forwards.counts, partial(forwards.of_step, self.costs(arguments))
        try:
            return self._bought(counts, of_step, budget, self.order is None and is_few(len(counts)))
        except BudgetError:
            if min(counts) == max(counts):
                raise
            # Of steps after guidance has stopped, a part of the budget may not buy a powerful one.
            return self._bought(counts, of_step, budget, ends=False)

    def _begun(self, arguments: dict, schedule: Schedule, diffusion: Diffusion, forwards: Forwards) -> Run:
        apart = calls_branches_apart(self.pipe, self.family)
        batched = not apart and getattr(self.pipe, "do_classifier_free_guidance", False)
        return Run(schedule, self.powerful, diffusion, forwards, Mixing(self._scale or 1.0, batched))

    def _bought(
        self, counts: Sequence[int], of_step: Callable[[int], list], budget: float, ends: bool
    ) -> tuple[Schedule, float]:
        """The schedule of so many forwards in each step, within a budget, and the share of all FLOPs that it costs.

        of_step: FLOPs by patch size of every forward of a step that has so many. Where guidance has a start or a stop,
        what lies before, within and after is planned each by itself, and what is left over goes to the next. ends: the
        last step has to be powerful.
        """
        planned, full, used = [], 0, 0
        for count, run in groupby(counts):
            steps, branches = len(list(run)), min(count, 2)
            costs = costs_of_branches(of_step(count), branches, self.powerful)
            # On one or two latent frames a temporal patch costs more than the powerful one. Guided ones stand for two.
            powerful = costs[self.powerful]
            most = {name: powerful * (2 if name.endswith(GUIDED) else 1) for name in costs}
            useful = {name: cost for name, cost in costs.items() if name == self.powerful or cost < most[name]}
            apart = count == 2 and calls_branches_apart(self.pipe, self.family)
            if not apart or (self._scale is not None and not self._fits(self._scale)):
                useful = {name: cost for name, cost in useful.items() if not name.endswith(GUIDED)}
            reference = steps * branches * powerful
            full += reference
            if any(self.powerful in step for step in planned):  # the last one is compared with what comes now, too
                used += min(useful.values()) * branches
            left = min((Fraction(str(budget)) * Fraction(full) - Fraction(used)) / Fraction(reference), Fraction(1))
            order = self.order or ("interleaved" if self.guidance == "same" else None)
            usual = "kept" if branches == 2 and order == "interleaved" else "same"
            how = (branches, self.guidance or usual, order, ends and len(planned) + steps == len(counts))
            part = schedule_for_budget(useful, steps, left, *how)
            used += part.cost(useful)
            planned += part.steps
        if min(counts) == 1 < max(counts):  # a branch that is not asked for costs nothing, as one that is kept
            planned = [(*step, step[0] if is_reused(step) else KEPT) if len(step) == 1 else step for step in planned]
        return Schedule(tuple(planned)), used / full

    def _keep_planned(self, call: Call, at: Position, costs: Mapping[str, int]) -> Run:
        """The run of this call: begun with its first forward, planned anew where guidance has ended or begun."""
        batch, forwards = len(call.arguments["hidden_states"]), self._run and self._run.forwards
        if at.branch == 0:
            forwards = self.forwards(at.steps)
        if at.begins_a_call:
            if self._run is not None:
                self._run.drop()
            self._run = None
            transformers = [each.transformer for each in self.flexes.values()]
            for transformer in transformers:
                check_caches(transformer)
            drop_cached(transformers, call.context)
            schedule = self.plan(call.arguments, forwards)
            self._check_scale(schedule)
            # The scheduler may have been replaced or changed since the last call.
            table = getattr(self.pipe.scheduler, "alphas_cumprod", None)
            diffusion = replace(self._diffusion, alphas_cumprod=table)
            self._run = self._begun(call.arguments, schedule, diffusion, forwards)
        elif self._run is None or (
            calls_branches_apart(self.pipe, self.family) and at.branch >= forwards.counts[at.step]
        ):
            raise ValueError("the transformer was called by something else than the pipeline that was enabled")
        elif at.branch == 0 and self._run.outdated(at.step, forwards, batch, self.budget):
            if self.budget is None:
                steps = self._run.summary.schedule.steps
                self._run.replan(Schedule(tuple(step[:1] * forwards.branches for step in steps)), 0, forwards)
            else:
                self._run.replan(self._rest(at, forwards, costs, batch), at.step, forwards)
        return self._run

    def _rest(self, at: Position, forwards: Forwards, costs: Mapping[str, int], batch: int) -> Schedule:
        """What is left of the steps, with other forwards or other costs, at what is left of the budget.

        costs: of the forward that comes, of one clip; batch: its clips.
        """
        run, summary, counts = self._run, self._run.summary, forwards.counts[at.step :]
        of_other = {name: cost * batch // forwards.clips for name, cost in costs.items()}

        def of_step(count: int) -> list[Mapping[str, int]]:
            usual = forwards.of_step(of_other, run.calls(count))
            return [usual[0], *(run.flops(index) or each for index, each in enumerate(usual[1:], start=1))]

        full = sum(each[self.powerful] for count in counts for each in of_step(count))
        budget = (self.budget * (summary.flops_full + full) - summary.flops_used) / full
        for ends in (True, False) if self.order is None and is_few(at.steps) else (False,):
            try:
                return self._bought(counts, of_step, min(budget, 1.0), ends)[0]
            except BudgetError:
                continue
        # A guided patch size is for steps with two branches and one scale only.
        cheapest = min((name for name in costs if not name.endswith(GUIDED)), key=costs.get)
        return Schedule(((cheapest,) * min(max(counts), 2),) * len(counts))

    @property
    def _scale(self) -> float | None:
        """The guidance scale of the present call, None before the first one."""
        guider = getattr(self.pipe, "guider", None)
        return getattr(self.pipe if guider is None else guider, "guidance_scale", None)

    def _check_scale(self, schedule: Schedule) -> None:
        """Raises ValueError for guided steps in a call with another scale than they were trained for."""
        if any(map(is_guided, schedule.steps)) and not self._fits(self._scale):
            raise ValueError(
                f"guidance_scale is {self._scale:g}, and the guided patch sizes of this adapter were trained for "
                f"{self._trained_scale:g}: call the pipeline with that, or give a schedule without them"
            )

    @property
    def _trained_scale(self) -> float | None:
        return next(iter(self.flexes.values())).guidance_scale

    def _fits(self, scale: float) -> bool:
        """Whether guided patch sizes, if there are any, give guidance of that scale."""
        return self._trained_scale is None or abs(scale - self._trained_scale) <= SAME_SCALE

    def _observed(self, flex: FlexTransformer, call: Call, at: Position, costs: Mapping[str, int]):
        """A forward by the observer's clock."""
        observer, stock_forward, inside = self.observer, call.stock_forward, 0.0
        clock = observer.clock or (lambda: 0.0)

        def timed(**arguments):
            nonlocal inside
            began = clock()
            output = stock_forward(**arguments)
            inside += clock() - began
            return output

        call.stock_forward = timed
        began = clock()
        output = self._run.forward(flex, call, at, costs, observer)
        patch_size = self.summary.steps[-1][-1]
        observer.forward(Forward(at.step, at.branch, patch_size, clock() - began, inside))
        return output


def check_guidance(schedule: Schedule, powerful: str, forwards: Forwards) -> None:
    """Raises ValueError for guidance that is kept before there is any, or finer than what it guides."""
    after_powerful = False
    for index, (step, count) in enumerate(zip(schedule.steps, forwards.counts, strict=True)):
        if is_reused(step) or count == 1:
            continue
        after_powerful |= step == (powerful,) * 2
        if step[-1] == KEPT:
            if not after_powerful:
                raise ValueError(f"step {index} keeps the guidance of a powerful step before it, and there is none")
            continue
        if is_guided(step) and count != 2:
            raise ValueError(
                f"step {index}: {step[0]} gives two guidance branches, and this pipeline makes {count} calls"
            )
        if is_mixed_size(step[0]):
            continue
        conditional, unconditional = parse_mode(step[0])[0], parse_mode(step[-1])[0]
        if any(coarse > fine for coarse, fine in zip(conditional, unconditional, strict=True)):
            raise ValueError(
                f"{'/'.join(step)} runs the unconditional branch at a finer patch size than the conditional one, "
                f"which costs two fine forwards and draws a coarse clip; swap the two"
            )
