"""Another geometry is another row: sizes, conditioning, sampling and plans follow it, and nothing else has to know."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.reference import filled
from tests.sampling.runs import sample
from wan_core import catalog
from wan_core.conditioning.camera import CameraPath, camera_conditioning
from wan_core.conditioning.image import LatentEncoder, control_conditioning, image_conditioning, reference_conditioning
from wan_core.conditioning.vace import vace_conditioning
from wan_core.decode import decode
from wan_core.model_config import require_same_latents
from wan_core.models.config import WAN_21, WAN_22, DiTConfig, Geometry, ImageEncoderConfig, VAEConfig
from wan_core.models.dit import WanDiT
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE, denormalise, normalise
from wan_core.planning.job import InputSizes, placeholder_conditioning
from wan_core.planning.modules import published_component, published_dit
from wan_core.planning.run import plan_run
from wan_core.runtime import Runtime
from wan_core.sampling.preview import latents_to_rgb, preview_frames
from wan_core.settings import MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, LatentSize, VideoSize, tensors_in
from wan_core.variants import fit, match_variant

ODD = Geometry(
    name="odd", channels=6, spatial_stride=4, temporal_stride=2, patch=(1, 1, 3), fps=12,
    mean=(0.5,) * 6, std=(2.0,) * 6, rgb=((0.1, 0.2, 0.3),) * 6, rgb_bias=(0.0, 0.1, 0.2),
)  # fmt: skip
"""Unlike any model in every number, so that a number of Wan 2.1 anywhere would show."""

GEOMETRIES = pytest.mark.parametrize("geometry", [WAN_21, WAN_22, ODD], ids=lambda geometry: geometry.name)
RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
BASE = dict(dim=128, ffn_dim=128, num_layers=1, text_dim=32, freq_dim=32, image_dim=80)


class Pooled(nn.Module):
    """A VAE in shapes and timing alone: the mean of each cell in every channel, and back."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.config = VAEConfig(geometry=geometry)
        self.conv2 = nn.Conv3d(geometry.channels, geometry.channels, 1)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        geometry = self.config.geometry
        time, stride = geometry.temporal_stride, geometry.spatial_stride
        pixels = torch.cat((pixels[:, :, :1].expand(-1, -1, time - 1, -1, -1), pixels), 2)
        cells = F.avg_pool3d(pixels.mean(1, keepdim=True), (time, stride, stride))
        return cells.expand(-1, geometry.channels, -1, -1, -1)


@pytest.fixture(scope="module")
def image_encoder() -> ImageEncoder:
    return filled(ImageEncoder, ImageEncoderConfig(dim=80, mlp_dim=80, num_layers=2, out_dim=64))


def size_of(geometry: Geometry) -> VideoSize:
    """Two tokens by two, three latent frames."""
    return LatentSize(3 * geometry.patch[0], 2 * geometry.patch[1], 2 * geometry.patch[2], geometry).video


def config_of(geometry: Geometry, *names: str) -> DiTConfig:
    z, mask = geometry.channels, geometry.mask_channels
    changes = {
        "t2v": dict(in_channels=z),
        "i2v": dict(in_channels=2 * z + mask, has_image_input=True),
        "control": dict(in_channels=3 * z, has_image_input=True, has_reference=True),
        "camera": dict(in_channels=2 * z, has_image_input=True, camera_channels=geometry.camera_channels),
        "vace": dict(in_channels=z, vace_layers=(0,), vace_channels=geometry.vace_channels),
    }
    if geometry.frame_times:  # as the Fun 5B models: a mask beside the control video, and no image tokens
        changes["control"] = dict(in_channels=3 * z + mask, has_reference=True)
    (name,) = names
    return DiTConfig(**BASE, geometry=geometry, **changes[name])


def conditioned(geometry: Geometry, name: str, image_encoder: ImageEncoder) -> Conditioning:
    """What the nodes of such a model make of pictures, at the size of `size_of`."""
    size, vae = size_of(geometry), Pooled(geometry)
    encoder = LatentEncoder(vae=vae, encode=vae.encode)
    text = torch.randn(1, 8, BASE["text_dim"], generator=torch.Generator().manual_seed(0))
    cond = Conditioning(text=text, negative_text=-text)
    clip = torch.rand(size.num_frames, size.height, size.width, 3, generator=torch.Generator().manual_seed(1))
    match name:
        case "i2v":
            return image_conditioning(cond, size, encoder, image_encoder, start=clip[:1], end=clip[-1:])
        case "control":
            cond = control_conditioning(cond, size, encoder, clip)
            return reference_conditioning(cond, size, encoder, image_encoder, clip[:1])
        case "camera":
            path = CameraPath.from_direction("Left", size.num_frames)
            cond = camera_conditioning(cond, path, VideoSize(size.width, size.height, size.num_frames, geometry))
            return cond.with_inputs("input_image")
        case "vace":
            return vace_conditioning(cond, size, encoder, video=clip, mask=clip[..., 0], references=(clip[:1],))
    return cond


MODELS = pytest.mark.parametrize("name", ["t2v", "i2v", "control", "camera", "vace"])


@GEOMETRIES
def test_sizes_are_rounded_to_the_geometry_and_back(geometry):
    size = VideoSize.rounded(100, 70, 7, geometry)
    assert size.width % geometry.side_multiple == size.height % geometry.side_multiple == 0
    assert (size.num_frames - 1) % geometry.temporal_stride == 0
    assert (size.width, size.height, size.num_frames) >= (100, 70, 7)
    assert size.latent.video == size and size.latent.geometry is size.latent.video.geometry is geometry
    assert size.latent.tokens == size.latent.frames * (size.width // (geometry.spatial_stride * geometry.patch[2])) * (
        size.height // (geometry.spatial_stride * geometry.patch[1])
    )


