"""Work, traffic and memory at the true shapes, counted on the meta device: exact, and the same on every machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from tests.benchmarks import diffusers_models as peers
from tests.benchmarks import memory_table
from tests.benchmarks.counting import Work, counted
from tests.benchmarks.report import Row
from tests.sampling.runs import sample
from wan_core.catalog import TI2V_BASE, find_row, published_config
from wan_core.model import VideoModel
from wan_core.models.config import WAN_22, DiTConfig, VAEConfig
from wan_core.models.dit import WanDiT, timesteps_of
from wan_core.models.ops import on_meta
from wan_core.models.vae import WanVAE
from wan_core.offload.blocks import weights_of
from wan_core.offload.quant import quantise
from wan_core.offload.streaming import Placement
from wan_core.offload.weights import WeightProvider
from wan_core.planning.estimate import LiveBytes
from wan_core.planning.modules import VAE_22
from wan_core.runtime import GIB, Runtime
from wan_core.types import Conditioning, LatentSize, VideoSize
from wan_core.variants import match_variant
from wancore.trainer.config import TrainConfig
from wancore.trainer.model.trainable import prepare
from wancore.trainer.run.estimate import Estimator

META = torch.device("meta")
DITS = {size: published_config(find_row(f"Wan-AI/Wan2.1-T2V-{size}")) for size in ("1.3B", "14B")}
SIZES = {"480p": VideoSize(832, 480, 81), "720p": VideoSize(1280, 720, 81)}
TI2V, TI2V_SIZE = "5B", "704p"
DITS_22 = {TI2V: published_config(find_row(TI2V_BASE))}
SIZES_22 = {TI2V_SIZE: VideoSize(1280, 704, 121, WAN_22)}
VAES = {**dict.fromkeys(SIZES, VAEConfig()), TI2V_SIZE: VAE_22}
"""By the size of the video that they decode."""
TEXT_TOKENS = 512

OFFICIAL_VAE_PEAK = {
    ("480p", torch.bfloat16): 4.08e9, ("480p", torch.float32): 7.56e9,
    ("720p", torch.bfloat16): 9.43e9, ("720p", torch.float32): 17.4e9,
    (TI2V_SIZE, torch.bfloat16): 10.4e9, (TI2V_SIZE, torch.float32): 20.7e9,
}  # fmt: skip
"""Bytes at the peak of a decode by Wan-Video/Wan2.1 `wan/modules/vae.py`, and at 704p by Wan-Video/Wan2.2
`wan/modules/vae2_2.py`, counted once in this way, to three digits.
That code is no package, so it cannot be counted anew in every run."""


@dataclass(frozen=True)
class Shape:
    """A model and the size of a video."""

    model: str
    size: str

    @property
    def config(self) -> DiTConfig:
        return (DITS | DITS_22)[self.model]

    @property
    def latent(self) -> tuple[int, int, int]:
        return (SIZES | SIZES_22)[self.size].latent.shape

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)

    @property
    def hidden_state(self) -> int:
        """Bytes of one in bfloat16, the unit of traffic and of activations."""
        return 2 * self.tokens * self.config.dim

    def __str__(self) -> str:
        return f"{self.model} {self.size}"


SHAPES = [*(Shape(model, size) for model in DITS for size in SIZES), Shape(TI2V, TI2V_SIZE)]


def least_flops(shape: Shape, text_tokens: int = TEXT_TOKENS) -> int:
    """Operations of one forward of one branch that no implementation can do without: every matrix product and all
    attention once, for one timestep."""
    config, tokens = shape.config, shape.tokens
    dim, layers = config.dim, config.num_layers
    block = 12 * tokens * dim**2 + 4 * text_tokens * dim**2 + 4 * tokens * dim * config.ffn_dim
    block += 4 * tokens**2 * dim + 4 * tokens * text_tokens * dim
    patch = 4 * config.in_channels
    ends = 2 * tokens * dim * (patch + 4 * config.out_channels)
    text = 2 * text_tokens * (config.text_dim * dim + dim**2)
    time = 2 * (config.freq_dim * dim + dim**2 + 6 * dim**2) * (2 if config.geometry.frame_times else 1)
    return layers * block + ends + text + time


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.empty(1, shape.config.out_channels, *shape.latent, device=META)
    text = torch.empty(1, TEXT_TOKENS, shape.config.text_dim, dtype=torch.bfloat16, device=META)
    return latents, torch.empty(1, device=META), text


@cache
def ours(shape: Shape, blocks: int, branches: int = 1) -> Work:
    """A forward of our model cut to so many blocks, its branches interleaved."""
    with on_meta():
        dit = WanDiT(replace(shape.config, num_layers=blocks)).requires_grad_(False).to(torch.bfloat16)
    x, time, text = _inputs(shape)
    cond = Conditioning(text=text)
    if shape.config.geometry.frame_times:
        cond = cond.with_clean_frames(x[:, :, :1], shape.latent[0])

    def forward() -> list[Tensor]:
        embedded = dit.embed_time(timesteps_of(cond, time))
        states = [dit.embed(x, embedded, dit.prepare(cond, shape.latent)) for _ in range(branches)]
        dit.run_blocks(states)
        return [dit.unembed(state) for state in states]

    return counted(forward, [*dit.parameters(), x, time, text])


@cache
def theirs(shape: Shape, blocks: int) -> Work:
    """A forward of diffusers' model cut to so many blocks."""
    model = peers.diffusers_dit(replace(shape.config, num_layers=blocks), META, torch.bfloat16)
    x, time, text = _inputs(shape)
    x = x.bfloat16()
    if shape.config.geometry.frame_times:
        # It takes a timestep for each token, and embeds them all.
        time = torch.empty(1, shape.tokens, device=META)

    def forward() -> Tensor:
        return model(hidden_states=x, timestep=time, encoder_hidden_states=text, return_dict=False)

    return counted(forward, [*weights_of(model).values(), x, time, text])


