"""How a run was launched: what splits its weights and its moments, and in what precision it computes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

Found = TypeVar("Found")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP splits the weights: then every process has a part in what the model does."""
    return accelerator.distributed_type == DistributedType.FSDP


def is_zero(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def autocast(accelerator: Accelerator):
    """Operations in half precision, if that was asked for: accelerate's own, which does nothing with DeepSpeed."""
    if not is_zero(accelerator):
        return accelerator.autocast()
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=accelerator.mixed_precision == "bf16")


def from_main(accelerator: Accelerator, find: Callable[[], Found]) -> Found:
    """What the main process finds, in all processes: the others wait, and do not look for it themselves.

    A ValueError in the main process is raised in all of them.
    """
    found: list = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = find()
        except ValueError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return found[0]
