"""Host and device memory in use."""

import psutil
import torch

GIB = 1024**3


def used_bytes(device: torch.device) -> int:
    """Bytes in use on `device` by all programs, without what torch keeps for reuse; 0 where that is not known."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device) + torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return 0


def installed_ram() -> int:
    """Bytes of host memory of this machine, swap included."""
    return psutil.virtual_memory().total + psutil.swap_memory().total


def available_ram() -> int:
    """Bytes of host memory that programs could still take without swapping."""
    return psutil.virtual_memory().available
