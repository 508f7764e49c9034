"""The shipped workflows: one per published checkpoint, rows of a kind sharing one description.

`python -m tools.workflows` writes the JSON files. Settings come from the catalog's presets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.graph import Graph, Out, Stage, Step

T2V_BASE = "Wan-AI/Wan2.1-T2V-1.3B"
IMAGE_ENCODER_SOURCE = "Wan-AI/Wan2.1-I2V-14B-480P"
SPEED_CONTROL = "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1"
FPS = 16.0

TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
DIT_FILE = "diffusion_pytorch_model.safetensors"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"

REPACKED = {
    "Wan-AI/Wan2.1-T2V-1.3B": "wan2.1_t2v_1.3B_fp16",
    "Wan-AI/Wan2.1-T2V-14B": "wan2.1_t2v_14B_fp8_scaled",
    "Wan-AI/Wan2.1-I2V-14B-480P": "wan2.1_i2v_480p_14B_fp16",
    "Wan-AI/Wan2.1-I2V-14B-720P": "wan2.1_i2v_720p_14B_fp16",
    "Wan-AI/Wan2.1-FLF2V-14B-720P": "wan2.1_flf2v_720p_14B_fp16",
    "Wan-AI/Wan2.1-VACE-1.3B": "wan2.1_vace_1.3B_fp16",
    "Wan-AI/Wan2.1-VACE-14B": "wan2.1_vace_14B_fp16",
    "PAI/Wan2.1-Fun-1.3B-InP": "wan2.1_fun_inp_1.3B_bf16",
    "PAI/Wan2.1-Fun-1.3B-Control": "wan2.1_fun_control_1.3B_bf16",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera": "wan2.1_fun_camera_v1.1_1.3B_bf16",
    "PAI/Wan2.1-Fun-V1.1-14B-Control-Camera": "wan2.1_fun_camera_v1.1_14B_bf16",
}
"""Names of the single files that Comfy-Org offers (comfyui-workflow-templates and docs.comfy.org link them). The
authors' own files of Wan-AI's 14B models are shards, which ComfyUI's dialog cannot fetch as one."""

PROMPTS = {
    "t2v": "A small town at sunset, warm lights along a river, gentle camera movement, cinematic",
    "i2v": "A red ball rolls over green hills under a blue sky, soft light",
    "control": "A glass sphere drifts through a misty forest at dawn",
    "camera": "Green hills under a blue sky, a slow cinematic shot",
    "vace": "A golden sphere crosses a meadow, painted in watercolour",
    "speed": "A dog runs along a beach at sunset",
}


def link(repository: str, file: str, directory: str) -> dict[str, str]:
    """A file for ComfyUI's dialog of missing models."""
    return {"name": file, "url": f"https://huggingface.co/{repository}/resolve/main/{file}", "directory": directory}


def video_model(row: Any) -> dict[str, str]:
    """The file that ComfyUI's dialog offers for a row's DiT: repacked where there is such a file, else its authors'."""
    name = REPACKED.get(row.model_id)
    if name:
        repository, file = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", f"split_files/diffusion_models/{name}.safetensors"
        return {**link(repository, file, "diffusion_models"), "name": f"{name}.safetensors"}
    name = row.model_id.split("/")[1]
    return {**link(row.huggingface_id, DIT_FILE, "diffusion_models"), "name": f"{name}.safetensors"}


@dataclass(frozen=True)
class Kind:
    """How the workflows of one kind of checkpoint are built."""

    title: str
    what: str
    prompt: str
    inputs: Callable[[dict[str, Any]], list[Step]]
    needs_image_encoder: bool = False


def _image(title: str, file: str) -> Step:
    return Step(title, "LoadImage", {"image": file})


def _clip(title: str, file: str) -> list[Step]:
    return [
        Step(title, "LoadVideo", {"file": file}),
        Step(f"{title} frames", "GetVideoComponents", {"video": (title, 0)}),
    ]


def _encode(
    class_type: str, title: str, size: dict[str, Any], links: dict[str, Out], image_encoder: bool = True
) -> Step:
    shared = {"conditioning": ("Prompt", 0), "vae": ("Load VAE", 0)}
    if image_encoder:
        shared["image_encoder"] = ("Load image encoder", 0)
    return Step(title, class_type, {**shared, **size, **links})


def _start(size: dict[str, Any]) -> list[Step]:
    links = {"start_image": ("Start image", 0)}
    return [_image("Start image", "start.png"), _encode("WanCoreImageEncode", "Image encode", size, links)]


def _start_and_end(size: dict[str, Any]) -> list[Step]:
    links = {"start_image": ("Start image", 0), "end_image": ("End image", 0)}
    pictures = [_image("Start image", "start.png"), _image("End image", "end.png")]
    return [*pictures, _encode("WanCoreImageEncode", "Image encode", size, links)]


def _control(size: dict[str, Any]) -> list[Step]:
    links = {"control_video": ("Control video frames", 0)}
    clip = _clip("Control video", "control.mp4")
    return [*clip, _encode("WanCoreControlEncode", "Control encode", size, links, image_encoder=False)]


