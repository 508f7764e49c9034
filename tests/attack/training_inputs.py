"""Bad inputs of a training: flags, settings files, metadata, clips, caches, events, saved states, LoRAs, names."""

import contextlib
import functools
import io
import json
import logging
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file

from tests.attack import Trial
from tests.trainer import material
from wancore.trainer import check
from wancore.trainer import train as running
from wancore.trainer.run.chart import draw_chart
from wancore.trainer.run.events import latest_steps, read_events
from wancore.trainer.run.output import RECORD
from wancore.trainer.run.state import digest

LIMIT = 60
"""Seconds after which a trial hangs; the longest that ends takes a few."""

DEEP = "[" * 100_000 + "]" * 100_000
CLIP = "media/000_video.mp4"

Words = Sequence[str]


@dataclass(frozen=True)
class Place:
    """What a trial works with: a data set, a run with states and a LoRA file of its own, and tiny models."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def words(self, *more: str) -> list[str]:
        """A short run on the data, with `more` flags that win."""
        settings = material.config(self.root, output_path=str(self.out), cache="disk", lora_rank=2, min_free_gb=0.0)
        return [*material.flags(settings), "--skip_download", *more]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: what it is.
        told: one of these words is in the message that refuses it.
        spoil: makes it, and gives the flags for it.
        command: "train" or "check".
    """

    name: str
    told: tuple[str, ...]
    spoil: Callable[[Place], Words]
    command: str = "train"


def _flag(name: str, *values: str, told: str = "", more: Words = ()) -> Iterator[Case]:
    """A new run on the encoded samples, with each of `values`."""

    def words(place: Place, value: str) -> Words:
        return [f"--output_path={place.root / 'new'}", f"--cache_dir={place.out / 'cache'}", *more, f"--{name}={value}"]

    for value in values:
        yield Case(f"--{name} {value[:40]!r}", (told or name,), functools.partial(words, value=value))


def _flags() -> Iterator[Case]:
    wild = {"whole": ("0", "-1", "1e3", "nan", "9" * 30, "9" * 5000, "", "１e", "0x10")}
    for name in ("lora_rank", "dataset_repeat", "num_epochs", "batch_size", "gradient_accumulation_steps"):
        yield from _flag(name, *wild["whole"])
    yield from _flag("num_frames", "0", "-3", "9" * 15, "4.5")
    yield from _flag("height", "0", "9" * 9, "-32", more=("--width=32",))
    yield from _flag("lora_dropout", "nan", "1", "-0.1", "inf")
    yield from _flag("lora_alpha", "0", "nan", "-1", "inf")
    yield from _flag("learning_rate", "nan", "inf", "-1", "", "1e999")
    yield from _flag("fps", "0", "nan", "inf", "-16")
    yield from _flag("timestep_shift", "0", "nan", "inf")
    yield from _flag("vram_limit", "nan", "inf", "-1")
    yield from _flag("seed", "-1", str(2**64), "1.5")
    yield from _flag("num_workers", "-1", "9" * 12, "many")
    yield from _flag("max_pixels", "0", "9" * 30, "big")
    yield from _flag("optimizer", "torch.optim.lbfgs.LBFGS", "os.system", "torch.optim", "", "..", "torch.optim.Adam;x")
    yield from _flag("optimizer_args", "{", DEEP, "x", '{"lr": 1}', '{"betas": "many"}', "eps=" + "9" * 400)
    yield from _flag("model_paths", "[", DEEP, "[1]", "[[1]]", "{}", '["\\u0000"]', "[[]]", "[null]", "/dev/zero")
    published = ("x", ":", "../..:passwd", "a/b:../../*", "a/b:**/*", "a:b:c", "\0:x", "a/b:" + "x" * 9000)
    yield from _flag("model_id_with_origin_paths", *published)
    yield from _flag("extra_inputs", "prompt", "\0", "vace_video", "motion_bucket_id", "end_image,end_image,x")
    yield from _flag("lora_target_modules", "", "(", "q,(a+)+$", "blocks", ".", "x" * 9000)
    yield from _flag("trainable_models", "clip", "dit,vace", "dit")
    yield from _flag("trainable_models", "motion_controller", told="motion_controller")
    yield from _flag("data_file_keys", "prompt", "\0", "video,gone", told="data_file_keys")
    yield from _flag("task", "direct_distill", "sft:", "")
    yield from _flag("output_path", "\0", "x" * 9000, "/dev/null", "/proc/none/x", "\udcff")
    yield from _flag("cache_dir", "\0", "x" * 9000, "/dev/null", "/proc/none/x", told="cache")
    yield from _flag("dataset_base_path", "\0", "x" * 9000, "/dev/null", "/gone", "\udcff")
    yield from _flag("dataset_metadata_path", "\0", "x" * 9000, "/dev/null", "/gone", "/", told="metadata")
    yield from _flag("tokenizer_path", "\0", "x" * 9000, "/dev/null", "/gone", "/", told="tokenizer")
    yield from _flag("stop_file", "\0", "x" * 9000, "/proc/none/x")
    yield from _flag("resume", "\0", "x" * 9000, "/dev/null", "/gone", "/")
    for name in ("lora_checkpoint", "preset_lora_path", "resume_from_checkpoint", "config"):
        yield from _flag(name, "\0", "x" * 9000, "/dev/null", "/gone", "/")


