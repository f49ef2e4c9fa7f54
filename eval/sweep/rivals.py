"""The caches of diffusers as rivals, each tuned to the FLOPs that an arm may spend.

A cache skips transformer blocks or attention layers on some denoising steps. How much it saves depends on its settings
and, for some, on the clip, so that it is found by counting real runs, and only certain amounts can be reached.
"""

import ast
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache as memoised
from itertools import groupby
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from tqdm import tqdm

from flexivid.files import write_json
from flexivid.inputs import read_json

NEAR = 0.05  # a cache that comes no closer to a budget than this does not reach it

# A sampling run of a few clips with the pipeline as it is at that moment; returns the FLOPs of the transformer.
Probe = Callable[[], int]


@dataclass(frozen=True)
class Cache:
    """A cache of diffusers.

    candidates: (pipe, probe, steps) -> settings that can be tried, from those that compute most to those that compute
    least, as results.json can hold them. config: (pipe, settings) -> what `enable_cache` takes. note: what to know.
    """

    candidates: Callable[[DiffusionPipeline, Probe, int], list[dict]]
    config: Callable[[DiffusionPipeline, dict], object]
    note: str = ""


def _thresholds(least: float, most: float, count: int = 40) -> list[float]:
    return [round(least * (most / least) ** (i / (count - 1)), 5) for i in range(count)]


def magnitude_ratios(pipe: DiffusionPipeline, probe: Probe, steps: int) -> list[float]:
    """The calibration that MagCache asks for, as it prints it: the residual's norm from step to step."""
    printed = io.StringIO()
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    try:
        with redirect_stdout(printed):
            probe()
    finally:
        pipe.transformer.disable_cache()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and "Calibration" not in line]
    return ast.literal_eval(lines[0])  # of the conditional branch, which is called first


def _mag_cache_candidates(pipe: DiffusionPipeline, probe: Probe, steps: int) -> list[dict]:
    ratios = magnitude_ratios(pipe, probe, steps)
    common = {"max_skip_steps": steps, "num_inference_steps": steps, "mag_ratios": ratios}
    return [{"threshold": threshold, **common} for threshold in _thresholds(0.002, 20)]


def _skip_ranges(*names: str) -> Callable[[DiffusionPipeline, Probe, int], list[dict]]:
    return lambda pipe, probe, steps: [dict.fromkeys(names, skip) for skip in range(2, steps + 1)]


def _sea_cache(residual_order: int) -> Cache:
    """residual_order: 0 holds the last residual, 1 extrapolates the last two. No limit on steps in a row."""
    return Cache(
        lambda pipe, probe, steps: [{"threshold": threshold} for threshold in _thresholds(0.01, 20)],
        lambda pipe, settings: SeaCacheConfig(**settings, residual_order=residual_order, max_consecutive_cached=0),
    )


# Attention layers keep one cache for both guidance branches where a pipeline calls them apart, as Wan does.
_ONE_STATE = "one cache for both guidance branches, which Wan calls apart: one reuses the attention of the other"
# Every timestep but the first, which is 999 or 1000: before it there is nothing to reuse, and FasterCache tries to.
REUSABLE_TIMESTEPS = (-1, 999)

CACHES: dict[str, Cache] = {
    "fbcache": Cache(
        lambda pipe, probe, steps: [{"threshold": threshold} for threshold in _thresholds(0.002, 4)],
        lambda pipe, settings: FirstBlockCacheConfig(**settings),
    ),
    "taylorseer": Cache(
        lambda pipe, probe, steps: [{"cache_interval": interval} for interval in range(2, steps + 1)],
        lambda pipe, settings: TaylorSeerCacheConfig(
            **settings,
            max_order=1,
            taylor_factors_dtype=pipe.transformer.dtype,
            # The default patterns match no layer of Wan. The paper caches the output of every attention and MLP.
            cache_identifiers=[r".*blocks\.\d+\.(attn\d?|ffn?)"],
        ),
    ),
    "magcache": Cache(_mag_cache_candidates, lambda pipe, settings: MagCacheConfig(**settings)),
    "seacache": _sea_cache(residual_order=0),
    "seacache-extrapolated": _sea_cache(residual_order=1),
    "fastercache": Cache(
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
    "pab": Cache(
        _skip_ranges("spatial_attention_block_skip_range", "cross_attention_block_skip_range"),
        lambda pipe, settings: PyramidAttentionBroadcastConfig(
            **settings,
            spatial_attention_timestep_skip_range=REUSABLE_TIMESTEPS,
            cross_attention_timestep_skip_range=REUSABLE_TIMESTEPS,
            current_timestep_callback=lambda: pipe.current_timestep,
        ),
        _ONE_STATE,
    ),
}


def tune(
    pipe: DiffusionPipeline, cache: Cache, budgets: list[float], probe: Probe, full_flops: int, steps: int
) -> dict[float, tuple[dict, float]]:
    """Per budget, the settings whose share of the full FLOPs is nearest to it, with that share.

    Bisects the candidates, so it runs `probe` about five times a budget.
    """
    candidates = cache.candidates(pipe, probe, steps)

    @memoised
    def share(index: int) -> float:
        pipe.transformer.enable_cache(cache.config(pipe, candidates[index]))
        try:
            return probe() / full_flops
        finally:
            pipe.transformer.disable_cache()

    found = {}
    for budget in budgets:
        low, high = 0, len(candidates) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) > budget else (low, middle)
        best = min((low, high), key=lambda index: abs(share(index) - budget))
        found[budget] = candidates[best], share(best)
    return found


def tune_all(pipe: DiffusionPipeline, arms: list, probe: Probe, path: Path) -> None:
    """Tunes the cache of every arm that has one. What was found is kept in `path`, and not searched for again."""
    known = read_json(path) if path.exists() else {}
    write_json(path, known)
    missing = [arm for arm in arms if arm.cache is not None and arm.name not in known]
    # Arms that differ in their budget only share the runs.
    groups = [list(group) for _, group in groupby(missing, key=lambda arm: (arm.cache, arm.flexivid))]
    for group in tqdm(groups, desc="tuning caches", disable=not groups):
        if "full_flops" not in known:
            known["full_flops"] = probe()
        budgets = [arm.budget for arm in group]
        with group[0].on(pipe):
            found = tune(pipe, CACHES[group[0].cache], budgets, probe, known["full_flops"], group[0].steps)
        for arm in group:
            settings, share = found[arm.budget]
            known[arm.name] = {"settings": settings, "share": share}
        write_json(path, known)
