"""Every way by which a file of weights comes in, each a function from a path to what came of it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wan_core.conditioning.text import DiskStore
from wan_core.inspection import report
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.loading.save import save_plain
from wan_core.lora.convert import LoraFormat, convert
from wan_core.lora.target import lora_file_report, open_lora
from wan_core.sampling.checkpoint import load_latents
from wancore.trainer.data.cache import LatentCache
from wancore.trainer.run.state import OPTIMIZER, WEIGHTS, read_weights_and_optimizer


def _info(path: Path) -> str:
    return str(report(path))[:80]


def _load(path: Path) -> str:
    component = detect_files(path)
    module = build(component, dtype=torch.float32)
    assert not any(parameter.is_meta for parameter in module.parameters())
    _agree(path)
    return f"{component.kind}, {sum(p.numel() for p in module.parameters())} numbers"


def _map(path: Path) -> str:
    build(detect_files(path), dtype=None, mapped=True)
    _agree(path)
    return "mapped"


def _agree(path: Path) -> None:
    """What was read must not be a file that the safetensors library refuses."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise AssertionError(f"read what the library refuses: {error}") from error


def _lora(path: Path) -> str:
    lora = open_lora(path)
    _agree(path)
    return str(lora_file_report(lora))[:80]


def _written(path: Path, write: Callable[[Path], object]) -> str:
    """`write` to a new file beside `path`; after an error nothing may be left of it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            write(Path(folder) / "out.safetensors")
        except ValueError as error:
            left = list(Path(folder).iterdir())
            assert not left, f"left over: {left}"
            raise error
        detect_files(Path(folder) / "out.safetensors")
    return "converted"


def _convert(path: Path) -> str:
    return _written(path, lambda out: save_plain(detect_files(path), out, torch.bfloat16))


def _convert_lora(path: Path) -> str:
    return _written(path, lambda out: convert([(path, 1.0)], out, LoraFormat()))


def _state(path: Path) -> str:
    """As the optimizer of a state whose weights are whole, or the other way round."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.stem) as folder:
        parts = {OPTIMIZER: lambda file: torch.save({"state": {}}, file), WEIGHTS: lambda file: save_file({}, file)}
        hostile = WEIGHTS if path.suffix == ".safetensors" else OPTIMIZER
        for name, make in parts.items():
            if name == hostile:
                (Path(folder) / name).symlink_to(path)
            else:
                make(Path(folder) / name)
        return f"{len(read_weights_and_optimizer(Path(folder))[0])} tensors"


def _latents(path: Path) -> str:
    return str(load_latents(path)[0].shape)


def _caches(path: Path) -> str:
    """Files of caches that cannot be read count as none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / "ab").mkdir()
        for place in (Path(folder) / "ab" / "ab.safetensors", Path(folder) / "ab.safetensors"):
            place.symlink_to(path)
        found = LatentCache(folder).get("ab"), DiskStore(Path(folder)).get("ab")
    return f"{[value is not None for value in found]}"


JOBS: dict[str, Callable[[Path], str]] = {
    "info": _info, "load": _load, "map": _map, "lora": _lora, "convert": _convert, "convert lora": _convert_lora,
    "state": _state, "latents": _latents, "caches": _caches,
}  # fmt: skip
