"""The published checkpoints: where their files are and what their authors recommend.

A row says what is recommended, never what a file is: that is read from the file (`variants`).
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

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


Task = Literal["text", "image", "first_last", "control", "control_reference", "camera", "vace", "speed"]
"""What a video is made from. The shipped workflows and the training recipes have one row for each."""

HUGGINGFACE_ORGANISATIONS = {"PAI": "alibaba-pai", "iic": "ali-vilab"}
"""From ModelScope's name of an organisation to Hugging Face's, where they differ."""


@dataclass(frozen=True)
class CatalogRow:
    """One published checkpoint: all that the pack knows of it by its name.

    Attributes:
        model_id: on ModelScope; also the folder under the models folder.
        variant: the structure its file is expected to have, a row of `variants.VARIANTS`.
        size: "1.3B" or "14B".
        preset: the settings that its authors recommend.
        task: what it is published for.
        workflow: the name of its shipped workflow.
        repacked: the single file of it that Comfy-Org offers, without its ending (comfyui-workflow-templates and
            docs.comfy.org link them); None when there is none.
        files: patterns of the files that are its own: the DiT, or an adapter for the model `base`.
        base: the row whose DiT this one is an adapter for.
        training: settings of the trainer that differ from those of the task's recipe, by mode ("full" or "lora").
    """

    model_id: str
    variant: str
    size: str
    preset: Preset
    task: Task
    workflow: str
    repacked: str | None = None
    _: KW_ONLY
    files: tuple[str, ...] = (DIT_PATTERN,)
    base: str | None = None
    training: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def huggingface_id(self) -> str:
        organisation, _, name = self.model_id.partition("/")
        return f"{HUGGINGFACE_ORGANISATIONS.get(organisation, organisation)}/{name}"

    @property
    def short_name(self) -> str:
        """The id without its organisation."""
        return self.model_id.partition("/")[2]

    @property
    def needs_image_encoder(self) -> bool:
        """Whether CLIP image tokens are among its inputs."""
        return bool(_STRUCTURES[self.variant].get("has_image_input"))


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


CATALOG: tuple[CatalogRow, ...] = (
    CatalogRow("Wan-AI/Wan2.1-T2V-1.3B", "t2v", "1.3B", _T2V_S, "text", "t2v_1.3b", "wan2.1_t2v_1.3B_fp16"),
    CatalogRow("Wan-AI/Wan2.1-T2V-14B", "t2v", "14B", _T2V_L, "text", "t2v_14b", "wan2.1_t2v_14B_fp8_scaled"),
    CatalogRow("Wan-AI/Wan2.1-I2V-14B-480P", "i2v", "14B", _I2V_480, "image", "i2v_480p", "wan2.1_i2v_480p_14B_fp16"),
    CatalogRow("Wan-AI/Wan2.1-I2V-14B-720P", "i2v", "14B", _I2V_720, "image", "i2v_720p", "wan2.1_i2v_720p_14B_fp16"),
    CatalogRow(
        "Wan-AI/Wan2.1-FLF2V-14B-720P", "flf2v", "14B", _FLF2V, "first_last", "flf2v_720p",
        "wan2.1_flf2v_720p_14B_fp16",
    ),
    CatalogRow(
        "PAI/Wan2.1-Fun-1.3B-InP", "i2v", "1.3B", _FUN_S, "first_last", "fun_inp_1.3b", "wan2.1_fun_inp_1.3B_bf16"
    ),
    CatalogRow("PAI/Wan2.1-Fun-14B-InP", "i2v", "14B", _FUN_L, "first_last", "fun_inp_14b"),
    CatalogRow(
        "PAI/Wan2.1-Fun-1.3B-Control", "fun_control", "1.3B", _FUN_S, "control", "fun_control_1.3b",
        "wan2.1_fun_control_1.3B_bf16",
    ),
    CatalogRow("PAI/Wan2.1-Fun-14B-Control", "fun_control", "14B", _FUN_L, "control", "fun_control_14b"),
    CatalogRow(
        "PAI/Wan2.1-Fun-V1.1-1.3B-Control", "fun_v1_1_control", "1.3B", _FUN_S, "control_reference",
        "fun_v1.1_control_1.3b",
    ),
    CatalogRow(
        "PAI/Wan2.1-Fun-V1.1-14B-Control", "fun_v1_1_control", "14B", _FUN_L, "control_reference",
        "fun_v1.1_control_14b",
    ),
    CatalogRow("PAI/Wan2.1-Fun-V1.1-1.3B-InP", "i2v", "1.3B", _FUN_S, "first_last", "fun_v1.1_inp_1.3b"),
    CatalogRow("PAI/Wan2.1-Fun-V1.1-14B-InP", "i2v", "14B", _FUN_L, "first_last", "fun_v1.1_inp_14b"),
    CatalogRow(
        "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera", "fun_camera", "1.3B", _FUN_S, "camera", "fun_v1.1_camera_1.3b",
        "wan2.1_fun_camera_v1.1_1.3B_bf16",
    ),
    CatalogRow(
        "PAI/Wan2.1-Fun-V1.1-14B-Control-Camera", "fun_camera", "14B", _FUN_L, "camera", "fun_v1.1_camera_14b",
        "wan2.1_fun_camera_v1.1_14B_bf16",
    ),
    CatalogRow(
        "iic/VACE-Wan2.1-1.3B-Preview", "vace", "1.3B", _VACE_S, "vace", "vace_1.3b_preview",
        training={"full": {"num_frames": 49}},
    ),
    CatalogRow(
        "Wan-AI/Wan2.1-VACE-1.3B", "vace", "1.3B", _VACE_S, "vace", "vace_1.3b", "wan2.1_vace_1.3B_fp16",
        training={"full": {"num_frames": 49}},
    ),
    CatalogRow(
        "Wan-AI/Wan2.1-VACE-14B", "vace", "14B", _VACE_L, "vace", "vace_14b", "wan2.1_vace_14B_fp16",
        training={"full": {"num_frames": 17}, "lora": {"num_frames": 17}},
    ),
    CatalogRow(
        SPEED_CONTROL, "t2v", "1.3B", _T2V_S, "speed", "speed_1.3b", files=(MOTION_CONTROLLER_PATTERN,), base=T2V_BASE
    ),
)  # fmt: skip


def tiny_id(variant: str) -> str:
    """The id of the bundled model of that structure."""
    return TINY if variant == "t2v" else f"{TINY}-{variant.replace('_', '-')}"


_TINY = Preset(steps=4, width=96, height=64, num_frames=9, negative_prompt="", teacache="Wan2.1-T2V-1.3B")
TINY_ROWS: tuple[CatalogRow, ...] = tuple(
    replace(
        next(row for row in CATALOG if row.variant == variant),
        model_id=tiny_id(variant), size="tiny", preset=_TINY, repacked=None,
    )
    for variant in dict.fromkeys(row.variant for row in CATALOG)
)  # fmt: skip
"""Models of random weights that this pack makes by itself, one of each structure, each in place of the first row
of its variant. They draw abstract patterns, and let every workflow run anywhere."""

SIZES = {1536: "1.3B", 5120: "14B", 256: "tiny"}
"""Model width to size, of the published models and the bundled ones."""

_WIDTHS: Mapping[str, Mapping[str, Any]] = {"1.3B": {}, "14B": dict(dim=5120, ffn_dim=13824, num_layers=40)}
_STRUCTURES: Mapping[str, Mapping[str, Any]] = {
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
    return DiTConfig(**_WIDTHS[row.size], **_STRUCTURES[row.variant], vace_layers=layers)


def find_row(model_id: str) -> CatalogRow | None:
    """The row of that id, or None."""
    return next((row for row in (*CATALOG, *TINY_ROWS) if row.model_id == model_id), None)


def published(model_id: str) -> CatalogRow:
    """The row of a published checkpoint, which must be one."""
    return next(row for row in CATALOG if row.model_id == model_id)


HINTS = ("fun", "inp", "480", "720", "v1.1", "preview")
"""Words in file names that distinguish checkpoints of one structure and size."""


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
