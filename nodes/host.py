"""What the nodes ask of the program that runs them: ComfyUI, or a process without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.runtime import Runtime
from wan_core.settings import MemorySettings

from .standalone import PACK_FOLDER, Standalone

__all__ = ["PACK_FOLDER", "TINY_SIZE", "Host", "configure", "current"]

TINY_SIZE = {"width": 96, "height": 64, "num_frames": 17}
"""What `--tiny` makes of every node's size: a second of work on any machine."""


class Host(Protocol):
    """The services of `comfyui.ComfyUI` and `standalone.Standalone`."""

    def device(self) -> torch.device:
        """Where models compute."""

    def offload_device(self) -> torch.device:
        """Where weights are kept while another model works."""

    def runtime(self, dtype: torch.dtype, geometry: Geometry = DEFAULT_GEOMETRY) -> Runtime:
        """Device, progress, previews, cancellation and memory, as the library asks for them.

        `geometry` is that of the latents that previews show.
        """

    def check_cancelled(self) -> None:
        """Raise the host's own exception when the user wants to stop."""

    def show_progress(self, phase: str, done: int, total: int, picture: Image.Image | None = None) -> None:
        """Show the progress of work that another process does, with a picture of it where there is an editor."""

    def show_text(self, line: str, node_id: str | None) -> None:
        """Show a line of text on a node of the editor."""

    def workflow(self) -> AbstractContextManager[None]:
        """The context in which headless runs a workflow."""

    def when_saved(self, action: Callable[[], None]) -> None:
        """Do `action` once the files that the workflow makes of the running node's result are saved.

        After an error it is not done, so that the next run finds what it would have removed.
        """

    def free_device(self) -> None:
        """Take every model of this process off the device, for another process that needs it."""

    def free_bytes(self) -> float | None:
        """Bytes that work may use on the device, with those that the host can evict; None without a limit."""

    def memory_settings(self) -> MemorySettings:
        """The host's own options about memory."""

    def keeps_weights(self) -> bool:
        """Whether weights stay on the device for the next run, because the host evicts them when others need it."""

    def register_weights(self, module: torch.nn.Module) -> None:
        """Tell the host of the weights of `module` that stay on the device."""

    def clip_vision_output(self, tokens: torch.Tensor) -> Any:
        """Image tokens (B, N, 1280) as ComfyUI's CLIP_VISION_OUTPUT; its Wan models read nothing else of it."""

    def models_dir(self) -> Path:
        """Root of `<org>/<repo>` folders as ModelScope lays them out, and of ComfyUI's model folders."""

    def input_dir(self) -> Path:
        """The folder of pictures, videos and data sets."""

    def output_dir(self) -> Path:
        """The folder of results."""

    def temp_dir(self) -> Path:
        """The folder of temporary files, made when it is absent."""

    def prompts_dir(self) -> Path:
        """The folder in which encoded prompts are cached."""

    def trainer_folders(self) -> list[Path]:
        """Where trainings that were started from a shell write, besides the models folders."""

    def typed_names(self) -> frozenset[str]:
        """Names that the person who started this process typed, which may be any path."""

    def annotated(self, name: str) -> tuple[str, Path]:
        """An input file's name and the folder to look for it in."""

    def model_folders(self, folder: str) -> list[Path]:
        """Where model files of a folder such as "loras" are."""

    def list_files(self, folder: str) -> list[str]:
        """Model files in a folder such as "loras", relative to it, sorted."""

    def model_path(self, folder: str, name: str) -> Path:
        """The full path of a name from `list_files`; `places.model_file` checks names from elsewhere."""


def _find_host() -> Host:
    if find_spec("folder_paths") is None or find_spec("comfy") is None:
        return Standalone()
    # Imports ComfyUI, so only here. A part of it that is missing is an error: running on without it would look for
    # models in the wrong folders.
    from .comfyui import ComfyUI

    return ComfyUI()


current: Host = _find_host()
"""The host of this process. Read it as `host.current` at each use: `configure` replaces it."""


def configure(**settings: Any) -> None:
    """Run the nodes without ComfyUI from here on; `settings` are the arguments of `Standalone`, all optional."""
    global current
    current = Standalone(**settings)
