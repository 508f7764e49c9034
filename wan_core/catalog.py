"""The published checkpoints: where their files are and what their authors recommend.

A row says what is recommended, never what a file is: that is read from the file (`variants`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

from .models.config import WAN_22 as WAN_22_GEOMETRY
from .models.config import DiTConfig

DIT_FILE = "diffusion_pytorch_model.safetensors"
DIT_PATTERN = "diffusion_pytorch_model*.safetensors"
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
"""Where the two transformers of a pair are in its repository."""
PAIR_PATTERNS = tuple(f"{folder}/{DIT_PATTERN}" for folder in EXPERT_FOLDERS)
TEXT_ENCODER_PATTERN = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_PATTERN = "Wan2.1_VAE.pth"
VAE_22_PATTERN = "Wan2.2_VAE.pth"
VAE_FILES = {16: (VAE_PATTERN, "wan_2.1_vae"), 48: (VAE_22_PATTERN, "wan2.2_vae")}
"""The authors' file and ComfyUI's, without its ending, by the channels of a latent."""
IMAGE_ENCODER_PATTERN = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_PATTERN = "google/umt5-xxl/"
MOTION_CONTROLLER_PATTERN = "model.safetensors"

T2V_BASE = "Wan-AI/Wan2.1-T2V-1.3B"
TI2V_BASE = "Wan-AI/Wan2.2-TI2V-5B"
IMAGE_ENCODER_SOURCE = "Wan-AI/Wan2.1-I2V-14B-480P"
SPEED_CONTROL = "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1"
TINY = "WanCore/tiny"
TINY_TI2V = "WanCore/tiny-ti2v-5b"

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The authors' default (Wan-Video/Wan2.1 wan/configs/shared_config.py)."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The authors' settings for a checkpoint.

    Attributes:
        cfg_low: guidance of the expert for the less noisy timesteps; None where it is `cfg` too.
        solver: a key of `sampling.solvers.SOLVERS`.
        size_rule: how a start image decides the size of the video, a name of `media.fitting.SIZE_RULES`.
        teacache: a template of skip coefficients.
    """

    steps: int = 50
    cfg: float = 5.0
    cfg_low: float | None = None
    shift: float = 5.0
    solver: str = "euler"
    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: float = 16.0
    size_rule: str = "exact"
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
        size: "1.3B", "5B" or "14B", of one transformer.
        preset: the settings that its authors recommend.
        task: what it is published for.
        workflow: the name of its shipped workflow.
        repacked: the single file of it that Comfy-Org offers, without its ending (comfyui-workflow-templates and
            docs.comfy.org link them); None when there is none.
        files: patterns of the files that are its own: the DiT, or an adapter for the model `base`. A pair has two DiTs,
            that of the noisy timesteps first.
        base: the row whose DiT this one is an adapter for.
        boundary: of a pair, the fraction of the noise from which on the first DiT works, 0 to 1; None for one DiT.
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
    boundary: float | None = None
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
    def is_pair(self) -> bool:
        """Whether it consists of two transformers, each for a range of timesteps."""
        return self.boundary is not None

    @property
    def tiny_id(self) -> str:
        """The id of the bundled model of its structure."""
        return tiny_id(self.variant, self.is_pair)

    @property
    def is_22(self) -> bool:
        """Whether it is of Wan 2.2."""
        return self.is_pair or self.variant in _OF_5B

    @property
    def vae(self) -> tuple[str, str]:
        """The id of the model that brings its VAE, and the pattern of the VAE's file."""
        is_tiny = self.size == "tiny"
        if self.variant in _OF_5B:
            return (TINY_TI2V if is_tiny else TI2V_BASE), VAE_22_PATTERN
        return (TINY if is_tiny else T2V_BASE), VAE_PATTERN

    @property
    def repacked_files(self) -> tuple[str, ...]:
        """`repacked` as the name of each file: of a pair two, the one for high noise first."""
        if not self.repacked:
            return ()
        start, brace, rest = self.repacked.partition("{")
        words, _, end = rest.partition("}")
        return tuple(f"{start}{word}{end}" for word in words.split(",")) if brace else (self.repacked,)

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


