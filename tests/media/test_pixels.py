"""One rule for what a number means, whatever type holds it, and for pictures of every mode."""

import numpy as np
import pytest
import torch
from PIL import Image

from wan_core import media
from wan_core.media.fitting import as_frames, as_masks, as_references
from wan_core.media.pixels import white_level

RAMP = np.linspace(0, 1, 48).reshape(1, 6, 8, 1)
"""One grey frame."""

ARRAYS = {
    **{np.dtype(kind).name: (RAMP * 255).round().astype(kind) for kind in ("uint8", "int16", "int32", "int64")},
    **{
        f"{np.dtype(kind).name} of 16 bits": (RAMP * 65535).round().astype(kind)
        for kind in ("uint16", "u4", "i8", "u8")
    },
    **{f"{kind} to 1": RAMP.astype(kind) for kind in ("float16", "float32", "float64", "longdouble")},
    "float32 to 255": (RAMP * 255).astype(np.float32),
    "float64 to 65535": RAMP * 65535,
    "other byte order": (RAMP * 65535).round().astype(">u2"),
    "overshoot": np.where(RAMP == 1, 1.02, RAMP) - np.where(RAMP == 0, 0.01, 0),
    "backwards": np.ascontiguousarray(RAMP[:, ::-1])[:, ::-1],
    "bfloat16": torch.from_numpy(RAMP).bfloat16(),
    "uint16 tensor": torch.from_numpy((RAMP * 65535).round().astype(np.uint16)),
    "with a gradient": torch.from_numpy(RAMP).requires_grad_(),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_ramp_is_a_ramp_in_every_number_type(name):
    frames = as_frames(ARRAYS[name], "x")
    assert frames.shape == (1, 6, 8, 3) and frames.dtype == torch.float32 and not frames.requires_grad
    assert np.abs(frames.numpy() - RAMP).max() <= 1 / 255
    assert np.abs(next(media.eight_bit(ARRAYS[name])) / 255 - RAMP[0]).max() <= 1.5 / 255
    assert np.abs(as_masks(ARRAYS[name], "x").numpy() - RAMP[..., 0]).max() <= 1 / 255


def test_what_was_given_is_not_changed_and_white_is_found_over_all_frames():
    dark = np.array([[[[0.5]]], [[[200.0]]]], np.float32)
    kept = dark.copy()
    assert as_frames(dark, "x")[0].max() == pytest.approx(0.5 / 255)
    assert as_frames(list(dark), "x")[0].max() == pytest.approx(0.5 / 255)
    assert next(media.eight_bit(dark)).max() == next(media.eight_bit(list(dark))).max() == 0
    read_only = np.full((1, 4, 4, 3), 0.5, np.float32)
    read_only.flags.writeable = False
    assert as_frames(read_only, "x").min() == 0.5
    assert (dark == kept).all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, float("nan")], "NaN or infinity"),
        ([0.0, float("inf")], "NaN or infinity"),
        ([-1.0, 1.0], "from 0 to 1 or 0 to 255"),
        ([0.0, 1e6], "from 0 to 1 or 0 to 255"),
        (np.array([-1, 255]), "from 0 to 255 or 0 to 65535"),
        (np.array([0, 70000]), "from 0 to 255 or 0 to 65535"),
        (np.array([0, 1j]), "real numbers"),
        (np.array(["a", "b"]), "real numbers"),
    ],
)
def test_numbers_that_are_no_pixels(values, words):
    frame = np.broadcast_to(np.asarray(values)[:, None], (2, 3))[None]
    for value in (frame, frame[None], [frame]):
        with pytest.raises(ValueError, match=f"picture: pixels .*{words}"):
            as_frames(value, "picture")
    with pytest.raises(ValueError, match=words):
        media.save_frames(frame[None] if frame.dtype.kind not in "U" else [frame], "nowhere")


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, np.float32])
def test_masks_of_zeros_and_ones_are_black_and_white(kind):
    mask = np.zeros((2, 4, 4), kind)
    mask[1, :2] = 1
    for value in (mask, torch.from_numpy(mask), mask[..., None], list(mask)):
        assert torch.equal(as_masks(value, "mask"), torch.from_numpy(mask).float())


def test_white_of_each_type():
    assert white_level(torch.tensor([True])) == 1
    assert white_level(torch.tensor([3], dtype=torch.uint8)) == 255
    assert white_level(torch.tensor([3], dtype=torch.int64)) == 255
    assert white_level(torch.tensor([300])) == 65535


