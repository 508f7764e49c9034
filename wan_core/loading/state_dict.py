"""State dicts: read from files, and put in the place of a loaded module's weights."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..lora.naming import is_lora
from ..offload.formats import recognised_format
from ..offload.quant import QuantisedLinear, weight_shapes
from ..offload.weights import WeightProvider
from ..runtime import usable_device
from .detect import listed
from .load import TensorsInMemory, combine, header_of_tensors
from .names import KeyLayout, Source, convert, find_layout, strip_prefix
from .paths import PathLike, resolve_files
from .stored_weights import stored_weights
from .tensor_files import CheckpointError, Header, TensorFiles, read_header


def load_state_dict(
    file_path: PathLike | Sequence[PathLike],
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    pin_memory: bool = False,
    verbose: int = 0,
) -> dict[str, Tensor]:
    """The tensors of a weights file by name, as the file names them; what wraps a state dict is taken off.

    Files are safetensors, GGUF or PyTorch checkpoints, by their content. Only plain tensors are unpickled: nothing in a
    file is executed. The packed tensors of a GGUF file are dequantised.

    Args:
        file_path: a file, or several that are one model.
        torch_dtype: of the floating-point tensors; None keeps what is stored, and makes packed ones float32.
        device: where they are put.
        pin_memory: put them in pinned host memory, from which copies to a card are faster; needs CUDA.
        verbose: accepted as the reference does; what is read is in the log.

    Raises:
        ValueError: a file is missing, damaged or no weights file, or an argument is none of that.
    """
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"torch_dtype must be a torch.dtype or None; got {torch_dtype!r}.")
    device = usable_device("device", device)
    if pin_memory and not torch.cuda.is_available():
        raise ValueError("pin_memory needs a CUDA device; leave it out on this machine.")
    header = read_header(_files(file_path))
    tensors = {}
    with TensorFiles(header) as files:
        for name, info in header.items():
            dtype = torch_dtype if info.dtype.is_floating_point and torch_dtype is not None else info.dtype
            if (form := recognised_format(info)) is not None and info.packing:
                dtype = torch_dtype or torch.float32
                packed = form.dequantise(files.read(name), None, dtype)
                tensor = packed.reshape(info.whole or packed.shape).to(device)
            else:
                tensor = files.read(name).to(device, dtype)
            tensors[name] = tensor.pin_memory() if pin_memory else tensor
    return tensors


def _files(given: Any) -> list[Path]:
    paths = list(given) if isinstance(given, (list, tuple)) else [given]
    if not paths or not all(isinstance(path, (str, Path)) and str(path) for path in paths):
        raise ValueError(f"file_path must be the path of a weights file, or a list of paths; got {given!r}.")
    if all(Path(path).is_file() for path in paths):
        return [Path(path) for path in paths]
    return [file for group in resolve_files(paths) for file in group]


def replace_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], *, own: Iterable[str] | None = None, strict: bool = True
) -> tuple[list[str], list[str]]:
    """Replace the weights of `module` by those of a state dict for good, on the devices and in the dtypes that it has.

    Layers that hold quantised weights get the new ones as FP8, with a scale per row. Weights that were views of a file
    are in memory from now on. Nothing is changed when an error is raised.

    Args:
        tensors: under the module's own names, with or without a prefix, or in any layout that files are read in.
        own: the names that must be there; all names of the module if None. Its other names are optional.
        strict: raise when a name is missing or fits nothing.

    Returns:
        The names that `tensors` lacks, and those of it that fit nothing.

    Raises:
        ValueError: no tensor fits, shapes differ, or with `strict` a name is missing or fits nothing.
    """
    shapes = weight_shapes(module)
    sources = _sources(header_of_tensors(tensors, "state_dict"), shapes)
    owned = shapes.keys() if own is None else [name for name in own if name in shapes]
    missing = [name for name in owned if name not in sources]
    unexpected = [name for name in sources if name not in shapes]
    misshapen = [
        f"{name} {list(source.shape)} instead of {list(shapes[name])}"
        for name, source in sources.items()
        if name in shapes and source.shape != shapes[name]
    ]
    fatal = {"of another shape": misshapen}
    if strict or len(unexpected) == len(sources):
        fatal |= {"missing": missing, "unknown": unexpected}
    problems = [f"{len(names)} {what}: {listed(names)}" for what, names in fatal.items() if names]
    if problems:
        advice = "Give what was saved of the same model"
        if is_lora(unexpected):
            advice = "It holds a LoRA, which pipe.load_lora applies, with the weights that are saved beside it"
        raise CheckpointError(f"The state_dict does not fit {type(module).__name__}; {'; '.join(problems)}. {advice}.")
    reader, provider = TensorsInMemory(tensors), WeightProvider.of(module)
    for name, source in sources.items():
        if name in shapes:
            _replace(module, name, combine(source, reader), provider)
    return missing, unexpected


def _sources(header: Header, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Source]:
    prefix = _prefix(header, shapes)
    names = {name.removeprefix(prefix): name for name in header}
    if not any(name in shapes for name in names):
        names = strip_prefix(header)
        return convert(find_layout(names) or KeyLayout("dit", "original", ()), stored_weights(header, names))
    return convert(KeyLayout("dit", "original", ()), stored_weights(header, names))


def _prefix(names: Iterable[str], known: Mapping[str, Any]) -> str:
    """The prefix that most of `names` have before a known name."""
    votes: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        index = next((i for i in range(len(parts)) if ".".join(parts[i:]) in known), None)
        if index is not None:
            votes[name[: len(name) - len(".".join(parts[index:]))]] += 1
    return votes.most_common(1)[0][0] if votes else ""


def _replace(module: nn.Module, name: str, new: Tensor, provider: WeightProvider) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, leaf)
    work = provider.work_dtypes.get(name, old.dtype)
    was_mapped = name in provider.mapped
    provider.replaced(name)
    if isinstance(owner, QuantisedLinear) and leaf == "weight":
        owner.set_weight(new.to(old.device))
        return
    if was_mapped:
        provider.work_dtypes.pop(name, None)
    # In the memory format of the old tensor: the VAE's kernels are channels-last.
    tensor = torch.empty_like(old, dtype=work if was_mapped else old.dtype, requires_grad=False).copy_(new)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=old.requires_grad) if leaf in owner._parameters else tensor)
