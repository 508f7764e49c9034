"""Data sets and configurations that the trainer's tests share, on the bundled tiny models."""

import csv
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np

from tests.reference import drawn_weights
from wan_core import bundled, catalog
from wan_core.catalog import tiny_id
from wancore.trainer.config import TrainConfig
from wancore.trainer.data.synthetic import write_dataset

SIZE = {"width": 32, "height": 32, "num_frames": 5}

INPUTS = {
    "t2v": (),
    "i2v": ("input_image", "end_image"),
    "flf2v": ("input_image", "end_image"),
    "fun_control": ("control_video",),
    "fun_v1_1_control": ("control_video", "reference_image"),
    "fun_camera": ("input_image", "camera_control_direction", "camera_control_speed"),
    "vace": ("vace_video", "vace_video_mask", "vace_reference_image"),
    "speed": ("motion_bucket_id",),
    "i2v_a14b": ("input_image", "end_image"),
    "fun_a14b_control": ("control_video", "input_image", "reference_image"),
    "fun_a14b_camera": ("input_image", "camera_control_direction", "camera_control_speed"),
    "ti2v_5b": ("input_image",),
    "fun_5b_inp": ("input_image", "end_image"),
    "fun_5b_control": ("control_video", "input_image", "reference_image"),
    "fun_5b_camera": ("end_image", "camera_control_direction", "camera_control_speed"),
    "i2v_pair": ("input_image",),
    "vace_pair": ("vace_video",),
}
"""What each kind of model is trained with; `speed` is the text-to-video model with the speed-control adapter, and a
pair is trained with both experts."""

PAIRS = {"i2v_pair": tiny_id("i2v_a14b"), "vace_pair": tiny_id("vace", is_pair=True)}


SMALL = {
    name: replace(sizes, dim=128, ffn_dim=256, num_layers=3 if sizes.vace_layers else 2)
    for name, sizes in bundled.DITS.items()
}
"""Transformers of half the width and of the fewest blocks, which most of a short run is spent in."""


@functools.cache
def _write_models(root: Path) -> None:
    """The bundled models with these transformers."""
    controller = replace(bundled.MOTION_CONTROLLER, dim=SMALL["t2v"].dim)
    with drawn_weights(), mock.patch.multiple(bundled, DITS=SMALL, MOTION_CONTROLLER=controller):
        for name in {*map(tiny_id, SMALL), *PAIRS.values()}:
            bundled.write_model(root, name)


def model_names(variant: str) -> tuple[str, ...]:
    """`--model_id_with_origin_paths` for a tiny model with its encoders; for the high-noise expert of a pair, unless it
    is one of `PAIRS`."""
    dit = PAIRS.get(variant) or tiny_id("t2v" if variant == "speed" else variant)
    row = catalog.find_row(dit)
    vae = catalog.TINY if row.vae[1] == catalog.VAE_PATTERN else tiny_id("ti2v_5b")
    shared = [catalog.TEXT_ENCODER_PATTERN, *[catalog.IMAGE_ENCODER_PATTERN] * row.needs_image_encoder]
    shared += [catalog.MOTION_CONTROLLER_PATTERN] * (variant == "speed")
    dits = row.files if variant in PAIRS else row.files[:1]
    return (
        *(f"{dit}:{file}" for file in dits),
        f"{vae}:{row.vae[1]}",
        *(f"{catalog.TINY}:{pattern}" for pattern in shared),
    )


def config(root: Path, variant: str = "t2v", **changes: Any) -> TrainConfig:
    """A run of `variant` on the synthetic data in `root/data`, which is written when it is not there; float32."""
    data = root / "data"
    if not (data / "metadata.csv").exists():
        write_dataset(data, count=2, width=32, height=32, num_frames=9)
    _write_models(root / "models")
    settings = {
        "dataset_base_path": str(data),
        "model_id_with_origin_paths": model_names(variant),
        "local_model_path": str(root / "models"),
        "extra_inputs": INPUTS[variant],
        "output_path": str(root / "out"),
        "mixed_precision": "no",
        "cache": "off",
        **SIZE,
        **changes,
    }
    if not settings.get("trainable_models"):
        settings.setdefault("lora_base_model", "dit")
    return TrainConfig(**settings)


def flags(settings: TrainConfig) -> list[str]:
    """The command line of a configuration, with every setting that is not the default."""
    default = TrainConfig()
    words = []
    for name, value in settings.resolved().items():
        if value == default.resolved()[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif name in ("model_paths", "optimizer_args"):
            words += [f"--{name}", json.dumps(value)]
        else:
            words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return words


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    fps: int = 16,
    codec: str | None = None,
    rotation: int = 0,
) -> Path:
    """A video of uint8 frames (H, W, 3); the container follows the file's extension."""
    codecs = {".webm": "libvpx", ".gif": "gif", ".wmv": "wmv2", ".flv": "flv", ".avi": "mpeg4"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(codec or codecs.get(path.suffix, "libx264"), rate=fps)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
                stream.bit_rate = 4_000_000
                if rotation:
                    stream.set_display_rotation(rotation)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbered(count: int, width: int = 32, height: int = 32) -> list[np.ndarray]:
    """Frames whose brightness, from 30 to 226, tells their number."""
    levels = np.linspace(30, 226, count) if count > 1 else [30]
    return [np.full((height, width, 3), round(level), np.uint8) for level in levels]


def number_of(frame: np.ndarray, count: int) -> int:
    """Which of `count` numbered frames this one, in [0, 1], is."""
    return round((float(frame.mean()) * 255 - 30) / 196 * (count - 1))


def write_metadata(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "metadata.csv") -> Path:
    """`rows` as csv, json or jsonl, by the extension of `name`."""
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    else:
        columns = dict.fromkeys(column for row in rows for column in row)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return path
