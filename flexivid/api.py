"""enable and disable."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch._dynamo import OptimizedModule

from flexivid.diffusion import PARAMETRISATIONS
from flexivid.model.adapter import AdapterConfig, load_adapter, read_config
from flexivid.model.families import family_of
from flexivid.model.family import check_pipeline, patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.model.hooks import HOOK_NAME, attached, hook_of, register
from flexivid.model.hub import locate_adapter
from flexivid.model.lora import add_lora, remove_lora
from flexivid.model.recipe import Recipe
from flexivid.model.surroundings import (
    check_caches,
    check_merging,
    check_offload_to_disk,
    context_parallel_config,
    drop_cached,
    without_other_hooks,
)
from flexivid.patches.sizes import format_patch_size, multiple_of, parse_mode, spatially_doubled
from flexivid.sampling.budget import check_budget, check_order
from flexivid.sampling.few_steps import FewStepRunner
from flexivid.sampling.forwards import calls_branches_apart, can_keep_guidance
from flexivid.sampling.runner import PipelineRunner
from flexivid.sampling.schedule import Schedule
from flexivid.targets import Pipeline, check_not_shared, components_of, runner_of, transformers_of

NEITHER = "give a budget such as 0.25, or a schedule such as 2x4x4:35,1x2x2:5"


def enable(
    target: Pipeline | nn.Module,
    adapter: str | os.PathLike | None = None,
    modes: list[str] | None = None,
    budget: float | None = None,
    schedule: Schedule | str | None = None,
    guidance: str | None = None,
    order: str | None = None,
    parametrisation: str | None = None,
    merge_lora: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Makes a diffusers pipeline, or a bare transformer, run at several patch sizes.

    Nothing of the pipeline is copied or edited: `disable` gives it back. Enabling twice replaces the first.

    Args:
        target: a pipeline, or a bare transformer that then runs at one fixed patch size.
        adapter: folder or hub id of a flexivid adapter. Without one, weak modes are training-free.
        modes: weak patch sizes as `1x4x4`, t x h x w in latent pixels; the adapter's, or one twice as large in space.
        budget: share of the stock call's FLOPs that the transformer may spend, in (0, 1]; over few steps there are few.
        schedule: instead of a budget: a `Schedule`, `2x4x4:35,1x2x2:5`, or one patch size for every step.
            With neither, an adapter's few-step recipe runs: call the pipeline with its steps, guidance off. Until
            `disable` it has a scheduler with the recipe's noise levels.
        guidance: `kept` (weak steps run the conditional branch only, and keep what guidance added at the last
            powerful step), `same` (both guidance branches at one patch size) or `weak-uncond` (as many steps as the
            budget allows run the powerful patch size on the conditional branch, and the cheapest one for their
            guidance). By default kept where branches are called apart and the order is interleaved, else same.
        order: `reuse` (between powerful steps others hold the last x0 and compute nothing; the first ones of small
            budgets are guided, if the adapter can), `interleaved` (powerful steps are spread over all, and what the
            last one knew better is added to the weak ones after it) or `weak-first` (FlexiDiT). By default reuse; with
            `modes` or a `guidance` interleaved, with `weak-uncond` weak-first. Weak steps of a schedule are corrected.
        parametrisation: `snr` or `direct`; the adapter's, or `snr` without one.
        merge_lora: keep a copy of the adapted weights with LoRA added, one a mode: weak steps then cost no LoRA.
        revision, subfolder, token: of an adapter on the hub, as in diffusers; a folder may have a subfolder too.

    Raises:
        ValueError: an argument is out of range, the model is unknown, the transformer is enabled through another
            pipeline, a cache or an offload is on that several patch sizes do not go with, or (AdapterError) the
            adapter is not to be had or does not fit. The pipeline is then as it was. An unreachable budget is raised
            by the first call, when sizes and steps are known, and so is a cache that is switched on later.
    """
    adapter_alone = adapter is not None and (budget, schedule) == (None, None) and isinstance(target, Pipeline)
    if not adapter_alone:
        _check_arguments(target, budget, schedule, guidance, order)
    _check_surroundings(target, merge_lora)
    folder, config = _read_adapter(adapter, (revision, subfolder, token), merge_lora, parametrisation, modes)
    recipe = _recipe_to_run(config, modes, guidance, order) if adapter_alone else None
    if None not in (budget, modes) and (order, guidance) == (None, None):
        order = "interleaved"  # who names weak patch sizes wants them
    kind, modes = _kind_and_modes(target, config, parametrisation, modes, schedule)

    def start(flexes: dict[str, FlexTransformer]) -> None:
        if folder is not None and config is not None:
            _load(folder, config, flexes, recipe, merge_lora)
        _run(target, flexes, recipe, budget, schedule, guidance, order)

    _replace(target, modes, kind, start)


