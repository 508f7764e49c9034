"""The models of a run: found and checked from their headers, loaded, with weights that were trained before."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wan_core import model_files as prepare
from wan_core import variants
from wan_core.files import is_nameable
from wan_core.loading.detect import Component, detect_files, join_vace
from wan_core.loading.pairs import expert_files, resolve_experts, side_of
from wan_core.lora.apply import LoraUse, fuse
from wan_core.lora.target import Target, bind_to, lora_report, open_lora, use_lora
from wan_core.model import VideoModel
from wan_core.model_config import ModelConfig, find_models, require_same_latents, tokenizer_folder
from wan_core.model_files import Offload
from wan_core.models.config import DiTConfig
from wan_core.offload.formats import WeightChoice
from wan_core.planning.modules import SizedModule
from wan_core.sampling.experts import Expert
from wan_core.types import Conditioning, VideoSize
from wan_core.variants import IMAGE, Variant, fit

from ..config import TrainConfig
from ..data.clips import INPUTS, input_names
from ..flags import ConfigError
from ..objective import Objective, expert_range

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
        found = detect_files(resolve_experts(Path(config.resume_from_checkpoint).expanduser())[0])
    if found.kind == "lora":
        raise ValueError(f"--resume_from_checkpoint: {found.name} is a LoRA; name it in --lora_checkpoint.")
    return found if found.kind in ENCODERS else None


def changes_weights(config: TrainConfig) -> bool:
    """Whether `start` has anything to do."""
    return config.preset_lora_path is not None or _trained_weights(config) is not None


def check(components: Mapping[str, Component], config: TrainConfig) -> None:
    """Raise ValueError when a file that the run starts from cannot be read or does not fit the models `components`."""
    parts = [components[kind] for kind in ("dit", "vace", "motion_controller") if kind in components]
    shapes = {name: source.shape for part in parts for name, source in part.sources.items()}
    target, count = Target(parts[0].name, shapes), len(_named_in(components, "dit", "dit2"))
    for file in _files_of(_trained_weights(config), count):
        trained = detect_files(file)
        strange = [name for name, source in trained.sources.items() if shapes.get(name) != source.shape]
        if strange:
            raise ValueError(
                f"--resume_from_checkpoint: {trained.name} does not fit {target.name}, whose {strange[0]} is "
                f"{shapes.get(strange[0], 'not there')}."
            )
    for flag in ("preset_lora_path", "lora_checkpoint"):
        with _named(flag):
            for file in _files_of(getattr(config, flag), count):
                bind_to(open_lora(file), target)


def change_weights(model: VideoModel, config: TrainConfig) -> None:
    """Change the weights of `model`, which are not quantised, as the settings say.

    Raises:
        ValueError: a file cannot be read or was made for another model.
    """
    count = len(model.experts)
    with _named("resume_from_checkpoint"):
        for number, file in enumerate(_files_of(_trained_weights(config), count)):
            use = _fused(model, number, file)
            log.info("Starting from %s: %d weights.", use.bound.lora.name, len(use.bound.patches))
    with _named("preset_lora_path"):
        for number, file in enumerate(_files_of(config.preset_lora_path, count)):
            use = _fused(model, number, file)
            log.info("Made part of the model: %s", lora_report(use, model.target(number)).summary)


def _trained_weights(config: TrainConfig) -> str | None:
    """The file of trained weights that are laid over the model's own, if the run starts from one."""
    return config.resume_from_checkpoint if trained_encoder(config) is None else None


def _files_of(path: str | None, count: int) -> list[Path]:
    """The file at `path` for each of `count` experts; none without a path."""
    return [] if path is None else expert_files(path, count)


def _fused(model: VideoModel, expert: int, file: Path) -> LoraUse:
    use = use_lora(file, model.target(expert))
    beside = () if model.motion_controller is None else (model.motion_controller,)
    fuse((model.expert_dit(expert), *beside), use)
    return use


