"""What a sampling run will take on a device, and the settings with which it fits."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..lora.apply import LoraUse
from ..models.dit import WanDiT
from ..models.embedders import MotionController
from ..offload.blocks import weight_bytes
from ..offload.placement import Inventory, Placement, place
from ..offload.weights import WeightProvider
from ..runtime import GIB, gigabytes
from ..sampling.solvers import build_solver
from ..sampling.windows import window_of
from ..settings import MemorySettings, SamplerSettings
from ..tiling import Span
from ..types import Conditioning, LatentSize, tensors_in
from .encoders import WORKSPACE_BYTES
from .estimate import META, Residuals, kept_bytes, kept_share, pass_flops, step_bytes

FRAGMENTATION = 0.03
"""Share of the counted activations that the caching allocator loses between blocks of memory. An allowance."""

WORTH_KEEPING = 0.01
"""The least share of a step that keys and values of cross-attention must take to be kept. 81 frames at 480p are below
it, where keeping them would take more memory than everything else but the weights.
"""

FLOPS_PER_SECOND = 155e12
COPIED_PER_SECOND = 25e9
"""What an RTX 4090 computes in bfloat16 and receives over PCIe 4; only for the share of copies that are hidden."""


@dataclass(frozen=True)
class RunPlan:
    """Where the weights of a DiT are during a run, and what it takes.

    Attributes:
        settings: those of the run; the guidance mode, and where a cache keeps its tensors, may be chosen by the plan.
        placement: of the DiT's weights.
        activations: bytes of everything else on the device at the peak, as counted.
        allowance: bytes for what cannot be counted: workspaces of kernels, and what the allocator loses.
        available: bytes that the run may use, None without a limit.
        flops: of one step, of all its evaluations and branches.
        evaluations: how often a step evaluates the model; the last step may do so less often.
    """

    settings: SamplerSettings
    placement: Placement
    activations: int
    allowance: int
    available: float | None
    flops: float
    evaluations: int = 1

    @property
    def peak_bytes(self) -> int:
        return self.placement.device_bytes + self.activations + self.allowance

    def within(self, available: float | None, memory: MemorySettings) -> "RunPlan":
        """The same run in `available` bytes of the device, with `memory`'s buffer or count of parameters."""
        buffer = self.activations + self.allowance if memory.vram_buffer is None else memory.vram_buffer * GIB
        budget = None if available is None or memory.persistent_params is not None else available - buffer
        placement = place(self.placement.inventory, budget, memory.persistent_params)
        return dataclasses.replace(self, placement=placement, available=available)

    @property
    def missing(self) -> float:
        """Bytes that the run needs beyond those available; 0 when it fits."""
        return 0 if self.available is None else max(0, self.peak_bytes - self.available)

    @property
    def passes_per_step(self) -> int:
        """How often the blocks are copied for one step."""
        guidance = self.settings.guidance
        return self.evaluations * (guidance.branches if guidance.mode == "sequential" else 1)

    @property
    def copied_per_step(self) -> int:
        return self.placement.streamed_bytes * self.passes_per_step

    @property
    def hidden(self) -> float:
        """The share of the copies that computation hides, 0 to 1, at the speeds assumed above."""
        if not self.copied_per_step:
            return 1.0
        return min(1.0, self.flops / FLOPS_PER_SECOND / (self.copied_per_step / COPIED_PER_SECOND))

    def summary(self) -> str:
        """In words, for the log."""
        text = f"{self.placement.summary()}; at most {gigabytes(self.peak_bytes)} on the device"
        return text if not self.missing else f"{text}, {gigabytes(self.missing)} more than it may use"


def plan_run(
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    memory: MemorySettings,
    request_memory: Callable[[float], float | None],
    motion_controller: MotionController | None = None,
    loras: Sequence[LoraUse] = (),
) -> RunPlan:
    """The plan of the fewest copied bytes for a run of `settings`.

    `sequential` guidance becomes `interleaved`, which computes the same, when weights are streamed and it saves copies.

    Args:
        cond: fitted to the model; its tensors may lie anywhere, also on the meta device.
        request_memory: from the bytes that a run wants to those of the device that it may use; None without a limit.
    """
    inventory, given = dit_inventory(dit, cond), tuple(loras)
    plan = _counted(dit, inventory, cond, size, settings, motion_controller, given)
    available = request_memory(plan.peak_bytes)
    plan = plan.within(available, memory)
    if not plan.placement.streamed:
        return _keeping(plan, dit, cond, size, memory, given)
    if settings.guidance.mode != "sequential" or settings.guidance.branches == 1:
        return plan
    other = _counted(dit, inventory, cond, size, interleaved(settings), motion_controller, given)
    return min(plan, other.within(available, memory), key=lambda plan: (plan.missing, plan.copied_per_step))


