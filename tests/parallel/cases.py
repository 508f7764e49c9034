"""What the ranks of a pool run; `ranks` is None where one process computes the same alone."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.reference import filled
from tests.sampling.variants import conditioning
from wan_core import bundled
from wan_core.atomic import replacing
from wan_core.decode import VaeHandle, decode, decode_pieces
from wan_core.model import VideoModel
from wan_core.model_files import DiTSettings, ExpertFile, Offload, inspect, load_dit, load_vae
from wan_core.models.attention import sdpa
from wan_core.models.config import DiTConfig, MotionControllerConfig, VAEConfig
from wan_core.models.dit import WanDiT
from wan_core.models.layers import MotionController
from wan_core.models.vae import WanVAE
from wan_core.parallel.layout import Layout
from wan_core.parallel.mesh import Ranks
from wan_core.parallel.tasks import serve
from wan_core.runtime import Runtime
from wan_core.sampling.checkpoint import Checkpoint, RunState
from wan_core.sampling.experts import Expert, RunInputs, RunModel
from wan_core.sampling.parallel import follow
from wan_core.sampling.run import sample
from wan_core.settings import MemorySettings, SamplerSettings
from wan_core.tiling import AUTO
from wan_core.types import LatentSize


@dataclass(frozen=True)
class Film:
    """A run of a tiny model.

    Attributes:
        experts: how many transformers take the steps, the first one from timestep 900 on.
        speed: with the motion controller.
        memory: with these settings the model is a `VideoModel` that plans and brings its weights.
        weights: how that holds them; `lora` is a file that it applies.
        folder: where its file is, and where each step is saved if `saves`.
        stop_after: the run is stopped after this step.
        changes: of the conditioning.
    """

    variant: str
    settings: SamplerSettings
    size: LatentSize = LatentSize(3, 6, 10)
    config: DiTConfig | None = None
    experts: int = 1
    speed: bool = False
    batch: int = 1
    dtype: torch.dtype = torch.float32
    memory: MemorySettings | None = None
    weights: str = "auto"
    lora: Path | None = None
    folder: Path | None = None
    saves: bool = False
    stop_after: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def structure(self) -> DiTConfig:
        return self.config or bundled.DITS[self.variant]


class Stopped(Exception):
    pass


def modules(film: Film) -> RunModel:
    dits = [filled(WanDiT, film.structure, seed).to(film.dtype) for seed in range(film.experts)]
    lowest = [900.0, 0.0] if film.experts == 2 else [0.0]
    controller = None
    if film.speed:
        controller = filled(MotionController, MotionControllerConfig(dim=film.structure.dim, freq_dim=64))
    return RunModel([Expert(dit, low) for dit, low in zip(dits, lowest, strict=True)], controller)


def loaded(film: Film) -> VideoModel:
    """The same from files; those that are there already are used."""
    assert film.folder is not None
    files = [film.folder / f"{film.variant}_{seed}.safetensors" for seed in range(film.experts)]
    for seed, file in enumerate(files):
        if not file.exists():
            weights = filled(WanDiT, film.structure, seed).state_dict()
            with replacing(file) as partial:
                save_file(weights, partial)
    components = [inspect(file, "dit") for file in files]
    experts = [ExpertFile(each, low) for each, low in zip(components, [900.0, 0.0][-len(files) :], strict=True)]
    model = load_dit(experts, DiTSettings(dtype=film.dtype, attention="sdpa"), Offload(weights=film.weights))
    return model if film.lora is None else model.with_lora(film.lora, strength=(0.5, 1.0))[0]


def inputs(film: Film) -> RunInputs:
    size, known = replace(film.size, geometry=film.structure.geometry), {film.variant: film.structure}
    cond = conditioning(film.variant, size, models=known)
    for _ in range(film.batch - 1):
        cond = cond.joined(conditioning(film.variant, size, seed=8, models=known))
    return RunInputs(replace(cond, **film.changes), size)


def film(ranks: Ranks | None, film: Film) -> tuple[RunState, dict[str, int], dict[str, int]] | None:
    """The state at the end on the rank that leads, the bytes it sent, and how often it exchanged."""

    def on_progress(phase: str, done: int, total: int, latents: Tensor | None) -> None:
        if done == film.stop_after:
            raise Stopped

    runtime = Runtime(device=torch.device("cpu"), dtype=film.dtype, ranks=ranks, on_progress=on_progress)
    planned = film.memory is not None
    model = modules(film) if not planned else loaded(film) if ranks is None or ranks.leads else None
    if ranks is not None and not ranks.leads:
        serve(runtime) if planned else follow(model, runtime)
        return None
    checkpoint = Checkpoint(film.folder, every=1) if film.saves else None
    try:
        if planned:
            state = model.sample(inputs(film), film.settings, film.memory, runtime, checkpoint=checkpoint)
        else:
            state = sample(model, inputs(film), film.settings, runtime, checkpoint=checkpoint)
    except Stopped:
        return None
    finally:
        if ranks is not None and planned:
            ranks.tell(None)
    return (state, {}, {}) if ranks is None else (state, dict(ranks.sent), dict(ranks.calls))


def attention(ranks: Ranks, heads: int, tokens: int, batch: int) -> float:
    """The largest difference of attention over the ranks from that of one, of all ranks."""
    mesh = ranks.arranged(Layout(1, ranks.count))
    generator = torch.Generator().manual_seed(heads + tokens)
    whole = [torch.randn(batch, tokens, heads, 128, generator=generator) for _ in range(3)]
    part = mesh.part(tokens)
    own = part.own(sdpa(*whole))
    found = part.attention(sdpa, *(part.own(x) for x in whole))
    return -ranks.least(-(found - own).abs().max().item())


def written_vae(folder: Path, config: VAEConfig = bundled.VAE, dtype: torch.dtype = torch.float32) -> WanVAE:
    """A VAE from a file, as other processes can load it."""
    file = folder / "vae.safetensors"
    with replacing(file) as partial:
        save_file(filled(WanVAE, config).state_dict(), partial)
    return load_vae(inspect(file, "vae"), dtype, "cpu")


def decoded(
    ranks: Ranks | None, config: VAEConfig, shape: tuple[int, ...], dtype: torch.dtype, folder: Path
) -> tuple[Tensor, dict[str, int]] | None:
    """Pixels of random latents by a VAE that every rank loads, and what the first one sent."""
    runtime = Runtime(device=torch.device("cpu"), dtype=dtype, ranks=ranks)
    if ranks is not None and not ranks.leads:
        serve(runtime)
        return None
    vae = written_vae(folder, config, dtype)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with VaeHandle(vae=vae, runtime=runtime).working():
        pixels = decode(vae, latents, AUTO, runtime)
    if ranks is None:
        return pixels, {}
    # Whoever stops asking for frames leaves the others free.
    next(decode_pieces(vae, latents, AUTO, runtime))
    ranks.tell(None)
    return pixels, dict(ranks.sent)


def full_at(model: VideoModel, rank: int, call: int) -> VideoModel:
    """`model`, for which the device of one rank is too small at that call of a block. For its source, which every rank
    loads.
    """
    calls = 0

    def full(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError("CUDA out of memory")

    if int(os.environ["RANK"]) == rank:
        model.experts[0].dit.blocks[1].register_forward_pre_hook(full)
    return model
