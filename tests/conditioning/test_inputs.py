"""Pictures, clips and masks to conditioning, against formulas written out by hand, and what each model takes."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.reference import DATA, DITS, relative_error, tiny_image_encoder, tiny_vae
from wan_core import catalog
from wan_core.conditioning.image import (
    Fit,
    LatentEncoder,
    control_conditioning,
    encode_pictures,
    first_frame_conditioning,
    fold_frames,
    image_conditioning,
    reference_conditioning,
)
from wan_core.conditioning.inputs import speed_conditioning
from wan_core.conditioning.vace import fold_pixels, vace_conditioning
from wan_core.media import fitting
from wan_core.models.config import WAN_21
from wan_core.types import Conditioning, VideoSize
from wan_core.variants import VARIANTS, assemble_concat, check, first_frame, fit, match_variant

SIZE = VideoSize(48, 32, 9)
TEXT = Conditioning(text=torch.zeros(1, 4, 64), negative_text=torch.zeros(1, 4, 64))


@pytest.fixture(scope="module")
def encoder() -> LatentEncoder:
    return LatentEncoder(vae=tiny_vae())


@pytest.fixture(scope="module")
def clip():
    return tiny_image_encoder()


def clip_of(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def encoded(encoder, pixels):
    return encoder.vae.encode(pixels)


def video_pixels(frames):
    return frames.permute(3, 0, 1, 2)[None] * 2 - 1


def test_start_image_is_the_first_frame_of_a_grey_video(encoder, clip):
    picture = clip_of(1)
    cond = image_conditioning(TEXT, SIZE, encoder, clip, start=picture)
    pixels = torch.zeros(1, 3, 9, 32, 48)
    pixels[:, :, 0] = picture[0].permute(2, 0, 1) * 2 - 1
    assert torch.equal(cond.slots["image"], encoded(encoder, pixels))
    expected = torch.zeros(1, 4, 3, 4, 6)
    expected[:, :, 0] = 1
    assert torch.equal(cond.slots["mask"], expected)
    assert cond.image_tokens.shape == (1, 257, 160)
    assert cond.inputs == ("input_image",)
    assert cond.size == SIZE


def test_end_image_marks_the_last_pixel_frame_and_brings_its_tokens(encoder, clip):
    cond = image_conditioning(TEXT, SIZE, encoder, clip, start=clip_of(1), end=clip_of(1, seed=1))
    mask = cond.slots["mask"]
    assert mask[0, :, 0].eq(1).all()
    assert mask[0, :, 1].eq(0).all()
    assert mask[0, :, 2, 0, 0].tolist() == [0, 0, 0, 1]
    assert torch.equal(cond.image_tokens, encode_pictures(clip, clip_of(1), clip_of(1, seed=1)))
    assert cond.image_tokens.shape[1] == 514


def test_the_first_latent_of_a_start_image_is_the_latent_of_the_picture(encoder, clip):
    """Causal encoding: the slot of control models can be cut from that of image models."""
    inpaint = image_conditioning(TEXT, SIZE, encoder, clip, start=clip_of(1))
    control = first_frame_conditioning(TEXT, SIZE, encoder, clip, clip_of(1))
    assert relative_error(first_frame(inpaint.slots["image"]), control.slots["first_frame"]) < 1e-5
    assert control.slots["first_frame"][:, :, 1:].eq(0).all()


def test_a_video_of_one_latent_frame_has_no_first_frame(encoder, clip):
    cond = first_frame_conditioning(TEXT, VideoSize(48, 32, 1), encoder, clip, clip_of(1))
    assert cond.slots["first_frame"].eq(0).all()


def test_inpainting_keeps_what_is_black_and_greys_what_is_white(encoder):
    video, mask = clip_of(9), torch.zeros(9, 32, 48)
    mask[:, 8:24, 16:32] = 1
    cond = image_conditioning(TEXT, SIZE, encoder, None, video=video, mask=mask)
    assert torch.equal(cond.slots["image"], encoded(encoder, video_pixels(video) * (1 - mask)))
    assert cond.slots["mask"][0, :, :, 0, 0].eq(1).all()
    assert cond.slots["mask"][0, :, :, 2, 3].eq(0).all()
    all_known = image_conditioning(TEXT, SIZE, encoder, None, video=video)
    assert all_known.slots["mask"].eq(1).all()


def test_mask_channels_are_places_in_groups_of_four():
    known = torch.arange(9.0)[:, None, None].expand(9, 32, 48)
    folded = fold_frames(known, SIZE)
    assert folded[0, :, :, 0, 0].T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_control_video_and_reference(encoder, clip):
    video, picture = clip_of(9), clip_of(1, seed=2)
    cond = control_conditioning(TEXT, SIZE, encoder, video)
    assert torch.equal(cond.slots["control"], encoded(encoder, video_pixels(video)))
    cond = reference_conditioning(cond, SIZE, encoder, clip, picture)
    assert torch.equal(cond.reference, encoded(encoder, video_pixels(picture))[:, :, 0])
    assert torch.equal(cond.image_tokens, encode_pictures(clip, picture))
    assert cond.inputs == ("control_video", "reference_image")


def test_vace_context_channel_by_channel(encoder):
    video, mask, reference = clip_of(9), torch.zeros(9, 32, 48), clip_of(1, 16, 48, seed=3)
    mask[:, :16] = 0.8
    cond = vace_conditioning(TEXT, SIZE, encoder, video=video, mask=mask, references=[reference], strength=0.5)
    context = cond.vace[0].context
    assert context.shape == (1, 96, 4, 4, 6)
    drawn = (mask > 0.5).float()
    pixels = video_pixels(video)
    assert torch.equal(context[:, :16, 1:], encoded(encoder, pixels * (1 - drawn)))
    assert torch.equal(context[:, 16:32, 1:], encoded(encoder, pixels * drawn))
    folded = drawn[::4].reshape(3, 4, 8, 6, 8).permute(2, 4, 0, 1, 3).reshape(64, 3, 4, 6)
    assert torch.equal(context[0, 32:, 1:], folded)
    canvas = torch.ones(1, 32, 48, 3)
    canvas[:, 8:24] = reference
    assert relative_error(context[:, :16, :1], encoded(encoder, video_pixels(canvas))) < 1e-5
    assert context[:, 16:, :1].eq(0).all()
    assert cond.vace[0].strength.at(0, 1) == 0.5


def test_vace_without_mask_redraws_everything(encoder):
    cond = vace_conditioning(TEXT, SIZE, encoder, video=clip_of(9))
    assert torch.equal(cond.vace[0].context[:, :16], encoded(encoder, torch.zeros(1, 3, 9, 32, 48)))
    assert cond.vace[0].context[:, 32:].eq(1).all()


def test_vace_mask_takes_the_nearest_frame():
    mask = torch.zeros(9, 32, 48)
    mask[4] = 1
    expected = F.interpolate(mask[None, None, :, :1, :1], (3, 1, 1), mode="nearest-exact").flatten()
    assert torch.equal(fold_pixels(mask, SIZE)[0, 0, :, 0, 0], expected)


def test_two_references_equal_two_chained_batches(encoder):
    first, second = clip_of(1, seed=4), clip_of(1, 20, 20, seed=5)
    separate = vace_conditioning(TEXT, SIZE, encoder, references=[first, second])
    same_size = clip_of(2, seed=6)
    batch = vace_conditioning(TEXT, SIZE, encoder, references=[same_size])
    single = vace_conditioning(TEXT, SIZE, encoder, references=[same_size[:1], same_size[1:]])
    assert torch.equal(batch.vace[0].context, single.vace[0].context)
    assert separate.prefix_frames(3) == 2


def test_chained_inputs_share_one_row_of_references(encoder):
    cond = vace_conditioning(TEXT, SIZE, encoder, video=clip_of(9), references=[clip_of(1, seed=7)])
    chained = vace_conditioning(cond, SIZE, encoder, video=clip_of(9, seed=8), references=[clip_of(2, seed=9)])
    first, second = (v.context for v in chained.vace)
    assert first.shape == second.shape == (1, 96, 6, 4, 6)
    assert torch.equal(first[:, :, :1], cond.vace[0].context[:, :, :1])
    assert first[:, :, 1:3].eq(0).all()
    assert second[:, :, :1].eq(0).all()
    assert second[:, :16, 1:3].ne(0).any()


def test_concat_follows_the_order_of_the_structure():
    parts = {n: torch.full((1, c, 2, 2, 2), v) for n, c, v in (("control", 16, 2.0), ("first_frame", 16, 3.0))}
    layout = match_variant(DITS["fun_control"]).slots
    joined = assemble_concat(parts, layout, WAN_21)
    assert joined[0, ::16, 0, 0, 0].tolist() == [2, 3]
    without = assemble_concat({"control": parts["control"]}, layout, WAN_21)
    assert without[0, ::16, 0, 0, 0].tolist() == [2, 0]


@pytest.mark.parametrize("name", DITS)
def test_slots_fill_the_extra_channels(name):
    variant = match_variant(DITS[name])
    assert variant.name == name
    assert variant.channels(WAN_21) == DITS[name].concat_channels
    assert set(variant.requires) <= set(variant.accepts)


def test_fit_counts_image_tokens_and_spreads_over_the_batch(encoder, clip):
    cond = image_conditioning(TEXT, SIZE, encoder, clip, start=clip_of(1), end=clip_of(1, seed=1))
    cond = dataclasses.replace(cond, text=torch.zeros(2, 4, 64), negative_text=torch.zeros(2, 4, 64))
    config = dataclasses.replace(DITS["i2v"], image_dim=160)
    fitted = fit(cond, match_variant(config), config, "model", SIZE)
    assert fitted.image_tokens.shape == (2, 257, 160)
    assert fitted.concat.shape == (2, 20, 3, 4, 6)
    config = dataclasses.replace(DITS["flf2v"], image_dim=160)
    assert fit(cond, match_variant(config), config, "model", SIZE).image_tokens.shape == (2, 514, 160)


def test_inputs_made_for_another_size_are_refused(encoder):
    cond = control_conditioning(TEXT, SIZE, encoder, clip_of(9))
    with pytest.raises(ValueError, match="made for 48x32, 9 frames, but the video is 64x32, 9 frames"):
        fit(cond, match_variant(DITS["fun_control"]), DITS["fun_control"], "model", VideoSize(64, 32, 9))
    with pytest.raises(ValueError, match="is made for 64x32"):
        control_conditioning(cond, VideoSize(64, 32, 9), encoder, clip_of(9))


VARIANT = {v.name: v for v in VARIANTS}


@pytest.mark.parametrize(
    ("variant", "inputs", "controller", "words"),
    [
        (
            "fun_control",
            ("control_video", "inpaint_video"),
            False,
            "takes control_video and input_image, but got inpaint",
        ),
        ("fun_control", ("input_image",), False, "needs control_video; got input_image"),
        ("t2v", ("input_image",), False, r"but got input_image\. Remove it, or load a model that takes it"),
        ("t2v", ("camera",), False, "Fun Control-Camera"),
        ("t2v", ("motion_bucket_id",), False, "needs the speed-control adapter"),
        ("i2v", ("motion_bucket_id",), True, "but got motion_bucket_id"),
        ("flf2v", ("input_image",), False, "needs input_image and end_image"),
        ("fun_camera", ("input_image",), False, "needs input_image and camera"),
        ("vace", ("control_video",), False, "takes vace_video, vace_video_mask and vace_reference_image"),
    ],
)
def test_what_a_model_cannot_use_is_said_in_words(variant, inputs, controller, words):
    with pytest.raises(ValueError, match=words):
        check(VARIANT[variant], inputs, "Model", controller)


@pytest.mark.parametrize(
    ("variant", "inputs", "controller"),
    [
        ("t2v", (), False),
        ("t2v", ("motion_bucket_id",), True),
        ("i2v", (), False),
        ("i2v", ("inpaint_video",), False),
        ("vace", (), False),
        ("fun_v1_1_control", ("control_video", "reference_image", "input_image"), False),
    ],
)
def test_what_a_model_can_use_passes(variant, inputs, controller):
    check(VARIANT[variant], inputs, "Model", controller)


@pytest.mark.parametrize("speed", [-1, 101, float("nan"), "fast"])
def test_speeds_out_of_range(speed):
    with pytest.raises(ValueError, match="motion_bucket_id must be"):
        speed_conditioning(TEXT, speed)


def test_speed_may_be_a_fraction():
    assert speed_conditioning(TEXT, 37.5).motion_bucket.tolist() == [37.5]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: image_conditioning(TEXT, SIZE, e, None), "needs a start image"),
        (
            lambda e: image_conditioning(TEXT, SIZE, e, None, start=clip_of(1), mask=torch.ones(1, 8, 8)),
            "give inpaint_video too",
        ),
        (
            lambda e: control_conditioning(TEXT, SIZE, e, clip_of(5), Fit(length="error")),
            "has 5 frames, but the video needs 9",
        ),
        (lambda e: Fit(aspect="squash"), "aspect must be one of crop, stretch, letterbox"),
    ],
)
def test_inputs_that_cannot_be_used(encoder, call, words):
    with pytest.raises(ValueError, match=words):
        call(encoder)


@pytest.mark.parametrize(
    ("variant", "make", "name"),
    [
        ("i2v", lambda e: image_conditioning(TEXT, SIZE, e, None, start=clip_of(1)), "input_image"),
        ("fun_control", lambda e: first_frame_conditioning(TEXT, SIZE, e, None, clip_of(1)), "input_image"),
        ("fun_v1_1_control", lambda e: reference_conditioning(TEXT, SIZE, e, None, clip_of(1)), "reference_image"),
    ],
)
def test_pictures_without_the_image_encoder_are_refused_by_models_that_read_them(encoder, variant, make, name):
    cond = make(encoder)
    if "control" in variant:
        cond = cond.with_inputs("control_video")
    with pytest.raises(ValueError, match=f"reads {name} through the CLIP image encoder too: encode it with one"):
        fit(cond, VARIANT[variant], DITS[variant], "Model", SIZE)


SIZES = json.loads((DATA / "cases" / "sizes22.json").read_text())["rows"]
RULES = {
    ("area and crop", 1280, 704, 32): 2, ("area and crop", 832, 480, 32): 4,
    ("area", 1280, 720, 16): 6, ("area", 832, 480, 16): 8,
}  # fmt: skip
"""The columns of the table that the authors' functions computed."""


