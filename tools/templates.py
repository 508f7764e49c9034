"""What the shipped workflows are called in the template browser, in the order in which most people look for them.

The browser shows, searches and translates nothing but the name of a file, so a name says it in both languages. The
command line keeps the short names: those of the files in `workflows/api`.
"""

import json
from functools import cache
from pathlib import Path

TEMPLATES: dict[str, tuple[str, str]] = {
    "t2v": ("Wan 2.1 text to video, 1.3B", "文生视频"),
    "i2v_a14b_4step": ("Wan 2.2 image to video, 4 steps with LoRA", "图生视频 加速"),
    "t2v_a14b_4step": ("Wan 2.2 text to video, 4 steps with LoRA", "文生视频 加速"),
    "i2v_480p_4step": ("Wan 2.1 image to video, 480p, 4 steps with LoRA", "图生视频 加速"),
    "t2v_14b_4step": ("Wan 2.1 text to video, 14B, 4 steps with LoRA", "文生视频 加速"),
    "ti2v_5b_4step": ("Wan 2.2 image to video, 5B, 4 steps with LoRA", "图生视频 加速"),
    "i2v_720p_4step": ("Wan 2.1 image to video, 720p, 4 steps with LoRA", "图生视频 加速"),
    "t2v_1.3b_4step": ("Wan 2.1 text to video, 1.3B, 4 steps with LoRA", "文生视频 加速"),
    "i2v_a14b": ("Wan 2.2 image to video, A14B", "图生视频"),
    "t2v_a14b": ("Wan 2.2 text to video, A14B", "文生视频"),
    "ti2v_5b": ("Wan 2.2 image to video, 5B", "图生视频"),
    "ti2v_5b_text": ("Wan 2.2 text to video, 5B", "文生视频"),
    "i2v_480p": ("Wan 2.1 image to video, 480p", "图生视频"),
    "i2v_720p": ("Wan 2.1 image to video, 720p", "图生视频"),
    "t2v_14b": ("Wan 2.1 text to video, 14B", "文生视频"),
    "t2v_1.3b": ("Wan 2.1 text to video, 1.3B, as its authors set it", "文生视频"),
    "flf2v_720p_4step": ("Wan 2.1 first last frame to video, 720p, 4 steps with LoRA", "首尾帧生视频 加速"),
    "flf2v_720p": ("Wan 2.1 first last frame to video, 720p", "首尾帧生视频"),
    "fun_a14b_inp_4step": ("Wan 2.2 Fun first last frame to video, A14B, 4 steps with LoRA", "首尾帧生视频 加速"),
    "fun_a14b_inp": ("Wan 2.2 Fun first last frame to video, A14B", "首尾帧生视频"),
    "fun_5b_inp": ("Wan 2.2 Fun first last frame to video, 5B", "首尾帧生视频"),
    "vace_14b_4step": ("Wan 2.1 VACE, 14B, 4 steps with LoRA", "视频编辑 加速"),
    "vace_1.3b_4step": ("Wan 2.1 VACE, 1.3B, 4 steps with LoRA", "视频编辑 加速"),
    "vace_14b": ("Wan 2.1 VACE, 14B", "视频编辑"),
    "vace_1.3b": ("Wan 2.1 VACE, 1.3B", "视频编辑"),
    "vace_fun_a14b_4step": ("Wan 2.2 Fun VACE, A14B, 4 steps with LoRA", "视频编辑 加速"),
    "vace_fun_a14b": ("Wan 2.2 Fun VACE, A14B", "视频编辑"),
    "fun_a14b_control_4step": ("Wan 2.2 Fun control video, A14B, 4 steps with LoRA", "控制视频 加速"),
    "fun_a14b_control": ("Wan 2.2 Fun control video, A14B", "控制视频"),
    "fun_5b_control": ("Wan 2.2 Fun control video, 5B", "控制视频"),
    "fun_v1.1_control_14b_4step": (
        "Wan 2.1 Fun control video with reference image, 14B, 4 steps with LoRA",
        "控制视频 参考图 加速",
    ),
    "fun_v1.1_control_14b": ("Wan 2.1 Fun control video with reference image, 14B", "控制视频 参考图"),
    "fun_v1.1_control_1.3b": ("Wan 2.1 Fun control video with reference image, 1.3B", "控制视频 参考图"),
    "fun_a14b_camera_4step": ("Wan 2.2 Fun camera control, A14B, 4 steps with LoRA", "镜头控制 加速"),
    "fun_a14b_camera": ("Wan 2.2 Fun camera control, A14B", "镜头控制"),
    "fun_5b_camera": ("Wan 2.2 Fun camera control, 5B", "镜头控制"),
    "fun_v1.1_camera_14b_4step": ("Wan 2.1 Fun camera control, 14B, 4 steps with LoRA", "镜头控制 加速"),
    "fun_v1.1_camera_14b": ("Wan 2.1 Fun camera control, 14B", "镜头控制"),
    "fun_v1.1_camera_1.3b": ("Wan 2.1 Fun camera control, 1.3B", "镜头控制"),
    "extend_ti2v_5b": ("Wan 2.2 continue a film, 5B", "续写影片"),
    "extend_vace_1.3b": ("Wan 2.1 continue a film with VACE, 1.3B", "续写影片"),
    "segments_flf2v_720p": ("Wan 2.1 film from picture to picture, 720p", "从图片到图片"),
    "speed_1.3b": ("Wan 2.1 motion speed control, 1.3B", "运动速度"),
    "train_lora_t2v": ("Train a LoRA, text to video", "训练 LoRA"),
    "train_lora_control": ("Train a LoRA, control video", "训练控制 LoRA"),
    "train_speed_control": ("Train motion speed control", "训练运动速度"),
    "validate_lora": ("Try a trained LoRA", "试用训练好的 LoRA"),
    "validate_full": ("Try a trained model", "试用训练好的模型"),
    "fun_v1.1_inp_14b_4step": (
        "Wan 2.1 Fun V1.1 first last frame to video, 14B, 4 steps with LoRA",
        "首尾帧生视频 加速",
    ),
    "fun_v1.1_inp_14b": ("Wan 2.1 Fun V1.1 first last frame to video, 14B", "首尾帧生视频"),
    "fun_v1.1_inp_1.3b": ("Wan 2.1 Fun V1.1 first last frame to video, 1.3B", "首尾帧生视频"),
    "fun_inp_14b": ("Wan 2.1 Fun first last frame to video, 14B", "首尾帧生视频"),
    "fun_inp_1.3b": ("Wan 2.1 Fun first last frame to video, 1.3B", "首尾帧生视频"),
    "fun_control_14b": ("Wan 2.1 Fun control video, 14B", "控制视频"),
    "fun_control_1.3b": ("Wan 2.1 Fun control video, 1.3B", "控制视频"),
    "vace_1.3b_preview": ("Wan 2.1 VACE preview, 1.3B", "视频编辑"),
}
"""Short name to name in English and in Chinese."""