def whole(one: Work, two: Work, blocks: int) -> tuple[int, float]:
    """FLOPs of a forward with so many blocks, from those with one and with two; and the traffic of one block."""
    return one.flops + (blocks - 1) * (two.flops - one.flops), two.bytes - one.bytes


def model_rows(shape: Shape) -> Iterator[Row]:
    unit, layers = shape.hidden_state, shape.config.num_layers
    flops, traffic = whole(ours(shape, 1), ours(shape, 2), layers)
    yield Row(f"{shape}: FLOPs of a forward", flops / 1e12, least_flops(shape) / 1e12, "least", "TF", 1.001)
    peak, both = ours(shape, 2).peak / unit, ours(shape, 2, branches=2).peak / unit
    goal, goal_both = (6.5, 7.5) if shape.model == "14B" else (None, None)
    name, other, other_traffic, other_peak = "", None, None, None
    if peers.has_diffusers():
        other, other_traffic = whole(theirs(shape, 1), theirs(shape, 2), layers)
        name, other_traffic, other_peak = "diffusers", other_traffic / unit, theirs(shape, 2).peak / unit
        yield Row(f"{shape}: FLOPs of a forward", flops / 1e12, other / 1e12, name, "TF")
    yield Row(f"{shape}: elementwise per block", traffic / unit, other_traffic, name, "a", 60, absolute=True)
    yield Row(f"{shape}: peak activations", peak, other_peak, name, "a", goal, absolute=True)
    yield Row(f"{shape}: peak, branches interleaved", both, unit="a", goal=goal_both)


def copied(case: memory_table.Case, steps: int) -> int:
    """Bytes that the engine brings to the device in a run of so many steps."""
    plan = memory_table.planned(case)
    module, cond = memory_table.dit(case.model, case.weights), memory_table.conditioning(case)
    placement = Placement(memory_table.dit_inventory(module, cond), plan.placement.streamed)
    settings = replace(memory_table.settings(plan.settings.guidance.mode), steps=steps)
    copies = memory_table.MetaCopies()
    working = WeightProvider.of(module).working(META, placement, copies=copies)
    with memory_table.results_stay_there(), LiveBytes(META), working as stream:  # the count for its speed
        runtime = Runtime(device=META, dtype=torch.bfloat16)
        sample(module, cond, memory_table.SIZES[case.size].latent, settings, runtime)
        return stream.copied


