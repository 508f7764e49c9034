"""Where the models of a pipeline come from, and what is found there, before any weight is read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import catalog
from .call_arguments import truth
from .loading.detect import Component, detect_all
from .loading.download import models_folder
from .loading.pairs import check_pair, with_pairs
from .loading.paths import resolve_files
from .loading.tensor_files import read_header
from .model_files import DISK, Offload, find_files, has_tokenizer
from .models.config import DiTConfig, PreviewDecoderConfig, VAEConfig
from .models.preview_decoder import NAMES
from .offload.formats import choice_for_dtype
from .runtime import usable_device

log = logging.getLogger("wancore")

PathLike = str | Path

NEEDED = {"dit": "a DiT", "text_encoder": "a text encoder", "vae": "a VAE"}
SECOND = {"dit": "dit2", "vace": "vace2"}
"""What the second model of a kind is called: the expert for low noise of a pair, and its VACE branch."""
COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONAL = ("image_encoder", "motion_controller", "preview_decoder", "vace", *SECOND.values())


@dataclass
class ModelConfig:
    """Where one model of a pipeline is, and where its weights are between uses; mutable until the pipeline is loaded.

    Attributes:
        path: a file, a folder, a glob or a list of shards; wins over `model_id`. A pair of experts is a list of two
            files, a folder that holds both, or one name with braces, `..._{high,low}_noise_...`.
        model_id: a repository on ModelScope, or "WanCore/tiny".
        origin_file_pattern: a glob inside that repository.
        download_source: "modelscope" or "huggingface"; None is that of the environment variable
            `DIFFSYNTH_DOWNLOAD_SOURCE`, else ModelScope.
        local_model_path: root of the downloaded models, "./models" when None.
        skip_download: use local files only.
        offload_device: where the weights are while another model works; None keeps them on the pipeline's device,
            "disk" leaves those of transformer blocks in their file.
        offload_dtype: the dtype of the weights of transformer blocks between uses; None is the one they work in, and so
            is "disk". The FP8 dtypes halve the memory on the device, too: layers keep FP8 weights, a scale per row.
        onload_device, preparing_device: accepted. Weights are copied to the pipeline's device block by block, one ahead
            of its turn, as free memory allows.
        onload_dtype, preparing_dtype: in which dtype weights are while their model works; an FP8 dtype is taken for
            `offload_dtype` where that leaves it open, others are accepted.
        computation_device: the pipeline's device.
        computation_dtype: in which dtype this model computes; None is the pipeline's.
        clear_parameters: not available; the weights of a model are needed.
        state_dict: weights that take the place of the file's once the model is loaded.
        quantize: not available; `offload_dtype` has the FP8 dtypes.
        download_resource: the older name of `download_source`.
    """

    path: PathLike | Sequence[PathLike] | None = None
    model_id: str | None = None
    origin_file_pattern: str | None = None
    download_source: str | None = None
    local_model_path: PathLike | None = None
    skip_download: bool | None = None
    offload_device: str | torch.device | None = None
    offload_dtype: torch.dtype | str | None = None
    onload_device: str | torch.device | None = None
    onload_dtype: torch.dtype | str | None = None
    preparing_device: str | torch.device | None = None
    preparing_dtype: torch.dtype | str | None = None
    computation_device: str | torch.device | None = None
    computation_dtype: torch.dtype | None = None
    clear_parameters: bool = False
    state_dict: Mapping[str, torch.Tensor] | None = None
    quantize: Any = None
    download_resource: str | None = None

    def files(self, redirect_common_files: bool = True) -> list[Path]:
        """The local files, downloaded first when they are absent and that is allowed.

        Raises:
            ValueError: neither a path nor a repository with a pattern is given, or nothing is found.
        """
        if self.path is not None:
            return [file for group in resolve_files(self._paths()) for file in group]
        for name in ("model_id", "origin_file_pattern"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string; got {getattr(self, name)!r}. Make a ModelConfig of each.")
        if not self.model_id or not self.origin_file_pattern:
            raise ValueError(
                "ModelConfig needs `path`, or `model_id` with `origin_file_pattern`; got "
                f"model_id={self.model_id!r}, origin_file_pattern={self.origin_file_pattern!r}."
            )
        _check_path("local_model_path", self.local_model_path)
        return find_files(
            self.model_id,
            self.origin_file_pattern,
            models_dir=models_folder(self.local_model_path),
            skip_download=truth("skip_download", self.skip_download or False),
            redirect_common_files=redirect_common_files,
            source=self.download_source or self.download_resource,
        )

    def download_if_necessary(
        self, local_model_path: PathLike | None = None, skip_download: bool | None = None
    ) -> None:
        """Put the local files into `path`, downloaded first when they are absent and that is allowed.

        Raises:
            ValueError: as of `files`.
        """
        found = self.filled_from(ModelConfig(local_model_path=local_model_path, skip_download=skip_download)).files()
        paths = [str(file) for file in found]
        self.path = paths[0] if len(paths) == 1 else paths

    def offload(self, device: torch.device) -> Offload:
        """Where and how the weights are kept between uses in a pipeline on `device`.

        Raises:
            ValueError: they cannot be kept that way, or the configuration asks for what this library does not have.
        """
        for name in ("onload_device", "preparing_device"):
            value = getattr(self, name)
            if value is not None and str(value) != DISK:
                usable_device(name, value)
        if self.clear_parameters:
            raise ValueError("clear_parameters is not available: a pipeline needs the weights of its models.")
        if self.quantize is not None:
            raise ValueError("quantize is not available; offload_dtype=torch.float8_e4m3fn holds the weights as FP8.")
        offload = device if self.offload_device is None else self.offload_device
        on_disk = str(offload) == DISK
        dtype = self._dtype("offload_dtype")
        # DiffSynth-Studio's onload dtype is that of weights while their model is in use; as FP8 it means FP8 layers.
        if dtype is None:
            wanted = (self._dtype(name) for name in ("onload_dtype", "preparing_dtype"))
            eight = next((found for found in wanted if choice_for_dtype(found)), None)
            if eight is not None and on_disk:
                log.warning("Weights that stay on disk have the dtype of their file, so %s is not applied; set "
                            'offload_device to "cpu" to hold them so.', eight)  # fmt: skip
            dtype = None if on_disk else eight
        if not on_disk:
            offload = usable_device("offload_device", offload)
        computes_on = device if self.computation_device is None else self.computation_device
        if usable_device("computation_device", computes_on).type != device.type:
            log.warning("All models of a pipeline compute on its device %s; computation_device %s is not applied.",
                        device, computes_on)  # fmt: skip
        return Offload.on(offload, dtype=dtype)

    def work_dtype(self, default: torch.dtype) -> torch.dtype:
        """In which dtype the model computes in a pipeline of dtype `default`.

        Raises:
            ValueError: models cannot compute in it.
        """
        found = self._dtype("computation_dtype")
        return default if found is None else compute_dtype("computation_dtype", found)

    def filled_from(self, defaults: "ModelConfig") -> "ModelConfig":
        """A copy whose folder and download rule are those of `defaults` where it has none of its own."""
        return replace(
            self,
            local_model_path=defaults.local_model_path if self.local_model_path is None else self.local_model_path,
            skip_download=defaults.skip_download if self.skip_download is None else self.skip_download,
        )

    def _paths(self) -> list[PathLike]:
        paths = [self.path] if isinstance(self.path, (str, Path)) else self.path
        if not isinstance(paths, (list, tuple)) or not paths:
            raise ValueError(f"path must be a path, or a list of them; got {self.path!r}.")
        for path in paths:
            _check_path("path", path or "")
        return [part for path in paths for part in with_pairs(path)]

    def _dtype(self, name: str) -> torch.dtype | None:
        value = getattr(self, name)
        if isinstance(value, str) and value == DISK:
            return None
        if value is not None and not isinstance(value, torch.dtype):
            raise ValueError(f"{name} must be a torch.dtype or None; got {value!r}.")
        return value


def compute_dtype(name: str, value: Any) -> torch.dtype:
    """`value`, which must be a dtype that models can compute in; `name` is the parameter's.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, torch.dtype) or value not in COMPUTE_DTYPES:
        quantises = isinstance(value, torch.dtype) and choice_for_dtype(value)
        hint = " Weights are held so between uses by offload_dtype." if quantises else ""
        raise ValueError(f"{name} must be torch.bfloat16, torch.float16 or torch.float32; got {value!r}.{hint}")
    return value


