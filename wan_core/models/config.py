"""What the models of the Wan family are: the geometry of their latents, and the architecture of each component, every
field of which can be read from tensor names and shapes alone.
"""

from dataclasses import dataclass, field, replace
from math import lcm
from typing import ClassVar, Literal

HEAD_DIM = 128
"""Attention head width of every published Wan DiT; the head count is not stored in the file, so it follows from this.
"""

TEXT_TOKENS = 512
"""Rows of a text embedding. The DiT attends to all of them, including the zero rows after the text: it was trained that
way.
"""

RAY_CHANNELS = 6
"""Plücker coordinates of a camera ray: moment (origin x direction) and direction, three numbers each."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How videos, latents and tokens of one family of models relate, and how its latents are normalised.

    Attributes:
        name: of the family, in messages.
        channels: of a latent.
        spatial_stride: pixels per latent cell, along each side.
        temporal_stride: frames per latent frame. The first latent frame stands for one frame alone, so a video has
            `temporal_stride` * k + 1 frames.
        patch: latent frames, rows and columns of one token.
        fps: frames per second of the videos that the models were trained on.
        mean, std: of each channel of raw latents.
        frame_times: whether the models read a timestep for each latent frame, and so take clean frames among noisy
            ones.
        rgb, rgb_bias: the colour that each channel of normalised latents adds to a preview, and the colour of zeros.
    """

    name: str
    channels: int
    spatial_stride: int
    temporal_stride: int
    patch: tuple[int, int, int]
    fps: float
    mean: tuple[float, ...] = field(repr=False)
    std: tuple[float, ...] = field(repr=False)
    rgb: tuple[tuple[float, float, float], ...] = field(repr=False)
    rgb_bias: tuple[float, float, float] = field(repr=False)
    frame_times: bool = False

    @property
    def side_multiple(self) -> int:
        """What width and height are multiples of, in pixels."""
        return self.spatial_stride * lcm(*self.patch[1:])

    @property
    def length_rule(self) -> str:
        """Which numbers of frames a video can have, in words."""
        return f"{self.temporal_stride}k + 1"

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video, of as many whole groups as `num_frames` holds."""
        return (num_frames - 1) // self.temporal_stride + 1

    def video_frames(self, latent_frames: int) -> int:
        """Frames that so many latent frames decode to."""
        return (latent_frames - 1) * self.temporal_stride + 1

    @property
    def mask_channels(self) -> int:
        """Of the mask of known frames beside the noise: one for each frame of a latent frame."""
        return self.temporal_stride

    @property
    def vace_mask_channels(self) -> int:
        """Of the mask of a VACE context: one for each pixel of a latent cell."""
        return self.spatial_stride**2

    @property
    def vace_channels(self) -> int:
        """Of a VACE context: the latents of what is kept and of what is drawn, and the mask."""
        return 2 * self.channels + self.vace_mask_channels

    @property
    def camera_channels(self) -> int:
        """Of a camera embedding: the ray of each pixel in each frame of a latent frame."""
        return RAY_CHANNELS * self.temporal_stride

    def matches(self, other: "Geometry") -> bool:
        """Whether both speak of the same latents; patches do not count, a VAE has none."""
        return replace(self, patch=other.patch) == other


# Mean and deviation of the latents are from Wan-Video/Wan2.1 wan/modules/vae.py and Wan-Video/Wan2.2
# wan/modules/vae2_2.py. The colours are linear fits published in ComfyUI (comfy/latent_formats.py, Wan21 and Wan22).
WAN_21 = Geometry(
    name="Wan 2.1",
    channels=16,
    spatial_stride=8,
    temporal_stride=4,
    patch=(1, 2, 2),
    fps=16,
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    rgb=(
        (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
        (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
        (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
        (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
    ),
    rgb_bias=(-0.1835, -0.0868, -0.3360),
)  # fmt: skip
WAN_22 = Geometry(
    name="Wan 2.2 TI2V-5B",
    channels=48,
    spatial_stride=16,
    temporal_stride=4,
    patch=(1, 2, 2),
    fps=24,
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
    rgb=(
        (0.0119, 0.0103, 0.0046), (-0.1062, -0.0504, 0.0165), (0.0140, 0.0409, 0.0491), (-0.0813, -0.0677, 0.0607),
        (0.0656, 0.0851, 0.0808), (0.0264, 0.0463, 0.0912), (0.0295, 0.0326, 0.0590), (-0.0244, -0.0270, 0.0025),
        (0.0443, -0.0102, 0.0288), (-0.0465, -0.0090, -0.0205), (0.0359, 0.0236, 0.0082), (-0.0776, 0.0854, 0.1048),
        (0.0564, 0.0264, 0.0561), (0.0006, 0.0594, 0.0418), (-0.0319, -0.0542, -0.0637), (-0.0268, 0.0024, 0.0260),
        (0.0539, 0.0265, 0.0358), (-0.0359, -0.0312, -0.0287), (-0.0285, -0.1032, -0.1237), (0.1041, 0.0537, 0.0622),
        (-0.0086, -0.0374, -0.0051), (0.0390, 0.0670, 0.2863), (0.0069, 0.0144, 0.0082), (0.0006, -0.0167, 0.0079),
        (0.0313, -0.0574, -0.0232), (-0.1454, -0.0902, -0.0481), (0.0714, 0.0827, 0.0447), (-0.0304, -0.0574, -0.0196),
        (0.0401, 0.0384, 0.0204), (-0.0758, -0.0297, -0.0014), (0.0568, 0.1307, 0.1372), (-0.0055, -0.0310, -0.0380),
        (0.0239, -0.0305, 0.0325), (-0.0663, -0.0673, -0.0140), (-0.0416, -0.0047, -0.0023), (0.0166, 0.0112, -0.0093),
        (-0.0211, 0.0011, 0.0331), (0.1833, 0.1466, 0.2250), (-0.0368, 0.0370, 0.0295), (-0.3441, -0.3543, -0.2008),
        (-0.0479, -0.0489, -0.0420), (-0.0660, -0.0153, 0.0800), (-0.0101, 0.0068, 0.0156), (-0.0690, -0.0452, -0.0927),
        (-0.0145, 0.0041, 0.0015), (0.0421, 0.0451, 0.0373), (0.0504, -0.0483, -0.0356), (-0.0837, 0.0168, 0.0055),
    ),
    rgb_bias=(0.0317, -0.0878, -0.1388),
    frame_times=True,
)  # fmt: skip

GEOMETRIES = {geometry.channels: geometry for geometry in (WAN_21, WAN_22)}
"""By the channels of a latent, which a DiT's and a VAE's file tell."""

DEFAULT_GEOMETRY = WAN_21
"""Of numbers that come before a model is known: limits and steps of widgets, defaults of arguments. Once there is a
model or a VAE, sizes have its geometry.
"""


CLIP_TOKENS = 257
"""Tokens of one image: 16 x 16 patches and the class token."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A Wan video transformer. The defaults are the text-to-video model of 1.3 billion parameters.

    `vace_layers` lists the blocks after which a VACE hint is added; it is empty for a model without the branch.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_layers: int = 30
    geometry: Geometry = WAN_21
    in_channels: int = WAN_21.channels
    text_dim: int = 4096
    freq_dim: int = 256
    image_dim: int = 1280
    has_image_input: bool = False
    image_positions: int = 0
    has_reference: bool = False
    camera_channels: int = 0
    vace_layers: tuple[int, ...] = ()
    vace_channels: int = 0

    @property
    def num_heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def out_channels(self) -> int:
        return self.geometry.channels

    @property
    def patch_size(self) -> tuple[int, int, int]:
        return self.geometry.patch

    @property
    def num_image_tokens(self) -> int:
        """CLIP tokens that the model reads: of one image, or of as many as it has positions for."""
        return (self.image_positions or CLIP_TOKENS) if self.has_image_input else 0

    @property
    def concat_channels(self) -> int:
        """Channels that conditioning must supply beside the noisy latents."""
        return self.in_channels - self.out_channels


