"""The rivals that have something to tune: caches, low resolution first, and fewer steps at levels of their own.

A cache skips transformer blocks or attention layers on some denoising steps. How much it saves depends on its settings
and, for some, on the clip, so that it is found by counting real runs, and only certain amounts can be reached. The
others (`sweep.levels`) save what can be told beforehand. `sweep.tuning` finds the settings.
"""

import ast
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache, partial

from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

from flexivid.sweep import dbcache, levels
from flexivid.sweep.probe import Probe
from flexivid.sweep.sampling import Run, stock_run


@dataclass(frozen=True)
class Rival:
    """A way to spend less than the full run that has something to tune.

    meaning: for people. families: (probe, budget) -> lists of settings that can be tried, as results.json can hold
    them, each from those that compute most to those that compute least; under "steps" how many steps the pipeline is
    called with, the full run's if it is not there. on: (pipe, settings) -> a context in which the pipeline samples so,
    which yields how it is called. refusal: (pipe without weights, call) -> why it cannot be sampled so.
    depends_on_clips: what it costs does. note: what to know.
    """

    meaning: str
    families: Callable[[Probe, float], list[list[dict]]]
    on: Callable[[DiffusionPipeline, dict], AbstractContextManager[Run]]
    refusal: Callable[[DiffusionPipeline, dict], str | None]
    depends_on_clips: bool = True
    note: str = ""


def _thresholds(least: float, most: float, count: int = 40) -> list[float]:
    return [round(least * (most / least) ** (i / (count - 1)), 5) for i in range(count)]


@lru_cache(maxsize=1)
def magnitude_ratios(probe: Probe) -> list[float]:
    """The calibration that MagCache asks for, as it prints it: the residual's norm from step to step."""
    printed, transformer = io.StringIO(), probe.pipe.transformer
    transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=probe.steps))
    try:
        with redirect_stdout(printed):
            probe()
    finally:
        transformer.disable_cache()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and "Calibration" not in line]
    return ast.literal_eval(lines[0])  # of the conditional branch, which is called first


def _mag_cache_families(probe: Probe, budget: float) -> list[list[dict]]:
    ratios = magnitude_ratios(probe)
    common = {"max_skip_steps": probe.steps, "num_inference_steps": probe.steps, "mag_ratios": ratios}
    return [[{"threshold": threshold, **common} for threshold in _thresholds(0.002, 20)]]


def _skip_ranges(*names: str) -> Callable[[Probe, float], list[list[dict]]]:
    return lambda probe, budget: [[dict.fromkeys(names, skip) for skip in range(2, probe.steps + 1)]]


def _taylor_families(probe: Probe, budget: float) -> list[list[dict]]:
    """Both orders, and as many computed steps before the first expansion as the paper has, fewer and more."""
    return [
        [
            {"cache_interval": interval, "max_order": order, "disable_cache_before_step": first}
            for interval in range(2, probe.steps + 1)
        ]
        for order in (1, 2)
        for first in (1, 3, 6)
        if first <= budget * probe.steps
    ]


@contextmanager
def _cached(pipe: DiffusionPipeline, settings: dict, config: Callable[[DiffusionPipeline, dict], object]):
    pipe.transformer.enable_cache(config(pipe, settings))
    try:
        yield stock_run
    finally:
        pipe.transformer.disable_cache()


def _two_transformers(pipe: DiffusionPipeline, call: dict) -> str | None:
    if getattr(pipe, "transformer_2", None) is None:
        return None
    return "caches on a pipeline of two transformers are not supported yet: leave them out, --rivals steps"


def _cache(name: str, families, config: Callable[[DiffusionPipeline, dict], object], note: str = "") -> Rival:
    """A cache of diffusers. config: (pipe, settings) -> what `enable_cache` takes."""
    return Rival(f"{name} of diffusers", families, partial(_cached, config=config), _two_transformers, note=note)


def _sea_cache(name: str, residual_order: int) -> Rival:
    """residual_order: 0 holds the last residual, 1 extrapolates the last two. No limit on steps in a row."""
    return _cache(
        name,
        lambda probe, budget: [[{"threshold": threshold} for threshold in _thresholds(0.01, 20)]],
        lambda pipe, settings: SeaCacheConfig(**settings, residual_order=residual_order, max_consecutive_cached=0),
    )


# Attention layers keep one cache for both guidance branches where a pipeline calls them apart, as Wan does.
_ONE_STATE = "one cache for both guidance branches, which Wan calls apart: one reuses the attention of the other"
# Every timestep but the first, which is 999 or 1000: before it there is nothing to reuse, and FasterCache tries to.
REUSABLE_TIMESTEPS = (-1, 999)

RIVALS: dict[str, Rival] = {
    "fbcache": _cache(
        "fbcache",
        lambda probe, budget: [[{"threshold": threshold} for threshold in _thresholds(0.002, 4)]],
        lambda pipe, settings: FirstBlockCacheConfig(**settings),
    ),
    "taylorseer": _cache(
        "taylorseer",
        _taylor_families,
        lambda pipe, settings: TaylorSeerCacheConfig(
            **settings,
            taylor_factors_dtype=pipe.transformer.dtype,
            # The default patterns match no layer of Wan. The paper caches the output of every attention and MLP.
            cache_identifiers=[r".*blocks\.\d+\.(attn\d?|ffn?)"],
        ),
    ),
    "magcache": _cache("magcache", _mag_cache_families, lambda pipe, settings: MagCacheConfig(**settings)),
    "seacache": _sea_cache("seacache", residual_order=0),
    "seacache-extrapolated": _sea_cache("seacache-extrapolated", residual_order=1),
    "fastercache": _cache(
        "fastercache",
        _skip_ranges("spatial_attention_block_skip_range"),
        lambda pipe, settings: FasterCacheConfig(
            **settings,
            spatial_attention_timestep_skip_range=REUSABLE_TIMESTEPS,
            attention_weight_callback=lambda module: 0.5,
            # Its guidance cache needs both branches in one batch.
            is_guidance_distilled=True,
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        _ONE_STATE,
    ),
    "pab": _cache(
        "pab",
        _skip_ranges("spatial_attention_block_skip_range", "cross_attention_block_skip_range"),
        lambda pipe, settings: PyramidAttentionBroadcastConfig(
            **settings,
            spatial_attention_timestep_skip_range=REUSABLE_TIMESTEPS,
            cross_attention_timestep_skip_range=REUSABLE_TIMESTEPS,
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        _ONE_STATE,
    ),
    "cache-dit": Rival(
        "DBCache of the package cache-dit",
        dbcache.families,
        dbcache.cached,
        lambda pipe, call: dbcache.refusal(pipe, call) or _two_transformers(pipe, call),
    ),
    "low-resolution": Rival(
        "first steps on latents of half the height and width",
        levels.low_and_full_steps,
        levels.low_resolution_first,
        levels.low_resolution_refusal,
        depends_on_clips=False,
    ),
    "steps-at-our-places": Rival(
        "fewer steps, at the noise levels of the method reuse",
        levels.our_places,
        levels.only_at,
        levels.places_refusal,
        depends_on_clips=False,
    ),
    "steps-optimised": Rival(
        "fewer steps, at noise levels whose shift is tuned",
        levels.shifts,
        levels.shifted,
        levels.shift_refusal,
        depends_on_clips=False,
    ),
}