@contextmanager
def _named(flag: str) -> Iterator[None]:
    """Errors of this block name the flag that they come from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


INPAINT = "inpaint_video"
PICTURE_KINDS = ("start", "end", "picture")

USELESS_WITHOUT = {"vace": "vace_", "motion_controller": "motion_"}
"""Models that run only when they have an input, and how the names of these begin."""


@dataclass(frozen=True)
class FoundModels:
    """The models of a run, before any weight is read.

    Attributes:
        components: by kind: `dit`, `text_encoder`, `vae`, and what else was named.
        config, variant: those of the DiT, with the VACE branch of a file of its own.
        name: what to call it in messages.
        tokenizer: folder of the tokenizer; None when the text encoder brings it.
    """

    components: Mapping[str, Component]
    config: DiTConfig
    variant: Variant
    name: str
    tokenizer: Path | None

    @property
    def has_motion_controller(self) -> bool:
        return "motion_controller" in self.components

    @property
    def boundary(self) -> float | None:
        """Where both experts of a pair are trained, the fraction of the noise from which on the first one works."""
        return prepare.boundary_of(self.components["dit"]) if "dit2" in self.components else None

    @property
    def _experts(self) -> tuple[prepare.ExpertFile, ...]:
        return prepare.experts_of(_named_in(self.components, "dit", "dit2"))

    def objective(self, config: TrainConfig) -> Objective:
        """What these models learn from."""
        return replace(config.objective, boundary=self.boundary)

    def load_dit(self, dtype: torch.dtype, place: prepare.OffloadPlace) -> prepare.VideoModel:
        """The DiT with what belongs beside it."""
        parts, offload = self.components, Offload.on(place)
        settings = prepare.DiTSettings(dtype=dtype)
        vace = _named_in(parts, "vace", "vace2")
        model = prepare.load_dit(self._experts, settings, offload, vace=vace[0] if len(vace) == 1 else vace)
        if self.has_motion_controller:
            model = prepare.with_speed_control(model, parts["motion_controller"], offload.device)
        return model

    def sized(self, config: TrainConfig) -> VideoModel:
        """The model as the run would load it, on the meta device: shapes and dtypes, and no weights.

        Raises:
            ValueError: loading would refuse it.
        """
        parts, dtype = self.components, config.compute_dtype
        weights: WeightChoice = "fp8" if config.fp8_base else "plain" if changes_weights(config) else "auto"
        component = join_vace(parts["dit"], parts["vace"]) if "vace" in parts else parts["dit"]
        dits: Any = [SizedModule.planned(component, dtype, weights=weights).module for _ in self._experts]
        controller: Any = None
        if self.has_motion_controller:
            controller = SizedModule.planned(parts["motion_controller"], dtype).module
        experts = tuple(Expert(dit, file.lowest) for dit, file in zip(dits, self._experts, strict=True))
        return VideoModel(experts, self.variant, None, self.name, controller)

    def fit(self, cond: Conditioning, size: VideoSize) -> Conditioning:
        """`cond` as the DiT takes it, by the function that inference uses.

        Raises:
            ValueError: an input is missing, or not one that the model takes.
        """
        return fit(cond, self.variant, self.config, self.name, size, self.has_motion_controller)

    def droppable(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the extra inputs `names` that condition dropout may leave out.

        A VACE branch runs only when it has an input, so that one of them stays.
        """
        rows = (INPUTS[name] for name in names)
        found = tuple(row.name for row in rows if row.droppable and row.gives not in self.variant.requires)
        return () if self.config.vace_layers and found == names else found


def find(config: TrainConfig) -> FoundModels:
    """The models that `config` names, downloaded where that is needed and allowed.

    Raises:
        ValueError: one is missing, unknown or broken, or they cannot use the inputs that `config` names.
    """
    named = [ModelConfig(path=list(group)) for group in config.model_paths]
    for name in config.model_id_with_origin_paths:
        model_id, _, pattern = name.rpartition(":")
        if not model_id or not pattern or not is_nameable(f"{model_id}/{pattern}"):
            raise ConfigError(f"--model_id_with_origin_paths takes model_id:file_pattern; got {name[:100]!r}.")
        named.append(ModelConfig(model_id=model_id, origin_file_pattern=pattern))
    if not named:
        raise ConfigError("Name the models with --model_paths or --model_id_with_origin_paths.")
    defaults = ModelConfig(local_model_path=config.local_model_path, skip_download=config.skip_download)
    try:
        found = find_models([model.filled_from(defaults) for model in named])
    except ValueError as error:
        raise ConfigError(f"--model_paths, --model_id_with_origin_paths: {error}") from error
    components = {kind: model.component for kind, model in found.items()}
    _check_expert(components, config)
    encoder = trained_encoder(config)
    if encoder is not None:
        components[encoder.kind] = encoder
        require_same_latents(components["dit"], components["vae"])
    check(components, config)
    dit = components["dit"]
    if "vace" in components:
        dit = join_vace(dit, components["vace"])
    tokenizer = None if config.tokenizer_path is None else ModelConfig(path=config.tokenizer_path)
    folder = tokenizer_folder(components["text_encoder"], tokenizer, defaults)
    sizes = dit.config_of(DiTConfig)
    models = FoundModels(components, sizes, variants.match_variant(sizes), dit.name, folder)
    check_inputs(models, config)
    return models


