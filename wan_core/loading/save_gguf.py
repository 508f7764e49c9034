"""Model files converted to GGUF, in the layout that ComfyUI-GGUF reads; see `save` for the other formats.

What is quantised, and which tensors stay in float32, follows ComfyUI-GGUF's `tools/convert.py` and `tools/lcpp.patch`;
tensors of five axes are written with the others. The `gguf` package quantises and writes.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..offload.formats import PACKED
from ..offload.packed import PACKINGS
from .detect import Component
from .foreign_names import LLAMA_CPP_NAMES, foreign_name
from .load import combine
from .names import ModelKind, Source
from .save import NO_CHANGES, Change, Changes, Progress, linear_weights, new_file, spiece_to_write
from .tensor_files import TensorFiles
from .vocabulary import MODEL, Vocabulary

MADE_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""The types that are written, from the largest down; the package has no quantiser for the K types."""

ARCHITECTURES: Mapping[ModelKind, str] = {"dit": "wan", "text_encoder": "t5encoder"}
"""The kinds that are written, and `general.architecture` of each."""

PLAIN_TYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types that are dtypes."""

EXACT_NUMBERS, EXACT_AXES = 1024, 4
"""Tensors of at most so many numbers, or of more axes, stay in float32, as well as vectors and modulations."""


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written: its name and GGUF type in the file, and how its numbers or blocks are made."""

    name: str
    shape: tuple[int, ...]
    type: str
    make: Callable[[TensorFiles], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        if self.type in PLAIN_TYPES:
            return prod(self.shape) * PLAIN_TYPES[self.type].itemsize
        packing = PACKINGS[self.type]
        return prod(self.shape) // packing.numbers * packing.nbytes


def save_gguf(
    component: Component,
    path: Path,
    kind: str,
    on_progress: Progress = lambda done, total: None,
    changes: Changes = NO_CHANGES,
) -> Path:
    """Write a DiT or text encoder with the linear layers of its blocks as the type `kind` of `MADE_TYPES`; returns
    `path`.

    Other matrices are bfloat16 if they are stored so, else float16. Weights that are of that type already keep their
    bytes; all others, and those in `changes`, are rounded once.

    Raises:
        ValueError: `path` exists, has another ending or does not fit there, or models of that kind are not written.
        CheckpointError: the model is incomplete.
    """
    if kind not in MADE_TYPES:
        raise ValueError(f"GGUF files are written as {', '.join(MADE_TYPES)}; got {kind!r}.")
    if component.kind not in ARCHITECTURES:
        raise ValueError(
            f"{component.name} is not written as GGUF: only video models and text encoders are read that way. Write it "
            "with --dtype bf16."
        )
    linears = linear_weights(component)
    entries = [_entry(component, name, kind if name in linears else None, changes) for name in component.sources]
    path = path.expanduser()
    with (
        new_file(path, ".gguf", sum(entry.nbytes for entry in entries)) as partial_file,
        TensorFiles(component.header) as files,
        closing(_begun(partial_file, component, kind, entries)) as writer,
    ):
        done, size = 0, sum(entry.nbytes for entry in entries)
        for entry in entries:
            writer.write_tensor_data(entry.make(files))
            done += entry.nbytes
            on_progress(done, size)
    return path


def _begun(file: Path, component: Component, kind: str, entries: Sequence[_Entry]) -> Any:
    """A `GGUFWriter` that has written all but the tensors."""
    # Imported where it is needed: it takes a fifth of a second.
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(file, ARCHITECTURES[component.kind])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    model = spiece_to_write(component)
    if model is not None:
        _add_vocabulary(writer, Vocabulary.of_sentencepiece(model))
    for entry in entries:
        # The dtype is not used beside a type, unless it is that of bytes.
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(entry.name, entry.shape, dtype, entry.nbytes, GGMLQuantizationType[entry.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """The vocabulary of a text encoder, as llama.cpp and ComfyUI-GGUF want it."""
    writer.add_tokenizer_model(MODEL)
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_add_space_prefix(vocabulary.dummy_prefix)
    writer.add_remove_extra_whitespaces(vocabulary.extra_spaces)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    writer.add_unk_token_id(vocabulary.unknown)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_pad_token_id(vocabulary.padding)


def _entry(component: Component, name: str, kind: str | None, changes: Changes) -> _Entry:
    """One weight as it is written; `kind` is the type of a big one."""
    source, change = component.sources[name], changes.get(name)
    shape = source.shape
    if kind is not None and shape[-1] % PACKINGS[kind].numbers == 0:
        form, kept = kind, None if change else source.single
        is_kept = kept is not None and kept.in_rows and kept.format == PACKED[kind]
        make = partial(_stored, kept.numbers) if kept and is_kept else partial(_quantised, source, change, kind)
    else:
        is_exact = len(shape) < 2 or prod(shape) <= EXACT_NUMBERS or len(shape) > EXACT_AXES or "modulation" in name
        form = "F32" if is_exact else "BF16" if source.dtype == torch.bfloat16 else "F16"
        make = partial(_cast, source, change, PLAIN_TYPES[form])
    stored = foreign_name(name, LLAMA_CPP_NAMES) if component.kind == "text_encoder" else name
    return _Entry(stored, shape, form, make)


def _stored(numbers: str, files: TensorFiles) -> np.ndarray[Any, Any]:
    return files.read(numbers).numpy()


def _changed(source: Source, change: Change, files: TensorFiles) -> Tensor:
    weight = combine(source, files)
    return change(weight) if change else weight


def _quantised(source: Source, change: Change, kind: str, files: TensorFiles) -> np.ndarray[Any, Any]:
    from gguf import GGMLQuantizationType, quants

    weight = _changed(source, change, files).float().numpy()
    return quants.quantize(weight, GGMLQuantizationType[kind])


def _cast(source: Source, change: Change, dtype: torch.dtype, files: TensorFiles) -> np.ndarray[Any, Any]:
    # As bytes, because numpy has no bfloat16.
    return _changed(source, change, files).to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
