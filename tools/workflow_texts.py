"""The shipped workflows: one per published checkpoint, those of a task sharing one description.

`python -m tools.workflows` writes the JSON files. Names and settings come from the catalog."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tools.graph import Graph, Out, Stage, Step
from tools.templates import both, chinese
from wan_core.catalog import (
    CATALOG,
    DIT_FILE,
    DIT_PATTERN,
    IMAGE_ENCODER_PATTERN,
    IMAGE_ENCODER_SOURCE,
    MOTION_CONTROLLER_PATTERN,
    SPEED_CONTROL,
    T2V_BASE,
    TEXT_ENCODER_PATTERN,
    TI2V_BASE,
    TOKENIZER_PATTERN,
    CatalogRow,
    Task,
    published,
)
from wan_core.distilled import FewSteps, recognise
from wan_core.loading.pairs import expand
from wan_core.recommend import AUTO

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


def video_models(row: CatalogRow) -> list[dict[str, str]]:
    """The files that ComfyUI's dialog offers for a row's transformers: repacked ones where there are such, because the
    authors' own files of Wan-AI's 14B models are shards, which the dialog cannot fetch as one.
    """
    if row.repacked:
        return [repacked(name, "diffusion_models", row.is_22) for name in row.repacked_files]
    return [{**link(row.huggingface_id, DIT_FILE, "diffusion_models"), "name": f"{row.short_name}.safetensors"}]


def repacked(name: str, directory: str, is_22: bool) -> dict[str, str]:
    """A file that Comfy-Org offers in one piece, `name` without its ending."""
    repository = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged" if is_22 else "Comfy-Org/Wan_2.1_ComfyUI_repackaged"
    found = link(repository, f"split_files/{directory}/{name}.safetensors", directory)
    return {**found, "name": f"{name}.safetensors"}


@dataclass(frozen=True)
class TaskGraph:
    """How the workflows of one task are built.

    Attributes:
        title, what: shown to the user.
        prompt: an example.
        inputs: from a row and width, height and num_frames to the nodes between the prompt and the sampler.
        shows_pictures: whether one of these nodes takes a picture that Wan 2.1 reads through the CLIP image encoder.
    """

    title: str
    what: str
    prompt: str
    inputs: Callable[[CatalogRow, dict[str, Any]], list[Step]]
    shows_pictures: bool = False


def _image(title: str, file: str) -> Step:
    return Step(title, "LoadImage", {"image": file})


def _clip(title: str, file: str) -> list[Step]:
    return [
        Step(title, "LoadVideo", {"file": file}),
        Step(f"{title} frames", "GetVideoComponents", {"video": (title, 0)}),
    ]


def _encode(row: CatalogRow, class_type: str, title: str, size: dict[str, Any], links: dict[str, Out]) -> Step:
    shared = {"conditioning": ("Prompt", 0), "vae": ("Load VAE", 0)}
    if uses_image_encoder(row):
        shared["image_encoder"] = ("Load image encoder", 0)
    return Step(title, class_type, {**shared, **size, **links})


def _start(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    links = {"start_image": ("Start image", 0)}
    # Models that take clean frames need no mask beside the noise.
    kind = "WanCoreStartFrames" if row.variant == "ti2v_5b" else "WanCoreImageEncode"
    rule = {} if row.preset.size_rule == "exact" else {"size_rule": row.preset.size_rule}
    return [_image("Start image", "start.png"), _encode(row, kind, "Image encode", {**size, **rule}, links)]


def _start_and_end(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    links = {"start_image": ("Start image", 0), "end_image": ("End image", 0)}
    pictures = [_image("Start image", "start.png"), _image("End image", "end.png")]
    return [*pictures, _encode(row, "WanCoreImageEncode", "Image encode", size, links)]


def _control(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    links = {"control_video": ("Control video frames", 0)}
    clip = _clip("Control video", "control.mp4")
    return [*clip, _encode(row, "WanCoreControlEncode", "Control encode", size, links)]


def _control_with_reference(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    links = {"control_video": ("Control video frames", 0), "reference_image": ("Reference image", 0)}
    sources = [*_clip("Control video", "control.mp4"), _image("Reference image", "reference.png")]
    return [*sources, _encode(row, "WanCoreControlEncode", "Control encode", size, links)]


def _camera(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    path = {"direction": "Left", "num_frames": size["num_frames"]}
    links = {"start_image": ("Start image", 0)}
    # Models of Wan 2.1 take the latent of one frame, those of 2.2 a masked clip, as their image-to-video models do.
    start = "Image encode" if row.is_22 else "Control encode"
    move = {"conditioning": (start, 0), "camera_path": ("Camera path", 0)}
    return [
        _image("Start image", "start.png"),
        _encode(row, "WanCoreImageEncode" if row.is_22 else "WanCoreControlEncode", start, size, links),
        Step("Camera path", "WanCoreCameraPath", path),
        Step("Camera encode", "WanCoreCameraEncode", {**move, **size}),
    ]


def _vace(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
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
        _encode(row, "WanCoreVaceEncode", "VACE encode", size, links),
    ]


def _speed(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    inputs = {"model": ("Load model", 0), "conditioning": ("Prompt", 0), "adapter": SPEED_CONTROL}
    return [Step("Speed control", "WanCoreSpeedControl", {**inputs, "motion_bucket_id": 50.0}, [SPEED_CONTROL_FILE])]


SPEED_CONTROL_FILE = {
    "name": "Wan2.1-1.3b-speedcontrol-v1.safetensors",
    "url": f"https://modelscope.cn/models/{SPEED_CONTROL}/resolve/master/{MOTION_CONTROLLER_PATTERN}",
    "directory": "diffusion_models",
}


def _nothing(row: CatalogRow, size: dict[str, Any]) -> list[Step]:
    return []


def uses_image_encoder(row: CatalogRow) -> bool:
    """Whether the row's workflow has the CLIP image encoder."""
    return row.needs_image_encoder and TASKS[row.task].shows_pictures