def test_the_sizes_of_the_published_models():
    assert (WAN_21.side_multiple, WAN_21.camera_channels, WAN_21.vace_channels) == (16, 24, 96)
    assert (WAN_22.side_multiple, WAN_22.fps, WAN_22.channels) == (32, 24, 48)
    size = VideoSize.rounded(1280, 700, 121, WAN_22)
    assert str(size) == "1280x704, 121 frames" and size.latent.shape == (31, 44, 80)
    assert size.latent.tokens == 27280


@GEOMETRIES
def test_latents_are_normalised_by_their_own_numbers(geometry):
    raw = torch.randn(2, geometry.channels, 2, 3, 4)
    assert torch.allclose(denormalise(normalise(raw, geometry), geometry), raw, atol=1e-5)
    mean = torch.tensor(geometry.mean).view(1, -1, 1, 1, 1)
    assert normalise(mean.expand_as(raw), geometry).abs().max() < 1e-6
    assert latents_to_rgb(raw, geometry).shape == (2, 2, 3, 4, 3)


@GEOMETRIES
@MODELS
def test_conditioning_fits_the_model_and_samples(geometry, name, image_encoder):
    config, size = config_of(geometry, name), size_of(geometry)
    variant = match_variant(config)
    cond = fit(conditioned(geometry, name, image_encoder), variant, config, "model", size)
    dit = filled(WanDiT, config)
    windows = WindowSettings(size=2, stride=1, mode="chain") if name != "vace" else None
    latents = sample(dit, cond, size.latent, SamplerSettings(steps=1, windows=windows), RUNTIME)
    assert latents.shape == (1, geometry.channels, *size.latent.shape) and latents.isfinite().all()


@GEOMETRIES
@MODELS
def test_a_plan_counts_what_the_conditioning_takes(geometry, name, image_encoder):
    config, size = config_of(geometry, name), size_of(geometry)
    given = InputSizes(vace=(1,) if name == "vace" else (), camera=name == "camera")
    planned = placeholder_conditioning(config, size.latent, given)
    real = fit(conditioned(geometry, name, image_encoder), match_variant(config), config, "model", size)
    for field in ("concat", "reference", "camera", "vace"):
        shapes = [[tuple(t.shape) for t in tensors_in(getattr(cond, field))] for cond in (planned, real)]
        # A model's empty channels beside the noise are made by the model itself.
        assert shapes[0] == shapes[1] or not shapes[1], field
    with torch.device("meta"):
        dit = WanDiT(config).requires_grad_(False)
    plan = plan_run(dit, planned, size.latent, SamplerSettings(steps=2), MemorySettings(), lambda _: None)
    assert plan.activations > 0


@GEOMETRIES
def test_inputs_of_another_vae_are_refused_by_name(geometry, image_encoder):
    other = WAN_22 if geometry is WAN_21 else WAN_21
    for name in ("i2v", "control", "vace"):
        config = config_of(geometry, name)
        cond = replace(conditioned(other, name, image_encoder), size=None)
        with pytest.raises(ValueError, match=f"{geometry.name}.*VAE that belongs to the model"):
            fit(cond, match_variant(config), config, "model")
    with pytest.raises(ValueError, match=f"Latents of {geometry.name} have {geometry.channels} channels"):
        normalise(torch.zeros(1, other.channels, 1, 2, 2), geometry)


def test_a_vae_refuses_latents_of_another_model():
    vae = filled(WanVAE, VAEConfig(base_dim=8))
    with pytest.raises(ValueError, match="48"):
        decode(vae, torch.zeros(1, 48, 1, 2, 2), None, RUNTIME)


@GEOMETRIES
def test_a_dit_and_a_vae_of_two_families_are_refused_from_their_headers(geometry):
    dit = published_dit(catalog.find_row(catalog.TINY))
    vae = published_component("vae", catalog.TINY)
    dit = replace(dit, config=replace(dit.config, geometry=geometry))
    require_same_latents(dit, replace(vae, config=VAEConfig(geometry=geometry)))
    other = WAN_22 if geometry is WAN_21 else WAN_21
    file = {16: ": Wan2.1_VAE.pth", 48: ": Wan2.2_VAE.pth, or ComfyUI's wan2.2_vae"}.get(geometry.channels, "")
    with pytest.raises(ValueError, match=f"latents of {other.name} .{other.channels} .*VAE of {geometry.name}{file}"):
        require_same_latents(dit, replace(vae, config=VAEConfig(geometry=other)))


@pytest.mark.parametrize("geometry", [WAN_21, WAN_22], ids=lambda geometry: geometry.name)
def test_previews_know_published_latents_by_their_channels(geometry):
    (picture,) = preview_frames(torch.zeros(1, geometry.channels, 1, 2, 3), geometry)
    assert picture.size == (3, 2)


ROOT = Path(__file__).parents[2]
SUSPECTS = r"(LATENT_CHANNELS|VAE_STRIDE|SIZE_MULTIPLE)\s*=|(height|width)\s*(//|\*) (8|16)\b"


@pytest.mark.parametrize("package", ["wan_core", "nodes", "headless", "trainer"])
def test_no_module_holds_a_geometry_of_its_own(package):
    found = [
        f"{path.name}: {line.strip()}"
        for path in (ROOT / package).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(SUSPECTS, line) and "TOOLTIPS" not in line
    ]
    assert not found
