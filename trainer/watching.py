"""What a run shows of itself between steps: held-out loss, sample videos, the loss chart."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wan_core.runtime import Runtime

from .chart import save_chart
from .conditions import Encoded
from .config import TrainConfig
from .encoders import Encoders
from .engine import Engine
from .events import Events, latest_steps, validation_points
from .validate import SampleRequest, draw_samples, held_out_errors, save_samples

log = logging.getLogger("wancore")

EVENTS, CHART, SAMPLES = "events.jsonl", "loss.png", "samples"


@dataclass(eq=False)
class Watcher:
    """Validates, samples and draws where the settings say so.

    Attributes:
        engine: what computes; it is set before the first step.
        clips: held-out clips.
        requests: samples to be drawn.
        encoders: their VAE decodes samples; it is loaded for that and freed again where data comes from the cache.
    """

    config: TrainConfig
    engine: Engine | None
    encoders: Encoders
    events: Events
    clips: Sequence[Encoded] = ()
    requests: Sequence[SampleRequest] = field(default_factory=tuple)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_path)

    def after_step(self, step: int, is_last: bool) -> None:
        """Do what is due after `step`."""
        config = self.config
        if self.clips and (is_last or (config.validate_steps and step % config.validate_steps == 0)):
            self.validate(step)
        if self.requests and (is_last or step % config.sample_steps == 0):
            self.sample(step)
        if is_last or step % (config.save_steps or config.validate_steps or 50) == 0:
            self.draw_chart()

    def validate(self, step: int) -> None:
        """Measure the held-out loss."""
        with self.engine.evaluating():
            errors = held_out_errors(self.engine.model, self.clips, self.engine.device)
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
            with self.engine.evaluating():
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
        except OSError as error:
            log.warning("The loss chart cannot be written (%s).", error)
