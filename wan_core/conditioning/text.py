"""Prompts to conditioning: the UMT5 tokenizer, the encoder, and a cache of encoded prompts."""

import hashlib
import html
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..atomic import replacing, try_lock
from ..files import errors_from
from ..loading.tensor_files import CheckpointError, file_kind, read_whole, write_safetensors
from ..models.config import TEXT_TOKENS
from ..models.text_encoder import UMT5Encoder
from ..runtime import log
from ..types import Conditioning

PAD_ID, EOS_ID = 0, 1
"""Fixed by the T5 vocabularies."""


class Tokenizer:
    """Texts to token ids that end with `</s>`. `from_folder` and `from_sentencepiece` build one."""

    def __init__(self, encode: Callable[[str], list[int]], vocab_size: int) -> None:
        self._encode = encode
        self.vocab_size = vocab_size

    def __call__(self, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L), padded to the longest text; longer ones are cut to `max_length` including `</s>`."""
        rows = [self.ids(text, max_length) for text in texts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD_ID)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids, mask

    def ids(self, text: str, max_length: int) -> Tensor:
        """The ids (L,) of one text, cut to `max_length` including `</s>`."""
        return torch.tensor([*self._encode(text)[: max_length - 1], EOS_ID])

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

            with errors_from(fast, "is not a tokenizer file", "Download it again."):
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


MEMORY_BYTES = 64 * 2**20
"""A hundred prompts of eighty tokens of UMT5-XXL in bfloat16."""

SAMPLES, SAMPLE_BYTES = 256, 64 * 1024
"""How much of a file's weights a fingerprint reads: 16 MiB, a fraction of a second."""

DIRECTORY_BYTES = 2**20
"""How much of the end of a PyTorch checkpoint a fingerprint reads: the archive's directory, with checksums of all
tensors.
"""

NAME, LOCK = "embedding", ".lock"

LOOK_SECONDS = 0.05
"""Pause between two looks at whether another process has finished encoding."""


class Store(Protocol):
    """Embeddings (tokens, dim) by key."""

    def get(self, key: str) -> Tensor | None: ...

    def put(self, key: str, rows: Tensor) -> None: ...


class MemoryStore:
    """The most recently used embeddings, up to `max_bytes`."""

    def __init__(self, max_bytes: int = MEMORY_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, rows: Tensor) -> None:
        if key in self._kept or rows.nbytes > self.max_bytes:
            return
        self._kept[key] = rows
        self._bytes += rows.nbytes
        while self._bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


