"""Files and settings to ready models, in one fixed order: find, detect, build on the meta device, load, place."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import catalog, tiny
from .checkpoints.detect import Component, detect_files, require_kind
from .checkpoints.download import OnProgress, fetch, redirect
from .checkpoints.keymap import SPIECE_MODEL
from .checkpoints.load import build, spiece_model
from .checkpoints.tokenizer import Tokenizer
from .conditioning.text import TextEncoder
from .models.attention import load_backend
from .models.dit import WanDiT
from .models.vae import WanVAE
from .variants import Variant, match_variant

log = logging.getLogger("wancore")

PathLike = str | Path


@dataclass(frozen=True, kw_only=True)
class DiTSettings:
    """How a DiT computes.

    Attributes:
        dtype: of its weights and matrix products.
        attention: a kernel of `models.attention`.
        exact: keep the residual stream in float32, as the authors do; costs memory and a little time.
    """

    dtype: torch.dtype = torch.bfloat16
    attention: str = "sdpa"
    exact: bool = False


@dataclass(frozen=True)
class VideoModel:
    """A DiT with what is known of it: its structure's row, and the catalog row that its name points to, if any."""

    dit: WanDiT
    variant: Variant
    row: catalog.CatalogRow | None


def find_files(
    model_id: str,
    pattern: str,
    *,
    models_dir: Path,
    skip_download: bool = False,
    redirect_common_files: bool = True,
    on_download: OnProgress | None = None,
) -> list[Path]:
    """The local files of a published model that match `pattern`, downloaded when they are absent and that is allowed.

    Bundled models are made on the spot.

    Raises:
        ValueError: nothing matches, a file is broken or missing, or the download failed.
    """
    if model_id == catalog.TINY:
        tiny.write_model(models_dir / model_id)
        skip_download = True
    elif redirect_common_files:
        model_id, pattern = redirect(model_id, pattern, models_dir)
    return fetch(model_id, pattern, root=models_dir, skip_download=skip_download, on_progress=on_download)


def inspect(path: PathLike | Sequence[PathLike], kind: str) -> Component:
    """What the model file or files at `path` are, read from their headers.

    Raises:
        ValueError: they are not a model of that kind, or not readable, or not complete.
    """
    component = detect_files(path)
    require_kind(component, (kind,))
    return component


def load_dit(component: Component, settings: DiTSettings, device: torch.device | str) -> VideoModel:
    """The DiT of `component`, its weights resting on `device`.

    Raises:
        ValueError: keys are missing, unexpected or misshapen, or the attention backend is not usable.
    """
    variant = match_variant(component.config)
    dit: WanDiT = build(component, dtype=settings.dtype, device=device)
    dit.attend = load_backend(settings.attention, torch.device(device), settings.dtype)
    dit.exact = settings.exact
    row = hinted_row(component)
    log.info("DiT: %s, %s", variant.label, row.model_id if row else "not in the catalog")
    return VideoModel(dit, variant, row)


def hinted_row(component: Component) -> catalog.CatalogRow | None:
    """The catalog row named by the folder that the files lie in; it chooses recommended settings, nothing else."""
    path = component.header.files[0].resolve()
    return catalog.find_row("/".join(path.parts[-3:-1]))


def load_text_encoder(
    component: Component, tokenizer: PathLike | None, dtype: torch.dtype, device: torch.device | str
) -> TextEncoder:
    """The text encoder of `component` with its tokenizer.

    The tokenizer comes from the folder `tokenizer`, else from the file itself (ComfyUI's packages carry it), else from
    the folder google/umt5-xxl beside the file.

    Raises:
        ValueError: there is no tokenizer, or it knows more tokens than the encoder.
    """
    found = find_tokenizer(component, tokenizer)
    if found.vocab_size > component.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {found.vocab_size} tokens, the text encoder only {component.config.vocab_size}: they "
            "do not belong together."
        )
    return TextEncoder(build(component, dtype=dtype, device=device), found)


def has_tokenizer(component: Component) -> bool:
    """Whether the text encoder's file, or the folder it lies in, brings a tokenizer."""
    return SPIECE_MODEL in component.header or _tokenizer_beside(component).is_dir()


def find_tokenizer(component: Component, folder: PathLike | None) -> Tokenizer:
    """The tokenizer that `load_text_encoder` describes."""
    if folder is not None:
        return Tokenizer.from_folder(folder)
    if (model := spiece_model(component.header)) is not None:
        return Tokenizer.from_sentencepiece(model)
    return Tokenizer.from_folder(_tokenizer_beside(component))


def _tokenizer_beside(component: Component) -> Path:
    return component.header.files[0].parent / catalog.TOKENIZER_PATTERN


def load_vae(component: Component, dtype: torch.dtype, device: torch.device | str) -> WanVAE:
    """The video autoencoder of `component`."""
    return build(component, dtype=dtype, device=device).use_channels_last()
