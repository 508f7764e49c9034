"""Saving a loaded video copies its picture whole, and sound never costs it."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.trainer.material import number_of, numbered
from wan_core.media import load_video, probe, save_video
from wancore.headless.video import VideoComponents, VideoFromComponents, VideoFromFile

COUNT = 17


def noisy(count: int) -> list[np.ndarray]:
    """Numbered frames with something moving, so that an encoder uses B-frames."""
    generator = np.random.default_rng(0)
    frames = [np.clip(frame + generator.integers(-20, 20, frame.shape), 0, 255) for frame in numbered(count, 64, 48)]
    return [frame.astype(np.uint8) for frame in frames]


def with_sound(path: Path, *codecs: str, picture: str = "libx264", rate: int = 44100) -> Path:
    """A clip with a second of a tone in each of these codecs."""
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate)
    with av.open(str(path), "w") as container:
        video = container.add_stream(picture, rate=16)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        tracks = [container.add_stream(codec, rate=rate, layout="mono") for codec in codecs]
        for frame in noisy(COUNT):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        for track in tracks:
            frame = av.AudioFrame.from_ndarray(tone[None].numpy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, 0
            resampler = av.AudioResampler(track.format, "mono", rate, track.codec_context.frame_size or None)
            for part in (*resampler.resample(frame), *resampler.resample(None), None):
                container.mux(track.encode(part))
    return path


def unknown(path: Path) -> Path:
    """The last sound track of an mp4 as the spatial sound of a phone, which FFmpeg has no decoder for."""
    data = bytearray(path.read_bytes())
    at = data.rfind(b"mp4a")
    data[at : at + 4] = b"apac"
    inside = data.find(b"esds", at)
    data[inside : inside + 4] = b"free"
    path.write_bytes(data)
    return path


def remuxed(source: Path, target: Path) -> Path:
    """The packets of a clip in another container."""
    with av.open(str(source)) as given, av.open(str(target), "w") as written:
        copy = written.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = copy
                written.mux(packet)
    return target


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov", ".ts", ".flv"])
@pytest.mark.parametrize("frames", [1, 2, COUNT])
def test_a_copy_has_every_frame_at_its_time(tmp_path, suffix, frames):
    first = save_video(noisy(frames), tmp_path / "first.mp4", ffmpeg_params=["-bf", "3"])
    source = remuxed(first, tmp_path / f"rec{suffix}")
    VideoFromFile(source).save_to(tmp_path / "copy.mp4", {"prompt": "{}"})
    was, now = probe(first), probe(tmp_path / "copy.mp4")
    assert now.times == pytest.approx(was.times, abs=0.002) and now.codec == "h264"
    shown = [np.asarray(frame) for frame in load_video(tmp_path / "copy.mp4")]
    assert [number_of(frame / 255, frames) for frame in shown] == list(range(frames))
    if suffix in (".mkv", ".mp4", ".mov"):
        assert packets(tmp_path / "copy.mp4") == packets(first)


def test_a_phones_clip_stays_turned(tmp_path):
    source = save_video(noisy(5), tmp_path / "a.mp4")
    with av.open(str(source)) as given, av.open(str(tmp_path / "phone.mp4"), "w") as written:
        copy = written.add_stream_from_template(given.streams.video[0])
        copy.set_display_rotation(90)
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = copy
                written.mux(packet)
    VideoFromFile(tmp_path / "phone.mp4").save_to(tmp_path / "copy.mp4")
    for path in (tmp_path / "phone.mp4", tmp_path / "copy.mp4"):
        assert (probe(path).width, probe(path).height) == (48, 64)


SOUND = {
    "aac": (("aac",), 1, 0),
    "two tracks": (("aac", "aac"), 2, 0),
    "mp2": (("mp2",), 1, 0),
    "pcm": (("pcm_s16le",), 1, 0),
    "opus": (("libopus",), 1, 0),
    "silent": ((), 0, 0),
}


@pytest.mark.parametrize("case", SOUND)
def test_sound_is_kept_or_encoded(tmp_path, caplog, case):
    codecs, tracks, notices = SOUND[case]
    source = with_sound(tmp_path / "a.mkv", *codecs, rate=48000)
    VideoFromFile(source).save_to(tmp_path / "copy.mp4")
    assert probe(tmp_path / "copy.mp4").num_frames == COUNT and packets(tmp_path / "copy.mp4") == packets(source)
    with av.open(str(tmp_path / "copy.mp4")) as container:
        assert len(container.streams.audio) == tracks
    audio = VideoFromFile(tmp_path / "copy.mp4").get_components().audio
    assert (audio is not None) == bool(tracks)
    if audio is not None:
        spectrum = torch.fft.rfft(audio["waveform"][0, 0, 4800 : 4800 + 24000]).abs()
        assert spectrum.argmax().item() * audio["sample_rate"] / 24000 == pytest.approx(440, abs=4)
    assert len(caplog.records) == notices


@pytest.mark.parametrize("picture", ["libx264", "mpeg4"])
@pytest.mark.parametrize(("codecs", "sound"), [(("aac",), False), (("aac", "aac"), True)])
def test_sound_that_cannot_be_decoded_never_costs_the_picture(tmp_path, caplog, codecs, sound, picture):
    source = unknown(with_sound(tmp_path / "a.mp4", *codecs, picture=picture)).rename(tmp_path / "phone.mov")
    parts = VideoFromFile(source).get_components()
    assert parts.images.shape == (COUNT, 48, 64, 3) and (parts.audio is not None) == sound
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (not sound) and all("phone.mov" in text for text in told)
    caplog.clear()
    VideoFromFile(source).save_to(tmp_path / "copy.mp4")
    assert probe(tmp_path / "copy.mp4").num_frames == COUNT
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (not sound or picture == "libx264") and all("left out" in text for text in told)
    with av.open(str(tmp_path / "copy.mp4")) as container:
        assert len(container.streams.audio) == sound


@pytest.mark.parametrize(
    "audio",
    [
        {"waveform": torch.zeros(1, 6, 44100), "sample_rate": 44100},
        {"waveform": torch.zeros(1, 1, 192000), "sample_rate": 192000},
        {"waveform": torch.zeros(1, 2, 100), "sample_rate": 7000},
        {"waveform": torch.zeros(1, 2, 0), "sample_rate": 44100},
    ],
    ids=["six channels", "192 kHz", "7 kHz", "no samples"],
)
def test_sound_of_every_rate_and_length_goes_with_the_picture(tmp_path, audio):
    images = torch.rand(5, 48, 64, 3)
    VideoFromComponents(VideoComponents(images, Fraction(16), audio)).save_to(tmp_path / "a.mp4")
    assert probe(tmp_path / "a.mp4").num_frames == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]
