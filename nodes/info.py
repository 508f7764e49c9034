"""What a checkpoint is, before it is loaded."""

from typing import Any

from wan_core.inspection import report

from . import host, sockets

FOLDERS = ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")


class CheckpointInfo:
    """Kind, variant, size, needs and preset of a model file, read from its header."""

    CATEGORY = "WanCore/loaders"
    FUNCTION = "inspect"
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Say what a model file is, what it takes and which settings its authors recommend. Reads only its header."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The report, one fact per line.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = [f"{folder}/{name}" for folder in FOLDERS for name in host.list_files(folder)]
        listed = files or ["none"]
        return {"required": {"file": sockets.choice(listed, listed[0], "A file in one of ComfyUI's model folders.")}}

    def inspect(self, file: str) -> dict[str, Any]:
        folder, _, name = file.partition("/")
        text = str(report(host.find_file(folder, name)))
        return {"ui": {"text": [text]}, "result": (text,)}
