"""Pixels on their way in and out: PIL images, IMAGE tensors, video files, and the models' (B, 3, T, H, W)."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .drafts import drafted

log = logging.getLogger("wancore")

FPS = 16
"""Frame rate of the videos that Wan 2.1 was trained on."""

Frames = Iterable[Image.Image] | Tensor | np.ndarray
"""Frames as PIL images, or as one array (T, H, W, 3): float in [0, 1] or uint8."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, read from its header; `num_frames` is counted when the header does not say."""

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str


def pixels_to_images(pixels: Tensor) -> list[Image.Image]:
    """One video (1, 3, T, H, W) in [-1, 1] as PIL images, rounded down as the reference does."""
    frames = ((pixels[0] + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
    return [Image.fromarray(frame) for frame in frames.cpu().numpy()]


def pixels_to_frames(pieces: Iterable[Tensor], num_frames: int) -> Tensor:
    """Videos of so many frames, which come in pieces of pixels (B, 3, t, H, W) in [-1, 1], as ComfyUI's IMAGE
    (B * T, H, W, 3) in [0, 1], float32 on the CPU.
    """
    frames, start = torch.empty(0), 0
    for piece in pieces:
        batch, _, length, *sides = piece.shape
        if not start:
            frames = torch.empty(batch, num_frames, *sides, 3)
        frames[:, start : start + length].copy_(piece.permute(0, 2, 3, 4, 1)).add_(1).div_(2).clamp_(0, 1)
        start += length
    return frames.flatten(0, 1)


def frames_to_pixels(frames: Tensor) -> Tensor:
    """ComfyUI's IMAGE (T, H, W, 3) in [0, 1] as one video (1, 3, T, H, W) in [-1, 1], float32."""
    return frames[..., :3].float().mul(2).sub_(1).permute(3, 0, 1, 2).unsqueeze(0)


def frames_to_tensor(frames: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size as IMAGE (T, H, W, 3) in [0, 1], float32."""
    return torch.from_numpy(np.stack([np.asarray(f.convert("RGB")) for f in frames])).float().div_(255)


def _pictures(frames: Frames) -> Iterator[np.ndarray]:
    """Each frame as (H, W, 3), uint8, when it is asked for.

    Raises:
        ValueError: there is none, they differ in size, or a side is odd; of sequences and arrays before the first.
    """
    if isinstance(frames, Tensor):
        frames = frames.detach().cpu().float().numpy() if frames.is_floating_point() else frames.cpu().numpy()
    if isinstance(frames, np.ndarray) and (frames.ndim != 4 or frames.shape[-1] != 3):
        raise ValueError(f"A video needs at least one frame, as (T, H, W, 3); got {frames.shape}.")
    if isinstance(frames, Sequence) and len({frame.size for frame in frames}) > 1:
        raise ValueError(f"All frames of a video need one size; got {sorted({f.size for f in frames})}.")
    size = None
    for frame in frames:
        if isinstance(frame, Image.Image):
            frame = np.asarray(frame.convert("RGB"))
        elif np.issubdtype(frame.dtype, np.floating):
            frame = (np.clip(frame, 0, 1) * 255).round().astype(np.uint8)
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            raise ValueError(f"H.264 needs even sides; got {width}x{height}. Crop or resize the frames.")
        if size not in (None, (width, height)):
            raise ValueError(f"All frames of a video need one size; got {[size, (width, height)]}.")
        size = width, height
        yield np.ascontiguousarray(frame)
    if size is None:
        raise ValueError("A video needs at least one frame; got none.")


def save_video(
    frames: Frames,
    path: str | Path,
    fps: float = FPS,
    quality: float = 5,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write an H.264 mp4 and return where it went.

    A file that is already there is kept: the next free name (`video_2.mp4`) is taken instead. The file appears under
    its name only when it is complete.

    Args:
        frames: one video. What only comes frame by frame, as a pipeline's `output_type="stream"`, is written as it
            comes.
        path: where to write; missing folders are made.
        fps: frames per second.
        quality: 0 (smallest file) to 10 (best), the scale of imageio's ffmpeg writer.
        metadata: text entries for the container.

    Raises:
        ValueError: no frames, frames of different or odd sizes, fps not above 0, or quality outside of 0 to 10.
    """
    import av

    if not fps > 0 or not 0 <= quality <= 10:
        raise ValueError(f"A video needs fps above 0 and quality from 0 to 10; got fps {fps}, quality {quality}.")
    pictures = _pictures(frames)
    first = next(pictures)
    target = free_path(Path(path))
    crf = str(round((1 - quality / 10) * 51))
    with (
        drafted(target) as draft,
        av.open(str(draft), "w", format="mp4", options={"movflags": "use_metadata_tags"}) as container,
    ):
        container.metadata.update(metadata or {})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": crf}
        for picture in chain([first], pictures):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return target


def free_path(path: Path) -> Path:
    """`path`, or the first of `path_2`, `path_3`, … that no file has, with a notice in the log."""
    if not path.exists():
        return path
    number = 2
    while (candidate := path.with_name(f"{path.stem}_{number}{path.suffix}")).exists():
        number += 1
    log.info("%s exists; writing %s instead.", path.name, candidate.name)
    return candidate


def load_video(path: str | Path) -> list[Image.Image]:
    """Every frame of a video or animation as RGB PIL images.

    Raises:
        ValueError: the file is missing or no frame of it can be decoded.
    """
    import imageio.v3 as iio

    try:
        frames = [Image.fromarray(frame).convert("RGB") for frame in iio.imiter(_existing(path), plugin="pyav")]
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no video frames.")
    return frames


def probe_video(path: str | Path) -> VideoInfo:
    """Length, rate and size of a video file.

    Raises:
        ValueError: the file is missing or holds no video.
    """
    import av

    try:
        with av.open(str(_existing(path))) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate or Fraction(FPS)
            count = stream.frames or sum(1 for _ in container.decode(video=0))
            return VideoInfo(
                count, float(rate), stream.codec_context.width, stream.codec_context.height, stream.codec.name
            )
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"There is no video file at {path}.")
    return Path(path)
