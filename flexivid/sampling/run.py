"""One call of a pipeline: what is planned for it, what its powerful steps leave for the weak ones, what it has cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from flexivid.diffusion import Diffusion, Level
from flexivid.model.call import Call, sample_of
from flexivid.model.flexible import FlexTransformer
from flexivid.sampling.clock import Position
from flexivid.sampling.observe import Observer
from flexivid.sampling.schedule import KEPT, REUSED, Schedule, is_mixed


@dataclass
class Summary:
    """What ran in a call of a pipeline.

    schedule: what was planned. steps: per step, the patch size that each guidance branch ran at. flops_full: of the
    stock call, as far as this one has come; flops_used: of this one. Both count the transformer's forwards only, over
    the whole batch, and all of each: what a cache of diffusers skips is not subtracted.
    """

    schedule: Schedule
    flops_full: int = 0
    flops_used: int = 0
    steps: list[list[str]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Share of the stock FLOPs that was used."""
        return self.flops_used / self.flops_full

    def __str__(self) -> str:
        saved = 1 - self.ratio
        runs = ((step, len(list(run))) for step, run in groupby(self.steps))
        return (
            ", ".join(f"{count} x {'/'.join(dict.fromkeys(step))}" for step, count in runs) + "\n"
            f"{self.flops_used / 1e12:.4g} of {self.flops_full / 1e12:.4g} TFLOP ({self.ratio:.1%}), {saved:.1%} saved"
        )


