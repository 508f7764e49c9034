"""The bridges to ComfyUI's own nodes: what they refuse, and, on the real host, that both sides compute the same."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.comfyui import comfyui
from tests.programs import PATIENCE
from tests.reference import tiny_dit, tiny_vae
from wan_core.loading.tensor_files import CheckpointError
from wan_core.models.config import WAN_21, WAN_22
from wan_core.models.vae import denormalise, normalise
from wan_core.types import Conditioning, Curve, VaceInput, VideoSize, tensors_in
from wan_core.variants import CONTROL, IMAGE, MASK, assemble_concat
from wancore.nodes import NODE_CLASS_MAPPINGS
from wancore.nodes.native import from_native, to_native
from wancore.nodes.vae import latent_of, with_known_latents

NODES = NODE_CLASS_MAPPINGS
ROOT = Path(__file__).parents[2]
SIZE = VideoSize(64, 48, 9)
F, H, W = SIZE.latent.shape
CLOSE = 1e-4

PARITY = [
    f"{way}_{kind}"
    for way, kinds in {
        "to": ("t2v", "i2v", "flf2v", "control", "control_ref", "control_ref_without", "i2v_a14b", "camera", "vace"),
        "back": ("t2v", "i2v", "flf2v", "control", "control_ref", "control_ref_without", "i2v_a14b", "camera", "vace"),
        "from": ("i2v", "flf2v", "control", "control_ref", "camera", "vace", "vace_plain", "vace_kept"),
    }.items()
    for kind in kinds
] + ["vae_encode", "vae_decode", "adopted_vae_encode", "adopted_vae_decode", "umt5"]
PARITY += [f"{name}_negative" for name in PARITY if name.startswith("to_")]
# Runs of a pair whose steps with leftover noise pass from one side's samplers to the other's.
PARITY += [
    f"{run}_{kind}"
    for run in ("native", "native_then_ours", "native_then_pair", "ours_then_native", "ours_then_ours")
    for kind in ("t2v", "i2v_a14b")
]


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """Largest differences on the real host, see host_parity.py."""
    comfy, script = comfyui(), Path(__file__).with_name("host_parity.py")
    command = [comfy.python, str(script), str(comfy.folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfy.folder, timeout=PATIENCE, check=False)
    assert not done.returncode, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.comfyui
@pytest.mark.parametrize("name", PARITY)
def test_the_same_weights_give_the_same_in_comfyui_and_here(differences, name):
    assert differences[name] < CLOSE


@pytest.mark.comfyui
def test_every_comparison_is_looked_at(differences):
    assert set(differences) == set(PARITY)


def text(length: int = 512, words: int = 5) -> torch.Tensor:
    return torch.cat((torch.randn(1, words, 64), torch.zeros(1, length - words, 64)), 1)


def entry(length: int = 512, **values) -> list:
    return [[text(length), {"pooled_output": None, **values}]]


def both(**values) -> tuple[list, list]:
    return entry(**values), entry(**values)


def raw(channels: int = 16, frames: int = F) -> torch.Tensor:
    parts = [denormalise(torch.randn(1, 16, frames, H, W), WAN_21) for _ in range(channels // 16)]
    return torch.cat(parts, 1)


def tokens(count: int = 257) -> SimpleNamespace:
    return SimpleNamespace(penultimate_hidden_states=torch.randn(1, count, 1280))


def test_embeddings_become_as_long_as_the_models_were_trained_with():
    cond = from_native(entry(length=77), entry(length=600))
    assert cond.text.shape == cond.negative_text.shape == (1, 600, 64)
    assert not cond.text[:, 77:].any()
    short = from_native(entry(length=77), entry(length=80))
    assert short.text.shape == short.negative_text.shape == (1, 512, 64)


def mask(known: slice) -> torch.Tensor:
    """As ComfyUI's node for first and last frames writes it: 0 where a pixel frame is known."""
    drawn = torch.ones(1, 1, 4 * F, H, W)
    drawn[:, :, known] = 0
    return drawn.view(1, F, 4, H, W).transpose(1, 2)