def copy_rows(case: memory_table.Case) -> Iterator[Row]:
    """What a step of a streamed run copies, against the plan, and against every block in both forwards."""
    plan = memory_table.planned(case)
    step = copied(case, 2) - copied(case, 1)
    streamed, blocks = plan.placement.streamed_bytes, plan.placement.inventory.blocks.values()
    name = f"{case.model} {case.size} {case.weights}, {case.gib} GB: copied per step"
    yield Row(name, step / 1e9, streamed / 1e9, "streamed blocks, once", "GB", 1.02)
    twice = 2 * sum(block.bytes for block in blocks)
    yield Row(name, step / 1e9, twice / 1e9, "every block, per branch", "GB")


def _vae_of(latent: LatentSize) -> VAEConfig:
    return next(config for config in VAES.values() if config.geometry is latent.geometry)


def decoded(latent: LatentSize, dtype: torch.dtype) -> Work:
    """A decode by our autoencoder; pieces leave the device as they are done."""
    with on_meta():
        vae = WanVAE(_vae_of(latent)).requires_grad_(False).to(dtype).use_channels_last()
        latents = torch.empty(1, latent.geometry.channels, *latent.shape)

    def decode() -> None:
        for _ in vae.decode_chunks(latents):
            pass

    return counted(decode, [*vae.parameters(), latents])


def vae_work(latent: LatentSize, dtype: torch.dtype) -> Work:
    """A whole decode of at least 4 latent frames: from the third on each is like the one before."""
    three, four = (decoded(replace(latent, frames=frames), dtype) for frames in (3, 4))
    more = latent.frames - 3
    flops, moved = four.flops - three.flops, four.bytes - three.bytes
    return Work(three.flops + more * flops, three.bytes + more * moved, four.peak)


def vae_rows(size: str, dtype: torch.dtype) -> Iterator[Row]:
    latent = (SIZES | SIZES_22)[size].latent
    own = vae_work(latent, dtype)
    name = f"VAE decode {size} {str(dtype).removeprefix('torch.')}"
    yield Row(f"{name}: peak", own.peak / 1e9, OFFICIAL_VAE_PEAK[size, dtype] / 1e9, "official code", "GB", 0.65)
    if not peers.has_diffusers():
        return
    model = peers.diffusers_vae(VAES[size], META, dtype)
    latents = torch.empty(1, latent.geometry.channels, *latent.shape, dtype=dtype, device=META)
    other = counted(lambda: model.decode(latents, return_dict=False), [*weights_of(model).values(), latents])
    yield Row(f"{name}: peak", own.peak / 1e9, other.peak / 1e9, "diffusers", "GB")
    yield Row(f"{name}: FLOPs", own.flops / 1e12, other.flops / 1e12, "diffusers", "TF")
    yield Row(f"{name}: elementwise", own.bytes / 1e9, other.bytes / 1e9, "diffusers", "GB")


TRAINING_SIZES = {"480p × 81": VideoSize(832, 480, 81), "512² × 49": VideoSize(512, 512, 49)}
LORA = TrainConfig(lora_base_model="dit")
WHOLE = TrainConfig(trainable_models=("dit",))
TRAININGS: dict[str, tuple[TrainConfig, float | None]] = {
    "LoRA, no checkpointing": (replace(LORA, use_gradient_checkpointing=False), None),
    "LoRA, attention kept": (replace(LORA, gradient_checkpointing_keeps="attention"), 1.34),
    "LoRA, checkpointing": (LORA, None),
    "LoRA, checkpointing into host memory": (replace(LORA, use_gradient_checkpointing_offload=True), None),
    "LoRA, FP8 base, into host memory": (
        replace(LORA, fp8_base=True, use_gradient_checkpointing_offload=True), None,
    ),
    "LoRA, streamed base, into host memory": (
        replace(LORA, stream_base=True, use_gradient_checkpointing_offload=True), None,
    ),
    "all weights, attention kept": (replace(WHOLE, gradient_checkpointing_keeps="attention"), 1.34),
    "all weights, checkpointing": (WHOLE, 1.34),
}  # fmt: skip
"""Ways to train, with the most operations wanted over those of a pass that computes nothing twice."""

