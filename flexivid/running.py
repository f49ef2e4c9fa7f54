"""What can be asked of an enabled pipeline: plan, costs, summary, and to look at its runs."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from flexivid.patches.folding import token_grid
from flexivid.sampling.observe import Observer
from flexivid.sampling.runner import PipelineRunner
from flexivid.sampling.schedule import Schedule
from flexivid.sampling.summary import Summary
from flexivid.targets import Pipeline, check_not_shared, runner_of, transformers_of


def plan(
    pipe: Pipeline, frames: int, height: int, width: int, steps: int, text_length: int, guided: bool = True
) -> Schedule:
    """The schedule that a call of these sizes (pixels, denoising steps, padded text tokens) would run.

    Counts on the meta device, so it takes a second and the pipeline may be one without weights. Raises ValueError if
    the pipeline is not enabled, and what the call itself would raise, such as BudgetError, which names the budgets that
    there are over up to 12 steps. Warns as the call would where whole steps make far less of a budget.
    """
    runner = enabled_runner(pipe)
    call = call_of(pipe, runner, frames, height, width, text_length)
    return runner.plan(call, runner.usual_forwards(steps, guided))


def costs(pipe: Pipeline, frames: int, height: int, width: int, text_length: int) -> Mapping[str, int]:
    """FLOPs of one forward of one clip of these sizes by patch size. Raises ValueError if it is not enabled.

    Those of mixed patch sizes are found there too (`costs["1x2x2+1x4x4@0.35"]`), though it does not list them.
    """
    runner = enabled_runner(pipe)
    return runner.costs(call_of(pipe, runner, frames, height, width, text_length))


def next_budget(
    pipe: Pipeline, frames: int, height: int, width: int, steps: int, text_length: int, guided: bool = True
) -> float | None:
    """The least budget, in thousandths, that buys a call of these sizes another schedule than the pipeline's own does.

    Steps are whole, so that most budgets are not spent to the last bit. None where there is no such budget, or none at
    all. Raises ValueError as `plan` does.
    """
    runner = enabled_runner(pipe)
    if runner.budget is None:
        return None
    call, forwards = call_of(pipe, runner, frames, height, width, text_length), runner.usual_forwards(steps, guided)
    own = runner.bought(call, forwards, runner.budget)

    def is_another(thousandths: int) -> bool:
        return runner.bought(call, forwards, thousandths / 1000) != own

    found = bisect_left(range(1001), True, lo=math.ceil(1000 * runner.budget), key=is_another)
    return found / 1000 if found <= 1000 else None


def enabled_runner(pipe: Pipeline) -> PipelineRunner:
    """Raises ValueError if the pipeline is not enabled."""
    check_not_shared(pipe)
    runner = runner_of(next(iter(transformers_of(pipe).values())))
    if runner is None or runner.pipe is not pipe:
        raise ValueError("this pipeline is not enabled: enable the pipeline first")
    return runner


def call_of(pipe: Pipeline, runner: PipelineRunner, frames, height, width, text_length) -> dict:
    """Arguments of a forward, complete and without values."""
    flex, family = next(iter(runner.flexes.values())), runner.family
    latents = family.latent_size(pipe, frames, height, width)
    call = family.example(flex.transformer.config, latents, text_length)
    if pipe.config.get("expand_timesteps"):
        call["timestep"] = torch.empty(1, math.prod(token_grid(latents, flex.base_patch)))
    return family.completed(call)


@contextmanager
def observe(pipe: Pipeline, observer: Observer) -> Iterator[Observer]:
    """Within it `observer` sees every forward of the pipeline. Raises ValueError if the pipeline is not enabled."""
    runner = enabled_runner(pipe)
    before, runner.observer = runner.observer, observer
    try:
        yield observer
    finally:
        runner.observer = before


def summary(pipe: Pipeline) -> Summary:
    """What ran at which step of the last call, FLOPs used and saved. Raises ValueError before there was one."""
    check_not_shared(pipe)
    for transformer in transformers_of(pipe).values():
        runner = runner_of(transformer)
        if runner and runner.pipe is pipe and runner.summary is not None:
            return runner.summary
    raise ValueError("nothing to sum up: enable the pipeline and call it first")
