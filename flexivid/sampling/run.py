"""One call of a pipeline: what is planned for it, what its powerful steps leave for the weak ones, what it has cost."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile

import torch

from flexivid.diffusion import Diffusion, Level
from flexivid.model.call import Call, parts_of
from flexivid.model.flexible import FlexTransformer
from flexivid.patches.sizes import is_mixed_size
from flexivid.sampling.clock import Position
from flexivid.sampling.forwards import Forwards
from flexivid.sampling.mixing import Mixing
from flexivid.sampling.observe import Observer
from flexivid.sampling.schedule import KEPT, REUSED, Schedule, is_guided, is_mixed, is_reused
from flexivid.sampling.streams import clean_streams, predicted_streams
from flexivid.sampling.summary import Summary

Tensors = tuple[torch.Tensor, ...]


class Run:
    """Makes the forwards of every step by a schedule, and does what is added between them.

    schedule: what was planned, for so many `forwards`. powerful: the model's own patch size. diffusion: with the table
    of the scheduler as it is now. What a run keeps of its last powerful step, all of it (B, C, T, H, W) and differences
    of x0:

    corrections: by forward of a step and weak patch size, x0_powerful - x0_weak.
    guidance: by forward of a step, x0 of the first - its own, of the video and of what is made beside it.
    held: by forward of a step, the last x0 itself, for steps that reuse it or choose their fine blocks by it, also of
        what is made beside.
    mixing: what mixed patch sizes need.
    """

    def __init__(self, schedule: Schedule, powerful: str, diffusion: Diffusion, forwards: Forwards, mixing: Mixing):
        self.summary = Summary(schedule)
        self.powerful = powerful
        self.diffusion = diffusion
        self.forwards = forwards
        self._calls: dict[int, int] = {}  # forwards that a step made, by how many were planned for it
        self.costs: dict[int, Mapping[str, int]] = {}  # FLOPs of one forward by branch and patch size, as they came
        self.corrections: dict[tuple[int, str], torch.Tensor] = {}
        self.guidance: dict[int, Tensors] = {}
        self.held: dict[int, Tensors] = {}
        self.mixing = mixing
        self._schedule, self._first, self._replanned = schedule, 0, False
        self._conditional: tuple[Call, Tensors] | None = None  # of this step, where another branch needs it
        self._with_guidance: tuple[torch.Tensor, Tensors] | None = None  # of a guided step, for its other branch
        self._memo: dict = {}
        self._clips: dict[int, int] = {}  # by forward of a step

    def replan(self, schedule: Schedule, first: int, forwards: Forwards) -> None:
        """Another schedule from now on, see `outdated`. first: the step of this run that is the first of it."""
        self._schedule, self._first, self.forwards = schedule, first, forwards
        self._replanned = True

    def calls(self, planned: int) -> int:
        """Forwards that a step makes, as far as is known, for which so many were planned."""
        return self._calls.get(planned, planned)

    def flops(self, branch: int) -> dict[str, int] | None:
        """Of the last such forward of a step, over its batch, by patch size; None before there was one."""
        if branch not in self.costs:
            return None
        return {name: cost * self._clips[branch] for name, cost in self.costs[branch].items()}

    def planned(self, step: int) -> tuple[str, ...]:
        """The patch size of each guidance branch. Raises ValueError for a step that there is not."""
        if not 0 <= step - self._first < len(self._schedule.steps):
            raise ValueError("the transformer was called by something else than the pipeline that was enabled")
        return self._schedule.steps[step - self._first]

    def reused_after(self, step: int) -> int:
        """How many steps follow that only hold what this one gives."""
        return len(list(takewhile(is_reused, self._schedule.steps[step - self._first + 1 :])))

    def outdated(self, step: int, forwards: Forwards, batch: int, budget: float | None) -> bool:
        """Whether a step is not what was planned for: guidance has ended or begun, or the plan did not know all costs.

        A plan is made when the first branch is called. The other one may have a longer text. batch: clips of this call;
        both branches of one may be in one batch. budget: that of the plan.
        """
        changed = forwards.counts[step:] != self.forwards.counts[step:]
        return changed or (budget is not None and (batch != self._clips[0] or self._exceeds(budget, step)))

    def _exceeds(self, budget: float, step: int) -> bool:
        """Whether forwards that cost other than the first of a step make what was planned more than was allowed."""
        if self._replanned or step == 0 or all(costs == self.costs[0] for costs in self.costs.values()):
            return False
        used, full = self.summary.flops_used, self.summary.flops_full
        for later, count in enumerate(self.forwards.counts[step:], start=step - self._first):
            for forward in range(self.calls(count)):
                flops = self.flops(forward) or self.flops(0)
                full += flops[self.powerful]
                used += sum(flops[name] for name in self._computed(later, forward, self._compared(later, forward)))
        return used > budget * full

    def _compared(self, index: int, forward: int) -> tuple[str, ...]:
        """The patch sizes that one forward of a step of the schedule is compared with."""
        return self._schedule.compared(index, self.powerful, min(forward, len(self._schedule.steps[index]) - 1))

    def _computed(self, index: int, forward: int, compared: tuple[str, ...]) -> tuple[str, ...]:
        """The patch sizes that one forward of a step of the schedule runs, those that it is compared with included."""
        planned = self._schedule.steps[index]
        name = planned[min(forward, len(planned) - 1)]
        if is_guided(planned) and forward:
            return ()
        # Guidance of a mixed step needs the weak prediction of both branches.
        times = 0 if name in (KEPT, REUSED) else 2 if is_mixed(planned) and forward else 1
        return (*compared, *[name] * times)

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
        compared = self._compared(index, call.branch)
        call.memo = self._memo
        if call.branch == 0:
            self.summary.steps.append([])
            self._conditional = None
        self.summary.steps[-1].append(name)
        asked = self.forwards.counts[at.step]
        self._calls[asked] = max(self.calls(asked), call.branch + 1)
        self.costs[call.branch] = costs
        self._clips[call.branch] = batch = len(call.arguments["hidden_states"])
        computed = self._computed(index, call.branch, compared)
        self.summary.flops_used += sum(costs[self.mixing.counted(flex, call.branch, each)] for each in computed) * batch
        self.summary.flops_full += costs[flex.powerful] * batch

        if name == flex.powerful:
            leaves = self._schedule.leaves_residual(index, flex.powerful, branch)
            output = self.mixing.stock(flex, call) if leaves else flex.stock(call)
            self._learn(flex, call, parts_of(output), at, compared, observer)
        else:
            level = call.level(self.diffusion, at.sigma)
            if name == REUSED:
                prediction = self._reused(call, level, at)
            elif name == KEPT:
                prediction = self._with_kept_guidance(call, level, at)
            elif is_guided(planned):
                prediction = self._guided(flex, call, level, name)
            elif is_mixed_size(name):
                prediction = self.mixing.predict(flex, call, level, self.diffusion, name, self.held)
                if observer is not None and call.branch == 0:
                    observer.fine_blocks(at.step, self.mixing.selection)
            elif not is_mixed(planned):
                prediction = self._corrected(flex, call, level, name)
            else:
                prediction = self._mixed(flex, call, level, name)
            output = call.output_of(prediction)

        if self._schedule.is_held(index):
            self._hold(call, parts_of(output), at)
        guides = is_mixed(planned) or planned[-1] == KEPT or self._schedule.gives_guidance(index, flex.powerful)
        needed = call.branch == 0 and (guides or observer is not None)
        if needed:
            self._conditional = (call, parts_of(output))
        elif call.branch + 1 >= self.calls(asked):
            self._conditional = None
        if at.step == at.steps - 1 and call.branch + 1 >= self.calls(asked):
            self.drop()
        return output

    def drop(self) -> None:
        """Lets go of every tensor; what is left is the summary."""
        self.corrections, self.held, self.guidance, self._memo = {}, {}, {}, {}
        self._conditional, self._with_guidance = None, None
        self.mixing.drop()

    def _learn(self, flex, call: Call, output: Tensors, at: Position, compared, observer: Observer | None) -> None:
        """What a powerful prediction knows better than the weak ones, and what guidance adds, both in x0."""
        watched = observer.patch_sizes if observer is not None else ()
        weak_sizes = tuple(dict.fromkeys((*compared, *watched)))
        if not weak_sizes and observer is None and (call.branch == 0 or self._conditional is None):
            return
        level, powerful = call.level(self.diffusion, at.sigma), call.latents_of(output[0])
        if observer is not None:
            observer.x0(at.step, call.branch, self._x0_of(call, powerful, level))
        for patch_size in weak_sizes:
            weak = flex.predict(call, patch_size, self.diffusion, level)
            difference = self.diffusion.x0_difference((powerful - weak).float(), level)
            if patch_size in compared:
                self.corrections[call.branch, patch_size] = difference
            if patch_size in watched:
                observer.error(at.step, call.branch, patch_size, -difference)
        if call.branch and self._conditional is not None:
            conditional, *beside = self._conditional_output(call)
            difference = self.diffusion.x0_difference((call.latents_of(conditional) - powerful).float(), level)
            sounds = (clean_streams(call, each, self.diffusion, at.sigma) for each in (beside, output[1:]))
            self.guidance[call.branch] = (difference, *(first - own for first, own in zip(*sounds, strict=True)))
            if observer is not None and call.branch == 1:
                observer.guidance(at.step, difference)

    def _corrected(self, flex: FlexTransformer, call: Call, level: Level, patch_size: str) -> torch.Tensor:
        """x0 = x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)], t_k the last powerful step; before one, x0_weak alone.

        The weak prediction as control variate: it follows what changes from step to step, and the difference, which
        holds the detail that a weak patch size does not draw, changes slowly.
        """
        weak = flex.predict(call, patch_size, self.diffusion, level)
        correction = self.corrections.get((call.branch, patch_size))
        return weak if correction is None else self._shifted(weak, _of_the_last(len(weak), correction), level)

    def _guided(self, flex: FlexTransformer, call: Call, level: Level, patch_size: str) -> torch.Tensor:
        """x0 with guidance, of one forward with the conditions of the conditional branch, in both branches.

        u + w (c - u) is then what was predicted, at any scale w (guidance distillation, Meng et al., arXiv 2210.03142).
        """
        if call.branch == 0:
            self._with_guidance = flex.predict(call, patch_size, self.diffusion, level), call.beside
        prediction, call.beside = self._with_guidance
        return prediction

    def _conditional_output(self, call: Call) -> Tensors:
        """Of the first forward of this step, the clips of another one: where it holds both branches of guidance, the
        conditional half."""
        return tuple(_of_the_last(len(call.latents), part) for part in self._conditional[1])

    def _with_kept_guidance(self, call: Call, level: Level, at: Position) -> torch.Tensor:
        """x0_uncond = x0_cond(t) - [x0_cond(t_k) - x0_uncond(t_k)], t_k the last powerful step: no forward.

        Guidance multiplies the difference of the branches, and with it what a weak patch size gets wrong in both.
        """
        (conditional, *beside), (difference, *differences) = self._conditional_output(call), self.guidance[call.branch]
        first = clean_streams(call, beside, self.diffusion, at.sigma)
        own = [x_0 - change for x_0, change in zip(first, differences, strict=True)]
        call.beside = predicted_streams(call, own, self.diffusion, at.sigma)
        return self._shifted(call.latents_of(conditional), -difference, level)

    def _mixed(self, flex: FlexTransformer, call: Call, level: Level, patch_size: str) -> torch.Tensor:
        """The unconditional prediction of a mixed step, whose conditional one is powerful: v_c - (v_c,weak - v_u,weak).

        Guidance then multiplies the difference of two predictions of one patch size, in which what a weak mode gets
        wrong cancels. Against the powerful conditional prediction it would be multiplied by the scale at every step,
        and so would all detail that a weak mode does not draw: the latents blow up. It costs a second weak forward.
        """
        weak_unconditional = flex.predict(call, patch_size, self.diffusion, level)
        if call.branch == 0:
            return weak_unconditional
        conditional_call, powerful, beside = self._conditional[0], self._conditional[1], call.beside
        # Within the unconditional forward, whose context of diffusers' caches is the one to come back to.
        conditional_call = replace(conditional_call, context=call.context)
        weak_conditional = flex.predict(conditional_call, patch_size, self.diffusion, level)
        triples = zip(powerful[1:], beside, conditional_call.beside, strict=True)
        call.beside = tuple(first + own - weak_first for first, own, weak_first in triples)
        return call.latents_of(powerful[0]) + weak_unconditional - weak_conditional

    def _hold(self, call: Call, output: Tensors, at: Position) -> None:
        """Keeps the x0 of a prediction, and as it is what a model predicts beside."""
        if self._schedule.steps[at.step - self._first][0] == REUSED:
            return
        prediction, level = call.latents_of(output[0]).float(), call.level(self.diffusion, at.sigma)
        x_0 = self._x0_of(call, prediction, level)
        beside = clean_streams(call, output[1:], self.diffusion, at.sigma)
        self.held[call.branch] = (torch.cat([x_0, prediction[:, x_0.shape[1] :]], 1), *beside)

    def _x0_of(self, call: Call, prediction: torch.Tensor, level: Level) -> torch.Tensor:
        channels = min(prediction.shape[1], call.latents.shape[1])
        return self.diffusion.x0(call.latents[:, :channels].float(), prediction[:, :channels].float(), level)

    def _reused(self, call: Call, level: Level, at: Position) -> torch.Tensor:
        """x0 = x0(t_k), t_k the last step that computed one: no forward."""
        if call.branch not in self.held:
            raise ValueError("a step is to reuse the x0 of a guidance branch that began with it")
        latents = call.latents
        held, *beside = (_of_the_last(len(latents), part) for part in self.held[call.branch])
        call.beside = predicted_streams(call, beside, self.diffusion, at.sigma)
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