@pytest.mark.parametrize("call", RULES, ids=str)
def test_sizes_follow_the_picture_as_the_authors_have_it(call):
    rule, width, height, multiple = call
    for row in SIZES:
        picture, expected = tuple(row[:2]), tuple(row[RULES[call] : RULES[call] + 2])
        # The authors' square roots lose a row here: a picture of the typed size stays as it is.
        expected = (832, 480) if (rule, width, picture) == ("area", 832, (832, 480)) else expected
        assert fitting.size_by_rule(rule, width, height, picture, multiple) == expected, picture


@pytest.mark.parametrize("rule", fitting.SIZE_RULES)
def test_sizes_of_odd_pictures_are_possible_ones(rule):
    for picture in [(1, 9999), (9999, 1), (1, 1), (832, 480)]:
        width, height = fitting.size_by_rule(rule, 832, 480, picture, 16)
        assert width >= 16 and height >= 16 and width * height <= 832 * 480 and not (width % 16 or height % 16)
    assert fitting.size_by_rule(rule, 16, 16, (640, 360), 16) == (16, 16)


def test_channels_of_the_control_model_of_wan_22_have_the_control_first(encoder):
    cond = control_conditioning(TEXT, SIZE, encoder, clip_of(9))
    cond = image_conditioning(cond, SIZE, encoder, None, start=clip_of(1))
    control, mask, image = fit(cond, VARIANT["fun_a14b_control"], DITS["fun_a14b_control"], "m", SIZE).concat.split(
        (16, 4, 16), 1
    )
    assert torch.equal(control, cond.slots["control"]) and torch.equal(image, cond.slots["image"])
    assert torch.equal(mask[0, :, 0], torch.ones(4, 4, 6)) and not mask[:, :, 1:].any()
    alone = fit(control_conditioning(TEXT, SIZE, encoder, clip_of(9)), VARIANT["fun_a14b_control"],
                DITS["fun_a14b_control"], "m", SIZE).concat  # fmt: skip
    assert torch.equal(alone[:, :16], control) and not alone[:, 16:].any()


