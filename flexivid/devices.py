"""What is asked of the machine: its cores, its memory."""

import os
import sys

import psutil
import torch

# Dense, with 16-bit operands summed in float32, by the makers' data sheets; names as CUDA gives them. Laptop and export
# versions, and parts of a GPU, have names of their own and are slower.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA L4": 121,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOPs a second that a GPU can do on 16-bit operands, None for a device without an entry in PEAK_TFLOPS."""
    if device.type != "cuda" or (peak := PEAK_TFLOPS.get(torch.cuda.get_device_name(device))) is None:
        return None
    return peak * 1e12


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