TASKS: Mapping[Task, TaskGraph] = {
    "text": TaskGraph("Text to video", "A prompt becomes a video.", PROMPTS["t2v"], _nothing),
    "image": TaskGraph("Image to video", "A picture becomes the first frame of a video.", PROMPTS["i2v"], _start, True),
    "first_last": TaskGraph(
        "First and last frame to video", "A video between two pictures.", PROMPTS["i2v"], _start_and_end, True
    ),
    "control": TaskGraph(
        "Control video", "A video that follows edges, depth or poses, frame by frame.", PROMPTS["control"], _control
    ),
    "control_reference": TaskGraph(
        "Control video with a reference image",
        "A video that follows a control video and shows what is in the reference image.",
        PROMPTS["control"],
        _control_with_reference,
        True,
    ),
    "camera": TaskGraph("Camera control", "A camera moves through a picture.", PROMPTS["camera"], _camera, True),
    "vace": TaskGraph(
        "VACE",
        "The masked part of a video is generated, guided by a reference image.",
        PROMPTS["vace"],
        _vace,
    ),
    "speed": TaskGraph(
        "Speed control", "A prompt becomes a video, with the speed of motion set.", PROMPTS["speed"], _speed
    ),
}


LIGHTNING_T2V = link(
    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
    "split_files/loras/wan2.2_t2v_lightx2v_4steps_lora_v1.1_{high,low}_noise.safetensors",
    "loras",
)
LIGHTNING_I2V = link(
    "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
    "split_files/loras/wan2.2_i2v_lightx2v_4steps_lora_v1_{high,low}_noise.safetensors",
    "loras",
)
LIGHTX2V_T2V = link("lightx2v/Wan2.1-Distill-Loras", "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors", "loras")
LIGHTX2V_I2V = link(
    "Kijai/WanVideo_comfy", "Lightx2v/lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors", "loras"
)
CAUSVID = link("Kijai/WanVideo_comfy", "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors", "loras")
TURBO = link("Kijai/WanVideo_comfy", "LoRAs/Wan22-Turbo/Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors", "loras")
FOUR_STEP = {
    "t2v_1.3b": CAUSVID,
    "vace_1.3b": CAUSVID,
    "t2v_14b": LIGHTX2V_T2V,
    "i2v_480p": LIGHTX2V_I2V,
    "i2v_720p": LIGHTX2V_I2V,
    "flf2v_720p": LIGHTX2V_I2V,
    "fun_v1.1_inp_14b": LIGHTX2V_I2V,
    "fun_v1.1_control_14b": LIGHTX2V_I2V,
    "fun_v1.1_camera_14b": LIGHTX2V_I2V,
    "vace_14b": LIGHTX2V_T2V,
    "ti2v_5b": TURBO,
    "t2v_a14b": LIGHTNING_T2V,
    "i2v_a14b": LIGHTNING_I2V,
    "vace_fun_a14b": LIGHTNING_T2V,
    "fun_a14b_inp": LIGHTNING_I2V,
    "fun_a14b_control": LIGHTNING_I2V,
    "fun_a14b_camera": LIGHTNING_I2V,
}
"""The workflows that are also offered with a four-step LoRA, or a pair of them, of the same base and kind."""


