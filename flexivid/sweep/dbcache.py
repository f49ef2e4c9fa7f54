"""DBCache of the package cache-dit, through its own API.

F1B0 is what its examples run Wan with: the first block is always computed, and how far its residual has moved since the
last computed step decides about the others. A model of few blocks therefore keeps a large share of its FLOPs on every
step (a sixth with six blocks), so that small budgets are also tried with fewer steps.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from diffusers import DiffusionPipeline

from flexivid.sweep.probe import Probe
from flexivid.sweep.sampling import Run, stock_run

WARM_UP, IN_A_ROW = 8, 3  # of its examples: steps computed first, cached steps in a row at most
THRESHOLDS = [round(0.01 * 400 ** (i / 39), 4) for i in range(40)]  # of the residual difference; its examples: 0.12
LEAST_SHARE, MOST_SHARE = 0.15, 0.6  # of a run of so many steps, which the cache has to come down to


def refusal(pipe: DiffusionPipeline, call: dict) -> str | None:
    if find_spec("cache_dit") is None:
        return "the method cache-dit needs the package cache-dit: pip install cache-dit"
    if not _module().BlockAdapterRegister.is_supported(pipe):
        return f"cache-dit does not support {type(pipe).__name__}"
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        # It takes every launch for one clip that is split over processes.
        return (
            "cache-dit averages over all processes what it decides by, so that their clips mix: run it in one process"
        )
    return None


def _module():
    import cache_dit  # optional, and it writes to the log when it is imported

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    return cache_dit


def families(probe: Probe, budget: float) -> list[list[dict]]:
    """Over the threshold: with and without its TaylorSeer, with its limits and without, and on fewer steps too."""
    found = []
    for steps in (probe.steps, probe.steps // 2, probe.steps // 4):
        share = budget * probe.steps / max(steps, 1)
        if steps < probe.steps and not LEAST_SHARE <= share <= MOST_SHARE:
            continue
        # Half of what there is to spend at most goes into computing the first steps.
        warm_up = max(1, min(WARM_UP, int(share * steps / 2)))
        for in_a_row in (IN_A_ROW, -1):
            if in_a_row > 0 and share < 1 / in_a_row:  # not to be reached
                continue
            for order in (0, 1):
                common = {"steps": steps, "max_warmup_steps": warm_up, "max_continuous_cached_steps": in_a_row}
                family = [{"residual_diff_threshold": at, **common, "taylorseer_order": order} for at in THRESHOLDS]
                found.append(family)
    return found


@contextmanager
def cached(pipe: DiffusionPipeline, settings: dict) -> Iterator[Run]:
    cache_dit, attributes = _module(), vars(pipe.transformer)
    stock = "forward" not in attributes
    own = {name: value for name, value in settings.items() if name not in ("steps", "taylorseer_order")}
    order = settings["taylorseer_order"]
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, **own),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None,
    )
    try:
        yield stock_run
    finally:
        cache_dit.disable_cache(pipe)
        if stock:  # it leaves the bound method behind, with which a deep copy would compute with these weights
            attributes.pop("forward", None)
