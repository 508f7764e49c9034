"""Hostile and broken workflows: a stranger's file, run as `python -m headless run` runs it.

Each trial is a workflow of its own. It must be refused in words that name the node and the input, or do what it was
made for; nothing outside of the folders may be read or written, no process started but the pack's own, no server
reached.
"""

import contextlib
import getpass
import json
import os
import random
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.attack import Trial
from tests.attack.hostile import FLAGS, NAMED, VALUES, structural
from tests.attack.watch import StartedError, Watch
from tests.lora.fixtures import trained_weights
from wan_core import catalog
from wan_core.sampling.checkpoint import save_latents
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.runner import NodeError, run
from wancore.headless.schema import NodeSchema, schemas_of
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, host
from wancore.nodes.sockets import LINKED
from wancore.nodes.training_inputs import TrainingData
from wancore.trainer.data.synthetic import write_dataset

SECONDS = 90
MEMORY = 1 << 30
"""Bytes that a trial may take; the tiny models with PyTorch's own buffers take a few hundred MB."""

RAW = ("object has no attribute", "not subscriptable", "unhashable type", "NoneType", "codec can't", "must be str",
       "recursion depth", "unexpected keyword", "not iterable", "cannot be interpreted", "embedded null",
       "[Errno")  # fmt: skip
"""What Python says when nobody has looked at a value."""

CONVERTED = re.compile("Failed to convert an input value to a .*")
"""ComfyUI's own message, which quotes Python."""

NOT_HERE = {"WanCoreFromVAE"}
"""Nodes whose sockets only ComfyUI itself can fill."""

Prompt = dict[str, dict[str, Any]]


class Data:
    """A data set that was checked."""

    RETURN_TYPES = ("WANCORE_TRAINING_DATA",)
    FUNCTION = "give"
    folder = Path()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def give(self) -> tuple[TrainingData]:
        settings = {"dataset_base_path": str(self.folder), "height": 32, "width": 32, "num_frames": 5}
        return (TrainingData(settings, "mark"),)


class Sink:
    """Takes anything, so that whatever is before it runs."""

    RETURN_TYPES = ()
    FUNCTION = "take"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*",)}}

    def take(self, value: Any) -> dict[str, Any]:
        return {}


SOURCES: dict[str, tuple[str, dict[str, Any], int]] = {
    "WANCORE_MODEL": ("WanCoreModelLoader", {"model": catalog.TINY}, 0),
    "WANCORE_TEXT_ENCODER": ("WanCoreTextEncoderLoader", {"text_encoder": catalog.TINY}, 0),
    "WANCORE_VAE": ("WanCoreVAELoader", {"vae": catalog.TINY}, 0),
    "WANCORE_IMAGE_ENCODER": ("WanCoreImageEncoderLoader", {"image_encoder": catalog.TINY}, 0),
    "WANCORE_CONDITIONING": ("WanCoreTextEncode", {"prompt": "a boat"}, 0),
    "WANCORE_CAMERA_PATH": ("WanCoreCameraPath", {"direction": "Left", "speed": 0.1, "num_frames": 5}, 0),
    "WANCORE_TRAINING_DATA": ("AttackData", {}, 0),
    "IMAGE": ("LoadImage", {"image": "start.png"}, 0),
    "LATENT": ("WanCoreLoadLatents", {"file": "wancore/kept_00001_.latent"}, 0),
    "CONDITIONING": ("WanCoreToConditioning", {"width": 32, "height": 32, "num_frames": 5}, 0),
    "VIDEO": ("CreateVideo", {"fps": 16.0}, 0),
}
"""What gives a value of each type, and which of its outputs."""

SMALL = {"width": 32, "height": 32, "num_frames": 5, "steps": 1, "model": catalog.TINY, "text_encoder": catalog.TINY,
         "vae": catalog.TINY, "image_encoder": catalog.TINY, "adapter": catalog.TINY, "fps": 16.0, "max_steps": 1,
         "folder": "data", "file": "wancore/kept_00001_.latent", "image": "start.png", "poses": "",
         "weights": "lora.safetensors", "lora": "lora.safetensors", "run": "earlier", "name": "attacked"}  # fmt: skip


FILLED = ("start_image", "control_video", "image_encoder")
"""Optional sockets without which a node does nothing."""


