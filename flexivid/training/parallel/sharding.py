"""FSDP2 through accelerate: every process holds a part of the weights, and gathers a block when it runs.

What is saved and loaded are whole tensors, so that a run goes on with or without it, at any number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from flexivid.training.config import Config
from flexivid.training.parallel.launch import is_sharded, is_zero
from flexivid.training.parallel.zero import check_zero


def check_sharding(accelerator: Accelerator, config: Config) -> None:
    """Raises ValueError for launches and configs that cannot be trained together."""
    if config.objective == "few" and is_zero(accelerator):
        raise ValueError(
            "few runs on one process, on several that each hold the model, or with FSDP; not with DeepSpeed"
        )
    if config.objective == "few" and accelerator.mixed_precision == "fp16":
        raise ValueError("few takes mixed_precision bf16 or no, not fp16, whose scale would be that of two losses")
    if is_zero(accelerator):
        check_zero(accelerator, config)
    if not is_sharded(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise ValueError("only version 2 of FSDP is supported: fsdp_version: 2 in accelerate's config")
    if config.objective not in ("distill", "few") or config.optim.name != "adamw":
        raise ValueError(
            "with FSDP, objective must be distill or few and optim.name adamw, "
            f"not {config.objective} and {config.optim.name}"
        )
    if config.compile or config.distill.on_policy:
        raise ValueError("with FSDP there is neither compile nor distill.on_policy yet: --compile false")
    # FSDP's would cast timesteps, rotary tables and predictions to half precision too: autocast does as without FSDP.
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def block_classes(transformer: torch.nn.Module) -> list[str]:
    """Names of the classes of the repeated blocks, which FSDP gathers one at a time."""
    lists = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
    return list(dict.fromkeys(type(block).__name__ for blocks in lists for block in blocks))


def part_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a whole tensor of a parameter's shape."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


@contextmanager
def outer_weights(model: torch.nn.Module) -> Iterator[None]:
    """What is in no block is whole inside, for forwards that do not come through `model`; blocks gather themselves."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
