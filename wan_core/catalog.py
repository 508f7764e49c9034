"""The published checkpoints: where their files are and what their authors recommend.

A row says what is recommended, never what a file is: that is read from the file (`variants`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .models.config import DiTConfig

DIT_FILE = "diffusion_pytorch_model.safetensors"
DIT_PATTERN = "diffusion_pytorch_model*.safetensors"
TEXT_ENCODER_PATTERN = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_PATTERN = "Wan2.1_VAE.pth"
IMAGE_ENCODER_PATTERN = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_PATTERN = "google/umt5-xxl/"
MOTION_CONTROLLER_PATTERN = "model.safetensors"

T2V_BASE = "Wan-AI/Wan2.1-T2V-1.3B"
IMAGE_ENCODER_SOURCE = "Wan-AI/Wan2.1-I2V-14B-480P"
SPEED_CONTROL = "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1"
TINY = "WanCore/tiny"

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The authors' default (Wan-Video/Wan2.1 wan/configs/shared_config.py)."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The authors' settings for a checkpoint; `teacache` names a template of skip coefficients."""

    steps: int = 50
    cfg: float = 5.0
    shift: float = 5.0
    width: int = 832
    height: int = 480
    num_frames: int = 81
    negative_prompt: str = NEGATIVE_PROMPT
    teacache: str | None = None


@dataclass(frozen=True, kw_only=True)
class CatalogRow:
    """One published checkpoint.

    Attributes:
        model_id: on ModelScope; also the folder under the models folder.
        huggingface_id: on Hugging Face, where it differs.
        variant: the structure its file is expected to have.
        size: "1.3B" or "14B".
        files: patterns of the files that are its own: the DiT, or an adapter for the model `base`.
        base: the row whose DiT this one is an adapter for.
        needs_image_encoder: whether CLIP image tokens are among its inputs.
    """

    model_id: str
    huggingface_id: str
    variant: str
    size: str
    preset: Preset
    files: tuple[str, ...] = (DIT_PATTERN,)
    base: str | None = None
    needs_image_encoder: bool = False


# Wan-Video/Wan2.1 generate.py and README for steps, cfg and shift; VideoX-Fun's examples for the Fun rows; TeaCache
# templates by the sizes they were fitted on, with the nearest one for the rows that their authors do not list.
_T2V_S = Preset(cfg=6.0, shift=8.0, teacache="Wan2.1-T2V-1.3B")
_T2V_L = Preset(teacache="Wan2.1-T2V-14B")
_I2V_480 = Preset(steps=40, shift=3.0, negative_prompt="镜头晃动，" + NEGATIVE_PROMPT, teacache="Wan2.1-I2V-14B-480P")
_I2V_720 = replace(_I2V_480, shift=5.0, width=1280, height=720, teacache="Wan2.1-I2V-14B-720P")
_FLF2V = replace(_I2V_720, steps=50, cfg=5.5, shift=16.0, negative_prompt="镜头切换，" + NEGATIVE_PROMPT)
_FUN_S = Preset(cfg=6.0, shift=3.0, teacache="Wan2.1-T2V-1.3B")
_FUN_L = Preset(cfg=6.0, shift=3.0, teacache="Wan2.1-I2V-14B-720P")
_VACE_S = Preset(shift=16.0, teacache="Wan2.1-T2V-1.3B")
_VACE_L = replace(_VACE_S, width=1280, height=720, teacache="Wan2.1-I2V-14B-720P")


def _wan(name: str, variant: str, size: str, preset: Preset, *, image: bool = False) -> CatalogRow:
    model_id = f"Wan-AI/Wan2.1-{name}"
    return CatalogRow(
        model_id=model_id, huggingface_id=model_id, variant=variant, size=size, preset=preset, needs_image_encoder=image
    )


def _fun(name: str, variant: str) -> CatalogRow:
    size = "14B" if "14B" in name else "1.3B"
    return CatalogRow(
        model_id=f"PAI/Wan2.1-Fun-{name}",
        huggingface_id=f"alibaba-pai/Wan2.1-Fun-{name}",
        variant=variant,
        size=size,
        preset=_FUN_L if size == "14B" else _FUN_S,
        needs_image_encoder=True,
    )


