"""Time and memory at the true shapes on one card, in under ten minutes, with random weights made on it.

Limits are measured in the same run: the highest rate of a matrix product, and that of attention.
"""

import importlib
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from tests.benchmarks import diffusers_models as peers
from tests.benchmarks.bench import (
    TINY,
    TRUE,
    Device,
    Run,
    Scale,
    filled,
    forward_of,
    random_conditioning,
    random_dit,
    read_seconds,
    sampled,
    unavailable,
)
from tests.benchmarks.report import Row
from wan_core.cache_settings import TeaCacheSettings
from wan_core.model import VideoModel
from wan_core.model_files import DiTSettings, Offload, inspect, load_dit
from wan_core.models.attention import FastestAttention, load_backend
from wan_core.models.config import DiTConfig, VAEConfig
from wan_core.models.vae import WanVAE
from wan_core.offload.quant import quantise, supports_fp8_matmul, use_fp8_matmul
from wan_core.planning.encoders import limit_memory
from wan_core.planning.estimate import pass_flops
from wan_core.runtime import GIB, Runtime
from wan_core.sampling.experts import RunInputs
from wan_core.settings import MemorySettings, SamplerSettings
from wan_core.variants import match_variant

log = logging.getLogger("wancore")
NOTES = (
    "The limit of a step is its FLOPs at the highest rate that a bf16 matrix product reached in this run; attention "
    "kernels do not reach that rate, so a second limit has products and attention each at their own best. Steps have "
    "two branches; the median of all but the first is quoted.",
    "Weights are random and made on the device. Peak memory is what the process has reserved, with the context and "
    "with whatever other programs hold.",
)
STEP_GOALS = {"1.3B 480p": 1.40, "14B 480p": 1.30}


@dataclass
class Bench:
    """One run of the script.

    Attributes:
        limits: rates in operations per second, by name.
        steps: seconds per step by model, with all weights on the device.
        problems: what could not be measured, and why.
    """

    device: Device
    scale: Scale
    quick: bool
    limits: dict[str, float] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def configs(self) -> Iterator[tuple[str, DiTConfig]]:
        yield from zip(self.scale.names, (self.scale.small, self.scale.large), strict=True)


def ceilings(bench: Bench) -> Iterator[Row]:
    """The rates that the device reaches."""
    device, side = bench.device, bench.scale.product
    left, right = (torch.randn(side, side, device=device.torch, dtype=device.dtype) for _ in range(2))
    bench.limits["product"] = 2 * side**3 / device.seconds(lambda: left @ right, 10)
    yield Row(f"matrix product {side}³ bf16", bench.limits["product"] / 1e12, unit="TF/s")
    tokens = bench.scale.tokens
    q = torch.randn(1, tokens, bench.scale.small.num_heads, 128, device=device.torch, dtype=device.dtype)
    attend = load_backend("auto", device.torch, device.dtype)
    kernels = attend.operation.kernels if isinstance(attend, FastestAttention) else {"sdpa": attend}
    for name, kernel in kernels.items():
        try:
            rate = 4 * tokens**2 * q.shape[2] * 128 / device.seconds(lambda kernel=kernel: kernel(q, q, q))
        except RuntimeError as problem:
            bench.problems.append(f"attention by {name}: {unavailable(problem)}")
            continue
        bench.limits["attention"] = max(rate, bench.limits.get("attention", 0))
        yield Row(f"attention of {tokens} tokens, {name}", rate / 1e12, unit="TF/s")
    row = torch.empty(2**20 if bench.quick else 2**30, dtype=torch.uint8, pin_memory=device.is_cuda)
    target = torch.empty_like(row, device=device.torch)
    rate = row.nbytes / device.seconds(lambda: target.copy_(row, non_blocking=True))
    yield Row("copy from pinned memory", rate / 1e9, unit="GB/s")