@pytest.mark.parametrize("variant", ["i2v", "fun_a14b_control"])
def test_a_start_image_of_control_models_is_not_lost_on_others(encoder, clip, variant):
    """The latent of one picture does not tell the latents of the grey frames after it."""
    cond = first_frame_conditioning(TEXT, SIZE, encoder, clip, clip_of(1))
    cond = cond if variant == "i2v" else control_conditioning(cond, SIZE, encoder, clip_of(9))
    config = dataclasses.replace(DITS[variant], image_dim=160)
    with pytest.raises(ValueError, match="encode it with Image Encode"):
        fit(cond, VARIANT[variant], config, "Model", SIZE)
    both = image_conditioning(cond, SIZE, encoder, clip, start=clip_of(1))
    assert fit(both, VARIANT[variant], config, "Model", SIZE).concat.shape[1] == config.concat_channels


@pytest.mark.parametrize(("policy", "order"), [("repeat last", [0, 1, 2, 2, 2]), ("loop", [0, 1, 2, 0, 1])])
def test_short_clips_are_filled_and_long_ones_cut(policy, order, caplog):
    caplog.set_level("INFO", "wancore")
    frames = torch.arange(3.0)[:, None]
    assert fitting.fit_length(frames, 5, policy, "clip").flatten().tolist() == order
    assert fitting.fit_length(frames, 2, policy, "clip").flatten().tolist() == [0, 1]
    assert "clip has 3 frames" in caplog.text


