"""What a run shows of itself: held-out loss, sample videos with fixed seeds, the loss chart."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wan_core.atomic import replacing
from wan_core.decode import VaeHandle
from wan_core.media import pixels_to_images, save_video
from wan_core.model import VideoModel
from wan_core.models.vae import WanVAE
from wan_core.runtime import Runtime
from wan_core.sampling.experts import RunInputs
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings
from wan_core.types import Conditioning, VideoSize

from ..config import TrainConfig
from ..data.cache import Encoders
from ..data.conditions import EncodedSample, Examples, collate
from ..objective import Noising, Objective, generator_for
from .chart import save_chart
from .engine import Engine
from .events import Events, latest_steps, validation_points

log = logging.getLogger("wancore")

PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where between the timesteps that are trained the held-out loss is measured."""

FIRST_SAMPLES = 3
"""Training samples that are decoded at the start, to be looked at."""

Step = Callable[..., Tensor]
"""As of `Engine.evaluate`: latents, noising, conditioning, captions, pixels and an expert to errors (B,)."""


@torch.no_grad()
def held_out_errors(
    model: Step, clips: Sequence[EncodedSample], device: torch.device, objective: Objective
) -> dict[float, float]:
    """The mean error, without weights, over `clips` at five timesteps of those that are trained; the noise of a clip is
    always the same.
    """
    low, high = objective.timestep_range
    found: dict[float, list[float]] = {low + place * (high - low): [] for place in PLACES}
    # By timestep, so that each expert of a pair is brought to the device once.
    for timestep in found:
        expert = objective.expert_of(timestep)
        for clip in clips:
            batch = collate([clip])
            latents, cond = batch.latents.to(device), batch.cond.to(device)
            noise = torch.randn(
                batch.latents.shape, generator=generator_for("validation", clip.position, int(timestep))
            )
            at = torch.tensor([timestep])
            noising = Noising(noise, at / 1000, at, torch.ones(1))
            error = model(latents, noising, cond, batch.captions, batch.pixels, expert=expert)
            found[timestep].append(error.item())
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
    """Latents (1, z, F, h, w) of every request, on the CPU; the same weights always give the same."""
    settings = SamplerSettings(
        seed=config.sample_seed,
        steps=config.sample_inference_steps,
        guidance=GuidanceSettings(scale=config.sample_cfg_scale),
        shift=model.row.preset.shift if model.row else SamplerSettings.shift,
    )
    return [
        model.sample(RunInputs(request.cond, request.size.latent), settings, MemorySettings(), runtime).video
        for request in requests
    ]


def save_samples(
    latents: Sequence[Tensor], names: Sequence[str], vae: WanVAE, folder: Path, runtime: Runtime
) -> list[Path]:
    """Decode `latents` into `folder`: a video as mp4, a picture as png."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    handle = VaeHandle(vae=vae, runtime=runtime, tiles=None)
    for clip, name in zip(latents, names, strict=True):
        frames = [image for piece in handle.decode_pieces(clip) for image in pixels_to_images(piece)]
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


EVENTS, CHART, SAMPLES = "events.jsonl", "loss.png", "samples"


@dataclass(eq=False)
class Evaluator:
    """Validates, samples and draws where the settings say so.

    Attributes:
        objective: what is trained, and where.
        engine: what computes; it is set before the first step.
        clips: held-out clips.
        requests: samples to be drawn.
        encoders: their VAE decodes samples; it is loaded for that and freed again where data comes from the cache.
    """

    config: TrainConfig
    encoders: Encoders
    events: Events
    objective: Objective
    clips: Sequence[EncodedSample] = ()
    requests: Sequence[SampleRequest] = field(default_factory=tuple)
    engine: Engine = field(init=False)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_path)

    def after_step(self, step: int, is_last: bool) -> None:
        """Do what is due after `step`."""
        config = self.config
        if self.clips and (is_last or (config.validate_steps and step % config.validate_steps == 0)):
            self.validate(step)
        if self.requests and config.sample_steps and (is_last or step % config.sample_steps == 0):
            self.sample(step)
        if is_last or step % (config.save_steps or config.validate_steps or 50) == 0:
            self.draw_chart()

    def validate(self, step: int) -> None:
        """Measure the held-out loss."""
        with self.engine.evaluating():
            errors = held_out_errors(self.engine.evaluate, self.clips, self.engine.device, self.objective)
        mean = sum(errors.values()) / len(errors)
        by_timestep = {f"{timestep:.0f}": error for timestep, error in errors.items()}
        self.events.emit("validation", step=step, loss=mean, by_timestep=by_timestep)
        self.events.numbers(step, {"validation": mean})
        if self.engine.is_main:
            log.info("Held-out error after step %d: %.4f.", step, mean)

    def sample(self, step: int) -> None:
        """Draw the sample videos; every process takes part, so that none waits for another for long. Samples that fail
        cost themselves, not the run.
        """
        runtime = Runtime.default(self.engine.device, self.encoders.dtype)
        try:
            with self.engine.sampling():
                latents = draw_samples(self.engine.trainables.model, self.requests, self.config, runtime)
            if self.engine.is_main:
                names = [f"step-{step:07}_{request.name}" for request in self.requests]
                files = save_samples(latents, names, self.encoders.vae, self.folder / SAMPLES, runtime)
                self.events.emit("sample", step=step, files=files)
        except (ValueError, RuntimeError, OSError) as error:
            log.warning("No samples after step %d: %s", step, error)
            self.events.emit("warning", step=step, message=f"no samples: {error}")
        finally:
            if self.config.caches:
                self.encoders.free()

    def draw_chart(self) -> None:
        if not self.engine.is_main:
            return
        file = self.folder / EVENTS
        try:
            save_chart(self.folder / CHART, latest_steps(file), validation_points(file))
        except Exception as error:  # whatever a library of plots raises: the weights of this step are not saved yet
            log.warning("The loss chart cannot be written (%s).", error)
