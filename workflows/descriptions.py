"""The shipped workflows. Each is described here once; `python -m workflows.build` writes the JSON files."""

from collections.abc import Callable
from typing import Any

from .graph import Graph, Stage, Step

T2V_BASE = "Wan-AI/Wan2.1-T2V-1.3B"
FPS = 16.0


def _load(model_id: str) -> Stage:
    return Stage(
        "Models",
        [
            Step("Load model", "WanCoreModelLoader", {"model": model_id}),
            Step("Load text encoder", "WanCoreTextEncoderLoader", {"text_encoder": T2V_BASE}),
            Step("Load VAE", "WanCoreVAELoader", {"vae": T2V_BASE}),
        ],
    )


def _sample(settings: dict[str, Any]) -> Stage:
    links = {"model": ("Load model", 0), "conditioning": ("Prompt", 0)}
    return Stage("Sampling", [Step("Sampler", "WanCoreSampler", {**links, **settings})])


def _save(name: str) -> Stage:
    return Stage(
        "Video",
        [
            Step("Decode", "WanCoreVAEDecode", {"vae": ("Load VAE", 0), "latent": ("Sampler", 0)}),
            Step("Create video", "CreateVideo", {"images": ("Decode", 0), "fps": FPS}),
            Step(
                "Save video",
                "SaveVideo",
                {
                    "video": ("Create video", 0),
                    "filename_prefix": f"video/wancore_{name}",
                    "format": "mp4",
                    "codec": "h264",
                },
            ),
        ],
    )


def t2v() -> Graph:
    note = (
        "## Text to video\n\nA prompt becomes a video of five seconds at 480p.\n\n"
        "**Files** (fetched when `download` is on, or put them there yourself):\n"
        "- `models/Wan-AI/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors`\n"
        "- `models/Wan-AI/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth`\n"
        "- `models/Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth`\n"
        "- `models/Wan-AI/Wan2.1-T2V-1.3B/google/umt5-xxl/`\n\n"
        "Files that you already have in ComfyUI's own folders appear in the lists too. "
        "`WanCore/tiny` needs no file: it draws abstract patterns, to try the graph out."
    )
    prompt = "A small town at sunset, warm lights along a river, gentle camera movement, cinematic"
    encode = Step("Prompt", "WanCoreTextEncode", {"text_encoder": ("Load text encoder", 0), "prompt": prompt})
    settings = {"cfg": 6.0, "shift": 8.0}
    return Graph("t2v", note, [_load(T2V_BASE), Stage("Prompt", [encode]), _sample(settings), _save("t2v")])


WORKFLOWS: tuple[Callable[[], Graph], ...] = (t2v,)
