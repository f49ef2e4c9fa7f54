"""How a run was launched: what splits its weights and its moments, and in what precision it computes."""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


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
