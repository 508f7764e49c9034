"""LoRA loader, info and save: each gives a new handle, text or a new file, and leaves the loaded base alone."""

import re
from typing import Any

from wan_core.atomic import numbered_paths
from wan_core.lora.apply import LORA_MODES, LoraMode
from wan_core.lora.bind import BlockStrengths
from wan_core.lora.convert import LoraFormat, convert
from wan_core.lora.target import lora_file_report, lora_report, open_lora, use_lora
from wan_core.lora.write import FORMATS
from wan_core.model import VideoModel
from wan_core.runtime import DTYPES, log
from wan_core.types import Curve

from . import host, planning, sockets
from .places import plain_name

FOLDER = "loras"
NO_FILES = f"no files in models/{FOLDER}"
LIMIT = 10.0
"""Largest strength that can be typed; distilled LoRAs are used near 1, sliders up to 5."""


def strength_curve(strength: float, text: str) -> Curve:
    """`strength` times the curve in `text`: numbers spread over the steps, then perhaps `@ 0.2-0.8` for a part of them.

    Raises:
        ValueError: the text holds something else.
    """
    if not text.strip():
        return Curve((strength,))
    numbers, sign, part = text.partition("@")
    bounds = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*-\s*(\d+\.?\d*|\.\d+)\s*", part if sign else "0-1")
    try:
        values = tuple(strength * float(number) for number in re.split(r"[,;\s]+", numbers.strip(" ,;\n\t")))
    except ValueError:
        values = ()
    if not values or not bounds:
        raise ValueError(
            f"A strength curve is a list of numbers such as '1, 0.5, 0', perhaps with the part of the run that it "
            f"covers: '1, 0 @ 0-0.5'; got {text!r:.200}."
        )
    return Curve(values, float(bounds[1]), float(bounds[2]))


def _listed(tooltip: str) -> sockets.Declaration:
    files = host.current.list_files(FOLDER) or [NO_FILES]
    return sockets.choice(files, files[0], tooltip)


def _fingerprint(*names: str) -> str:
    """Changes when one of the files does."""
    listed = host.current.list_files(FOLDER)
    stats = [(name, host.current.find_file(FOLDER, name).stat()) for name in names if name in listed]
    return ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def _check(name: str) -> bool | str:
    if name not in host.current.list_files(FOLDER):
        return f"Value not in list: lora: {name!r}. Put LoRA files into models/{FOLDER}."
    return True


