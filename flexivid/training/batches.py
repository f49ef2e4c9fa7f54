"""Which clips of a step a process computes, and the randomness of a step."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from flexivid.tensors import on_rows
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


def own_rows(accelerator: Accelerator, config: Config, count: int) -> slice:
    """The rows of a batch of `count`, drawn identically in every process, that this process reads and computes."""
    share = clips_per_part(config, count, accelerator.num_processes) * config.micro_batches
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def micro_batch_rows(config: Config, count: int, micro_batch: int) -> slice:
    """Which of the `count` rows of a process are those of a micro-batch."""
    share = count // config.micro_batches
    return slice(micro_batch * share, (micro_batch + 1) * share)


def on_values(values: tuple, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
    """Changes the tensors of a batch, those in its dictionaries of conditions too."""
    return tuple(on_rows(value, change) if isinstance(value, dict) else change(value) for value in values)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: the same at every number of processes and after every resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
