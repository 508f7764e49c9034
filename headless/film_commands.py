"""The commands `extend`, `segments` and `decode`: workflows that are built of what was typed."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_core import catalog
from wan_core.catalog import CatalogRow
from wan_core.conditioning.film import KEPT_FRAMES
from wan_core.decode import DECODERS
from wan_core.media import FPS
from wan_core.models.config import GEOMETRIES
from wan_core.sampling.checkpoint import load_latents
from wan_core.variants import VARIANTS

from .file_commands import Arguments
from .workflow import Workflow

SAVED_EVERY = 5
"""Steps between two saved states: the same command goes on from there."""

Steps = dict[str, tuple[str, dict[str, Any]]]
"""Nodes by title: class and inputs, in which a link is `[title, slot]`."""

_SHARED: Arguments = {
    "--prompt": {
        "metavar": "TEXT",
        "dest": "prompts",
        "action": "append",
        "default": [],
        "help": "what a clip shows; give one for each clip, the last one serves all clips after it",
    },
    "--negative-prompt": {"metavar": "TEXT", "help": "what to avoid (default: that of the model's authors)"},
    "--lora": {"metavar": "NAME", "help": "a LoRA in models/loras, or a pair, name_{high,low}.safetensors"},
    "--seed": {"type": int, "default": 0, "help": "of the noise (default: 0)"},
    "--clip-frames": {"metavar": "N", "type": int, "help": "frames of a clip (default: that of the model's authors)"},
    "--loop": {"action": "store_true", "help": "the film ends in its first picture"},
    "--name": {"default": "video/wancore_film", "help": "name of the film below DIR (default: video/wancore_film)"},
}
EXTEND_ARGUMENTS: Arguments = {
    "film": {"metavar": "FILM", "help": "what is to go on: a video, or a .latent file that a sampler saved"},
    **_SHARED,
    "--model": {"default": catalog.TI2V_BASE, "help": f"as the model loader lists it (default: {catalog.TI2V_BASE})"},
    "--clips": {"metavar": "N", "type": int, "help": "how many clips follow (default: one for each prompt)"},
    "--keep-frames": {
        "metavar": "K",
        "type": int,
        "help": f"last frames that each clip takes over: 1, 5, 9, ... (default: {KEPT_FRAMES})",
    },
}
_FLF = "Wan-AI/Wan2.1-FLF2V-14B-720P"
SEGMENTS_ARGUMENTS: Arguments = {
    "pictures": {"metavar": "PICTURE", "nargs": "+", "help": "two or more pictures, in the order of the film"},
    **_SHARED,
    "--model": {"default": _FLF, "help": f"as the model loader lists it (default: {_FLF})"},
}

DECODE_ARGUMENTS: Arguments = {
    "file": {"metavar": "FILE", "type": Path, "help": "a .latent file that a sampler saved"},
    "--vae": {"default": catalog.T2V_BASE, "help": f"as the VAE loader lists it (default: {catalog.T2V_BASE})"},
    "--fps": {"type": float, "default": float(FPS), "help": f"frames per second (default: {FPS})"},
    "--tiled": {"action": "store_true", "help": "decode in tiles from the beginning"},
    "--decoder": {
        "choices": DECODERS,
        "default": DECODERS[0],
        "help": "taew2: by the tiny autoencoder in models/vae_approx, an approximation (default: vae)",
    },
    "--name": {"default": "video/wancore", "help": "name of the video below DIR (default: video/wancore)"},
}
DECODES_LIKE_RUN = ("--out", "--input", "--tiny", "--device", "--quiet")


def decode(arguments: argparse.Namespace) -> tuple[Workflow, list[str]]:
    """The workflow that decodes saved latents, and what was typed for it, as texts of `--set`."""
    chosen = {"tiled": arguments.tiled, "decoder": DECODERS[0]}
    steps: Steps = {
        "Load latents": ("WanCoreLoadLatents", {"file": ""}),
        "Load VAE": ("WanCoreVAELoader", {"vae": arguments.vae}),
        "Decode": ("WanCoreVAEDecode", {"vae": ["Load VAE", 0], "latent": ["Load latents", 0], **chosen}),
        **_saved(arguments.name, ["Decode", 0], arguments.fps),
    }
    return _workflow(steps), [f"Load latents.file={arguments.file.absolute()}", f"Decode.decoder={arguments.decoder}"]


def extend(arguments: argparse.Namespace) -> tuple[Workflow, list[str]]:
    """The workflow that continues a film, and what was typed for it, as texts of `--set`.

    Raises:
        ValueError: no prompt was typed, the model is unknown, or the latents cannot be read.
    """
    row, film = _row(arguments.model), Path(arguments.film)
    keep = 1 if _keyframes(row) == "ends" else KEPT_FRAMES
    clips = max(1, len(arguments.prompts)) if arguments.clips is None else arguments.clips
    how = {"clips": clips, "clip_frames": row.preset.num_frames, "keep_frames": keep, "loop": arguments.loop}
    fps: Any = ["Film frames", 2]
    first: Any = ["Join clips", 1]
    if film.suffix.lower() == ".latent":
        # Decoded with the new clips, in one piece: where they begin is known from the file.
        latents, _ = load_latents(film)
        first = GEOMETRIES[latents.shape[1]].video_frames(latents.shape[2]) if latents.shape[1] in GEOMETRIES else 0
        fps, film = row.preset.fps, film.absolute()
        source: Steps = {"Film": ("WanCoreLoadLatents", {"file": ""})}
        given, before = {"latent": ["Film", 0]}, {}
    else:
        source = {
            "Film": ("LoadVideo", {"file": "source.mp4"}),
            "Film frames": ("GetVideoComponents", {"video": ["Film", 0]}),
        }
        given, before = {"images": ["Film frames", 0]}, {"film": ["Film frames", 0]}
    source["Clips"] = ("WanCoreExtend", {**_inputs(row), **given, **how})
    steps = {
        **_models(arguments, row), **source, **_sampler(arguments, row, {"prompts": ["Prompts", 0]}),
        **_film(arguments, fps, first, ["Clips", 2], shared_frames=["Clips", 1], **before),
    }  # fmt: skip
    numbers = {"Clips.clip_frames": arguments.clip_frames, "Clips.keep_frames": arguments.keep_frames}
    return _workflow(steps), _typed(arguments, {"Film.file": film, **numbers})


def segments(arguments: argparse.Namespace) -> tuple[Workflow, list[str]]:
    """The workflow of a film from picture to picture, and what was typed for it, as texts of `--set`.

    Raises:
        ValueError: there are fewer than two pictures, no prompt was typed, or the model is unknown.
    """
    if len(arguments.pictures) < 2:
        raise ValueError("segments leads from picture to picture; name two or more.")
    row, steps = _row(arguments.model), Steps()
    titles = [f"Picture {number}" for number, _ in enumerate(arguments.pictures, 1)]
    before: dict[str, Any] = {}
    for title in titles:
        steps[title] = ("LoadImage", {"image": "start.png"})
        if title != titles[-1]:
            steps[f"{title} and before"] = ("WanCoreVaceReferences", {"images": [title, 0], **before})
            before = {"references": [f"{title} and before", 0]}
    size = {name: getattr(row.preset, name) for name in ("width", "height", "num_frames")}
    shown = {"images": [titles[-1], 0], **before, "prompts": ["Prompts", 0], "loop": arguments.loop}
    steps["Clips"] = ("WanCoreSegments", {**_inputs(row), **size, **shown})
    steps = {
        **_models(arguments, row), **steps, **_sampler(arguments, row, {}),
        **_film(arguments, row.preset.fps, ["Join clips", 1], ["Join clips", 2]),
    }  # fmt: skip
    files = {f"{title}.image": file for title, file in zip(titles, arguments.pictures, strict=True)}
    return _workflow(steps), _typed(arguments, {**files, "Clips.num_frames": arguments.clip_frames})


def _row(model_id: str) -> CatalogRow:
    row = catalog.find_row(model_id)
    if row is None or row.base is not None:
        raise ValueError(
            f"{model_id!r} is no model of the catalog; name one as Load Model lists it, such as {catalog.TI2V_BASE}. A "
            'file of your own takes its place by --set "Load model.model=FILE".'
        )
    return row


def _keyframes(row: CatalogRow) -> str:
    return next(variant.keyframes for variant in VARIANTS if variant.name == row.variant)


def _models(arguments: argparse.Namespace, row: CatalogRow) -> Steps:
    text_encoder = {"text_encoder": ["Load text encoder", 0]}
    negative = row.preset.negative_prompt if arguments.negative_prompt is None else arguments.negative_prompt
    texts = {**text_encoder, "negative_prompt": negative}
    image = {"Load image encoder": ("WanCoreImageEncoderLoader", {"image_encoder": catalog.IMAGE_ENCODER_SOURCE})}
    lora = {"Load LoRA": ("WanCoreLoraLoader", {"model": ["Load model", 0], "lora": "none", "strength": 1.0})}
    return {
        "Load model": ("WanCoreModelLoader", {"model": row.model_id}),
        **(lora if arguments.lora else {}),
        "Load text encoder": ("WanCoreTextEncoderLoader", {"text_encoder": catalog.T2V_BASE}),
        "Load VAE": ("WanCoreVAELoader", {"vae": row.vae[0]}),
        **(image if row.needs_image_encoder else {}),
        "Prompt": ("WanCoreTextEncode", {**texts, "prompt": ""}),
        "Prompts": ("WanCoreWindowPrompts", {**texts, "prompts": "-"}),
    }


def _inputs(row: CatalogRow) -> dict[str, Any]:
    """The links of a node that brings frames to the model."""
    reader = {"image_encoder": ["Load image encoder", 0]} if row.needs_image_encoder else {}
    return {"model": ["Load model", 0], "conditioning": ["Prompt", 0], "vae": ["Load VAE", 0], **reader}


def _sampler(arguments: argparse.Namespace, row: CatalogRow, links: Mapping[str, Any]) -> Steps:
    preset = row.preset
    named = ("steps", "cfg", "shift", "solver", "width", "height", "num_frames")
    low = {} if preset.cfg_low is None else {"cfg_low": preset.cfg_low}
    model = "Load LoRA" if arguments.lora else "Load model"
    inputs = {
        "model": [model, 0], "conditioning": ["Clips", 0], "run": ["Long run", 0], "seed": arguments.seed, **links,
        **{name: getattr(preset, name) for name in named}, **low,
    }  # fmt: skip
    return {
        "Long run": ("WanCoreLongRun", {"checkpoint_every": SAVED_EVERY, "keep_latents": False}),
        "Sampler": ("WanCoreSampler", inputs),
    }


def _film(arguments: argparse.Namespace, fps: Any, first_frames: Any, new_frames: Any, **joined: Any) -> Steps:
    """From latents to the film, and the chart of its drift."""
    meter = {"images": ["Join clips", 0], "clip_frames": new_frames, "first_frames": first_frames}
    return {
        "Decode": ("WanCoreVAEDecode", {"vae": ["Load VAE", 0], "latent": ["Sampler", 0]}),
        "Join clips": ("WanCoreJoinClips", {"images": ["Decode", 0], "shared_frames": 1, **joined}),
        **_saved(arguments.name, ["Join clips", 0], fps),
        "Drift meter": ("WanCoreDriftMeter", meter),
        "Save chart": ("SaveImage", {"images": ["Drift meter", 0], "filename_prefix": f"{arguments.name}_drift"}),
    }


def _saved(name: str, images: list[Any], fps: Any) -> Steps:
    saved = {"video": ["Create video", 0], "filename_prefix": name, "format": "mp4", "codec": "h264"}
    return {"Create video": ("CreateVideo", {"images": images, "fps": fps}), "Save video": ("SaveVideo", saved)}


def _typed(arguments: argparse.Namespace, values: Mapping[str, Any]) -> list[str]:
    """What was typed, as texts of `--set`, which come after `--tiny` and may name any file."""
    prompts: Sequence[str] = [" ".join(text.split()) for text in arguments.prompts]
    if not all(prompts) or not (prompts or arguments.tiny):
        raise ValueError("Say by --prompt what the clips show; give one for each clip, or one for all.")
    texts = {"Prompt.prompt": prompts[0], "Prompts.prompts": "\n".join(prompts)} if prompts else {}
    lora = {"Load LoRA.lora": arguments.lora} if arguments.lora else {}
    chosen = {**values, **texts, **lora}
    return [f"{name}={value}" for name, value in chosen.items() if value is not None]


def _workflow(steps: Steps) -> Workflow:
    nodes = {
        title: {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
        for title, (class_type, inputs) in steps.items()
    }
    return Workflow.from_api(nodes, "the film")
