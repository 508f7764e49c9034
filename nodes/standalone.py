"""The host of a process without ComfyUI; its caller chooses folders and receives the progress."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from wan_core.files import files_below
from wan_core.loading.download import DEFAULT_FOLDER, models_folder
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.runtime import Runtime, default_device, free_bytes
from wan_core.sampling.preview import Previewer, preview_frames
from wan_core.settings import MemorySettings

from . import previews

PACK_FOLDER = Path(__file__).resolve().parents[1]
MODEL_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt")

Action = Callable[[], None]


class Standalone:
    """Services without ComfyUI, see `host.Host`. Weights leave the device after use: nothing would evict them later."""

    def __init__(
        self,
        *,
        device: str | None = None,
        models_dir: Path | None = None,
        input_dir: Path | None = None,
        output_dir: Path | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        preview_every: int = 0,
        typed: Iterable[str] = (),
    ) -> None:
        """
        Args:
            device: None or "auto" is the fastest of this machine.
            input_dir: None is `input` where the process runs.
            output_dir: None is `output` where the process runs.
            preview_every: steps of a sampler between two previews in `previews` of the output folder; 0 makes none.
            typed: names that the person who started the process typed. They may be any path, unlike those in a
                workflow, which may be a stranger's.
        """
        self._device = torch.device(device) if device and device != "auto" else None
        self._models_dir = models_dir
        self._input_dir, self._output_dir = input_dir or Path("input"), output_dir or Path("output")
        self._on_progress, self._preview_every = on_progress, preview_every
        self._typed = frozenset(typed)
        self._when_saved: list[Action] | None = None

    def device(self) -> torch.device:
        return self._device or default_device()

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
                    tiny = tiny or Previewer(previews.find_decoder(self), self.device())
                    pictures = tiny.strip(latents) or preview_frames(latents, geometry)
                    previews.write(pictures, self._output_dir / "previews", done)

        return Runtime(device=self.device(), dtype=dtype, on_progress=report)

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
        return self.models_dir() / "wancore_prompts"

    def trainer_folders(self) -> list[Path]:
        return [DEFAULT_FOLDER]

    def typed_names(self) -> frozenset[str]:
        return self._typed

    def annotated(self, name: str) -> tuple[str, Path]:
        return name, self.input_dir()

    def model_folders(self, folder: str) -> list[Path]:
        return [self.models_dir() / folder]

    def list_files(self, folder: str) -> list[str]:
        root = self.models_dir() / folder
        files = (f for f in files_below(root) if f.suffix.lower() in MODEL_SUFFIXES) if root.is_dir() else ()
        return sorted(f.relative_to(root).as_posix() for f in files)

    def model_path(self, folder: str, name: str) -> Path:
        return self.models_dir() / folder / name