def _load(folder: Path, config: AdapterConfig, flexes: dict[str, FlexTransformer], recipe, merge_lora: bool) -> None:
    load_adapter(folder, config, flexes)
    for flex in flexes.values() if merge_lora else ():
        flex.lora.merge(flex.weak_modes if recipe is None else config.loras(flex))


def _run(target, flexes: dict[str, FlexTransformer], recipe: Recipe | None, budget, schedule, guidance, order) -> None:
    """Gives the transformers who answers their forwards."""
    if recipe is not None:
        FewStepRunner(target, flexes, recipe)
    elif isinstance(target, Pipeline):
        PipelineRunner(target, flexes, budget, schedule, guidance, order)
    else:
        flexes["transformer"].fix(schedule)


def _replace(target, modes: list[str], kind: str, start: Callable[[dict[str, FlexTransformer]], None]) -> None:
    """Puts new weak modes, which `start` fills, in the place of what was enabled before, unless that fails."""
    transformers = transformers_of(target)
    with without_other_hooks(transformers.values(), target if isinstance(target, DiffusionPipeline) else None):
        put_back: list[Callable[[], None]] = []
        try:
            put_back.extend(_take_off(transformer) for transformer in transformers.values())
            start({name: FlexTransformer(transformer, modes, kind) for name, transformer in transformers.items()})
        except BaseException:
            for transformer, action in zip(transformers.values(), put_back):  # noqa: B905
                _take_off(transformer)
                action()
            raise
    for name, component in components_of(target).items():
        if isinstance(component, OptimizedModule) and (hook := hook_of(transformers[name])) is not None:
            hook.wrapped = component.forward


def _kind_and_modes(target, config: AdapterConfig | None, parametrisation, modes, schedule) -> tuple[str, list[str]]:
    """The parametrisation and the weak patch sizes, asked for or usual. Raises ValueError for unfit ones."""
    kind = config.parametrisation if config else parametrisation or "snr"
    if kind not in PARAMETRISATIONS:
        raise ValueError(f"parametrisation must be one of {', '.join(PARAMETRISATIONS)}, not {kind!r}")
    base_patch = patch_size_of(next(iter(transformers_of(target).values())).config)
    modes = list(dict.fromkeys(modes or _modes_of(schedule, config, base_patch)))
    for mode in modes:
        patch_size, guided = parse_mode(mode)
        multiple_of(patch_size, base_patch)
        if guided and config is None:
            raise ValueError(f"{mode} has to be trained; give an adapter that has it")
    return kind, modes


def _recipe_to_run(config: AdapterConfig | None, modes, guidance, order) -> Recipe:
    """That of an adapter, beside which nothing is asked for. Raises ValueError if it has none, or if something is."""
    if config is None or config.recipe is None:
        raise ValueError(NEITHER)
    arguments = {"modes": modes, "guidance": guidance, "order": order}
    if given := [name for name, value in arguments.items() if value is not None]:
        raise ValueError(f"{given[0]} would do nothing: without a budget or a schedule the adapter's recipe runs")
    return config.recipe


def _check_arguments(target, budget, schedule, guidance, order) -> None:
    is_pipeline = isinstance(target, Pipeline)
    if budget is not None and schedule is not None:
        raise ValueError("give a budget or a schedule, not both")
    if is_pipeline and budget is None and schedule is None:
        raise ValueError(NEITHER)
    if not is_pipeline and (budget is not None or not isinstance(schedule, str) or ":" in schedule):
        raise ValueError("a bare transformer has no steps: give schedule= one patch size such as 1x4x4, and no budget")
    if budget is not None:
        check_budget(budget)
    check_order(order, guidance)
    if guidance is not None and schedule is not None:
        raise ValueError("guidance belongs to a budget; a schedule names the branches itself, such as 1x2x2/1x4x4:5")
    if order is not None and schedule is not None:
        raise ValueError("order belongs to a budget; a schedule is an order itself")
    family = [family_of(transformer) for transformer in transformers_of(target).values()][0]
    possible = {"kept": can_keep_guidance, "weak-uncond": calls_branches_apart}.get(guidance, lambda *_: True)
    if not possible(target, family):
        raise ValueError(f"{guidance} needs a pipeline that calls its guidance branches apart; {family.name} does not")


