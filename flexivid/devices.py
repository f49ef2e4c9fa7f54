"""What is asked of the machine: its cores, its memory."""

import os
import sys

import psutil
import torch


def share_cores(processes: int) -> None:
    """Give this process its share of the cores it may use, of `processes` on this machine.

    Launchers leave one thread a process unless told otherwise; on a CPU that is half the speed or worse.
    """
    # A container or taskset may allow fewer than there are; macOS cannot tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(cores // processes, 1))


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has had on a device so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # of Unix only

    # In kilobytes, but on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