COLOUR = (200, 100, 50)


def grey16(level):
    return Image.fromarray(np.full((4, 6), level, np.uint16))


def palette(transparent):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, *COLOUR])
    if transparent:
        image.info["transparency"] = bytes([255, 0])
    return image


MODES = {
    "1": (Image.new("1", (6, 4), 1), (255, 255, 255)),
    "L": (Image.new("L", (6, 4), 77), (77, 77, 77)),
    "RGB": (Image.new("RGB", (6, 4), COLOUR), COLOUR),
    "RGBX": (Image.new("RGBX", (6, 4), (*COLOUR, 0)), COLOUR),
    "CMYK": (Image.new("CMYK", (6, 4), (55, 155, 205, 0)), COLOUR),
    "YCbCr": (Image.new("RGB", (6, 4), COLOUR).convert("YCbCr"), COLOUR),
    "HSV": (Image.new("RGB", (6, 4), COLOUR).convert("HSV"), COLOUR),
    "P": (palette(False), COLOUR),
    "P, transparent": (palette(True), (255, 255, 255)),
    "RGBA, half": (Image.new("RGBA", (6, 4), (*COLOUR, 128)), (227, 177, 152)),
    "RGBA, clear": (Image.new("RGBA", (6, 4), (*COLOUR, 0)), (255, 255, 255)),
    "LA": (Image.new("LA", (6, 4), (0, 51)), (204, 204, 204)),
    "I;16": (grey16(32896), (128, 128, 128)),
    "I": (Image.fromarray(np.full((4, 6), 32896, np.int32)), (128, 128, 128)),
    "F to 1": (Image.fromarray(np.full((4, 6), 0.5, np.float32)), (127.5, 127.5, 127.5)),
    "F to 255": (Image.fromarray(np.full((4, 6), 51, np.float32)), (51, 51, 51)),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_every_mode_shows_its_colour(mode):
    image, colour = MODES[mode]
    for frames in (as_frames(image, "x"), as_frames([image] * 2, "x"), as_references([image], "x")[0]):
        assert frames.shape[1:] == (4, 6, 3)
        assert (frames[0, 0, 0] * 255).tolist() == pytest.approx(colour, abs=1.5)
    assert next(media.eight_bit([image]))[0, 0].tolist() == pytest.approx(colour, abs=1.5)


def test_an_array_with_alpha_stands_on_white_too():
    rgba = np.broadcast_to(np.array([200, 100, 50, 128], np.uint8), (1, 4, 6, 4))
    assert (as_frames(rgba, "x")[0, 0, 0] * 255).tolist() == pytest.approx((227, 177, 152), abs=1)


def test_pixels_and_frames_convert_both_ways():
    frames = torch.rand(5, 4, 6, 3)
    assert torch.allclose(media.pixels_to_frames(media.frames_to_pixels(frames).split(2, 2), 5), frames, atol=1e-6)
    images = media.pixels_to_images(media.frames_to_pixels(frames))
    assert (np.asarray(images[2]) == (frames[2] * 255).to(torch.uint8).numpy()).mean() > 0.99
    assert torch.allclose(media.frames_to_tensor(images), frames, atol=1 / 254)


class Two:
    """Pictures by number, and nothing else."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Image.new("RGB", (6, 4), COLOUR) if index < 2 else 1 / 0


def test_any_object_with_a_length_and_pictures_is_a_clip(tmp_path):
    assert as_frames(Two(), "x").shape == (2, 4, 6, 3)
    assert [len(frames) for frames in as_references(Two(), "x")] == [1, 1]
    assert as_masks(Two(), "x").shape == (2, 4, 6)
    assert len(media.save_frames(Two(), tmp_path)) == 2
    assert len(media.load_video(media.save_video(Two(), tmp_path / "a.mp4"))) == 2


@pytest.mark.parametrize("value", ["text", b"bytes", {"a": 1}, [], [1, 2], 3, None, [[Image.new("L", (4, 4))]]])
def test_what_is_no_clip(value):
    with pytest.raises(ValueError, match="clip must be a picture"):
        as_frames(value, "clip")


@pytest.mark.parametrize(
    "mask",
    [[np.zeros((0, 4))], np.zeros((0, 4)), np.zeros((2, 0, 4)), np.zeros((4, 4), complex), Image.new("L", (0, 0))],
)
def test_a_mask_of_nothing_is_refused_with_its_name(mask):
    with pytest.raises(ValueError, match="vace_video_mask"):
        as_masks(mask, "vace_video_mask")
