"""The sizes of a model, from the shapes of its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from math import isqrt, prod

from ..files import errors_from
from ..models.config import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    HEAD_DIM,
    WAN_21,
    WAN_22,
    DiTConfig,
    Geometry,
    ImageEncoderConfig,
    MotionControllerConfig,
    PreviewDecoderConfig,
    TextEncoderConfig,
    VAEConfig,
)
from ..offload.formats import ADVICE
from .names import ModelKind, Source
from .tensor_files import CheckpointError

Config = DiTConfig | MotionControllerConfig | TextEncoderConfig | VAEConfig | ImageEncoderConfig | PreviewDecoderConfig

CLIP_HEAD_DIM = 80
"""Attention head width of the one CLIP tower that Wan 2.1 was trained with, ViT-H/14."""

BASE_LAYERS = {15: 30, 8: 40}
"""Blocks of the published base model for each number of VACE blocks."""

FIVE_AXES = ("patch_embedding.weight", "vace_patch_embedding.weight")
"""Weights of convolutions over videos. llama.cpp's quantiser leaves tensors of five axes out of its GGUF files."""

MAX_BLOCKS = 200
"""More than any model has; each costs some 100 kB as a module, whatever the file holds of it."""

OTHER_WAN = {
    r"casual_audio_encoder\..+": "Wan 2.2 S2V",
    r"face_adapter\..+|face_encoder\..+": "Wan 2.2 Animate",
    r"audio_proj\..+|audio_model\..+|.+\.audio_cross_attn\..+": "a Wan model that listens to audio (HuMo, MultiTalk)",
    r"cam_encoder\..+|blocks\.\d+\.cam_encoder\..+": "ReCamMaster",
}
"""Parts that only relatives of Wan 2.1 have."""


class Shapes:
    """Shapes by original name; a name that is not there is the user's incomplete file."""

    def __init__(self, sources: Mapping[str, Source], owner: str) -> None:
        self.sources, self.owner = sources, owner

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.sources:
            raise self.error(self._lack(name))
        return self.sources[name].shape

    def _lack(self, name: str) -> str:
        """Why the weight `name` is not there: tensors in its place are another way to store it, none a loss."""
        layer = name.removesuffix("weight")
        instead = [other for other in self.sources if other.startswith(layer) and other != f"{layer}bias"]
        if not instead and name in FIVE_AXES:
            return (
                f"lacks the tensor {name!r}; the file is incomplete, download it again. If it is a GGUF file, its 5-D "
                "tensors were not put back after it was quantised, as ComfyUI-GGUF's fix_5d_tensors.py does: use a "
                "file in which they are"
            )
        if not instead:
            return f"lacks the tensor {name!r}; the file is incomplete, download it again"
        return f"holds {', '.join(map(repr, instead[:3]))} in place of {name!r}, which is not read. {ADVICE[:-1]}"

    def any(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.sources)

    def count(self, pattern: str) -> int:
        """How many blocks there are, by the indices that `pattern` captures, each of which must be there."""
        found = (re.match(pattern, name) for name in self.sources)
        indices = {match[1]: match[0] for match in found if match}
        strange = sorted(indices[i] for i in indices.keys() - set(map(str, range(len(indices)))))
        if strange:
            raise self.error(
                f"holds tensors of {strange[0]}* but not of all the blocks before it; it has {len(indices)} blocks, "
                "the file is incomplete, download it again"
            )
        if len(indices) > MAX_BLOCKS:
            raise self.error(f"has {len(indices)} blocks; the largest Wan 2.1 model has 40")
        return len(indices)

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.owner} {text}.")


