"""What each phase of a run takes, from prompts to frames, before any weight is read."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..models.config import TEXT_TOKENS, DiTConfig
from ..models.image_encoder import ImageEncoder
from ..models.layers import MotionController
from ..models.pixel_decoder import PixelDecoder
from ..models.preview_decoder import PreviewDecoder
from ..models.text_encoder import UMT5Encoder
from ..models.vae import WanVAE
from ..offload.blocks import weight_bytes
from ..offload.streaming import Placement, place
from ..runtime import GIB
from ..sampling.compose import build_solver
from ..sampling.experts import RunModel
from ..settings import MemorySettings, SamplerSettings
from ..tiling import Tiles
from ..types import Conditioning, LatentSize, VaceInput, VideoSize, tensors_in
from .encoders import (
    IMAGE_ENCODER_BYTES,
    WORKSPACE_BYTES,
    VaePass,
    choose_tiles,
    smallest_tiles,
    strip_of,
    vae_peak_bytes,
)
from .encoders import text_peak_bytes as text_bytes
from .estimate import META
from .modules import SizedExpert, SizedModule
from .run import COPIED_PER_SECOND, FLOPS_PER_SECOND, RunPlan, plan_run


@dataclass(frozen=True, kw_only=True)
class InputSizes:
    """The inputs of a run besides text, as far as they take memory.

    Attributes:
        vace: the reference pictures of each VACE input.
        camera: whether there is a camera path.
        pictures: how many pictures CLIP reads.
        encoded_frames: the most latent frames that the VAE encodes at once; 0 encodes nothing.
    """

    vace: tuple[int, ...] = ()
    camera: bool = False
    pictures: int = 0
    encoded_frames: int = 0

    @classmethod
    def of(cls, cond: Conditioning, frames: int) -> "InputSizes":
        """Those of `cond`, which is encoded already, for a video of `frames` latent frames."""
        inputs = cond.vace or ()
        vace = (cond.prefix_frames(frames), *(0 for _ in inputs[1:])) if inputs else ()
        return cls(vace=vace, camera=cond.camera is not None)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be planned.

    Attributes:
        experts: the transformers of the video model, the noisiest first; with them comes its `motion_controller`.
        cond: conditioning of the run; None stands for tensors of the sizes that `given` says.
        text_encoder, image_encoder, vae: None where a phase is not part of the run.
        tiles: how the VAE encodes and decodes.
        decodes: whether the VAE decodes the result, or the tiny autoencoder where there is one.
        ranks: how many cards share the run. What is planned is what the first one takes.
    """

    name: str
    experts: tuple[SizedExpert, ...]
    size: VideoSize
    settings: SamplerSettings
    memory: MemorySettings = MemorySettings()
    given: InputSizes = InputSizes()
    cond: Conditioning | None = None
    motion_controller: SizedModule[MotionController] | None = None
    text_encoder: SizedModule[UMT5Encoder] | None = None
    image_encoder: SizedModule[ImageEncoder] | None = None
    vae: SizedModule[WanVAE] | None = None
    tiles: Mapping[VaePass, Tiles] = field(default_factory=lambda: {"encode": "auto", "decode": "auto"})
    decodes: bool = True
    tiny_autoencoder: SizedModule[PreviewDecoder] | None = None
    ranks: int = 1

    @property
    def config(self) -> DiTConfig:
        """The structure that all experts share."""
        return self.experts[0].module.config

    @cached_property
    def working_experts(self) -> tuple[int, ...]:
        """The numbers of the experts that take a step of this run; the weights of others are not used."""
        settings = self.settings
        model = RunModel([sized.expert for sized in self.experts])
        shares = model.shares(build_solver(settings).timesteps, range(settings.start_step, settings.last_step))
        return tuple(sorted({number for number, _ in shares}))

    @property
    def decoder(self) -> SizedModule[PixelDecoder] | None:
        """What decodes the result; None where nothing does."""
        return (self.tiny_autoencoder or self.vae) if self.decodes else None

    def named(self, what: str, expert: int) -> str:
        """`what` with the number of the expert, counted from 1, where there are several."""
        return what if len(self.experts) == 1 else f"{what}, expert {expert + 1}"

    @property
    def modules(self) -> dict[str, SizedModule[nn.Module]]:
        """The models of the run, by their role in words."""
        modules: dict[str, SizedModule[nn.Module] | None] = {
            **{self.named("video model", number): expert for number, expert in enumerate(self.experts)},
            "speed control": self.motion_controller,
            "text encoder": self.text_encoder,
            "image encoder": self.image_encoder,
            "VAE": self.vae,
            "tiny autoencoder": self.tiny_autoencoder,
        }
        return {role: module for role, module in modules.items() if module is not None}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a run. Sizes are bytes; `copied_bytes` are those of one step, or of one pass of an encoder.

    Attributes:
        peak_bytes: on the device, with an allowance for what cannot be counted.
        resident_bytes: of the weights that stay on the device during the phase.
        streamed_bytes: of the weights that pass through it.
        hidden: share of the copies that overlaps with computation, 0 to 1.
        missing: bytes beyond the limit.
        note: what else there is to know.
    """

    name: str
    peak_bytes: int
    resident_bytes: int
    streamed_bytes: int = 0
    copied_bytes: int = 0
    hidden: float = 1.0
    missing: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class WholePlan:
    """What a run takes.

    Attributes:
        limit: bytes of the device that it may use, None without one.
        ram: bytes of host memory by what they hold; Python and its libraries take about a gigabyte more.
        files: bytes of each model that stay in its file; what is read of them is in the system's file cache, not in the
            memory of the program.
        sampling: the plan of each expert that takes a step; one is on the device at a time.
    """

    job: Job
    limit: float | None
    phases: tuple[Phase, ...]
    ram: Mapping[str, int]
    files: Mapping[str, int]
    sampling: tuple[RunPlan, ...]

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())

    @property
    def missing(self) -> int:
        """Bytes that the device is too small for; 0 when the run fits."""
        return max(phase.missing for phase in self.phases)

    @property
    def fits(self) -> bool:
        return not self.missing


def plan_whole(job: Job, limit: float | None) -> WholePlan:
    """The plan of `job` on a device of which it may use `limit` bytes, less where its own memory settings say so.

    Raises:
        ValueError: two settings exclude each other.
    """
    if job.memory.vram_limit:
        limit = min(limit or math.inf, job.memory.vram_limit * GIB)
    cond = job.cond or placeholder_conditioning(job.config, job.size.latent, job.given)
    controller = None if job.motion_controller is None else job.motion_controller.module
    memory = job.memory
    if memory.vram_limit == 0:
        # Every block is streamed, and nothing else is limited.
        memory = dataclasses.replace(memory, vram_limit=None, persistent_params=0)
    sampling = {
        number: plan_run(
            job.experts[number].module, cond, job.size.latent, job.settings.of_expert(number), memory,
            lambda _: limit, controller, job.experts[number].loras, job.ranks,
        ) for number in job.working_experts
    }  # fmt: skip
    phases = [
        *_encoding(job, limit),
        *(_sampling_phase(job.named("sampling", number), plan, limit) for number, plan in sampling.items()),
    ]
    if job.decoder is not None:
        name = "VAE decoding" if job.decoder is job.vae else "decoding by the tiny autoencoder"
        resident = weight_bytes(job.decoder.module)
        phases.append(_vae_phase(name, job, job.decoder, "decode", job.size.latent, resident, limit))
    unused = {job.named("video model", number) for number in range(len(job.experts)) if number not in sampling}
    files = {role: each.file_bytes for role, each in job.modules.items() if each.file_bytes and role not in unused}
    ram = {role: size for role, size in _ram(job, cond).items() if role not in unused}
    return WholePlan(
        job=job, limit=limit, phases=tuple(phases), ram=ram, files=files, sampling=tuple(sampling.values())
    )


def placeholder_conditioning(config: DiTConfig, size: LatentSize, given: InputSizes) -> Conditioning:
    """Conditioning on the meta device, of the sizes that a run with these inputs has."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(1, *shape, device=META)

    grid, whole = (size.height, size.width), size.shape
    length = sum(given.vace) + size.frames
    stride = config.geometry.spatial_stride
    rays = (config.camera_channels, size.frames, size.height * stride, size.width * stride)
    cond = Conditioning(
        text=tensor(TEXT_TOKENS, config.text_dim),
        negative_text=tensor(TEXT_TOKENS, config.text_dim),
        image_tokens=tensor(config.num_image_tokens, config.image_dim) if config.has_image_input else None,
        concat=tensor(config.concat_channels, *whole) if config.concat_channels else None,
        reference=tensor(config.out_channels, *grid) if config.has_reference else None,
        camera=tensor(*rays) if config.camera_channels and given.camera else None,
        vace=tuple(
            VaceInput(context=tensor(config.geometry.vace_channels, length, *grid)) for _ in given.vace
        ) or None,
        motion_bucket=tensor(),
    )  # fmt: skip
    # A clean frame is the most that such a model is given: it brings a second timestep. VACE has frames of its own.
    return (
        cond.with_clean_frames(tensor(config.out_channels, 1, *grid), size.frames)
        if config.geometry.frame_times and not config.vace_layers
        else cond
    )


