"""What is enabled: the transformers of a pipeline, and who runs them."""

from typing import TypeAlias

from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn
from torch._dynamo import OptimizedModule

from flexivid.model.family import COMPONENTS
from flexivid.model.hooks import attached
from flexivid.model.surroundings import SHARED
from flexivid.sampling.runner import PipelineRunner

Pipeline: TypeAlias = DiffusionPipeline | ModularPipeline


def components_of(target: Pipeline | nn.Module) -> dict[str, nn.Module]:
    """The transformers by component name, as the target holds them."""
    if isinstance(target, Pipeline):
        found = {name: getattr(target, name, None) for name in COMPONENTS}
        found = {name: module for name, module in found.items() if module is not None}
        if not found:
            raise ValueError(f"{type(target).__name__} has no transformer; flexivid works on diffusion transformers")
        return found
    return {"transformer": target}


def transformers_of(target: Pipeline | nn.Module) -> dict[str, nn.Module]:
    """The transformers to flexify, without what `torch.compile(transformer)` has put around them."""
    components = components_of(target).items()
    return {name: part._orig_mod if isinstance(part, OptimizedModule) else part for name, part in components}


def runner_of(transformer: nn.Module) -> PipelineRunner | None:
    """Of a transformer that is enabled through a pipeline."""
    flex = attached(transformer)
    return flex.runner if flex is not None and isinstance(flex.runner, PipelineRunner) else None


def _holds(pipe: Pipeline | None, transformer: nn.Module) -> bool:
    parts = (getattr(pipe, name, None) for name in COMPONENTS)
    return any(transformer in (part, getattr(part, "_orig_mod", None)) for part in parts if part is not None)


def check_not_shared(target: Pipeline | nn.Module) -> None:
    """Raises ValueError if a transformer is enabled through another pipeline, which still has it."""
    for transformer in transformers_of(target).values():
        runner = runner_of(transformer)
        if runner and runner.pipe is not target and _holds(runner.pipe, transformer):
            raise ValueError(SHARED)
