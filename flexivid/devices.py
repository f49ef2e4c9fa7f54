"""Threads of a process that shares a CPU with others, and the memory that it has used."""

import os
import resource

import torch


def share_cores(processes: int) -> None:
    """Give this process its share of the cores it may use, of `processes` on this machine.

    Launchers leave one thread a process unless told otherwise; on a CPU that is half the speed or worse.
    """
    # A container or taskset may allow fewer than there are; macOS cannot tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(cores // processes, 1))


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: of the GPU where it uses one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
