"""The public surface: enable, disable, plan, summary."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import ContextParallelConfig, DiffusionPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    _apply_group_offloading,
    _get_top_level_group_offload_hook,
)
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn

from flexivid.diffusion import PARAMETRISATIONS
from flexivid.model.adapter import load_adapter, locate_adapter, read_config
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.model.hooks import attached
from flexivid.model.lora import remove_lora
from flexivid.patches.folding import token_grid
from flexivid.patches.sizes import format_patch_size, multiple_of, parse_patch_size, spatially_doubled
from flexivid.sampling.budget import check_budget, check_order
from flexivid.sampling.observe import Observer
from flexivid.sampling.run import Summary
from flexivid.sampling.runner import PipelineRunner
from flexivid.sampling.schedule import Schedule

COMPONENTS = ("transformer", "transformer_2")


def _transformers(target: DiffusionPipeline | nn.Module) -> dict[str, nn.Module]:
    """The transformers to flexify, by component name. Wan2.2-A14B has two."""
    if isinstance(target, DiffusionPipeline):
        found = {name: getattr(target, name, None) for name in COMPONENTS}
        found = {name: module for name, module in found.items() if module is not None}
        if not found:
            raise ValueError(f"{type(target).__name__} has no transformer; flexivid works on diffusion transformers")
        return found
    return {"transformer": target}


@contextmanager
def _without_other_hooks(target: DiffusionPipeline | nn.Module):
    """Offloading and context parallel wrap `forward` as our hooks do: off while ours change, and outside of them after.

    Offloading has noted which weights there are, context parallel splits the tables that ours make, and diffusers
    loses a hook such as ours if another that came before it is removed.
    """
    pipe = target if isinstance(target, DiffusionPipeline) else None
    model_offload, sequential_offload, _ = _func_optionally_disable_offloading(pipe)
    put_back = []
    for transformer in _transformers(target).values():
        if (parallel := _context_parallel_config(transformer)) is not None:
            remove_context_parallel(transformer, transformer._cp_plan)
            put_back.append(partial(apply_context_parallel, transformer, parallel, transformer._cp_plan))
        if (hook := _get_top_level_group_offload_hook(transformer)) is not None:
            for name in (_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _LAZY_PREFETCH_GROUP_OFFLOADING):
                HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(name, recurse=True)
            put_back.append(partial(_apply_group_offloading, transformer, hook.config))
    try:
        yield
    finally:
        for action in put_back:
            action()
        if model_offload:
            pipe.enable_model_cpu_offload(device=pipe._offload_device)
        elif sequential_offload:
            pipe.enable_sequential_cpu_offload(device=pipe._offload_device)


def _context_parallel_config(transformer: nn.Module) -> ContextParallelConfig | None:
    """Raises ValueError for a plan that splits the latents themselves, before they can be folded: LTX-Video's."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None or config.context_parallel_config is None:
        return None
    if "hidden_states" in transformer._cp_plan.get("", {}):
        raise ValueError(f"context parallel of {type(transformer).__name__} splits its latents before they are folded")
    return config.context_parallel_config


def _runner(flex: FlexTransformer) -> PipelineRunner | None:
    return flex.runner if isinstance(flex.runner, PipelineRunner) else None


