"""Rivals that choose the noise levels and the sizes of their steps, on stock pipelines and schedulers."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.functional import avg_pool3d, interpolate

from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.sampling.places import fewer_steps, reuse_places
from flexivid.sweep.probe import Probe
from flexivid.sweep.sampling import Run, stock_run

SHIFTS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # of a schedule, relative to the pipeline's own


@contextmanager
def at_places(pipe: DiffusionPipeline, places: Sequence[int]) -> Iterator[list[float]]:
    """Inside, the scheduler takes only those of its steps that are at `places`, and from the last one goes to the end.

    Yields a list that holds the sigmas of all its steps, once they are set.
    """
    scheduler, sigmas = pipe.scheduler, []
    stock = scheduler.set_timesteps

    @wraps(stock)  # pipelines look at what it takes
    def set_timesteps(*args, **kwargs):
        stock(*args, **kwargs)
        sigmas[:] = scheduler.sigmas.tolist()
        picked = list(places)
        scheduler.sigmas = torch.cat([scheduler.sigmas[picked], scheduler.sigmas[-1:]])
        scheduler.timesteps = scheduler.timesteps[picked]
        scheduler.num_inference_steps = len(picked)

    scheduler.set_timesteps = set_timesteps
    try:
        yield sigmas
    finally:
        del scheduler.set_timesteps


def places_refusal(pipe: DiffusionPipeline, call: dict) -> str | None:
    if not hasattr(pipe.scheduler, "sigmas"):
        return f"{type(pipe.scheduler).__name__} has no table of sigmas to pick steps from"
    return None


@contextmanager
def only_at(pipe: DiffusionPipeline, settings: dict) -> Iterator[Run]:
    with at_places(pipe, settings["places"]):
        yield stock_run


def our_places(probe: Probe, budget: float) -> list[list[dict]]:
    """As many plain steps as fit, at the noise levels at which flexivid's order `reuse` computes."""
    return [[{"steps": probe.steps, "places": reuse_places(fewer_steps(probe.steps, budget), probe.steps)}]]


def _shift_of(scheduler) -> str | None:
    """The name in its config of the shift of sigma, s sigma / (1 + (s - 1) sigma); None without. Esser et al. 2024,
    eq. 23."""
    names = ("flow_shift", "shift") if scheduler.config.get("use_flow_sigmas", True) else ()
    fixed = not scheduler.config.get("use_dynamic_shifting")
    return next((name for name in names if fixed and name in scheduler.config), None)


def shift_refusal(pipe: DiffusionPipeline, call: dict) -> str | None:
    if _shift_of(pipe.scheduler) is None:
        return f"{type(pipe.scheduler).__name__} as it is set has no fixed shift of its sigmas that could be tuned"
    return None


@contextmanager
def shifted(pipe: DiffusionPipeline, settings: dict) -> Iterator[Run]:
    stock = pipe.scheduler
    name = _shift_of(stock)
    pipe.scheduler = type(stock).from_config(stock.config, **{name: settings["shift"] * stock.config[name]})
    try:
        yield stock_run
    finally:
        pipe.scheduler = stock


def shifts(probe: Probe, budget: float) -> list[list[dict]]:
    """As many plain steps as fit, at levels whose shift is searched for."""
    return [[{"steps": fewer_steps(probe.steps, budget), "shift": shift}] for shift in SHIFTS]


def low_resolution_refusal(pipe: DiffusionPipeline, call: dict) -> str | None:
    family, name = family_of(pipe.transformer), type(pipe).__name__
    if family.prediction != "flow":
        return f"low resolution first is for flow matching, and the transformer of {name} predicts {family.prediction}"
    # LTX-Video takes and gives its latents as tokens.
    if "latents" not in inspect.signature(pipe.__call__).parameters or hasattr(pipe, "_pack_latents"):
        return f"low resolution first needs a pipeline that takes and gives latents as frames, and {name} does not"
    unit = 2 * family.compression(pipe)[1] * patch_size_of(pipe.transformer.config)[1]
    if call["height"] % unit or call["width"] % unit:
        return f"low resolution first needs a height and a width that are multiples of {unit}"
    return places_refusal(pipe, call)


@contextmanager
def low_resolution_first(pipe: DiffusionPipeline, settings: dict) -> Iterator[Run]:
    yield partial(_low_resolution_run, low_steps=settings["low_steps"])


def _low_resolution_run(pipe, prompts: list[str], call: dict, generator: list, low_steps: int, **more):
    """The first `low_steps` of a run's steps on latents of half the height and width.

    Their x0 is brought to full size and noised to the level of the next step, x = (1 - sigma) x0 + sigma noise, as
    DVG, Jenga (arXiv 2505.16864) and LTX-Video's two stages do. The noise is that of the full run at that seed, and the
    low steps begin with the mean of its blocks, at unit variance, so that all of a run has one layout.
    """
    stride, shrink = family_of(pipe.transformer).compression(pipe)
    sizes = ((call["frames"] - 1) // stride + 1, call["height"] // shrink, call["width"] // shrink)
    shape = (len(prompts), pipe.transformer.config.in_channels, *sizes)
    noise = randn_tensor(shape, generator=generator, device=pipe._execution_device, dtype=torch.float32)
    low = {**call, "height": call["height"] // 2, "width": call["width"] // 2}
    folded = 2 * avg_pool3d(noise, (1, 2, 2))
    with at_places(pipe, range(low_steps)) as sigmas:
        x0 = stock_run(pipe, prompts, low, generator, latents=folded, output_type="latent").to(noise)
    sigma = sigmas[low_steps]
    latents = (1 - sigma) * interpolate(x0, sizes, mode="trilinear") + sigma * noise
    with at_places(pipe, range(low_steps, call["steps"])):
        return stock_run(pipe, prompts, call, generator, latents=latents, **more)


def low_and_full_steps(probe: Probe, budget: float, tries: int = 6) -> list[list[dict]]:
    """Pairs of numbers of steps that cost the budget: from as many at full size as fit beside one low step, to one.

    Not more steps in all than the full run has, and one at full size at least.
    """
    found, purse = {}, budget * probe.steps + 1e-9
    most = int(purse - probe.low_share)
    for number in range(tries):
        full = max(1, round(most - number * (most - 1) / (tries - 1)))
        low = min(int((purse - full) / probe.low_share), probe.steps - full)
        if full <= most and low > 0:
            found[full] = {"steps": full + low, "low_steps": low}
    return [[settings] for settings in found.values()]
