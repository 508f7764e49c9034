"""What the nodes ask of the program that runs them, and that program when it is not ComfyUI: `Standalone`, whose caller
chooses folders and receives the progress.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from PIL import Image

from wan_core import catalog
from wan_core.files import names_below
from wan_core.loading.download import DEFAULT_FOLDER, models_folder
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.parallel.mesh import Ranks
from wan_core.runtime import Runtime, default_device, free_bytes, log
from wan_core.sampling.preview import Previewer, preview_frames
from wan_core.settings import MemorySettings

from . import previews

PACK_FOLDER = Path(__file__).resolve().parents[1]
MODEL_SUFFIXES = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")

OLD_FOLDERS = {"diffusion_models": "unet", "text_encoders": "clip"}
"""Further folders in which ComfyUI looks for the models of a folder: their names in its first versions."""

Action = Callable[[], None]

TINY_SIZE = {name: getattr(catalog.TINY_PRESET, name) for name in ("width", "height", "num_frames")}
"""What `--tiny` makes of every node's size: a second of work on any machine."""
TINY_PROMPT = "a red ball moves to the right over a green field"
"""What it makes of prompts: the bundled text encoder has only the words of `trainer.data.synthetic`."""


class Host(Protocol):
    """The services of `comfyui.ComfyUI` and `Standalone`."""

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


class Standalone:
    """Services without ComfyUI, see `Host`. Weights leave the device after use: nothing would evict them later."""

    def __init__(
        self,
        *,
        device: str | None = None,
        models_dir: Path | None = None,
        input_dir: Path | None = None,
        output_dir: Path | None = None,
        prompts_dir: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        preview_every: int = 0,
        typed: Iterable[str] = (),
        ranks: Ranks | None = None,
    ) -> None:
        """
        Args:
            device: None or "auto" is the fastest of this machine.
            input_dir: None is `input` where the process runs.
            output_dir: None is `output` where the process runs.
            prompts_dir: None is `wancore_prompts` of the models folder.
            preview_every: steps of a sampler between two previews in `previews` of the output folder; 0 makes none.
            typed: names that the person who started the process typed. They may be any path, unlike those in a
                workflow, which may be a stranger's.
            ranks: of which this process is the first, if several share the work.
        """
        self._device = torch.device(device) if device and device != "auto" else None
        self._ranks = ranks
        self._models_dir = models_dir
        self._input_dir, self._output_dir = input_dir or Path("input"), output_dir or Path("output")
        self._prompts_dir = prompts_dir
        self._on_progress, self._preview_every = on_progress, preview_every
        self._typed = frozenset(typed)
        self._when_saved: list[Action] | None = None

    def device(self) -> torch.device:
        return self._ranks.device if self._ranks else self._device or default_device()

    def offload_device(self) -> torch.device:
        return torch.device("cpu")

    def runtime(self, dtype: torch.dtype, geometry: Geometry = DEFAULT_GEOMETRY) -> Runtime:
        tiny: Previewer | None = None

        def report(phase: str, done: int, total: int, latents: torch.Tensor | None = None) -> None:
            nonlocal tiny
            self.show_progress(phase, done, total)
            every = self._preview_every
            if latents is not None and every and (done % every == 0 or done == total):
                with previews.never_fail():
                    tiny = tiny or Previewer(previews.find_decoder(self, latents.shape[1]), self.device())
                    pictures = tiny.strip(latents) or preview_frames(latents, geometry)
                    previews.write(pictures, self._output_dir / "previews", done)

        return Runtime(device=self.device(), dtype=dtype, on_progress=report, ranks=self._ranks)

    def check_cancelled(self) -> None:
        """Nothing: Ctrl-C raises by itself."""

    def show_progress(self, phase: str, done: int, total: int, picture: Image.Image | None = None) -> None:
        if self._on_progress:
            self._on_progress(phase, done, total)

    def show_text(self, line: str, node_id: str | None) -> None:
        """Nothing: there is no editor."""

    @contextmanager
    def workflow(self) -> Iterator[None]:
        """Actions of `when_saved` are done at the end of the block, and not at all after an error."""
        before, self._when_saved = self._when_saved, []
        try:
            yield
            for action in self._when_saved:
                action()
        finally:
            self._when_saved = before

    def when_saved(self, action: Action) -> None:
        """At the end of the workflow; at once where a node is called alone."""
        if self._when_saved is None:
            action()
        else:
            self._when_saved.append(action)

    def free_device(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def free_bytes(self) -> float | None:
        return free_bytes(self.device())

    def memory_settings(self) -> MemorySettings:
        return MemorySettings()

    def keeps_weights(self) -> bool:
        return False

    def register_weights(self, module: torch.nn.Module) -> None:
        """Nothing: no weights stay."""

    def clip_vision_output(self, tokens: torch.Tensor) -> Any:
        return SimpleNamespace(penultimate_hidden_states=tokens)

    def models_dir(self) -> Path:
        # Files do not belong where pip installs packages; models are then looked for in the current folder.
        own = PACK_FOLDER / "models" if (PACK_FOLDER / "wan_core").is_dir() else None
        return models_folder(self._models_dir or own).absolute()

    def input_dir(self) -> Path:
        return self._input_dir.absolute()

    def output_dir(self) -> Path:
        return self._output_dir.absolute()

    def temp_dir(self) -> Path:
        folder = self.output_dir() / "temp"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def prompts_dir(self) -> Path:
        return self._prompts_dir or self.models_dir() / "wancore_prompts"

    def trainer_folders(self) -> list[Path]:
        return [DEFAULT_FOLDER]

    def typed_names(self) -> frozenset[str]:
        return self._typed

    def annotated(self, name: str) -> tuple[str, Path]:
        return name, self.input_dir()

    def model_folders(self, folder: str) -> list[Path]:
        return [self.models_dir() / name for name in (folder, OLD_FOLDERS.get(folder)) if name]

    def list_files(self, folder: str) -> list[str]:
        return names_below(self.model_folders(folder), MODEL_SUFFIXES)

    def model_path(self, folder: str, name: str) -> Path:
        places = [root / name for root in self.model_folders(folder)]
        return next((path for path in places if path.exists()), places[0])


def check_folder_name(name: str) -> None:
    """Warn of a name of the pack's folder that ComfyUI's server cannot make addresses of."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        log.warning(
            "WanCore is in a folder called %r. ComfyUI cannot serve templates and help pages from a folder whose name "
            "holds anything but letters, digits, '.', '_' and '-': rename it to 'wancore' and restart.", name,
        )  # fmt: skip


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