def _check_path(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value)):
        raise ValueError(f"{name} must be a path; got {value!r}.")


TOKENIZER_CONFIG = ModelConfig(model_id=catalog.T2V_BASE, origin_file_pattern=catalog.TOKENIZER_PATTERN)


@dataclass(frozen=True)
class FoundModel:
    """A model that was found and understood, with the configuration that named it."""

    component: Component
    config: ModelConfig


def find_models(
    configs: Sequence[ModelConfig], redirect_common_files: bool = True, defaults: ModelConfig | None = None
) -> dict[str, FoundModel]:
    """The models that `configs` name, by kind, from their headers alone. Of a pair of experts the DiT for high noise
    comes first; the second one is called as in `SECOND`, as is its VACE branch.

    `defaults` has the folder and the download rule of configurations that have none of their own.

    Raises:
        ValueError: one is missing, given twice, unknown, broken, or of no use to a pipeline, two DiTs are no pair, or
            the VAE or the tiny autoencoder is another model's.
    """
    found: dict[str, FoundModel] = {}
    if isinstance(configs, (str, ModelConfig)) or not isinstance(configs, Sequence):
        raise ValueError(f"model_configs must be a list of ModelConfig; got {type(configs).__name__}.")
    for config in configs:
        if not isinstance(config, ModelConfig):
            raise ValueError(f"model_configs must be a list of ModelConfig; one of them is {config!r}.")
        config = config.filled_from(defaults) if defaults is not None else config
        for group in resolve_files(config.files(redirect_common_files)):
            for component in detect_all(read_header(group)):
                kind: str = component.kind
                kind = SECOND.get(kind, kind) if kind in found else kind
                if kind in found:
                    other = found[kind].component
                    raise ValueError(f"Two models of one kind were given: {other.name} and {component.name}.")
                found[kind] = FoundModel(component, config)
    for kind, what in NEEDED.items():
        if kind not in found:
            raise ValueError(f"model_configs lacks {what}; it has {', '.join(found) or 'nothing'}.")
    for kind, model in found.items():
        if kind not in (*NEEDED, *OPTIONAL):
            raise ValueError(f"{model.component.name} ({kind}) is not one of a pipeline's models; load it afterwards.")
    _check_experts({kind: model.component for kind, model in found.items()})
    require_same_latents(found["dit"].component, found["vae"].component)
    if "preview_decoder" in found:
        _check_preview_decoder(found["preview_decoder"].component, found["dit"].component)
    return found