def step_rows(bench: Bench, name: str, config: DiTConfig, run: Run) -> Iterator[Row]:
    """A step against what the arithmetic allows."""
    flops = 2 * pass_flops(config, bench.scale.latent.shape)
    tokens = bench.scale.tokens
    attention = 2 * config.num_layers * 4 * tokens**2 * config.dim
    product, attended = bench.limits["product"], bench.limits["attention"]
    goal = None if bench.quick else STEP_GOALS[name]
    yield Row(f"{name}: step", run.step, flops / product, "bf16 limit", "s", goal)
    yield Row(
        f"{name}: step", run.step, (flops - attention) / product + attention / attended, "limit with attention", "s"
    )
    yield Row(f"{name}: first step, kernels chosen", run.steps[0], run.step, "other steps", "s")


def models(bench: Bench) -> Iterator[Row]:
    """Steps of both models with all weights on the device."""
    for name, config in bench.configs():
        device = bench.device
        device.clear()
        dit, cond = random_dit(config, device.torch), random_conditioning(config, device)
        dit.attend = load_backend("auto", device.torch, device.dtype)
        run = sampled(dit, cond, bench.scale.latent, device, 4)
        bench.steps[name] = run.step
        yield from step_rows(bench, name, config, run)
        yield Row(f"{name}: peak memory, all weights there", device.peak() / 1e9, unit="GB")
        if config is bench.scale.small:
            yield from teacache(bench, dit, cond)
        if config is bench.scale.large:
            yield from fp8(bench, name, dit, cond)
        del dit, cond


def teacache(bench: Bench, dit: nn.Module, cond: object) -> Iterator[Row]:
    """What leaving out steps saves, over the share of passes that it leaves out."""
    cache = TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B")
    plain = sampled(dit, cond, bench.scale.latent, bench.device, 10)
    skipping = sampled(dit, cond, bench.scale.latent, bench.device, 10, cache=cache)
    saved, skipped = 1 - skipping.total / plain.total, 1 - skipping.passes / plain.passes
    goal = None if bench.quick else 0.97
    yield Row(
        f"TeaCache: time saved, {skipped:.0%} of passes left out", saved, skipped, "share left out", "", goal, True
    )


def fp8(bench: Bench, name: str, dit: nn.Module, cond: object) -> Iterator[Row]:
    """FP8 storage, then FP8 products, against bf16. Changes the model."""
    quantise(dit)
    run = sampled(dit, cond, bench.scale.latent, bench.device, 3)
    yield Row(f"{name}: step with FP8 weights", run.step, bench.steps[name], "bf16 weights")
    if not supports_fp8_matmul(bench.device.torch):
        bench.problems.append("FP8 products: not on this device")
        return
    use_fp8_matmul(dit, bench.device.torch)
    run = sampled(dit, cond, bench.scale.latent, bench.device, 3)
    yield Row(f"{name}: step with FP8 products", run.step, bench.steps[name], "bf16 weights")


def budgets(bench: Bench) -> Iterator[Row]:
    """The large model below limits of memory: what it takes, and what streaming costs."""
    name, config, device, size = bench.scale.names[1], bench.scale.large, bench.device, bench.scale.latent
    device.clear()
    dit, cond = random_dit(config, device.torch).to("cpu"), random_conditioning(config, device)
    dit.attend = load_backend("auto", device.torch, device.dtype)
    model = VideoModel.of(dit, match_variant(config), None, name)
    plain = Runtime(device=device.torch, dtype=device.dtype)
    for gib in bench.scale.budgets:
        device.clear()
        memory = MemorySettings(vram_limit=gib)
        plan = model.plan(RunInputs(cond, size), SamplerSettings(steps=3), memory, limit_memory(plain, memory))
        if plan.missing:
            bench.problems.append(f"{name} in {gib} GiB: {plan.missing / 1e9:.2f} GB missing")
            continue
        with model.working(3, device.torch, plan.placement):
            run = sampled(dit, cond, size, device, 3, settings=plan.settings)
        peak = device.peak()
        streamed = f"{len(plan.placement.streamed)} of {config.num_layers} blocks streamed"
        within = gib * GIB / 1e9 if gib else None
        goals = (None, None) if bench.quick else (1.0, 1.05)
        yield Row(f"{name}, {gib} GiB, {streamed}: peak", peak / 1e9, within, "limit", "GB", goals[0] if gib else None)
        yield Row(f"{name}, {gib} GiB, {streamed}: step", run.step, bench.steps[name], "resident", "s", goals[1])


