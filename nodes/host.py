"""ComfyUI's services, and what takes their place when the nodes run without it. The only file that imports ComfyUI."""

import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from wan_core.files import files_below
from wan_core.loading.download import models_folder
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.offload.weights import Residency
from wan_core.runtime import Pace, Runtime, default_device, free_bytes, log
from wan_core.sampling.preview import Previewer, middle_frame, preview_frames
from wan_core.settings import MemorySettings

from . import previews
from .resident import ResidentModel

try:
    import comfy.clip_vision as clip_vision
    import comfy.latent_formats as latent_formats
    import comfy.model_management as model_management
    import comfy.utils as comfy_utils
    import folder_paths
    import latent_preview
    from comfy_execution.utils import get_executing_context
except ImportError:
    model_management = comfy_utils = folder_paths = latent_preview = latent_formats = clip_vision = None

PACK_FOLDER = Path(__file__).resolve().parents[1]
MODEL_SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".bin", ".ckpt")

TINY_SIZE = {"width": 96, "height": 64, "num_frames": 17}
"""What `--tiny` makes of every node's size: a second of work on any machine."""

PREVIEW_FOLDER = "vae_approx"
PREVIEW_FILES = ("taew2_1.safetensors", "taew2_1.pth")
"""The published names of the tiny autoencoder for Wan 2.1, the one that is taken first."""

SECONDS_BETWEEN_NOTICES = 30

OnProgress = Callable[[str, int, int], None]
Report = Callable[[str, int, int, torch.Tensor | None], None]


@dataclass
class _Standalone:
    """Settings of a process without ComfyUI."""

    device: torch.device | None = None
    models_dir: Path | None = None
    input_dir: Path = Path("input")
    output_dir: Path = Path("output")
    on_progress: OnProgress | None = None
    preview_every: int = 0
    typed: frozenset[str] = frozenset()


_standalone = _Standalone()
_residents: "weakref.WeakKeyDictionary[torch.nn.Module, ResidentModel]" = weakref.WeakKeyDictionary()


def configure(
    *,
    device: str | None = None,
    models_dir: Path | None = None,
    input_dir: Path | None = None,
    output_dir: Path | None = None,
    on_progress: OnProgress | None = None,
    preview_every: int = 0,
    typed: Iterable[str] = (),
) -> None:
    """Set the device, the folders and the progress report of a process that has no ComfyUI.

    Input files are looked for in `input` of the current folder when `input_dir` is None; `output` is alike. Every
    `preview_every` steps of a sampler a preview goes into `previews` of the output folder; 0 makes none. Names in
    `typed` come from the person who started the process, and not from a workflow: they may be any path.
    """
    _standalone.device = torch.device(device) if device and device != "auto" else None
    _standalone.models_dir = models_dir
    _standalone.input_dir = input_dir or Path("input")
    _standalone.output_dir = output_dir or Path("output")
    _standalone.on_progress = on_progress
    _standalone.preview_every = preview_every
    _standalone.typed = frozenset(typed)


def device() -> torch.device:
    """Where models compute."""
    if model_management:
        return model_management.get_torch_device()
    return _standalone.device or default_device()


def resting_device() -> torch.device:
    """Where weights rest while another model works."""
    if model_management:
        return model_management.unet_offload_device()
    return torch.device("cpu")


def runtime(dtype: torch.dtype) -> Runtime:
    """The host's services."""
    if not model_management:
        return Runtime(device=device(), dtype=dtype, on_progress=_standalone_report())
    return Runtime(
        device=device(),
        dtype=dtype,
        on_progress=_comfyui_report(),
        check_cancelled=model_management.throw_exception_if_processing_interrupted,
        free_memory=lambda size: model_management.free_memory(
            size + model_management.extra_reserved_memory(), device()
        ),
        memory_left=_memory_left,
    )


def _memory_left(place: torch.device) -> int | None:
    """What ComfyUI leaves to inference on a device, less what --reserve-vram keeps for others; no limit on the CPU."""
    if place.type == "cpu":
        return None
    return model_management.get_free_memory(place) - model_management.extra_reserved_memory()


def check_cancelled() -> None:
    """Raise the host's own exception when the user wants to stop; without ComfyUI Ctrl-C raises by itself."""
    if model_management:
        model_management.throw_exception_if_processing_interrupted()


