"""A conditioning for every tiny model, of any length."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.reference import ALL_DITS, filled
from wan_core.models.config import DiTConfig, MotionControllerConfig
from wan_core.models.dit import WanDiT
from wan_core.models.layers import MotionController
from wan_core.types import Conditioning, LatentSize, VaceInput

REFERENCES = 1
"""Reference frames in front of the video where a model takes VACE inputs."""

TEXT = 24
"""Rows of text; the models take any number, and few are fast."""


SMALL = {
    variant: replace(config, dim=128, ffn_dim=256, num_layers=3, image_dim=64) for variant, config in ALL_DITS.items()
}
"""The same structures with one head, and with image tokens that cost little: for what compares runs with each other."""


def small_dit(variant: str = "t2v") -> WanDiT:
    return filled(WanDiT, SMALL[variant])


def small_motion_controller() -> MotionController:
    return filled(MotionController, MotionControllerConfig(dim=128, freq_dim=64))


def conditioning(
    variant: str,
    size: LatentSize,
    seed: int = 5,
    references: int = REFERENCES,
    models: dict[str, DiTConfig] = ALL_DITS,
) -> Conditioning:
    """Random values for every input that the model of this structure has."""
    config = models[variant]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    fields: dict = {"text": draw(TEXT, 64), "negative_text": draw(TEXT, 64)}
    if config.has_image_input:
        fields["image_tokens"] = draw(config.image_positions or 257, config.image_dim)
    if config.concat_channels:
        fields["concat"] = draw(config.concat_channels, *size.shape)
    if config.has_reference:
        fields["reference"] = draw(config.out_channels, size.height, size.width)
    if config.camera_channels:
        stride = config.geometry.spatial_stride
        fields["camera"] = draw(24, size.frames, size.height * stride, size.width * stride)
    if config.vace_layers:
        frames = (references + size.frames, size.height, size.width)
        fields["vace"] = (VaceInput(context=draw(96, *frames)),)
    if variant == "t2v":
        fields["motion_bucket"] = torch.tensor([40.0])
    cond = Conditioning(**fields)
    if config.geometry.frame_times:
        cond = cond.with_clean_frames(draw(config.out_channels, 1, size.height, size.width), size.frames)
    return cond
