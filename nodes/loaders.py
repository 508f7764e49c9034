"""Loaders of models, encoders and VAEs, from a published checkpoint or a file in ComfyUI's folders."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from wan_core import catalog
from wan_core.loading.detect import Component
from wan_core.loading.download import OnProgress, local_files, redirect
from wan_core.loading.names import ModelKind
from wan_core.model_files import (
    BUNDLED,
    DISK,
    ImageEncoder,
    Offload,
    TextEncoder,
    WanVAE,
    find_files,
    has_tokenizer,
    inspect,
    load_image_encoder,
    load_text_encoder,
    load_vae,
)
from wan_core.offload.formats import WEIGHT_CHOICES, WeightChoice
from wan_core.planning.modules import SizedModule, published_component
from wan_core.runtime import DTYPES, log

from . import host, places, planning, sockets

NONE, AUTO = "none", "auto"
STORAGE_INPUTS = {
    "weights": sockets.choice(
        list(WEIGHT_CHOICES),
        "auto",
        "How the weights of the large layers are stored. auto: as in the file; fp8: in 8 bits, half the memory of "
        "bf16; plain: in dtype.",
    ),
    "rest": sockets.choice(
        ["memory", "disk"],
        "memory",
        "Where weights are kept while they are not on the device. disk: in their file, from which each block is read "
        "when it is needed; for machines with little RAM.",
    ),
}


def choose_dtype(name: str, component: Component) -> torch.dtype:
    """`auto`: bfloat16 on an accelerator that has it, else float16; on a CPU float32 if the file is, else bfloat16."""
    device = host.current.device()
    if name != "auto":
        dtype = DTYPES[name]
        if dtype == torch.float16 and device.type == "cpu":
            log.warning("fp16 is a hundred times slower than bf16 on a CPU; using bf16.")
            return torch.bfloat16
        return dtype
    if device.type == "cpu":
        return torch.float32 if component.dtype == torch.float32 else torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16


def offload_of(weights: WeightChoice, rest: str) -> Offload:
    """The widgets `weights` and `rest` as settings."""
    return Offload.on(DISK if rest == "disk" else host.current.offload_device(), weights=weights)


class Loader:
    """The base of the loaders: a list of local files and catalog rows, checked before a prompt starts.

    ComfyUI repeats what a VALIDATE_INPUTS answers for each input that it takes, so that takes the name alone, and files
    that are absent are told when the node runs. CHECK_INPUTS, which the headless command asks, tells them before.

    Attributes:
        INPUT: the name of the list.
        KIND: of the models in it.
        FOLDER: the folder below ComfyUI's models folder whose files it lists.
        ROWS: the published models in it, with the pattern of each model's files: two for a pair of experts.
        SIZES: how large their files are.
    """

    CATEGORY = "WanCore/loaders"
    FUNCTION = "load"
    INPUT: str
    KIND: ModelKind
    FOLDER: str
    ROWS: ClassVar[Mapping[str, tuple[str, ...]]]
    SIZES: ClassVar[Mapping[str, str]]

    @classmethod
    def local(cls) -> list[str]:
        """The entries for files in ComfyUI's folders."""
        return host.current.list_files(cls.FOLDER)

    @classmethod
    def choices(cls) -> list[str]:
        """What is on this disk first, then published models to fetch, and the bundled ones last."""
        absent = cls.labels()
        here = [name for name in cls.ROWS if name not in absent and name not in BUNDLED]
        return [*cls.local(), *here, *absent, *(name for name in cls.ROWS if name in BUNDLED)]

    @classmethod
    def labels(cls) -> dict[str, str]:
        """What the editor shows for published models that are not on this disk."""
        root = host.current.models_dir()
        return {
            name: f"{name} (download, {cls.SIZES[name]})"
            for name, patterns in cls.ROWS.items()
            if name not in BUNDLED and not all(local_files(root, *redirect(name, each, root)) for each in patterns)
        }

    @classmethod
    def stand_ins(cls) -> dict[str, str]:
        """The bundled model in place of each published one; the editor lists that of the chosen model only."""
        return {name: cls.tiny({cls.INPUT: name})[cls.INPUT] for name in cls.ROWS if name not in BUNDLED}

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of the bundled model that takes the place of `inputs`."""
        return {cls.INPUT: catalog.TINY, "download": False}

    @classmethod
    def shared_inputs(cls, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The drop-down list, and the widgets that follow the loader's own."""
        kind, options = sockets.choice(
            cls.choices(),
            next(iter(cls.ROWS)),
            f"{what}: a published model (looked for under models/<org>/<repo>), or a file in models/{cls.FOLDER}.",
        )
        listed = kind, {**options, "wancore_labels": cls.labels(), "wancore_tiny": cls.stand_ins()}
        dtype = sockets.choice(["auto", *DTYPES], "auto", "Data type to compute in. auto: bf16 where the card has it.")
        download = sockets.flag(False, "Fetch a published model from ModelScope when it is not on this machine.")
        return {cls.INPUT: listed}, {"dtype": dtype, "download": download}

    @classmethod
    def files(cls, name: str, download: bool, on_download: OnProgress | None = None) -> list[list[Path]]:
        """The local files behind an entry of the list, by model: of a pair of experts the one for high noise first.

        Raises:
            ValueError: the entry is unknown, or its files are absent and may not be downloaded.
        """
        if name not in cls.ROWS:
            return [[places.model_file(cls.FOLDER, name)]]
        folder = host.current.models_dir()
        return [
            find_files(name, pattern, models_dir=folder, skip_download=not download, on_download=on_download)
            for pattern in cls.ROWS[name]
        ]

    @classmethod
    def inspected(cls, found: list[list[Path]]) -> list[Component]:
        """What the models of an entry are, by the headers of their files.

        Raises:
            ValueError: one is of another kind, broken or incomplete, or they do not belong together.
        """
        return [inspect(files, cls.KIND) for files in found]

    @classmethod
    def fitting(cls, name: str) -> list[str]:
        """Entries for files in ComfyUI's folders whose models have the structure of the published model `name`."""
        wanted, found = [component.config for component in cls.published(name)], []
        for each in cls.local():
            with contextlib.suppress(ValueError, OSError):
                if [component.config for component in cls.inspected(cls.files(each, False))] == wanted:
                    found.append(each)
        return found

    @classmethod
    def remedy(cls, name: str) -> str:
        """What to do where the files of the published model `name` are not on this machine."""
        fitting = cls.fitting(name)
        own = f" {fitting[0]} in models/{cls.FOLDER} would fit: choose it in {cls.INPUT}." if fitting else ""
        tiny = cls.stand_ins()[name]
        return (
            f"{own} Set download to true, an advanced input of this node, to fetch it; or choose {tiny} here, and "
            "the WanCore/tiny model in the other loaders, to try the graph without files."
        )

    @classmethod
    def check(cls, name: str, download: bool) -> bool | str:
        """True, or what is wrong with an entry, from its header; files that have to be downloaded are checked later."""
        if name not in cls.choices():
            return f"Value not in list: {cls.INPUT}: {name!r}. Known: {', '.join(cls.choices())}"
        if name in BUNDLED:
            return True
        try:
            cls.inspected(cls.files(name, False))
        except ValueError as error:
            if download and name in cls.ROWS:
                return True
            return f"{error}{cls.remedy(name) if name in cls.ROWS else ''}"
        return True

    @classmethod
    def fingerprint(cls, name: str, download: bool) -> str:
        """A text that changes when the files behind an entry do."""
        try:
            files = [file for group in cls.files(name, False) for file in group]
        except ValueError:
            return f"{name}, absent"
        return ";".join(f"{f}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)

    @classmethod
    def published(cls, name: str) -> list[Component]:
        """What a published model is, without its files."""
        return [published_component(cls.KIND, name)]

    @classmethod
    def describe(cls, name: str) -> list[tuple[Component, str]]:
        """What the models of an entry are, by their headers; if files are not on this machine, by the published model,
        with the names of the missing files.

        Raises:
            ValueError: a file is broken, or it is missing and not a published model.
        """
        if name in cls.ROWS and name in BUNDLED:
            return [(component, "") for component in cls.published(name)]
        try:
            found = cls.files(name, False)
        except ValueError as error:
            if name not in cls.ROWS:
                raise
            log.debug("%s", error)
            absent = [f"{name}/{pattern}" for pattern in cls.ROWS[name]]
            return list(zip(cls.published(name), absent, strict=True))
        return [(component, "") for component in cls.inspected(found)]

    def components(self, name: str, download: bool) -> list[Component]:
        """What the models of an entry are; downloads them first when that is allowed."""
        report = host.current.runtime(torch.float32).on_progress
        try:
            found = self.files(
                name, download, lambda file, done, total: report(f"Downloading {file}", done, total, None)
            )
        except ValueError as error:
            if name not in self.ROWS or download:
                raise
            raise ValueError(f"{error}{self.remedy(name)}") from error
        return self.inspected(found)

    def component(self, name: str, download: bool) -> Component:
        """As `components`, of an entry that is one model."""
        (component,) = self.components(name, download)
        return component


class EncoderLoader(Loader):
    """A loader of an encoder or a VAE, called `LABEL` in its tooltip, with the widgets `OWN_INPUTS`."""

    LABEL: str
    OWN_INPUTS: ClassVar[Mapping[str, sockets.Declaration]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        listed, shared = cls.shared_inputs(cls.LABEL)
        return {"required": listed, "optional": {**shared, **cls.OWN_INPUTS}}

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[SizedModule]:
        ((component, absent),) = cls.describe(inputs[cls.INPUT])
        return (planning.plan_module(component, absent, **inputs),)

    @classmethod
    def IS_CHANGED(cls, download: bool = False, **inputs: Any) -> str:
        return cls.fingerprint(inputs[cls.INPUT], download)


def tokenizer_folder(text_encoder: Component, download: bool) -> Path | None:
    """The folder of the tokenizer; None where the file contains one, as ComfyUI's repacks do and the authors' .pth not.

    Raises:
        ValueError: it is absent, and may not be downloaded.
    """
    if has_tokenizer(text_encoder):
        return None
    folder, skip = host.current.models_dir(), not download
    files = find_files(catalog.T2V_BASE, catalog.TOKENIZER_PATTERN, models_dir=folder, skip_download=skip)
    return files[0].parent


class TextEncoderLoader(EncoderLoader):
    """UMT5 with its tokenizer."""

    INPUT, KIND, FOLDER = "text_encoder", "text_encoder", "text_encoders"
    LABEL, OWN_INPUTS = "The text encoder", STORAGE_INPUTS
    ROWS = dict.fromkeys((catalog.T2V_BASE, catalog.TINY), (catalog.TEXT_ENCODER_PATTERN,))
    SIZES: ClassVar[Mapping[str, str]] = {catalog.T2V_BASE: "11.4 GB"}
    DESCRIPTION = "Load the UMT5-XXL text encoder that all Wan models share."
    RETURN_TYPES = (sockets.TEXT_ENCODER,)
    RETURN_NAMES = ("text_encoder",)
    OUTPUT_TOOLTIPS = ("The text encoder, for the prompt.",)

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoder: str) -> bool | str:
        return cls.check(text_encoder, True)

    @classmethod
    def CHECK_INPUTS(cls, text_encoder: str, download: bool = False) -> bool | str:
        return cls.check(text_encoder, download)

    def load(
        self,
        text_encoder: str,
        dtype: str = "auto",
        download: bool = False,
        weights: WeightChoice = "auto",
        rest: str = "memory",
    ) -> tuple[TextEncoder]:
        component = self.component(text_encoder, download)
        compute, tokenizer = choose_dtype(dtype, component), tokenizer_folder(component, download)
        return (load_text_encoder(component, tokenizer, compute, offload_of(weights, rest)),)


class VAELoader(EncoderLoader):
    """A Wan video autoencoder."""

    INPUT, KIND, FOLDER = "vae", "vae", "vae"
    LABEL = "The VAE"
    ROWS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        catalog.T2V_BASE: (catalog.VAE_PATTERN,),
        catalog.TI2V_BASE: (catalog.VAE_22_PATTERN,),
        catalog.TINY: (catalog.VAE_PATTERN,),
        catalog.TINY_TI2V: (catalog.VAE_22_PATTERN,),
    }
    SIZES: ClassVar[Mapping[str, str]] = {catalog.T2V_BASE: "0.5 GB", catalog.TI2V_BASE: "2.8 GB"}
    DESCRIPTION = (
        "Load a video autoencoder: that of Wan 2.1, which the A14B models of Wan 2.2 share, or that of Wan 2.2 for its "
        "5B models."
    )
    RETURN_TYPES = (sockets.VAE,)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The autoencoder, for encoding and decoding.",)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The bundled VAE of the same latents."""
        is_22 = "2.2" in str(inputs.get("vae", ""))
        return {"vae": catalog.TINY_TI2V if is_22 else catalog.TINY, "download": False}

    @classmethod
    def VALIDATE_INPUTS(cls, vae: str) -> bool | str:
        return cls.check(vae, True)

    @classmethod
    def CHECK_INPUTS(cls, vae: str, download: bool = False) -> bool | str:
        return cls.check(vae, download)

    def load(self, vae: str, dtype: str = "auto", download: bool = False) -> tuple[WanVAE]:
        component = self.component(vae, download)
        return (load_vae(component, choose_dtype(dtype, component), host.current.offload_device()),)