def free_device() -> None:
    """Take every model of this process off the device, for another process that needs it."""
    if model_management:
        model_management.unload_all_models()
        model_management.soft_empty_cache()
    elif torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(phase: str, done: int, total: int, picture: Image.Image | None = None) -> None:
    """Progress of work that another process does, with a picture of it in the editor."""
    if not comfy_utils:
        if _standalone.on_progress:
            _standalone.on_progress(phase, done, total)
        return
    preview = None if picture is None else ("JPEG", picture, max(picture.size))
    comfy_utils.ProgressBar(total).update_absolute(done, total, preview)


def say(line: str, node_id: str | None) -> None:
    """A line of text on a node of the editor."""
    server = prompt_server()
    if server and node_id:
        with previews.never_fail():
            server.send_progress_text(line, node_id)


def prompt_server() -> Any | None:
    """ComfyUI's server; None without one."""
    # It is loaded by the time that any node runs; a script that only imports ComfyUI's parts has none.
    module = sys.modules.get("server") if comfy_utils else None
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def executing() -> tuple[str, str] | None:
    """The ids of the prompt and of the node that ComfyUI runs in this thread; None outside of a run."""
    context = get_executing_context() if comfy_utils else None
    return context and (context.prompt_id, context.node_id)


def memory_left() -> float | None:
    """Bytes that work may use on the device; what waits there for its next use makes room. None without a limit."""
    place = device()
    if not model_management:
        return free_bytes(place)
    left = _memory_left(place)
    loaded = (known for known in model_management.current_loaded_models if known.device == place and known.model)
    return None if left is None else left + sum(known.model_loaded_memory() for known in loaded)


def memory_settings() -> MemorySettings:
    """What ComfyUI's options say of memory: --lowvram and --novram stream every block."""
    least = model_management and model_management.vram_state in (
        model_management.VRAMState.LOW_VRAM,
        model_management.VRAMState.NO_VRAM,
    )
    return MemorySettings(vram_limit=0.0 if least else None)


def keeps_weights() -> bool:
    """Whether weights wait on the device for the next run: in ComfyUI, which evicts them when others need the room."""
    return model_management is not None


def account_for(module: torch.nn.Module) -> None:
    """Show ComfyUI the weights of `module` that wait on the device, so that it can evict them."""
    if not model_management or not Residency.of(module).kept_bytes:
        return
    known = model_management.current_loaded_models
    if any(loaded.model is not None and loaded.model.model is module for loaded in known):
        return
    resident = _residents.setdefault(module, ResidentModel(module, device(), resting_device()))
    loaded = model_management.LoadedModel(resident)
    loaded.real_model = weakref.ref(module)
    loaded.model_finalizer = weakref.finalize(module, model_management.cleanup_models)
    known.insert(0, loaded)


def clip_vision_output(tokens: torch.Tensor) -> object:
    """Image tokens (B, N, 1280) as ComfyUI's CLIP_VISION_OUTPUT; its Wan models read nothing else of it."""
    output = clip_vision.Output() if clip_vision else SimpleNamespace()
    output.penultimate_hidden_states = tokens
    return output


def _standalone_report() -> Report:
    """Progress for whoever configured this process, and previews as files."""
    tiny: Previewer | None = None

    def report(phase: str, done: int, total: int, latents: torch.Tensor | None = None) -> None:
        nonlocal tiny
        if _standalone.on_progress:
            _standalone.on_progress(phase, done, total)
        every = _standalone.preview_every
        if latents is not None and every and (done % every == 0 or done == total):
            with previews.never_fail():
                tiny = tiny or Previewer(_preview_decoder(), device())
                pictures = tiny.strip(latents) or preview_frames(latents)
                previews.write(pictures, _standalone.output_dir / "previews", done)

    return report


def _comfyui_report() -> Report:
    """Progress for ComfyUI's bar, with a picture while sampling where it shows any, and the time left in the log."""
    bars: dict[str, object] = {}
    pace, said = Pace(), time.monotonic()
    previewer, tiny = None, None
    with previews.never_fail():
        previewer = latent_preview.get_previewer(device(), latent_formats.Wan21())

    def report(phase: str, done: int, total: int, latents: torch.Tensor | None = None) -> None:
        nonlocal said, tiny
        picture = None
        if latents is not None and previewer is not None:
            with previews.never_fail():
                tiny = tiny or Previewer(_preview_decoder(), device())
                picture = _picture(previewer, tiny, latents)
        bars.setdefault(phase, comfy_utils.ProgressBar(total)).update_absolute(done, total, picture)
        left = pace.left(phase, done, total)
        if left and time.monotonic() - said > SECONDS_BETWEEN_NOTICES:
            said = time.monotonic()
            log.info("%s %d/%d%s", phase, done, total, left)

    return report


