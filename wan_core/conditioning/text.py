"""Prompts to text conditioning."""

import html
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from ftfy import fix_text
from torch import Tensor, nn

from ..checkpoints.tokenizer import Tokenizer
from ..models.text_encoder import UMT5Encoder
from ..types import Conditioning
from .text_cache import TextCache

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


Ready = Callable[[], AbstractContextManager[object]]
"""Makes an encoder ready for the length of a block, such as by bringing its weights to a device."""


@dataclass(frozen=True)
class TextEncoder:
    """A UMT5 encoder with its tokenizer, and the prompts that it encoded before if it has a cache."""

    model: UMT5Encoder
    tokenizer: Tokenizer
    cache: TextCache | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.model.norm.weight.dtype

    def kept_in(self, directory: str | Path | None) -> "TextEncoder":
        """The same encoder, which also keeps embeddings in files below `directory`; None leaves it as it is.

        Raises:
            ValueError: it has no cache, because it is not known which weights it holds.
        """
        if directory is None:
            return self
        if self.cache is None:
            raise ValueError("This text encoder was not loaded from files, so what it encodes cannot be kept in files.")
        return replace(self, cache=self.cache.and_on_disk(directory))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of `prompts` that the model must encode; the weights are neither used nor moved to find out."""
        return [prompt for prompt, ids in self._ids(prompts).items() if self._cached(ids) is None]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], ready: Ready = nullcontext) -> Tensor:
        """Embeddings (B, 512, text_dim) on the CPU, zero after each prompt's last token.

        All prompts that are not in the cache pass through the weights together, inside of `ready()`; when there is none
        it is not entered. An embedding is the same bits whether it was cached or not, and whatever it was encoded with.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("The prompt list is empty; give at least one prompt (it may be the empty string).")
        tokens = self._ids(prompts)
        rows = {prompt: found for prompt, ids in tokens.items() if (found := self._cached(ids)) is not None}
        missing = [prompt for prompt in tokens if prompt not in rows]
        if missing:
            with ready():
                rows |= {p: row.cpu() for p, row in zip(missing, self._run([tokens[p] for p in missing]), strict=True)}
            if cache := self.cache:
                for prompt in missing:
                    cache.put(cache.key(tokens[prompt], self.dtype), rows[prompt])
        return torch.stack([F.pad(rows[p], (0, 0, 0, TEXT_TOKENS - len(rows[p]))) for p in prompts])

    def _ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        unique = list(dict.fromkeys(prompts))
        ids, mask = self.tokenizer([clean_prompt(p) for p in unique], TEXT_TOKENS)
        return {prompt: row[real] for prompt, row, real in zip(unique, ids, mask, strict=True)}

    def _cached(self, ids: Tensor) -> Tensor | None:
        if self.cache is None:
            return None
        return self.cache.get(self.cache.key(ids, self.dtype), (len(ids), self.model.config.dim), self.dtype)

    def _run(self, texts: list[Tensor]) -> list[Tensor]:
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
        return [out[: len(text)] for out, text in zip(self.model(ids, mask), texts, strict=True)]


def as_prompts(prompt: Prompt, name: str = "prompt") -> list[str]:
    """`prompt` as a list of at least one string.

    Raises:
        ValueError: it is empty or not made of strings.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name} must be a string or a list of at least one string; got {prompt!r}.")
    return prompts


def text_conditioning(
    encoder: TextEncoder, prompt: Prompt, negative_prompt: Prompt = "", ready: Ready = nullcontext
) -> Conditioning:
    """Conditioning with the text of both branches, on the CPU; one negative prompt serves a whole batch of prompts.

    Args:
        ready: makes the encoder ready; entered only when a prompt is not in its cache.

    Raises:
        ValueError: no prompt, or as many negative prompts as neither one nor the prompts.
    """
    positive, negative = as_prompts(prompt), as_prompts(negative_prompt, "negative_prompt")
    if len(negative) == 1:
        negative *= len(positive)
    if len(negative) != len(positive):
        raise ValueError(f"{len(positive)} prompts need 1 or {len(positive)} negative prompts; got {len(negative)}.")
    text, negative_text = encoder.encode([*positive, *negative], ready).chunk(2)
    return Conditioning(text=text, negative_text=negative_text)
