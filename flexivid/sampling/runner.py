"""The runner of a pipeline: answers every forward of its transformers by the run of the present call."""

import weakref
from collections.abc import Mapping
from dataclasses import replace

from diffusers import DiffusionPipeline

from flexivid.diffusion import Diffusion
from flexivid.model.call import Call
from flexivid.model.flexible import FlexTransformer
from flexivid.model.surroundings import check_caches, check_call, drop_cached
from flexivid.patches.sizes import parse_patch_size
from flexivid.sampling.budget import BudgetError, schedule_for_budget
from flexivid.sampling.clock import Clock, Position
from flexivid.sampling.flops import FlopCounter
from flexivid.sampling.observe import Forward, Observer
from flexivid.sampling.run import Run, Summary
from flexivid.sampling.schedule import KEPT, Schedule, explicit_schedule, is_reused


class PipelineRunner:
    """Runs the transformers of one pipeline by a budget or an explicit schedule, resolved anew for every call.

    run: the present or the last call. observer: sees what runs.
    """

    def __init__(self, pipe, flexes: dict[str, FlexTransformer], budget, schedule, guidance=None, order=None):
        # Not held alive: a transformer may outlive the pipeline that it was enabled through, in another one.
        self._pipe, self.flexes = weakref.ref(pipe), flexes
        self.budget, self.schedule, self.guidance, self.order = budget, schedule, guidance, order
        # Where there are two transformers they share their shape, so one of them is counted.
        self.counter = FlopCounter(next(iter(flexes.values())))
        self.powerful, self.family = self.counter.twin.powerful, self.counter.twin.family
        self.clock = Clock(self.family)
        self._run: Run | None = None
        self.observer: Observer | None = None
        # One transformer's corrections serve the other, so that one runner serves both: both predict the x0 of a clip.
        for flex in flexes.values():
            flex.runner = self

    @property
    def pipe(self) -> DiffusionPipeline | None:
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

    def branches(self, guided: bool) -> int:
        """Calls of the transformer in a step, with or without guidance."""
        return 2 if guided and self.family.guidance == "separate" else 1

    def plan(self, arguments: dict, steps: int, branches: int) -> Schedule:
        """The schedule of a call whose forwards are shaped as these. Raises ValueError if it cannot be met."""
        costs = self.costs(arguments)
        if self.schedule is None:
            return self._bought(costs, steps, branches, self.budget)
        if isinstance(self.schedule, Schedule):
            text = self.schedule.to_text()
        else:
            text = self.schedule if ":" in self.schedule else f"{self.schedule}:{steps}"
        schedule = explicit_schedule(text, steps, branches, list(costs))
        check_guidance(schedule, self.powerful)
        return schedule

    def _begun(self, arguments: dict, schedule: Schedule, diffusion: Diffusion) -> Run:
        return Run(schedule, diffusion)

    def _bought(self, costs: Mapping[str, int], steps: int, branches: int, budget: float) -> Schedule:
        # On one or two latent frames a temporal patch saves no token, and costs more than the powerful one.
        useful = {name: cost for name, cost in costs.items() if name == self.powerful or cost < costs[self.powerful]}
        usual = "kept" if branches == 2 and self.order in (None, "interleaved") else "same"
        return schedule_for_budget(useful, steps, budget, branches, self.guidance or usual, self.order)

    def _keep_planned(self, call: Call, at: Position, costs: Mapping[str, int]) -> Run:
        """The run of this call: begun with its first forward, planned anew where guidance has ended or begun."""
        branches, batch = self._branches(), len(call.arguments["hidden_states"])
        if at.begins_a_call:
            if self._run is not None:
                self._run.drop()
            self._run = None
            transformers = [each.transformer for each in self.flexes.values()]
            for transformer in transformers:
                check_caches(transformer)
            drop_cached(transformers, call.context)
            schedule = self.plan(call.arguments, at.steps, branches)
            # The scheduler may have been replaced or changed since the last call.
            table = getattr(self.pipe.scheduler, "alphas_cumprod", None)
            diffusion = replace(self.counter.twin.diffusion, alphas_cumprod=table)
            self._run = self._begun(call.arguments, schedule, diffusion)
        elif self._run is None or (self.family.guidance == "separate" and at.branch >= branches):
            raise ValueError("the transformer was called by something else than the pipeline that was enabled")
        elif at.branch == 0 and self._run.outdated(at.step, branches, batch, self.budget is not None):
            if self.budget is None:
                steps = self._run.summary.schedule.steps
                self._run.replan(Schedule(tuple(step[:1] * branches for step in steps)), first=0)
            else:
                self._run.replan(self._rest(at, branches, batch), first=at.step)
        return self._run

    def _rest(self, at: Position, branches: int, batch: int) -> Schedule:
        """What is left of the steps, with another number of branches or other costs, at what is left of the budget."""
        left, run, summary = at.steps - at.step, self._run, self._run.summary
        calls = max(branches, run.calls) if branches == run.branches else branches
        of_branches = [run.costs.get(branch, run.costs[0]) for branch in range(calls)]
        mean = {name: sum(costs[name] for costs in of_branches) / calls for name in of_branches[0]}
        # Where guidance is kept, a weak step runs its first branch only.
        least = {name: 0 if name == self.powerful else cost for name, cost in of_branches[0].items()}
        costs = {name: max(cost, least[name]) for name, cost in mean.items()}
        full = left * calls * costs[self.powerful] * batch
        budget = (self.budget * (summary.flops_full + full) - summary.flops_used) / full
        try:
            return self._bought(costs, left, branches, min(budget, 1.0))
        except BudgetError:
            return Schedule(((min(costs, key=costs.get),) * branches,) * left)

    def _branches(self) -> int:
        """Guidance branches that a schedule tells apart: calls of the transformer in a step."""
        if self.family.guidance != "separate":
            return 1
        guider = getattr(self.pipe, "guider", None)
        if guider is None:
            return 2 if self.pipe.do_classifier_free_guidance else 1
        if not set(guider._input_predictions) <= {"pred_cond", "pred_uncond"}:
            raise ValueError(
                f"{type(guider).__name__} calls the transformer for {', '.join(guider._input_predictions)}; flexivid "
                f"knows guiders of a conditional and an unconditional prediction, such as ClassifierFreeGuidance"
            )
        if (guider._start, guider._stop) != (0.0, 1.0):
            raise ValueError(
                f"guidance from {guider._start:g} to {guider._stop:g} of the steps changes their number of forwards, "
                f"which cannot be planned yet: give {type(guider).__name__} no start and stop"
            )
        return guider.num_conditions

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


def check_guidance(schedule: Schedule, powerful: str) -> None:
    """Raises ValueError for guidance that is kept before there is any, or finer than what it guides."""
    after_powerful = False
    for index, step in enumerate(schedule.steps):
        after_powerful |= step == (powerful,) * 2
        if is_reused(step):
            continue
        if step[-1] == KEPT:
            if not after_powerful:
                raise ValueError(f"step {index} keeps the guidance of a powerful step before it, and there is none")
            continue
        conditional, unconditional = parse_patch_size(step[0]), parse_patch_size(step[-1])
        if any(coarse > fine for coarse, fine in zip(conditional, unconditional, strict=True)):
            raise ValueError(
                f"{'/'.join(step)} runs the unconditional branch at a finer patch size than the conditional one, "
                f"which costs two fine forwards and draws a coarse clip; swap the two"
            )
