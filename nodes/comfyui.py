"""ComfyUI as the host. The only file that imports it."""

import contextlib
import shutil
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.latent_formats
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy import model_management
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import nn

from wan_core.atomic import creating
from wan_core.files import known_names_below
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.offload.blocks import weight_bytes
from wan_core.offload.weights import WeightProvider
from wan_core.runtime import Pace, Runtime, log
from wan_core.sampling.preview import Previewer
from wan_core.settings import MemorySettings

from . import previews
from .notices import OnNode
from .replacements import REPLACEMENTS

SECONDS_BETWEEN_NOTICES = 10
"""Of the time left, on the node and in the log."""

POLL = 0.25
"""Seconds between two looks at ComfyUI's history."""

CACHED = "execution_cached"
"""ComfyUI's message that names the nodes whose results were in its cache when a prompt began."""

ASSETS = Path(__file__).resolve().parents[1] / "workflows" / "assets"

GGUF_FOLDERS = ("diffusion_models", "text_encoders")
"""The models folders whose files may be GGUF."""

_residents: "weakref.WeakKeyDictionary[nn.Module, ResidentModel]" = weakref.WeakKeyDictionary()


class ComfyUI:
    """ComfyUI's services, see `host.Host`."""

    def device(self) -> torch.device:
        return model_management.get_torch_device()

    def offload_device(self) -> torch.device:
        return model_management.unet_offload_device()

    def runtime(self, dtype: torch.dtype, geometry: Geometry = DEFAULT_GEOMETRY) -> Runtime:
        device, reserved = self.device(), model_management.extra_reserved_memory
        return Runtime(
            device=device,
            dtype=dtype,
            on_progress=_progress_bars(self, device, geometry),
            check_cancelled=self.check_cancelled,
            free_memory=lambda size: model_management.free_memory(size + reserved(), device),
            memory_left=unreserved_memory,
        )

    def check_cancelled(self) -> None:
        model_management.throw_exception_if_processing_interrupted()

    def show_progress(self, phase: str, done: int, total: int, picture: Image.Image | None = None) -> None:
        preview = None if picture is None else ("JPEG", picture, max(picture.size))
        comfy.utils.ProgressBar(total).update_absolute(done, total, preview)

    def show_text(self, line: str, node_id: str | None) -> None:
        if node_id:
            _show(line, node_id)

    def workflow(self) -> contextlib.AbstractContextManager[None]:
        """Nothing around it: ComfyUI's executor runs workflows."""
        return contextlib.nullcontext()

    def when_saved(self, action: Callable[[], None]) -> None:
        """When the prompt has ended well or, after an error, the next one that takes the node's result from the cache;
        at once where a node is called alone.
        """
        server, running = _prompt_server(), get_executing_context()
        if server is None or running is None:
            action()
        else:
            arguments = (server, running.prompt_id, running.node_id, action)
            threading.Thread(target=_run_after, args=arguments, daemon=True).start()

    def free_device(self) -> None:
        model_management.unload_all_models()
        model_management.soft_empty_cache()

    def free_bytes(self) -> float | None:
        device = self.device()
        free = unreserved_memory(device)
        loaded = (known for known in model_management.current_loaded_models if known.device == device and known.model)
        return None if free is None else free + sum(known.model_loaded_memory() for known in loaded)

    def memory_settings(self) -> MemorySettings:
        """--lowvram and --novram stream every block."""
        states = model_management.VRAMState
        streams = model_management.vram_state in (states.LOW_VRAM, states.NO_VRAM)
        return MemorySettings(vram_limit=0.0 if streams else None)

    def keeps_weights(self) -> bool:
        return True

    def register_weights(self, module: nn.Module) -> None:
        known = model_management.current_loaded_models
        listed = any(loaded.model is not None and loaded.model.model is module for loaded in known)
        if listed or not WeightProvider.of(module).cached_bytes:
            return
        # What `LoadedModel.model_load` sets, without its loading: the weights are on the device already.
        resident = _residents.setdefault(module, ResidentModel(module, self.device(), self.offload_device()))
        loaded = model_management.LoadedModel(resident)
        loaded.real_model = weakref.ref(module)
        loaded.model_finalizer = weakref.finalize(module, model_management.cleanup_models)
        known.insert(0, loaded)  # the most recently used is the first

    def clip_vision_output(self, tokens: torch.Tensor) -> Any:
        output = comfy.clip_vision.Output()
        output.penultimate_hidden_states = tokens
        return output

    def models_dir(self) -> Path:
        return Path(folder_paths.models_dir)

    def input_dir(self) -> Path:
        return Path(folder_paths.get_input_directory())

    def output_dir(self) -> Path:
        return Path(folder_paths.get_output_directory())

    def temp_dir(self) -> Path:
        folder = Path(folder_paths.get_temp_directory())
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def prompts_dir(self) -> Path:
        return Path(folder_paths.get_user_directory()) / "wancore" / "prompts"

    def trainer_folders(self) -> list[Path]:
        return []

    def typed_names(self) -> frozenset[str]:
        """None: anybody who reaches ComfyUI's port may queue a workflow."""
        return frozenset()

    def annotated(self, name: str) -> tuple[str, Path]:
        """`name [output]` and `name [temp]` name a file of those folders."""
        plain, folder = folder_paths.annotated_filepath(name)
        return plain, Path(folder) if folder else self.input_dir()

    def model_folders(self, folder: str) -> list[Path]:
        """With those of extra_model_paths.yaml."""
        with contextlib.suppress(KeyError):
            return [Path(place) for place in folder_paths.get_folder_paths(folder)]
        return []

    def list_files(self, folder: str) -> list[str]:
        """ComfyUI's list, and in the folders of `GGUF_FOLDERS` the GGUF files, which it leaves out."""
        with contextlib.suppress(KeyError):
            listed = folder_paths.get_filename_list(folder)
            roots = self.model_folders(folder) if folder in GGUF_FOLDERS else []
            return sorted({*listed, *known_names_below(tuple(roots), (".gguf",))})
        return []

    def model_path(self, folder: str, name: str) -> Path:
        return Path(folder_paths.get_full_path(folder, name))