@dataclass(frozen=True)
class Place:
    """A machine's folders: those of ComfyUI, and `outside` with files that a workflow must never see."""

    root: Path

    @property
    def folders(self) -> Folders:
        return Folders(self.root / "input", self.root / "output")

    @classmethod
    def made(cls, root: Path) -> "Place":
        """With pictures, clips, latents, weights and a run in both kinds of folders."""
        place = cls(root)
        for name in ("input", "outside"):
            folder = root / name
            write_dataset(folder / "data", count=2, width=32, height=32, num_frames=9)
            Image.new("RGB", (32, 32), "red").save(folder / "start.png")
            (folder / "secret.txt").write_text("the secret of the machine\n")
            kept = save_latents(folder, "kept", torch.zeros(1, 16, 2, 4, 4), {})
            trained = next(iter(trained_weights(folder / "weights").values()))
            targets = {"input": (root / "output", root / "models" / "loras"), "outside": (folder, folder)}[name]
            for target in targets:
                target.mkdir(parents=True, exist_ok=True)
                (target / "lora.safetensors").write_bytes(trained.read_bytes())
            if name == "input":
                (root / "output" / "wancore").mkdir()
                kept.rename(root / "output" / "wancore" / kept.name)
            runs = root / "output" / "training" / "earlier" if name == "input" else folder / "run"
            runs.mkdir(parents=True)
            step = {"event": "step", "step": 1, "total": 1, "loss": 0.1, "lr": 0.1, "time": 0}
            (runs / "events.jsonl").write_text(json.dumps(step) + "\n")
        rows = f"video,prompt\n{root}/outside/data/clip.mp4,a\n../outside/start.png,b\n"
        (root / "input" / "hostile").mkdir()
        (root / "input" / "hostile" / "metadata.csv").write_text(rows)
        (root / "input" / "linked").symlink_to(root / "input" / "data", target_is_directory=True)
        (root / "output" / "training" / "broken").mkdir()
        (root / "output" / "training" / "broken" / "events.jsonl").write_text(
            '[1]\n{"event": "step"}\n"x"\n{"step": 1\n'
        )
        return place


def classes(folders: Folders, data: Path) -> dict[str, type]:
    """The nodes of a headless run, with a source of data and an end for everything."""
    own = {"AttackData": type("AttackData", (Data,), {"folder": data}), "AttackSink": Sink}
    return {**core_nodes(folders), **NODE_CLASS_MAPPINGS, **own}


def base(
    class_type: str, schemas: dict[str, NodeSchema], sink: str = "AttackSink", data: dict[str, Any] | None = None
) -> Prompt:
    """A small workflow that runs in a second, with the node `class_type` as "it".

    Args:
        sink: the class of a node that takes anything.
        data: inputs of Training Data, where it runs; without them a data set that was checked is there.
    """
    prompt: Prompt = {}
    sources = SOURCES if data is None else {**SOURCES, "WANCORE_TRAINING_DATA": ("WanCoreTrainingData", data, 0)}

    def add(node_id: str, name: str, given: dict[str, Any]) -> None:
        inputs = dict(given)
        for key, spec in schemas[name].inputs.items():
            if key in inputs:
                continue
            if spec.type in SOURCES and (spec.required or key in FILLED):
                inputs[key] = source(spec.type)
            elif spec.required or (key in SMALL and spec.type not in LINKED):
                usual = spec.options.get("default", (spec.choices or ("",))[0])
                inputs[key] = SMALL[key] if key in SMALL and _allowed(spec, SMALL[key]) else usual
        prompt[node_id] = {"class_type": name, "inputs": inputs}

    def source(kind: str) -> list[Any]:
        name, given, slot = sources[kind]
        if kind not in prompt:
            add(kind, name, given)
        return [kind, slot]

    add("it", class_type, {})
    if not schemas[class_type].is_output:
        prompt["end"] = {"class_type": sink, "inputs": {"value": ["it", 0]}}
    return prompt


def _allowed(spec: Any, value: Any) -> bool:
    kinds = {"INT": int, "FLOAT": float, "STRING": str}
    return value in (spec.choices or ()) or isinstance(value, kinds.get(spec.type, ()))