def enable(
    target: DiffusionPipeline | nn.Module,
    adapter: str | os.PathLike | None = None,
    modes: list[str] | None = None,
    budget: float | None = None,
    schedule: Schedule | str | None = None,
    guidance: str | None = None,
    order: str | None = None,
    parametrisation: str | None = None,
    merge_lora: bool = False,
) -> None:
    """Makes a diffusers pipeline, or a bare transformer, run at several patch sizes.

    Nothing of the pipeline is copied or edited: call it as before, and `disable` gives it back. Enabling twice
    replaces the first.

    Args:
        target: a pipeline, or a bare transformer that then runs at one fixed patch size.
        adapter: folder or hub id of a flexivid adapter. Without one, weak modes are training-free.
        modes: weak patch sizes as `1x4x4`, t x h x w in latent pixels; those of the adapter, or by default
            one that is twice as large in space.
        budget: share of the stock call's FLOPs that the transformer may spend, in (0, 1].
        schedule: instead of a budget: a `Schedule`, `2x4x4:35,1x2x2:5`, or one patch size for every step.
        guidance: `kept` (weak steps run the conditional branch only, and keep what guidance added at the last
            powerful step), `same` (both guidance branches at one patch size) or `weak-uncond` (as many steps as the
            budget allows run the powerful patch size on the conditional branch, and the cheapest one for their
            guidance). By default kept where the pipeline calls its branches apart and the order is interleaved, else
            same.
        order: `interleaved` (powerful steps are spread over all, and what the last one knew better is added to the weak
            ones after it) or `weak-first` (FlexiDiT); by default interleaved, with `weak-uncond` weak-first. In a
            schedule, too, weak steps after a powerful one are corrected so.
        parametrisation: `snr` or `direct`; the adapter's, or `snr` without one.
        merge_lora: keep a copy of the adapted weights with the adapter's LoRA added, one for every mode: weak steps
            then cost no LoRA, and memory grows by as much.

    Raises:
        ValueError: an argument is out of range, the model is unknown, the transformer is enabled through another
            pipeline, or (AdapterError) the adapter does not fit. An unreachable budget is raised by the first call,
            when sizes and steps are known.
    """
    is_pipeline = isinstance(target, DiffusionPipeline)
    if budget is not None and schedule is not None:
        raise ValueError("give a budget or a schedule, not both")
    if is_pipeline and budget is None and schedule is None:
        raise ValueError("give a budget such as 0.25, or a schedule such as 2x4x4:35,1x2x2:5")
    if not is_pipeline and (budget is not None or not isinstance(schedule, str) or ":" in schedule):
        raise ValueError("a bare transformer has no steps: give schedule= one patch size such as 1x4x4, and no budget")
    if budget is not None:
        check_budget(budget)
    check_order(order, guidance)
    if guidance is not None and schedule is not None:
        raise ValueError("guidance belongs to a budget; a schedule names the branches itself, such as 1x2x2/1x4x4:5")
    if order is not None and schedule is not None:
        raise ValueError("order belongs to a budget; a schedule is an order itself")
    if merge_lora and adapter is None:
        raise ValueError("merge_lora merges the LoRA of an adapter; give one")
    transformers = _transformers(target)
    families = [family_of(transformer) for transformer in transformers.values()]
    if guidance in ("kept", "weak-uncond") and not all(family.guidance == "separate" for family in families):
        raise ValueError(
            f"{guidance} needs a pipeline that calls its guidance branches apart; {families[0].name} does not"
        )
    for transformer in transformers.values():
        flex = attached(transformer)
        runner = flex and _runner(flex)
        if runner and runner.pipe is not target:
            raise ValueError(
                "this transformer is enabled through another pipeline that shares it; disable that one first"
            )

    folder = config = None
    if adapter is not None:
        folder = locate_adapter(adapter)
        config = read_config(folder)
        if parametrisation not in (None, config.parametrisation):
            raise ValueError(f"the adapter was trained for {config.parametrisation}, not {parametrisation}")
        missing = [mode for mode in modes or [] if mode not in config.patch_sizes]
        if missing:
            raise ValueError(f"the adapter has no mode {missing[0]}; it has {', '.join(config.patch_sizes)}")
    kind = config.parametrisation if config else parametrisation or "snr"
    if kind not in PARAMETRISATIONS:
        raise ValueError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {kind!r}")
    base_patch = patch_size_of(next(iter(transformers.values())).config)
    modes = list(dict.fromkeys(modes or _modes_of(schedule, config, base_patch)))
    for mode in modes:
        multiple_of(parse_patch_size(mode), base_patch)

    with _without_other_hooks(target):
        _disable(target)
        flexes: dict[str, FlexTransformer] = {}
        try:
            for name, transformer in transformers.items():
                flexes[name] = FlexTransformer(transformer, modes, kind)
            if config is not None:
                load_adapter(folder, config, flexes)
                if merge_lora:
                    for flex in flexes.values():
                        flex.lora.merge(flex.weak_modes)
            if is_pipeline:
                PipelineRunner(target, flexes, budget, schedule, guidance, order)
            else:
                flexes["transformer"].fix(schedule)
        except BaseException:
            # Nothing half-enabled is left behind.
            _disable(target)
            raise


