"""The models of a pipeline, loaded from what a list of `ModelConfig` names."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from . import prepare
from .checkpoints.state_dict import replace_weights
from .conditioning.text import TextEncoder
from .conditioning.text_cache import TextCache
from .model_config import FoundModel, ModelConfig, find_models, tokenizer_folder
from .models.image_encoder import ImageEncoder
from .models.vae import WanVAE
from .sampling.state import digest_weights

ATTENTION_VARIABLE = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"
ATTENTION = {
    "flash_attention_4": "flash",
    "flash_attention_3": "flash",
    "flash_attention_2": "flash",
    "sage_attention": "sage",
    "xformers": "xformers",
    "torch": "sdpa",
}
"""The kernels of `models.attention` by the names that the reference's environment variable has for them."""


@dataclass(frozen=True)
class LoadedModels:
    """What a pipeline works with."""

    video: prepare.VideoModel
    text: TextEncoder
    vae: WanVAE
    image: ImageEncoder | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(filter(None, (*self.video.modules, self.text.model, self.vae, self.image)))

    def with_new_text_weights(self) -> "LoadedModels":
        """For after the text encoder's weights were replaced: prompts that were encoded before no longer count."""
        cache = self.text.cache and TextCache.in_memory(digest_weights(self.text.model))
        return replace(self, text=replace(self.text, cache=cache))


def attention_of_environment() -> str:
    """The attention kernel that the environment asks for, "auto" if it says nothing.

    Raises:
        ValueError: there is no such kernel.
    """
    asked = os.environ.get(ATTENTION_VARIABLE, "").lower()
    if asked and asked not in ATTENTION:
        raise ValueError(f"{ATTENTION_VARIABLE} must be one of {', '.join(ATTENTION)}; got {asked!r}.")
    return ATTENTION.get(asked, "auto")


def load_models(
    configs: Sequence[ModelConfig],
    torch_dtype: torch.dtype,
    device: torch.device,
    tokenizer_config: ModelConfig | None,
    defaults: ModelConfig,
    *,
    redirect_common_files: bool = True,
    torch_compile: bool = False,
    deterministic: bool = False,
) -> LoadedModels:
    """The models that `configs` name; every file's header is read and checked before the first weight is.

    Args:
        defaults: folder and download rule of configurations that have none of their own.

    Raises:
        ValueError: a model is missing, given twice, unknown or broken, or cannot be loaded as asked.
    """
    attention = attention_of_environment()
    found = find_models(configs, redirect_common_files, defaults)
    component = {kind: model.component for kind, model in found.items()}
    tokenizer = tokenizer_folder(component["text_encoder"], tokenizer_config, defaults)
    rest = {kind: model.config.rest(device) for kind, model in found.items()}
    dtype = {kind: model.config.work_dtype(torch_dtype) for kind, model in found.items()}
    settings = prepare.DiTSettings(
        dtype=dtype["dit"], attention=attention, torch_compile=torch_compile, deterministic=deterministic
    )
    video = prepare.load_dit(component["dit"], settings, rest["dit"], vace=component.get("vace"), compute_device=device)
    if "motion_controller" in found:
        video = prepare.with_speed_control(video, component["motion_controller"], rest["motion_controller"])
    image = None
    if "image_encoder" in found:
        image = prepare.load_image_encoder(component["image_encoder"], dtype["image_encoder"], rest["image_encoder"])
    text = prepare.load_text_encoder(component["text_encoder"], tokenizer, dtype["text_encoder"], rest["text_encoder"])
    models = LoadedModels(video, text, prepare.load_vae(component["vae"], dtype["vae"], rest["vae"]), image)
    return _with_given_weights(models, found)


def _with_given_weights(models: LoadedModels, found: dict[str, FoundModel]) -> LoadedModels:
    """`models` with the weights that configurations carry in the place of the files'."""
    modules = {
        "dit": models.video.dit, "vace": models.video.dit, "motion_controller": models.video.motion_controller,
        "text_encoder": models.text.model, "vae": models.vae, "image_encoder": models.image,
    }  # fmt: skip
    for kind, model in found.items():
        module = modules[kind]
        if model.config.state_dict is not None and module is not None:
            replace_weights(module, model.config.state_dict, own=model.component.sources)
            models = models.with_new_text_weights() if kind == "text_encoder" else models
    return models
