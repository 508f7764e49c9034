"""DiffSynth-Studio's own Wan 2.1 scripts, run with their import lines changed and nothing else of what they do.

`python -m tests.reference_scripts CHECKOUT [REVISION ...]` prints a table of scripts by revision and kind. CHECKOUT is
a clone of modelscope/DiffSynth-Studio, bare or not; no line of it is in this repository.

A script is run as it is, but for what stands in its way on a machine without network, cards and hours:

- `from diffsynth… import` reads `from wan_core import`: the change that is claimed to be enough.
- The models that it names are the bundled tiny ones of the same structure, under the published names; trained weights
  and LoRAs are written under the names that its training script gives them, with the keys that the reference saves.
- `dataset_snapshot_download` writes drawn pictures and a clip of the names that are asked for, and nothing else.
- Without CUDA, "cuda" reads "cpu", and `torch.cuda.mem_get_info` says 24 GiB.
- Calls run at 32x32, 5 frames, 2 steps, whatever they ask for; everything else of a call is the script's.
"""

import argparse
import contextlib
import functools
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

PACK = Path(__file__).resolve().parents[1]
EXAMPLES = "examples/wanvideo"
KINDS = {
    "inference": f"{EXAMPLES}/model_inference",
    "low VRAM": f"{EXAMPLES}/model_inference_low_vram",
    "validate full": f"{EXAMPLES}/model_training/validate_full",
    "validate LoRA": f"{EXAMPLES}/model_training/validate_lora",
}
REVISIONS = ("62f6ca2b", "9bb51fe8", "fed7b18f")
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
CARD_BYTES = 24 * 2**30
TRAINED = re.compile(r'"(models/train/[^"]+)"')


@dataclass(frozen=True)
class Script:
    """A script of one revision: its kind of `KINDS`, its name, and its text."""

    revision: str
    kind: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.revision} {self.kind} {self.name}"


@functools.cache
def scripts(checkout: str, revision: str) -> tuple[Script, ...]:
    """The scripts of the published Wan 2.1 models that are in `revision`."""
    listed = _git(checkout, "ls-tree", "-r", "--name-only", revision, EXAMPLES).splitlines()
    found = []
    for kind, folder in KINDS.items():
        for path in (p for p in listed if re.fullmatch(rf"{folder}/Wan2\.1-[^/]+\.py", p)):
            text = _git(checkout, "show", f"{revision}:{path}")
            found.append(Script(revision, kind, Path(path).stem, text))
    return tuple(found)