def unreserved_memory(device: torch.device) -> int | None:
    """Free bytes of a device, less those that ComfyUI reserves (--reserve-vram); None for a CPU."""
    if device.type == "cpu":
        return None
    return model_management.get_free_memory(device) - model_management.extra_reserved_memory()


def _prompt_server() -> Any | None:
    # ComfyUI loads it before any node runs. Only a script that uses ComfyUI's parts has none, and importing it there
    # would start one.
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _running() -> tuple[str, str] | None:
    context = get_executing_context()
    return None if context is None else (context.prompt_id, context.node_id)


def _show(text: str, node_id: str) -> None:
    server = _prompt_server()
    if server is not None:
        with previews.never_fail():
            server.send_progress_text(text, node_id)


log.addHandler(OnNode(_running, _show))


def announce(server: Any) -> None:
    """Tell ComfyUI which nodes of another pack ours replace; versions before 0.13 do not ask."""
    manager = getattr(server, "node_replace_manager", None)
    if manager is None:
        return
    from comfy_api.latest import io

    for each in REPLACEMENTS:
        manager.register(
            io.NodeReplace(
                new_node_id=each.new,
                old_node_id=each.old,
                old_widget_ids=list(each.widgets),
                input_mapping=each.input_mapping(),
                output_mapping=[{"new_idx": 0, "old_idx": 0}],
            )
        )


def offer_demo_inputs() -> None:
    """Copy the pictures and clips of the shipped workflows into the input folder, as its lists show nothing else.

    A file of the user's with such a name stays, and a disk that cannot be written is left alone.
    """
    for asset in ASSETS.iterdir():
        target = Path(folder_paths.get_input_directory(), asset.name)
        if asset.is_file() and not target.exists():
            # ValueError: another process has just made it.
            with contextlib.suppress(OSError, ValueError), creating(target) as partial:
                shutil.copyfile(asset, partial)


async def _on_startup(_: Any) -> None:
    offer_demo_inputs()


# Not in a script that uses ComfyUI's parts.
if (_server := _prompt_server()) is not None:
    announce(_server)
    _server.app.on_startup.append(_on_startup)


