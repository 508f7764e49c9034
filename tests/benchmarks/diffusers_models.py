"""The models of diffusers at the shapes of ours, where it is installed."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wan_core.models.config import HEAD_DIM, DiTConfig, VAEConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def diffusers_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """Its text-to-video transformer, with the parts in float32 that its loader keeps there; weights are not set."""
    from diffusers import WanTransformer3DModel

    with device:
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads, attention_head_dim=HEAD_DIM, ffn_dim=config.ffn_dim,
            num_layers=config.num_layers, text_dim=config.text_dim, freq_dim=config.freq_dim,
            in_channels=config.in_channels, out_channels=config.out_channels,
        )  # fmt: skip
    _cast(model, dtype)
    if dtype != torch.float32:
        for name, parameter in model.named_parameters():
            if set(model._keep_in_fp32_modules) & set(name.split(".")):
                parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def vae_settings(config: VAEConfig) -> dict[str, Any]:
    """The arguments of `AutoencoderKLWan` for a VAE of that configuration."""
    settings: dict[str, Any] = {"base_dim": config.base_dim}
    if config.shortcuts:
        geometry, pixels = config.geometry, 3 * config.patch**2
        settings |= dict(
            decoder_base_dim=config.decoder_dim, z_dim=geometry.channels, is_residual=True, in_channels=pixels,
            out_channels=pixels, patch_size=config.patch, scale_factor_spatial=geometry.spatial_stride,
            latents_mean=list(geometry.mean), latents_std=list(geometry.std),
        )  # fmt: skip
    return settings


def diffusers_vae(config: VAEConfig, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    """Its video autoencoder; weights are not set."""
    from diffusers import AutoencoderKLWan

    with device:
        model = AutoencoderKLWan(**vae_settings(config))
    return _cast(model, dtype).requires_grad_(False).eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in `dtype`, without the library's advice to let its loader do that."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return model.to(dtype)
    finally:
        logger.setLevel(level)