def _write(text: str | bytes, *path: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        file = place.root.joinpath(*path)
        if file.is_dir():
            shutil.rmtree(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)

    return spoil


def _fifo(*path: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        file = place.root.joinpath(*path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        os.mkfifo(file)

    return spoil


def _then(spoil: Callable[[Place], None], *words: str) -> Callable[[Place], Words]:
    def do(place: Place) -> Words:
        spoil(place)
        return [word.replace("ROOT", str(place.root)) for word in words]

    return do


TEXTS = {
    "empty": "", "a number": "3", "null": "null", "a list": "[1]", "text": '"x"', "deep": DEEP, "cut": '{"a": ',
    "binary": b"\x00\xff\xfe\x01" * 99, "a surrogate": '{"a": "\\ud800"}', "NaN": '{"lora_rank": NaN}',
    "a huge number": '{"lora_rank": ' + "9" * 5000 + "}", "deep inside": '{"a": ' + DEEP + "}",
    "UTF-16": "{}".encode("utf-16"),
    "no value": '{"lora_rank": null}', "wrong types": '{"files": [1], "step": "x", "lora_rank": [], "event": {}}',
}  # fmt: skip


def _texts() -> Iterator[Case]:
    for what, text in TEXTS.items():
        for suffix in ("json", "jsonl", "csv"):
            file, flag = f"m.{suffix}", f"--dataset_metadata_path=ROOT/data/m.{suffix}"
            told = (file, "row", "column", "metadata")
            yield Case(f"metadata.{suffix}: {what}", told, _then(_write(text, "data", file), flag), "check")
        event = text if isinstance(text, bytes) else f'{{"event": "step"}}\n{text}\n'.encode()
        yield from (
            Case(f"{name}: {what}", told, _then(spoil, *words))
            for name, told, spoil, words in (
                ("settings", ("settings.json",), _write(text, "settings.json"), ["--config=ROOT/settings.json"]),
                ("hashes", ("hashes",), _write(text, "out", "cache", "hashes.json"), []),
                ("events", ("events",), _write(event, "out", "events.jsonl"), []),
                ("record", (RECORD,), _write(text, "data", RECORD), ["--task=sft:train"]),
                ("manifest", ("state",), _state("manifest.json", text), ["--max_steps=2"]),
                ("progress", ("state",), _state("progress.json", text), ["--max_steps=2"]),
                ("LoRA", ("lora_checkpoint",), _write(text, "x.safetensors"), ["--lora_checkpoint=ROOT/x.safetensors"]),
                ("PEFT", ("lora_checkpoint",), _peft(text), ["--lora_checkpoint=ROOT/adapter_model.safetensors"]),
            )
        )


def _state(name: str, text: str | bytes) -> Callable[[Place], None]:
    """A saved state whose `name` holds `text`, and whose manifest agrees with that."""

    def spoil(place: Place) -> None:
        folder = place.out / "states" / "step-0000001"
        _write(text, "out", "states", "step-0000001", name)(place)
        manifest = folder / "manifest.json"
        if name != manifest.name:
            told = json.loads(manifest.read_text(encoding="utf-8"))
            told["files"][name] = {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}
            manifest.write_text(json.dumps(told), encoding="utf-8")

    return spoil


def _peft(text: str | bytes) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        shutil.copyfile(place.root / "lora.safetensors", place.root / "adapter_model.safetensors")
        _write(text, "adapter_config.json")(place)

    return spoil


CELLS = {
    "video": ("", "gone.mp4", "media", "\0", "../../../etc/passwd", "x" * 9000, "[[1]]", DEEP, "/dev/zero", 3, None,
              {"a": 1}, [[]], "\ud800"),
    "prompt": ("", None, [], [[]], {"a": 1}, 3.5, "\0", "\ud800", ["", ""]),
    "motion_bucket_id": ("nan", "inf", "-1", "101", "1e999", "fast", None, [1, 2], {"a": 1}, "9" * 5000),
    "camera_control_direction": ("Sideways", "", 3, "\0"),
    "reference_image": ("gone.png", "media/000_video.mp4", "\0", [], 3),
}  # fmt: skip
CONTENTS = {
    "nothing": b"", "text": b"hello", "zeros": bytes(4096), "SVG": b"<svg width='0' height='0'/>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a playlist": b"#EXTM3U\nfile:///etc/passwd\n",
    "noise": random.Random(1).randbytes(999),
    "PNG that is cut": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0",
}  # fmt: skip


def _cells() -> Iterator[Case]:
    metadata = "--dataset_metadata_path=ROOT/data/m.json"
    usual = {"prompt": "a dog", "video": CLIP, "motion_bucket_id": 5, "camera_control_direction": "Left"}
    for column, values in CELLS.items():
        more = () if column in ("video", "prompt") else (f"--extra_inputs={column}",)
        for value in values:
            spoil = _write(json.dumps([{**usual, column: value}]), "data", "m.json")
            told = ("row 1", column, "metadata")
            yield Case(f"{column}: {str(value)[:30]!r}", told, _then(spoil, metadata, *more), "check")
    for what, content in CONTENTS.items():
        for name in ("clip.mp4", "clip.png", "clip.gif", "clip.webp"):
            row = json.dumps([{"prompt": "a", "video": name}])
            both = _all(_write(content, "data", name), _write(row, "data", "m.json"))
            yield Case(f"{name}: {what}", ("row 1",), _then(both, metadata), "check")


def _all(*spoils: Callable[[Place], None]) -> Callable[[Place], None]:
    def do(place: Place) -> None:
        for spoil in spoils:
            spoil(place)

    return do


def _special() -> Iterator[Case]:
    for path, words, told in (
        (("data", CLIP), (), "row 1"),
        (("data", "m.json"), ("--dataset_metadata_path=ROOT/data/m.json",), "metadata"),
        (("settings.json",), ("--config=ROOT/settings.json",), "settings.json"),
        (("fifo.safetensors",), ("--lora_checkpoint=ROOT/fifo.safetensors",), "lora_checkpoint"),
        (("fifo.pth",), ('--model_paths=["ROOT/fifo.pth"]',), "fifo.pth"),
        (("out", "cache", "hashes.json"), (), "hashes"),
        (("out", "events.jsonl"), (), "events"),
        (("out", "config.json"), (), "config.json"),
        (("out", "step-1.safetensors"), (), "step-1"),
        (("out", "states", "step-0000001", "progress.json"), (), "progress.json"),
        (("out", "data_process.json"), ("--task=sft:train", "--dataset_base_path=ROOT/out"), "no data was encoded"),
    ):
        yield Case(f"FIFO {path[-1]}", (told,), _then(_fifo(*path), *words))
    rank = _then(_no_spoil, "--lora_checkpoint=ROOT/lora.safetensors", "--lora_rank=3", "--output_path=ROOT/new")
    file = _then(_write("x", "file"), "--output_path=ROOT/file")
    hostile = _state("optimizer.pt", b"cos\nsystem\n(S'true'\ntR.")
    yield Case("LoRA of another rank", ("--lora_rank",), rank)
    yield Case("an output folder that is a file", ("output_path",), file)
    for what, told, spoil in (
        ("cached samples of another shape", ("cache", "shape"), _spoil_cache(lambda t: t[..., :1].clone())),
        ("cached samples without their names", ("cache",), _spoil_cache(None)),
        ("cached samples of whole numbers", ("cache", "dtype"), _spoil_cache(lambda t: t.to(torch.int32))),
        ("cached NaN", ("nan", "NaN"), _spoil_cache(lambda t: t.float() * float("nan"))),
        ("a state of other weights", ("state",), _other_weights),
        ("a state with a hostile optimizer", ("state",), hostile),
        ("a state with an empty optimizer", ("state",), _state("optimizer.pt", b"")),
    ):
        yield Case(what, told, _then(spoil, "--max_steps=2"))


def _no_spoil(place: Place) -> None:
    pass


def _spoil_cache(change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        shutil.rmtree(place.out / "states")
        for file in (place.out / "cache").rglob("*.safetensors"):
            tensors = load_file(file)
            changed = {n: change(t).contiguous() for n, t in tensors.items()} if change else {"x": torch.zeros(1)}
            save_file(changed, file)
        for file in place.out.glob("*.safetensors"):
            file.unlink()

    return spoil


def _other_weights(place: Place) -> None:
    folder = place.out / "states" / "step-0000001"
    tensors = {name: tensor[:1].clone() for name, tensor in load_file(folder / "weights.safetensors").items()}
    save_file(tensors, place.root / "w.safetensors")
    _state("weights.safetensors", (place.root / "w.safetensors").read_bytes())(place)


CASES = tuple(case for group in (_flags, _texts, _cells, _special) for case in group())


class _Hang(BaseException):
    pass


def _alarm(number: int, frame: object) -> None:
    raise _Hang


def attack(count: int, seed: int) -> Iterator[Trial]:
    """`count` bad inputs, drawn without repetition as long as there are others."""
    cases = list(CASES)
    random.Random(seed).shuffle(cases)
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        base = Place(Path(folder) / "base")
        code, text = _outcome(base, "train", base.words("--max_steps=1"))
        assert code == 0, text
        shutil.copyfile(base.out / "step-1.safetensors", base.root / "lora.safetensors")
        for number in range(count):
            case, place = cases[number % len(cases)], Place(Path(folder) / "trial")
            shutil.copytree(base.root, place.root, ignore=shutil.ignore_patterns("models"))
            (place.root / "models").symlink_to(base.root / "models")
            yield _trial(case, place)
            shutil.rmtree(place.root)
    if before is None:
        del os.environ["ACCELERATE_USE_CPU"]
    else:
        os.environ["ACCELERATE_USE_CPU"] = before


def _trial(case: Case, place: Place) -> Trial:
    handler, folder = signal.signal(signal.SIGALRM, _alarm), Path.cwd()
    signal.alarm(LIMIT)
    # Names that are no absolute path must not lead into the pack.
    os.chdir(place.root)
    try:
        words = place.words(*(() if case.command == "check" else ("--max_steps=1",)), *case.spoil(place))
        code, text = _outcome(place, case.command, words)
    except _Hang:
        return Trial(case.name, "hang", f"no end after {LIMIT} s")
    except BaseException as error:
        return Trial(case.name, "raw", f"{type(error).__name__}: {error}"[:300])
    finally:
        signal.alarm(0)
        os.chdir(folder)
        signal.signal(signal.SIGALRM, handler)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
    if code == 0:
        return Trial(case.name, "survived")
    named = any(word in text for word in case.told) and "Traceback" not in text
    return Trial(case.name, "clear" if named else "raw", text.strip()[-300:])


def _outcome(place: Place, command: str, words: Words) -> tuple[int, str]:
    """The exit code of a command, and what it says; the chart of the run is drawn too, as the graph does."""
    said = io.StringIO()
    log, handler = logging.getLogger("wancore"), logging.StreamHandler(said)
    log.addHandler(handler)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = (check if command == "check" else running).main(words)
            events = place.out / "events.jsonl"
            list(read_events(events))
            draw_chart(latest_steps(events))
    finally:
        log.removeHandler(handler)
    return code, said.getvalue()