@dataclass(frozen=True, kw_only=True)
class MotionControllerConfig:
    """The speed-control adapter: `freq_dim` sinusoid to six modulation vectors of width `dim`."""

    dim: int = 1536
    freq_dim: int = 256


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A UMT5 encoder. The defaults are UMT5-XXL."""

    vocab_size: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


@dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig:
    """The vision tower of open-CLIP XLM-RoBERTa ViT-H/14. Heads are 80 wide in the published model."""

    dim: int = 1280
    mlp_dim: int = 5120
    num_layers: int = 32
    patch_size: int = 14
    num_positions: int = CLIP_TOKENS
    out_dim: int = 1024

    @property
    def num_heads(self) -> int:
        return self.dim // 80


@dataclass(frozen=True, kw_only=True)
class PreviewDecoderConfig:
    """The decoder of the tiny autoencoder: channels of its three stages, and of what follows them.

    `patch` is how many pixels per side it gives as channels.
    """

    latent_channels: int = WAN_21.channels
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)
    patch: int = 1
    upscale: ClassVar[int] = 1

    @property
    def geometry(self) -> Geometry:
        return GEOMETRIES[self.latent_channels]

    def pixel_stride(self, what: Literal["encode", "decode"]) -> int:
        """Pixels per latent cell and side: three stages double them, and `patch` unfolds them."""
        return 8 * self.patch


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The causal video autoencoder; widths are `base_dim` times (1, 2, 4, 4).

    Attributes:
        decoder_dim: takes the place of `base_dim` in the decoder, where it is another number.
        upscale: how many times larger it decodes, per side, than it encodes: its decoder then gives the pixels of each
            cell of that many squared as channels (Wan2.1-VAE-upscale2x).
        patch: pixels per side that are folded into channels before the encoder, and unfolded after the decoder.
        shortcuts: whether each resolution is a module of its own with a shortcut that has no weights (Wan 2.2).
    """

    base_dim: int = 96
    decoder_dim: int | None = None
    geometry: Geometry = WAN_21
    upscale: int = 1
    patch: int = 1
    shortcuts: bool = False

    @property
    def latent_channels(self) -> int:
        return self.geometry.channels

    def pixel_stride(self, what: Literal["encode", "decode"]) -> int:
        """Pixels per latent cell and side, of what is encoded or of what is decoded."""
        return self.geometry.spatial_stride * (self.upscale if what == "decode" else 1)
