"""Values that the published implementations computed, and tiny models with the weights that they were computed on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor, nn

from wan_core import bundled
from wan_core.model import VideoModel
from wan_core.models.config import WAN_22, DiTConfig, ImageEncoderConfig, MotionControllerConfig
from wan_core.models.dit import WanDiT
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.layers import MotionController
from wan_core.models.ops import on_meta
from wan_core.models.text_encoder import UMT5Encoder
from wan_core.models.vae import WanVAE
from wan_core.sampling.experts import Expert
from wan_core.variants import match_variant

DATA = Path(__file__).parent / "data"

_BASE = dict(dim=256, ffn_dim=512, num_layers=4, text_dim=64, freq_dim=64)
DITS = {
    "t2v": DiTConfig(**_BASE),
    "i2v": DiTConfig(**_BASE, in_channels=36, has_image_input=True),
    "flf2v": DiTConfig(**_BASE, in_channels=36, has_image_input=True, image_positions=514),
    "fun_control": DiTConfig(**_BASE, in_channels=48, has_image_input=True),
    "fun_v1_1_control": DiTConfig(**_BASE, in_channels=48, has_image_input=True, has_reference=True),
    "fun_camera": DiTConfig(**_BASE, in_channels=32, has_image_input=True, camera_channels=24),
    "vace": DiTConfig(**_BASE, vace_layers=(0, 2), vace_channels=96),
    "i2v_a14b": DiTConfig(**_BASE, in_channels=36),
    "fun_a14b_control": DiTConfig(**_BASE, in_channels=52, has_reference=True),
    "fun_a14b_camera": DiTConfig(**_BASE, in_channels=36, camera_channels=24),
}
_5B = DiTConfig(**_BASE, geometry=WAN_22, in_channels=48)
DITS_5B = {
    "ti2v_5b": _5B,
    "fun_5b_inp": replace(_5B, in_channels=100),
    "fun_5b_control": replace(_5B, in_channels=148, has_reference=True),
    "fun_5b_camera": replace(_5B, in_channels=100, camera_channels=24),
}
ALL_DITS = DITS | DITS_5B


@dataclass(frozen=True)
class Case:
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


def load_case(name: str, folder: str = "cases") -> Case:
    with safe_open(DATA / folder / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Case(tensors, metadata)


def arguments(case: Case) -> dict[str, Any]:
    """The call of an end-to-end case."""
    return json.loads(case.metadata["case"])["args"]


@cache
def _drawn(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return bundled.draw(key, shape, seed)


def filled(cls: type[nn.Module], config: Any, seed: int = 0) -> nn.Module:
    """A module with the weights of the recipe, its own to change."""
    with on_meta():
        module = cls(config)
    weights = {key: _drawn(key, tuple(tensor.shape), seed).clone() for key, tensor in module.state_dict().items()}
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def tiny_dit(variant: str = "t2v", seed: int = 0) -> WanDiT:
    return filled(WanDiT, ALL_DITS[variant], seed)


@contextmanager
def drawn_weights() -> Iterator[None]:
    """Bundled models that are written inside the block have the weights of the recipe and not trained ones."""
    with mock.patch.object(bundled, "TRAINED", DATA / "no weights here"):
        yield


def write_drawn(root: Path, model_id: str) -> Path:
    """A bundled model with the weights that the values in `tests/data` were computed on; its folder."""
    with drawn_weights():
        return bundled.write_model(root, model_id)


HIGH, LOW = 1, 2
"""The seeds of the experts of a pair."""


def tiny_pair(variant: str, boundary: float) -> VideoModel:
    """The experts of Wan 2.2 that the values in `tests/data` were computed on."""
    experts = (Expert(tiny_dit(variant, HIGH), boundary * 1000), Expert(tiny_dit(variant, LOW)))
    return VideoModel(experts, match_variant(DITS[variant]), None, variant)


def tiny_motion_controller() -> MotionController:
    return filled(MotionController, MotionControllerConfig(dim=256, freq_dim=64))


def tiny_vae() -> WanVAE:
    return filled(WanVAE, bundled.VAE)


def tiny_vae_22() -> WanVAE:
    return filled(WanVAE, bundled.VAE_22)


def tiny_text_encoder() -> UMT5Encoder:
    return filled(UMT5Encoder, bundled.TEXT_ENCODER)


def tiny_image_encoder() -> ImageEncoder:
    return filled(ImageEncoder, ImageEncoderConfig(dim=160, mlp_dim=640, num_layers=4, out_dim=64))


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (
        torch.linalg.vector_norm(got.float() - expected.float()) / torch.linalg.vector_norm(expected.float())
    ).item()