def _named_in(components: Mapping[str, Component], *kinds: str) -> list[Component]:
    return [components[kind] for kind in kinds if kind in components]


def _check_expert(components: Mapping[str, Component], config: TrainConfig) -> None:
    """Log a warning when an expert of a pair is trained on all timesteps.

    Raises:
        ConfigError: both experts are named, and one would not be trained; or one, which is to share its LoRA.
    """
    dit, low, high = components["dit"], config.min_timestep_boundary, config.max_timestep_boundary
    _, split = expert_range(True, prepare.boundary_of(dit), config.timestep_shift)
    flags = {"high": f"--max_timestep_boundary {split:g}", "low": f"--min_timestep_boundary {split:g}"}
    if "dit2" in components:
        if not low < split < high:
            raise ConfigError(
                f"{dit.name} and {components['dit2'].name} are the two experts of one model, split at {split:g} of the "
                f"schedule, but --min_timestep_boundary {low:g} and --max_timestep_boundary {high:g} leave one of them "
                "out; name only the file of the other, or leave these flags out."
            )
        return
    if config.expert_loras == "shared":
        raise ConfigError(
            f"--expert_loras shared is for both experts of a pair, but {dit.name} is one model; name both files, or "
            "leave it out."
        )
    side = side_of(dit.header.files[0])
    if side is not None and (low, high) == (0.0, 1.0):
        log.warning("%s is by its name the expert for %s noise, but is trained on all timesteps; %s trains it on its "
                    "own.", dit.name, side, flags[side])  # fmt: skip


def check_inputs(models: FoundModels, config: TrainConfig) -> None:
    """Raise ConfigError when the models cannot use the inputs that `config` names, or need others; the message names
    the flags.
    """
    inputs = input_names(config.extra_inputs) + ((INPAINT,) if config.random_mask else ())
    try:
        variants.check(models.variant, inputs, models.name, models.has_motion_controller)
    except ValueError as error:
        raise ConfigError(f"{error} Inputs are named by --extra_inputs{_flags(models.variant)}.") from error
    if IMAGE in models.variant.slots and not inputs:
        raise ConfigError(
            f"{models.name} ({models.variant.label}) is trained with the first frame of each clip: add "
            "--input_contains_input_image (or --extra_inputs input_image), or --random_mask."
        )
    for trained, begin in USELESS_WITHOUT.items():
        if trained in (*config.trainable_models, config.lora_base_model) and not any(
            n.startswith(begin) for n in inputs
        ):
            names = [name for name in INPUTS if name.startswith(begin)]
            raise ConfigError(f"{trained} learns nothing without its inputs: add --extra_inputs {' or '.join(names)}.")
    if config.random_mask and config.batch_size > 1 and models.config.geometry.frame_times:
        raise ConfigError(
            f"{models.name} has a timestep for each part of a clip, which --random_mask draws for each clip: set "
            "--batch_size 1, with more --gradient_accumulation_steps."
        )
    pictures = [name for name in config.extra_inputs if INPUTS[name].kind in PICTURE_KINDS]
    pictures += ["--random_mask"] * config.random_mask
    if pictures and models.variant.reads_images and "image_encoder" not in models.components:
        raise ConfigError(
            f"{models.name} reads {' and '.join(pictures)} through the CLIP image encoder too; add "
            "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth to the models."
        )


def _flags(variant: Variant) -> str:
    """The flags for all that a variant takes, for a message."""
    names = [row.name for row in INPUTS.values() if row.gives in variant.accepts]
    return f"; this model takes {', '.join(names)}" if names else ""