def _modes_of(schedule: Schedule | str | None, config, base_patch: tuple[int, int, int]) -> list[str]:
    """The weak patch sizes if the user names none: the adapter's, the schedule's, or one twice as large in space."""
    if config is not None:
        return config.patch_sizes
    powerful = format_patch_size(base_patch)
    text = " ".join(name for step in schedule.steps for name in step) if isinstance(schedule, Schedule) else schedule
    named = [name for name in re.findall(r"\d+x\d+x\d+", text or "") if name != powerful]
    return named or [spatially_doubled(base_patch)]


def disable(target: DiffusionPipeline | nn.Module) -> None:
    """Gives back the stock pipeline or transformer, the user's own LoRAs as they were. Harmless if not enabled."""
    with _without_other_hooks(target):
        _disable(target)


def _disable(target: DiffusionPipeline | nn.Module) -> None:
    for transformer in _transformers(target).values():
        flex = attached(transformer)
        if flex is not None:
            flex.remove()
            remove_lora(flex)


def plan(
    pipe: DiffusionPipeline, frames: int, height: int, width: int, steps: int, text_length: int, guided: bool = True
) -> Schedule:
    """The schedule that a call of these sizes (pixels, denoising steps, padded text tokens) would run.

    Counts on the meta device, so it takes a second and the pipeline may be one without weights. Raises ValueError if
    the pipeline is not enabled, and what the call itself would raise, such as BudgetError.
    """
    runner = _enabled(pipe)
    call = _call_of(pipe, runner, frames, height, width, text_length)
    return runner.plan(call, steps, 2 if guided and runner.family.guidance == "separate" else 1)


def costs(pipe: DiffusionPipeline, frames: int, height: int, width: int, text_length: int) -> dict[str, int]:
    """FLOPs of one forward of one clip of these sizes by patch size. Raises ValueError if it is not enabled."""
    runner = _enabled(pipe)
    return dict(runner.costs(_call_of(pipe, runner, frames, height, width, text_length)))


def _enabled(pipe: DiffusionPipeline) -> PipelineRunner:
    """Raises ValueError if the pipeline is not enabled."""
    flex = attached(next(iter(_transformers(pipe).values())))
    runner = flex and _runner(flex)
    if not runner:
        raise ValueError("this pipeline is not enabled: call flexivid.enable first")
    return runner


def _call_of(pipe: DiffusionPipeline, runner: PipelineRunner, frames, height, width, text_length) -> dict:
    """Arguments of a forward, without values."""
    flex, family = next(iter(runner.flexes.values())), runner.family
    latents = family.latent_size(pipe, frames, height, width)
    call = family.example(flex.transformer.config, latents, text_length)
    if pipe.config.get("expand_timesteps"):
        call["timestep"] = torch.empty(1, math.prod(token_grid(latents, flex.base_patch)))
    return call


@contextmanager
def observe(pipe: DiffusionPipeline, observer: Observer) -> Iterator[Observer]:
    """Within it `observer` sees every forward of the pipeline. Raises ValueError if the pipeline is not enabled."""
    runner = _enabled(pipe)
    before, runner.observer = runner.observer, observer
    try:
        yield observer
    finally:
        runner.observer = before


def summary(pipe: DiffusionPipeline) -> Summary:
    """What ran at which step of the last call, FLOPs used and saved. Raises ValueError before there was one."""
    for transformer in _transformers(pipe).values():
        flex = attached(transformer)
        runner = flex and _runner(flex)
        if runner and runner.summary is not None:
            return runner.summary
    raise ValueError("nothing to sum up: enable the pipeline and call it first")