def _control_with_reference(size: dict[str, Any]) -> list[Step]:
    links = {"control_video": ("Control video frames", 0), "reference_image": ("Reference image", 0)}
    sources = [*_clip("Control video", "control.mp4"), _image("Reference image", "reference.png")]
    return [*sources, _encode("WanCoreControlEncode", "Control encode", size, links)]


def _camera(size: dict[str, Any]) -> list[Step]:
    path = {"direction": "Left", "num_frames": size["num_frames"]}
    links = {"start_image": ("Start image", 0)}
    move = {"conditioning": ("Control encode", 0), "camera_path": ("Camera path", 0)}
    return [
        _image("Start image", "start.png"),
        _encode("WanCoreControlEncode", "Control encode", size, links),
        Step("Camera path", "WanCoreCameraPath", path),
        Step("Camera encode", "WanCoreCameraEncode", {**move, **size}),
    ]


def _vace(size: dict[str, Any]) -> list[Step]:
    links = {
        "video": ("Source video frames", 0),
        "mask": ("Mask", 0),
        "reference_images": ("Reference image", 0),
    }
    return [
        *_clip("Source video", "source.mp4"),
        *_clip("Mask video", "mask.mp4"),
        Step("Mask", "ImageToMask", {"image": ("Mask video frames", 0), "channel": "red"}),
        _image("Reference image", "reference.png"),
        _encode("WanCoreVaceEncode", "VACE encode", size, links, image_encoder=False),
    ]


def _speed(size: dict[str, Any]) -> list[Step]:
    inputs = {"model": ("Load model", 0), "conditioning": ("Prompt", 0), "adapter": SPEED_CONTROL}
    return [Step("Speed control", "WanCoreSpeedControl", {**inputs, "motion_bucket_id": 50.0}, [SPEED_CONTROL_FILE])]


SPEED_CONTROL_FILE = {
    "name": "Wan2.1-1.3b-speedcontrol-v1.safetensors",
    "url": f"https://modelscope.cn/models/{SPEED_CONTROL}/resolve/master/model.safetensors",
    "directory": "diffusion_models",
}


def _nothing(size: dict[str, Any]) -> list[Step]:
    return []


TEXT = Kind("Text to video", "A prompt becomes a video.", PROMPTS["t2v"], _nothing)
IMAGE = Kind("Image to video", "A picture becomes the first frame of a video.", PROMPTS["i2v"], _start, True)
ENDS = Kind("First and last frame to video", "A video between two pictures.", PROMPTS["i2v"], _start_and_end, True)
CONTROL = Kind(
    "Control video", "A video that follows edges, depth or poses, frame by frame.", PROMPTS["control"], _control
)
CONTROL_REFERENCE = Kind(
    "Control video with a reference image",
    "A video that follows a control video and shows what is in the reference image.",
    PROMPTS["control"],
    _control_with_reference,
    True,
)
CAMERA = Kind("Camera control", "A camera moves through a picture.", PROMPTS["camera"], _camera, True)
VACE = Kind(
    "VACE", "A masked part of a video is drawn anew, with a reference image of what appears.", PROMPTS["vace"], _vace
)
SPEED = Kind("Speed control", "A prompt becomes a video, with the speed of motion set.", PROMPTS["speed"], _speed)

WORKFLOWS: dict[str, tuple[str, Kind]] = {
    "t2v": (T2V_BASE, TEXT),
    "t2v_1.3b": (T2V_BASE, TEXT),
    "t2v_14b": ("Wan-AI/Wan2.1-T2V-14B", TEXT),
    "i2v_480p": ("Wan-AI/Wan2.1-I2V-14B-480P", IMAGE),
    "i2v_720p": ("Wan-AI/Wan2.1-I2V-14B-720P", IMAGE),
    "flf2v_720p": ("Wan-AI/Wan2.1-FLF2V-14B-720P", ENDS),
    "fun_inp_1.3b": ("PAI/Wan2.1-Fun-1.3B-InP", ENDS),
    "fun_inp_14b": ("PAI/Wan2.1-Fun-14B-InP", ENDS),
    "fun_control_1.3b": ("PAI/Wan2.1-Fun-1.3B-Control", CONTROL),
    "fun_control_14b": ("PAI/Wan2.1-Fun-14B-Control", CONTROL),
    "fun_v1.1_control_1.3b": ("PAI/Wan2.1-Fun-V1.1-1.3B-Control", CONTROL_REFERENCE),
    "fun_v1.1_control_14b": ("PAI/Wan2.1-Fun-V1.1-14B-Control", CONTROL_REFERENCE),
    "fun_v1.1_inp_1.3b": ("PAI/Wan2.1-Fun-V1.1-1.3B-InP", ENDS),
    "fun_v1.1_inp_14b": ("PAI/Wan2.1-Fun-V1.1-14B-InP", ENDS),
    "fun_v1.1_camera_1.3b": ("PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera", CAMERA),
    "fun_v1.1_camera_14b": ("PAI/Wan2.1-Fun-V1.1-14B-Control-Camera", CAMERA),
    "vace_1.3b_preview": ("iic/VACE-Wan2.1-1.3B-Preview", VACE),
    "vace_1.3b": ("Wan-AI/Wan2.1-VACE-1.3B", VACE),
    "vace_14b": ("Wan-AI/Wan2.1-VACE-14B", VACE),
    "speed_1.3b": (SPEED_CONTROL, SPEED),
}
"""File name to checkpoint and kind. `t2v` is the first workflow that a newcomer runs."""