CATALOG: tuple[CatalogRow, ...] = (
    _wan("T2V-1.3B", "t2v", "1.3B", _T2V_S),
    _wan("T2V-14B", "t2v", "14B", _T2V_L),
    _wan("I2V-14B-480P", "i2v", "14B", _I2V_480, image=True),
    _wan("I2V-14B-720P", "i2v", "14B", _I2V_720, image=True),
    _wan("FLF2V-14B-720P", "flf2v", "14B", _FLF2V, image=True),
    _fun("1.3B-InP", "i2v"),
    _fun("14B-InP", "i2v"),
    _fun("1.3B-Control", "fun_control"),
    _fun("14B-Control", "fun_control"),
    _fun("V1.1-1.3B-Control", "fun_v1_1_control"),
    _fun("V1.1-14B-Control", "fun_v1_1_control"),
    _fun("V1.1-1.3B-InP", "i2v"),
    _fun("V1.1-14B-InP", "i2v"),
    _fun("V1.1-1.3B-Control-Camera", "fun_camera"),
    _fun("V1.1-14B-Control-Camera", "fun_camera"),
    replace(
        _wan("VACE-1.3B-Preview", "vace", "1.3B", _VACE_S),
        model_id="iic/VACE-Wan2.1-1.3B-Preview",
        huggingface_id="ali-vilab/VACE-Wan2.1-1.3B-Preview",
    ),
    _wan("VACE-1.3B", "vace", "1.3B", _VACE_S),
    _wan("VACE-14B", "vace", "14B", _VACE_L),
    CatalogRow(
        model_id=SPEED_CONTROL,
        huggingface_id=SPEED_CONTROL,
        variant="t2v",
        size="1.3B",
        preset=_T2V_S,
        files=(MOTION_CONTROLLER_PATTERN,),
        base=T2V_BASE,
    ),
)


def tiny_id(variant: str) -> str:
    """The id of the bundled model of that structure."""
    return TINY if variant == "t2v" else f"{TINY}-{variant.replace('_', '-')}"


TINY_ROWS: tuple[CatalogRow, ...] = tuple(
    CatalogRow(
        model_id=tiny_id(variant),
        huggingface_id=tiny_id(variant),
        variant=variant,
        size="tiny",
        preset=Preset(steps=4, width=96, height=64, num_frames=9, negative_prompt="", teacache="Wan2.1-T2V-1.3B"),
        needs_image_encoder=variant not in ("t2v", "vace"),
    )
    for variant in dict.fromkeys(row.variant for row in CATALOG)
)
"""Models of random weights that this pack makes by itself, one of each structure. They draw abstract patterns, and let
every workflow run anywhere."""

SIZES = {1536: "1.3B", 5120: "14B", 256: "tiny"}
"""Model width to size, of the published models and the bundled ones."""

_WIDTHS: Mapping[str, Mapping[str, Any]] = {"1.3B": {}, "14B": dict(dim=5120, ffn_dim=13824, num_layers=40)}
_PARTS: Mapping[str, Mapping[str, Any]] = {
    "t2v": {},
    "i2v": dict(in_channels=36, has_image_input=True),
    "flf2v": dict(in_channels=36, has_image_input=True, image_positions=514),
    "fun_control": dict(in_channels=48, has_image_input=True),
    "fun_v1_1_control": dict(in_channels=48, has_image_input=True, has_reference=True),
    "fun_camera": dict(in_channels=32, has_image_input=True, camera_channels=24),
    "vace": dict(vace_channels=96),
}
_VACE_LAYERS = {"1.3B": tuple(range(0, 30, 2)), "14B": tuple(range(0, 40, 5))}


def published_config(row: CatalogRow) -> DiTConfig:
    """What the file of a published row holds, of an adapter's row that of its base: to plan with before it is there."""
    layers = _VACE_LAYERS[row.size] if row.variant == "vace" else ()
    return DiTConfig(**_WIDTHS[row.size], **_PARTS[row.variant], vace_layers=layers)


def find_row(model_id: str) -> CatalogRow | None:
    """The row of that id, or None."""
    return next((row for row in (*CATALOG, *TINY_ROWS) if row.model_id == model_id), None)


HINTS = ("fun", "inp", "480", "720", "v1.1", "preview")
"""Words in names that tell apart checkpoints of one structure and size."""


def guess_row(name: str, variant: str, size: str) -> CatalogRow | None:
    """The row that a file or folder called `name` most likely comes from, among those of its structure and size.

    An id inside the name settles it, else the words of `HINTS` do; with none of them the first row counts. The row only
    recommends settings.
    """
    name = name.lower()
    rows = [row for row in (*CATALOG, *TINY_ROWS) if (row.variant, row.size) == (variant, size) and not row.base]
    found = _hints(name)
    by_id = [row for row in rows if row.model_id.lower() in name]
    return max(by_id or rows, key=lambda row: -len(_hints(row.model_id.lower()) ^ found), default=None)


def _hints(name: str) -> set[str]:
    return {hint for hint in HINTS if hint in name}
