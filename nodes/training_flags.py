"""The text box `flags` of the training nodes: which flags of the trainer a workflow may set.

A workflow is a stranger's file. What names a file, a folder, a model, a program or a server is for the command line;
the node has a widget for what is needed of it.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from ..trainer.config import ELSEWHERE, parser
from ..trainer.flags import parse_known

ALLOWED = frozenset({
    "batch_size", "cache", "caption_dropout", "clip_norm", "condition_dropout", "data_file_keys", "dataset_repeat",
    "extra_inputs", "find_unused_parameters", "fp8_base", "fps", "frame_pick", "gradient_accumulation_steps", "height",
    "keep_last", "learning_rate", "log_with", "lora_alpha", "lora_base_model", "lora_dropout", "lora_format",
    "lora_rank", "lora_target_modules", "loss_weighting", "lr_scheduler", "max_pixels", "max_steps",
    "max_timestep_boundary", "min_free_gb", "min_timestep_boundary", "mixed_precision", "num_epochs", "num_frames",
    "num_workers", "on_bad_sample", "optimizer", "optimizer_args", "random_mask", "remove_prefix_in_ckpt", "resume",
    "resume_force", "sample_cfg_scale", "sample_count", "sample_inference_steps", "sample_negative_prompt",
    "sample_prompt", "sample_seed", "sample_steps", "save_steps", "seed", "short_clip", "stream_base",
    "timestep_sampling", "timestep_shift", "trainable_models", "use_gradient_checkpointing",
    "use_gradient_checkpointing_offload", "validate_steps", "validation_clips", "vram_limit", "warmup_steps",
    "weight_decay", "width",
})  # fmt: skip
"""Settings of a run that hold numbers, switches and words that the trainer itself lists. A new one is refused until it
is named here.
"""

WORDS: Mapping[str, tuple[str, ...]] = {"log_with": ("tensorboard",), "resume": ("auto", "never")}
"""Of some flags only these values: the others name a server or a folder."""

INSTEAD: Mapping[str, str] = {
    "cache_dir": "encoded samples are kept in the run's folder",
    "config": "write its settings into the node, or into flags",
    "confined": "the files of a workflow's data set always lie in its folder",
    "dataset_base_path": "choose the folder in Training Data",
    "dataset_metadata_path": "name it in metadata of Training Data",
    "local_model_path": "models are taken from ComfyUI's folders",
    "log_with": "in the graph it takes tensorboard; what sends data to a server is for `python -m trainer.train`",
    "lora_checkpoint": "`python -m trainer.train` in a shell starts from a LoRA",
    "model_id_with_origin_paths": "choose models in the node, with its switch download",
    "model_paths": "choose models in the node",
    "output_path": "the run's name decides it",
    "preset_lora_model": "`python -m trainer.train` in a shell makes a LoRA part of the model",
    "preset_lora_path": "`python -m trainer.train` in a shell makes a LoRA part of the model",
    "reference": "here every setting has one name; see docs/training.md",
    "resume": "in the graph it takes auto or never; `python -m trainer.train` continues from any folder",
    "resume_from_checkpoint": "choose the trained weights as the model",
    "skip_download": "use the node's switch download",
    "stop_file": "the node has one of its own",
    "switched": "name inputs in extra_inputs of Training Data",
    "task": "a node encodes and trains",
    "tokenizer_path": "it is found beside the text encoder",
    "wandb_project": "what sends data to a server is for `python -m trainer.train`",
}


def typed(flags: str) -> dict[str, Any]:
    """The settings that the text box holds.

    Raises:
        ValueError: a flag is unknown, its value cannot be read, or it is not a workflow's to set.
    """
    found = parse_known(parser(prints_help=False), shlex.split(flags), ELSEWHERE)
    for name, value in found.items():
        words = value if isinstance(value, tuple) else (value,)
        if name not in ALLOWED or (name in WORDS and not set(words) <= set(WORDS[name])):
            given = value[0][0] if name == "reference" else name
            shown = "input_contains_..." if name == "switched" else given
            instead = INSTEAD.get(name, "use `python -m trainer.train` in a shell")
            raise ValueError(f"flags: --{shown} is for the command line; {instead}.")
    return found