def _run_after(server: Any, prompt_id: str, node_id: str, action: Callable[[], None]) -> None:
    """Do `action` once a prompt has ended well: this one, or a later one.

    When the result of `node_id` has left ComfyUI's cache by then, nothing is done: the node runs again and registers a
    new action.
    """
    status = _wait_for_status(server, prompt_id)
    while status is not None and not status["completed"]:
        while server.last_prompt_id == prompt_id:
            time.sleep(POLL)
        prompt_id = server.last_prompt_id
        status = _wait_for_status(server, prompt_id)
        cached = () if status is None else (data["nodes"] for name, data in status["messages"] if name == CACHED)
        if not any(node_id in nodes for nodes in cached):
            return
    if status is not None:
        action()


def _wait_for_status(server: Any, prompt_id: str) -> dict[str, Any] | None:
    """Wait for a prompt to end; its status in ComfyUI's history, None where it was removed from there."""
    running = True
    while running:
        time.sleep(POLL)
        # Asked first: the next prompt begins after this one has got into the history.
        running = server.last_prompt_id == prompt_id
        for entry in server.prompt_queue.get_history(prompt_id=prompt_id).values():
            return entry["status"]
    return None


LATENT_FORMATS = {16: "Wan21", 48: "Wan22"}
"""ComfyUI's classes by the channels of a latent."""


def _progress_bars(host: ComfyUI, device: torch.device, geometry: Geometry) -> Callable[..., None]:
    """Progress for ComfyUI's bar, with a picture while sampling where it shows any, and the time left in the log."""
    bars: dict[str, Any] = {}
    pace, noticed = Pace(), time.monotonic()
    previewer, tiny = None, None
    with previews.never_fail():
        form = getattr(comfy.latent_formats, LATENT_FORMATS[geometry.channels])
        previewer = latent_preview.get_previewer(device, form())

    def report(phase: str, done: int, total: int, latents: torch.Tensor | None = None) -> None:
        nonlocal noticed, tiny
        picture = None
        if latents is not None and previewer is not None:
            with previews.never_fail():
                tiny = tiny or Previewer(previews.find_decoder(host, latents.shape[1]), device)
                own = type(previewer).__module__ == latent_preview.__name__
                picture = previews.for_editor(previewer, own, tiny, latents, latent_preview.MAX_PREVIEW_RESOLUTION)
        bars.setdefault(phase, comfy.utils.ProgressBar(total)).update_absolute(done, total, picture)
        left = pace.left(phase, done, total)
        if left and time.monotonic() - noticed > SECONDS_BETWEEN_NOTICES:
            noticed = time.monotonic()
            log.info("%s %d/%d%s", phase, done, total, left, extra={"passing": True})

    return report


class ResidentModel:
    """A model whose weights stay on the device for its next use, with what ComfyUI's model management asks of a model
    that it may evict (`comfy.model_management.LoadedModel`).

    It refers to the module weakly: nothing is held once the graph drops it.
    """

    parent = None

    def __init__(self, module: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self._module = weakref.ref(module)
        self.load_device, self.offload_device = load_device, offload_device

    @property
    def model(self) -> nn.Module | None:
        return self._module()

    def _owner(self) -> nn.Module:
        module = self._module()
        assert module is not None, "ComfyUI drops a model whose module is gone"
        return module

    @property
    def _provider(self) -> WeightProvider:
        return WeightProvider.of(self._owner())

    def model_size(self) -> int:
        """Bytes of all weights."""
        return weight_bytes(self._owner())

    def loaded_size(self) -> int:
        """Bytes that are on the device."""
        return self._provider.cached_bytes

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0) -> int:
        """Free at least so many bytes of the device; the bytes that were freed."""
        return self._provider.evict(memory_to_free)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Bytes loaded: none, weights come back when the model is used."""
        return 0

    def detach(self, unpatch_all: bool = True) -> nn.Module | None:
        """Free everything."""
        self._provider.evict()
        return self._module()

    def model_patches_models(self) -> list["ResidentModel"]:
        return []

    def model_patches_to(self, target: torch.device | torch.dtype) -> None: ...

    def model_dtype(self) -> torch.dtype | None:
        return None

    def lowvram_patch_counter(self) -> int:
        return 0

    def is_clone(self, other: object) -> bool:
        """Whether `other` stands for the same module."""
        return getattr(other, "model", None) is self._module()
