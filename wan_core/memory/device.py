"""What a device and this machine have left."""

import psutil
import torch

GIB = 1024**3


def free_bytes(device: torch.device) -> int | None:
    """Bytes that new tensors could take on `device`: unused ones, and those that torch keeps for itself but does not
    use. None where there is no card whose memory could run out.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None


def used_bytes(device: torch.device) -> int:
    """Bytes in use on `device` by all programs."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] - free_bytes(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return 0


def available_bytes(device: torch.device, limit: float | None) -> float | None:
    """Bytes that may be taken on `device` so that not more than `limit` GiB are in use there; None without a bound."""
    return free_bytes(device) if limit is None else limit * GIB - used_bytes(device)


def available_ram() -> int:
    """Bytes of host memory that programs could still take without swapping."""
    return psutil.virtual_memory().available