class Run:
    """Makes the forwards of every step by a schedule, and does what is added between them.

    schedule: what was planned. diffusion: with the table of the scheduler as it is now. What a run keeps of its last
    powerful step, all of it (B, C, T, H, W) and differences of x0:

    corrections: by guidance branch and weak patch size, x0_powerful - x0_weak.
    guidance: x0_cond - x0_uncond.
    held: by guidance branch, the last x0 itself, for steps that reuse it.
    """

    def __init__(self, schedule: Schedule, diffusion: Diffusion):
        self.summary = Summary(schedule)
        self.diffusion = diffusion
        self.calls = len(schedule.steps[0])  # of the transformer in a step, as far as is known
        self.costs: dict[int, Mapping[str, int]] = {}  # FLOPs of one forward by branch and patch size, as they came
        self.corrections: dict[tuple[int, str], torch.Tensor] = {}
        self.guidance: torch.Tensor | None = None
        self.held: dict[int, torch.Tensor] = {}
        self._schedule, self._first, self._replanned = schedule, 0, False
        self._conditional: tuple[Call, torch.Tensor] | None = None  # of this step, where another branch needs it
        self._memo: dict = {}
        self._batch = 0

    def replan(self, schedule: Schedule, first: int) -> None:
        """Another schedule from now on, see `outdated`. first: the step of this run that is the first of it."""
        self._schedule, self._first, self.calls = schedule, first, len(schedule.steps[0])
        self._replanned = True

    def planned(self, step: int) -> tuple[str, ...]:
        """The patch size of each guidance branch. Raises ValueError for a step that there is not."""
        if not 0 <= step - self._first < len(self._schedule.steps):
            raise ValueError("the transformer was called by something else than the pipeline that was enabled")
        return self._schedule.steps[step - self._first]

    def outdated(self, step: int, branches: int, batch: int, by_costs: bool) -> bool:
        """Whether a step is not what was planned for: guidance has ended or begun, or the plan did not know all costs.

        A plan is made when the first branch is called. The other one may have a longer text. batch: clips of this call;
        both branches of one may be in one batch. by_costs: the plan is that of a budget.
        """
        unknown = not self._replanned and step > 0 and any(costs != self.costs[0] for costs in self.costs.values())
        return branches != self.branches or (by_costs and (unknown or batch != self._batch))

    @property
    def branches(self) -> int:
        """Guidance branches that the schedule tells apart."""
        return len(self._schedule.steps[0])

    def forward(
        self,
        flex: FlexTransformer,
        call: Call,
        at: Position,
        costs: Mapping[str, int],
        observer: Observer | None = None,
    ):
        """The output of one forward. costs: FLOPs of one forward of one clip by patch size."""
        planned, index = self.planned(at.step), at.step - self._first
        branch = min(call.branch, len(planned) - 1)
        name = planned[branch]
        compared = self._schedule.compared(index, flex.powerful, branch)
        call.memo = self._memo
        if call.branch == 0:
            self.summary.steps.append([])
            self._conditional = None
        self.summary.steps[-1].append(name)
        self.calls = max(self.calls, call.branch + 1)
        self.costs[call.branch] = costs
        # Guidance of a mixed step needs the weak prediction of both branches.
        own = [] if name in (KEPT, REUSED) else [name] * (2 if is_mixed(planned) and call.branch == 1 else 1)
        self._batch = batch = len(call.arguments["hidden_states"])
        self.summary.flops_used += sum(costs[patch_size] for patch_size in (*compared, *own)) * batch
        self.summary.flops_full += costs[flex.powerful] * batch

        if name == flex.powerful:
            output = flex.stock(call)
            self._learn(flex, call, sample_of(output), at, compared, observer)
        else:
            level = call.level(self.diffusion, at.sigma)
            if name == REUSED:
                prediction = self._reused(call, level)
            elif name == KEPT:
                prediction = self._with_kept_guidance(call, level)
            elif not is_mixed(planned):
                prediction = self._corrected(flex, call, level, name)
            else:
                prediction = self._mixed(flex, call, level, name)
            output = call.output_of(prediction)

        if self._schedule.is_held(index):
            self._hold(call, sample_of(output), at)
        guides = is_mixed(planned) or planned[-1] == KEPT or self._schedule.gives_guidance(index, flex.powerful)
        needed = call.branch == 0 and (guides or observer is not None)
        self._conditional = (call, sample_of(output)) if needed else None
        if at.step == at.steps - 1 and call.branch + 1 >= self.calls:
            self.drop()
        return output

    def drop(self) -> None:
        """Lets go of every tensor; what is left is the summary."""
        self.corrections, self.held, self.guidance, self._conditional, self._memo = {}, {}, None, None, {}

    def _learn(self, flex, call: Call, output: torch.Tensor, at: Position, compared, observer: Observer | None) -> None:
        """What a powerful prediction knows better than the weak ones, and what guidance adds, both in x0."""
        watched = observer.patch_sizes if observer is not None else ()
        weak_sizes = tuple(dict.fromkeys((*compared, *watched)))
        if not weak_sizes and (call.branch == 0 or self._conditional is None):
            return
        level, powerful = call.level(self.diffusion, at.sigma), call.latents_of(output)
        for patch_size in weak_sizes:
            weak = flex.predict(call, patch_size, self.diffusion, level)
            difference = self.diffusion.x0_difference((powerful - weak).float(), level)
            if patch_size in compared:
                self.corrections[call.branch, patch_size] = difference
            if patch_size in watched:
                observer.error(at.step, call.branch, patch_size, -difference)
        if call.branch == 1 and self._conditional is not None:
            conditional = call.latents_of(self._conditional[1])
            self.guidance = self.diffusion.x0_difference((conditional - powerful).float(), level)
            if observer is not None:
                observer.guidance(at.step, self.guidance)

    def _corrected(self, flex: FlexTransformer, call: Call, level: Level, patch_size: str) -> torch.Tensor:
        """x0 = x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)], t_k the last powerful step; before one, x0_weak alone.

        The weak prediction as control variate: it follows what changes from step to step, and the difference, which
        holds the detail that a weak patch size does not draw, changes slowly.
        """
        weak = flex.predict(call, patch_size, self.diffusion, level)
        correction = self.corrections.get((call.branch, patch_size))
        return weak if correction is None else self._shifted(weak, _of_the_last(len(weak), correction), level)

    def _with_kept_guidance(self, call: Call, level: Level) -> torch.Tensor:
        """x0_uncond = x0_cond(t) - [x0_cond(t_k) - x0_uncond(t_k)], t_k the last powerful step: no forward.

        Guidance multiplies the difference of the branches, and with it what a weak patch size gets wrong in both.
        """
        return self._shifted(call.latents_of(self._conditional[1]), -self.guidance, level)

    def _mixed(self, flex: FlexTransformer, call: Call, level: Level, patch_size: str) -> torch.Tensor:
        """The unconditional prediction of a mixed step, whose conditional one is powerful: v_c - (v_c,weak - v_u,weak).

        Guidance then multiplies the difference of two predictions of one patch size, in which what a weak mode gets
        wrong cancels. Against the powerful conditional prediction it would be multiplied by the scale at every step,
        and so would all detail that a weak mode does not draw: the latents blow up. It costs a second weak forward.
        """
        weak_unconditional = flex.predict(call, patch_size, self.diffusion, level)
        if call.branch == 0:
            return weak_unconditional
        conditional_call, powerful = self._conditional
        # Within the unconditional forward, whose context of diffusers' caches is the one to come back to.
        conditional_call = replace(conditional_call, context=call.context)
        weak_conditional = flex.predict(conditional_call, patch_size, self.diffusion, level)
        return call.latents_of(powerful) + weak_unconditional - weak_conditional

    def _hold(self, call: Call, output: torch.Tensor, at: Position) -> None:
        """Keeps the x0 of a prediction, and as it is what a model predicts beside."""
        if self._schedule.steps[at.step - self._first][0] == REUSED:
            return
        prediction, level = call.latents_of(output).float(), call.level(self.diffusion, at.sigma)
        channels = min(prediction.shape[1], call.latents.shape[1])
        x_0 = self.diffusion.x0(call.latents[:, :channels].float(), prediction[:, :channels], level)
        self.held[call.branch] = torch.cat([x_0, prediction[:, channels:]], 1)

    def _reused(self, call: Call, level: Level) -> torch.Tensor:
        """x0 = x0(t_k), t_k the last step that computed one: no forward."""
        if call.branch not in self.held:
            raise ValueError("a step is to reuse the x0 of a guidance branch that began with it")
        held, latents = _of_the_last(len(call.latents), self.held[call.branch]), call.latents
        channels = min(held.shape[1], latents.shape[1])
        prediction = self.diffusion.output(latents[:, :channels].float(), held[:, :channels], level)
        return torch.cat([prediction, held[:, channels:]], 1).to(latents.dtype)

    def _shifted(self, prediction: torch.Tensor, x0_difference: torch.Tensor, level: Level) -> torch.Tensor:
        """The prediction whose x0 is larger by a difference."""
        shift = self.diffusion.output_difference(x0_difference, level)
        return (prediction + shift).to(prediction.dtype)


def _of_the_last(count: int, values: torch.Tensor) -> torch.Tensor:
    """The last clips of a batch: the conditional half, where guidance has ended in a pipeline that batches both."""
    return values[-count:]