class ImageEncoderLoader(EncoderLoader):
    """CLIP's vision tower."""

    INPUT, KIND, FOLDER = "image_encoder", "image_encoder", "clip_vision"
    LABEL, OWN_INPUTS = "The image encoder", STORAGE_INPUTS
    ROWS = dict.fromkeys((catalog.IMAGE_ENCODER_SOURCE, catalog.TINY), (catalog.IMAGE_ENCODER_PATTERN,))
    SIZES: ClassVar[Mapping[str, str]] = {catalog.IMAGE_ENCODER_SOURCE: "4.8 GB"}
    DESCRIPTION = (
        "Load the CLIP image encoder (ViT-H/14) that image, control and camera models of Wan 2.1 read pictures with. "
        "Models of Wan 2.2 need none."
    )
    RETURN_TYPES = (sockets.IMAGE_ENCODER,)
    RETURN_NAMES = ("image_encoder",)
    OUTPUT_TOOLTIPS = ("The image encoder, for start, end and reference images.",)

    @classmethod
    def VALIDATE_INPUTS(cls, image_encoder: str) -> bool | str:
        return cls.check(image_encoder, True)

    @classmethod
    def CHECK_INPUTS(cls, image_encoder: str, download: bool = False) -> bool | str:
        return cls.check(image_encoder, download)

    def load(
        self,
        image_encoder: str,
        dtype: str = "auto",
        download: bool = False,
        weights: WeightChoice = "auto",
        rest: str = "memory",
    ) -> tuple[ImageEncoder]:
        component = self.component(image_encoder, download)
        compute = choose_dtype(dtype, component)
        return (load_image_encoder(component, compute, offload_of(weights, rest)),)