LEAST_MEMORY = {"1.3B": 8.0, "14B": 16.0}
"""GiB that a LoRA at 480p with 81 frames is to fit into, by the leanest way."""


def estimator(model: str, config: TrainConfig, size: VideoSize) -> Estimator:
    """Of a training of random weights of this model."""
    with on_meta():
        dit = WanDiT(DITS[model]).requires_grad_(False).to(torch.bfloat16)
    if config.fp8_base:
        quantise(dit)
    handle = VideoModel.of(dit, match_variant(dit.config), None, model)
    return Estimator(prepare(handle, config), [(dit.config.out_channels, *size.latent.shape)])


def training_rows(model: str, name: str) -> Iterator[Row]:
    """Work, peak and copies of a step of each way to train."""
    size = TRAINING_SIZES[name]
    counted = {way: estimator(model, config, size).needs(config) for way, (config, _) in TRAININGS.items()}
    plain = replace(WHOLE, use_gradient_checkpointing=False)
    least = {"LoRA": counted["LoRA, no checkpointing"], "all weights": estimator(model, plain, size).needs(plain)}
    for way, needs in counted.items():
        label = f"{model} {name}, {way}"
        once = least[way.partition(",")[0]].flops / 1e12
        yield Row(f"{label}: FLOPs", needs.flops / 1e12, once, "nothing twice", "TF", TRAININGS[way][1])
        leanest = name.startswith("480p") and way.startswith("LoRA, streamed")
        goal = LEAST_MEMORY[model] if leanest else None
        yield Row(f"{label}: device memory", needs.device / GIB, unit="GiB", goal=goal)
        yield Row(f"{label}: of it activations", (needs.activations or 0) / GIB, unit="GiB")
        yield Row(f"{label}: copied per step", needs.copied / 1e9, unit="GB")


STREAMED = [
    memory_table.Case("T2V 14B", "480p", "bf16", 24),
    memory_table.Case("T2V 14B", "480p", "bf16", 8),
    memory_table.Case("T2V 14B", "480p", "fp8", 8),
    memory_table.Case("T2V 14B", "720p", "bf16", 12),
]
NOTES = (
    "a is one hidden state in bfloat16: 2 bytes × tokens × width. Traffic of a block is the difference between models "
    "of two blocks and of one; every operation but matrix products, convolutions and attention reads its inputs and "
    "writes its results once. Attention and RMS norms count as the fused kernels of CUDA devices, for everyone.",
    "The least FLOPs are every matrix product of the model and all attention, once. “Every block, per branch” is what "
    "an engine copies that brings each block for each forward of each branch, as diffusers' group offloading does.",
    "A step of training is one forward and backward pass of one sample, with norms and attention as CUDA devices have "
    "them and LoRAs of rank 32; device memory has weights, gradients, Adam's moments and an allowance in it. "
    "“Nothing twice” is the same pass without checkpointing. The counts are held within 3 % of small real runs by "
    "`tests/trainer/test_estimate.py`.",
    "The peak of the official VAE was counted once; diffusers' is a port of it and is counted anew. Theirs hold the "
    "video on the device, ours gives it away piece by piece.",
)


def main(quick: bool = False) -> Sequence[Row]:
    """All rows; with `quick`, the transformers' of the smaller size and one streamed run: a VAE takes a minute."""
    sizes = ["480p"] if quick else [*SIZES, *SIZES_22]
    rows = [row for shape in SHAPES if shape.size in sizes for row in model_rows(shape)]
    rows += [row for case in (STREAMED[:1] if quick else STREAMED) for row in copy_rows(case)]
    trained = ["480p × 81"] if quick else list(TRAINING_SIZES)
    rows += [row for model in (["1.3B"] if quick else DITS) for name in trained for row in training_rows(model, name)]
    dtypes = () if quick else (torch.bfloat16, torch.float32)
    return [*rows, *(row for size in sizes for dtype in dtypes for row in vae_rows(size, dtype))]