def _check_surroundings(target: Pipeline | nn.Module, merge_lora: bool) -> None:
    """Raises ValueError for what cannot go on around a transformer once it is enabled, before anything is touched."""
    check_not_shared(target)
    transformers = transformers_of(target)
    for transformer in transformers.values():
        check_pipeline(target, family_of(transformer))
        check_caches(transformer)
        context_parallel_config(transformer)
        if merge_lora:
            check_merging(transformer)
    parts = target.components if isinstance(target, Pipeline) else {}
    check_offload_to_disk({name: part for name, part in parts.items() if isinstance(part, nn.Module)}, transformers)


def _read_adapter(
    adapter: str | os.PathLike | None,
    hub: tuple,
    merge_lora: bool,
    parametrisation: str | None,
    modes: list[str] | None,
) -> tuple[Path | None, AdapterConfig | None]:
    """The folder of an adapter and its config. Raises ValueError if it was made for something else than is asked."""
    if adapter is None:
        options = zip(("merge_lora", "revision", "subfolder", "token"), (merge_lora or None, *hub), strict=True)
        if given := [name for name, value in options if value is not None]:
            raise ValueError(f"{given[0]} is about an adapter; give one")
        return None, None
    folder = locate_adapter(adapter, *hub)
    config = read_config(folder)
    if parametrisation not in (None, config.parametrisation):
        raise ValueError(f"the adapter was trained for {config.parametrisation}, not {parametrisation}")
    missing = [mode for mode in modes or [] if mode not in config.patch_sizes]
    if missing:
        raise ValueError(f"the adapter has no mode {missing[0]}; it has {', '.join(config.patch_sizes)}")
    return folder, config


def _take_off(transformer: nn.Module) -> Callable[[], None]:
    """Gives back the stock transformer; what is returned undoes that."""
    flex, runner = attached(transformer), runner_of(transformer)
    if flex is None:
        return lambda: None
    ranks, states = {}, {}
    for name in [name for name in getattr(transformer, "peft_config", {}) if name.startswith(f"{HOOK_NAME}-")]:
        ranks[name] = transformer.peft_config[name].r
        states[name] = get_peft_model_state_dict(transformer, adapter_name=name)
    hooks = flex.remove()
    remove_lora(flex)
    if runner is not None:
        runner.detach()

    def put_back() -> None:
        for module, hook in hooks:
            register(module, hook)
        transformer._diffusers_hook.invalidate_child_registries_cache()
        if states:
            names = [name.removeprefix(f"{HOOK_NAME}-") for name in states]
            add_lora(flex, next(iter(ranks.values())), [name for name in names if name not in flex.weak_modes])
        for name, state in states.items():
            set_peft_model_state_dict(transformer, state, adapter_name=name)
        if runner is not None:
            runner.attach()

    return put_back


def _modes_of(schedule: Schedule | str | None, config, base_patch: tuple[int, int, int]) -> list[str]:
    """The weak patch sizes if the user names none: the adapter's, the schedule's, or one twice as large in space."""
    if config is not None:
        return config.patch_sizes
    powerful = format_patch_size(base_patch)
    text = " ".join(name for step in schedule.steps for name in step) if isinstance(schedule, Schedule) else schedule
    named = [name for name in re.findall(r"\d+x\d+x\d+", text or "") if name != powerful]
    return named or [spatially_doubled(base_patch)]


def disable(target: Pipeline | nn.Module) -> None:
    """Gives back the stock pipeline or transformer, the user's own LoRAs as they were. Harmless if not enabled.

    Raises ValueError if it is enabled through another pipeline that shares the transformer: that one disables it.
    """
    check_not_shared(target)
    transformers = transformers_of(target).values()
    with without_other_hooks(transformers, target if isinstance(target, DiffusionPipeline) else None):
        for transformer in transformers:
            _take_off(transformer)
    drop_cached(transformers)
