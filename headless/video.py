"""The VIDEO socket outside of ComfyUI: the part of the host's video objects that nodes use."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import torch
from torch import Tensor

from ..wan_core.media import frames_to_tensor, load_video, probe_video, save_video

HOST_QUALITY = 5.5
"""Gives libx264's own default, CRF 23, which the host leaves in place."""

Audio = Mapping[str, Any]
"""`waveform` (B, channels, samples) float in [-1, 1] and `sample_rate`."""


@dataclass(frozen=True)
class VideoComponents:
    """`images` (T, H, W, 3) in [0, 1], frames per second, and sound where there is any."""

    images: Tensor
    frame_rate: Fraction
    audio: Audio | None = None


class Video(Protocol):
    """What a VIDEO socket carries."""

    def get_components(self) -> VideoComponents: ...

    def get_dimensions(self) -> tuple[int, int]:
        """(width, height)."""

    def save_to(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write an H.264 mp4 to a path that is free."""


@dataclass(frozen=True)
class VideoFromComponents:
    """A video in memory."""

    components: VideoComponents

    def get_components(self) -> VideoComponents:
        return self.components

    def get_dimensions(self) -> tuple[int, int]:
        height, width = self.components.images.shape[1:3]
        return width, height

    def save_to(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        parts, path = self.components, Path(path)
        if parts.audio is None:
            save_video(parts.images[..., :3], path, float(parts.frame_rate), HOST_QUALITY, metadata)
            return
        silent = path.with_name(f"{path.stem}.silent{path.suffix}")
        try:
            save_video(parts.images[..., :3], silent, float(parts.frame_rate), HOST_QUALITY)
            remux(silent, path, metadata or {}, parts.audio)
        finally:
            silent.unlink(missing_ok=True)


@dataclass(frozen=True)
class VideoFromFile:
    """A video on disk, decoded when its frames are asked for."""

    path: Path

    def get_components(self) -> VideoComponents:
        rate = Fraction(probe_video(self.path).fps).limit_denominator(1001)
        return VideoComponents(frames_to_tensor(load_video(self.path)), rate, load_audio(self.path))

    def get_dimensions(self) -> tuple[int, int]:
        info = probe_video(self.path)
        return info.width, info.height

    def save_to(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        if probe_video(self.path).codec == "h264":
            remux(self.path, Path(path), metadata or {})
        else:
            VideoFromComponents(self.get_components()).save_to(path, metadata)


def load_audio(path: Path) -> Audio | None:
    """The first sound track of a file as float samples, None when it has none."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp", layout=stream.layout, rate=stream.rate)
        chunks = [part.to_ndarray() for frame in container.decode(stream) for part in resampler.resample(frame)]
        chunks += [part.to_ndarray() for part in resampler.resample(None)]
        if not chunks:
            return None
        return {"waveform": torch.from_numpy(np.concatenate(chunks, axis=1))[None], "sample_rate": stream.rate}


def remux(source: Path, target: Path, metadata: Mapping[str, str], audio: Audio | None = None) -> None:
    """Copy the picture of `source` without encoding it again, with `audio` (cut to its length) or its own sound."""
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", format="mp4", options={"movflags": "use_metadata_tags"}) as written,
    ):
        written.metadata.update({**given.metadata, **metadata})
        kinds = ("video",) if audio else ("video", "audio")
        streams = [stream for stream in given.streams if stream.type in kinds]
        copies = {stream: written.add_stream_from_template(stream) for stream in streams}
        layout = "mono" if audio and audio["waveform"].shape[1] == 1 else "stereo"
        track = written.add_stream("aac", rate=int(audio["sample_rate"]), layout=layout) if audio else None
        for packet in given.demux(list(copies)):
            if packet.dts is not None:
                packet.stream = copies[packet.stream]
                written.mux(packet)
        if track and audio:
            seconds = float(given.duration or 0) / av.time_base
            samples = audio["waveform"][0, :2, : round(seconds * audio["sample_rate"])].float().cpu().numpy()
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = int(audio["sample_rate"]), 0
            written.mux(track.encode(frame))
            written.mux(track.encode(None))