def _git(checkout: str, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", checkout, *arguments], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout


class Stage:
    """A folder in which scripts find what they ask for, and the pipeline class that they run on."""

    def __init__(self, folder: Path) -> None:
        if str(PACK) not in sys.path:
            sys.path.insert(0, str(PACK))
        self.folder = folder
        self.core: Any = importlib.import_module("wan_core")
        self.catalog = importlib.import_module("wan_core.catalog")
        self.tiny = importlib.import_module("wan_core.bundled")
        self._lay_models()

    def run(self, script: Script) -> tuple[Any, list[Path]]:
        """Run the script; its pipeline, and the files that it wrote.

        Whatever it raises is raised.
        """
        before = {path: path.stat().st_mtime_ns for path in self.folder.glob("*.mp4")}
        text = re.sub(r"^from diffsynth[\w.]* import", "from wan_core import", script.text, flags=re.MULTILINE)
        for path in TRAINED.findall(text):
            self._lay_trained(path, text)
        with self._set(script) as cuda, tempfile.TemporaryDirectory() as place:
            changed = Path(place) / "script.py"
            changed.write_text(text if cuda else text.replace('"cuda"', '"cpu"'), encoding="utf-8")
            namespace = runpy.run_path(str(changed), run_name="__main__")
        written = [p for p in self.folder.glob("*.mp4") if before.get(p) != p.stat().st_mtime_ns]
        return namespace["pipe"], written

    @contextlib.contextmanager
    def _set(self, script: Script) -> Iterator[bool]:
        """The surroundings of a script; tells whether there is a card."""
        pipeline, cuda = self.core.WanVideoPipeline, torch.cuda.is_available()
        call = pipeline.__call__

        @functools.wraps(call)
        def small(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            return call(pipe, *args, **{**kwargs, **SMALL, "progress_bar_cmd": iter})

        hub = types.SimpleNamespace(dataset_snapshot_download=self._lay_examples)
        with contextlib.ExitStack() as stack:
            stack.callback(os.chdir, Path.cwd())
            os.chdir(self.folder)
            # Not by `mock.patch.dict`, which forgets every module that is imported meanwhile.
            stack.callback(_put_module, "modelscope", sys.modules.get("modelscope"))
            _put_module("modelscope", hub)
            stack.enter_context(mock.patch.object(pipeline, "__call__", small))
            stack.enter_context(mock.patch.dict(os.environ, DIFFSYNTH_SKIP_DOWNLOAD="true"))
            if not cuda:
                stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (CARD_BYTES, CARD_BYTES)))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            # Validation scripts read the training data without asking for it: it is there from training.
            self._lay_examples(local_dir=".", allow_file_pattern=re.findall(r'"(data/[^"]+)"', script.text))
            yield cuda

    def _lay_models(self) -> None:
        root = self.folder / "models"
        for row in self.catalog.WAN_21:
            source = self.tiny.write_model(root, self.catalog.tiny_id(row.variant))
            target = root / row.model_id
            target.mkdir(parents=True, exist_ok=True)
            shared = self.tiny.write_model(root, self.catalog.TINY)
            for file in ("model.safetensors",) if row.base else (self.catalog.DIT_FILE,):
                _link((shared if row.base else source) / file, target / file)
        shared = self.tiny.write_model(root, self.catalog.TINY)
        for name in (self.catalog.TEXT_ENCODER_PATTERN, self.catalog.VAE_PATTERN, "google"):
            _link(shared / name, root / self.catalog.T2V_BASE / name)
        name = self.catalog.IMAGE_ENCODER_PATTERN
        _link(shared / name, root / "Wan-AI/Wan2.1-I2V-14B-480P" / name)

    def _lay_trained(self, path: str, text: str) -> None:
        """Weights as the reference's trainer saves them: without `pipe.<part>.`, LoRA factors as `lora_A.default`."""
        file = self.folder / path
        if file.exists():
            return
        model_id = re.search(r'model_id="([^"]+)"', text)[1]
        part = next(iter(re.findall(r"pipe\.(\w+)\.load_state_dict|load_lora\(pipe\.(\w+)", text)))
        part = "".join(part)
        source = self.folder / "models" / model_id / self.catalog.DIT_FILE
        if part == "motion_controller":
            source = self.folder / "models" / self.catalog.SPEED_CONTROL / "model.safetensors"
        weights = load_file(source)
        chosen = {k: v for k, v in weights.items() if part != "vace" or k.startswith("vace")}
        if "_lora" in path:
            names = [k for k, v in chosen.items() if re.search(r"blocks\.\d+\..*attn\.[qkvo]\.weight", k)]
            chosen = {}
            for name in names:
                rows, columns = weights[name].shape
                base = name.removesuffix(".weight")
                chosen[f"{base}.lora_A.default.weight"] = torch.randn(4, columns)
                chosen[f"{base}.lora_B.default.weight"] = torch.randn(rows, 4) / 10
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: (v * 0.9).to(torch.bfloat16) for k, v in chosen.items()}, file)

    def _lay_examples(
        self, dataset_id: str = "", local_dir: str = ".", allow_file_pattern: str | list[str] = (), **_: Any
    ) -> None:
        listed = [allow_file_pattern] if isinstance(allow_file_pattern, str) else allow_file_pattern
        for name in listed:
            file = self.folder / local_dir / name
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".mp4":
                frames = [Image.new("RGB", (104, 60), (i * 2 % 256, 90, 200)) for i in range(81)]
                self.core.save_video(frames, str(file), fps=15)
            else:
                Image.new("RGB", (104, 60), "teal").save(file)


def _put_module(name: str, module: Any) -> None:
    if module is None:
        del sys.modules[name]
    else:
        sys.modules[name] = module


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.symlink_to(source.resolve(), source.is_dir())


def check(pipe: Any, written: list[Path], script: Script) -> None:
    """Raise AssertionError unless the script did what it is for: films, with its weights where it loads some."""
    films = set(re.findall(r'save_video\(\w+, f?"([^"]+\.mp4)"', script.text))
    assert films and films == {path.name for path in written}, f"wrote {[p.name for p in written]} of {sorted(films)}"
    for file in TRAINED.findall(script.text):
        tensors = load_file(written[0].parent / file)
        if "load_lora" in script.text:
            (lora,) = pipe.models.video.loras
            assert 2 * len(lora.bound.patches) == len(tensors), "the LoRA is applied in part"
        else:
            (part,) = re.findall(r"pipe\.(\w+)\.load_state_dict", script.text)
            held = getattr(pipe, part).state_dict()
            name = next(name for name, tensor in tensors.items() if tensor.ndim > 1)
            assert torch.equal(held[name].cpu(), tensors[name].to(held[name].dtype)), f"{name} was not replaced"


def main() -> int:
    """Run the scripts and print the table; 1 where one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference_scripts", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkout", help="a clone of modelscope/DiffSynth-Studio")
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help=f"default: {', '.join(REVISIONS)}")
    parser.add_argument("--folder", type=Path, required=True, help="where the stand-ins are made and scripts run")
    parser.add_argument("--only", default="", help="run scripts whose revision, kind and name hold this text")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    stage, failed, counts = Stage(options.folder.resolve()), [], {}
    for revision in options.revisions or REVISIONS:
        for script in (s for s in scripts(options.checkout, revision) if options.only in str(s)):
            outcome = counts.setdefault((revision, script.kind), [0, 0])
            outcome[0] += 1
            try:
                check(*stage.run(script), script)
                outcome[1] += 1
            except Exception as error:
                failed.append(f"{script}: {type(error).__name__}: {str(error)[:300]}")
                print(failed[-1], flush=True)
    print("| revision | kind | run | passed |\n|-|-|-|-|")
    for (revision, kind), (run, passed) in counts.items():
        print(f"| {revision} | {kind} | {run} | {passed} |")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
