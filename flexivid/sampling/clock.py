"""Which step of which call of a pipeline a forward of its transformer belongs to."""

from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline

from flexivid.model.call import Call
from flexivid.model.family import Family

# What pipelines call the contexts of the guidance branches: the second names are those of diffusers' guiders.
CONDITIONAL = ("cond", "pred_cond", "cond_uncond")
UNCONDITIONAL = ("uncond", "pred_uncond")


@dataclass(frozen=True)
class Position:
    """step: of `steps` that this call has. branch: which of the forwards of a step, 0 the conditional one. sigma: of
    flow matching."""

    step: int
    branch: int
    steps: int
    sigma: float | None

    @property
    def begins_a_call(self) -> bool:
        return (self.step, self.branch) == (0, 0)


class Clock:
    """Reads the position of every forward off the pipeline's scheduler, or off the context that the pipeline gives."""

    def __init__(self, family: Family):
        self.family = family
        self._timesteps = None
        self._begin = 0
        self._last: Position | None = None

    def read(self, pipe: DiffusionPipeline, call: Call) -> Position:
        scheduler, context = pipe.scheduler, call.context
        if scheduler.timesteps is not self._timesteps:  # set_timesteps makes a new tensor for every call
            self._timesteps, self._last = scheduler.timesteps, None
            # Video-to-video starts midway, and most schedulers are not told.
            begin = getattr(scheduler, "begin_index", None)
            self._begin = self._index_of_timestep(pipe, call) if begin is None else begin
        step, steps = self._step(pipe, call)
        # The conditional branch is called first, and the step lasts until the scheduler has moved on.
        branch = self._last.branch + 1 if self._last is not None and self._last.step == step else 0
        if context is not None and context.name in CONDITIONAL:
            branch = 0
        elif context is not None and context.name in UNCONDITIONAL:
            branch = max(branch, 1)
        self._last = Position(step, branch, steps, self._sigma(pipe, call, step))
        return self._last

    def _step(self, pipe: DiffusionPipeline, call: Call) -> tuple[int, int]:
        """The step, and how many this call has."""
        scheduler, context = pipe.scheduler, call.context
        if context is not None and context.step_index is not None:
            return context.step_index, context.num_inference_steps
        steps = self.family.steps(pipe) - self._begin
        if not hasattr(scheduler, "step_index"):
            return self._index_of_timestep(pipe, call) - self._begin, steps
        return 0 if scheduler.step_index is None else scheduler.step_index - self._begin, steps

    def forget(self) -> None:
        """After a call that has failed: the next forward is the first of another one."""
        self._timesteps = None

    def _index_of_timestep(self, pipe: DiffusionPipeline, call: Call) -> int:
        timestep, timesteps = torch.as_tensor(call.arguments["timestep"]), pipe.scheduler.timesteps
        in_other_units = self.family.time_scale == 1
        if (timestep.ndim > 1 or in_other_units) and getattr(pipe, "current_timestep", None) is not None:
            # No token may be at the timestep of the step: a video can condition the whole clip.
            timestep = torch.as_tensor(pipe.current_timestep)
        # Of the noisiest token, where clean ones have a timestep of their own.
        noisiest = torch.Tensor.min if self.family.prediction == "reversed_flow" else torch.Tensor.max
        return int((timesteps - noisiest(timestep).to(timesteps)).abs().argmin())

    def _sigma(self, pipe: DiffusionPipeline, call: Call, step: int) -> float | None:
        if call.context is not None and call.context.sigma is not None:
            return call.context.sigma
        # Where the network is told sigma itself, nothing was rounded; its scheduler may have that of EDM.
        if self.family.prediction not in ("flow", "reversed_flow") or self.family.time_scale == 1:
            return None
        sigma = self.sigma_at(pipe, step)
        return 1 - sigma if self.family.prediction == "reversed_flow" else sigma

    def sigma_at(self, pipe: DiffusionPipeline, step: int) -> float:
        """That of the scheduler at a step of this call; the one after the last is where it ends."""
        return float(pipe.scheduler.sigmas[step + self._begin])

    def aimed(self, pipe: DiffusionPipeline, call: Call, at: Position, reused: int) -> Call:
        """A flow map goes to where it is computed next, past the steps that hold what it gives: one longer step."""
        name = self.family.destination
        if not reused or (given := call.given.get(name)) is None:
            return call
        there = self.sigma_at(pipe, at.step + reused + 1) * self.family.time_scale
        return replace(call, given=call.given | {name: torch.full_like(given, there)})
