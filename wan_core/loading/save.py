"""Model files converted: any readable checkpoint to one safetensors file, quantised or in a plain dtype.

Tensors go from file to file one at a time, so that a model of any size fits into the memory of its largest tensor.

Quantised files are in `stored_weights.OUTPUT_FORMAT`, which ComfyUI reads, too. ComfyUI 0.3.64 casts linear layers that
are not FP8 in such a file to FP8 by itself; newer versions and WanCore keep them.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..atomic import creating
from ..offload.quant import big_linears
from ..runtime import gigabytes
from .detect import Component, check_against
from .foreign_names import HUGGING_FACE_NAMES, foreign_name
from .load import CLASSES, check_fits, combine, empty_module, spiece_model
from .names import SPIECE_MODEL
from .stored_weights import OUTPUT_FORMAT
from .tensor_files import TensorFiles, file_size, write_made

log = logging.getLogger("wancore")

Progress = Callable[[int, int], None]
"""Called as (bytes written so far, bytes in all)."""

QUANTISED_KINDS = ("dit", "text_encoder")
"""The kinds that ComfyUI reads quantised; others are small."""

SPIECE_FILE = "spiece.model"
"""The SentencePiece model in a tokenizer's folder."""


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written: its name, what it is, and how it is made."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[TensorFiles], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""A function on each weight that is changed on its way into a file, by original name."""

NO_CHANGES: Changes = MappingProxyType({})


def linear_weights(component: Component) -> set[str]:
    """Original names of the weights that quantised files quantise: the linear layers of the blocks.

    Raises:
        CheckpointError: the model is incomplete.
    """
    module = empty_module(component)
    check_against(component, module)
    return {f"{name}.weight" for name in big_linears(module)}


def save_quantised(
    component: Component,
    path: Path,
    on_progress: Progress = lambda done, total: None,
    changes: Changes = NO_CHANGES,
) -> Path:
    """Write a DiT or text encoder with the linear layers of its blocks quantised, in `OUTPUT_FORMAT`, and all else in
    bfloat16; returns `path`.

    Weights that are stored so already keep their numbers; all others, and those in `changes`, are rounded once.

    Raises:
        ValueError: `path` exists, has another ending or does not fit there, or models of that kind are not quantised.
        CheckpointError: the model is incomplete.
    """
    if component.kind not in QUANTISED_KINDS:
        raise ValueError(
            f"{component.name} is not written in {OUTPUT_FORMAT.format.name}: only video models and text encoders are "
            "read that way. Write it with --dtype bf16."
        )
    linears = linear_weights(component)
    mark = torch.zeros(2, dtype=OUTPUT_FORMAT.dtype)
    entries = [_Entry(OUTPUT_FORMAT.mark, (2,), mark.dtype, lambda files: mark), *_extra(component)]
    for name in component.sources:
        make = _quantised_entries if name in linears else partial(_plain_entries, dtype=torch.bfloat16)
        entries += make(component, name, changes.get(name))
    return _write(component, Path(path), entries, on_progress)


def save_plain(
    component: Component,
    path: Path,
    dtype: torch.dtype,
    on_progress: Progress = lambda done, total: None,
    changes: Changes = NO_CHANGES,
) -> Path:
    """Write a model with its weights in `dtype`, quantised ones multiplied by their scales; returns `path`.

    Parameters that work in float32 stay float32 where they are stored so.

    Raises:
        ValueError: `path` exists, has another ending, does not fit on the disk, or `component` is a LoRA.
        CheckpointError: the model is incomplete.
    """
    if not component.sources:
        raise ValueError(f"{component.name} is a LoRA; convert it with `python -m headless lora`.")
    check_fits(component)
    entries = _extra(component)
    for name in component.sources:
        entries += _plain_entries(component, name, changes.get(name), dtype)
    return _write(component, Path(path), entries, on_progress)


Change = Callable[[Tensor], Tensor] | None


