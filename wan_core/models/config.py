"""Architecture values of every Wan 2.1 component; each field can be read from tensor names and shapes alone."""

from dataclasses import dataclass

HEAD_DIM = 128
"""Attention head width of every published Wan 2.1 DiT; the head count is not stored in the file, so it follows from
this.
"""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A Wan video transformer. The defaults are the text-to-video model of 1.3 billion parameters.

    `vace_layers` lists the blocks after which a VACE hint is added; it is empty for a model without the branch.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
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
    num_positions: int = 257
    out_dim: int = 1024

    @property
    def num_heads(self) -> int:
        return self.dim // 80


@dataclass(frozen=True, kw_only=True)
class PreviewDecoderConfig:
    """The decoder of the tiny autoencoder: channels of its three stages, and of what follows them."""

    widths: tuple[int, int, int, int] = (256, 128, 64, 64)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The causal video autoencoder; widths are `base_dim` times (1, 2, 4, 4).

    `upscale` is how many times larger it decodes, per side, than it encodes: its decoder then gives the pixels of each
    cell of that many squared as channels (Wan2.1-VAE-upscale2x).
    """

    base_dim: int = 96
    latent_channels: int = 16
    upscale: int = 1