def vace_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """The blocks after which the hints of `count` VACE blocks are added: evenly spaced from the first.

    Raises:
        CheckpointError: there are more VACE blocks than blocks.
    """
    if count > num_layers:
        raise CheckpointError(f"A model of {num_layers} blocks cannot carry {count} VACE blocks.")
    return tuple(range(0, num_layers, num_layers // count)[:count]) if count else ()


def _patch_size(shapes: Shapes, name: str) -> tuple[int, int, int]:
    """Of the patches that the convolution `name` (out, in, frames, rows, columns) makes tokens of."""
    if len(shapes[name]) != 5:
        raise shapes.error(
            f"holds {name!r} as {list(shapes[name])}; the weight of a convolution over videos is expected"
        )
    _, _, frames, rows, columns = shapes[name]
    return frames, rows, columns


def _geometry(shapes: Shapes, channels: int, patch: tuple[int, int, int]) -> Geometry:
    """Of a DiT whose head gives latents of so many channels."""
    if channels not in GEOMETRIES:
        known = " or ".join(f"{found.channels} ({found.name})" for found in GEOMETRIES.values())
        raise shapes.error(f"is made for latents of {channels} channels; Wan models have {known}")
    return replace(GEOMETRIES[channels], patch=patch)


def _read_dit(shapes: Shapes) -> DiTConfig:
    patch = _patch_size(shapes, "patch_embedding.weight")
    layers, branch = shapes.count(r"blocks\.(\d+)\."), shapes.count(r"vace_blocks\.(\d+)\.")
    has_vace = branch > 0 or shapes.any(r"vace_")
    has_image = shapes.any(r"img_emb\.|blocks\.\d+\.cross_attn\.\w*_img\.")
    geometry = _geometry(shapes, shapes["head.head.weight"][0] // prod(patch), patch)
    config = DiTConfig(
        geometry=geometry,
        dim=shapes["head.modulation"][-1],
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_layers=layers,
        in_channels=shapes["patch_embedding.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        has_image_input=has_image,
        image_dim=shapes["img_emb.proj.0.weight"][0] if shapes.any(r"img_emb\.") else DiTConfig.image_dim,
        image_positions=shapes["img_emb.emb_pos"][1] if shapes.any(r"img_emb\.emb_pos") else 0,
        has_reference=shapes.any(r"ref_conv\."),
        camera_channels=_camera_channels(shapes, geometry) if shapes.any(r"control_adapter\.") else 0,
        vace_layers=vace_layers(layers, branch),
        vace_channels=shapes["vace_patch_embedding.weight"][1] if has_vace else 0,
    )
    _require_known(shapes, config)
    return config


def _camera_channels(shapes: Shapes, geometry: Geometry) -> int:
    """Of each pixel of a camera embedding; the adapter reads those of all pixels of a latent cell at once."""
    found, side = shapes["control_adapter.conv.weight"][1], geometry.spatial_stride
    if found != geometry.camera_channels * side**2:
        raise shapes.error(
            f"reads {found} camera channels per latent cell; {geometry.name} has {geometry.camera_channels} for each "
            f"of {side} x {side} pixels, {geometry.camera_channels * side**2} in all"
        )
    return geometry.camera_channels


def _require_known(shapes: Shapes, config: DiTConfig) -> None:
    relative = next((name for pattern, name in OTHER_WAN.items() if shapes.any(pattern)), None)
    geometry, beside = config.geometry, config.concat_channels
    if relative:
        raise shapes.error(f"is {relative}, which is not supported")
    if config.dim % HEAD_DIM:
        raise shapes.error(f"has width {config.dim}; a Wan width is a multiple of {HEAD_DIM}")
    latent, masked = geometry.channels, geometry.mask_channels + geometry.channels
    # Channels beside the noise, and whether the model reads image tokens, as Wan 2.1 models do and 2.2 models do not:
    # none, a mask and a clean video (I2V), control, mask and video (Fun Control of Wan 2.2), ...
    reads_images = {(0, False), (masked, False), (latent + masked, False)}
    if geometry.matches(WAN_21):
        if beside == latent and not config.camera_channels:
            raise shapes.error(
                f"has {config.in_channels} input channels, which only camera models have, but lacks "
                "'control_adapter.conv.weight', 'control_adapter.conv.bias' and the other control_adapter.* tensors; "
                "the file is incomplete"
            )
        # ... control and start (Fun Control of Wan 2.1), start (camera).
        reads_images |= {(masked, True), (2 * latent, True), (latent, True)}
    if (beside, config.has_image_input) not in reads_images:
        tokens = "with" if config.has_image_input else "without"
        known = ", ".join(
            f"{geometry.channels + n} {'with' if image else 'without'}" for n, image in sorted(reads_images)
        )
        raise shapes.error(
            f"has {config.in_channels} input and {config.out_channels} output channels {tokens} image tokens "
            f"(img_emb.*); Wan models have {geometry.channels} output channels and {known} image tokens"
        )


def _read_vace(shapes: Shapes) -> DiTConfig:
    count = shapes.count(r"vace_blocks\.(\d+)\.")
    layers = BASE_LAYERS.get(count, 2 * count)
    return DiTConfig(
        dim=shapes["vace_patch_embedding.weight"][0],
        ffn_dim=shapes["vace_blocks.0.ffn.0.weight"][0],
        num_layers=layers,
        geometry=replace(DEFAULT_GEOMETRY, patch=_patch_size(shapes, "vace_patch_embedding.weight")),
        vace_layers=vace_layers(layers, count),
        vace_channels=shapes["vace_patch_embedding.weight"][1],
    )


def _read_motion_controller(shapes: Shapes) -> MotionControllerConfig:
    dim, freq_dim = shapes["linear.0.weight"]
    return MotionControllerConfig(dim=dim, freq_dim=freq_dim)


def _read_text_encoder(shapes: Shapes) -> TextEncoderConfig:
    layers = shapes.count(r"blocks\.(\d+)\.")
    tables = sum(name.endswith(".pos_embedding.embedding.weight") for name in shapes.sources)
    if layers > 2 and tables == 1:
        raise shapes.error(
            "is T5, with one position table for all blocks; Wan needs UMT5-XXL, which has one in every block"
        )
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocab_size, dim = shapes["token_embedding.weight"]
    return TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=shapes["blocks.0.attn.q.weight"][0],
        ffn_dim=shapes["blocks.0.ffn.gate.0.weight"][0],
        num_heads=heads,
        num_layers=layers,
        num_buckets=buckets,
    )


def _read_vae(shapes: Shapes) -> VAEConfig:
    latents = shapes["conv2.weight"][0]
    if latents not in GEOMETRIES:
        known = " and ".join(f"{found.channels} ({found.name})" for found in GEOMETRIES.values())
        raise shapes.error(f"has {latents} latent channels; Wan VAEs have {known}")
    geometry = GEOMETRIES[latents]
    shortcuts = shapes.any(r"decoder\.upsamples\.0\.upsamples\.")
    folded, pixels = shapes["encoder.conv1.weight"][1], shapes["decoder.head.2.weight"][0]
    patch, side = isqrt(folded // 3), isqrt(pixels // 3)
    if (geometry is WAN_22) != shortcuts or folded != 3 * patch**2 or patch != 1 + shortcuts:
        raise shapes.error(
            f"has {latents} latent channels, reads {folded} channels and has its resolutions "
            f"{'in lists of their own' if shortcuts else 'in one row'}; with 16 the Wan 2.1 VAE reads 3 and has them "
            "in one row, with 48 the Wan 2.2 VAE reads 12 and has them in lists of their own"
        )
    if pixels != 3 * side**2 or not side or side % patch:
        raise shapes.error(
            f"decodes {pixels} channels; {geometry.name} has {3 * patch**2}, or {12 * patch**2} for pictures of twice "
            "the size"
        )
    base, widest = shapes["encoder.conv1.weight"][0], shapes["decoder.conv1.weight"][0]
    return VAEConfig(
        base_dim=base,
        decoder_dim=None if widest == 4 * base else widest // 4,
        geometry=geometry,
        upscale=side // patch,
        patch=patch,
        shortcuts=shortcuts,
    )


def _read_image_encoder(shapes: Shapes) -> ImageEncoderConfig:
    dim, _, _, patch = shapes["visual.patch_embedding.weight"]
    if dim % CLIP_HEAD_DIM:
        raise shapes.error(f"has width {dim}; Wan 2.1 needs CLIP ViT-H/14, of width 1280")
    has_head = "visual.head" in shapes.sources
    return ImageEncoderConfig(
        dim=dim,
        mlp_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_layers=shapes.count(r"visual\.transformer\.(\d+)\."),
        patch_size=patch,
        num_positions=shapes["visual.pos_embedding"][1],
        out_dim=shapes["visual.head"][1] if has_head else ImageEncoderConfig.out_dim,
    )


def _read_preview_decoder(shapes: Shapes) -> PreviewDecoderConfig:
    first, second, third, last = (shapes[f"decoder.{place}.weight"][0] for place in (1, 8, 14, 20))
    latents, pixels = shapes["decoder.1.weight"][1], shapes["decoder.22.weight"][0]
    patch = isqrt(pixels // 3)
    if latents not in GEOMETRIES or pixels != 3 * patch**2 or not patch:
        known = " and ".join(f"{found.channels} ({found.name})" for found in GEOMETRIES.values())
        raise shapes.error(
            f"decodes {latents} latent channels to {pixels} of pixels; tiny autoencoders for Wan read {known} and give "
            "3 or 12"
        )
    return PreviewDecoderConfig(latent_channels=latents, widths=(first, second, third, last), patch=patch)


Reader = Callable[[Shapes], Config]


def _on_damage(read: Reader) -> Reader:
    """`read`, with CheckpointError for tensors whose axes are not those of such a model at all."""

    @wraps(read)
    def checked(shapes: Shapes) -> Config:
        with errors_from(shapes.owner, "holds tensors of shapes that no such model has", error=CheckpointError):
            return read(shapes)

    return checked


CONFIG_READERS: Mapping[ModelKind, Reader] = {
    "dit": _on_damage(_read_dit),
    "vace": _on_damage(_read_vace),
    "motion_controller": _on_damage(_read_motion_controller),
    "text_encoder": _on_damage(_read_text_encoder),
    "vae": _on_damage(_read_vae),
    "image_encoder": _on_damage(_read_image_encoder),
    "preview_decoder": _on_damage(_read_preview_decoder),
}