def _plain_entries(component: Component, name: str, change: Change, dtype: torch.dtype) -> list[_Entry]:
    source = component.sources[name]
    exact = name.rpartition(".")[2] in getattr(CLASSES.get(component.kind), "FLOAT32_PARAMETERS", ())
    if exact and source.dtype == torch.float32:
        dtype = torch.float32

    def make(files: TensorFiles) -> Tensor:
        weight = combine(source, files)
        return (change(weight) if change else weight).to(dtype)

    return [_Entry(_stored_name(component, name), source.shape, dtype, make)]


def _quantised_entries(component: Component, name: str, change: Change) -> Iterator[_Entry]:
    """A quantised weight and its scale, which are made together when the first of them is written."""
    source = component.sources[name]
    stored = _stored_name(component, name)
    kept = None if change else source.single
    if kept and not OUTPUT_FORMAT.keeps(kept, component.header):
        kept = None
    pair: list[Tensor] = []

    def make(files: TensorFiles, part: int) -> Tensor:
        if not pair and kept:
            scale = files.read(kept.scale).float() * kept.unit if kept.scale else torch.ones(())
            pair.extend((files.read(kept.numbers), scale))
        elif not pair:
            weight = combine(source, files)
            pair.extend(OUTPUT_FORMAT.format.quantise(change(weight) if change else weight, per_row=False))
        tensor, pair[part] = pair[part], torch.empty(0)
        return tensor

    layer, spelling = stored.removesuffix(".weight"), OUTPUT_FORMAT.spelling
    yield _Entry(f"{layer}{spelling.numbers}", source.shape, OUTPUT_FORMAT.dtype, partial(make, part=0))
    yield _Entry(f"{layer}{spelling.scale}", (), torch.float32, partial(make, part=1))


def _extra(component: Component) -> list[_Entry]:
    """The SentencePiece model, which ComfyUI wants in the file of a text encoder."""
    model = spiece_to_write(component)
    if model is None:
        return []
    tensor = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    return [_Entry(SPIECE_MODEL, tuple(tensor.shape), torch.uint8, lambda files: tensor)]


def spiece_to_write(component: Component) -> bytes | None:
    """The SentencePiece model for the file of a text encoder, from its own file or from beside it; None for other
    models, and with a warning where there is none.
    """
    if component.kind != "text_encoder":
        return None
    model = spiece_model(component.header)
    beside = sorted(component.header.files[0].parent.glob(f"google/*/{SPIECE_FILE}"))
    if model is None and not beside:
        log.warning("No %s was found beside %s; ComfyUI cannot read the text encoder without it.", SPIECE_FILE,
                    component.name)  # fmt: skip
        return None
    return model or beside[0].read_bytes()


def _stored_name(component: Component, name: str) -> str:
    return foreign_name(name, HUGGING_FACE_NAMES) if component.kind == "text_encoder" else name


@contextmanager
def new_file(path: Path, suffix: str, size: int) -> Iterator[Path]:
    """A file to write `size` bytes of tensors to, which becomes `path` when the block ends without an error.

    Raises:
        ValueError: the name is taken or does not end in `suffix`, the folder cannot be written, or the file does not
            fit there.
    """
    if path.suffix != suffix:
        raise ValueError(f"This is written as {suffix}; got the name {path.name!r}.")
    with creating(path) as file:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise ValueError(f"{path} takes {gigabytes(size, 2)}, but {path.parent} has {gigabytes(free, 2)} left.")
        yield file


def _write(component: Component, path: Path, entries: list[_Entry], on_progress: Progress) -> Path:
    """Write `entries` to `path`.

    Raises:
        ValueError: as of `new_file`.
    """
    path = path.expanduser()
    layout = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    size = file_size(layout)

    def made(files: TensorFiles) -> Iterator[tuple[str, Tensor]]:
        done = 0
        for entry in entries:
            yield entry.name, entry.make(files).reshape(entry.shape)
            done += entry.nbytes
            on_progress(done, size)

    with new_file(path, ".safetensors", size) as file, TensorFiles(component.header) as files:
        write_made(file, layout, made(files), {"format": "pt"})
    return path
