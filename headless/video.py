"""The VIDEO socket outside of ComfyUI: the methods of the host's video objects that nodes use."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
import torch
from torch import Tensor

from wan_core.media import (
    FPS,
    MediaError,
    frames_to_tensor,
    load_video,
    open_container,
    probe,
    video_stream,
    write_video,
)
from wan_core.runtime import log

HOST_QUALITY = 5.5
"""Corresponds to CRF 23, libx264's default, which the host uses."""

MP4_SOUND = ("aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "flac", "dca")
"""Sound that every player supports in an mp4, by the names of FFmpeg's decoders."""

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
"""Samples per second."""

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
        """Write an H.264 mp4 into a file, in place of its content."""


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
        frames, fps = parts.images[..., :3], float(parts.frame_rate)
        if parts.audio is None:
            write_video(frames, path, fps, HOST_QUALITY, metadata)
            return
        silent = io.BytesIO()
        write_video(frames, silent, fps, HOST_QUALITY)
        remux(silent, path, metadata or {}, parts.audio)


@dataclass(frozen=True)
class VideoFromFile:
    """A video on disk, decoded when its frames are asked for."""

    path: Path

    def get_components(self) -> VideoComponents:
        rate = Fraction(probe(self.path).fps or FPS).limit_denominator(1001)
        return VideoComponents(frames_to_tensor(load_video(self.path)), rate, load_audio(self.path))

    def get_dimensions(self) -> tuple[int, int]:
        clip = probe(self.path)
        return clip.width, clip.height

    def save_to(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """H.264 is copied without encoding, unless the container lacks the time of a frame."""
        if probe(self.path).codec != "h264" or not remux(self.path, Path(path), metadata or {}):
            VideoFromComponents(self.get_components()).save_to(path, metadata)


def load_audio(path: Path | BinaryIO) -> Audio | None:
    """The first sound track of a file that can be decoded, as float samples; None without one, with a warning when a
    track is damaged or of an unknown kind.
    """
    try:
        container = open_container(path)
    except MediaError:
        return None  # an animation, or a folder of frames
    with container:
        tracks = [(track.index, _codec(track)) for track in container.streams.audio]
    failures = []
    for index, codec in tracks:
        try:
            if sound := _decode_sound(path, index):
                return sound
        except (av.FFmpegError, ValueError) as error:
            failures.append(f"{codec}: {getattr(error, 'strerror', None) or error}")
    if failures:
        log.warning("%s: its sound cannot be decoded and is left out (%s).", path.name, "; ".join(failures))
    return None


def _codec(track: Any) -> str:
    return track.codec_context.name if track.codec_context else "unknown kind"


def _decode_sound(path: Path | BinaryIO, index: int) -> Audio | None:
    """The sound track with that index among the streams of a file; None when it is empty.

    Raises:
        ValueError, av.FFmpegError: it cannot be decoded.
    """
    with open_container(path) as container:
        track = container.streams[index]
        if track.codec_context is None:
            raise ValueError("there is no decoder for it")
        resampler = av.AudioResampler(format="fltp", layout=track.layout, rate=track.rate)
        chunks = [part.to_ndarray() for frame in container.decode(track) for part in resampler.resample(frame)]
        if not chunks:
            return None
        chunks += [part.to_ndarray() for part in resampler.resample(None)]
        return {"waveform": torch.from_numpy(np.concatenate(chunks, axis=1))[None], "sample_rate": track.rate}


def remux(source: Path | BinaryIO, target: Path, metadata: Mapping[str, str], audio: Audio | None = None) -> bool:
    """Copy the picture of `source` into an mp4 without encoding it again, with `audio`, cut to its length, or with its
    own sound. False when its packets cannot be copied, because they do not tell when each frame is shown.

    Sound that an mp4 cannot hold becomes AAC; what cannot be decoded or stored is left out, with one notice.
    """
    name = source.name if isinstance(source, Path) else "the video"
    with _open(source) as original:
        times = _decode_times(original)
        tracks = [] if audio else list(original.streams.audio)
        kept = [track.index for track in tracks if _codec(track) in MP4_SOUND]
        dropped = [_codec(track) for track in tracks if track.index not in kept]
    if times is None:
        return False
    if dropped and not kept:
        audio = load_audio(source)
    elif dropped:
        log.warning("%s: sound that an mp4 cannot hold is left out (%s).", name, ", ".join(dropped))
    try:
        _write_copy(source, target, metadata, times, kept, audio)
    except av.FFmpegError as error:
        if not kept and not audio:
            return False
        log.warning("%s: its sound cannot be stored in an mp4 and is left out (%s).", name, error.strerror)
        _write_copy(source, target, metadata, times, [], None)
    return True


def _open(source: Path | BinaryIO) -> Any:
    if not isinstance(source, Path):
        source.seek(0)
    return open_container(source)


def _decode_times(container: Any) -> list[int] | None:
    """When each packet of the picture is decoded, in its time base; None when that, or what is shown, is not known.

    Matroska stores only when frames are shown, and FFmpeg cannot tell the times of the first packets. They are decoded
    in the order in which they lie there, each before it is shown.
    """
    packets = (packet for packet in container.demux(video_stream(container)) if packet.size)
    shown, decoded, discarded = zip(*((packet.pts, packet.dts, packet.is_discard) for packet in packets), strict=True)
    if None in shown or len(set(shown)) < len(shown) or any(discarded):
        return None
    if None not in decoded:
        return list(decoded)
    ordered = sorted(shown)
    ahead = max(late - own for late, own in zip(ordered, shown, strict=True))
    return [time - ahead for time in ordered]


def _write_copy(
    source: Path | BinaryIO,
    target: Path,
    metadata: Mapping[str, str],
    times: Sequence[int],
    kept: Sequence[int],
    audio: Audio | None,
) -> None:
    """Write the packets of the picture and of the sound tracks `kept`, or `audio` as AAC.

    Raises:
        av.FFmpegError: an mp4 cannot hold one of them.
    """
    options = {"movflags": "use_metadata_tags"}
    with (
        _open(source) as original,
        av.open(f"file:{target}", "w", format="mp4", options=options) as written,
    ):
        written.metadata.update({**original.metadata, **metadata})
        picture = video_stream(original)
        copies = {
            stream: written.add_stream_from_template(stream)
            for stream in (picture, *map(original.streams.__getitem__, kept))
        }
        layout = "mono" if audio and audio["waveform"].shape[1] == 1 else "stereo"
        rate = _aac_rate(int(audio["sample_rate"])) if audio else 0
        track = written.add_stream("aac", rate=rate, layout=layout) if audio else None
        due = iter(times)
        for packet in original.demux(list(copies)):
            if packet.size:
                packet.dts = next(due) if packet.stream is picture else packet.pts if packet.dts is None else packet.dts
                packet.stream = copies[packet.stream]
                written.mux(packet)
        if track and audio:
            seconds = float(original.duration or 0) / av.time_base
            samples = audio["waveform"][0, :2, : round(seconds * audio["sample_rate"])].float().cpu().numpy()
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = int(audio["sample_rate"]), 0
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
            for part in (*resampler.resample(frame), *resampler.resample(None), None):
                written.mux(track.encode(part))


def _aac_rate(rate: int) -> int:
    """The sample rate that AAC has nearest to `rate`."""
    return min(AAC_RATES, key=lambda known: abs(known - rate))