def _picture(previewer: object, tiny: Previewer, latents: torch.Tensor) -> tuple | None:
    """What ComfyUI shows next, or None to leave the last picture.

    Previewers of other packs play the whole strip. ComfyUI's own shows the first frame it sees; the tiny autoencoder
    takes its place where there is one.
    """
    if type(previewer).__module__ != latent_preview.__name__:
        return previewer.decode_latent_to_preview_image("JPEG", latents)
    if not tiny.works:
        return previewer.decode_latent_to_preview_image("JPEG", middle_frame(latents))
    picture = tiny.middle(latents)
    return None if picture is None else ("JPEG", picture, latent_preview.MAX_PREVIEW_RESOLUTION)


def _preview_decoder() -> PreviewDecoder | None:
    """The tiny autoencoder, if its file is there and can be used."""
    names = list_files(PREVIEW_FOLDER)
    found = (name for wanted in PREVIEW_FILES for name in names if Path(name).name == wanted)
    name = next(found, None)
    if name is None:
        return None
    path = find_file(PREVIEW_FOLDER, name)
    return previews.load_decoder(path, path.stat().st_mtime_ns)


def models_dir() -> Path:
    """Root of `<org>/<repo>` folders as ModelScope lays them out, and of ComfyUI's model folders."""
    if folder_paths:
        return Path(folder_paths.models_dir)
    # Where pip put the pack is no place for files; then models are looked for where the command runs.
    own = PACK_FOLDER / "models" if (PACK_FOLDER / "wan_core").is_dir() else None
    return models_folder(_standalone.models_dir or own).absolute()


def in_comfyui() -> bool:
    """Whether the folders are ComfyUI's."""
    return folder_paths is not None


def typed_names() -> frozenset[str]:
    """Names that the person who started this process has typed; none in ComfyUI, which anybody may reach."""
    return frozenset() if folder_paths else _standalone.typed


def input_dir() -> Path:
    """The folder of pictures, clips and data sets."""
    return Path(folder_paths.get_input_directory()) if folder_paths else _standalone.input_dir.absolute()


def temp_dir() -> Path:
    """The folder of files that nobody keeps, made when it is absent."""
    folder = Path(folder_paths.get_temp_directory()) if folder_paths else output_dir() / "temp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def annotated(name: str) -> tuple[str, Path]:
    """An input file's name and the folder to look for it in: ComfyUI's `name [output]` and `name [temp]` say which."""
    plain, folder = folder_paths.annotated_filepath(name) if folder_paths else (name, None)
    return plain, Path(folder) if folder else input_dir()


def model_folders(folder: str) -> list[Path]:
    """Where model files of a kind are, such as "loras", with extra_model_paths.yaml."""
    if not folder_paths:
        return [models_dir() / folder]
    with contextlib.suppress(KeyError):
        return [Path(place) for place in folder_paths.get_folder_paths(folder)]
    return []


def output_dir() -> Path:
    """The folder that results go to."""
    return Path(folder_paths.get_output_directory()) if folder_paths else _standalone.output_dir.absolute()


def prompts_dir() -> Path:
    """The folder that encoded prompts are kept in: below ComfyUI's user folder, else below the models folder."""
    if folder_paths and hasattr(folder_paths, "get_user_directory"):
        return Path(folder_paths.get_user_directory()) / "wancore" / "prompts"
    return models_dir() / "wancore_prompts"


def list_files(folder: str) -> list[str]:
    """Model files in ComfyUI's folder of that name (with extra_model_paths.yaml), relative to it, sorted."""
    if folder_paths:
        with contextlib.suppress(KeyError):
            return list(folder_paths.get_filename_list(folder))
        return []
    root = models_dir() / folder
    files = (f for f in files_below(root) if f.suffix.lower() in MODEL_SUFFIXES) if root.is_dir() else ()
    return sorted(f.relative_to(root).as_posix() for f in files)


def find_file(folder: str, name: str) -> Path:
    """The full path of a name from `list_files`.

    Raises:
        ValueError: there is no such file.
    """
    if name not in list_files(folder):
        raise ValueError(f"There is no file {name!r} in the models folder {folder!r}.")
    return Path(folder_paths.get_full_path(folder, name)) if folder_paths else models_dir() / folder / name