def quadrants() -> torch.Tensor:
    """A picture of 40 x 20 with four colours."""
    picture = torch.zeros(1, 20, 40, 3)
    picture[:, :10, :20, 0] = 1
    picture[:, :10, 20:, 1] = 1
    picture[:, 10:, :20, 2] = 1
    return picture


def test_aspects():
    crop = fitting.fit_size(quadrants(), 20, 20, "crop")
    assert crop[0, 2, 2].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    assert crop[0, 2, 17].tolist() == pytest.approx([0, 1, 0], abs=0.01)
    stretch = fitting.fit_size(quadrants(), 20, 20, "stretch")
    assert stretch[0, 2, 2].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    letterbox = fitting.fit_size(quadrants(), 20, 20, "letterbox")
    assert letterbox[0, 1, 10].tolist() == [1, 1, 1]
    assert letterbox[0, 7, 2].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    assert all(t.shape == (1, 20, 20, 3) for t in (crop, stretch, letterbox))
    assert fitting.fit_size(quadrants(), 40, 20, "crop").equal(quadrants())


def test_a_picture_of_another_shape_is_fitted_with_a_notice(caplog):
    fitting.fit_size(quadrants(), 20, 20, "crop")
    assert "A picture of 40x20 is resized to 20x20 (crop)" in caplog.text


