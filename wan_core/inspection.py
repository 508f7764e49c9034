"""A report of what a model file is and what it takes, from its header."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from . import catalog, distilled
from .loading.detect import Component, detect_all
from .loading.load import check_fits
from .loading.pairs import resolve_experts, side_of
from .loading.paths import describe_files
from .loading.tensor_files import read_header
from .model_files import PathLike, recommended_row
from .models.config import DiTConfig, VAEConfig
from .variants import match_variant

KINDS = {
    "dit": "Wan video model",
    "vace": "VACE branch, to be joined to a T2V model of its size",
    "motion_controller": "speed-control adapter",
    "text_encoder": "UMT5 text encoder",
    "vae": "Wan 2.1 VAE",
    "image_encoder": "CLIP image encoder",
    "preview_decoder": "tiny autoencoder for previews",
    "lora": "LoRA",
}


@dataclass(frozen=True)
class FileReport:
    """What one model is: title and value of each line, in the order in which they are shown."""

    lines: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(title) for title, _ in self.lines)
        return "\n".join(f"{title:<{width}}  {value}" for title, value in self.lines)


def report(path: PathLike | Sequence[PathLike]) -> FileReport:
    """What the model at `path` is; of a pair of experts, what each is.

    Raises:
        ValueError: the files are absent, broken, or no model of the family.
    """
    lines: list[tuple[str, str]] = []
    for files in resolve_experts(path):
        header = read_header(files)
        parts = detect_all(header)
        for part in parts:
            check_fits(part)
        lines += [("file", describe_files(header.files)), *(line for part in parts for line in _lines(part))]
    return FileReport(tuple(lines))


def _lines(component: Component) -> list[tuple[str, str]]:
    stored_shapes = component.sources.values() or component.header.values()
    numbers = sum(prod(entry.shape) for entry in stored_shapes)
    # Bytes of packed numbers have a format, but no dtype.
    packed = component.dtype == torch.uint8 and component.quantised
    stored = packed or str(component.dtype).removeprefix("torch.")
    lines = [
        ("kind", KINDS[component.kind]),
        ("layout", component.layout),
        ("tensors", f"{len(component.header)}, {numbers / 1e9:.3f} billion numbers, mostly {stored}"),
    ]
    if component.quantised:
        lines.append(("weights", component.quantised))
    path = component.header.files[0].resolve()
    if few_steps := distilled.recognise(distilled.names_of(path), component.header.metadata, component.header):
        lines.append(("distilled", few_steps.summary))
    if component.kind == "dit":
        lines += _model_lines(component)
    if isinstance(component.config, VAEConfig) and component.config.upscale > 1:
        lines.append(("decodes", f"pictures of {component.config.upscale} times the width and height"))
    return lines


def _model_lines(component: Component) -> list[tuple[str, str]]:
    config = component.config_of(DiTConfig)
    variant = match_variant(config)
    row = recommended_row(component, variant)
    encoders = ["text encoder", "VAE", *(["image encoder"] if config.has_image_input else [])]
    shape = (
        f"width {config.dim}, {config.num_layers} blocks, {config.num_heads} heads, {config.in_channels} input channels"
    )
    lines = [
        ("variant", variant.label),
        ("size", f"{catalog.SIZES.get(config.dim, 'of its own')} ({shape})"),
        ("needs", ", ".join([*encoders, *variant.requires])),
        ("takes", ", ".join(variant.accepts) or "text"),
    ]
    if side := side_of(component.header.files[0].resolve()):
        lines.append(("expert", f"for {side} noise, by its name"))
    if row:
        preset = row.preset
        low = "" if preset.cfg_low in (None, preset.cfg) else f" and {preset.cfg_low:g} at low noise"
        settings = f"steps {preset.steps}, cfg {preset.cfg:g}{low}, shift {preset.shift:g}"
        size = f"{preset.width}x{preset.height}, {preset.num_frames} frames"
        lines.append(("preset", f"{row.model_id}: {settings}, {size}, TeaCache {preset.teacache}"))
    return lines