def _encoding(job: Job, limit: float | None) -> Iterator[Phase]:
    bound = 0 if job.memory.vram_limit == 0 else limit
    if job.text_encoder is not None:
        module = job.text_encoder.module
        activations = text_bytes(module.config, module.norm.weight.dtype, TEXT_TOKENS)
        yield _encoder_phase("text encoding", job.text_encoder, activations, 2 * TEXT_TOKENS, bound, limit)
    beside, pictures = weight_bytes(job.vae.module) if job.vae is not None else 0, job.given.pictures
    if job.image_encoder is not None and pictures:
        part, tokens = job.image_encoder, pictures * job.image_encoder.module.config.num_positions
        phase = _encoder_phase("image encoding", part, IMAGE_ENCODER_BYTES, tokens, bound, limit, beside)
        yield phase
        beside = phase.resident_bytes
    if job.vae is not None and job.given.encoded_frames:
        size = dataclasses.replace(job.size.latent, frames=job.given.encoded_frames)
        yield _vae_phase("VAE encoding", job, job.vae, "encode", size, beside, limit)


def _encoder_phase(
    name: str,
    part: SizedModule[nn.Module],
    activations: int,
    tokens: int,
    bound: float | None,
    limit: float | None,
    beside: int = 0,
) -> Phase:
    """A pass of an encoder, placed as `working_encoder` does, with `beside` bytes of other weights there."""
    beside_own = activations + WORKSPACE_BYTES + beside
    placement = place(part.inventory, None if bound is None else bound - beside_own)
    work = 2 * tokens * sum(block.parameters for block in part.inventory.blocks.values())
    copied = placement.streamed_bytes
    return _phase(
        name, placement, placement.device_bytes + beside_own, limit, copied=copied, beside=beside,
        hidden=min(1.0, work / FLOPS_PER_SECOND / (copied / COPIED_PER_SECOND)) if copied else 1.0,
    )  # fmt: skip


