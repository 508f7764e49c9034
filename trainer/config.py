"""Every setting of a training run: one frozen dataclass, in which a field is a flag."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from wan_core.atomic import replacing
from wan_core.files import is_nameable
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.types import VideoSize

from . import optimizers
from .data.clips import INPUTS, SWITCHES
from .flags import (
    REFERENCE_FLAGS,
    REFUSED_FLAGS,
    ConfigError,
    build_parser,
    check_fields,
    from_json,
    option,
    parse_known,
    read_json,
    to_json,
    translate,
)
from .objective import Objective, expert_range

log = logging.getLogger("wancore")

TRAINABLE = ("dit", "vace", "motion_controller", "vae", "text_encoder")
LORA_BASES = ("dit", "vace")
FRAME_PICKS = ("head", "middle", "random", "spread")

MAX_SIDE = 16384  # pixels; ComfyUI's largest image side
MAX_RANK = 5120
"""The width of the largest model: no change of a layer has a higher rank."""

PATHS = (
    "dataset_base_path", "dataset_metadata_path", "cache_dir", "local_model_path", "tokenizer_path",
    "resume_from_checkpoint", "preset_lora_path", "lora_checkpoint", "output_path", "resume", "stop_file",
)  # fmt: skip
"""Settings that name a file or folder."""

TASKS = ("sft", "sft:data_process", "sft:train")
"""The values of `--task`: encode and train; encode only (`output.record_data`); train on what was encoded."""
DISTILLATION = "direct_distill"
"""The reference's distillation task, also with `:data_process` or `:train`. A teacher model makes its samples."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a run. They check themselves.

    Raises:
        ConfigError: a value is out of range, or two of them cannot go together.
    """

    dataset_base_path: str = option("", "folder that the paths of the metadata start from")
    dataset_metadata_path: str | None = option(
        None,
        "csv, json or jsonl file, one row per sample; none is metadata.* of the folder, or files with .txt captions",
    )
    confined: bool = option(
        False, "refuse rows that name files outside of the folder, as workflows always do; links in it are followed"
    )
    data_file_keys: tuple[str, ...] = option(
        ("image", "video"), "columns that hold media files; the clip that is trained is in video or image"
    )
    dataset_repeat: int = option(1, "how often each row is used in an epoch", low=1, high=10**6)
    height: int | None = option(
        None, "height in pixels; without height and width every clip keeps its own size", low=1, high=MAX_SIDE
    )
    width: int | None = option(None, "width in pixels", low=1, high=MAX_SIDE)
    max_pixels: int = option(
        1920 * 1080, "with sizes of their own, clips of a larger area are scaled down to it", low=256
    )
    num_frames: int = option(81, "frames of a clip, 4k + 1", low=1, high=10001)
    fps: float | None = option(
        None, "bring clips to this frame rate by their timestamps; none takes frames as stored", low=0.01
    )
    frame_pick: str = option("head", "which frames of a longer clip are used", choices=FRAME_PICKS)
    short_clip: str = option(
        "error", "a clip with fewer frames is an error, or trimmed to the largest 4k + 1", choices=("error", "trim")
    )
    on_bad_sample: str = option(
        "error",
        "any bad row stops the run before it starts, or bad rows are listed and left out",
        choices=("error", "skip"),
    )
    extra_inputs: tuple[str, ...] = option((), "comma list of inputs besides the prompt", choices=tuple(INPUTS))
    caption_dropout: float = option(0.0, "share of draws that are trained without caption", low=0, high=1)
    condition_dropout: float = option(
        0.0, "share of draws that are trained without the pictures that the model can do without", low=0, high=1
    )
    random_mask: bool = option(
        False, "train inpainting models with random masks over the clip, in place of start and end image"
    )
    num_workers: int = option(0, "threads that load samples ahead", low=0, high=256, aliases=("dataset_num_workers",))
    cache: str = option("disk", "keep encoded samples on disk, or encode them at every step", choices=("disk", "off"))
    cache_dir: str | None = option(None, "where encoded samples are kept; none is <output_path>/cache")
    task: str = option(
        "sft",
        "train; or encode the data into output_path and end; or train on what was encoded in dataset_base_path",
        choices=TASKS,
    )

    model_paths: tuple[tuple[str, ...], ...] = option(
        (), "JSON list of model files; an inner list holds the shards of one model"
    )
    model_id_with_origin_paths: tuple[str, ...] = option((), "comma list of published models: model_id:file_pattern")
    local_model_path: str | None = option(None, "root of the published models; none is ./models")
    tokenizer_path: str | None = option(None, "folder of the tokenizer, where the text encoder does not bring one")
    skip_download: bool = option(False, "use only files that are here")
    resume_from_checkpoint: str | None = option(None, "file of trained weights to start from")
    preset_lora_path: str | None = option(
        None, "LoRA that is made part of the model before training; what is trained then goes on top of it"
    )
    preset_lora_model: str | None = option(None, "model that this LoRA is for; its names tell", choices=LORA_BASES)

    trainable_models: tuple[str, ...] = option((), "comma list of models whose weights are trained", choices=TRAINABLE)
    lora_base_model: str | None = option(None, "model that gets a LoRA", choices=LORA_BASES)
    lora_target_modules: tuple[str, ...] = option(
        ("q", "k", "v", "o", "ffn.0", "ffn.2"), "layers that get a LoRA, by the end of their name"
    )
    lora_rank: int = option(32, "rank of the LoRA", low=1, high=MAX_RANK)
    lora_alpha: float | None = option(None, "scale of the LoRA is alpha / rank; none is the rank", low=1e-6)
    lora_dropout: float = option(0.0, "dropout before the LoRA", low=0, high=0.999)
    lora_checkpoint: str | None = option(None, "LoRA file to start from; of a pair also a name with braces for both")
    expert_loras: str = option(
        "own", "where both experts of a pair are trained: a LoRA for each, or one for both", choices=("own", "shared")
    )
    lora_format: str = option(
        "comfyui", "key names of the saved LoRA", choices=("comfyui", "diffsynth", "kohya", "diffusers")
    )

    learning_rate: float = option(1e-4, "learning rate, as it is used in every step after the warm-up", low=0)
    lr_scheduler: str = option(
        "constant", "what the learning rate does after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = option(0, "steps over which the learning rate grows from zero", low=0)
    optimizer: str = option(
        "torch.optim.AdamW", "dotted name of one of the optimizers listed below", aliases=("customized_optimizer",)
    )
    optimizer_args: Mapping[str, Any] | None = option(
        None, "further arguments of the optimizer, as name=value,... or JSON"
    )
    weight_decay: float = option(0.01, "weight decay", low=0)
    clip_norm: float = option(1.0, "largest norm of the gradient; 0 does not limit it", low=0)
    num_epochs: int = option(1, "passes over the data", low=1, high=10**5)
    max_steps: int | None = option(None, "stop after that many steps, whatever the epochs", low=1, high=10**12)
    batch_size: int = option(1, "samples per process and forward pass", low=1, high=10**6)
    gradient_accumulation_steps: int = option(1, "passes per step", low=1, high=10**6)
    seed: int = option(0, "seed of data order, noise, timesteps and dropout", low=0, high=2**63 - 1)
    mixed_precision: str = option(
        "bf16", "dtype of frozen weights and of matrix products; what is trained is float32", choices=("bf16", "no")
    )
    timestep_sampling: str = option("uniform", "how timesteps are drawn", choices=("uniform", "logit_normal"))
    timestep_shift: float = option(5.0, "shift of the training schedule towards noise", low=0.01)
    loss_weighting: str = option("bell", "weight of the loss over timesteps", choices=("bell", "none"))
    min_timestep_boundary: float = option(
        0.0, "where the drawn part of the schedule begins, 0 is most noise", low=0, high=1
    )
    max_timestep_boundary: float = option(1.0, "where the drawn part of the schedule ends", low=0, high=1)
    use_gradient_checkpointing: bool = option(True, "recompute activations in the backward pass")
    use_gradient_checkpointing_offload: bool = option(False, "keep what checkpointing saves in host memory")
    gradient_checkpointing_keeps: str = option(
        "auto",
        "what a block keeps: its input, or what attention gave as well, which is then not computed twice; auto goes by "
        "the memory there is",
        choices=("auto", "inputs", "attention"),
    )
    find_unused_parameters: bool = option(False, "let several processes train parameters that a step does not use")
    fp8_base: bool = option(False, "keep the frozen weights in 8 bits")
    stream_base: bool = option(False, "keep the frozen blocks in host memory and copy each when it is needed")
    vram_limit: float | None = option(
        None, "GiB of device memory that frozen weights may take; others are streamed", low=0
    )

    output_path: str = option("./models", "folder for everything that the run writes")
    remove_prefix_in_ckpt: str = option("pipe.dit.", "prefix that is left out of the names of saved weights")
    save_steps: int | None = option(None, "save after that many steps, not after each epoch", low=1, high=10**12)
    keep_last: int | None = option(
        None, "how many saves stay, weights and states; none keeps all weights and two states", low=1, high=10**6
    )
    resume: str = option(
        "auto",
        "continue a stopped run: auto looks in output_path, never does not continue, else the folder of a state",
    )
    resume_force: bool = option(False, "continue although data or settings changed")
    stop_file: str | None = option(
        None, "a file whose appearance ends the run after the current step; none is <output_path>/stop"
    )
    min_free_gb: float = option(1.0, "GB that stay free on the disk besides what is saved", low=0)
    log_with: tuple[str, ...] = option((), "further logs besides events.jsonl", choices=("tensorboard", "wandb"))
    wandb_project: str = option("wancore", "project of Weights & Biases")
    validate_steps: int | None = option(
        None, "measure the loss on held-out clips every so many steps", low=1, high=10**12
    )
    validation_clips: int = option(0, "how many rows, from the end, are held out for that", low=0)
    sample_steps: int | None = option(None, "generate sample videos every so many steps", low=1, high=10**12)
    sample_count: int = option(1, "how many samples, each conditioned as one row of the data", low=1, high=1000)
    sample_prompt: str | None = option(None, "prompt of the samples; none takes each row's caption")
    sample_negative_prompt: str = option("", "negative prompt of the samples")
    sample_seed: int = option(1, "seed of the samples", low=0, high=2**63 - 1)
    sample_inference_steps: int = option(20, "steps of the sampler", low=1, high=1000)
    sample_cfg_scale: float = option(5.0, "guidance of the samples", low=0)

    def __post_init__(self) -> None:
        # First, because its other flags are inputs of the teacher's sampler and would fail with unrelated messages.
        if str(self.task).startswith(DISTILLATION):
            raise ConfigError(
                f"--task {self.task}: distillation is not offered; this trainer learns from data alone "
                f"({', '.join(TASKS)}). Distil with DiffSynth-Studio, and use the result here as a model or a LoRA."
            )
        check_fields(self)
        for name in PATHS:
            path = getattr(self, name)
            if path is not None and not is_nameable(path):
                raise ConfigError(f"--{name}: {path[:60]!r}... is not a valid file name; give another path.")
        for group in self.model_paths:
            strange = [path for path in group if not isinstance(path, str) or not is_nameable(path)]
            if strange or not group:
                raise ConfigError(
                    f"--model_paths: {strange or group!s:.60} is not a valid file name; give a path or a list of paths."
                )
        try:
            optimizers.check(self.optimizer, self.optimizer_args)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        rules = {
            "Give --height and --width together, or neither": (self.height is None) != (self.width is None),
            "--min_timestep_boundary must be below --max_timestep_boundary": self.min_timestep_boundary
            >= self.max_timestep_boundary,
            "--task sft:data_process keeps what is encoded on disk, but "
            + (self._why_uncached or "--cache is off"): self.task == "sft:data_process" and not self.caches,
            "--random_mask takes the place of input_image and end_image; remove them from --extra_inputs": (
                self.random_mask and bool({"input_image", "end_image"} & set(self.extra_inputs))
            ),
            "--lora_target_modules names no layer; leave it out for those of the reference": (
                self.lora_base_model is not None and not self.lora_target_modules
            ),
            "--validate_steps needs clips to validate on; set --validation_clips": (
                self.validate_steps is not None and not self.validation_clips
            ),
        }
        broken = next((rule for rule, is_broken in rules.items() if is_broken), None)
        if broken:
            raise ConfigError(f"{broken}.")
        for name in self.extra_inputs:
            needed = INPUTS[name].needs
            if needed and needed not in self.extra_inputs:
                raise ConfigError(f"The input {name} needs {needed}; add it to --extra_inputs.")

    @cached_property
    def size(self) -> VideoSize | None:
        """The fixed size of all clips, rounded up; None when each keeps its own. A model may round it further."""
        if self.height is None or self.width is None:
            return None
        return VideoSize.rounded(self.width, self.height, self.num_frames, DEFAULT_GEOMETRY)

    @cached_property
    def clip_frames(self) -> int:
        """`num_frames`, rounded up to a length that videos can have."""
        side = DEFAULT_GEOMETRY.side_multiple
        return (self.size or VideoSize.rounded(side, side, self.num_frames)).num_frames

    @property
    def _why_uncached(self) -> str | None:
        """Why encoded samples cannot be kept; None when they can."""
        if {"vae", "text_encoder"} & set(self.trainable_models):
            return "encoders that are trained give something else at every step"
        if self.frame_pick == "random" or self.random_mask:
            return "inputs change from epoch to epoch (--frame_pick random, --random_mask)"
        return None

    @property
    def caches(self) -> bool:
        """Whether encoded samples are kept on disk."""
        return self.cache == "disk" and self._why_uncached is None

    @property
    def _own_prefixes(self) -> set[str]:
        trained = filter(None, (*self.trainable_models, self.lora_base_model))
        return {"", *(f"pipe.{name}." for name in trained)}

    @property
    def notices(self) -> tuple[str, ...]:
        """Notes on settings that have no effect in this combination."""
        prefix = self.remove_prefix_in_ckpt
        notices = {
            f"Encoded samples are not kept on disk: {self._why_uncached}.": self.cache == "disk" and not self.caches,
            f"--remove_prefix_in_ckpt {prefix!r} is no prefix of the names of what is trained; they are saved without "
            "any.": prefix not in {*self._own_prefixes, TrainConfig.remove_prefix_in_ckpt},
        }
        return tuple(line for line, applies in notices.items() if applies)

    @property
    def objective(self) -> Objective:
        """What the model learns from, and how its loss is weighted."""
        return Objective(
            sampling=self.timestep_sampling,
            shift=self.timestep_shift,
            weighting=self.loss_weighting,
            low=self.min_timestep_boundary,
            high=self.max_timestep_boundary,
        )

    def for_expert(self, side: str, boundary: float) -> "TrainConfig":
        """The same on the timesteps of one expert, `high` or `low`, of a pair that is split at `boundary`, 0 to 1."""
        low, high = expert_range(side == "high", boundary, self.timestep_shift)
        return replace(self, min_timestep_boundary=low, max_timestep_boundary=high)

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache_dir or Path(self.output_path) / "cache")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of frozen weights and of matrix products."""
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32

    @property
    def streams(self) -> bool:
        """Whether frozen blocks are copied to the device when they are needed."""
        return self.stream_base or self.vram_limit is not None

    def resolved(self) -> dict[str, Any]:
        """Every setting as JSON; `from_mapping` makes the same configuration of it."""
        return to_json(self)

    def save_json(self, path: str | Path) -> None:
        """Write a file that `--config` reads."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(self.resolved(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "The configuration") -> "TrainConfig":
        """The configuration of a JSON object; what it lacks has its default.

        Raises:
            ConfigError: a name is no setting, or a value cannot be used.
        """
        return cls(**from_json(cls, values, source))


PROGRAM = "python -m trainer.train"


def parser(prog: str = PROGRAM, *, prints_help: bool = True) -> argparse.ArgumentParser:
    """The command line of `trainer.train`; without `prints_help` nothing in it ends the program."""
    made = build_parser(TrainConfig, prog, "Train a Wan model.", prints_help=prints_help)
    made.add_argument("--config", help="JSON file with any of these settings; flags win over it")
    for name in SWITCHES:
        made.add_argument(
            f"--input_contains_{name}",
            dest="switched",
            action="append_const",
            const=name,
            help=f"the same as {name} in --extra_inputs: {INPUTS[name].help}",
        )
    for name, flag in REFERENCE_FLAGS.items():
        kept = {"action": "append", "type": partial(_named, name)} if flag.has_value else {
            "action": "append_const", "const": (name, "")}  # fmt: skip
        made.add_argument(f"--{name}", dest="reference", help=f"a flag of DiffSynth-Studio: {flag.note}", **kept)
    return made


def _named(name: str, word: str) -> tuple[str, str]:
    return name, word


def parse(argv: Sequence[str], prog: str = PROGRAM) -> TrainConfig:
    """The configuration that a command line asks for.

    Args:
        prog: the command, as its help names it.

    Raises:
        ConfigError: a flag is unknown, its value cannot be used, or the file of `--config` cannot be read.
    """
    typed = parse_known(parser(prog), argv, REFUSED_FLAGS)
    file, switched = typed.pop("config", None), typed.pop("switched", ())
    implied, notes = translate(typed.pop("reference", ()))
    for line in notes:
        log.info("%s", line)
    values = from_json(TrainConfig, read_json(file), file) if file else {}
    values |= {**implied, **typed}
    if "log_with" in implied:
        values["log_with"] = tuple(dict.fromkeys((*typed.get("log_with", ()), *implied["log_with"])))
    values["extra_inputs"] = tuple(dict.fromkeys((*values.get("extra_inputs", ()), *switched)))
    return TrainConfig(**values)
