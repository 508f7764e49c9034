"""From a recognised file, or from weights that another program holds, to a module; memory holds the weights once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..checks import check_choice
from ..files import errors_from
from ..models.dit import WanDiT
from ..models.image_encoder import ImageEncoder
from ..models.layers import MotionController
from ..models.ops import on_meta
from ..models.preview_decoder import PreviewDecoder
from ..models.text_encoder import UMT5Encoder
from ..models.vae import WanVAE
from ..offload.blocks import blocks_of
from ..offload.formats import MADE_FORMATS, WEIGHT_CHOICES, WeightChoice
from ..offload.quant import QuantisedLinear, big_linears, replace_layer
from ..offload.weights import WeightProvider
from .detect import KINDS, Component, check_against, detect, detect_files, require_kind
from .names import SPIECE_MODEL, ModelKind, Source
from .stored_weights import StoredWeight
from .tensor_files import CheckpointError, Header, TensorFiles, TensorInfo, TensorReader, TensorShapes
from .vocabulary import Vocabulary, has_vocabulary

CLASSES: dict[ModelKind, type[nn.Module]] = {
    "dit": WanDiT,
    "motion_controller": MotionController,
    "text_encoder": UMT5Encoder,
    "vae": WanVAE,
    "image_encoder": ImageEncoder,
    "preview_decoder": PreviewDecoder,
}

DEQUANTISED_DTYPE = torch.bfloat16
"""The dtype of scaled weights when no dtype is asked for; that of the stored numbers is no dtype to compute in."""


def build(
    component: Component,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    weights: WeightChoice = "auto",
    mapped: bool = False,
) -> nn.Module:
    """The module of `component` with its weights, in evaluation mode, no gradients; see `load_into`.

    Raises:
        CheckpointError: the component cannot be built by itself, or its tensors do not fit; no weight was read then.
        ValueError: the settings do not fit the file.
    """
    require_kind(component, tuple(CLASSES))
    return load_into(empty_module(component), component, dtype, device, weights=weights, mapped=mapped)


def empty_module(component: Component) -> nn.Module:
    """The module of `component` on the meta device.

    Raises:
        CheckpointError: a model of its sizes cannot be made.
    """
    problem = f"cannot be {KINDS[component.kind][0]}, by the shapes of its tensors"
    with errors_from(component.name, problem, error=CheckpointError), on_meta():
        return CLASSES[component.kind](component.config)


def inspect(path: str | Path | Sequence[str | Path], *kinds: ModelKind) -> Component:
    """The model at `path`, of an all-in-one file the one of `kinds`, checked to be complete.

    `info`, the loaders' validation and loading all use this.

    Raises:
        CheckpointError: it is of another kind, not readable, incomplete, or a variant that is not known.
    """
    component = require_kind(detect_files(path, kinds), kinds or tuple(KINDS))
    check_fits(component)
    return component


def check_fits(component: Component) -> None:
    """Compare names and shapes with those of the module that `component` would be loaded into.

    Raises:
        CheckpointError: they differ.
    """
    if component.kind in CLASSES:
        check_against(component, empty_module(component))
    elif component.kind == "vace":
        # A branch in a file of its own: the module of the whole model is made for the names and shapes of the branch.
        model = empty_module(replace(component, kind="dit"))
        parts = {name: part for name, part in model.named_children() if name.startswith("vace_")}
        check_against(component, nn.ModuleDict(parts))


def load_into(
    module: nn.Module,
    component: Component,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    *,
    weights: WeightChoice = "auto",
    mapped: bool = False,
) -> nn.Module:
    """Fill `module`, which may be on the meta device, with the weights of `component`; returns it.

    Weights are cast to `dtype`, those that the class lists in `FLOAT32_PARAMETERS` to float32; None keeps the stored
    dtype. Tensors are read one at a time, so that memory holds the model and at most one tensor more. With the meta
    device as `device` no file is read, and weights have their sizes and dtypes only.

    Args:
        weights: `auto` leaves linear layers of blocks that are stored quantised as they are, as `QuantisedLinear`;
            `fp8` makes those that are not FP8 so; `plain` makes all of them `dtype`. Quantised weights elsewhere become
            `dtype`.
        mapped: leave the weights inside of blocks in the file, as views in their stored dtype;
            `WeightProvider.of(module).work_dtypes` has the dtype in which they work. All others are read.

    Raises:
        CheckpointError: names or shapes differ; `module` is unchanged then.
        ValueError: the weights cannot stay in their file as asked.
        AssertionError: `module` has a buffer on the meta device that is not part of its state dict.
    """
    check_choice("weights", weights, WEIGHT_CHOICES)
    check_against(component, module)
    stored = module.state_dict().keys()
    # A buffer that no file fills would stay on the meta device, and fail in the first forward.
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in stored]
    assert not lost, f"{type(module).__name__} makes buffers that are not stored on the meta device: {', '.join(lost)}"
    filling = _Filling(module, component, dtype, torch.device(device), weights)
    inside = tuple(f"{path}." for path in blocks_of(module))
    with (TensorShapes if filling.device.type == "meta" else TensorFiles)(component.header) as files:
        if mapped:
            filling.require_mappable(files)
        # In the order of the file, so that disks and network drives read sequentially.
        for name in sorted(component.sources, key=filling.place):
            if not (mapped and name.startswith(inside) and filling.map(name, files)):
                filling.read(name, files)
    # What a layout may lack is not computed with, but the module has to be complete.
    for name in stored - component.sources.keys():
        _assign(module, name, torch.zeros(module.get_parameter(name).shape, dtype=dtype, device=device))
    return module.requires_grad_(False).eval()


def has_spiece_model(header: Header) -> bool:
    """Whether there is one for `spiece_model`."""
    return has_vocabulary(header.metadata) or _spiece_name(header) is not None


def can_map_all(components: Sequence[Component], weights: WeightChoice) -> bool:
    """Whether the weights of blocks can stay in the files, see `load_into`."""
    try:
        for component in components:
            build(component, dtype=None, device="meta", weights=weights, mapped=True)
    except ValueError:
        return False
    return True


def spiece_model(header: Header) -> bytes | None:
    """The SentencePiece model that a ComfyUI text encoder pack carries, or that the vocabulary of a GGUF file is; None
    when there is none.

    Raises:
        CheckpointError: what is in its place is something else.
    """
    if has_vocabulary(header.metadata):
        return Vocabulary.of_gguf(header.files[0]).sentencepiece()
    name = _spiece_name(header)
    if name is None:
        return None
    if header[name].dtype != torch.uint8:
        raise CheckpointError(f"{header[name].file} holds a {SPIECE_MODEL} of {header[name].dtype}, not of bytes.")
    with TensorFiles(header) as files:
        return files.read(name).numpy().tobytes()


def _spiece_name(header: Header) -> str | None:
    return next((name for name in header if name.rpartition(".")[2] == SPIECE_MODEL), None)


@contextmanager
def open_component(component: Component) -> Iterator[Callable[[str], Tensor]]:
    """A function from an original name to its tensor on the CPU, which is valid until the next call."""
    with TensorFiles(component.header) as files:
        yield lambda name: combine(component.sources[name], files)


class _Filling:
    """Puts the tensors of a component into a module, as `load_into` describes."""

    def __init__(
        self,
        module: nn.Module,
        component: Component,
        dtype: torch.dtype | None,
        device: torch.device,
        weights: WeightChoice,
    ) -> None:
        self.module, self.component, self.device, self.weights = module, component, device, weights
        self.dtype, self.made = dtype, MADE_FORMATS.get(weights)
        self.provider = WeightProvider.of(module)
        self.in_float32 = getattr(module, "FLOAT32_PARAMETERS", ())
        self.linears = {f"{path}.weight": layer for path, layer in big_linears(module).items()}
        self.order = {file: number for number, file in enumerate(component.header.files)}

    def place(self, name: str) -> tuple[int, int]:
        """The position of a tensor in the files. Read in this order, they are read from front to back."""
        info = self.component.header[self.component.sources[name].names[0]]
        return self.order[info.file], info.offset or 0

    def read(self, name: str, files: TensorFiles) -> None:
        """Give the parameter `name` memory of its own."""
        source, kept = self.component.sources[name], self._kept(name)
        if kept is not None:
            self._keep(name, kept, files.read(kept.numbers).to(self.device), files)
            return
        if self.made is not None and name in self.linears:
            numbers, scale = self.made.quantise(combine(source, files).to(self.device))
            self._put(name, partial(QuantisedLinear, form=self.made), numbers, scale)
            return
        work = self._work_dtype(name)
        # A tensor that needs no change is read into memory of its own; others come from a shared buffer.
        is_whole = source.combine in ("identity", "reshape") and source.is_cast
        if is_whole and work == source.dtype and self.device.type == "cpu":
            tensor = files.read(source.names[0]).reshape(source.shape)
        else:
            # A copy where the result may be the buffer that the next tensor is read into.
            tensor = combine(source, files, work).to(self.device, work, copy=source.is_cast)
        _assign(self.module, name, tensor)

    def map(self, name: str, files: TensorFiles) -> bool:
        """Make the parameter `name` a view of its file, where that is possible."""
        source, kept = self.component.sources[name], self._kept(name)
        if source.combine not in ("identity", "reshape") or not (kept or source.is_cast):
            return False
        view = files.map(source.names[0])
        if view is None:
            return False
        self.provider.mapped.add(name)
        if kept is not None:
            self._keep(name, kept, view, files)
            return True
        view = view.reshape(source.shape)
        _assign(self.module, name, view)
        if self._work_dtype(name) != view.dtype:
            self.provider.work_dtypes[name] = self._work_dtype(name)
        return True

    def require_mappable(self, files: TensorFiles) -> None:
        """Raise ValueError if the settings need other numbers than those in the file."""
        file = self.component.name
        if self.device.type not in ("cpu", "meta"):
            raise ValueError(f"{file}: weights that stay in their file are on the CPU, not on {self.device}.")
        if not all(map(files.can_map, self.component.header.files)):
            raise ValueError(
                f"{file} is a PyTorch checkpoint of an old format, which cannot stay on disk. Convert it with "
                f"`python -m headless convert {file} --dtype bf16 NEW.safetensors`."
            )
        if self.made is not None and not all(map(self._kept, self.linears)):
            name = self.made.name
            raise ValueError(
                f"{file} does not hold its weights as {name}, so they cannot be {name} and stay on disk. Convert it "
                f"with `python -m headless convert {file} --{self.weights} NEW.safetensors`, or set weights to 'auto'."
            )
        if self.weights == "plain" and not all(self.component.sources[name].is_cast for name in self.linears):
            raise ValueError(
                f"{file} holds quantised weights ({self.component.quantised}), which cannot be plain and stay on disk; "
                "set weights to 'auto'."
            )

    def _kept(self, name: str) -> StoredWeight | None:
        """The stored weight of the parameter `name`, if its layer is to keep it as it is."""
        stored = self.component.sources[name].single
        return stored if stored and name in self.linears and stored.kept(self.weights) else None

    def _work_dtype(self, name: str) -> torch.dtype:
        source = self.component.sources[name]
        if self.dtype is None:
            return source.dtype if source.is_cast else DEQUANTISED_DTYPE
        return torch.float32 if name.rpartition(".")[2] in self.in_float32 else self.dtype

    def _keep(self, name: str, stored: StoredWeight, numbers: Tensor, files: TensorFiles) -> None:
        """Let the layer of the parameter `name` hold `numbers` as they are stored."""
        shape = tuple(numbers.shape)
        scale = stored.held_scale(files.read(stored.scale), shape).to(self.device) if stored.scale else None
        self._put(name, partial(QuantisedLinear, form=stored.format), numbers, scale)

    def _put(self, name: str, layer: Callable[..., QuantisedLinear], weight: Tensor, scale: Tensor | None) -> None:
        """Put a quantised layer in the place of the plain one; its bias stays where it is or comes later."""
        made = layer(weight, scale, self.linears[name].bias, self.dtype or DEQUANTISED_DTYPE)
        replace_layer(self.module, name.removesuffix(".weight"), made)


def combine(source: Source, files: TensorReader, dtype: torch.dtype = torch.float32) -> Tensor:
    """An original tensor on the CPU, made of its parts in `files`; valid until the next one is read from `files`.

    Quantised parts come out in `dtype`.
    """
    first, *others = [*source.names, *(part.scale for part in source.parts if part.scale)]
    tensors = {name: files.read(name) for name in others}
    tensors[first] = files.borrow(first)
    parts = [part.weight(tensors, dtype) for part in source.parts]
    if source.combine == "cat":
        return torch.cat(parts)
    if source.combine == "transpose":
        return parts[0].T.contiguous()
    return parts[0].reshape(source.shape)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in owner._parameters
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def header_of_tensors(tensors: Mapping[str, Tensor], name: str) -> Header:
    """A state dict in memory, called `name` in messages, as the header of a file.

    Raises:
        ValueError: it is no mapping from names to tensors, or is empty.
    """
    is_dict = isinstance(tensors, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    )
    if not is_dict or not tensors:
        what = "an empty one" if isinstance(tensors, Mapping) and not tensors else type(tensors).__name__
        raise ValueError(f"{name} must be a dict of tensors by name, such as load_state_dict returns; got {what}.")
    place = Path(name)
    infos = {key: TensorInfo(tuple(value.shape), value.dtype, place) for key, value in tensors.items()}
    return Header(MappingProxyType(infos), (place,), MappingProxyType({}))


class TensorsInMemory:
    """The tensors of a state dict in memory, read as those of files are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    borrow = read


def describe_weights(weights: Mapping[str, Tensor], name: str, kind: ModelKind) -> Component:
    """The model that `weights` are, by their names and shapes; `name` is theirs in messages.

    Raises:
        CheckpointError: they are not a model of that kind.
    """
    return require_kind(detect(header_of_tensors(weights, name)), kind)


def adopt(
    component: Component, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The module of `component` with a copy of `weights` in `dtype` on `device`, in evaluation mode, no gradients.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    module = empty_module(component)
    check_against(component, module)
    held = TensorsInMemory(weights)
    copies = {name: combine(source, held).to(device, dtype, copy=True) for name, source in component.sources.items()}
    module.load_state_dict(copies, assign=True)
    return module.requires_grad_(False).eval()
