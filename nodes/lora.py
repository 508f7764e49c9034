"""LoRA loader, info and save: each gives a new handle, text or a new file; the loaded model is not changed."""

import re
from typing import Any

from wan_core.atomic import numbered_paths
from wan_core.loading.pairs import expand, find_pairs
from wan_core.lora.apply import LORA_MODES, LoraMode
from wan_core.lora.bind import BlockStrengths
from wan_core.lora.convert import LoraFormat, convert
from wan_core.lora.report import LoraReport
from wan_core.lora.target import lora_file_report, lora_report, open_lora, use_lora
from wan_core.lora.write import FORMATS
from wan_core.model import VideoModel
from wan_core.runtime import DTYPES, log
from wan_core.types import Curve

from . import host, planning, sockets
from .loaders import NONE
from .places import model_file, plain_name

FOLDER = "loras"
NO_FILES = f"no files in models/{FOLDER}"
LIMIT = 10.0
"""Largest strength of the widget; distilled LoRAs are used near 1, sliders up to 5."""
SAME = -100.0
"""`strength_low` that stands for `strength`."""


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


def _lora_choice(tooltip: str, *, pairs: bool = False) -> sockets.Declaration:
    files = host.current.list_files(FOLDER)
    names = [*(find_pairs(files) if pairs else ()), *files] or [NO_FILES]
    return sockets.choice([*names, NONE] if pairs else names, names[0], tooltip)


def _fingerprint(*names: str) -> str:
    """Changes when one of the files does."""
    listed = host.current.list_files(FOLDER)
    files = [file for name in names for file in expand(name) if file in listed]
    stats = [(name, host.current.model_path(FOLDER, name).stat()) for name in files]
    return ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)


def _check(name: str) -> bool | str:
    if not set(expand(name)) <= set(host.current.list_files(FOLDER)):
        return f"Value not in list: lora: {name!r}. Put LoRA files into models/{FOLDER}."
    return True


class LoraLoader:
    """A LoRA on a model."""

    CATEGORY = "WanCore/lora"
    FUNCTION = "load"
    DESCRIPTION = (
        "Add a LoRA of any format to a model; chain several. The loaded model is shared and not changed: each "
        "sampler applies its own LoRAs while it runs. Fine-tuned checkpoints and motion controllers also load here."
    )
    RETURN_TYPES = (sockets.MODEL, "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model with the LoRA, for the sampler.", "What was found in the file and what it changes.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader or another LoRA loader."),
                "lora": _lora_choice(
                    f"A LoRA or a trained checkpoint in models/{FOLDER}; {{high,low}} stands for both files of a pair, "
                    f"{NONE} for no LoRA.",
                    pairs=True,
                ),
                "strength": sockets.number(1.0, -LIMIT, LIMIT, "Factor on the change; 0 leaves it out.", step=0.05),
            },
            "optional": {
                "strength_curve": sockets.line(
                    "",
                    "Factors over the steps, such as '1, 0.5, 0', or '1 @ 0-0.5' for the first half. Empty: constant.",
                ),
                "blocks": sockets.line(
                    "",
                    "Blocks that it changes, such as '0-9, 20-29=0.5, other=1' (other: outside of blocks). Empty: all.",
                ),
                "mode": sockets.choice(
                    list(LORA_MODES),
                    "auto",
                    "fold changes the weights during a run, side computes beside them (exact on FP8); auto chooses.",
                ),
                "strength_low": sockets.number(
                    SAME,
                    SAME,
                    LIMIT,
                    f"Of a pair, the strength of the LoRA for low noise. {SAME:g}: as strength.",
                    step=0.05,
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str, strength_curve: str = "", blocks: str = "") -> bool | str:
        message = sockets.true_or_message(lambda: _parse(1.0, strength_curve, blocks))
        return _check(lora) if message is True and lora != NONE else message

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        return _fingerprint(lora)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """No LoRA: those that are published do not fit the bundled models."""
        return {"lora": NONE}

    @classmethod
    def plan_outputs(cls, model: Any, lora: str, strength: Any, **_: Any) -> tuple[planning.PlannedModel, None]:
        """Planned as if it changed every block during the whole run: an upper bound for any curve and blocks."""
        handle = planning.require(planning.PlannedModel, "model", model)
        paths = [] if lora == NONE else [model_file(FOLDER, file) for file in expand(lora)]
        for number, path in enumerate(paths):
            handle = handle.with_lora(path, strength, expert=number if len(paths) > 1 else None)
        return handle, None

    def load(
        self,
        model: VideoModel,
        lora: str,
        strength: float = 1.0,
        strength_curve: str = "",
        blocks: str = "",
        mode: LoraMode = "auto",
        strength_low: float = SAME,
    ) -> tuple[VideoModel, str]:
        curve, by_block = _parse(strength, strength_curve, blocks)
        if lora == NONE:
            return model, "No LoRA."
        paths = [model_file(FOLDER, file) for file in expand(lora)]
        if len(paths) == 1:
            changed, report = model.with_lora(paths[0], strength=curve, blocks=by_block, mode=mode)
            reports: tuple[LoraReport, ...] = (report,)
        else:
            low, _ = _parse(strength if strength_low == SAME else strength_low, strength_curve, blocks)
            changed, reports = model.with_lora_pair(paths, strengths=(curve, low), blocks=by_block, mode=mode)
        for each in reports:
            log.info("%s", each.summary)
        return changed, "\n\n".join(map(str, reports))


def _parse(strength: float, curve: str, blocks: str) -> tuple[Curve, BlockStrengths]:
    return strength_curve(strength, curve), BlockStrengths.parse(blocks)


class LoraInfo:
    """What a LoRA file is."""

    CATEGORY = "WanCore/lora"
    FUNCTION = "describe"
    OUTPUT_NODE = True
    DESCRIPTION = "Describe a LoRA file: format, rank, alpha, keys; with a model also what it would change."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The report as text.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"lora": _lora_choice(f"A LoRA or a trained checkpoint in models/{FOLDER}.")},
            "optional": {"model": sockets.socket(sockets.MODEL, "A model to match it with.")},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora: str) -> bool | str:
        return _check(lora)

    @classmethod
    def IS_CHANGED(cls, lora: str, **_: Any) -> str:
        return _fingerprint(lora)

    def describe(self, lora: str, model: VideoModel | None = None) -> dict[str, Any]:
        path = model_file(FOLDER, lora)
        if model is None:
            text = str(lora_file_report(open_lora(path)))
        else:
            target = model.target()
            text = str(lora_report(use_lora(path, target), target, model.loras))
        return {"ui": {"text": [text]}, "result": (text,)}


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
                "lora": _lora_choice("The LoRA to convert."),
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
        checks = [sockets.true_or_message(lambda: plain_name("filename", filename)), _check(lora)]
        if second_lora != "none":
            checks.append(_check(second_lora))
        return next((message for message in checks if message is not True), True)

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
        sources = [(model_file(FOLDER, lora), strength)]
        if second_lora != "none":
            sources.append((model_file(FOLDER, second_lora), second_strength))
        out = numbered_paths(host.current.output_dir() / FOLDER, plain_name("filename", filename), ".safetensors")
        text = str(convert(sources, out, LoraFormat(format, dtype), rank=rank or None))
        return {"ui": {"text": [text]}, "result": (text,)}
