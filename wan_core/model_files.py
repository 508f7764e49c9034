"""From files to models: find, detect, build on the meta device, load."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from . import bundled, catalog
from .checks import check_choice
from .conditioning.text import TextCache, TextEncoder, Tokenizer, fingerprint
from .loading import load
from .loading.detect import Component, require_kind
from .loading.download import OnProgress, fetch, redirect
from .loading.load import build, can_map_all, has_spiece_model, inspect, spiece_model
from .loading.pairs import check_pair, check_same_structure, pair_name, resolve_experts, stored_boundary, with_branches
from .model import VideoModel
from .models.attention import load_backend
from .models.config import DiTConfig, MotionControllerConfig, TextEncoderConfig
from .models.dit import WanDiT
from .models.fused import load_fused
from .models.image_encoder import ImageEncoder
from .models.layers import MotionController
from .models.preview_decoder import PreviewDecoder
from .models.text_encoder import UMT5Encoder
from .models.vae import WanVAE
from .offload.blocks import available_ram, weight_bytes
from .offload.formats import WEIGHT_CHOICES, WeightChoice, choice_for_dtype
from .offload.quant import require_fp8_matmul, use_fp8_matmul
from .offload.weights import WeightProvider
from .parallel.source import Source
from .runtime import gigabytes
from .sampling.experts import Expert
from .sampling.solvers import NUM_TRAIN_TIMESTEPS
from .variants import Variant, match_variant

DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class Offload:
    """Where and how weights are kept between uses.

    Attributes:
        device: where they are.
        mapped: leave the weights of blocks in the model's file and read a block when its turn comes.
        dtype: of the weights of blocks between uses; None is the one they work in.
        weights: `auto` holds the big linear layers as the file has them, `fp8` as FP8, `plain` in the compute dtype
            (`loading.load.load_into`).
    """

    device: torch.device = torch.device("cpu")
    mapped: bool = False
    dtype: torch.dtype | None = None
    weights: WeightChoice = "auto"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHT_CHOICES)

    @classmethod
    def on(
        cls, device: "torch.device | str | Offload", *, dtype: torch.dtype | None = None, weights: WeightChoice = "auto"
    ) -> "Offload":
        """Weights on `device`, which may be "disk", in `dtype`; an FP8 dtype quantises the big layers instead.

        Raises:
            ValueError: `dtype` is no floating-point type, or weights that stay in their file cannot have it.
        """
        if isinstance(device, Offload):
            return device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Weights can be held in floating-point dtypes only; got {dtype}.")
        if (choice := choice_for_dtype(dtype)) is not None:
            dtype, weights = None, choice
        if str(device) != DISK:
            return cls(device=torch.device(device), dtype=dtype, weights=weights)
        if dtype is not None:
            raise ValueError(f"Weights on disk have the dtype of their file; leave out offload_dtype {dtype}.")
        return cls(mapped=True, weights=weights)

    def load(self, component: Component, dtype: torch.dtype, *, read: bool = True) -> nn.Module:
        """The module of `component`, whose weights are kept this way and work in `dtype`.

        Without `read` it is on the meta device, and its weights have their sizes only.

        Raises:
            ValueError: its tensors do not fit it, or cannot be kept this way.
        """
        device = self.device if read else torch.device("meta")
        module = build(component, dtype=dtype, device=device, weights=self.weights, mapped=self.mapped)
        if self.dtype not in (None, dtype):
            WeightProvider.of(module).offload_as(self.dtype, dtype)
        return module

    def for_several(self, components: Sequence[Component], dtype: torch.dtype) -> "Offload":
        """How the experts of a model are kept: on the CPU, or in their files where host memory has no room for all."""
        rests = replace(self, device=torch.device("cpu"))
        size = sum(weight_bytes(rests.load(component, dtype, read=False)) for component in components)
        if rests.mapped or size < (free := available_ram()) or not can_map_all(components, self.weights):
            return rests
        log.warning("The experts take %s of host memory and %s is free, so their weights stay in their files.",
                    gigabytes(size), gigabytes(free))  # fmt: skip
        return replace(rests, mapped=True, dtype=None)


log = logging.getLogger("wancore")

Module = TypeVar("Module", bound=nn.Module)

PathLike = str | Path
OffloadPlace = Offload | torch.device | str
"""An `Offload`, or just the device: "cpu", "cuda", "disk"."""
BUNDLED = frozenset(row.model_id for row in catalog.TINY_ROWS)


@dataclass(frozen=True, kw_only=True)
class DiTSettings:
    """How a DiT computes.

    Attributes:
        dtype: of its weights and matrix products.
        attention: a kernel of `models.attention`.
        exact: keep the residual stream in float32, as the authors do; costs memory and a little time.
        fp8_matmul: multiply FP8 weights as FP8 numbers, on cards that can; faster, and less exact.
        torch_compile: let `torch.compile` fuse the elementwise steps; takes seconds for each new size.
        deterministic: use the default kernels instead of those that are fastest here, see `models.kernels`.
    """

    dtype: torch.dtype = torch.bfloat16
    attention: str = "auto"
    exact: bool = False
    fp8_matmul: bool = False
    torch_compile: bool = False
    deterministic: bool = False


def find_files(
    model_id: str,
    pattern: str,
    *,
    models_dir: Path,
    skip_download: bool = False,
    redirect_common_files: bool = True,
    on_download: OnProgress | None = None,
    source: str | None = None,
) -> list[Path]:
    """The local files of a published model that match `pattern`; absent ones are downloaded if that is allowed.

    Bundled models are written instead; `source` names where others are downloaded from, of `download.SOURCES`.

    Raises:
        ValueError: there is no such source, nothing matches, a file is broken or missing, or the download failed.
    """
    if model_id in BUNDLED:
        bundled.write_model(models_dir, model_id)
        skip_download = True
    elif redirect_common_files:
        model_id, pattern = redirect(model_id, pattern, models_dir)
    return fetch(
        model_id, pattern, root=models_dir, skip_download=skip_download, on_progress=on_download, source=source
    )


def _loaded(component: Component, cls: type[Module], dtype: torch.dtype, offload: OffloadPlace) -> Module:
    """The model of `component`, which has to be one of `cls`."""
    require_kind(component, next(kind for kind, made in load.CLASSES.items() if made is cls))
    module = Offload.on(offload).load(component, dtype)
    assert isinstance(module, cls)
    return module


@dataclass(frozen=True)
class ExpertFile:
    """The file or files of one transformer of a model; `lowest` is the lowest timestep at which it works."""

    component: Component
    lowest: float = 0.0


def inspect_experts(path: PathLike | Sequence[PathLike]) -> tuple[Component, ...]:
    """The transformers of the video model that `path` names (`loading.pairs.resolve_experts`): one, or a pair, that for
    high noise first.

    Raises:
        ValueError: as of `inspect`, or two files are no pair.
    """
    components = tuple(inspect(files, "dit") for files in resolve_experts(path))
    if len(components) == 2:
        check_pair(*components)
    return components


def experts_of(
    components: Sequence[Component], boundary: float | None = None, preset: str | None = None
) -> tuple[ExpertFile, ...]:
    """The transformers of a model for `load_dit`: one for all noise levels, or a pair, that for high noise first.

    Args:
        boundary: from this fraction of the noise on the first one of a pair works; if None, what the files say or the
            authors recommend.
        preset: as of `load_dit`.

    Raises:
        ValueError: there are more than two, or two are no pair.
    """
    if len(components) == 1:
        return (ExpertFile(components[0]),)
    if len(components) != 2:
        raise ValueError(f"A video model has one transformer or two; got {len(components)}.")
    high, low = components
    check_pair(high, low)
    boundary = boundary_of(high, preset) if boundary is None else boundary
    return ExpertFile(high, boundary * NUM_TRAIN_TIMESTEPS), ExpertFile(low)


def boundary_of(expert: Component, preset: str | None = None) -> float:
    """The boundary of the pair that has this transformer, as of `experts_of`."""
    if (stored := stored_boundary(expert)) is not None:
        return stored
    config = expert.config_of(DiTConfig)
    row = catalog.find_row(preset) if preset else recommended_row(expert, match_variant(config), is_pair=True)
    found = row.boundary if row is not None else None
    # As the authors split text-to-video, and all models with channels beside the noise.
    return found if found is not None else 0.9 if config.concat_channels else 0.875


def load_dit(
    files: Component | Sequence[ExpertFile],
    settings: DiTSettings,
    offload: OffloadPlace,
    *,
    vace: Component | Sequence[Component] | None = None,
    preset: str | None = None,
    compute_device: torch.device | str | None = None,
) -> VideoModel:
    """A video model of one transformer, or of several of one structure.

    The weights of several are read when the first step of each comes, and rest on the CPU: no device holds two.

    Args:
        files: of each expert, the noisiest first; a component alone is the one expert for all noise levels.
        offload: where its weights are between uses.
        compute_device: where it will compute and the attention backend is tried out; the device of `offload` if None.
        vace: a VACE branch from a file of its own, joined to every expert; or one for each of them.
        preset: the catalog row whose settings are recommended, instead of the one that the file's name points to.

    Raises:
        ValueError: keys are missing, unexpected or misshapen, the experts differ in structure or leave noise levels
            out, the branch is of another size, or the attention backend, FP8 products or torch.compile are not usable.
    """
    experts = [ExpertFile(files)] if isinstance(files, Component) else list(files)
    parts = with_branches([expert.component for expert in experts], vace)
    experts = [replace(expert, component=part) for expert, part in zip(experts, parts, strict=True)]
    _check_experts(experts)
    component = experts[0].component
    variant = match_variant(component.config_of(DiTConfig))
    rests = Offload.on(offload)
    computes_on = torch.device(compute_device or rests.device)
    rests = rests.for_several(parts, settings.dtype) if len(experts) > 1 else rests
    # Before any weight is read: a missing kernel should not cost minutes of loading.
    attend = load_backend(settings.attention, computes_on, settings.dtype)
    fused = load_fused(settings.torch_compile, computes_on, settings.dtype)
    if settings.fp8_matmul:
        require_fp8_matmul(computes_on, settings.dtype)

    def load_one(component: Component, *, read: bool = True) -> WanDiT:
        dit = rests.load(require_kind(component, "dit"), settings.dtype, read=read)
        assert isinstance(dit, WanDiT), "`require_kind` has looked"
        if settings.fp8_matmul:
            use_fp8_matmul(dit, computes_on)
        dit.attend, dit.fused, dit.exact = attend, fused, settings.exact
        return dit

    loaded = []
    for expert in experts:
        dit = load_one(expert.component, read=len(experts) == 1)
        if len(experts) > 1:
            origin = fingerprint(expert.component.header.files, str(settings.dtype), repr(rests))
            WeightProvider.of(dit).defer(partial(load_one, expert.component), origin)
        loaded.append(Expert(dit, expert.lowest, files=tuple(expert.component.header.files)))
    row = catalog.find_row(preset) if preset else recommended_row(component, variant, len(experts) > 1 or None)
    own_name = component.name if len(experts) == 1 else pair_name(component, experts[-1].component)
    name = row.model_id if row is not None and row.model_id.lower() in _place(component).lower() else own_name
    log.info("%s: %s; recommended settings of %s.", name, variant.label, row.model_id if row else "no published model")
    source = Source.of(load_dit, files, settings, offload, vace=vace, preset=preset, compute_device=compute_device)
    return VideoModel(tuple(loaded), variant, row, name, deterministic=settings.deterministic, source=source)


def _check_experts(experts: Sequence[ExpertFile]) -> None:
    if not experts:
        raise ValueError("files must name the file of at least one transformer; the list is empty.")
    first, *others = (expert.component for expert in experts)
    for other in others:
        check_same_structure(first, other)
    lowest = [expert.lowest for expert in experts]
    if lowest != sorted(lowest, reverse=True) or lowest[-1] != 0:
        raise ValueError(f"The lowest timesteps of experts must fall, and end at 0; got {lowest}.")


def recommended_row(component: Component, variant: Variant, is_pair: bool | None = None) -> catalog.CatalogRow | None:
    """The catalog row that a file's structure, size and, where these leave a choice, its name point to.

    `is_pair` is as of `catalog.guess_row`.
    """
    size = catalog.SIZES.get(component.config_of(DiTConfig).dim, "")
    return catalog.guess_row(_place(component), variant.name, size, is_pair)


def _place(component: Component) -> str:
    return component.header.files[0].resolve().as_posix()


def load_image_encoder(component: Component, dtype: torch.dtype, offload: OffloadPlace) -> ImageEncoder:
    """The CLIP image encoder of `component`."""
    return _loaded(component, ImageEncoder, dtype, offload)


def with_speed_control(model: VideoModel, component: Component, offload: OffloadPlace) -> VideoModel:
    """`model` with the speed-control adapter of `component` beside it; `model` itself stays as it is.

    Raises:
        ValueError: the adapter is for models of another width.
    """
    width, own = component.config_of(MotionControllerConfig).dim, model.config.dim
    if width != own:
        raise ValueError(
            f"{component.name} controls models of width {width}, but {model.name} has width {own}. The published "
            f"adapter is for {catalog.T2V_BASE}."
        )
    source = model.source and model.source.then(with_speed_control, component, offload)
    return replace(model, motion_controller=_loaded(component, MotionController, model.dtype, offload), source=source)


def load_text_encoder(
    component: Component, tokenizer: PathLike | None, dtype: torch.dtype, offload: OffloadPlace
) -> TextEncoder:
    """The text encoder of `component` with its tokenizer.

    The tokenizer comes from the folder `tokenizer`, else from the file itself (ComfyUI's packages and GGUF files carry
    it), else from the folder google/umt5-xxl beside the file.

    Raises:
        ValueError: there is no tokenizer, or it has more tokens than the encoder.
    """
    known = component.config_of(TextEncoderConfig).vocab_size
    found = find_tokenizer(component, tokenizer)
    if found.vocab_size > known:
        raise ValueError(
            f"The tokenizer has {found.vocab_size} tokens, the text encoder only {known}: they do not belong together."
        )
    model = _loaded(component, UMT5Encoder, dtype, offload)
    stored = sorted({str(parameter.dtype) for parameter in model.parameters()})
    return TextEncoder(model, found, TextCache.in_memory(fingerprint(component.header.files, *stored)))


def has_tokenizer(component: Component) -> bool:
    """Whether the text encoder's file, or the folder it lies in, brings a tokenizer."""
    return has_spiece_model(component.header) or _tokenizer_beside(component).is_dir()


def find_tokenizer(component: Component, folder: PathLike | None) -> Tokenizer:
    """The tokenizer that `load_text_encoder` describes."""
    if folder is not None:
        return Tokenizer.from_folder(folder)
    if (model := spiece_model(component.header)) is not None:
        return Tokenizer.from_sentencepiece(model)
    return Tokenizer.from_folder(_tokenizer_beside(component))


def _tokenizer_beside(component: Component) -> Path:
    return component.header.files[0].parent / catalog.TOKENIZER_PATTERN


def load_vae(component: Component, dtype: torch.dtype, offload: OffloadPlace) -> WanVAE:
    """The video autoencoder of `component`."""
    vae = _loaded(component, WanVAE, dtype, offload).use_channels_last()
    vae.source = Source.of(load_vae, component, dtype, offload)
    return vae


def load_preview_decoder(path: PathLike) -> PreviewDecoder:
    """The decoder of the tiny autoencoder at `path`, in float32 on the CPU.

    Raises:
        CheckpointError: the file is broken, or is something else.
    """
    component = inspect(path, "preview_decoder")
    # Channels-last halves the time of its convolutions on a CPU.
    decoder = _loaded(component, PreviewDecoder, torch.float32, "cpu")
    return decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's types lack it