def describe(name: str, find_row: Callable[[str], Any]) -> Graph:
    """The workflow called `name`, with the preset that `find_row` knows for its checkpoint."""
    model_id, kind = WORKFLOWS[name]
    row = find_row(model_id)
    preset = row.preset
    size = {"width": preset.width, "height": preset.height, "num_frames": preset.num_frames}
    prompt = {"prompt": kind.prompt, "negative_prompt": preset.negative_prompt}
    encode = Step("Prompt", "WanCoreTextEncode", {"text_encoder": ("Load text encoder", 0), **prompt})
    inputs = kind.inputs(size)
    controlled = kind is SPEED
    source = (inputs[-1].title, 1 if controlled else 0) if inputs else ("Prompt", 0)
    links = {"model": ("Speed control", 0) if controlled else ("Load model", 0), "conditioning": source}
    settings = {"steps": preset.steps, "cfg": preset.cfg, "shift": preset.shift, **size}
    stages = [
        Stage("Models", loaders(find_row(row.base) if row.base else row, kind)),
        Stage("Prompt", [encode]),
        *(Stage(title, steps) for title, steps in split_steps(inputs).items() if steps),
        Stage("Sampling", [Step("Sampler", "WanCoreSampler", {**links, **settings})]),
        Stage("Video", save_steps(name)),
    ]
    return Graph(name, _note(kind, row), stages)


def split_steps(steps: list[Step]) -> dict[str, list[Step]]:
    """What brings pictures and clips, and what makes conditioning of them."""
    ours = [step for step in steps if step.class_type.startswith("WanCore")]
    return {"Inputs": [step for step in steps if step not in ours], "Conditioning": ours}


def loaders(row: Any, kind: Kind) -> list[Step]:
    """The nodes that load the models of `row`."""
    text_encoder = link(T2V_BASE, TEXT_ENCODER_FILE, "text_encoders")
    steps = [
        Step("Load model", "WanCoreModelLoader", {"model": row.model_id}, [video_model(row)]),
        Step("Load text encoder", "WanCoreTextEncoderLoader", {"text_encoder": T2V_BASE}, [text_encoder]),
        Step("Load VAE", "WanCoreVAELoader", {"vae": T2V_BASE}, [link(T2V_BASE, VAE_FILE, "vae")]),
    ]
    if kind.needs_image_encoder:
        inputs, file = (
            {"image_encoder": IMAGE_ENCODER_SOURCE},
            link(IMAGE_ENCODER_SOURCE, IMAGE_ENCODER_FILE, "clip_vision"),
        )
        steps.append(Step("Load image encoder", "WanCoreImageEncoderLoader", inputs, [file]))
    return steps


def save_steps(name: str) -> list[Step]:
    """From the latents of the sampler to a file."""
    file = {"filename_prefix": f"video/wancore_{name}", "format": "mp4", "codec": "h264"}
    return [
        Step("Decode", "WanCoreVAEDecode", {"vae": ("Load VAE", 0), "latent": ("Sampler", 0)}),
        Step("Create video", "CreateVideo", {"images": ("Decode", 0), "fps": FPS}),
        Step("Save video", "SaveVideo", {"video": ("Create video", 0), **file}),
    ]


def _note(kind: Kind, row: Any) -> str:
    files = [f"models/{row.model_id}/{pattern}" for pattern in row.files]
    if row.base:
        files.append(f"models/{row.base}/diffusion_pytorch_model*.safetensors")
    files += [f"models/{T2V_BASE}/{file}" for file in (TEXT_ENCODER_FILE, VAE_FILE, "google/umt5-xxl/")]
    if kind.needs_image_encoder:
        files.append(f"models/{IMAGE_ENCODER_SOURCE}/{IMAGE_ENCODER_FILE}")
    return "\n".join(
        [
            f"## {kind.title}",
            "",
            f"{kind.what} The settings are those that the authors of `{row.model_id}` recommend.",
            "",
            "**Files** (fetched when `download` is on in a loader, or put them there yourself):",
            *(f"- `{file}`" for file in files),
            "",
            "Files that you already have in ComfyUI's own folders appear in the lists too. The pictures and clips are "
            "in the pack's folder `workflows/assets`; choose your own. `WanCore/tiny…` models need no file: they draw "
            "abstract patterns, to try the graph out.",
        ]
    )