def _sampling_phase(name: str, plan: RunPlan, limit: float | None) -> Phase:
    asked = plan.settings.guidance
    note = f"{len(plan.placement.resident)} of {len(plan.placement.inventory.blocks)} blocks stay"
    if plan.placement.streamed and asked.branches > 1:
        note += f", guidance {asked.mode}"
    return _phase(
        name, plan.placement, plan.peak_bytes, limit, copied=plan.copied_per_step, hidden=plan.hidden, note=note
    )


def _phase(
    name: str,
    placement: Placement,
    peak: int,
    limit: float | None,
    *,
    copied: int,
    hidden: float,
    beside: int = 0,
    note: str = "",
) -> Phase:
    return Phase(
        name=name, peak_bytes=peak, resident_bytes=placement.resident_bytes + beside,
        streamed_bytes=placement.streamed_bytes, copied_bytes=copied, hidden=hidden, missing=_missing(peak, limit),
        note=note,
    )  # fmt: skip


def _vae_phase(
    name: str,
    job: Job,
    part: SizedModule[PixelDecoder],
    what: VaePass,
    size: LatentSize,
    resident: int,
    limit: float | None,
) -> Phase:
    """A pass of the VAE beside `resident` bytes of weights; "auto" tiles are chosen as `decode` chooses them."""
    vae, tiles = part.module, job.tiles[what]
    strips = what == "decode" and job.ranks > 1 and tiles == "auto" and part is job.vae
    if strips:
        size = strip_of(size, job.ranks)
    plan = (vae.config, vae.dtype, size)
    if tiles == "auto":
        tiles = None
        if limit is not None:
            try:
                tiles = choose_tiles(*plan, int(limit - resident), what)
            except ValueError:
                tiles = smallest_tiles(size)
    peak = resident + vae_peak_bytes(*plan, tiles, what)
    note = f"a strip on each of {min(job.ranks, size.height)} cards" if strips else "at once"
    if tiles is not None:
        stride = vae.config.pixel_stride(what)
        height, width = (min(side, of) * stride for side, of in zip(tiles.size, (size.height, size.width), strict=True))
        note = f"in {len(tiles.plan(size.height, size.width))} tiles of {width}x{height}"
    return Phase(name=name, peak_bytes=peak, resident_bytes=resident, missing=_missing(peak, limit), note=note)


def _missing(peak: int, limit: float | None) -> int:
    return 0 if limit is None else max(0, math.ceil(peak - limit))


def _ram(job: Job, cond: Conditioning) -> dict[str, int]:
    """Bytes of host memory by what they hold: weights between uses, frames of the video, tensors of a step cache."""
    ram = {role: module.ram_bytes for role, module in job.modules.items()}
    pixels = 3 * job.size.num_frames * job.size.height * job.size.width * torch.float32.itemsize
    if job.decoder is not None:
        # The decoder's output, and a copy of it as frames of an IMAGE.
        ram["frames of the video"] = 2 * pixels * job.decoder.module.config.upscale**2
    if job.settings.cache is not None and job.settings.cache.residual_on_cpu:
        per_token = job.config.dim * job.experts[0].module.dtype.itemsize
        ram["step cache"] = job.settings.guidance.branches * job.size.latent.tokens * per_token
    ram["conditioning"] = sum(tensor.nbytes for tensor in tensors_in(cond))
    return ram
