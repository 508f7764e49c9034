"""Tiny models to be trained, and inputs for them."""

from dataclasses import replace

import torch

from tests.reference import tiny_dit, tiny_motion_controller
from wan_core.model import VideoModel
from wan_core.types import Conditioning, VaceInput
from wan_core.variants import match_variant
from wancore.trainer.config import TrainConfig
from wancore.trainer.model.trainable import Trainables, prepare

SIZE = (2, 4, 4)


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"dataset_base_path": "unused", "mixed_precision": "no", "lora_rank": 4, **changes})


def video_model(variant: str = "t2v", dtype: torch.dtype = torch.float32) -> VideoModel:
    dit = tiny_dit(variant)
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data if name.endswith("modulation") else parameter.data.to(dtype)
    controller = tiny_motion_controller() if variant == "t2v" else None
    return VideoModel.of(dit, match_variant(dit.config), None, f"tiny {variant}", controller)


def trainables(variant: str = "t2v", **changes) -> Trainables:
    settings = config(**changes)
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    return prepare(video_model(variant, dtype), settings)


def inputs(variant: str = "t2v", batch: int = 2):
    """Latents, timesteps and conditioning with everything that the variant takes."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(batch, *shape, generator=generator)

    config = tiny_dit(variant).config
    cond = Conditioning(text=random(512, 64))
    if config.has_image_input:
        cond = replace(cond, image_tokens=random(config.image_positions or 257, config.image_dim))
    if config.concat_channels:
        cond = replace(cond, concat=random(config.concat_channels, *SIZE))
    if config.has_reference:
        cond = replace(cond, reference=random(16, *SIZE[1:]))
    if config.camera_channels:
        cond = replace(cond, camera=random(24, SIZE[0], 8 * SIZE[1], 8 * SIZE[2]))
    if config.vace_layers:
        cond = replace(cond, vace=(VaceInput(context=random(96, *SIZE)),))
    if variant == "t2v":
        cond = replace(cond, motion_bucket=torch.tensor([10.0, 90.0])[:batch])
    return random(16, *SIZE), torch.tensor([900.0, 300.0])[:batch], cond