def own_decode(bench: Bench, latents: torch.Tensor) -> float:
    """The time of a decode by our autoencoder."""
    with torch.device("meta"):
        model = WanVAE(bench.scale.vae).to(bench.device.dtype)
    model = filled(model, bench.device.torch).use_channels_last()

    def decode() -> None:
        with torch.no_grad():
            for _ in model.decode_chunks(latents):
                pass

    return bench.device.seconds(decode, 2)


def vae(bench: Bench) -> Iterator[Row]:
    """Decoding in bf16."""
    device = bench.device
    device.clear()
    latents = torch.randn(1, 16, *bench.scale.latent.shape, device=device.torch)
    own, peak = own_decode(bench, latents), device.allocated()
    other, other_peak, name = None, None, ""
    if peers.has_diffusers() and not bench.quick:
        device.clear()
        peer = filled(peers.diffusers_vae(VAEConfig(), torch.device("meta"), device.dtype), device.torch)
        given, name = latents.to(device.dtype), "diffusers"
        with torch.no_grad():
            other = device.seconds(lambda: peer.decode(given, return_dict=False), 2)
        other_peak = device.allocated() / 1e9
    yield Row("VAE decode 480p bf16: time", own, other, name, "s", None if bench.quick else 0.6)
    yield Row("VAE decode 480p bf16: peak", peak / 1e9, other_peak, name, "GB")


def loading(bench: Bench) -> Iterator[Row]:
    """From a file to weights on the device, against reading the file."""
    device = bench.device
    device.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "wan2.1_t2v_1.3B.safetensors")
        save_file(
            {k: v.contiguous().cpu() for k, v in random_dit(bench.scale.small, device.torch).state_dict().items()}, path
        )
        read = min(read_seconds(path) for _ in range(2))
        component, times = inspect(path, "dit"), []
        for _ in range(2):
            device.wait()
            start = time.perf_counter()
            model = load_dit(component, DiTSettings(dtype=device.dtype), Offload.on(device.torch))
            device.wait()
            times.append(time.perf_counter() - start)
            del model
    yield Row(f"{bench.scale.names[0]}: file to device", min(times), read, "reading the file")


def diffusers(bench: Bench) -> Iterator[Row]:
    """Steps of diffusers, with its own choice of attention and with cuDNN's."""
    if not peers.has_diffusers():
        bench.problems.append("diffusers is not installed")
        return
    for name, config in bench.configs():
        device = bench.device
        device.clear()
        model = filled(peers.diffusers_dit(config, torch.device("meta"), device.dtype), device.torch)
        with torch.device(device.torch):
            model.rope = type(model.rope)(128, (1, 2, 2), 1024)
        latents = torch.randn(1, 16, *bench.scale.latent.shape, device=device.torch, dtype=device.dtype)
        step = forward_of(model, latents, torch.randn(1, 512, config.text_dim, device=device.torch, dtype=device.dtype))
        for backend in ("native", "_native_cudnn") if device.is_cuda else ("native",):
            try:
                if backend != "native":
                    model.set_attention_backend(backend)
                other = device.seconds(step, 2)
            except Exception as problem:
                bench.problems.append(f"diffusers with {backend}: {unavailable(problem)}")
                continue
            goal = 0.9 if backend == "native" and not bench.quick else None
            yield Row(f"{name}: step", bench.steps[name], other, f"diffusers, {backend}", "s", goal)
        yield Row(f"{name}: peak of diffusers", device.peak() / 1e9, unit="GB")
        del model, step


