"""The UMT5 tokenizer, from a folder of the Hugging Face kind or from a SentencePiece model."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..reading import blamed_on

PAD_ID, EOS_ID = 0, 1
"""Fixed by the T5 vocabularies."""


class Tokenizer:
    """Texts to token ids that end with `</s>`.

    Build one with `from_folder` or `from_sentencepiece`.
    """

    def __init__(self, encode: Callable[[str], list[int]], vocab_size: int) -> None:
        self._encode = encode
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L), padded to the longest text; longer ones are cut to `max_length` including `</s>`."""
        rows = [[*self._encode(text)[: max_length - 1], EOS_ID] for text in texts]
        length = max(len(row) for row in rows)
        ids = torch.full((len(rows), length), PAD_ID)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json`, or else `spiece.model`, of a folder such as `google/umt5-xxl`.

        Raises:
            ValueError: the folder does not exist or holds neither file.
        """
        folder = Path(folder)
        fast, slow = folder / "tokenizer.json", folder / "spiece.model"
        if fast.is_file():
            from tokenizers import Tokenizer as FastTokenizer

            with blamed_on(fast, "is not a tokenizer file", "Download it again."):
                tokenizer = FastTokenizer.from_file(str(fast))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return cls(lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.get_vocab_size())
        if slow.is_file():
            return cls.from_sentencepiece(slow.read_bytes())
        found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "the folder does not exist"
        raise ValueError(
            f"No tokenizer in {folder}: tokenizer.json or spiece.model expected, found {found or 'nothing'}. "
            "Use the folder google/umt5-xxl of Wan-AI/Wan2.1-T2V-1.3B."
        )

    @classmethod
    def from_sentencepiece(cls, model: bytes) -> "Tokenizer":
        """Read a serialised SentencePiece model, as ComfyUI's text encoder files carry it in `spiece_model`.

        Raises:
            ValueError: the bytes are not such a model.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            processor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"The SentencePiece model cannot be read ({len(model)} bytes): {error}") from error
        return cls(processor.encode, processor.get_piece_size())
