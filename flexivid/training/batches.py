"""Which clips of a step a process computes, and the randomness of a step."""

import torch
from accelerate import Accelerator

from flexivid.training.config import Config


def clips_per_part(config: Config, count: int, processes: int) -> int:
    """How many clips of `count` a process has in memory at once. Raises ValueError if they cannot be split evenly."""
    share, rest = divmod(count, processes * config.micro_batches)
    if rest:
        raise ValueError(
            f"a batch of {count} clips cannot be split evenly over {processes} processes and {config.micro_batches} "
            f"micro-batches"
        )
    return share


def global_batch_slice(accelerator: Accelerator, config: Config, count: int, micro_batch: int) -> slice:
    """The rows of a batch of `count`, drawn identically in every process, that this process computes now."""
    share = clips_per_part(config, count, accelerator.num_processes)
    part = accelerator.process_index * config.micro_batches + micro_batch
    return slice(part * share, (part + 1) * share)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: the same at every number of processes and after every resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
