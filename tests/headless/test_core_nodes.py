"""The stand-ins read, write and name files as ComfyUI's core nodes do."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wancore.headless import core_nodes as module
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.runner import run
from wancore.headless.schema import ValidationError
from wancore.headless.video import VideoComponents, VideoFromComponents, VideoFromFile


def load(nodes, name):
    return nodes["LoadImage"]().load_image(name)


def test_load_image_gives_pixels_and_inverted_alpha(nodes, folders):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 0], rgba[:2, :, 3] = 255, 51
    Image.fromarray(rgba).save(folders.input / "a.png")
    image, mask = load(nodes, "a.png")
    assert image.shape == (1, 4, 6, 3) and image.dtype == torch.float32
    assert torch.equal(image[0, 0, 0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(mask[0, :, 0], torch.tensor([0.8, 0.8, 1, 1]))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Image.new("RGB", (6, 4), (0, 255, 0)), (0, 1, 0)),
        (lambda: Image.new("L", (6, 4), 255), (1, 1, 1)),
        (lambda: Image.new("1", (6, 4), 1), (1, 1, 1)),
        (lambda: Image.new("RGB", (6, 4), (0, 0, 255)).convert("P"), (0, 0, 1)),
        (lambda: Image.fromarray(np.full((4, 6), 65535, np.uint16)), (1, 1, 1)),
    ],
    ids=["RGB", "L", "1", "P", "16 bit"],
)
def test_load_image_of_every_mode_is_rgb_with_an_empty_mask(nodes, folders, make, expected):
    make().save(folders.input / "a.png")
    image, mask = load(nodes, "a.png")
    assert tuple(image[0, 0, 0].tolist()) == expected
    assert mask.shape == (1, 64, 64) and not mask.any()


def test_load_image_turns_by_exif(nodes, folders):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(folders.input / "a.jpg", exif=exif)
    assert load(nodes, "a.jpg")[0].shape == (1, 6, 4, 3)


def test_load_image_gives_every_frame_of_an_animation(nodes, folders):
    frames = [Image.new("L", (6, 4), level) for level in (0, 100, 200)]
    frames[0].save(folders.input / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load(nodes, "a.webp")[0].shape == (3, 4, 6, 3)


def test_inputs_are_looked_up_in_the_input_folder_then_the_assets_then_as_a_typed_path(tmp_path, monkeypatch):
    assets = tmp_path / "assets"
    monkeypatch.setattr("wancore.headless.folders.ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    folders = Folders(tmp_path / "in", tmp_path / "out", frozenset(["a.png"]))
    places = [tmp_path / "in" / "a.png", assets / "a.png", Path("a.png")]
    for place in reversed(places):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"")
        assert folders.find("a.png") == place
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"")
    assert folders.find("b.png [output]") == tmp_path / "out" / "b.png"
    for name in ("../a.png", str(tmp_path / "a.png"), "../a.png [output]", "~/a.png", "b.png\0"):
        assert folders.find(name) is None, "a workflow does not name paths"
    assert folders.find("b.png") is None and folders.find("") is None and folders.find("in") is None


def saved(folders, nodes, graph, prefix, frames=1):
    image = ("Plain", {"width": 8, "height": 6, "frames": frames, "level": 0.5})
    workflow = graph(n1=image, n2=("SaveImage", {"images": ["1", 0], "filename_prefix": prefix}))
    result = run(workflow, nodes, folders=folders, extra_pnginfo={"workflow": {"id": "x"}})
    return workflow, [path.relative_to(folders.output).as_posix() for path in result.files], result


@pytest.mark.parametrize(
    ("there", "prefix", "expected"),
    [
        ([], "ComfyUI", ["ComfyUI_00001_.png", "ComfyUI_00002_.png"]),
        (["ComfyUI_00007_.mp4"], "ComfyUI", ["ComfyUI_00008_.png", "ComfyUI_00009_.png"]),
        (["Other_00007_.png", "ComfyUI2_00007_.png"], "ComfyUI", ["ComfyUI_00001_.png", "ComfyUI_00002_.png"]),
        (["a/b/x_00001_.png"], "a/b/x", ["a/b/x_00002_.png", "a/b/x_00003_.png"]),
        (["x_99999_.png"], "x", ["x_100000_.png", "x_100001_.png"]),
        ([], "%width%x%height%", ["8x6_00001_.png", "8x6_00002_.png"]),
        ([], "n%batch_num%", ["n0_00001_.png", "n1_00001_.png"]),
    ],
)
def test_numbering(folders, nodes, graph, there, prefix, expected):
    for name in there:
        (folders.output / name).parent.mkdir(parents=True, exist_ok=True)
        (folders.output / name).write_bytes(b"mine")
    assert saved(folders, nodes, graph, prefix, frames=2)[1] == expected
    assert all((folders.output / name).read_bytes() == b"mine" for name in there)
    left = [path for path in folders.output.rglob("*") if path.is_file()]
    assert len(left) == len(there) + 2


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/tmp/x", "..", ".", "a/.."])
def test_a_prefix_that_leaves_the_output_folder_is_refused_before_anything_runs(folders, nodes, graph, prefix):
    with pytest.raises(ValidationError, match="filename_prefix - "):
        saved(folders, nodes, graph, prefix)
    assert not folders.output.exists()


def test_a_failed_write_leaves_nothing(folders):
    with pytest.raises(OSError), folders.numbered_file("x", ".png") as file:
        file.partial.write_bytes(b"half")
        raise OSError
    assert list(folders.output.iterdir()) == []


def test_two_writers_never_get_one_name(folders):
    with folders.numbered_file("x", ".png") as first, folders.numbered_file("x", ".png") as second:
        for file in (first, second):
            file.partial.write_text(file.path.name)
    assert [path.read_text() for path in sorted(folders.output.iterdir())] == ["x_00001_.png", "x_00002_.png"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("new_00007_.png", "new_00007_.png"), ("x_00003_.png", "x_00010_.png"), ("plain.png", "plain_00001_.png")],
)
def test_a_copied_file_keeps_its_name_when_that_is_free(folders, name, expected):
    folders.output.mkdir()
    for taken in ("x_00003_.png", "x_00009_.png", "plain.png"):
        (folders.output / taken).write_bytes(b"mine")
    with folders.named_file(name) as file:
        file.partial.write_bytes(b"theirs")
    assert (file.path.name, file.path.read_bytes()) == (expected, b"theirs")
    assert (folders.output / "x_00003_.png").read_bytes() == b"mine"


def test_png_carries_the_workflow(folders, nodes, graph):
    workflow, _, result = saved(folders, nodes, graph, "x")
    with Image.open(result.files[0]) as image:
        assert json.loads(image.text["prompt"]) == workflow.to_api()
        assert json.loads(image.text["workflow"]) == {"id": "x"}
        assert image.getpixel((0, 0)) == (127, 127, 127)


def test_previews_go_to_the_temporary_files(folders, nodes, graph):
    workflow = graph(
        n1=("Plain", {"width": 8, "height": 8, "frames": 1, "level": 1.0}), n2=("PreviewImage", {"images": ["1", 0]})
    )
    (path,) = run(workflow, nodes, folders=folders).files
    assert path.parent == folders.output / "temp" and path.exists()


def video(frames=5, audio=None, fps=Fraction(16)):
    ramp = torch.linspace(0, 1, frames).view(frames, 1, 1, 1).expand(frames, 32, 48, 3)
    return VideoFromComponents(VideoComponents(ramp, fps, audio))


def test_video_nodes_round_trip(folders, nodes, graph):
    image = ("Plain", {"width": 48, "height": 32, "frames": 5, "level": 0.25})
    create = ("CreateVideo", {"images": ["1", 0], "fps": 16})
    rest = {"filename_prefix": "video/Wan", "format": "auto", "codec": "auto"}
    workflow = graph(n1=image, n2=create, n3=("SaveVideo", {"video": ["2", 0], **rest}))
    result = run(workflow, nodes, folders=folders)
    (path,) = result.files
    assert result.ui["3"]["animated"] == [True]
    assert path.relative_to(folders.output).as_posix() == "video/Wan_00001_.mp4"
    with av.open(str(path)) as container:
        assert json.loads(container.metadata["prompt"]) == workflow.to_api()
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"

    folders = Folders(folders.output, folders.input)
    nodes = nodes | module.core_nodes(folders)
    parts = graph(
        n1=("LoadVideo", {"file": "video/Wan_00001_.mp4"}),
        n2=("GetVideoComponents", {"video": ["1", 0]}),
        n3=("PassImage", {"image": ["2", 0]}),
        n8=("Show", {"value": ["3", 1]}),
        n9=("Show", {"value": ["2", 2]}),
    )
    ui = run(parts, nodes).ui
    assert (ui["8"]["values"], ui["9"]["values"]) == ([5], [16.0])


@pytest.mark.parametrize("channels", [1, 2])
def test_sound_survives_saving_and_loading(tmp_path, channels):
    time = torch.arange(22050 * 2) / 22050
    tone = torch.sin(2 * torch.pi * 440 * time).expand(1, channels, -1)
    video(16, {"waveform": tone, "sample_rate": 22050}).save_to(tmp_path / "a.mp4", {"prompt": "{}"})
    parts = VideoFromFile(tmp_path / "a.mp4").get_components()
    assert parts.images.shape == (16, 32, 48, 3) and parts.frame_rate == 16
    wave = parts.audio["waveform"][0]
    assert len(wave) == channels and parts.audio["sample_rate"] == 22050
    # One second of picture: the sound is cut to it, give or take AAC's frames and priming.
    assert wave.shape[1] == pytest.approx(22050, abs=3 * 1024)
    spectrum = torch.fft.rfft(wave[0, 4096 : 4096 + 11025]).abs()
    assert spectrum.argmax().item() * 2 == pytest.approx(440, abs=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


def test_saving_a_loaded_h264_file_copies_its_picture(tmp_path):
    video(9).save_to(tmp_path / "a.mp4", {"prompt": "old", "note": "kept"})
    VideoFromFile(tmp_path / "a.mp4").save_to(tmp_path / "b.mp4", {"prompt": "new"})

    def packets(name):
        with av.open(str(tmp_path / name)) as container:
            data = [bytes(packet) for packet in container.demux(video=0) if packet.size]
            return data, {key: container.metadata.get(key) for key in ("prompt", "note")}

    (first, _), (second, tags) = packets("a.mp4"), packets("b.mp4")
    assert first == second and tags == {"prompt": "new", "note": "kept"}


def test_a_video_without_sound_has_no_audio(tmp_path):
    video(5).save_to(tmp_path / "a.mp4")
    assert VideoFromFile(tmp_path / "a.mp4").get_components().audio is None
    assert VideoFromFile(tmp_path / "a.mp4").get_dimensions() == (48, 32)


def test_saved_files_carry_names_and_no_paths(nodes, graph, folders, tmp_path):
    """They are given to other people."""
    elsewhere = tmp_path / "home" / "me"
    elsewhere.mkdir(parents=True)
    for place in (folders.input / "a.png", elsewhere / "b.png"):
        Image.new("RGB", (8, 8)).save(place)
    typed = replace(folders, typed=frozenset([str(elsewhere / "b.png")]))
    for name in (str(folders.input / "a.png"), str(elsewhere / "b.png")):
        workflow = graph(
            n1=("LoadImage", {"image": name}), n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "/imagine"[1:]})
        )
        made = run(workflow, {**nodes, **core_nodes(typed)}, folders=typed)
        with Image.open(made.files[0]) as saved:
            carried = json.loads(saved.text["prompt"])
        assert carried["1"]["inputs"]["image"] == Path(name).name and str(tmp_path) not in json.dumps(carried)
    assert typed.without_folders("/imagine a cat") == "/imagine a cat"


def test_a_constant_in_place_of_a_node_is_refused(nodes, graph, folders):
    for value in ("x", 3, None, {"samples": 1}, {"__value__": [1]}):
        with pytest.raises(ValidationError, match="Only another node can give this input"):
            run(graph(n1=("SaveImage", {"images": value, "filename_prefix": "x"})), nodes, folders=folders)