CATEGORY = {"en": "WanCore: Wan 2.1 and 2.2 video", "zh": "WanCore：Wan 2.1 与 2.2 视频"}
"""The pack's category in the browser."""

FOLDERS = ("wancore", "WanCore", "ComfyUI-WanCore", "comfyui-wancore")
"""Names that the pack's folder is given; the browser knows a category by it."""

CATALOGUE = Path(__file__).with_name("texts") / "zh.json"


def template(name: str) -> str:
    """What the file of the workflow called `name` is called in the browser, without its ending.

    Raises:
        ValueError: it has no name there.
    """
    if name not in TEMPLATES:
        raise ValueError(f"{name} has no name in the template browser: add it to TEMPLATES of tools/templates.py.")
    return " ".join(TEMPLATES[name])


@cache
def _chinese() -> dict[str, str]:
    sections: dict[str, dict[str, str]] = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    return sections["workflows"]


def chinese(text: str) -> str:
    """The Chinese of a text of a workflow.

    Raises:
        ValueError: it has none.
    """
    if text not in _chinese():
        raise ValueError(f"A workflow's text has no Chinese: add {text!r} to 'workflows' in {CATALOGUE.name}.")
    return _chinese()[text]


def both(text: str) -> str:
    """A short text in both languages."""
    return f"{text} {chinese(text)}"
