"""Small models to be trained, and inputs for them."""

from dataclasses import replace

import torch

from tests.reference import filled
from tests.sampling.variants import TEXT, small_motion_controller
from wan_core import bundled
from wan_core.model import VideoModel
from wan_core.models.dit import WanDiT
from wan_core.types import Conditioning, VaceInput
from wan_core.variants import match_variant
from wancore.trainer.config import TrainConfig
from wancore.trainer.model.trainable import Trainables, prepare

SIZE = (2, 4, 4)

SMALL = {name: replace(sizes, dim=128, ffn_dim=256, image_dim=64) for name, sizes in bundled.DITS.items()}
"""The bundled structures with one head, and with image tokens that cost little."""


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"dataset_base_path": "unused", "mixed_precision": "no", "lora_rank": 4, **changes})


def video_model(variant: str = "t2v", dtype: torch.dtype = torch.float32) -> VideoModel:
    dit = filled(WanDiT, SMALL[variant])
    for name, parameter in dit.named_parameters():
        parameter.data = parameter.data if name.endswith("modulation") else parameter.data.to(dtype)
    controller = small_motion_controller() if variant == "t2v" else None
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

    config = SMALL[variant]
    geometry = config.geometry
    cond = Conditioning(text=random(TEXT, 64))
    if config.has_image_input:
        cond = replace(cond, image_tokens=random(config.image_positions or 257, config.image_dim))
    if config.concat_channels:
        cond = replace(cond, concat=random(config.concat_channels, *SIZE))
    if config.has_reference:
        cond = replace(cond, reference=random(geometry.channels, *SIZE[1:]))
    if config.camera_channels:
        sides = (geometry.spatial_stride * side for side in SIZE[1:])
        cond = replace(cond, camera=random(24, SIZE[0], *sides))
    if config.vace_layers:
        cond = replace(cond, vace=(VaceInput(context=random(96, *SIZE)),))
    if variant == "t2v":
        cond = replace(cond, motion_bucket=torch.tensor([10.0, 90.0])[:batch])
    if geometry.frame_times:
        cond = cond.with_clean_frames(random(geometry.channels, 1, *SIZE[1:]), SIZE[0])
    return random(geometry.channels, *SIZE), torch.tensor([900.0, 300.0])[:batch], cond
