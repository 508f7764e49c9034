"""The transformer block of the Wan DiT, and the VACE block, whose output is a hint for the base model.

B batch, S video tokens, D = heads x 128 model width, L text tokens, N image tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import AttentionFn
from .config import HEAD_DIM
from .fused import EAGER, FusedSteps
from .ops import Linear, add_, gelu_tanh_, layer_norm, may_overwrite, rms_norm_
from .rope import RotaryTable

EPS = 1e-6
FEED_FORWARD_TOKENS = 8192
"""Tokens per pass through the feed-forward layers. Their hidden tensor, 13824 wide where the 14B models are 5120, would
be the largest of the run.
"""


@dataclass(frozen=True)
class Context:
    """The inputs of every block of one branch that stay the same over the steps of a run.

    `text` (B, L, D) and `image` (B, N, D) are projected to the model width; `rope` rotates the video tokens. `kept`
    holds the keys and values of each cross-attention, filled by the first step for the others; None keeps nothing.
    """

    text: Tensor
    image: Tensor | None
    rope: RotaryTable
    attend: AttentionFn
    fused: FusedSteps = EAGER
    kept: dict[nn.Module, tuple[Tensor, ...]] | None = None


class SelfAttention(nn.Module):
    """Attention among all tokens of the video, with rotary positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        norm_rotate = context.fused.norm_rotate
        # The RMS norm is over all heads together, before they are split: (B, S, D) to (B, S, heads, 128).
        q = norm_rotate(self.q(x), self.norm_q.weight, EPS, context.rope, HEAD_DIM)
        k = norm_rotate(self.k(x), self.norm_k.weight, EPS, context.rope, HEAD_DIM)
        return self.o(context.attend(q, k, _heads(self.v(x))).flatten(2))


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
        k, v, *image = self._projected(context)
        out = context.attend(q, k, v)
        if image:
            # Two softmaxes that are added, not one over the text and image tokens together.
            out = add_(out, context.attend(q, *image))
        return self.o(out.flatten(2))

    def _projected(self, context: Context) -> tuple[Tensor, ...]:
        """Keys and values (B, L, heads, 128) of the text, and those of the image if there is one."""
        if context.kept is not None and self in context.kept:
            return context.kept[self]
        projected = [rms_norm_(self.k(context.text), self.norm_k.weight, EPS), self.v(context.text)]
        if context.image is not None:
            projected += [rms_norm_(self.k_img(context.image), self.norm_k_img.weight, EPS), self.v_img(context.image)]
        found = tuple(map(_heads, projected))
        if context.kept is not None:
            context.kept[self] = found
        return found


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
        """`modulation` (B, 6, D), float32: shift, scale and gate of the attention, then of the feed-forward."""
        dtype, fused = context.text.dtype, context.fused
        # (B, 1, D) each, in float32: bfloat16 would round 1 + scale to eight bits.
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.float() + modulation).chunk(6, 1)
        update = self.self_attn(fused.norm_modulate(x, shift, 1 + scale, EPS, dtype), context)
        x = fused.gated_add(x, update, gate)
        del update  # its memory is for cross-attention
        # Cross-attention has no modulation and no gate; its norm, `norm3`, is the one with weights.
        x = add_(x, self.cross_attn(layer_norm(x, EPS, dtype, self.norm3.weight, self.norm3.bias), context))
        update = self._feed_forward(fused.norm_modulate(x, ffn_shift, 1 + ffn_scale, EPS, dtype))
        return fused.gated_add(x, update, ffn_gate)

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
