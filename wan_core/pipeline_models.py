"""The models of a pipeline: loaded from a list of `ModelConfig`, and reached as `pipe.dit`, `pipe.vace`, `pipe.vae`."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call_arguments import strength
from .conditioning.text import TextCache, TextEncoder
from .loading.state_dict import replace_weights
from .lora.read import Lora
from .lora.report import LoraReport
from .lora.target import lora_from_tensors
from .model import VideoModel
from .model_config import FoundModel, ModelConfig, find_models, tokenizer_folder
from .model_files import (
    DiTSettings,
    experts_of,
    load_dit,
    load_image_encoder,
    load_preview_decoder,
    load_text_encoder,
    load_vae,
    with_speed_control,
)
from .models.image_encoder import ImageEncoder
from .models.preview_decoder import PreviewDecoder
from .models.vae import WanVAE
from .offload.weights import WeightProvider
from .parallel.cards import Cards
from .runtime import log
from .sampling.checkpoint import digest_weights
from .types import Curve

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
    """The models of a pipeline."""

    video: VideoModel
    text: TextEncoder
    vae: WanVAE
    image: ImageEncoder | None = None
    tiny_autoencoder: PreviewDecoder | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(filter(None, (*self.video.modules, self.text.model, self.vae, self.image, self.tiny_autoencoder)))

    def on_cards(self, cards: Cards | None) -> "LoadedModels":
        """The same models, of which the video model and the decoder work on these cards."""
        self.vae.cards = cards
        return replace(self, video=replace(self.video, cards=cards))

    def with_new_text_weights(self) -> "LoadedModels":
        """The same models with no prompt encoded yet, for after the text encoder's weights were replaced."""
        cache = self.text.cache and TextCache.in_memory(digest_weights(self.text.model))
        return replace(self, text=replace(self.text, cache=cache))


def attention_of_environment() -> str:
    """The attention kernel that the environment asks for; "auto" without the variable.

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
    offload = {kind: model.config.offload(device) for kind, model in found.items()}
    dtype = {kind: model.config.work_dtype(torch_dtype) for kind, model in found.items()}
    settings = DiTSettings(
        dtype=dtype["dit"], attention=attention, torch_compile=torch_compile, deterministic=deterministic
    )
    experts = experts_of([component[kind] for kind in ("dit", "dit2") if kind in component])
    branches = [component[kind] for kind in ("vace", "vace2") if kind in component]
    branches *= len(experts) if len(branches) == 1 else 1
    video = load_dit(experts, settings, offload["dit"], vace=branches, compute_device=device)
    if "motion_controller" in found:
        video = with_speed_control(video, component["motion_controller"], offload["motion_controller"])
    image = None
    if "image_encoder" in found:
        image = load_image_encoder(component["image_encoder"], dtype["image_encoder"], offload["image_encoder"])
    text = load_text_encoder(component["text_encoder"], tokenizer, dtype["text_encoder"], offload["text_encoder"])
    tiny = load_preview_decoder(component["preview_decoder"].header.files[0]) if "preview_decoder" in found else None
    models = LoadedModels(video, text, load_vae(component["vae"], dtype["vae"], offload["vae"]), image, tiny)
    return _with_given_weights(models, found)


def _with_given_weights(models: LoadedModels, found: dict[str, FoundModel]) -> LoadedModels:
    """`models` with the weights that configurations carry in the place of the files'."""
    first, *others = models.video.experts
    modules = {
        "dit": first.dit, "vace": first.dit, **{kind: each.dit for each in others for kind in ("dit2", "vace2")},
        "motion_controller": models.video.motion_controller,
        "text_encoder": models.text.model, "vae": models.vae, "image_encoder": models.image,
    }  # fmt: skip
    for kind, model in found.items():
        module = modules.get(kind)
        if model.config.state_dict is not None and module is not None:
            WeightProvider.of(module).read()
            replace_weights(module, model.config.state_dict, own=model.component.sources)
            models = models.with_new_text_weights() if kind == "text_encoder" else models
    return models


