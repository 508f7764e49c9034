"""From a recognised file to a module with weights, at the memory cost of one copy and at most one shard."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.dit import WanDiT
from ..models.image_encoder import ImageEncoder
from ..models.motion_controller import MotionController
from ..models.preview_decoder import PreviewDecoder
from ..models.text_encoder import UMT5Encoder
from ..models.vae import WanVAE
from .detect import Component, check_against, require_kind
from .header import Header, open_tensors
from .keymap import SPIECE_MODEL, Source

CLASSES = {
    "dit": WanDiT,
    "motion_controller": MotionController,
    "text_encoder": UMT5Encoder,
    "vae": WanVAE,
    "image_encoder": ImageEncoder,
    "preview_decoder": PreviewDecoder,
}

DEQUANTISED_DTYPE = torch.bfloat16
"""The dtype of scaled FP8 weights when no dtype is asked for: alone, the stored numbers are not the weights."""


def build(component: Component, *, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> nn.Module:
    """The module of `component` with its weights, in evaluation mode, no gradients.

    Weights are cast to `dtype`, those that the class lists in `FLOAT32_PARAMETERS` to float32; None keeps the stored
    dtype. Scaled FP8 weights are multiplied by their scales.

    Raises:
        CheckpointError: the component cannot be built by itself, or its tensors do not fit; no weight was read then.
    """
    require_kind(component, tuple(CLASSES))
    with torch.device("meta"):
        module = CLASSES[component.kind](component.config)
    return load_into(module, component, dtype, device)


def load_into(
    module: nn.Module, component: Component, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Give every parameter of `module` the weights of `component`; `module` may stand on the meta device. Returns it.

    Raises:
        CheckpointError: names or shapes differ; `module` is unchanged then.
        AssertionError: `module` holds a buffer on the meta device that no file can fill.
    """
    check_against(component, module)
    stored = module.state_dict().keys()
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in stored]
    assert not lost, f"{type(module).__name__} makes buffers that are not stored on the meta device: {', '.join(lost)}"
    in_float32 = getattr(module, "FLOAT32_PARAMETERS", ())
    for name, tensor in _tensors(component):
        target = torch.float32 if dtype and name.rpartition(".")[2] in in_float32 else dtype
        if target is None and component.sources[name].scales:
            target = DEQUANTISED_DTYPE
        _assign(module, name, tensor.to(device, target or tensor.dtype, copy=True))
    for name in stored - component.sources.keys():
        _assign(module, name, torch.zeros(module.get_parameter(name).shape, dtype=dtype, device=device))
    return module.requires_grad_(False).eval()


def spiece_model(header: Header) -> bytes | None:
    """The SentencePiece model that a ComfyUI text encoder pack carries; None when there is none."""
    name = next((name for name in header if name.rpartition(".")[2] == SPIECE_MODEL), None)
    if name is None:
        return None
    with open_tensors(header[name].file) as read:
        return read(name).numpy().tobytes()


@contextmanager
def open_component(component: Component) -> Iterator[Callable[[str], Tensor]]:
    """A function from an original name to its tensor on the CPU, which may be a view of the file while that is open."""
    with ExitStack() as stack:
        readers = {file: stack.enter_context(open_tensors(file)) for file in component.header.files}

        def read(name: str) -> Tensor:
            source = component.sources[name]
            stored = {n: readers[component.header[n].file](n) for n in (*source.names, *source.scales) if n}
            return _combine(source, stored)

        yield read


def _tensors(component: Component) -> Iterator[tuple[str, Tensor]]:
    """Original names with their tensors on the CPU, file by file; a tensor may be a view of the file that is open.

    Parts that lie in different files are kept until the last of them comes.
    """
    header = component.header
    waiting: dict[str, set[str]] = {}
    wanted: dict[Path, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for target, source in component.sources.items():
        waiting[target] = {name for name in (*source.names, *source.scales) if name}
        for name in waiting[target]:
            wanted[header[name].file][target].append(name)
    pieces: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for file, targets in wanted.items():
        with open_tensors(file) as read:
            for target, names in targets.items():
                whole = waiting[target] == set(names)
                pieces[target] |= {name: read(name) if whole else read(name).clone() for name in names}
                if pieces[target].keys() == waiting[target]:
                    yield target, _combine(component.sources[target], pieces.pop(target))


def _combine(source: Source, tensors: Mapping[str, Tensor]) -> Tensor:
    scales = source.scales or (None,) * len(source.names)
    parts = [
        _dequantise(tensors[n], tensors[s]) if s else tensors[n] for n, s in zip(source.names, scales, strict=True)
    ]
    if source.combine == "cat":
        return torch.cat(parts)
    if source.combine == "transpose":
        return parts[0].T.contiguous()
    return parts[0].reshape(source.shape)


def _dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    rows = scale.float().reshape(-1, *(1,) * (weight.ndim - 1))
    return weight.float() * rows


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in owner._parameters
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
