"""What a model file is and what it takes, in words, from its header alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from . import catalog
from .checkpoints.detect import Component, detect_files
from .models.config import DiTConfig
from .prepare import PathLike, recommended_row
from .variants import Variant, match_variant

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
    """What the model at `path` is.

    Raises:
        ValueError: the files are absent, broken, or no model of the family.
    """
    component = detect_files(path)
    numbers = sum(prod(info.shape) for info in component.header.values())
    stored = str(component.dtype).removeprefix("torch.")
    fp8 = f", {component.fp8} FP8" if component.fp8 else ""
    lines = [
        ("file", component.name),
        ("kind", KINDS[component.kind]),
        ("layout", component.layout),
        ("tensors", f"{len(component.header)}, {numbers / 1e9:.3f} billion numbers, {stored}{fp8}"),
    ]
    if component.kind == "dit":
        lines += _model_lines(component)
    return FileReport(tuple(lines))


def _model_lines(component: Component) -> list[tuple[str, str]]:
    config, variant = component.config, match_variant(component.config)
    row = recommended_row(component, variant)
    shape = (
        f"width {config.dim}, {config.num_layers} blocks, {config.num_heads} heads, {config.in_channels} input channels"
    )
    lines = [
        ("variant", variant.label),
        ("size", f"{catalog.SIZES.get(config.dim, 'of its own')} ({shape})"),
        ("needs", ", ".join(_needs(config, variant))),
        ("takes", ", ".join(variant.accepts) or "text"),
    ]
    if row:
        preset = row.preset
        settings = f"steps {preset.steps}, cfg {preset.cfg:g}, shift {preset.shift:g}"
        size = f"{preset.width}x{preset.height}, {preset.num_frames} frames"
        lines.append(("preset", f"{row.model_id}: {settings}, {size}, TeaCache {preset.teacache}"))
    return lines


def _needs(config: DiTConfig, variant: Variant) -> list[str]:
    encoders = ["text encoder", "VAE", *(["image encoder"] if config.has_image_input else [])]
    return [*encoders, *variant.requires]
