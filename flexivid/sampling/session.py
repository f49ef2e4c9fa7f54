"""A pipeline's session: which step of which call this is, which patch size runs in it, and what it costs."""

import weakref
from dataclasses import dataclass, field
from itertools import groupby

import torch
from diffusers.hooks.hooks import CacheContext

from flexivid.diffusion import FLOWS
from flexivid.model.flexible import Choice, FlexTransformer
from flexivid.model.surroundings import check_call, drop_cached
from flexivid.patches.sizes import parse_patch_size
from flexivid.sampling.budget import schedule_for_budget
from flexivid.sampling.flops import FlopCounter
from flexivid.sampling.schedule import KEPT, Schedule, explicit_schedule, is_mixed

# What pipelines call the context of the unconditional branch: the second name is that of diffusers' guiders.
UNCONDITIONAL = ("uncond", "pred_uncond")


@dataclass
class Summary:
    """What ran in the last call of a pipeline.

    schedule: what was planned. steps: per step, the patch size that each guidance branch ran at. flops_full: of the
    stock call; flops_used: of this one. Both count the transformer's forwards only, over the whole batch, and all of
    each: what a cache of diffusers skips is not subtracted.
    """

    schedule: Schedule
    flops_full: int
    flops_used: int = 0
    steps: list[list[str]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.flops_used / self.flops_full

    def __str__(self) -> str:
        saved = 1 - self.ratio
        runs = ((step, len(list(run))) for step, run in groupby(self.steps))
        return (
            ", ".join(f"{count} x {'/'.join(dict.fromkeys(step))}" for step, count in runs) + "\n"
            f"{self.flops_used / 1e12:.4g} of {self.flops_full / 1e12:.4g} TFLOP ({self.ratio:.1%}), {saved:.1%} saved"
        )


class Session:
    """Runs the transformers of one pipeline by a budget or an explicit schedule, resolved anew for every call."""

    def __init__(self, pipe, flexes: dict[str, FlexTransformer], budget, schedule, guidance=None, order=None):
        # Not held alive: a transformer may outlive the pipeline that it was enabled through, in another one.
        self._pipe, self.flexes = weakref.ref(pipe), flexes
        self.budget, self.schedule, self.guidance, self.order = budget, schedule, guidance, order
        # Where there are two transformers they share their shape, so one of them is counted.
        self.counter = FlopCounter(next(iter(flexes.values())))
        self.summary: Summary | None = None
        self._timesteps = None
        self._begin = 0
        self._position: tuple[int, int] | None = None
        corrections: dict[tuple[int, str], torch.Tensor] = {}
        for flex in flexes.values():
            flex.policy = self.choose
            # One transformer's corrections serve the other: both predict the x0 of the same clip.
            flex.corrections = corrections
            flex.alphas_cumprod = getattr(pipe.scheduler, "alphas_cumprod", None)
        self.family = self.counter.twin.family

    @property
    def pipe(self):
        """None once it is gone."""
        return self._pipe()

    def costs(self, call: dict) -> dict[str, int]:
        """FLOPs of one forward of one clip by patch size."""
        return {patch_size: self.counter.count(patch_size, call) for patch_size in self.counter.twin.patch_sizes}

    def plan(self, call: dict, steps: int, branches: int) -> Schedule:
        """The schedule of a call whose forwards are shaped as `call`. Raises ValueError if it cannot be met."""
        costs = self.costs(call)
        if self.schedule is None:
            # On one or two latent frames a temporal patch saves no token, and costs more than the powerful one.
            powerful = self.counter.twin.powerful
            costs = {name: cost for name, cost in costs.items() if name == powerful or cost < costs[powerful]}
            usual = "kept" if branches == 2 and self.order != "weak-first" else "same"
            return schedule_for_budget(costs, steps, self.budget, branches, self.guidance or usual, self.order)
        if isinstance(self.schedule, Schedule):
            text = self.schedule.to_text()
        else:
            text = self.schedule if ":" in self.schedule else f"{self.schedule}:{steps}"
        schedule = explicit_schedule(text, steps, branches, list(costs))
        powerful, after_powerful = (self.counter.twin.powerful,) * 2, False
        for index, step in enumerate(schedule.steps):
            after_powerful |= step == powerful
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
        return schedule

    def _clock(self, call: dict, context: CacheContext | None, branches: int) -> tuple[int, int, int]:
        """(step, guidance branch, number of steps) of this forward."""
        scheduler = self.pipe.scheduler

        def index_of_timestep() -> int:
            # Of the noisiest token, where clean ones have a timestep of their own.
            noisiest = torch.Tensor.min if self.family.prediction == "reversed_flow" else torch.Tensor.max
            timestep = noisiest(torch.as_tensor(call["timestep"])).to(scheduler.timesteps)
            return int((scheduler.timesteps - timestep).abs().argmin())

        if scheduler.timesteps is not self._timesteps:  # set_timesteps makes a new tensor for every call
            self._timesteps, self._position = scheduler.timesteps, None
            # Video-to-video starts midway, and most schedulers are not told.
            begin = getattr(scheduler, "begin_index", None)
            self._begin = index_of_timestep() if begin is None else begin
        if context is not None and context.step_index is not None:
            step, steps = context.step_index, context.num_inference_steps
        else:
            steps = len(scheduler.timesteps) - self._begin
            if not hasattr(scheduler, "step_index"):
                step = index_of_timestep() - self._begin
            else:
                step = 0 if scheduler.step_index is None else scheduler.step_index - self._begin
        if context is not None:
            return step, int(context.name in UNCONDITIONAL), steps
        # No context: the pipeline calls the conditional branch first, the unconditional one second.
        return step, int(branches == 2 and self._position == (step, 0)), steps

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

    def choose(self, flex: FlexTransformer, call: dict, context: CacheContext | None) -> Choice:
        check_call(flex.transformer, self.pipe)
        branches = self._branches()
        step, branch, steps = self._clock(call, context, branches)
        batch = len(call["hidden_states"])
        costs = self.costs(call)
        if (step, branch) == (0, 0):
            full = costs[flex.powerful] * steps * branches * batch
            self.summary = None
            flex.corrections.clear()
            drop_cached((each.transformer for each in self.flexes.values()), context)
            self.summary = Summary(self.plan(call, steps, branches), full)
        self._position = (step, branch)
        if branch == branches == 1 and self.family.guidance == "embedded" and self.summary is not None:
            # A negative prompt beside the embedded scale: both calls of a step run at one patch size.
            self.summary.flops_full += costs[flex.powerful] * batch
            branches = 2
        if self.summary is None or branch >= branches or step >= len(self.summary.schedule.steps):
            raise ValueError("the transformer was called by something else than the pipeline that was enabled")
        schedule = self.summary.schedule
        planned = schedule.steps[step]
        planned_branch = min(branch, len(planned) - 1)
        name = planned[planned_branch]
        if branch == 0:
            self.summary.steps.append([])
        self.summary.steps[-1].append(name)
        mixed, kept = is_mixed(planned), name == KEPT
        runs = 2 if mixed and branch == 1 else 1  # guidance needs the weak prediction of both branches
        compare = schedule.compared(step, flex.powerful, planned_branch)
        forwards = [*compare, *([] if kept else [name] * runs)]
        self.summary.flops_used += sum(costs[patch_size] for patch_size in forwards) * batch
        sigma = context.sigma if context is not None else None
        if sigma is None and self.family.prediction in FLOWS:
            sigma = float(self.pipe.scheduler.sigmas[step + self._begin])
            sigma = 1 - sigma if self.family.prediction == "reversed_flow" else sigma
        needed = mixed or planned[-1] == KEPT or schedule.gives_guidance(step, flex.powerful)
        return Choice(
            planned[0] if kept else name,
            sigma=sigma,
            branch=branch,
            compare=compare,
            keep=needed and branch == 0,
            mixed=mixed,
            kept=kept,
        )
