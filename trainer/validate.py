"""Numbers and videos that can be compared within a run: the loss on held-out clips at fixed timesteps with fixed
noise, and samples with fixed seeds.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from wan_core.atomic import replacing
from wan_core.decode import decode_pieces
from wan_core.media import pixels_to_images, save_video
from wan_core.models.vae import WanVAE
from wan_core.prepare import VideoModel
from wan_core.runtime import Runtime
from wan_core.sampling.loop import sample
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.types import Conditioning, VideoSize

from .conditions import Encoded, Examples, collate
from .config import TrainConfig
from .objective import Draw, generator_for

log = logging.getLogger("wancore")

TIMESTEPS = (100.0, 300.0, 500.0, 700.0, 900.0)
"""Where the held-out loss is measured."""

FIRST_SAMPLES = 3
"""Training samples that are decoded at the start, to be looked at."""

Step = Callable[..., Tensor]
"""`trainable.Denoiser`, perhaps wrapped: latents, draw, conditioning and captions to errors (B,)."""


@torch.no_grad()
def held_out_errors(model: Step, clips: Iterable[Encoded], device: torch.device) -> dict[float, float]:
    """The mean error, without weights, over `clips` at each of `TIMESTEPS`; the noise of a clip is always the same."""
    found: dict[float, list[float]] = {timestep: [] for timestep in TIMESTEPS}
    for clip in clips:
        batch = collate([clip])
        latents, cond = batch.latents.to(device), batch.cond.to(device)
        for timestep in TIMESTEPS:
            noise = torch.randn(
                batch.latents.shape, generator=generator_for("validation", clip.position, int(timestep))
            )
            at = torch.tensor([timestep])
            draw = Draw(noise, at / 1000, at, torch.ones(1))
            found[timestep].append(model(latents, draw, cond, batch.captions, batch.pixels).item())
    return {timestep: sum(errors) / len(errors) for timestep, errors in found.items()}


@dataclass(frozen=True)
class SampleRequest:
    """One sample video: what it is conditioned on, on the CPU, its size, and its name."""

    cond: Conditioning
    size: VideoSize
    name: str


def sample_requests(examples: Examples, config: TrainConfig) -> list[SampleRequest]:
    """The samples that `config` asks for, conditioned as the first rows of the data are."""
    if config.sample_steps is None:
        return []
    requests = []
    negative = examples.encoders.text.encode([config.sample_negative_prompt]).cpu()
    prompt = None if config.sample_prompt is None else examples.encoders.text.encode([config.sample_prompt]).cpu()
    for index in range(min(config.sample_count, len(examples.rows))):
        row = examples.rows[index]
        cond = examples.encode(examples.fixed(index), index).cond
        cond = dataclasses.replace(cond, text=cond.text if prompt is None else prompt, negative_text=negative)
        requests.append(SampleRequest(cond, row.size, f"{index:02}"))
    return requests


def draw_samples(
    model: VideoModel, requests: Sequence[SampleRequest], config: TrainConfig, runtime: Runtime
) -> list[Tensor]:
    """Latents (1, 16, F, h, w) of every request, on the CPU; the same weights always give the same."""
    settings = SamplerSettings(
        seed=config.sample_seed,
        steps=config.sample_inference_steps,
        guidance=GuidanceSettings(scale=config.sample_cfg_scale),
        **({"shift": model.row.preset.shift} if model.row else {}),
    )
    controller = model.motion_controller
    return [
        sample(model.dit, request.cond, request.size.latent, settings, runtime, motion_controller=controller).cpu()
        for request in requests
    ]


def save_samples(
    latents: Sequence[Tensor], names: Sequence[str], vae: WanVAE, folder: Path, runtime: Runtime
) -> list[Path]:
    """Decode `latents` into `folder`: a video as mp4, a picture as png."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for clip, name in zip(latents, names, strict=True):
        frames = [image for piece in decode_pieces(vae, clip, None, runtime) for image in pixels_to_images(piece)]
        if len(frames) == 1:
            file = folder / f"{name}.png"
            with replacing(file) as partial:
                frames[0].save(partial)
        else:
            file = save_video(frames, folder / f"{name}.mp4")
        files.append(file)
    return files


def save_first_samples(examples: Examples, folder: Path, runtime: Runtime) -> list[Path]:
    """The first training samples as the model gets them: encoded, decoded again, and written into `folder`."""
    count = min(FIRST_SAMPLES, len(examples.rows))
    if folder.is_dir() and sum(1 for file in folder.iterdir() if not file.name.startswith(".")) >= count:
        return []
    samples = [examples.encode(examples.fixed(index), index) for index in range(count)]
    frames = [examples.rows[index].size.latent.frames for index in range(count)]
    latents = [sample.latents[None, :, -n:] for sample, n in zip(samples, frames, strict=True)]
    names = [f"{index:02}_{Path(sample.name).stem}" for index, sample in enumerate(samples)]
    return save_samples(latents, names, examples.encoders.vae, folder, runtime)