VACE_CHILDREN = frozenset({"vace_patch_embedding", "vace_blocks"})
"""The children of a DiT that make up its VACE branch."""


class IncompatibleKeys(NamedTuple):
    """What `Part.load_state_dict` returns, as `torch.nn.Module.load_state_dict` does."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ModuleView(nn.Module):
    """A model, or some children of one, under a name of the reference's.

    Its tensors are the model's own; an attribute that is set on it is set on the model.
    """

    def __init__(
        self,
        name: str,
        whole: nn.Module,
        belongs: Callable[[str], bool] | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            belongs: whether the parameter or child of that name is part of the view; all are if None.
            on_change: called after `load_state_dict`.
        """
        super().__init__()
        own: dict[str, Mapping[str, object]] = {
            "_parameters": whole._parameters,
            "_buffers": whole._buffers,
            "_modules": whole._modules,
        }
        if belongs is not None:
            own = {kind: {k: v for k, v in members.items() if belongs(k)} for kind, members in own.items()}
        # Past `nn.Module.__setattr__`, which would register `whole` as a child.
        self.__dict__.update(own, view_name=name, whole=whole, _on_change=on_change)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["whole"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "whole" in self.__dict__:
            setattr(self.whole, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.whole(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> IncompatibleKeys:
        """Replace the model's weights for good, such as by those that a trainer saved; they are kept where the old ones
        were.

        Works on weights that are streamed, held as FP8 or left in their file too (`loading.state_dict`).

        Args:
            state_dict: tensors by name, with or without a prefix, in any layout of the model.
            strict: refuse names that are missing or unknown.
            assign: accepted; the tensors are always copied, so that they may be changed afterwards.

        Raises:
            ValueError: the tensors do not fit; the weights are as they were then.
        """
        own = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        missing, unexpected = replace_weights(self.whole, state_dict, own=own, strict=strict)
        self._on_change()
        return IncompatibleKeys(missing, unexpected)


class PipelineModels:
    """What scripts do to the models of a pipeline: take one by its name, give it other weights, apply LoRAs."""

    models: LoadedModels

    @property
    def dit(self) -> ModuleView:
        """The video model, without its VACE branch; of a pair of experts the one for high noise."""
        return self._part("dit", 0)

    @property
    def dit2(self) -> ModuleView | None:
        """Of a pair of experts the one for low noise, without its VACE branch; None for other models."""
        return self._part("dit2", 1) if len(self.models.video.experts) > 1 else None

    @property
    def vace(self) -> ModuleView | None:
        """The VACE branch, if the video model has one."""
        return self._part("vace", 0) if self.models.video.config.vace_layers else None

    @property
    def vace2(self) -> ModuleView | None:
        """The VACE branch of the expert for low noise, if there is one."""
        has_branch = self.models.video.config.vace_layers and len(self.models.video.experts) > 1
        return self._part("vace2", 1) if has_branch else None

    def _part(self, name: str, expert: int) -> ModuleView:
        is_branch = name.startswith("vace")
        dit = self.models.video.expert_dit(expert)
        return ModuleView(name, dit, lambda child: (child in VACE_CHILDREN) == is_branch)

    @property
    def motion_controller(self) -> ModuleView | None:
        """The speed-control adapter, if it was loaded."""
        controller = self.models.video.motion_controller
        return None if controller is None else ModuleView("motion_controller", controller)

    @property
    def text_encoder(self) -> ModuleView:
        """The UMT5 encoder."""

        def forget_prompts() -> None:
            self.models = self.models.with_new_text_weights()

        return ModuleView("text_encoder", self.models.text.model, on_change=forget_prompts)

    @property
    def vae(self) -> ModuleView:
        """The video autoencoder."""
        return ModuleView("vae", self.models.vae)

    @property
    def image_encoder(self) -> ModuleView | None:
        """The CLIP image encoder, if it was loaded."""
        return None if self.models.image is None else ModuleView("image_encoder", self.models.image)

    @property
    def tokenizer(self) -> Any:
        return self.models.text.tokenizer

    def load_lora(
        self,
        module: nn.Module,
        lora_config: ModelConfig | str | Path | None = None,
        alpha: float | Sequence[float] | Curve = 1.0,
        hotload: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        verbose: int = 1,
        *,
        path: str | Path | None = None,
    ) -> LoraReport:
        """Apply a LoRA, or a checkpoint of trained weights, in every call from now on; returns what it does.

        Args:
            module: `pipe.dit`, `pipe.vace` or `pipe.motion_controller`, as the reference's scripts name it; the file's
                own names decide which of its tensors go where. Of a pair of experts, the one that it belongs to.
            lora_config: a file in any dialect, or a `ModelConfig` of one. `path` is its older name.
            alpha: its strength, a number or a curve over the steps.
            hotload: accepted; weights are never changed, and `clear_lora` leaves every LoRA out again.
            state_dict: the tensors themselves, in place of a file.
            verbose: 0 leaves the summary out of the log.

        Raises:
            ValueError: `module` is not one that can be adapted, or nothing in the file matches.
        """
        target, video = getattr(module, "whole", module), self.models.video
        if not any(target is part for part in video.modules):
            got = getattr(module, "view_name", "None" if module is None else type(module).__name__)
            names = "pipe.dit, pipe.vace" if len(video.experts) == 1 else "pipe.dit, pipe.dit2, pipe.vace, pipe.vace2"
            raise ValueError(f"A LoRA is applied to {names} or pipe.motion_controller; got {got}.")
        file = lora_config if path is None else path
        if file is not None and state_dict is None:
            lora: str | Path | Lora = _lora_file(file)
        elif state_dict is not None and file is None:
            lora = lora_from_tensors(state_dict)
        else:
            raise ValueError("load_lora needs a file (lora_config) or a state_dict, and not both.")
        number = next((n for n, expert in enumerate(video.experts) if expert.dit is target), None)
        number = number if len(video.experts) > 1 else None
        model, report = video.with_lora(lora, strength=strength("alpha", alpha), expert=number)
        self.models = replace(self.models, video=model)
        if verbose:
            log.info("%s", report.summary)
        return report

    def load_lora_pair(
        self,
        source: str | Path | Sequence[str | Path],
        alpha: float | Sequence[float] | Curve = 1.0,
        alpha_low: float | Sequence[float] | Curve | None = None,
        verbose: int = 1,
    ) -> tuple[LoraReport, LoraReport]:
        """Apply the two LoRAs of a pair, each to its expert, in every call from now on; returns what they do.

        Args:
            source: as of `VideoModel.with_lora_pair`.
            alpha, alpha_low: the strengths of the one for high noise and of the one for low noise, `alpha` if None.
            verbose: as of `load_lora`.

        Raises:
            ValueError: the model has one expert, or as of `load_lora`.
        """
        low = alpha if alpha_low is None else alpha_low
        strengths = (strength("alpha", alpha), strength("alpha_low", low))
        video, reports = self.models.video.with_lora_pair(source, strengths=strengths)
        self.models = replace(self.models, video=video)
        for report in reports if verbose else ():
            log.info("%s", report.summary)
        return reports

    def clear_lora(self, verbose: int = 1) -> None:
        """Leave all LoRAs out again; the weights were never changed. `verbose` 0 keeps that out of the log."""
        if verbose:
            log.info("%d LoRAs are left out from now on.", len(self.models.video.loras))
        self.models = replace(self.models, video=self.models.video.without_loras())


def _lora_file(source: ModelConfig | str | Path) -> str | Path:
    if isinstance(source, ModelConfig):
        files = source.files(redirect_common_files=False)
        if len(files) != 1:
            raise ValueError(f"lora_config names {len(files)} files; name one: {', '.join(f.name for f in files)}.")
        return files[0]
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"lora_config must be a path or a ModelConfig; got {source!r}.")
    return source
