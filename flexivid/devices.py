"""Threads of a process that shares a CPU with others."""

import os

import torch


def share_cores(processes: int) -> None:
    """Give this process its share of the cores it may use, of `processes` on this machine.

    Launchers leave one thread a process unless told otherwise; on a CPU that is half the speed or worse.
    """
    # A container or taskset may allow fewer than there are; macOS cannot tell.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(cores // processes, 1))