class LoraLoader:
    """One LoRA more on a model."""

    CATEGORY = "WanCore/lora"
    FUNCTION = "load"
    DESCRIPTION = (
        "Add a LoRA of any dialect to a model; chain several. The loaded model is shared and stays as it is: each "
        "sampler applies its own LoRAs while it runs. Fine-tuned checkpoints and motion controllers load here, too."
    )
    RETURN_TYPES = (sockets.MODEL, "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model with the LoRA, for the sampler.", "What was found in the file and what it changes.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader or another LoRA loader."),
                "lora": _listed(f"A LoRA or a trained checkpoint in models/{FOLDER}."),
                "strength": sockets.number(1.0, -LIMIT, LIMIT, "Factor on the change; 0 leaves it out.", step=0.05),
            },
            "optional": {
                "strength_curve": sockets.line(
                    "",
                    "Factors over the steps, such as '1, 0.5, 0', or '1 @ 0-0.5' for the first half. Empty: constant.",
                ),
                "blocks": sockets.line(
                    "",
                    "Blocks it may change, such as '0-9, 20-29=0.5, other=1' (other: outside of blocks). Empty: all.",
                ),
                "mode": sockets.choice(
                    list(LORA_MODES),
                    "auto",
                    "fold changes the weights during a run, side computes beside them (exact on FP8); auto chooses.",
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str, strength_curve: str = "", blocks: str = "") -> bool | str:
        try:
            _parsed(1.0, strength_curve, blocks)
        except ValueError as error:
            return str(error)
        return _check(lora)

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        return _fingerprint(lora)

    @classmethod
    def planned(cls, model: Any, lora: str, strength: Any, **_: Any) -> tuple[planning.PlannedModel, None]:
        """As if it changed every block for the whole run, whatever its curve and its blocks say."""
        handle = planning.known(planning.PlannedModel, "model", model)
        return handle.with_lora(host.current.find_file(FOLDER, lora), strength), None

    def load(
        self,
        model: VideoModel,
        lora: str,
        strength: float = 1.0,
        strength_curve: str = "",
        blocks: str = "",
        mode: LoraMode = "auto",
    ) -> tuple[VideoModel, str]:
        curve, by_block = _parsed(strength, strength_curve, blocks)
        path = host.current.find_file(FOLDER, lora)
        changed, told = model.with_lora(path, strength=curve, blocks=by_block, mode=mode)
        log.info("%s", told.summary)
        return changed, str(told)


def _parsed(strength: float, curve: str, blocks: str) -> tuple[Curve, BlockStrengths]:
    return strength_curve(strength, curve), BlockStrengths.parse(blocks)


class LoraInfo:
    """What a LoRA file is."""

    CATEGORY = "WanCore/lora"
    FUNCTION = "tell"
    OUTPUT_NODE = True
    DESCRIPTION = "Say what a LoRA file is and, with a model, what it would change: dialect, rank, alpha, keys, effect."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The report as text.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"lora": _listed(f"A LoRA or a trained checkpoint in models/{FOLDER}.")},
            "optional": {"model": sockets.socket(sockets.MODEL, "A model to match it with.")},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str) -> bool | str:
        return _check(lora)

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        return _fingerprint(lora)

    def tell(self, lora: str, model: VideoModel | None = None) -> dict[str, Any]:
        path = host.current.find_file(FOLDER, lora)
        if model is None:
            told = lora_file_report(open_lora(path))
        else:
            target = model.target()
            told = lora_report(use_lora(path, target), target, model.loras)
        return {"ui": {"text": [str(told)]}, "result": (str(told),)}


class LoraSave:
    """A new LoRA file from one or two."""

    CATEGORY = "WanCore/lora"
    FUNCTION = "save"
    OUTPUT_NODE = True
    DESCRIPTION = "Convert a LoRA to the names of another program, or merge two into one; written to output/loras."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The path of the new file, and what is in it.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "lora": _listed("The LoRA to convert."),
                "strength": sockets.number(1.0, -LIMIT, LIMIT, "Multiplied into the new file.", step=0.05),
                "filename": sockets.line("WanCore", "Name of the new file; a number is added to it."),
            },
            "optional": {
                "format": sockets.choice(
                    [name for name in FORMATS if name != "peft"],
                    "comfyui",
                    "Whose names to write; every program reads comfyui's.",
                ),
                "dtype": sockets.choice(list(DTYPES), "bf16", "How to store it."),
                "rank": sockets.whole(0, 0, 4096, "Cut the result to this rank. 0 keeps it exact."),
                "second_lora": (
                    ["none", *host.current.list_files(FOLDER)],
                    {"default": "none", "tooltip": "A LoRA to merge with the first."},
                ),
                "second_strength": sockets.number(1.0, -LIMIT, LIMIT, "Strength of the second LoRA.", step=0.05),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str, filename: str, second_lora: str = "none") -> bool | str:
        try:
            plain_name("filename", filename)
        except ValueError as error:
            return str(error)
        return _check(lora) if second_lora == "none" or (ok := _check(second_lora)) is True else ok

    @classmethod
    def IS_CHANGED(cls, lora: str, second_lora: str = "none", **_: Any) -> str:
        return _fingerprint(lora, second_lora)

    def save(
        self,
        lora: str,
        strength: float,
        filename: str,
        format: str = "comfyui",
        dtype: str = "bf16",
        rank: int = 0,
        second_lora: str = "none",
        second_strength: float = 1.0,
    ) -> dict[str, Any]:
        sources = [(host.current.find_file(FOLDER, lora), strength)]
        if second_lora != "none":
            sources.append((host.current.find_file(FOLDER, second_lora), second_strength))
        out = numbered_paths(host.current.output_dir() / FOLDER, plain_name("filename", filename), ".safetensors")
        told = str(convert(sources, out, LoraFormat(format, dtype), rank=rank or None))
        return {"ui": {"text": [told]}, "result": (told,)}