def _check_preview_decoder(tiny: Component, dit: Component) -> None:
    wanted, given = dit.config_of(DiTConfig).geometry, tiny.config_of(PreviewDecoderConfig).latent_channels
    if wanted.channels != given:
        raise ValueError(
            f"{tiny.name} decodes latents of {given} channels, but {dit.name} makes those of {wanted.channels}. Give "
            f"{NAMES[wanted.channels]}."
        )


def _check_experts(components: Mapping[str, Component]) -> None:
    """Raise ValueError unless there is one DiT or a pair, and with a pair as many VACE branches as DiTs, or one."""
    if "dit2" in components:
        check_pair(components["dit"], components["dit2"])
    elif "vace2" in components:
        names = " and ".join(components[kind].name for kind in ("vace", "vace2"))
        raise ValueError(f"{names} are two VACE branches, but there is one DiT; give one for each DiT.")


def require_same_latents(dit: Component, vae: Component) -> None:
    """Raise ValueError unless `vae` encodes to what `dit` denoises; by their headers."""
    wanted, given = dit.config_of(DiTConfig).geometry, vae.config_of(VAEConfig).geometry
    if not wanted.matches(given):
        files = catalog.VAE_FILES.get(wanted.channels)
        which = f": {files[0]}, or ComfyUI's {files[1]}.safetensors" if files else ""
        raise ValueError(
            f"{vae.name} encodes to latents of {given.name} ({given.channels} channels), but {dit.name} denoises those "
            f"of {wanted.name} ({wanted.channels} channels). Load the VAE of {wanted.name}{which}."
        )


def tokenizer_folder(component: Component, config: ModelConfig | None, defaults: ModelConfig) -> Path | None:
    """The tokenizer's folder; None when the text encoder brings one and no other than the usual was asked for.

    Raises:
        ValueError: `config` is no ModelConfig, or nothing is found where it says.
    """
    config = TOKENIZER_CONFIG if config is None else config
    if not isinstance(config, ModelConfig):
        raise ValueError(f"tokenizer_config must be a ModelConfig; got {config!r}.")
    if config.path is not None:
        _check_path("path", config.path)
        if not isinstance(config.path, (str, Path)):
            raise ValueError(f"tokenizer_config.path must be one folder; got {config.path!r}.")
        return Path(config.path)
    if config.model_id == TOKENIZER_CONFIG.model_id and has_tokenizer(component):
        return None
    files = config.filled_from(defaults).files()
    return files[0] if files[0].is_dir() else files[0].parent
