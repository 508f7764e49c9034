"""Faults of the reference implementations that this library must not have, each shown by a run that would reveal it."""

import pytest
import torch

from tests.reference import relative_error, tiny_dit, tiny_image_encoder, tiny_text_encoder, tiny_vae
from tests.sampling.runs import sample
from wan_core import catalog
from wan_core.cache_settings import TeaCacheSettings
from wan_core.conditioning.camera import CameraPath
from wan_core.conditioning.image import LatentEncoder, fold_frames, image_conditioning
from wan_core.conditioning.vace import vace_conditioning
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.models.dit import Head
from wan_core.runtime import Runtime
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.tiling import TileSettings
from wan_core.types import Conditioning, LatentSize, VideoSize

SIZE = VideoSize(48, 32, 9)
TEXT = Conditioning(text=torch.randn(1, 8, 64), negative_text=torch.randn(1, 8, 64))
CPU = Runtime(device=torch.device("cpu"), dtype=torch.float32)


def test_all_514_image_tokens_meet_the_image_keys():
    """DiffSynth sends the second image's tokens through the keys of the text."""
    dit, x = tiny_dit("flf2v"), torch.randn(1, 16, 2, 4, 4)
    clip = torch.randn(1, 514, 1280)
    with torch.no_grad():
        context = dit.prepare(Conditioning(text=TEXT.text, image_tokens=clip), (2, 4, 4)).context
        assert (context.image.shape[1], context.text.shape[1]) == (514, 8)
        other = torch.cat((clip[:, :257], torch.randn(1, 257, 1280)), 1)
        out, changed = (
            dit(x, torch.tensor([500.0]), Conditioning(text=TEXT.text, image_tokens=c)) for c in (clip, other)
        )
    assert not torch.equal(out, changed)


def test_the_vace_mask_counts_and_is_binary():
    """DiffSynth ignored it at first, and scaled it to [-1, 1] later."""
    encoder, video = LatentEncoder(vae=tiny_vae()), torch.rand(9, 32, 48, 3)
    half = torch.zeros(9, 32, 48)
    half[:, :16] = 0.6
    contexts = [
        vace_conditioning(TEXT, SIZE, encoder, video=video, mask=m).vace[0].context for m in (half, half.round())
    ]
    assert torch.equal(*contexts)
    assert set(contexts[0][:, 32:].unique().tolist()) == {0.0, 1.0}


def test_teacache_runs_and_leaves_out_steps():
    """DiffSynth read the number of steps from the wrong place and crashed."""
    cache = TeaCacheSettings(threshold=50.0, template="Wan2.1-T2V-1.3B")
    runs = [
        sample(tiny_dit(), TEXT, LatentSize(2, 4, 4), SamplerSettings(steps=8, cache=c), CPU) for c in (None, cache)
    ]
    assert runs[0].shape == runs[1].shape
    assert not torch.equal(*runs)


def test_the_head_modulates_each_sample_by_its_own_time():
    """DiffSynth added (1, 2, D) and (B, D) without an axis between them."""
    head = Head(8, 4)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x, time = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    with torch.no_grad():
        both = head(x.clone(), time, torch.float32)
        single = [head(x[i : i + 1].clone(), time[i : i + 1], torch.float32) for i in range(2)]
    assert torch.allclose(both, torch.cat(single), atol=1e-6)


def test_padding_is_cut_from_each_prompt_by_its_own_length():
    """DiffSynth zeroed all prompts of a batch from the length of one."""
    ids = torch.tensor([[3, 4, 5, 6, 1], [7, 1, 0, 0, 0]])
    out = tiny_text_encoder()(ids, ids > 0)
    assert out[0].abs().sum(1).gt(0).all()
    assert out[1].abs().sum(1).gt(0).tolist() == [True, True, False, False, False]


def test_tiles_keep_their_size_from_video_to_video():
    """DiffSynth multiplied the tile size by eight again for each video of a list."""
    vae, tiles = tiny_vae(), TileSettings(size=(3, 4), stride=(2, 3))
    videos = [torch.rand(1, 3, 5, 48, 64) * 2 - 1 for _ in range(2)]
    once = vae.encode(videos[1], tiles)
    vae.encode(videos[0], tiles)
    assert torch.equal(vae.encode(videos[1], tiles), once)


def test_merged_guidance_of_scale_one_runs_one_branch():
    """DiffSynth doubled the batch for nothing."""
    dit, batches = tiny_dit(), []
    dit.blocks[0].register_forward_pre_hook(lambda _, args: batches.append(args[0].shape[0]))
    for scale in (1.0, 5.0):
        guidance = GuidanceSettings(scale=scale, mode="batched")
        sample(dit, TEXT, LatentSize(2, 4, 4), SamplerSettings(steps=1, guidance=guidance), CPU)
    assert batches == [1, 2]


def test_camera_moves_translate_and_do_not_shear():
    """DiffSynth changed entries of the rotation."""
    for direction in ("Left", "Right", "Up", "Down", "In", "Out"):
        matrices = CameraPath.from_direction(direction, 5).world_to_camera
        assert torch.allclose(matrices[:, :3, :3].double(), torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
        assert matrices[-1, :3, 3].abs().sum() > 0


def test_fp8_image_encoder_computes_in_the_chosen_type(tmp_path):
    """DiffSynth would have computed it in FP8."""
    weights = {k: v.to(torch.float8_e4m3fn) for k, v in tiny_image_encoder().state_dict().items()}
    torch.save(weights, tmp_path / "clip.pth")
    component = detect_files(tmp_path / "clip.pth")
    stored, plain = (build(component, dtype=torch.bfloat16, weights=weights) for weights in ("auto", "plain"))
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    image = torch.zeros(1, 3, 32, 32)
    assert plain(image).isfinite().all() and torch.equal(stored(image), plain(image))


@pytest.mark.parametrize("frames", [5, 13, 21])
def test_first_and_last_frame_work_at_any_length(frames):
    """The official code has a mask of 81 frames, and crops the last image with its sides swapped."""
    size = VideoSize(48, 32, frames)
    known = torch.zeros(frames, 32, 48)
    known[0] = known[-1] = 1
    mask = fold_frames(known, size)
    assert mask.shape == (1, 4, (frames + 3) // 4, 4, 6)
    assert mask.sum().item() == (4 + 1) * 4 * 6
    start, end = torch.rand(1, 40, 60, 3), torch.rand(1, 90, 50, 3)
    cond = image_conditioning(TEXT, size, LatentEncoder(vae=tiny_vae()), tiny_image_encoder(), start=start, end=end)
    assert cond.slots["image"].shape == (1, 16, (frames + 3) // 4, 4, 6)


def test_references_are_encoded_one_by_one():
    """DiffSynth encodes several references of a video-to-video run as one clip."""
    encoder = LatentEncoder(vae=tiny_vae())
    pictures = torch.rand(2, 32, 48, 3)
    context = vace_conditioning(TEXT, SIZE, encoder, references=[pictures]).vace[0].context
    alone = [encoder.frames(p[None]) for p in pictures]
    assert relative_error(context[:, :16, :2], torch.cat(alone, 2)) < 1e-5


def test_every_row_has_a_teacache_template():
    """VideoX-Fun's look-up does not know its own V1.1-14B."""
    templates = {row.model_id: row.preset.teacache for row in catalog.CATALOG}
    assert all(templates.values())
    assert templates["PAI/Wan2.1-Fun-V1.1-14B-Control"] == "Wan2.1-I2V-14B-720P"
