"""What people put around a transformer: offloading, context parallel, caches, pipelines that share it."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import ContextParallelConfig, DiffusionPipeline, ModularPipeline
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
from diffusers.hooks.group_offloading import (
    _GROUP_OFFLOADING,
    _LAYER_EXECUTION_TRACKER,
    _LAZY_PREFETCH_GROUP_OFFLOADING,
    GroupOffloadingHook,
    LazyPrefetchGroupOffloadingHook,
    _apply_group_offloading,
    _get_top_level_group_offload_hook,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from safetensors import SafetensorError, safe_open
from torch import nn

from flexivid.model.families import family_of
from flexivid.model.hooks import hook_of

SHARED = "this transformer is enabled through another pipeline that shares it; disable that one first"
GONE = "this transformer was enabled through a pipeline that is gone: disable or enable it through this one"
# How diffusers calls the hooks of its caches, by which those are known that were not put on by `enable_cache`.
CACHE_HOOKS = {
    "fbc_": "a FirstBlockCache that was not put on by enable_cache",
    "faster_cache": "FasterCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache": "TextKVCache",
}


# Caches


def check_caches(transformer: nn.Module, everywhere: bool = True) -> None:
    """Raises ValueError for a cache that does not follow several patch sizes.

    everywhere: look at every module, which takes as long as some layers, and not only where caches begin.
    """
    config = getattr(transformer, "_cache_config", None)
    if config is not None and not isinstance(config, FirstBlockCacheConfig):
        raise ValueError(
            f"{type(config).__name__} does not work with several patch sizes; FirstBlockCacheConfig does, or call "
            f"disable_cache()"
        )
    if getattr(transformer, "_is_cached", False) or getattr(transformer, "enable_teacache", False):
        raise ValueError(
            "a cache of another library, such as cache-dit, does not work with several patch sizes; "
            "FirstBlockCacheConfig of diffusers does, or switch the cache off: cache_dit.disable_cache(pipe)"
        )
    parts = transformer.modules() if everywhere else (transformer, *_first_blocks(transformer))
    registries = (vars(part).get("_diffusers_hook") for part in parts)
    for name in (name for registry in registries if registry is not None for name in registry.hooks):
        for prefix, cache in CACHE_HOOKS.items():
            if name.startswith(prefix) and not (prefix == "fbc_" and config is not None):
                raise ValueError(
                    f"{cache} does not work with several patch sizes; enable_cache(FirstBlockCacheConfig(...)) does, "
                    f"or remove its hooks, such as {name}"
                )


def _first_blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    return (part[0] for part in hook_of(transformer).blocks.values() if len(part))


def drop_cached(transformers: Iterable[nn.Module], context: CacheContext | None = None) -> None:
    """Forgets what an aborted call has left in a cache: diffusers does so at the end of a whole call only.

    To be called before the first forward of a call; context: of that forward, None outside of one.
    """
    for transformer in transformers:
        if getattr(transformer, "is_cache_enabled", False):
            HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()
            _set_cache_context(transformer, context)


# Pipelines that share a transformer


def calling_pipeline() -> DiffusionPipeline | ModularPipeline | None:
    """The pipeline in whose call this runs, the innermost one; None in a loop of the user's own."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline | ModularPipeline):
                return owner
        frame = frame.f_back
    return None


def check_call(transformer: nn.Module, pipe: DiffusionPipeline | None) -> None:
    """To be called before every forward of a transformer that was enabled through `pipe`, None if that is gone.

    Raises ValueError if another pipeline calls, or if a cache has come since.
    """
    if pipe is None:
        raise ValueError(GONE)
    if calling_pipeline() not in (None, pipe):
        raise ValueError(SHARED)
    check_caches(transformer, everywhere=False)
    for name, part in hook_of(transformer).blocks.items():
        if getattr(transformer, name) is not part:
            raise ValueError(
                f"{name} of this transformer is another list than when it was enabled, as a cache such as cache-dit "
                f"makes it: switch the cache off, or enable again"
            )


# Context parallel


def context_parallel_config(transformer: nn.Module) -> ContextParallelConfig | None:
    """Raises ValueError for a plan that splits the latents themselves, before they can be folded: LTX-Video's."""
    config = getattr(transformer, "_parallel_config", None)
    if config is None or config.context_parallel_config is None:
        return None
    if "hidden_states" in transformer._cp_plan.get("", {}):
        raise ValueError(f"context parallel of {type(transformer).__name__} splits its latents before they are folded")
    return config.context_parallel_config


# Offloading


def check_merging(transformer: nn.Module) -> None:
    """Raises ValueError where offloading would not follow weights that are swapped for merged ones."""
    hook = _get_top_level_group_offload_hook(transformer)
    if hook is not None and (hook.config.stream is not None or hook.config.offload_to_disk_path is not None):
        kind = "with use_stream" if hook.config.offload_to_disk_path is None else "to disk"
        raise ValueError(f"group offload {kind} does not know the weights that merge_lora puts in: enable without it")


def _group_hooks(module: nn.Module) -> list[tuple[nn.Module, GroupOffloadingHook]]:
    registries = ((part, getattr(part, "_diffusers_hook", None)) for part in module.modules())
    found = ((part, registry.get_hook(_GROUP_OFFLOADING)) for part, registry in registries if registry is not None)
    return [(part, hook) for part, hook in found if hook is not None]


def _groups_on_disk(module: nn.Module) -> list:
    groups = (hook.group for _, hook in _group_hooks(module))
    return list(dict.fromkeys(group for group in groups if group.offload_to_disk_path is not None))