WAN_21: tuple[CatalogRow, ...] = (
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


# Wan-Video/Wan2.2 wan/configs for the Wan-AI rows, VideoX-Fun's examples/wan2.2_fun for the Fun rows, which run with
# the boundaries of these configurations. VideoX-Fun uses one TeaCache template for all of them.
_T2V_A14B = Preset(
    steps=40, cfg=4.0, cfg_low=3.0, shift=12.0, solver="unipc", width=1280, height=720, teacache="Wan2.1-I2V-14B-720P"
)
_I2V_A14B = replace(_T2V_A14B, cfg=3.5, cfg_low=3.5, shift=5.0, size_rule="area")
_FUN_A14B = Preset(cfg=6.0, teacache="Wan2.1-I2V-14B-720P")
_5B: Mapping[str, Any] = dict(width=1280, height=704, num_frames=121, fps=24.0, teacache="Wan2.1-I2V-14B-720P")
_TI2V_5B = Preset(solver="unipc", size_rule="area and crop", **_5B)
_FUN_5B = Preset(cfg=6.0, **_5B)


def _pair(model_id: str, variant: str, *settings: Any, boundary: float, **others: Any) -> CatalogRow:
    """A row of two transformers; its `repacked` is the name of both files, with what differs in braces."""
    return CatalogRow(model_id, variant, "14B", *settings, files=PAIR_PATTERNS, boundary=boundary, **others)


def _trained_at(num_frames: int, **flags: Any) -> Mapping[str, Mapping[str, Any]]:
    """`CatalogRow.training` of both modes."""
    return {"lora": {"num_frames": num_frames, **flags}, "full": {"num_frames": num_frames}}


WAN_22: tuple[CatalogRow, ...] = (
    _pair(
        "Wan-AI/Wan2.2-T2V-A14B", "t2v", _T2V_A14B, "text", "t2v_a14b", "wan2.2_t2v_{high,low}_noise_14B_fp8_scaled",
        boundary=0.875, training=_trained_at(49),
    ),
    _pair(
        "Wan-AI/Wan2.2-I2V-A14B", "i2v_a14b", _I2V_A14B, "image", "i2v_a14b",
        "wan2.2_i2v_{high,low}_noise_14B_fp8_scaled", boundary=0.9, training=_trained_at(49),
    ),
    CatalogRow(
        "Wan-AI/Wan2.2-TI2V-5B", "ti2v_5b", "5B", _TI2V_5B, "image", "ti2v_5b", "wan2.2_ti2v_5B_fp16",
        training=_trained_at(49),
    ),
    _pair(
        "PAI/Wan2.2-Fun-A14B-InP", "i2v_a14b", _FUN_A14B, "first_last", "fun_a14b_inp",
        "wan2.2_fun_inpaint_{high,low}_noise_14B_fp8_scaled", boundary=0.9,
    ),
    _pair(
        "PAI/Wan2.2-Fun-A14B-Control", "fun_a14b_control", _FUN_A14B, "control_reference", "fun_a14b_control",
        "wan2.2_fun_control_{high,low}_noise_14B_fp8_scaled", boundary=0.9,
    ),
    _pair(
        "PAI/Wan2.2-Fun-A14B-Control-Camera", "fun_a14b_camera", _FUN_A14B, "camera", "fun_a14b_camera",
        "wan2.2_fun_camera_{high,low}_noise_14B_fp8_scaled", boundary=0.9,
        training=_trained_at(81, learning_rate=1e-4),
    ),
    _pair(
        "PAI/Wan2.2-VACE-Fun-A14B", "vace", replace(_FUN_A14B, cfg=5.0), "vace", "vace_fun_a14b",
        "wan2.2_fun_vace_{high,low}_noise_14B_fp8_scaled", boundary=0.875, training=_trained_at(17),
    ),
    CatalogRow(
        "PAI/Wan2.2-Fun-5B-InP", "fun_5b_inp", "5B", _FUN_5B, "first_last", "fun_5b_inp", "wan2.2_fun_inpaint_5B_bf16"
    ),
    CatalogRow(
        "PAI/Wan2.2-Fun-5B-Control", "fun_5b_control", "5B", replace(_FUN_5B, steps=40), "control_reference",
        "fun_5b_control", "wan2.2_fun_control_5B_bf16",
    ),
    CatalogRow(
        "PAI/Wan2.2-Fun-5B-Control-Camera", "fun_5b_camera", "5B", _FUN_5B, "camera", "fun_5b_camera",
        "wan2.2_fun_camera_5B_bf16", training=_trained_at(81, learning_rate=1e-4),
    ),
)  # fmt: skip

_OF_5B = frozenset(row.variant for row in WAN_22 if row.size == "5B")

_SKYREELS = Preset(cfg=6.0, shift=8.0, width=960, height=544, num_frames=97, fps=24.0, teacache="Wan2.1-T2V-14B")
_SKYREELS_I2V = replace(_SKYREELS, cfg=5.0, shift=5.0, teacache="Wan2.1-I2V-14B-480P")
_LARGE: Mapping[str, Any] = dict(width=1280, height=720, num_frames=121)
FINE_TUNES = (
    CatalogRow("krea/krea-realtime-video", "t2v", "14B", replace(_T2V_L, steps=6, cfg=1.0, shift=20.0), "text", ""),
    CatalogRow("Skywork/SkyReels-V2-T2V-14B-540P", "t2v", "14B", _SKYREELS, "text", ""),
    CatalogRow("Skywork/SkyReels-V2-T2V-14B-720P", "t2v", "14B", replace(_SKYREELS, **_LARGE), "text", ""),
    CatalogRow("Skywork/SkyReels-V2-I2V-14B-540P", "i2v", "14B", _SKYREELS_I2V, "image", ""),
    CatalogRow("Skywork/SkyReels-V2-I2V-14B-720P", "i2v", "14B", replace(_SKYREELS_I2V, **_LARGE), "image", ""),
)
"""Models of known structures by others, for their authors' settings alone (SkyReels-V2's README, DiffSynth-Studio)."""

CATALOG = (*WAN_21, *WAN_22)
"""The rows that loaders, workflows and recipes offer."""


def tiny_id(variant: str, is_pair: bool = False) -> str:
    """The id of the bundled model of that structure, or of the bundled pair."""
    name = variant.replace("_", "-")
    name = f"{name}-a14b" if is_pair and "a14b" not in name else name
    return TINY if name == "t2v" else f"{TINY}-{name}"


TINY_PRESET = Preset(
    steps=20, cfg=4.0, width=96, height=64, num_frames=17, negative_prompt="", teacache="Wan2.1-T2V-1.3B"
)
"""What the bundled models were trained at, `tools.family`."""


def _tiny_rows(rows: Sequence[CatalogRow]) -> tuple[CatalogRow, ...]:
    first = {name: next(row for row in rows if row.tiny_id == name) for name in (row.tiny_id for row in rows)}
    changes: Mapping[str, Any] = dict(size="tiny", preset=TINY_PRESET, repacked=None)
    return tuple(replace(row, model_id=name, **changes) for name, row in first.items())


TINY_ROWS = _tiny_rows(CATALOG)
"""The models that this pack brings (`bundled`): of each structure one, in place of the first row of its variant."""

SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B", 256: "tiny"}
"""Model width to size, of the published models and the bundled ones."""

_WIDTHS: Mapping[str, Mapping[str, Any]] = {
    "1.3B": {},
    "5B": dict(dim=3072, ffn_dim=14336, num_layers=30, geometry=WAN_22_GEOMETRY),
    "14B": dict(dim=5120, ffn_dim=13824, num_layers=40),
}
_STRUCTURES: Mapping[str, Mapping[str, Any]] = {
    "t2v": {},
    "i2v": dict(in_channels=36, has_image_input=True),
    "flf2v": dict(in_channels=36, has_image_input=True, image_positions=514),
    "fun_control": dict(in_channels=48, has_image_input=True),
    "fun_v1_1_control": dict(in_channels=48, has_image_input=True, has_reference=True),
    "fun_camera": dict(in_channels=32, has_image_input=True, camera_channels=24),
    "vace": dict(vace_channels=96),
    "i2v_a14b": dict(in_channels=36),
    "fun_a14b_control": dict(in_channels=52, has_reference=True),
    "fun_a14b_camera": dict(in_channels=36, camera_channels=24),
    "ti2v_5b": dict(in_channels=48),
    "fun_5b_inp": dict(in_channels=100),
    "fun_5b_control": dict(in_channels=148, has_reference=True),
    "fun_5b_camera": dict(in_channels=100, camera_channels=24),
}
_VACE_LAYERS = {"1.3B": tuple(range(0, 30, 2)), "14B": tuple(range(0, 40, 5))}


def published_config(row: CatalogRow) -> DiTConfig:
    """What the file of a published row holds, of an adapter's row that of its base: to plan with before it is there."""
    layers = _VACE_LAYERS[row.size] if row.variant == "vace" else ()
    return DiTConfig(**_WIDTHS[row.size], **_STRUCTURES[row.variant], vace_layers=layers)


def find_row(model_id: str) -> CatalogRow | None:
    """The row of that id, or None."""
    return next((row for row in (*CATALOG, *FINE_TUNES, *TINY_ROWS) if row.model_id == model_id), None)


def published(model_id: str) -> CatalogRow:
    """The row of a published checkpoint, which must be one."""
    return next(row for row in CATALOG if row.model_id == model_id)


HINTS = ("fun", "inp", "480", "540", "720", "v1.1", "preview", "krea", "skyreels")
"""Words in file names that distinguish checkpoints of one structure and size."""

GENERATIONS = re.compile(r"wan[-_ ]?2[._]?(?P<number>[12])(?!\d)|a14b|(?:high|low)[-_ ]?noise")
"""What tells a file of Wan 2.2 from one of 2.1 that has the same tensors; the last match in a path counts."""


def guess_row(name: str, variant: str, size: str, is_pair: bool | None = None) -> CatalogRow | None:
    """The row that a file or folder called `name` most likely comes from, among those of its structure and size.

    An id inside the name settles it, else the words of `HINTS` do; with none of them the first row counts. The row only
    recommends settings.

    Args:
        is_pair: whether there are two transformers; None where only one of them may be at hand.
    """
    name = name.lower()
    found = _hints(name)
    rows = [
        row
        for row in (*CATALOG, *FINE_TUNES, *TINY_ROWS)
        if (row.variant, row.size) == (variant, size) and not row.base and is_pair in (None, row.is_pair)
    ]
    by_id = [row for row in rows if row.model_id.lower() in name]
    return max(by_id or rows, key=lambda row: -len(_hints(row.model_id.lower()) ^ found), default=None)


def _hints(name: str) -> set[str]:
    *_, last = (None, *GENERATIONS.finditer(name))
    is_22 = last is not None and last["number"] != "1"
    return {hint for hint in HINTS if hint in name} | ({"2.2"} if is_22 else set())
