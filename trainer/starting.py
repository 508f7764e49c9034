"""What a model is before it is trained: its files, with weights that were trained before, and with a LoRA made part of
it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from wan_core.adapters.model import Target, fit_to, report, use_lora
from wan_core.adapters.open import open_lora
from wan_core.checkpoints.detect import Component, detect_files
from wan_core.lora.apply import LoraUse, fuse
from wan_core.prepare import VideoModel

from .config import TrainConfig

log = logging.getLogger("wancore")

ENCODERS = ("text_encoder", "vae")
"""Kinds of trained weights that are read in place of the model's own file; the others are laid over it."""


def trained_encoder(config: TrainConfig) -> Component | None:
    """What `--resume_from_checkpoint` holds, when that is a whole encoder.

    Raises:
        ValueError: there is no such file, or it is damaged or unknown.
    """
    if config.resume_from_checkpoint is None:
        return None
    with _named("resume_from_checkpoint"):
        found = detect_files(Path(config.resume_from_checkpoint).expanduser())
    if found.kind == "lora":
        raise ValueError(f"--resume_from_checkpoint: {found.name} is a LoRA; name it in --lora_checkpoint.")
    return found if found.kind in ENCODERS else None


def changes_weights(config: TrainConfig) -> bool:
    """Whether `start` has anything to do."""
    return config.preset_lora_path is not None or _has_trained_weights(config)


def check(components: Mapping[str, Component], config: TrainConfig) -> None:
    """Raise ValueError when a file that the run starts from cannot be read or does not fit the models `components`."""
    parts = [components[kind] for kind in ("dit", "vace", "motion_controller") if kind in components]
    shapes = {name: source.shape for part in parts for name, source in part.sources.items()}
    target = Target(parts[0].name, shapes)
    if _has_trained_weights(config):
        trained = detect_files(Path(config.resume_from_checkpoint).expanduser())
        strange = [name for name, source in trained.sources.items() if shapes.get(name) != source.shape]
        if strange:
            raise ValueError(
                f"--resume_from_checkpoint: {trained.name} does not fit {target.name}, whose {strange[0]} is "
                f"{shapes.get(strange[0], 'not there')}."
            )
    for flag in ("preset_lora_path", "lora_checkpoint"):
        path = getattr(config, flag)
        if path is not None:
            with _named(flag):
                fit_to(open_lora(Path(path).expanduser()), target)


def start(model: VideoModel, config: TrainConfig) -> None:
    """Change the weights of `model`, which are not quantised, as the settings say.

    Raises:
        ValueError: a file cannot be read or was made for another model.
    """
    if _has_trained_weights(config):
        with _named("resume_from_checkpoint"):
            use = _fused(model, config.resume_from_checkpoint)
        log.info("Starting from %s: %d weights.", use.bound.lora.name, len(use.bound.patches))
    if config.preset_lora_path is not None:
        with _named("preset_lora_path"):
            use = _fused(model, config.preset_lora_path)
        log.info("Made part of the model: %s", report(use, Target.of_modules(model.name, model.modules)).summary)


def _has_trained_weights(config: TrainConfig) -> bool:
    return config.resume_from_checkpoint is not None and trained_encoder(config) is None


def _fused(model: VideoModel, path: str) -> LoraUse:
    use = use_lora(Path(path).expanduser(), Target.of_modules(model.name, model.modules))
    fuse(model.modules, use)
    return use


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """Errors of this block name the flag that they come from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error