def _four_step(row: CatalogRow, lora: str) -> CatalogRow:
    """A row with the settings of its distilled LoRA."""
    few = _few_steps(lora)
    preset = replace(row.preset, steps=few.steps, cfg=few.cfg, cfg_low=None, shift=few.shift, solver=few.solver)
    return replace(row, workflow=f"{row.workflow}_4step", preset=preset)


def _few_steps(lora: str) -> FewSteps:
    few = recognise([lora])
    assert few is not None, f"{lora} is a row of `distilled.FEW_STEPS`"
    return few


_BY_WORKFLOW = {row.workflow: row for row in CATALOG}
WORKFLOWS: dict[str, CatalogRow] = {
    "t2v": published(T2V_BASE),
    **_BY_WORKFLOW,
    "ti2v_5b_text": replace(published(TI2V_BASE), task="text", workflow="ti2v_5b_text"),
    **{f"{name}_4step": _four_step(_BY_WORKFLOW[name], lora["url"]) for name, lora in FOUR_STEP.items()},
}
"""File name to checkpoint. `t2v` is the first workflow that a newcomer runs."""

LORAS = {f"{name}_4step": lora["name"].rpartition("/")[2] for name, lora in FOUR_STEP.items()}
"""The LoRA, or the pair, that a workflow adds, as Load LoRA lists it."""


def describe(name: str) -> Graph:
    """The workflow called `name`, with the preset of its checkpoint."""
    row = WORKFLOWS[name]
    task = TASKS[row.task]
    preset = row.preset
    size = {"width": preset.width, "height": preset.height, "num_frames": preset.num_frames}
    prompt = {"prompt": task.prompt, "negative_prompt": preset.negative_prompt}
    encode = Step("Prompt", "WanCoreTextEncode", {"text_encoder": ("Load text encoder", 0), **prompt})
    inputs = task.inputs(row, size)
    controlled = row.task == "speed"
    source = (inputs[-1].title, 1 if controlled else 0) if inputs else ("Prompt", 0)
    model = "Speed control" if controlled else "Load LoRA" if name in LORAS else "Load model"
    links = {"model": (model, 0), "conditioning": source}
    settings = {**recommended(row), **size}
    if name in LORAS and _few_steps(FOUR_STEP[name.removesuffix("_4step")]["url"]).sigmas is not None:
        # No widget holds a list of noise levels.
        settings["recommended"] = AUTO
    stages = [
        Stage("Models", [*loaders(row), *_lora(name)]),
        Stage("Prompt", [encode]),
        *(Stage(title, steps) for title, steps in split_steps(inputs).items() if steps),
        Stage("Sampling", [Step("Sampler", "WanCoreSampler", {**links, **settings})]),
        Stage("Video", save_steps(name, preset.fps)),
    ]
    return Graph(name, _note(name, row), stages)


def _lora(name: str) -> list[Step]:
    """The node that adds the LoRAs of a workflow, if it has some."""
    if name not in LORAS:
        return []
    urls = expand(FOUR_STEP[name.removesuffix("_4step")]["url"])
    files = [{"name": url.rpartition("/")[2], "url": url, "directory": "loras"} for url in urls]
    return [Step("Load LoRA", "WanCoreLoraLoader", {"model": ("Load model", 0), "lora": LORAS[name]}, files)]


def recommended(row: CatalogRow) -> dict[str, Any]:
    """The sampler's widgets as the authors of a checkpoint recommend them."""
    preset = row.preset
    low = {} if preset.cfg_low is None else {"cfg_low": preset.cfg_low}
    solver = {} if preset.solver == "euler" else {"solver": preset.solver}
    return {"steps": preset.steps, "cfg": preset.cfg, "shift": preset.shift, **solver, **low}