def check_offload_to_disk(components: dict[str, nn.Module], transformers: dict[str, nn.Module]) -> None:
    """Raises ValueError where group offload has left weights on disk that are not those of the transformers.

    diffusers names the files by block, not by model, and keeps one that is there already.
    """
    files = {
        name: {group.safetensors_file_path: group for group in _groups_on_disk(part)}
        for name, part in {**components, **transformers}.items()
    }
    for name in transformers:
        for other in files.keys() - {name}:
            shared = files[name].keys() & files[other].keys()
            if other_path := next((path for path in shared if files[name][path] is not files[other][path]), None):
                raise ValueError(
                    f"{name} and {other} are offloaded to one folder, {os.path.dirname(other_path)}, where diffusers "
                    f"gives their files the same names, so that both get the weights of one: load the pipeline again "
                    f"and give each a folder of its own, enable_group_offload(offload_to_disk_path=...)"
                )
        for path, group in files[name].items():
            if not _holds(path, {key: tuple(tensor.shape) for key, tensor in group.key_to_tensor.items()}):
                raise ValueError(
                    f"{path} does not hold the weights of {name} that group offload would read from it; diffusers "
                    f"keeps the files that it finds, even those of before a LoRA: load the pipeline again and offload "
                    f"it to an empty folder"
                )


def _holds(path: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return shapes == {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


@contextmanager
def without_other_hooks(transformers: Iterable[nn.Module], pipe: DiffusionPipeline | None) -> Iterator[None]:
    """Offloading and context parallel wrap `forward` as our hooks do: off while ours change, and outside of them after.

    Offloading has noted which weights there are, and context parallel splits the tables that ours make. Whatever is
    raised meanwhile, they are put back. The weights of embedders and heads are there, though they were on disk.
    """
    with ExitStack() as put_back:
        if pipe is not None:
            _set_model_offload_aside(pipe, put_back)
        for transformer in transformers:
            if pipe is None:
                _set_accelerate_aside(transformer, put_back)
            _set_group_offload_aside(transformer, put_back)
            if (parallel := context_parallel_config(transformer)) is not None:
                remove_context_parallel(transformer, transformer._cp_plan)
                put_back.callback(apply_context_parallel, transformer, parallel, transformer._cp_plan)
        yield


def _set_model_offload_aside(pipe: DiffusionPipeline, put_back: ExitStack) -> None:
    # It may have been asked of another pipeline with the same components, which then knows the device.
    hooks = [part._hf_hook for part in pipe.components.values() if hasattr(part, "_hf_hook")]
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    device = getattr(pipe, "_offload_device", None) or next(iter(devices), None)
    model_offload, sequential_offload, _ = _func_optionally_disable_offloading(pipe)
    if model_offload:
        put_back.callback(pipe.enable_model_cpu_offload, device=device)
    elif sequential_offload:
        put_back.callback(pipe.enable_sequential_cpu_offload, device=device)


def _set_accelerate_aside(transformer: nn.Module, put_back: ExitStack) -> None:
    """Of a bare transformer, whose pipeline may be offloaded: its hook would put back the forward of before ours."""
    if (hook := getattr(transformer, "_hf_hook", None)) is None:
        return
    parts = [part._hf_hook for part in transformer.modules() if part is not transformer and hasattr(part, "_hf_hook")]
    aligned = [part for part in parts if isinstance(part, AlignDevicesHook)]
    remove_hook_from_module(transformer, recurse=True)
    if aligned:
        put_back.callback(
            cpu_offload, transformer, aligned[0].execution_device, offload_buffers=bool(transformer._parameters)
        )
    else:
        put_back.callback(add_hook_to_module, transformer, hook)


def _set_group_offload_aside(transformer: nn.Module, put_back: ExitStack) -> None:
    if (top := _get_top_level_group_offload_hook(transformer)) is None:
        return
    hooks, registry = _group_hooks(transformer), HookRegistry.check_if_exists_or_initialize(transformer)
    untraced = registry.get_hook(_LAZY_PREFETCH_GROUP_OFFLOADING) is not None
    for name in (_LAZY_PREFETCH_GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER, _GROUP_OFFLOADING):
        registry.remove_hook(name, recurse=True)
    if top.config.offload_to_disk_path is None:
        put_back.callback(_apply_group_offloading, transformer, top.config)
        return
    put_back.callback(_back_to_disk, transformer, hooks, untraced)
    family = family_of(transformer)
    weights = {w for path in (family.embedder, family.head) for w in transformer.get_submodule(path).parameters()}
    for group in dict.fromkeys(hook.group for _, hook in hooks):
        if not weights.isdisjoint(group.tensor_to_key):
            group.onload_()


def _back_to_disk(transformer: nn.Module, hooks: list[tuple[nn.Module, GroupOffloadingHook]], untraced: bool) -> None:
    """The same groups over the same files, which hold what they have always held; our LoRA stays on the device.

    Made anew, as for an offload to memory, they would take weights that nobody has read, and files of other tensors.
    """
    present = set(transformer.modules())
    for module, hook in hooks:
        if module in present:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _GROUP_OFFLOADING)
    if untraced:
        transformer._diffusers_hook.register_hook(LazyPrefetchGroupOffloadingHook(), _LAZY_PREFETCH_GROUP_OFFLOADING)
    on_disk = {tensor for _, hook in hooks for tensor in hook.group.tensor_to_key}
    device = hooks[0][1].config.onload_device
    for parameter in transformer.parameters():
        if parameter not in on_disk:
            parameter.data = parameter.data.to(device)