def interleaved(settings: SamplerSettings) -> SamplerSettings:
    """The same run with both branches passing each block before the next."""
    return dataclasses.replace(settings, guidance=dataclasses.replace(settings.guidance, mode="interleaved"))


def placed_run(
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    memory: MemorySettings,
    loras: Sequence[LoraUse] = (),
) -> RunPlan:
    """The plan of a run that nothing but `memory.persistent_params` bounds; its activations are not counted."""
    placement = place(dit_inventory(dit, cond), None, memory.persistent_params)
    sequential = settings.guidance.mode == "sequential" and settings.guidance.branches == 2
    settings = interleaved(settings) if placement.streamed and sequential else settings
    plan = RunPlan(settings, placement, 0, 0, None, 0.0)
    return plan if memory.persistent_params is not None else _keeping(plan, dit, cond, size, memory, loras)


def _keeping(
    plan: RunPlan,
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    memory: MemorySettings,
    loras: Sequence[LoraUse],
) -> RunPlan:
    """`plan`, keeping keys and values of cross-attention over the steps where that pays and all weights still fit."""
    settings, windows = plan.settings, plan.settings.windows
    windowed = windows is not None and windows.mode == "blend" and windows.size < size.frames
    if windowed or settings.total_steps == 1 or not all(use.constant for use in loras):
        return plan
    if kept_share(dit.config, size.shape, cond.encoded_text.shape[1]) < WORTH_KEEPING:
        return plan
    kept = kept_bytes(dit.config, cond, dit.dtype, settings.guidance)
    settings = dataclasses.replace(settings, keep_projections=True)
    keeping = dataclasses.replace(plan, settings=settings, activations=plan.activations + kept)
    keeping = keeping.within(plan.available, memory)
    return plan if keeping.placement.streamed or keeping.missing else keeping


def dit_inventory(dit: WanDiT, cond: Conditioning) -> Inventory:
    """The weights of `dit` as a run with `cond` uses them: without a VACE input its VACE blocks are idle."""
    order = dit.block_order()
    return WeightProvider.of(dit).inventory(
        order, [] if cond.vace else [p for p in order if p.startswith("vace_blocks.")]
    )


def _counted(
    dit: WanDiT,
    inventory: Inventory,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    motion_controller: MotionController | None,
    loras: Sequence[LoraUse],
) -> RunPlan:
    """The plan with all weights on the device."""
    cond = cond.map(lambda tensor, _: torch.empty_like(tensor, device=META))
    beside = sum(tensor.nbytes for tensor in tensors_in(cond)) + _lora_bytes(loras, dit.dtype)
    prefix, frames, windows = cond.prefix_frames(size.frames), size.frames, settings.windows
    if windows is not None and windows.size < frames:
        frames = windows.size
        cond = window_of(cond, Span(0, frames, True, False), prefix)
    window = (prefix + frames, size.height, size.width)
    activations = step_bytes(dit, cond, window, settings.guidance, _residuals(settings, size), motion_controller)
    beside += 0 if motion_controller is None else weight_bytes(motion_controller)
    evaluations = max(map(len, build_solver(settings).evaluations))
    # Between its evaluations a solver holds the first velocity and the latents that it led to, in float32.
    held = 2 * (evaluations - 1) * prod((len(cond.encoded_text), dit.config.out_channels, prefix + size.frames))
    activations += beside + held * size.height * size.width * torch.float32.itemsize
    allowance = WORKSPACE_BYTES + int(activations * FRAGMENTATION)
    flops = evaluations * settings.guidance.branches * pass_flops(dit.config, window, vace_inputs=len(cond.vace or ()))
    return RunPlan(settings, Placement(inventory), activations, allowance, None, flops, evaluations)


def _residuals(settings: SamplerSettings, size: LatentSize) -> Residuals:
    if settings.cache is None:
        return "none"
    windows = settings.windows
    blended = windows is not None and windows.mode == "blend" and windows.size < size.frames
    return "host" if settings.cache.residual_on_cpu or blended else "device"


def _lora_bytes(loras: Sequence[LoraUse], dtype: torch.dtype) -> int:
    """Of the factors of branches beside the layers, if all LoRAs are applied that way."""
    return sum(
        tensor.numel() * dtype.itemsize
        for use in loras
        for _, patch in use.bound.patches
        for tensor in patch.tensors().values()
    )
