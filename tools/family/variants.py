"""Train the variants of the bundled text-to-video model, with the trainer and the shipped recipes."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wan_core import bundled, catalog
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.layers import MotionController
from wan_core.models.ops import on_meta
from wan_core.runtime import log
from wancore.trainer.data.synthetic import CAMERAS, TRAVEL, Scene, write_dataset
from wancore.trainer.recipe import command, recipes

from .vae import HEIGHT, NUM_FRAMES, WIDTH, training_scene

ROWS = 240
"""Of each data set."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one variant is trained.

    Attributes:
        structure: of the model, a key of `bundled.DITS`.
        recipe: the published checkpoint whose recipe is used.
        mode: "full" or "lora".
        steps: of `batch_size` clips.
        data: a key of `DATA`.
        flags: settings of `trainer.config.TrainConfig` besides those of the recipe.
    """

    structure: str
    recipe: str
    mode: str = "full"
    steps: int = 150
    data: str = "world"
    flags: Mapping[str, object] = field(default_factory=dict)


TRAININGS: Mapping[str, Training] = {
    "image": Training(structure="i2v", recipe="Wan2.1-Fun-1.3B-InP", steps=380, flags={"condition_dropout": 0.3}),
    "control": Training(
        structure="fun_v1_1_control",
        recipe="Wan2.1-Fun-V1.1-1.3B-Control",
        steps=380,
        data="unnamed",
        flags={"condition_dropout": 0.3},
    ),
    "camera": Training(structure="fun_camera", recipe="Wan2.1-Fun-V1.1-1.3B-Control-Camera", data="cameras"),
    "vace": Training(
        structure="vace",
        recipe="Wan2.1-VACE-1.3B",
        flags={
            "data_file_keys": "video,vace_video,vace_video_mask,vace_reference_image",
            "extra_inputs": "vace_video,vace_video_mask,vace_reference_image",
            "condition_dropout": 0.3,
        },
    ),
    "speed": Training(structure="t2v", recipe="Wan2.1-1.3b-speedcontrol-v1", data="speeds"),
    "dotted": Training(structure="t2v", recipe="Wan2.1-T2V-1.3B", mode="lora", data="dotted", flags={"lora_rank": 8}),
}
"""By the name of what is made, `<name>.safetensors`."""

SHARED: Mapping[str, object] = {
    "height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "dataset_repeat": 20, "batch_size": 16,
    "learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_steps": 10, "weight_decay": 0.0,
    "mixed_precision": "no", "caption_dropout": 0.1, "model_id_with_origin_paths": "",
}  # fmt: skip
"""What is not as a recipe has it: small clips, many of them in a step, and a learning rate for small models."""


def scenes(data: str) -> list[Scene]:
    """The scenes of a data set: any, or each with a dot, a moving camera, or a speed that its caption does not say."""
    found = []
    speeds = np.random.default_rng(1).uniform(0.05, 1.0, ROWS)
    for number in range(ROWS):
        scene = training_scene(200_000 + number)
        changes: dict[str, object] = {"dotted": data == "dotted"}
        if data == "cameras":
            changes |= {"camera": list(CAMERAS)[number % len(CAMERAS)], "motion": "still", "pace": None}
        elif data == "speeds":
            motion = list(TRAVEL)[number % len(TRAVEL)]
            changes |= {"motion": motion, "pace": None, "speed": float(speeds[number]), "camera": "None"}
        found.append(Scene(**{**vars(scene), **changes}))
    return found


def train(name: str, folder: Path) -> Path:
    """Train the variant called `name` from the weights in `folder`. Returns the file that is made there."""
    training, out = TRAININGS[name], folder / f"{name}.safetensors"
    if out.exists():
        return out
    data = folder / "data" / training.data
    if not (data / "metadata.csv").exists():
        # Where half of the captions say no colour, the reference picture is the one that does.
        shown, unnamed = scenes(training.data), training.data == "unnamed"
        write_dataset(data, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES, scenes=shown, unnamed=unnamed)
    begin = folder / f"begin_{name}.safetensors"
    base = load_file(folder / "dit_t2v.safetensors")
    save_file(bundled.widened(base, bundled.DITS[training.structure]), begin)
    models = [begin, folder / "text.safetensors", folder / "vae.safetensors"]
    if bundled.DITS[training.structure].has_image_input:
        models.append(folder / "clip.safetensors")
        save_file(_drawn(ImageEncoder, bundled.IMAGE_ENCODER), models[-1])
    if name == "speed":
        models.append(folder / "begin_controller.safetensors")
        drawn = _drawn(MotionController, bundled.MOTION_CONTROLLER)
        # The last layer is zero: at first the controller changes nothing.
        save_file({k: v * (not k.startswith("linear.4.")) for k, v in drawn.items()}, models[-1])
    (found,) = recipes(training.recipe, training.mode)
    flags = {
        **SHARED,
        "dataset_base_path": data,
        "dataset_metadata_path": data / "metadata.csv",
        "model_paths": json.dumps([str(file) for file in models]),
        "tokenizer_path": folder / catalog.TOKENIZER_PATTERN,
        "max_steps": training.steps,
        "save_steps": training.steps,
        "output_path": folder / "runs" / name,
        "cache_dir": folder / "cache",
        **training.flags,
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    log.info("%s ...", name)
    subprocess.run(command(found, [*words, "--no-use_gradient_checkpointing"], launcher="none"), check=True)
    made: dict[str, Tensor] = load_file(folder / "runs" / name / f"step-{training.steps}.safetensors")
    save_file({**load_file(begin), **made} if training.mode == "full" and name != "speed" else made, out)
    return out


def _drawn(cls: type[nn.Module], config: object) -> dict[str, Tensor]:
    """Random weights that follow from their keys."""
    with on_meta():
        module = cls(config)
    return bundled.state_dict(module)