@dataclass(frozen=True)
class DiskStore:
    """One safetensors file per prompt in `directory`, which is created when needed. A file that cannot be read counts
    as missing; for a folder that cannot be written to there is a warning.
    """

    directory: Path

    def get(self, key: str) -> Tensor | None:
        try:
            return read_whole(self._file(key))[0].get(NAME)
        except CheckpointError:
            return None

    def put(self, key: str, rows: Tensor) -> None:
        try:
            with replacing(self._file(key)) as partial:
                write_safetensors(partial, {NAME: rows})
        except OSError as error:
            _warn(self.directory, error.strerror or str(error))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process encodes prompts for this folder, where its file system has locks."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = (self.directory / LOCK).open("ab")
        except OSError:
            yield  # `put` warns of it
            return
        with lock:
            while try_lock(lock) is False:
                time.sleep(LOOK_SECONDS)
            yield

    def _file(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


@cache
def _warn(directory: Path, problem: str) -> None:
    """Log a warning once per folder and problem."""
    log.warning("Encoded prompts cannot be kept in %s: %s", directory, problem)


@dataclass(frozen=True)
class TextCache:
    """The embeddings of one encoder's prompts.

    Attributes:
        fingerprint: of the encoder, see `fingerprint`.
        stores: searched in this order; new embeddings go into all of them.
    """

    fingerprint: str
    stores: tuple[Store, ...]

    @classmethod
    def in_memory(cls, fingerprint: str, max_bytes: int = MEMORY_BYTES) -> "TextCache":
        return cls(fingerprint, (MemoryStore(max_bytes),))

    def and_on_disk(self, directory: str | Path) -> "TextCache":
        """A cache that shares this one's memory and also keeps embeddings in `directory`."""
        return replace(self, stores=(*self.stores, DiskStore(Path(directory))))

    def key(self, ids: Tensor, dtype: torch.dtype) -> str:
        """The key of a prompt's embedding: a digest of the encoder's fingerprint, its dtype and the prompt's token ids.
        The ids depend on the cleaned text and the tokenizer, which therefore need no part of their own.
        """
        content = f"{self.fingerprint} {dtype} {ids.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def get(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The embedding under `key`; None when there is none, or one of another shape or dtype."""
        for index, store in enumerate(self.stores):
            rows = store.get(key)
            if rows is not None and rows.shape == shape and rows.dtype == dtype:
                for earlier in self.stores[:index]:
                    earlier.put(key, rows)
                return rows
        return None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process encodes prompts for the same folders."""
        with ExitStack() as held:
            for store in self.stores:
                if isinstance(store, DiskStore):
                    held.enter_context(store.alone())
            yield

    def put(self, key: str, rows: Tensor) -> None:
        """Add the embedding (tokens, dim) of a prompt to all stores."""
        kept = rows.detach().cpu().clone()
        for store in self.stores:
            store.put(key, kept)


def fingerprint(files: Sequence[Path], *details: str) -> str:
    """Identifies the weights in `files` without reading all of them: a digest of their headers, their sizes, a sample
    of their bytes, and of `details` on how they are used.

    A file is read again only when its size or modification time changes. Two safetensors files that differ in a few
    weights only may have the same fingerprint.
    """
    digest = hashlib.sha256("\n".join(details).encode())
    for file in files:
        state = file.stat()
        digest.update(_file_digest(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_digest(file: Path, size: int, changed: int) -> bytes:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if file_kind(file) == "safetensors":
            length = stream.read(8)
            digest.update(length + stream.read(int.from_bytes(length, "little")))
        else:
            stream.seek(max(0, size - DIRECTORY_BYTES))
            digest.update(stream.read())
        last = max(0, size - SAMPLE_BYTES)
        for index in range(SAMPLES):
            stream.seek(last * index // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()


Prompt = str | Sequence[str]


def clean_prompt(prompt: str) -> str:
    """`prompt` as Wan's tokenizer prepares it: fixed by ftfy, HTML entities resolved twice, white space as single
    spaces.

    The models were trained on such text. ftfy's defaults also turn full-width punctuation, of which the authors'
    negative prompt is full, into ASCII (Wan-Video/Wan2.1 wan/modules/tokenizers.py).
    """
    # Its tables would take a twentieth of the time in which the pack is imported.
    from ftfy import fix_text

    return " ".join(html.unescape(html.unescape(fix_text(prompt))).split())


Ready = Callable[[], AbstractContextManager[object]]
"""A context in which an encoder can run, such as one that moves its weights to a device."""


@dataclass(frozen=True)
class TextEncoder:
    """A UMT5 encoder with its tokenizer, and optionally a cache of encoded prompts."""

    model: UMT5Encoder
    tokenizer: Tokenizer
    cache: TextCache | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.model.norm.weight.dtype

    def kept_in(self, directory: str | Path | None) -> "TextEncoder":
        """The same encoder, which also stores embeddings in files below `directory`; with None it is unchanged.

        Raises:
            ValueError: it has no cache, because its weights are not known.
        """
        if directory is None:
            return self
        if self.cache is None:
            raise ValueError("Only a text encoder that was loaded from files can keep its embeddings in files.")
        return replace(self, cache=self.cache.and_on_disk(directory))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those of `prompts` that are not in the cache; the weights are neither used nor moved."""
        return [prompt for prompt, ids in self._ids(prompts).items() if self._cached(ids) is None]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], ready: Ready = nullcontext) -> Tensor:
        """Embeddings (B, 512, text_dim) on the CPU, zero after each prompt's last token.

        All prompts that are not in the cache are encoded together inside of `ready()`, which is entered only if there
        are any. An embedding is the same bits whether it was cached or not, and whatever it was encoded with.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("The prompt list is empty; give at least one prompt (it may be the empty string).")
        tokens = self._ids(prompts)
        rows = {prompt: found for prompt, ids in tokens.items() if (found := self._cached(ids)) is not None}
        if len(rows) < len(tokens):
            with self.cache.alone() if self.cache else nullcontext():
                # Another process may have encoded some meanwhile.
                rows |= {
                    p: found for p, ids in tokens.items() if p not in rows and (found := self._cached(ids)) is not None
                }
                if missing := [prompt for prompt in tokens if prompt not in rows]:
                    rows |= self._encoded({prompt: tokens[prompt] for prompt in missing}, ready)
        return torch.stack([F.pad(rows[p], (0, 0, 0, TEXT_TOKENS - len(rows[p]))) for p in prompts])

    def _encoded(self, tokens: Mapping[str, Tensor], ready: Ready) -> dict[str, Tensor]:
        """The embeddings (tokens, text_dim) of prompts by the model, which go into the cache."""
        with ready():
            rows = dict(zip(tokens, (row.cpu() for row in self.model.encode(list(tokens.values()))), strict=True))
        if self.cache is not None:
            for prompt, ids in tokens.items():
                self.cache.put(self.cache.key(ids, self.dtype), rows[prompt])
        return rows

    def _ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {prompt: self.tokenizer.ids(clean_prompt(prompt), TEXT_TOKENS) for prompt in dict.fromkeys(prompts)}

    def _cached(self, ids: Tensor) -> Tensor | None:
        if self.cache is None:
            return None
        return self.cache.get(self.cache.key(ids, self.dtype), (len(ids), self.model.config.dim), self.dtype)


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
        ready: the context in which the encoder runs; entered only when a prompt is not in its cache.

    Raises:
        ValueError: there is no prompt, or the negative prompts are neither one nor as many as the prompts.
    """
    positive, negative = as_prompts(prompt), as_prompts(negative_prompt, "negative_prompt")
    if len(negative) == 1:
        negative *= len(positive)
    if len(negative) != len(positive):
        raise ValueError(f"{len(positive)} prompts need 1 or {len(positive)} negative prompts; got {len(negative)}.")
    text, negative_text = encoder.encode([*positive, *negative], ready).chunk(2)
    return Conditioning(text=text, negative_text=negative_text)
