"""What the gpu mode measures with: a device's clock and memory, and models with random weights made on it."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tests.sampling.runs import sample
from wan_core.catalog import find_row, published_config
from wan_core.models.config import DiTConfig, VAEConfig
from wan_core.models.dit import WanDiT
from wan_core.offload.blocks import used_bytes, weights_of
from wan_core.runtime import Runtime
from wan_core.settings import SamplerSettings
from wan_core.types import Conditioning, LatentSize


@dataclass(frozen=True)
class Scale:
    """The shapes of a run: the true ones, or tiny ones that show that the script works."""

    small: DiTConfig
    large: DiTConfig
    vae: VAEConfig
    latent: LatentSize
    product: int
    budgets: tuple[float, ...]
    names: tuple[str, str] = ("1.3B 480p", "14B 480p")

    @property
    def tokens(self) -> int:
        return self.latent.frames * (self.latent.height // 2) * (self.latent.width // 2)


TRUE = Scale(
    *(published_config(find_row(f"Wan-AI/Wan2.1-T2V-{size}")) for size in ("1.3B", "14B")),
    VAEConfig(),
    LatentSize(21, 60, 104),
    8192,
    (24, 16, 12, 8, 6),
)
_TINY = DiTConfig(dim=256, ffn_dim=512, num_layers=2, text_dim=64, freq_dim=64)
TINY = Scale(
    _TINY,
    replace(_TINY, num_layers=3),
    VAEConfig(base_dim=16),
    LatentSize(2, 8, 8),
    256,
    (0,),
    ("tiny", "tiny, 3 blocks"),
)


class Device:
    """A device with its clock and its memory. On a CPU memory is not known and reads NaN."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self.dtype = torch.bfloat16

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """The median time of a call, after one that warms up."""
        run()
        times = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return median(times)

    def clear(self) -> None:
        """Give back what nobody holds, and begin to look for a new peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak(self) -> float:
        """Most bytes that this process has reserved since `clear`, with what others hold."""
        if not self.is_cuda:
            return float("nan")
        others = used_bytes(self.torch) - torch.cuda.memory_allocated(self.torch)
        return torch.cuda.max_memory_reserved(self.torch) + others

    def allocated(self) -> float:
        """Most bytes in tensors since `clear`."""
        return torch.cuda.max_memory_allocated(self.torch) if self.is_cuda else float("nan")


def filled(module: nn.Module, device: torch.device) -> nn.Module:
    """A module from the meta device with random weights, made on `device`: activations keep their size in it, so that
    clocks and kernels see what trained weights would show them."""
    module = module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in weights_of(module).items():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))
    return module.requires_grad_(False).eval()


def random_dit(config: DiTConfig, device: torch.device) -> WanDiT:
    """A DiT of that structure in bfloat16, modulations in float32, as loading gives it."""
    with torch.device("meta"):
        dit = WanDiT(config).to(torch.bfloat16)
    for name, weight in dit.named_parameters():
        if name.endswith("modulation"):
            weight.data = weight.data.float()
    return filled(dit, device)


def random_conditioning(config: DiTConfig, device: Device) -> Conditioning:
    text, negative = (torch.randn(1, 512, config.text_dim, device=device.torch) for _ in range(2))
    return Conditioning(text=text, negative_text=negative)


@dataclass(frozen=True)
class Run:
    """A sampling run: the time of each step, the first of which warms up, and the passes through the blocks."""

    steps: tuple[float, ...]
    passes: int

    @property
    def step(self) -> float:
        """The median of all steps but the first."""
        return median(self.steps[1:] or self.steps)

    @property
    def total(self) -> float:
        return sum(self.steps)


def sampled(
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    device: Device,
    steps: int,
    settings: SamplerSettings | None = None,
    **changes: Any,
) -> Run:
    """A run of so many guided steps, each timed."""
    times, passes, original = [], [], dit.run_blocks
    device.wait()
    clock = [time.perf_counter()]

    def on_progress(*_: object) -> None:
        device.wait()
        now = time.perf_counter()
        times.append(now - clock[0])
        clock[0] = now

    def run_blocks(states: list[Any], *arguments: Any) -> None:
        passes.append(len(states))
        original(states, *arguments)

    settings = settings or SamplerSettings(steps=steps, **changes)
    dit.run_blocks = run_blocks
    try:
        runtime = Runtime(device=device.torch, dtype=dit.dtype, on_progress=on_progress)
        sample(dit, cond, size, settings, runtime)
    finally:
        del dit.run_blocks
    return Run(tuple(times), sum(passes))


def read_seconds(path: Path, chunk: int = 2**24) -> float:
    """The time of reading a file from one end to the other into a buffer in memory."""
    buffer = bytearray(chunk)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def forward_of(model: nn.Module, latents: Tensor, text: Tensor) -> Callable[[], None]:
    """A guided step of a diffusers transformer: two forwards."""
    time_ = torch.full((1,), 500.0, device=latents.device)

    def step() -> None:
        with torch.no_grad():
            for _ in range(2):
                model(hidden_states=latents, timestep=time_, encoder_hidden_states=text, return_dict=False)

    return step


def unavailable(problem: Exception) -> str:
    """One line about why something could not be measured."""
    with suppress(IndexError):
        return str(problem).splitlines()[0][:200]
    return type(problem).__name__