def table(
    place: Place, schemas: dict[str, NodeSchema], sink: str = "AttackSink", data: dict[str, Any] | None = None
) -> list[tuple[str, str]]:
    """(name, text of the file) of every node, widget and hostile value."""
    made = []
    nodes = [name for name in schemas if not name.startswith("Attack") and name not in NOT_HERE]
    for class_type in nodes:
        plain = base(class_type, schemas, sink, data)
        for name, spec in schemas[class_type].inputs.items():
            kind = "COMBO" if spec.choices is not None else "LINK" if spec.type in LINKED else spec.type
            values = [*VALUES.get(kind, ()), *NAMED.get(f"{class_type}.{name}", NAMED.get(name, ()))]
            values += FLAGS if name == "flags" else ()
            for value in values:
                if isinstance(value, str):
                    value = value.replace("{outside}", str(place.root / "outside")).replace("{root}", str(place.root))
                inputs = {**plain["it"]["inputs"], name: value}
                prompt = {**plain, "it": {"class_type": class_type, "inputs": inputs}}
                made.append((f"{class_type}.{name}={value!r:.60}", json.dumps(prompt)))
    return made


def verdict(file: Path, place: Place, nodes: dict[str, type], watch: Watch) -> tuple[str, str]:
    """What comes of a workflow file."""
    before = {path for path in (place.root / "output").rglob("*")}
    memory, answer = _memory(), ("survived", "")
    with watch.watching() as seen, _time_limit():
        try:
            workflow = Workflow.load(file)
            with contextlib.suppress(ValueError):
                apply_tiny(workflow, nodes)
            run(workflow, nodes, folders=place.folders)
        except StartedError:
            return "executed" if seen else "survived", "; ".join(seen) or "the pack's own process would be started"
        except TimeoutError:
            answer = ("hang", f"more than {SECONDS} s")
        except (ValueError, NodeError) as error:
            cause = error.__cause__ if isinstance(error, NodeError) else None
            told = CONVERTED.sub("", str(error))
            plain = not any(words in told for words in RAW) and (cause is None or isinstance(cause, ValueError))
            answer = ("clear" if plain else "raw", f"{type(cause or error).__name__}: {error}"[:300])
        except BaseException as error:
            answer = ("raw", f"{type(error).__name__}: {error}"[:300])
    if seen:
        return "executed", "; ".join(seen[:3])
    left = [path for path in set((place.root / "output").rglob("*")) - before if path.is_file()]
    rubbish = [path for path in left if not path.stat().st_size or ".part" in path.name]
    if rubbish:
        return "left over", str(rubbish[0])
    if _memory() - memory > MEMORY:
        return "memory", f"{(_memory() - memory) >> 20} MiB"
    return answer


def attack(count: int, seed: int) -> Iterator[Trial]:
    """Trials drawn from the table and from the files that are broken as a whole; a different one each."""
    with tempfile.TemporaryDirectory(prefix="wancore_attack_") as folder:
        yield from _trials(Place.made(Path(folder).resolve()), count, seed)


def _trials(place: Place, count: int, seed: int) -> Iterator[Trial]:
    with _home(place.root / "outside", place.root / "cache"):
        host.configure(
            device="cpu",
            models_dir=place.root / "models",
            input_dir=place.folders.input,
            output_dir=place.folders.output,
        )
        nodes = classes(place.folders, place.folders.input / "data")
        rows = [*structural(), *table(place, schemas_of(nodes))]
        drawn = random.Random(seed).sample(rows, min(count, len(rows)))
        own = (sys.executable, str(host.PACK_FOLDER / "pack.py"))
        compiler = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")  # PyTorch makes it when imported
        own_folders = (place.root / "output", place.root / "models", place.root / "cache", compiler)
        watch = Watch(own_folders, place.root / "outside", own)
        file = place.root / "workflow.json"
        try:
            for name, text in drawn:
                file.write_bytes(text if isinstance(text, bytes) else text.encode())
                yield Trial(name, *verdict(file, place, nodes, watch))
        finally:
            host.configure()


def _memory() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@contextlib.contextmanager
def _home(folder: Path, cache: Path) -> Iterator[None]:
    """A home folder that is out of bounds; only what is measured of this machine is kept, in `cache`."""
    given = {"HOME": str(folder), "XDG_CACHE_HOME": str(cache), "MPLCONFIGDIR": str(cache)}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """TimeoutError after SECONDS, where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
