"""Flags of DiffSynth-Studio's training scripts that are no settings here: what they stand for, or why there is no need
of them. Names and meanings are those of its three parsers, the newest of which is `diffsynth/diffusion/parsers.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_core.catalog import IMAGE_ENCODER_PATTERN, TEXT_ENCODER_PATTERN, VAE_PATTERN

ENCODER_FILES = (TEXT_ENCODER_PATTERN, VAE_PATTERN, IMAGE_ENCODER_PATTERN)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Accepted:
    """A flag that is taken.

    Attributes:
        says: what takes its place, for the log.
        sets: the settings that it stands for, given the word that follows it.
        has_value: whether a word follows it.
    """

    says: str
    sets: Callable[[str], Settings] = lambda word: {}
    has_value: bool = True


def _names_base(entries: Sequence[str]) -> bool:
    """Whether a list of models, each a file or model_id:file_pattern, names more than encoders."""
    named = (entry.strip() for entry in entries)
    return any(entry and not entry.endswith(ENCODER_FILES) for entry in named)


def _fp8_models(word: str) -> Settings:
    return {"fp8_base": True} if _names_base(word.split(",")) else {}


def _quant_options(word: str) -> Settings:
    return {"fp8_base": True} if _names_base([entry.rpartition(":")[0] for entry in word.split(";")]) else {}


ACCEPTED: Mapping[str, Accepted] = {
    "initialize_model_on_cpu": Accepted(
        "weights are always read from their file to where they are needed", has_value=False
    ),
    "offload_models": Accepted("models that a run does not need are not loaded, and encoders are freed after use"),
    "fp8_models": Accepted(
        "frozen weights of the trained model are kept in 8 bits (--fp8_base); encoders are freed after use", _fp8_models
    ),
    "quant_options": Accepted(
        "frozen weights of the trained model are kept in 8 bits (--fp8_base), whatever the method", _quant_options
    ),
    "enable_model_cpu_offload": Accepted(
        "frozen blocks stay in host memory (--stream_base)", lambda word: {"stream_base": True}, has_value=False
    ),
    "enable_optimizer_cpu_offload": Accepted(
        "the optimizer stays with what it trains; the DeepSpeed configurations of trainer/accelerate move it",
        has_value=False,
    ),
    "cpu_offload_split_threshold": Accepted("blocks are copied one by one; --vram_limit says how many stay"),
    "enable_tensorboard_log": Accepted(
        "the same as --log_with tensorboard", lambda word: {"log_with": ("tensorboard",)}, has_value=False
    ),
    "enable_wandb_log": Accepted(
        "the same as --log_with wandb", lambda word: {"log_with": ("wandb",)}, has_value=False
    ),
    "enable_swanlab_log": Accepted("events.jsonl and loss.png show the loss; --log_with plots it", has_value=False),
    "swanlab_project": Accepted("events.jsonl and loss.png show the loss; --log_with plots it"),
    "enable_csv_log": Accepted("events.jsonl is always written", has_value=False),
}
"""Flags, without dashes, that a run takes."""

ELSEWHERE: Mapping[str, str] = {
    "audio_processor_path": "it is for Wan 2.2 S2V; this trainer is for Wan 2.1",
    "framewise_decoding": "it is for WanToDance models; this trainer is for Wan 2.1",
    "template_model_id_or_path": "template models are of other families; this trainer is for Wan 2.1",
    "enable_lora_hot_loading": "image-to-LoRA models are of other families; this trainer is for Wan 2.1",
    "align_to_opensource_format": "use --lora_format",
    "dataset_metadata_paths": "use --dataset_metadata_path",
}
"""Flags that are refused, and what to do."""


def meaning(given: Sequence[tuple[str, str]]) -> tuple[Settings, tuple[str, ...]]:
    """The settings that the flags of ACCEPTED in `given`, each with its word, stand for; and a line on each flag."""
    settings: dict[str, Any] = {}
    for name, word in given:
        for key, value in ACCEPTED[name].sets(word).items():
            settings[key] = (*settings.get(key, ()), *value) if isinstance(value, tuple) else value
    return settings, tuple(f"--{name}: {ACCEPTED[name].says}." for name in dict(given))
