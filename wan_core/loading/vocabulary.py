"""The vocabulary of UMT5 as GGUF files hold it, and as the SentencePiece model that tokenizers are made of.

A SentencePiece model is a protocol buffer (`sentencepiece_model.proto`), of which only the fields named here are read
and written: the library's own classes for it need a further package.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import errors_from
from .gguf_files import read_values
from .stored import CheckpointError

KEY = "tokenizer.ggml."
"""What the names of a vocabulary's metadata begin with."""

MODEL = "t5"
"""`tokenizer.ggml.model` of a T5 encoder."""

BYTE = 6
"""The type of the pieces that stand for single bytes."""

# Fields of the messages ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK, UNKNOWN, EOS, PADDING = 3, 35, 40, 42, 43
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES = 2, 3, 4

UNIGRAM = 1
VARINT, BYTES, FIXED32 = 0, 2, 5
FIXED = {1: 8, FIXED32: 4}
"""Wire types of numbers, with their bytes."""


def has_vocabulary(metadata: Mapping[str, str]) -> bool:
    """Whether the GGUF file of these `metadata` holds the vocabulary of a T5 encoder."""
    return metadata.get(f"{KEY}model") == MODEL


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of a SentencePiece model of the kind unigram, and how texts are prepared for it.

    Attributes:
        charsmap: the compiled table by which characters are normalised.
        dummy_prefix: whether a text gets a space before it.
        extra_spaces: whether spaces at the ends, and all but one in a row, are removed.
        unknown, eos, padding: ids of special pieces.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    charsmap: bytes = b""
    dummy_prefix: bool = True
    extra_spaces: bool = True
    unknown: int = 2
    eos: int = 1
    padding: int = 0

    @classmethod
    def of_gguf(cls, file: Path) -> "Vocabulary":
        """That of a GGUF file.

        Raises:
            CheckpointError: the file lacks it, or holds something else in its place.
        """
        names = {
            "tokens": (), "scores": (), "token_type": (), "precompiled_charsmap": (), "add_space_prefix": True,
            "remove_extra_whitespaces": True, "unknown_token_id": 2, "eos_token_id": 1, "padding_token_id": 0,
        }  # fmt: skip
        found = read_values(file, [KEY + name for name in names])
        with errors_from(file, "holds a vocabulary that cannot be read", "Download it again.", CheckpointError):
            pieces, scores, types, charsmap, *rest = (found.get(KEY + name, usual) for name, usual in names.items())
            if not len(pieces) == len(scores) == len(types) or not all(isinstance(piece, str) for piece in pieces):
                raise ValueError(f"it has {len(pieces)} pieces, {len(scores)} scores and {len(types)} types")
            return cls(pieces, tuple(map(float, scores)), types, bytes(n & 255 for n in charsmap), *rest)

    @classmethod
    def of_sentencepiece(cls, model: bytes) -> "Vocabulary":
        """That of a serialised SentencePiece model.

        Raises:
            ValueError: the bytes are no such model.
        """
        with errors_from("The SentencePiece model", "cannot be read"):
            found = list(_fields(model))
            pieces = [dict(_fields(value)) for field, value in found if field == PIECES]
            trainer, normalizer = (
                dict(pair for field, value in found if field == part for pair in _fields(value))
                for part in (TRAINER, NORMALIZER)
            )
            return cls(
                tuple(piece[PIECE].decode() for piece in pieces),
                tuple(struct.unpack("<f", piece.get(SCORE, bytes(4)))[0] for piece in pieces),
                tuple(piece.get(TYPE, 1) for piece in pieces),
                normalizer.get(CHARSMAP, b""),
                bool(normalizer.get(DUMMY_PREFIX, 1)),
                bool(normalizer.get(EXTRA_SPACES, 1)),
                trainer.get(UNKNOWN, 0),
                trainer.get(EOS, 2),
                trainer.get(PADDING, 0),
            )

    def sentencepiece(self) -> bytes:
        """The serialised SentencePiece model."""
        trainer = {
            MODEL_TYPE: UNIGRAM, BYTE_FALLBACK: int(BYTE in self.types), UNKNOWN: self.unknown, EOS: self.eos,
            PADDING: self.padding,
        }  # fmt: skip
        normalizer: dict[int, Any] = {
            CHARSMAP: self.charsmap, DUMMY_PREFIX: int(self.dummy_prefix), EXTRA_SPACES: int(self.extra_spaces),
        }  # fmt: skip
        pieces = zip(self.pieces, self.scores, self.types, strict=True)
        return b"".join([
            *(_message({PIECES: _message({PIECE: p.encode(), SCORE: s, TYPE: t})}) for p, s, t in pieces),
            _message({TRAINER: _message(trainer), NORMALIZER: _message(normalizer)}),
        ])  # fmt: skip


def _message(fields: dict[int, Any]) -> bytes:
    """A message of integers, floats and bytes by field."""
    parts = []
    for field, value in fields.items():
        if isinstance(value, bytes):
            parts += [_varint(field << 3 | BYTES), _varint(len(value)), value]
        elif isinstance(value, float):
            parts += [_varint(field << 3 | FIXED32), struct.pack("<f", value)]
        else:
            parts += [_varint(field << 3 | VARINT), _varint(value)]
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """`number` in groups of seven bits, the lowest first; a negative one as of 64 bits."""
    number &= 2**64 - 1
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: integers as such, all others as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = message[at]
            number |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128 or shift > 63:
                return number

    while at < len(message):
        tag = varint()
        kind = tag & 7
        if kind == VARINT:
            yield tag >> 3, varint()
            continue
        if kind not in (BYTES, *FIXED):
            raise ValueError(f"a field has the wire type {kind}")
        size = FIXED[kind] if kind in FIXED else varint()
        if at + size > len(message):
            raise ValueError("it ends within a field")
        yield tag >> 3, message[at : at + size]
        at += size