def split_steps(steps: list[Step]) -> dict[str, list[Step]]:
    """What brings pictures and clips, and what makes conditioning of them."""
    ours = [step for step in steps if step.class_type.startswith("WanCore")]
    return {"Inputs": [step for step in steps if step not in ours], "Conditioning": ours}


def loaders(row: CatalogRow) -> list[Step]:
    """The nodes that load the models of `row`; of an adapter's row the model that it is for."""
    dit = published(row.base) if row.base else row
    text_encoder = link(T2V_BASE, TEXT_ENCODER_PATTERN, "text_encoders")
    vae, vae_file = row.vae
    steps = [
        Step("Load model", "WanCoreModelLoader", {"model": dit.model_id}, video_models(dit)),
        Step("Load text encoder", "WanCoreTextEncoderLoader", {"text_encoder": T2V_BASE}, [text_encoder]),
        Step("Load VAE", "WanCoreVAELoader", {"vae": vae}, [link(vae, vae_file, "vae")]),
    ]
    if uses_image_encoder(row):
        inputs, file = (
            {"image_encoder": IMAGE_ENCODER_SOURCE},
            link(IMAGE_ENCODER_SOURCE, IMAGE_ENCODER_PATTERN, "clip_vision"),
        )
        steps.append(Step("Load image encoder", "WanCoreImageEncoderLoader", inputs, [file]))
    return steps


def save_steps(name: str, fps: float) -> list[Step]:
    """From the latents of the sampler to a file."""
    file = {"filename_prefix": f"video/wancore_{name}", "format": "mp4", "codec": "h264"}
    return [
        Step("Decode", "WanCoreVAEDecode", {"vae": ("Load VAE", 0), "latent": ("Sampler", 0)}),
        Step("Create video", "CreateVideo", {"images": ("Decode", 0), "fps": fps}),
        Step("Save video", "SaveVideo", {"video": ("Create video", 0), **file}),
    ]


def _authors(name: str, row: CatalogRow, zh: bool = False) -> str:
    loras = "LoRA" if zh else "the LoRA"
    return f"{loras} `{LORAS[name]}`" if name in LORAS else f"`{row.model_id}`"


def _note(name: str, row: CatalogRow) -> str:
    task = TASKS[row.task]
    files = [f"models/{row.model_id}/{pattern}" for pattern in row.files]
    if row.base:
        files.append(f"models/{row.base}/{DIT_PATTERN}")
    if name in LORAS:
        files += [f"models/loras/{file}" for file in expand(LORAS[name])]
    files += [f"models/{T2V_BASE}/{TEXT_ENCODER_PATTERN}", f"models/{'/'.join(row.vae)}"]
    files.append(f"models/{T2V_BASE}/{TOKENIZER_PATTERN}")
    if uses_image_encoder(row):
        files.append(f"models/{IMAGE_ENCODER_SOURCE}/{IMAGE_ENCODER_PATTERN}")
    title = both(task.title)
    # The first lines say what most people need to know; a reader of either language finds both together.
    return "\n".join(
        [
            f"## {title}",
            "",
            f"{task.what} The settings are those that the authors of {_authors(name, row)} recommend. Choose your own "
            "pictures and clips, write a prompt, and run.",
            "",
            f"{chinese(task.what)}设置采用 {_authors(name, row, zh=True)} 作者推荐的值。"
            "换上自己的图片和视频，写好提示词，运行即可。",
            "",
            "**Files 文件**",
            *(f"- `{file}`" for file in files),
            "",
            "Files in ComfyUI's own folders are listed first in each loader. What is missing: *download* among the "
            "advanced inputs of a loader fetches it, or put it there yourself. `WanCore/tiny` needs no file: it draws "
            "coloured shapes, to try the graph out.",
            "",
            "加载器的列表先列出 ComfyUI 文件夹中已有的文件。缺少的文件：在加载器的高级输入中打开 *下载*，"
            "或自行放到上述位置。`WanCore/tiny` 不需要任何文件：只画彩色图形，用于试跑工作流。",
        ]
    )
