"""Prompts to text conditioning."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ftfy import fix_text
from torch import Tensor

from ..checkpoints.tokenizer import Tokenizer
from ..models.text_encoder import UMT5Encoder
from ..types import Conditioning

TEXT_TOKENS = 512
"""Rows of a text embedding. The DiT attends to all of them, also to the zero rows after the text: it was trained that
way.
"""

Prompt = str | Sequence[str]


def clean_prompt(prompt: str) -> str:
    """`prompt` as Wan's tokenizer prepares it: repaired, HTML entities resolved twice, white space as single spaces.

    The repair is part of what the models were trained on: it also turns full-width punctuation, which the authors' own
    negative prompt is full of, into ASCII (Wan-Video/Wan2.1 wan/modules/tokenizers.py, ftfy's defaults).
    """
    return " ".join(html.unescape(html.unescape(fix_text(prompt))).split())


@dataclass(frozen=True)
class TextEncoder:
    """A UMT5 encoder with its tokenizer."""

    model: UMT5Encoder
    tokenizer: Tokenizer

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, 512, text_dim), zero after each prompt's last token.

        All prompts pass through the weights together, at the length of the longest one: what lies after a text does not
        reach its rows.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("The prompt list is empty; give at least one prompt (it may be the empty string).")
        ids, mask = self.tokenizer([clean_prompt(p) for p in prompts], TEXT_TOKENS)
        embeddings = self.model(ids, mask)
        return F.pad(embeddings, (0, 0, 0, TEXT_TOKENS - embeddings.shape[1]))


def as_prompts(prompt: Prompt, name: str = "prompt") -> list[str]:
    """`prompt` as a list of at least one string.

    Raises:
        ValueError: it is empty or not made of strings.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name} must be a string or a list of at least one string; got {prompt!r}.")
    return prompts


def text_conditioning(encoder: TextEncoder, prompt: Prompt, negative_prompt: Prompt = "") -> Conditioning:
    """Conditioning with the text of both branches; one negative prompt serves a whole batch of prompts.

    Raises:
        ValueError: no prompt, or as many negative prompts as neither one nor the prompts.
    """
    positive, negative = as_prompts(prompt), as_prompts(negative_prompt, "negative_prompt")
    if len(negative) == 1:
        negative *= len(positive)
    if len(negative) != len(positive):
        raise ValueError(f"{len(positive)} prompts need 1 or {len(positive)} negative prompts; got {len(negative)}.")
    text, negative_text = encoder.encode([*positive, *negative]).chunk(2)
    return Conditioning(text=text, negative_text=negative_text)
