"""What a sampling run takes on a device, and the placement of weights with which it fits."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..lora.apply import LoraUse
from ..models.config import HEAD_DIM, DiTConfig
from ..models.dit import WanDiT
from ..models.layers import MotionController
from ..offload.blocks import used_bytes, weight_bytes
from ..offload.streaming import Inventory, Placement, place
from ..offload.weights import WeightProvider
from ..parallel.layout import ALONE, Exchange, Layout
from ..runtime import GIB, Runtime, gigabytes
from ..sampling.compose import build_solver
from ..sampling.split import layout_of
from ..sampling.windows import window_of
from ..settings import MemorySettings, SamplerSettings
from ..tiling import Span, plan_spans
from ..types import Conditioning, LatentSize, tensors_in
from .encoders import WORKSPACE_BYTES, memory_for
from .estimate import Residuals, kept_bytes, kept_share, pass_flops, step_bytes

FRAGMENTATION = 0.03
"""Share of the counted activations allowed for what the caching allocator loses between blocks of memory."""

WORTH_KEEPING = 0.01
"""Keys and values of cross-attention are kept over the steps if making them takes at least this share of a step. It is
less for 81 frames at 480p, where they would take more memory than everything else but the weights.
"""

FLOPS_PER_SECOND = 155e12
COPIED_PER_SECOND = 25e9
"""What an RTX 4090 computes in bfloat16 and receives over PCIe 4; used only for `RunPlan.hidden`."""


@dataclass(frozen=True)
class RunPlan:
    """Where the weights of a DiT are during a run, and what the run takes.

    Attributes:
        settings: those of the run, with the guidance mode and `keep_projections` that the plan chose.
        placement: of the DiT's weights.
        activations: bytes of everything else on the device at the peak, as counted.
        allowance: bytes for what cannot be counted: workspaces of kernels, and what the allocator loses.
        available: bytes that the run may use, None without a limit.
        flops: of one step, of all its evaluations and branches.
        evaluations: how often a step evaluates the model; the last step may do so less often.
        layout: of the ranks that share the run. What is counted is that of one of them, the first.
        sent: bytes that it sends to the others in one step.
    """

    settings: SamplerSettings
    placement: Placement
    activations: int
    allowance: int
    available: float | None
    flops: float
    evaluations: int = 1
    layout: Layout = ALONE
    sent: int = 0

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
        alone = {"sequential": guidance.branches, "interleaved": 1, "batched": 1 + bool(guidance.skip.blocks)}
        return self.evaluations * alone[guidance.mode]

    @property
    def copied_per_step(self) -> int:
        return self.placement.streamed_bytes * self.passes_per_step

    @property
    def hidden(self) -> float:
        """The share of the copies that overlaps with computation, 0 to 1, at the speeds assumed above."""
        if not self.copied_per_step:
            return 1.0
        return min(1.0, self.flops / FLOPS_PER_SECOND / (self.copied_per_step / COPIED_PER_SECOND))

    def summary(self) -> str:
        """The plan as a line for the log."""
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
    ranks: int = 1,
) -> RunPlan:
    """The plan that copies the fewest bytes for a run of `settings`.

    When weights are streamed, `sequential` guidance becomes `interleaved` if that saves copies; results are the same.

    Args:
        cond: fitted to the model; its tensors may lie anywhere, also on the meta device.
        request_memory: from the bytes that a run wants to those of the device that it may use; None without a limit.
        ranks: how many share the run, each with such a device.
    """
    inventory, uses = dit_inventory(dit, cond), tuple(loras)
    plan = _counted(dit, inventory, cond, size, settings, motion_controller, uses, ranks)
    available = request_memory(plan.peak_bytes)
    plan = plan.within(available, memory)
    if not plan.placement.streamed:
        return _keeping(plan, dit, cond, size, memory, uses)
    if settings.guidance.mode != "sequential" or settings.guidance.branches == 1:
        return plan
    other = _counted(dit, inventory, cond, size, interleaved(settings), motion_controller, uses, ranks)
    return min(plan, other.within(available, memory), key=lambda plan: (plan.missing, plan.copied_per_step))


def plan_on(
    runtime: Runtime,
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    memory: MemorySettings,
    motion_controller: MotionController | None = None,
    loras: Sequence[LoraUse] = (),
) -> RunPlan:
    """The plan of a run on the device of `runtime`, by what is free there; arguments as of `plan_run`.

    Args:
        runtime: with `memory.vram_limit` applied (`limit_memory`).
    """
    if memory.vram_limit == 0:
        memory = dataclasses.replace(memory, vram_limit=None, persistent_params=0)
    if memory.persistent_params is not None or runtime.unbounded:
        return placed_run(dit, cond, size, settings, memory, loras)
    # The plan counts all conditioning, also what is on the device already and so is no longer free there.
    there = sum(tensor.nbytes for tensor in tensors_in(cond) if tensor.device == runtime.device)
    there = there if used_bytes(runtime.device) else 0

    def request_memory(wanted: float) -> float | None:
        left = memory_for(dit, runtime, memory, wanted - there)
        return None if left is None else left + there

    ranks = 1 if runtime.ranks is None else runtime.ranks.count
    return plan_run(dit, cond, size, settings, memory, request_memory, motion_controller, loras, ranks)


def interleaved(settings: SamplerSettings) -> SamplerSettings:
    """The same run with both branches in each block before the next one."""
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
    sequential = settings.guidance.mode == "sequential" and settings.guidance.branches > 1
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
    """`plan`, keeping keys and values of cross-attention over the steps if that pays and all weights still fit."""
    settings = plan.settings
    # With a LoRA of changing strength, keys and values are others in each step.
    varies = settings.windows_over(size.frames, "blend") is not None or not all(use.constant for use in loras)
    if varies or settings.total_steps == 1:
        return plan
    if kept_share(dit.config, size.shape, cond.encoded_text.shape[1]) < WORTH_KEEPING:
        return plan
    kept = kept_bytes(dit.config, cond, dit.dtype, settings.guidance)
    settings = dataclasses.replace(settings, keep_projections=True)
    keeping = dataclasses.replace(plan, settings=settings, activations=plan.activations + kept)
    keeping = keeping.within(plan.available, memory)
    return plan if keeping.placement.streamed or keeping.missing else keeping


def dit_inventory(dit: WanDiT, cond: Conditioning) -> Inventory:
    """The weights of `dit` that a run with `cond` uses: without a VACE input the VACE blocks are idle."""
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
    ranks: int,
) -> RunPlan:
    """The plan with all weights on the device."""
    cond = cond.on_meta()
    beside = sum(tensor.nbytes for tensor in tensors_in(cond)) + _lora_bytes(loras, dit.dtype)
    prefix, frames = cond.prefix_frames(size.frames), settings.frames_at_once(size.frames)
    if frames < size.frames:
        cond = window_of(cond, Span(0, frames, True, False), prefix)
    window = (prefix + frames, size.height, size.width)
    layout, residuals = layout_of(settings.guidance, ranks), _residuals(settings, size)
    activations = step_bytes(dit, cond, window, settings.guidance, residuals, motion_controller, layout)
    beside += 0 if motion_controller is None else weight_bytes(motion_controller)
    evaluations = max(map(len, build_solver(settings).evaluations))
    # Between its evaluations a solver holds the first velocity and the latents that it led to, in float32.
    held = 2 * (evaluations - 1) * prod((len(cond.encoded_text), dit.config.out_channels, prefix + size.frames))
    activations += beside + held * size.height * size.width * torch.float32.itemsize
    guidance, vace_inputs = settings.guidance, len(cond.vace or ())
    led = guidance.branches - guidance.has_negative if guidance.nag.is_on else 0
    flops = (guidance.branches - led) * pass_flops(dit.config, window, vace_inputs=vace_inputs)
    flops += led * pass_flops(dit.config, window, vace_inputs=vace_inputs, texts=2)
    flops *= evaluations / layout.ranks
    windows = settings.windows_over(size.frames, "blend")
    calls = evaluations * (1 if windows is None else len(plan_spans(size.frames, windows.size, windows.stride)))
    exchange = exchange_of(dit.config, window, dit.dtype, len(cond.encoded_text), vace_inputs)
    found = exchange.sent(layout, guidance.branches)
    latents = found.pop("latents", 0) * (prefix + size.frames) // window[0]
    sent = sum(found.values()) * calls + latents * evaluations
    return RunPlan(
        settings, Placement(inventory), activations, allowance_for(activations), None, flops, evaluations, layout, sent
    )


def exchange_of(
    config: DiTConfig, window: tuple[int, int, int], dtype: torch.dtype, batch: int = 1, vace_inputs: int = 0
) -> Exchange:
    """What ranks exchange about latents of `window` = (frames with those in front, rows, columns)."""
    frames, rows, columns = (side // patch for side, patch in zip(window, config.patch_size, strict=True))
    tokens = (frames + config.has_reference) * rows * columns
    blocks = config.num_layers + vace_inputs * len(config.vace_layers)
    outputs, latents = config.out_channels * prod(config.patch_size), batch * config.out_channels * prod(window)
    return Exchange(tokens, config.dim // HEAD_DIM, blocks, latents, outputs, dtype.itemsize, batch)


def allowance_for(activations: int) -> int:
    """Bytes beside counted `activations` for what cannot be counted: kernels' workspaces, the allocator's losses."""
    return WORKSPACE_BYTES + int(activations * FRAGMENTATION)


def _residuals(settings: SamplerSettings, size: LatentSize) -> Residuals:
    if settings.cache is None:
        return "none"
    blended = settings.windows_over(size.frames, "blend") is not None
    return "host" if settings.cache.residual_on_cpu or blended else "device"


def _lora_bytes(loras: Sequence[LoraUse], dtype: torch.dtype) -> int:
    """Bytes of all LoRA factors beside the layers. How each LoRA is applied is not known yet; this is the most."""
    return sum(
        tensor.numel() * dtype.itemsize
        for use in loras
        for _, patch in use.bound.patches
        for tensor in patch.tensors().values()
    )
