"""The layers of the Wan DiT: embedders of its inputs, the transformer block, and the VACE block, whose output is a hint
for the base model.

B batch, S video tokens, D = heads x 128 model width, L text tokens, N image tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..parallel.mesh import Part
from ..settings import NagSettings
from .attention import AttentionFn, RotaryTable
from .config import HEAD_DIM, MotionControllerConfig
from .fused import EAGER, FusedSteps, TokenRows
from .ops import Linear, add_, gelu_tanh_, layer_norm, may_overwrite, rms_norm_


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Cosines then sines of `position` (...), (..., width) in float32.

    Angles are computed in float64 where the device has it, as in Wan-Video/Wan2.1 `sinusoidal_embedding_1d`; bfloat16
    would round timestep 937.5 to 936.
    """
    precise = torch.float32 if position.device.type == "mps" else torch.float64
    half = torch.arange(width // 2, dtype=precise, device=position.device)
    angle = position.to(precise)[..., None] * torch.exp(half * (-math.log(10000.0) / (width // 2)))
    return torch.cat((angle.cos(), angle.sin()), -1).float()


class ImageTokens(nn.Module):
    """CLIP image tokens (B, N, image_dim) projected to the model width, (B, N, D)."""

    def __init__(self, image_dim: int, dim: int, positions: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            Linear(image_dim, image_dim),
            nn.GELU(),
            Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.proj.get_parameter("1.weight").dtype)
        return self.proj(tokens if self.emb_pos is None else tokens + self.emb_pos)


class CameraResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + x


class CameraAdapter(nn.Module):
    """Folded rays (B, 24, F, H, W) to tokens (B, S, D) that are added to the patch embedding. Rays come at pixel
    resolution; a latent cell covers `stride` x `stride` of them.

    The structure is that of VideoX-Fun's `SimpleAdapter`.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int], stride: int, num_blocks: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride**2, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(CameraResidualBlock(dim) for _ in range(num_blocks)))

    def forward(self, rays: Tensor) -> Tensor:
        batch = rays.shape[0]
        # Every frame by itself: 24 channels, and with each cell's 8 x 8 pixels as channels 1536 of them.
        rays = rearrange(rays, "b c f h w -> (b f) c h w").to(self.conv.weight.dtype)
        features = self.residual_blocks(self.conv(F.pixel_unshuffle(rays, self.stride)))
        return rearrange(features, "(b f) d h w -> b (f h w) d", b=batch)


BUCKET_SCALE = 10.0
"""The bucket 0..100 is scaled to the range of a timestep, 0..1000, for the sinusoid (DiffSynth-Studio
`wan_video_motion_controller`).
"""


class MotionController(nn.Module):
    """Motion buckets (B,) to offsets (B, 6, D), added to the modulation of every block."""

    def __init__(self, config: MotionControllerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.linear = nn.Sequential(
            Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim), nn.SiLU(), Linear(dim, 6 * dim)
        )

    def forward(self, motion_bucket: Tensor) -> Tensor:
        weight = self.linear.get_parameter("0.weight")
        embedding = sinusoid(motion_bucket.to(weight.device, torch.float32) * BUCKET_SCALE, self.config.freq_dim)
        return self.linear(embedding.to(weight.dtype)).unflatten(1, (6, self.config.dim)).float()


EPS = 1e-6
FEED_FORWARD_TOKENS = 8192
"""Tokens per pass through the feed-forward layers. Their hidden tensor, 13824 wide where the 14B models are 5120, would
be the largest of the run. Also per pass of attention guidance, which computes in float32.
"""


@dataclass(frozen=True)
class Context:
    """The inputs of every block of one branch that stay the same over the steps of a run.

    `text` (B, L, D) and `image` (B, N, D) are projected to the model width; `rope` rotates the video tokens. `kept`
    holds the keys and values of each cross-attention, of the text and of the negative text, filled by the first step
    for the others; None keeps nothing. `rows` says which of several timesteps each token has; None where there is one.
    With attention guidance, `negative` (at most B, L, D) leads the first videos of the batch away, as `nag` says.
    With a `part`, the tokens, `rope` and `rows` are those of this rank.
    """

    text: Tensor
    image: Tensor | None
    rope: RotaryTable
    attend: AttentionFn
    fused: FusedSteps = EAGER
    kept: dict[tuple[nn.Module, str], tuple[Tensor, ...]] | None = None
    rows: TokenRows | None = None
    negative: Tensor | None = None
    nag: NagSettings = NagSettings()
    part: Part | None = None


class SelfAttention(nn.Module):
    """Attention among all tokens of the video, with rotary positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        norm_rotate = context.fused.norm_rotate
        # The RMS norm is over all heads together, before they are split: (B, S, D) to (B, S, heads, 128).
        def turned(layer: nn.Module, norm: nn.Module) -> Tensor:
            return norm_rotate(layer(x), norm.weight, EPS, context.rope, HEAD_DIM)

        # None of them has a name here, so that each is gone as soon as it has been used: they are as large as `x`.
        if context.part is not None:
            out = context.part.attention(
                context.attend, turned(self.q, self.norm_q), turned(self.k, self.norm_k), _heads(self.v(x))
            )
        else:
            out = context.attend(turned(self.q, self.norm_q), turned(self.k, self.norm_k), _heads(self.v(x)))
        return self.o(out.flatten(2))


class CrossAttention(nn.Module):
    """Attention to the text and, with an image branch, to image tokens through keys and values of their own."""

    def __init__(self, dim: int, has_image_input: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)
        if has_image_input:
            self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
            self.norm_k_img = nn.RMSNorm(dim, EPS)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = _heads(rms_norm_(self.q(x), self.norm_q.weight, EPS))
        k, v, *image = self._projected("text", context)
        out = context.attend(q, k, v)
        if context.negative is not None:
            led = q[: len(context.negative)]
            away = context.attend(led, *self._projected("negative", context))
            guided = attention_guidance(out[: len(led)].flatten(2), away.flatten(2), context.nag).view_as(led)
            out = guided if len(led) == len(out) else torch.cat((guided, out[len(led) :]))
        if image:
            # Two softmaxes that are added, not one over the text and image tokens together.
            out = add_(out, context.attend(q, *image))
        return self.o(out.flatten(2))

    def _projected(self, which: str, context: Context) -> tuple[Tensor, ...]:
        """Keys and values (B, L, heads, 128) of the text, and those of the image if there is one; or of the negative
        text.
        """
        if context.kept is not None and (self, which) in context.kept:
            return context.kept[self, which]
        text = context.text if which == "text" else context.negative
        assert text is not None, "asked for where it is"
        projected = [rms_norm_(self.k(text), self.norm_k.weight, EPS), self.v(text)]
        if context.image is not None and which == "text":
            projected += [rms_norm_(self.k_img(context.image), self.norm_k_img.weight, EPS), self.v_img(context.image)]
        found = tuple(map(_heads, projected))
        if context.kept is not None:
            context.kept[self, which] = found
        return found


def attention_guidance(positive: Tensor, negative: Tensor, settings: NagSettings) -> Tensor:
    """The attention to a text (B, S, D), led away from that to the negative text (NAG; Chen et al. 2025,
    ChenDarYen/ComfyUI-NAG `utils.nag`). Computed in float32, a few tokens at a time.
    """
    out = torch.empty_like(positive)
    pieces = (tensor.split(FEED_FORWARD_TOKENS, 1) for tensor in (positive, negative, out))
    for plain, away, place in zip(*pieces, strict=True):
        plain, guided = plain.float(), torch.lerp(away.float(), plain.float(), settings.scale)
        before, after = (x.abs().sum(-1, keepdim=True).clamp_min(1e-6) for x in (plain, guided))
        guided.mul_((settings.tau * before / after).clamp_max(1))
        place.copy_(torch.lerp(plain, guided, settings.alpha))
    return out


class WanBlock(nn.Module):
    """x (B, S, D) to x (B, S, D), overwriting it when gradients are off."""

    def __init__(self, dim: int, ffn_dim: int, has_image_input: bool = False) -> None:
        super().__init__()
        self.self_attn = SelfAttention(dim)
        self.norm3 = nn.LayerNorm(dim, EPS)
        self.cross_attn = CrossAttention(dim, has_image_input)
        self.ffn = nn.Sequential(Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, modulation: Tensor, context: Context) -> Tensor:
        """`modulation` (B, U, 6, D), float32, for each of U timesteps: shift, scale and gate of the attention, then of
        the feed-forward.
        """
        dtype, fused, rows = context.text.dtype, context.fused, context.rows
        # (B, U, D) each, in float32: bfloat16 would round 1 + scale to eight bits.
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + modulation).unbind(2)
        update = self.self_attn(fused.norm_modulate(x, shift, 1 + scale, EPS, dtype, rows), context)
        x = fused.gated_add(x, update, gate, rows)
        del update  # its memory is for cross-attention
        # Cross-attention has no modulation and no gate; its norm, `norm3`, is the one with weights.
        x = add_(x, self.cross_attn(layer_norm(x, EPS, dtype, self.norm3.weight, self.norm3.bias), context))
        update = self._feed_forward(fused.norm_modulate(x, ffn_shift, 1 + ffn_scale, EPS, dtype, rows))
        return fused.gated_add(x, update, ffn_gate, rows)

    def _feed_forward(self, x: Tensor) -> Tensor:
        expand, _, contract = self.ffn
        # `self.ffn` itself would hold the hidden tensor of all tokens, and a second one for GELU.
        if not may_overwrite(x, *expand.parameters()) or x.shape[1] <= FEED_FORWARD_TOKENS:
            return contract(gelu_tanh_(expand(x)))
        for piece in x.split(FEED_FORWARD_TOKENS, 1):
            piece.copy_(contract(gelu_tanh_(expand(piece))))
        return x


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, HEAD_DIM))


class VaceBlock(WanBlock):
    """A base block between two projections. Only the first block of the branch reads the base model's tokens."""

    def __init__(self, dim: int, ffn_dim: int, is_first: bool) -> None:
        super().__init__(dim, ffn_dim)
        self.before_proj = Linear(dim, dim) if is_first else None
        self.after_proj = Linear(dim, dim)

    def forward(  # type: ignore[override]  # a WanBlock by its published keys; it is called in another way
        self, hidden: Tensor, tokens: Tensor, modulation: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """`hidden` and `tokens` (B, S, D) to the next hidden state and the hint, both (B, S, D).

        The first block leaves `hidden` as it is; the others overwrite it when gradients are off.
        """
        if self.before_proj is not None:
            hidden = self.before_proj(hidden) + tokens
        hidden = super().forward(hidden, modulation, context)
        return hidden, self.after_proj(hidden)