@pytest.mark.parametrize(
    ("known", "names"),
    [
        (slice(0, 4), ("input_image",)),
        (slice(-1, None), ("end_image",)),
        (slice(0, None), ("input_image", "end_image")),
        (slice(4, 8), ("inpaint_video",)),
        (slice(0, 0), ("input_image",)),
    ],
)
def test_a_mask_tells_what_was_given(known, names):
    values = {"concat_latent_image": raw(), "concat_mask": mask(known)}
    cond = from_native(*both(**values))
    assert cond.inputs == names and cond.size == SIZE


def test_image_tokens_of_a_socket_come_first():
    given, instead = tokens(), tokens(514)
    positive, negative = both(clip_vision_output=given)
    assert torch.equal(from_native(positive, negative).image_tokens, given.penultimate_hidden_states)
    assert torch.equal(from_native(positive, negative, instead).image_tokens, instead.penultimate_hidden_states)


def test_what_no_model_reads_is_named(caplog):
    from_native(*both(audio_embed=torch.zeros(1)))
    assert "audio_embed" in caplog.text


ONE = {"concat_latent_image": raw()}
REFUSED = {
    "two entries": (lambda: (entry() + entry(), entry()), "positive conditioning has 2 entries"),
    "no entry": (lambda: (entry(), []), "negative conditioning has 0 entries"),
    "area": (lambda: both(area=(1, 1, 0, 0)), "an area"),
    "range": (lambda: both(start_percent=0.2, end_percent=0.7), "a range of steps"),
    "controlnet": (lambda: both(control=object()), "a ControlNet"),
    "one branch": (lambda: (entry(**ONE), entry()), "differ in concat_latent_image"),
    "other picture": (lambda: (entry(**ONE), entry(concat_latent_image=raw())), "differ in concat_latent_image"),
    "another model": (lambda: both(concat_latent_image=torch.zeros(1, 20, F, H, W)), "concat_latent_image should be"),
    "a picture": (lambda: both(concat_latent_image=torch.zeros(1, 16, H, W)), "concat_latent_image should be"),
    "mask": (lambda: both(**ONE, concat_mask=torch.zeros(F, H, W)), "concat_mask should be"),
    "other tokens": (lambda: both(clip_vision_output=tokens(50)), "257 tokens of each picture"),
    "no tokens": (lambda: both(clip_vision_output=object()), "257 tokens of each picture"),
    "two sizes": (
        lambda: both(**ONE, camera_conditions=torch.zeros(1, 24, F, 32, 32)),
        "camera is made for 32x32, 9 frames, but input_image for 64x48, 9 frames",
    ),
    "mixed VACE": (
        lambda: both(vace_frames=[raw(32), raw(32, F + 1)]),
        "VACE inputs of different shapes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_here_is_refused(case):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        from_native(*make())


def ours(**values) -> Conditioning:
    return Conditioning(text=text(), negative_text=text(), **values)


def vace(frames: int = F, **curve) -> VaceInput:
    return VaceInput(context=torch.randn(1, 96, frames, H, W), strength=Curve(**{"values": (1.0,), **curve}))


@pytest.mark.parametrize(
    ("cond", "words"),
    [
        (ours(motion_bucket=torch.tensor([50.0])), "does not support speed control"),
        (ours(vace=(vace(values=(1.0, 0.0)),)), "strength that changes"),
        (ours(vace=(vace(end=0.5),)), "strength that changes"),
        (replace(ours(), size=VideoSize(32, 32, 5), inputs=("camera",)), "camera was made for 32x32, 5 frames"),
    ],
)
def test_what_has_no_place_there_is_refused(cond, words):
    with pytest.raises(ValueError, match=words):
        to_native(cond, SIZE, lambda tokens: None)


def test_the_empty_video_is_that_of_the_run():
    positive, negative, latent, trim = NODES["WanCoreToConditioning"]().convert(ours(), 60, 48, 7)
    assert latent["samples"].shape == (1, 16, 3, 6, 8) and not latent["samples"].any() and trim == 0
    assert positive[0][1] == negative[0][1] == {}
    *_, latent, trim = NODES["WanCoreToConditioning"]().convert(ours(vace=(vace(F + 2),)), 64, 48, 9)
    assert latent["samples"].shape[2] == F + 2 and trim == 2


def test_nothing_that_is_given_is_changed():
    positive, negative = both(concat_latent_image=raw(), vace_frames=[raw(32)], camera_conditions=None)
    before = [tensor.clone() for tensor in tensors_in((positive[0][0], positive[0][1]["concat_latent_image"]))]
    cond = from_native(positive, negative)
    to_native(cond, SIZE, lambda tokens: None)
    after = tensors_in((positive[0][0], positive[0][1]["concat_latent_image"]))
    assert all(map(torch.equal, before, after))


def test_a_vae_is_copied():
    theirs = tiny_vae()
    with torch.inference_mode():
        (vae,) = NODES["WanCoreFromVAE"]().convert(SimpleNamespace(get_sd=theirs.state_dict))
    latents = torch.randn(1, 16, 2, 6, 8)
    expected = theirs.decode(latents)
    assert torch.allclose(vae.decode(latents), expected, atol=1e-5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert torch.allclose(vae.decode(latents), expected, atol=1e-5)
    assert vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (lambda: tiny_dit().state_dict(), "ComfyUI's VAE is a Wan DiT"),
        (lambda: {"encoder.down.0.block.0.conv1.weight": torch.zeros(1)}, "the VAE of an image model"),
        (lambda: {n: t for n, t in tiny_vae().state_dict().items() if "middle.1" not in n}, "tensors do not fit"),
    ],
)
def test_another_vae_is_refused(weights, words):
    with pytest.raises(CheckpointError, match=words):
        NODES["WanCoreFromVAE"]().convert(SimpleNamespace(get_sd=weights))


def values_of(frames: int, channels: int, known: int) -> dict[str, torch.Tensor]:
    """What Wan22FunControlToVideo leaves: a mask beside the latents of a picture, 1 where the model draws."""
    mask = torch.ones(1, 4, frames, 2, 4)
    mask[:, :, :known] = 0
    return {"concat_latent_image": torch.randn(1, channels, frames, 2, 4), "concat_mask": mask, "concat_mask_index": 16}


@pytest.mark.parametrize("known", [0, 1])
def test_control_latents_with_a_mask_are_those_of_wan_22(known):
    values = values_of(3, 32, known)
    native = [[torch.zeros(1, 512, 8), values]]
    cond = from_native(native, native)
    assert cond.inputs == ("control_video", "input_image")[: 1 + known]
    fitted = assemble_concat(cond.slots, (CONTROL, MASK, IMAGE), WAN_21)
    latents = normalise(values["concat_latent_image"][:, :16], WAN_21)
    assert torch.allclose(fitted[:, :16], latents) and torch.equal(fitted[:, 16:20], 1 - values["concat_mask"])
    (back, *_), *_ = to_native(replace(cond, slots={k: v for k, v in cond.slots.items() if k != "first_frame"}),
                               cond.size, lambda tokens: tokens)  # fmt: skip
    assert torch.allclose(back[1]["concat_latent_image"], values["concat_latent_image"], atol=1e-5)
    assert torch.equal(back[1]["concat_mask"], values["concat_mask"]) and back[1]["concat_mask_index"] == 16


def test_latents_of_48_channels_are_those_of_wan_22():
    native = [[torch.zeros(1, 512, 8), values_of(4, 48, 1)]]
    cond = from_native(native, native)
    assert cond.size == VideoSize(64, 32, 13, WAN_22)
    assert torch.allclose(cond.clean[:, :, :1], normalise(native[0][1]["concat_latent_image"], WAN_22)[:, :, :1])


def test_a_latent_with_known_frames_begins_a_video_by_ti2v():
    """As Wan22ImageToVideoLatent makes it, and back."""
    samples, mask = torch.randn(1, 48, 4, 2, 4), torch.ones(1, 1, 4, 2, 4)
    mask[:, :, :2] = 0
    cond = with_known_latents(Conditioning(), {"samples": samples, "noise_mask": mask}, WAN_22)
    assert cond.inputs == ("input_image",) and cond.size == VideoSize(64, 32, 13, WAN_22)
    assert cond.timestep_index.flatten().tolist() == [0, 0, 1, 1]
    again = latent_of(cond, torch.zeros_like(samples))
    assert torch.equal(again["noise_mask"], mask)
    assert torch.allclose(again["samples"][:, :, :2], samples[:, :, :2], atol=1e-5)
    assert with_known_latents(Conditioning(), {"samples": samples}, WAN_22) == Conditioning()
    assert with_known_latents(Conditioning(), {"samples": samples, "noise_mask": mask}, WAN_21) == Conditioning()
