"""Where the models of a pipeline come from, and what is found there, before any weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import catalog, prepare
from .checkpoints.detect import Component, detect_files
from .checkpoints.download import models_folder
from .checkpoints.files import resolve_files
from .rest import Rest

PathLike = str | Path

NEEDED = {"dit": "a DiT", "text_encoder": "a text encoder", "vae": "a VAE"}
OPTIONAL = ("image_encoder", "motion_controller", "vace")


@dataclass(frozen=True)
class ModelConfig:
    """Where one model of a pipeline is, and where its weights rest.

    Attributes:
        path: a file, a folder, a glob or a list of shards; wins over `model_id`.
        model_id: a repository on ModelScope, or "WanCore/tiny".
        origin_file_pattern: a glob inside that repository.
        offload_device: where the weights rest while another model works; None keeps them on the pipeline's device,
            "disk" leaves those of transformer blocks in their file.
        offload_dtype: in which dtype the weights of transformer blocks rest; None is the pipeline's. The FP8 dtypes
            halve the memory on the device, too: layers keep FP8 weights with a scale per row.
        local_model_path: root of the downloaded models, "./models" when None.
        skip_download: use local files only.
    """

    path: PathLike | Sequence[PathLike] | None = None
    model_id: str | None = None
    origin_file_pattern: str | None = None
    offload_device: str | torch.device | None = None
    offload_dtype: torch.dtype | None = None
    local_model_path: PathLike | None = None
    skip_download: bool | None = None

    def files(self, redirect_common_files: bool = True) -> list[Path]:
        """The local files, downloaded first when they are absent and that is allowed.

        Raises:
            ValueError: neither a path nor a repository with a pattern is given, or nothing is found.
        """
        if self.path is not None:
            return [file for group in resolve_files(self.path) for file in group]
        if not self.model_id or not self.origin_file_pattern:
            raise ValueError(f"ModelConfig needs `path`, or `model_id` with `origin_file_pattern`; got {self}.")
        return prepare.find_files(
            self.model_id,
            self.origin_file_pattern,
            models_dir=models_folder(self.local_model_path),
            skip_download=bool(self.skip_download),
            redirect_common_files=redirect_common_files,
        )

    def rest(self, device: torch.device) -> Rest:
        """How the weights rest in a pipeline on `device`.

        Raises:
            ValueError: they cannot rest that way.
        """
        return Rest.on(self.offload_device or device, dtype=self.offload_dtype)

    def filled_from(self, defaults: "ModelConfig") -> "ModelConfig":
        """A copy whose folder and download rule are those of `defaults` where it has none of its own."""
        return replace(
            self,
            local_model_path=defaults.local_model_path if self.local_model_path is None else self.local_model_path,
            skip_download=defaults.skip_download if self.skip_download is None else self.skip_download,
        )


TOKENIZER_CONFIG = ModelConfig(model_id=catalog.T2V_BASE, origin_file_pattern=catalog.TOKENIZER_PATTERN)


@dataclass(frozen=True)
class FoundModel:
    """A model that was found and understood, with the configuration that named it."""

    component: Component
    config: ModelConfig


def find_models(configs: Sequence[ModelConfig], redirect_common_files: bool = True) -> dict[str, FoundModel]:
    """The models that `configs` name, by kind, from their headers alone.

    Raises:
        ValueError: one is missing, given twice, unknown, broken, or of no use to a pipeline.
    """
    found: dict[str, FoundModel] = {}
    for config in configs:
        for group in resolve_files(config.files(redirect_common_files)):
            component = detect_files(group)
            if component.kind in found:
                other = found[component.kind].component
                raise ValueError(f"Two models of one kind were given: {other.name} and {component.name}.")
            found[component.kind] = FoundModel(component, config)
    for kind, what in NEEDED.items():
        if kind not in found:
            raise ValueError(f"model_configs lacks {what}; it has {', '.join(found) or 'nothing'}.")
    for kind, model in found.items():
        if kind not in (*NEEDED, *OPTIONAL):
            raise ValueError(f"{model.component.name} ({kind}) is not one of a pipeline's models; load it afterwards.")
    return found


def tokenizer_folder(component: Component, config: ModelConfig | None, defaults: ModelConfig) -> Path | None:
    """The tokenizer's folder; None when the text encoder brings one and no other was asked for."""
    if config is None:
        if prepare.has_tokenizer(component):
            return None
        config = TOKENIZER_CONFIG
    if config.path is not None:
        return Path(config.path)
    files = config.filled_from(defaults).files()
    return files[0] if files[0].is_dir() else files[0].parent
