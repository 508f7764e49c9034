"""New LoRA files: converted, merged, extracted. An existing file is never changed."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..atomic import creating_first, partial_path, replacing
from ..checks import check_choice, check_whole
from ..files import errors_from
from ..loading.detect import detect_files, require_kind
from ..loading.foreign_names import diffusers_name
from ..loading.load import open_component
from ..loading.names import ModelKind
from ..loading.save import save_plain, save_quantised
from ..loading.tensor_files import write_safetensors
from ..runtime import DTYPES
from .apply import fold_patches
from .patches import LowRank, Patch
from .read import ADAPTER_METADATA, Skipped
from .report import grouped
from .target import (
    IMAGE_BRANCH,
    PEFT_CONFIG,
    PEFT_FILE,
    SIZES,
    PathLike,
    Target,
    canonical,
    made_for,
    open_lora,
    use_lora,
    width_of,
)
from .write import Merged, Named, encode, extract, merge

MAX_RANK = 4096

FUSED_KINDS: tuple[ModelKind, ...] = ("dit", "vace", "motion_controller")
"""Models that LoRAs change."""

OWN_METADATA = (ADAPTER_METADATA, "ss_network_dim", "ss_network_alpha", "ss_network_module", "sshs_model_hash")
"""Metadata that a new file gets of its own instead of a copy from a source."""


@dataclass(frozen=True)
class LoraFormat:
    """How a LoRA is stored: in the names of which program (`lora.write.FORMATS`), and in which dtype."""

    names: str = "comfyui"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        check_choice("LoRA dtype", self.dtype, tuple(DTYPES))


@dataclass(frozen=True)
class Saved:
    """A file that was written: its content, what it lacks of the sources, and the share that a lower rank lost."""

    path: Path
    patches: int
    ranks: tuple[int, ...]
    error: float
    skipped: tuple[Skipped, ...] = ()

    def __str__(self) -> str:
        rank = "/".join(map(str, self.ranks)) or "none"
        lines = [f"{self.path}", f"  changes   {self.patches} parameters, rank {rank}"]
        if self.error:
            lines.append(f"  lost      {100 * self.error:.3g} % of the change, by the limited rank")
        if self.skipped:
            lines.append(f"  left out  {len(self.skipped)}")
            lines += [f"    {name}" for name in grouped(s.name for s in self.skipped)]
        return "\n".join(lines)


def convert(
    sources: Sequence[tuple[PathLike, float]],
    out: PathLike | Iterable[Path],
    form: LoraFormat,
    *,
    rank: int | None = None,
) -> Saved:
    """Write one LoRA that does what `sources` do together, each at its strength, to `out` or the first free path of it.

    One source is converted as it is. Several are joined exactly, which adds up their ranks, unless `rank` limits it.

    Raises:
        ValueError: `out` exists or cannot be written, a source cannot be read or merged, or the format cannot hold it.
    """
    _check_rank(rank)
    _check_free(out, form)
    loras = [(open_lora(path), strength) for path, strength in sources]
    if not loras:
        raise ValueError("No LoRA was given; name at least one file.")
    named = [canonical(lora) for lora, _ in loras]
    for (lora, _), (patches, _) in zip(loras, named, strict=True):
        if not patches:
            raise ValueError(f"{lora.name} names no part of Wan 2.1; there is nothing to convert.")
    widths = [width_of((name, patch.shape) for name, patch in patches) for patches, _ in named]
    if len(set(widths) - {None}) > 1:
        sizes = ", ".join(f"{lora.name} (width {width})" for (lora, _), width in zip(loras, widths, strict=True))
        raise ValueError(f"LoRAs of models of different sizes cannot be merged: {sizes}.")
    pairs = [(patches, strength) for (patches, _), (_, strength) in zip(named, loras, strict=True)]
    kept = {k: v for k, v in loras[0][0].metadata.items() if k not in OWN_METADATA} if len(loras) == 1 else {}
    origin = {"sources": [{"name": lora.name, "strength": strength} for lora, strength in loras]}
    skipped = tuple(s for _, left in named for s in left)

    def merged() -> Merged:
        with errors_from(" and ".join(lora.name for lora, _ in loras), "cannot be converted"):
            return merge(pairs, rank)

    return save(merged, out, form, kept, origin, skipped)


def extract_lora(base: PathLike, tuned: PathLike, out: PathLike, form: LoraFormat, *, rank: int) -> Saved:
    """The difference between the checkpoints `tuned` and `base` as a LoRA of `rank` at `out`.

    Vectors and modulations are stored exactly, matrices to that rank.

    Raises:
        ValueError: `out` exists, the checkpoints are no DiTs of one structure, or hold the same weights.
    """
    _check_rank(rank)
    _check_free(out, form)
    first, second = (require_kind(detect_files(path, ("dit",)), "dit") for path in (base, tuned))
    if first.config != second.config:
        raise ValueError(
            f"{first.name} and {second.name} are models of different structure; extract from a fine-tune of that base."
        )

    def extracted() -> Merged:
        with open_component(first) as read_base, open_component(second) as read_tuned:
            shared = (name for name in second.sources if name in first.sources)
            return extract(((name, read_base(name), read_tuned(name)) for name in shared), rank)

    return save(extracted, out, form, {}, {"base": first.name, "tuned": second.name, "extracted_rank": rank})


def fuse(sources: Sequence[tuple[PathLike, float]], base: PathLike, out: PathLike, dtype: str | None = None) -> Saved:
    """The checkpoint `base` with `sources`, each at its strength, in its weights: one file at `out`, in the names that
    ComfyUI loads.

    Args:
        dtype: of the weights (`DTYPES`); None keeps that of `base`, and writes a quantised one as scaled FP8.

    Raises:
        ValueError: `out` exists or cannot be written, a source cannot be read, was made for another model, or nothing
            would change.
    """
    _check_free(out, LoraFormat())
    target = Path(out).expanduser()
    component = require_kind(detect_files(base, FUSED_KINDS), FUSED_KINDS)
    changes: dict[str, list[tuple[Patch, float]]] = defaultdict(list)
    skipped: list[Skipped] = []
    with Target.of_file(component) as model:
        for path, strength in sources:
            bound = use_lora(path, model).bound
            skipped += bound.skipped
            for name, patch in bound.patches:
                if strength and patch.norm() != 0:
                    changes[name].append((patch, strength))
    if not changes:
        raise ValueError(f"Nothing would change in {component.name}: every change is zero, or its strength is.")

    @torch.no_grad()
    def fused(weight: Tensor, parts: Sequence[tuple[Patch, float]]) -> Tensor:
        return fold_patches(weight.float(), parts, weight.device)

    made = {name: partial(fused, parts=parts) for name, parts in changes.items()}
    if component.quantised and dtype is None:
        save_quantised(component, target, changes=made)
    else:
        stored = component.dtype if component.dtype in DTYPES.values() else torch.bfloat16
        save_plain(component, target, DTYPES[dtype] if dtype else stored, changes=made)
    ranks = tuple(sorted({patch.rank for parts in changes.values() for patch, _ in parts if patch.rank}))
    return Saved(Path(out), len(changes), ranks, 0.0, tuple(skipped))


def save(
    make: Callable[[], Merged],
    out: PathLike | Iterable[Path],
    form: LoraFormat,
    metadata: Mapping[str, str],
    origin: Mapping[str, object],
    skipped: tuple[Skipped, ...] = (),
) -> Saved:
    """Write what `make` returns to `out`: a new file, or for `peft` a new folder with its configuration. The name is
    claimed before `make` is called.

    Raises:
        ValueError: `out` exists or cannot be written, or the format cannot hold one of the patches.
        OSError: the disk is full or fails.
    """
    with creating_first(_targets(out, form)) as file:
        merged = make()
        path = file.path.parent if form.names == "peft" else file.path
        write_lora(file.partial, merged, path.stem, form, metadata, origin)
        if form.names == "peft":
            # Before the weights get their name: without this file their alpha is lost.
            with replacing(file.path.with_name(PEFT_CONFIG)) as config:
                config.write_text(json.dumps(_peft_config(merged.patches), indent=2), encoding="utf-8")
    path = file.path.parent if form.names == "peft" else file.path
    ranks = tuple(sorted({p.rank for _, p in merged.patches if p.rank}))
    return Saved(path, len({name for name, _ in merged.patches}), ranks, merged.error, skipped)


def write_lora(
    file: Path,
    merged: Merged,
    title: str,
    form: LoraFormat,
    metadata: Mapping[str, str],
    origin: Mapping[str, object],
) -> None:
    """Write `merged` into `file`, in place of its content.

    Raises:
        ValueError: the format cannot hold one of the patches.
        OSError: the disk is full or fails.
    """
    described = {
        **lora_metadata(merged.patches, title),
        **metadata,
        "wancore": json.dumps({**origin, "names": form.names, "lost": round(merged.error, 6)}),
    }
    write_safetensors(file, encode(merged.patches, form.names, DTYPES[form.dtype], diffusers_name), described)


def lora_metadata(patches: Named, title: str) -> dict[str, str]:
    """The metadata that LoRA tools look for: base model, rank, alpha (folded in, so equal to the rank), title."""
    size = SIZES.get(width_of((name, patch.shape) for name, patch in patches) or 0, "")
    task = "i2v" if any(IMAGE_BRANCH.match(name) for name, _ in patches) else "t2v"
    rank = str(max((patch.rank for _, patch in patches if patch.rank), default=0))
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.title": title,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "wancore.made_for": made_for(patches),
    }
    if size:
        metadata["ss_base_model_version"] = f"wan2.1_{task}_{size.rpartition(' ')[2]}"
    return metadata


def _check_rank(rank: int | None) -> None:
    if rank is not None:
        check_whole("rank", rank, low=1, high=MAX_RANK)


def _check_free(out: PathLike | Iterable[Path], form: LoraFormat) -> None:
    """Raise ValueError for a name that is taken or wrong, before anything long."""
    if not isinstance(out, (str, os.PathLike)):
        return
    path = Path(out).expanduser()
    if not (_is_left_over(path) if form.names == "peft" else not os.path.lexists(path)):
        raise ValueError(f"{path} exists already; nothing is overwritten. Choose another name or move it away.")
    if form.names != "peft" and path.suffix != ".safetensors":
        raise ValueError(f"LoRAs are written as .safetensors; got the name {path.name!r}.")


def _targets(out: PathLike | Iterable[Path], form: LoraFormat) -> Iterator[Path]:
    """The files that the tensors may be written to, in the order of preference."""
    _check_free(out, form)
    for path in [Path(out).expanduser()] if isinstance(out, (str, os.PathLike)) else out:
        if form.names != "peft":
            yield path
        elif _is_left_over(path):
            yield path / f"{PEFT_FILE}.safetensors"


def _is_left_over(folder: Path) -> bool:
    """Whether a new LoRA can be written to `folder`: it is not there, empty, or what a killed process left of one."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    names = {entry.name for entry in folder.iterdir()}
    config, weights = folder / PEFT_CONFIG, partial_path(folder / f"{PEFT_FILE}.safetensors")
    return not names or (weights.name in names and names <= {weights.name, config.name, partial_path(config).name})


def _peft_config(patches: Named) -> dict[str, object]:
    """PEFT's configuration for factors with their scale folded in: alpha is the rank of every module."""
    ranks = {name.rpartition(".")[0]: patch.rank for name, patch in patches if isinstance(patch, LowRank)}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    # Alpha equals the rank everywhere, so that PEFT scales by 1: the scale is in the factors already.
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
        "inference_mode": True,
    }