def test_control_models_stretch_and_image_models_crop(encoder, clip):
    """The authors' rules where the user states none."""
    picture = torch.cat((clip_of(1, 32, 48), torch.zeros(1, 32, 48, 3)), 2)
    stretched = Fit(aspect="stretch").picture(picture, SIZE)
    control = first_frame_conditioning(TEXT, SIZE, encoder, clip, picture)
    assert relative_error(control.slots["first_frame"][:, :, :1], encoded(encoder, video_pixels(stretched))) < 1e-5
    cropped = Fit(aspect="crop").picture(picture, SIZE)
    image = image_conditioning(TEXT, SIZE, encoder, clip, start=picture)
    assert relative_error(image.slots["image"][:, :, :1], encoded(encoder, video_pixels(cropped))) < 1e-5


def test_resizing_is_that_of_pillow():
    picture = clip_of(1, 60, 80).mul(255).round().div(255)
    theirs = Image.fromarray((picture[0] * 255).round().byte().numpy()).resize((48, 32), Image.Resampling.BICUBIC)
    ours = fitting.fit_size(picture, 48, 32, "stretch")
    difference = (ours - fitting.as_frames(theirs, "picture")).abs()
    assert difference.mean() < 0.5 / 255
    assert difference.max() < 6 / 255  # Pillow rounds and clips between its two passes