def diffsynth(bench: Bench) -> Iterator[Row]:
    """Steps of DiffSynth's model."""
    cls = importlib.import_module("diffsynth.models.wan_video_dit").WanModel
    for name, config in bench.configs():
        device = bench.device
        device.clear()
        built = partial(cls, in_dim=16, out_dim=16, eps=1e-6, patch_size=(1, 2, 2), has_image_input=False)
        with torch.device("meta"):
            model = built(
                dim=config.dim, ffn_dim=config.ffn_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
                num_heads=config.num_heads, num_layers=config.num_layers,
            )  # fmt: skip
        # Its rotary table is no buffer: a small model makes the same one, with values.
        freqs = built(dim=256, ffn_dim=64, text_dim=64, freq_dim=64, num_heads=2, num_layers=0).freqs
        model = filled(model.to(device.dtype), device.torch)
        model.freqs = freqs
        latents = torch.randn(1, 16, *bench.scale.latent.shape, device=device.torch, dtype=device.dtype)
        text = torch.randn(1, 512, config.text_dim, device=device.torch, dtype=device.dtype)
        when = torch.full((1,), 500.0, device=device.torch, dtype=device.dtype)

        def step(model: nn.Module = model, given: tuple[torch.Tensor, ...] = (latents, when, text)) -> None:
            with torch.no_grad():
                for _ in range(2):
                    model(*given)

        other = device.seconds(step, 2)
        yield Row(f"{name}: step", bench.steps[name], other, "DiffSynth", "s", None if bench.quick else 0.7)
        del model, step


def training(bench: Bench) -> Iterator[Row]:
    """Steps of training, each way to save memory beside what the trainer said it would take."""
    # It brings the trainer, which nothing else here needs.
    from tests.benchmarks.training import training_rows

    bench.device.clear()
    for found in training_rows(bench.device.torch, bench.quick):
        name = "training {model}, {trained}, {size}, {frames} frames, {option}".format(**found)
        seconds, peak = (math.nan if found[key] is None else found[key] for key in ("seconds", "peak_gib"))
        yield Row(f"{name}: step", seconds)
        yield Row(f"{name}: peak", peak, found["counted_gib"], "count", "GiB")


SECTIONS: Sequence[Callable[[Bench], Iterator[Row]]] = (
    ceilings, models, diffusers, diffsynth, vae, budgets, loading, training,
)  # fmt: skip


def main(quick: bool = False, device: str = "cuda") -> list[Row]:
    """All rows. A part that fails is named in the last ones, and the others go on.

    Raises:
        ValueError: the device is not there, or is a CPU, which computes the tiny shapes of `quick` alone.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here; `gpu --device cpu --quick` tries the script.")
    if not device.startswith("cuda") and not quick:
        raise ValueError(f"{device} would take days for the true shapes; add --quick.")
    if not device.startswith("cuda"):
        # Tiny shapes gain nothing from threads, and lose much where other programs compute too.
        torch.set_num_threads(1)
    bench = Bench(Device(device), TINY if quick else TRUE, quick)
    rows, begun = [], time.perf_counter()
    for section in SECTIONS:
        try:
            for row in section(bench):
                rows.append(row)
                sys.stderr.write(f"{time.perf_counter() - begun:6.1f} s  {' | '.join(row.cells())}\n")
        except Exception as problem:
            log.debug("%s", section.__name__, exc_info=True)
            bench.problems.append(f"{section.__name__}: {unavailable(problem)}")
    rows.append(Row("the whole script", time.perf_counter() - begun, goal=None if quick else 600))
    return [*rows, *(Row(f"not measured: {problem}", math.nan, unit="") for problem in bench.problems)]
