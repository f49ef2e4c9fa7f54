"""Tensors wherever they lie: of several processes, of a module, in the arguments of a forward."""

import hashlib
from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or with FSDP that of all processes; every one of them has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a module's weights but LoRA, in the half precision in which they are shipped."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if "lora_" not in name:
            digest.update(tensor.half().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def on_rows(conditions: dict, change: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    """Changes what a dictionary of arguments holds for each clip; tables, sizes and numbers stay as they are."""
    return {name: change(value) if torch.is_tensor(value) else value for name, value in conditions.items()}