def test_pictures_of_every_kind_become_frames():
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 9))
    for value in (picture, [picture, picture], torch.ones(2, 4, 3), torch.ones(3, 2, 4, 4), torch.zeros(1, 2, 4, 1)):
        frames = fitting.as_frames(value, "x")
        assert frames.shape[1:] == (2, 4, 3)
    masks = fitting.as_masks(torch.ones(5, 2, 4), "m")
    assert masks.shape == (5, 2, 4)
    assert fitting.as_masks([picture] * 2, "m").eq(1).all()


@pytest.mark.parametrize(
    "value", [[], "a.png", torch.ones(3), [Image.new("RGB", (1, 1)), Image.new("RGB", (2, 1))], None]
)
def test_what_is_no_picture_is_refused(value):
    with pytest.raises(ValueError, match="x"):
        fitting.as_frames(value, "x")


@pytest.mark.parametrize(
    ("name", "variant", "size", "row"),
    [
        ("wan2.1_i2v_720p_14B_fp16.safetensors", "i2v", "14B", "Wan-AI/Wan2.1-I2V-14B-720P"),
        ("my_finetune.safetensors", "i2v", "14B", "Wan-AI/Wan2.1-I2V-14B-480P"),
        ("Wan2.1-Fun-14B-InP.safetensors", "i2v", "14B", "PAI/Wan2.1-Fun-14B-InP"),
        ("models/PAI/Wan2.1-Fun-V1.1-14B-InP/x.safetensors", "i2v", "14B", "PAI/Wan2.1-Fun-V1.1-14B-InP"),
        ("anything", "i2v", "1.3B", "PAI/Wan2.1-Fun-1.3B-InP"),
        ("vace_preview", "vace", "1.3B", "iic/VACE-Wan2.1-1.3B-Preview"),
        ("wan2.1_vace_1.3B", "vace", "1.3B", "Wan-AI/Wan2.1-VACE-1.3B"),
        ("x", "t2v", "14B", "Wan-AI/Wan2.1-T2V-14B"),
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "t2v", "14B", "Wan-AI/Wan2.2-T2V-A14B"),
        ("Wan2.2/models/wan2.1_t2v_14B_fp16.safetensors", "t2v", "14B", "Wan-AI/Wan2.1-T2V-14B"),
        ("Wan2_2-T2V-A14B-LOW_fp8.safetensors", "t2v", "14B", "Wan-AI/Wan2.2-T2V-A14B"),
        ("my_finetune.safetensors", "i2v_a14b", "14B", "Wan-AI/Wan2.2-I2V-A14B"),
        ("wan2.2_fun_inpaint_low_noise_14B_fp8.safetensors", "i2v_a14b", "14B", "PAI/Wan2.2-Fun-A14B-InP"),
        ("wan2.2_fun_vace_high_noise_14B_bf16.safetensors", "vace", "14B", "PAI/Wan2.2-VACE-Fun-A14B"),
        ("mine", "vace", "14B", "Wan-AI/Wan2.1-VACE-14B"),
        ("krea-realtime-video-14b.safetensors", "t2v", "14B", "krea/krea-realtime-video"),
        ("Wan2_1-SkyReels-V2-T2V-14B-720P_fp16.safetensors", "t2v", "14B", "Skywork/SkyReels-V2-T2V-14B-720P"),
        ("skyreels_v2_i2v_14B_540p.safetensors", "i2v", "14B", "Skywork/SkyReels-V2-I2V-14B-540P"),
        ("x", "t2v", "", None),
    ],
)
def test_names_choose_recommended_settings(name, variant, size, row):
    found = catalog.guess_row(name, variant, size)
    assert (found.model_id if found else None) == row


def test_every_row_of_the_catalog_stands_for_itself():
    assert len({row.model_id for row in catalog.CATALOG}) == len(catalog.CATALOG)
    for row in catalog.CATALOG:
        assert row.variant in VARIANT or row.size == "5B"
        assert len(row.files) == 1 + row.is_pair
        assert catalog.find_row(row.model_id) is row and catalog.published(row.model_id) is row
        assert catalog.published_config(row).has_image_input == row.needs_image_encoder
