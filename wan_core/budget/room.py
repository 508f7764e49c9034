"""How much of a device a phase of work may use, and encoders placed within it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..memory.device import GIB, installed_ram, used_bytes
from ..memory.plan import place
from ..memory.residency import Residency
from ..runtime import Runtime
from ..settings import MemorySettings
from ..types import VideoSize
from .vae import WORKSPACE_BYTES

IMAGE_ENCODER_BYTES = 64 * 2**20
"""Activations of CLIP ViT-H/14 for one picture of 257 tokens: its widest tensor, 257 x 5120, is 5 MiB in float32."""


def size_held(width: int, height: int, num_frames: int) -> VideoSize:
    """`VideoSize.rounded`, of a video that this machine can hold at one byte per colour, the least that any work on it
    takes.

    Raises:
        ValueError: it cannot, or `VideoSize.rounded` refuses a number.
    """
    size = VideoSize.rounded(width, height, num_frames)
    held, memory = 3 * size.width * size.height * size.num_frames, installed_ram()
    if held > memory:
        raise ValueError(
            f"A video of width {size.width}, height {size.height} and num_frames {size.num_frames} has "
            f"{held / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB of memory. Choose a smaller size or fewer "
            "frames."
        )
    return size


def limited(runtime: Runtime, memory: MemorySettings) -> Runtime:
    """`runtime` on a device of which `memory.vram_limit` may be in use; a limit of 0 speaks of weights only."""
    if not memory.vram_limit:
        return runtime
    limit = memory.vram_limit * GIB

    def left(device: torch.device) -> float:
        below_limit = limit - used_bytes(device)
        free = runtime.memory_left(device)
        return below_limit if free is None else min(free, below_limit)

    return replace(runtime, memory_left=left)


def available(module: nn.Module, runtime: Runtime, memory: MemorySettings, wanted: float) -> float | None:
    """Bytes that work with `module` may use on the device; the host is asked first when `wanted` are more.

    What is there of the module's own weights counts as available. None without a bound.
    """
    if memory.vram_limit == 0:
        return 0
    own = Residency.of(module).bytes_on(runtime.device)
    left = runtime.room(wanted - own)
    return None if left is None else left + own


@contextmanager
def encoder_at_work(
    module: nn.Module, runtime: Runtime, memory: MemorySettings, activations: int, *, keep: bool = False
) -> Iterator[nn.Module]:
    """An encoder on the device inside the block; blocks that do not fit there are streamed.

    Args:
        activations: peak bytes of a pass beside the weights.
        keep: leave the weights on the device for the next use.
    """
    inventory, beside = Residency.of(module).inventory(), activations + WORKSPACE_BYTES
    bound = available(module, runtime, memory, inventory.bytes + beside)
    placement = place(inventory, None if bound is None else bound - beside)
    with Residency.of(module).working(runtime.device, placement, keep=keep):
        yield module
