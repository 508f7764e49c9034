"""The VACE branch: blocks beside the base model whose outputs are added to it as hints."""

from torch import Tensor

from .block import Context, WanBlock
from .linear import Linear


class VaceBlock(WanBlock):
    """A base block between two projections. Only the first block of the branch sees the base model's tokens."""

    def __init__(self, dim: int, ffn_dim: int, is_first: bool) -> None:
        super().__init__(dim, ffn_dim)
        self.before_proj = Linear(dim, dim) if is_first else None
        self.after_proj = Linear(dim, dim)

    def forward(  # type: ignore[override]  # the published keys make it a block with two layers more, not a call alike
        self, hidden: Tensor, tokens: Tensor, modulation: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """`hidden` and `tokens` (B, S, D) to the next hidden state and the hint, both (B, S, D).

        The first block leaves `hidden` as it is; the others overwrite it when gradients are off.
        """
        if self.before_proj is not None:
            hidden = self.before_proj(hidden) + tokens
        hidden = super().forward(hidden, modulation, context)
        return hidden, self.after_proj(hidden)
