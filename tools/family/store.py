"""Store trained weights in the pack: `python -m tools.family pack FOLDER`.

The folder holds whole state dicts. One text-to-video model is stored whole, in bfloat16, and the models that were
trained from it as differences of four bits a number; `wan_core.bundled` puts ordinary checkpoints together again.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.family.variants import TRAININGS
from wan_core import bundled, catalog
from wan_core.loading.tensor_files import write_safetensors

BITS = 4
"""Of a number in a difference."""

SMALL = 4096
"""Up to so many numbers a weight is stored whole."""


def quantised(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The levels and scales of `bundled.unpack` that come nearest to `weight`, by least squares for each row."""
    rows = weight.float().flatten(1)
    top = 2**bits - 1
    # From the range of each row; of 2 bits a scale of about one standard deviation is best, found by refinement.
    scale = (rows.std(1).clamp(min=1e-12) if bits == 2 else 2 * rows.abs().amax(1).clamp(min=1e-12) / top)[:, None]
    for _ in range(8 if bits == 2 else 1):
        levels = (rows / scale + top / 2).round().clamp(0, top)
        centred = levels - top / 2
        scale = ((rows * centred).sum(1) / centred.square().sum(1)).clamp(min=1e-12)[:, None].to(torch.bfloat16).float()
    levels = (rows / scale + top / 2).round().clamp(0, top).to(torch.uint8)
    packed = levels.unflatten(1, (-1, 8 // bits)) << torch.arange(0, 8, bits, dtype=torch.uint8)
    return packed.sum(-1, dtype=torch.uint8), scale[:, 0].to(torch.bfloat16)


def stored(weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is written of `weights`: all in bfloat16, or what differs from `base`."""
    if base is None:
        return {key: weight.to(torch.bfloat16) for key, weight in weights.items()}
    out = {}
    for key, weight in weights.items():
        difference = weight.float() - base[key]
        if weight.numel() <= SMALL:
            out[key] = weight.to(torch.bfloat16)
        elif difference.any():
            out[key + bundled.LEVELS], out[key + bundled.SCALE] = quantised(difference, BITS)
    return out


def parts() -> dict[str, bundled.Part]:
    """What can be trained, by the name of its weights."""
    found = [part for row in catalog.TINY_ROWS for part in bundled.parts(row.model_id).values() if part.names]
    # A name is first that of a model of its own, and else of one that it stands for.
    others = {name: part for part in found for name in part.names[1:]}
    return {**others, **{part.names[0]: part for part in found}}


def pack(folder: Path, target: Path) -> list[Path]:
    """Store every trained part in `folder` and its tokenizer below `target`; the files that were written."""
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = target / bundled.TOKENIZER_FILE
    tokenizer.write_bytes((folder / catalog.TOKENIZER_PATTERN / bundled.TOKENIZER_FILE).read_bytes())
    written = [tokenizer]
    known = parts()
    found = {stored_name(file.stem): file for file in sorted(folder.glob("*.safetensors"))}
    bases = {name: known[name].base if name in known else None for name in found}
    # Those that others are differences from are stored first.
    for name in sorted(found, key=lambda name: (bases[name] is not None, name)):
        if name in known or name.startswith("lora_"):
            base = bases[name]
            file = target / f"{base}.safetensors"
            begun = None if base is None else bundled.widened(load_file(file), known[name].config)
            written.append(target / f"{name}.safetensors")
            write_safetensors(written[-1], dict(sorted(stored(load_file(found[name]), begun).items())))
    return written


def stored_name(name: str) -> str:
    """How the weights are called that a training calls `name`."""
    training = TRAININGS.get(name)
    if training is None or name == "speed":
        return name
    return f"lora_{name}" if training.mode == "lora" else f"dit_{training.structure}"


def main(arguments: Sequence[str]) -> None:
    """Store a folder's weights and print what each file takes."""
    parser = argparse.ArgumentParser(prog="python -m tools.family pack", description=__doc__)
    parser.add_argument("folder", type=Path, help="with text.safetensors, vae.safetensors, dit_t2v.safetensors ...")
    files = pack(parser.parse_args(arguments).folder, bundled.TRAINED)
    sizes = {file.name: file.stat().st_size / 1e6 for file in files}
    for name, size in {**sizes, "altogether": sum(sizes.values())}.items():
        sys.stdout.write(f"{size:6.2f} MB  {name}\n")
