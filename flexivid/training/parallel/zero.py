"""ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054), stages 1 and 2, of DeepSpeed through accelerate.

Every process holds a part of the optimiser's moments, and with stage 2 of the gradients. What is saved and loaded are
whole tensors, so that a run goes on with or without it, at any number of processes. It is not quite the same run: what
has no gradient in a step, such as a weak mode that is not drawn, has one of zero here, and AdamW goes on to move it.
"""

from importlib.metadata import version

import torch
from accelerate import Accelerator

from flexivid.training.config import Config

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW calls them
LEAST_VERSION = (0, 19)  # older ones may not know torch_autocast, and leave precision as it is without a word
BUCKET = 500_000_000  # gradients that are summed over processes at once: DeepSpeed's own number


def check_zero(accelerator: Accelerator, config: Config) -> None:
    """Raises ValueError for launches and configs that cannot be trained together."""
    plugin, installed = accelerator.state.deepspeed_plugin, version("deepspeed")
    if tuple(int(part) for part in installed.split(".")[:2]) < LEAST_VERSION:
        raise ValueError(f"DeepSpeed {installed} is too old: pip install 'deepspeed>=0.19.8'")
    if plugin.zero_stage not in (1, 2):
        raise ValueError(
            f"of DeepSpeed only stages 1 and 2 of ZeRO are supported, not {plugin.zero_stage}: "
            f"configs/accelerate/fsdp.yaml splits weights"
        )
    if plugin.offload_optimizer_device not in (None, "none"):
        raise ValueError(f"offload_optimizer_device must be none, not {plugin.offload_optimizer_device}")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("with DeepSpeed, mixed_precision must be bf16 or no, not fp16")
    if config.optim.name != "adamw":
        raise ValueError(f"with DeepSpeed, optim.name must be adamw, not {config.optim.name}")


def prepare_zero(accelerator: Accelerator, config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
    """What `accelerator.prepare` gives. What is trained stays in float32, and operations are in bfloat16 where it is
    asked for, as without DeepSpeed, whose own way is to halve all weights and to keep float32 copies."""
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    # Batch sizes are asked for, and do nothing without a data loader of DeepSpeed's.
    settings["train_micro_batch_size_per_gpu"] = 1
    settings["train_batch_size"] = config.micro_batches * accelerator.num_processes
    settings["gradient_accumulation_steps"] = config.micro_batches
    settings["gradient_clipping"] = config.optim.clip
    trained = sum(weight.numel() for weight in optimizer.param_groups[0]["params"])
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        settings["zero_optimization"][bucket] = min(BUCKET, trained)  # is allocated, however little is trained
    half = settings["bf16"]
    settings["bf16"] = {"enabled": False}
    # No module is safe: gradients are summed over processes in float32.
    settings["torch_autocast"] = {**half, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    engine, optimizer = accelerator.prepare(model, optimizer)
    # It steps within `backward`, and leaves a step out that is not finite; by itself it looks only at half precision.
    optimizer.optimizer.check_grad_overflow = True
    settings["bf16"] = half  # accelerate reads off it what the launch has asked for
    return engine, optimizer


def whole_moments(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], main: bool) -> dict[int, dict]:
    """The state of AdamW by number of parameter, as if it were not split: on the CPU of the main process, others none.

    All processes have to ask for it. Weight by weight, because all of them may not fit on a GPU.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    (partition,) = optimizer.param_groups[0]["params"]  # all weights of this process as one
    state = optimizer.state[partition]
    states = {}
    for i, weight in enumerate(weights if state else []):  # none: no step has had a finite gradient yet
        moments = {key: safe_get_full_optimizer_state(weight, key) for key in MOMENTS}
        if main:
            states[i] = {"step": state["step"]} | {key: moment.cpu() for key, moment in moments.items()}
    return states


def restore_zero(zero_optimizer, weights: list[torch.nn.Parameter], states: dict[int, dict]) -> None:
    """Gives ZeRO what a checkpoint holds: weights, which it has a copy of, and AdamW's state by number of parameter.

    zero_optimizer: DeepSpeed's. A weight without a state, which has never had a gradient, gets moments of zero.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for weight in weights:
        safe_set_full_fp32_param(weight, weight.detach())
    if not states:
        return
    (partition,) = zero_optimizer.optimizer.param_groups[0]["params"]
    step = max(state["step"] for state in states.values())
    zero_optimizer.optimizer.state[partition] = {"step": step} | {key: torch.zeros_like(partition) for key in MOMENTS}
    zero_optimizer._lazy_init_hp_params_optimizer_state()  # otherwise at the first step
    for i, state in states.items():
        for key in MOMENTS:
            safe_set_full_optimizer_state(weights[i], state[key].to(partition.device), key)
