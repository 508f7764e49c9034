"""Inputs of the training nodes: the data set, widgets, and the flags of the trainer that a workflow may set."""

import dataclasses
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from wan_core.checks import check_number
from wan_core.media import frames_to_tensor, load_video
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.runtime import log

from ..trainer.config import TrainConfig, parser
from ..trainer.data.clips import INPUTS
from ..trainer.flags import REFUSED_FLAGS, flag_type, parse_known
from . import host, places, sockets
from .launcher import ChildError, Launch, pack_command, supervise
from .places import plain_name
from .training_run import files_mark, load_settings

ALLOWED = frozenset({
    "batch_size", "cache", "caption_dropout", "clip_norm", "condition_dropout", "data_file_keys", "dataset_repeat",
    "expert_loras", "extra_inputs", "find_unused_parameters", "fp8_base", "fps", "frame_pick",
    "gradient_accumulation_steps", "gradient_checkpointing_keeps", "height",
    "keep_last", "learning_rate", "log_with", "lora_alpha", "lora_base_model", "lora_dropout", "lora_format",
    "lora_rank", "lora_target_modules", "loss_weighting", "lr_scheduler", "max_pixels", "max_steps",
    "max_timestep_boundary", "min_free_gb", "min_timestep_boundary", "mixed_precision", "num_epochs", "num_frames",
    "num_workers", "on_bad_sample", "optimizer", "optimizer_args", "random_mask", "remove_prefix_in_ckpt", "resume",
    "resume_force", "sample_cfg_scale", "sample_count", "sample_inference_steps", "sample_negative_prompt",
    "sample_prompt", "sample_seed", "sample_steps", "save_steps", "seed", "short_clip", "stream_base",
    "timestep_sampling", "timestep_shift", "trainable_models", "use_gradient_checkpointing",
    "use_gradient_checkpointing_offload", "validate_steps", "validation_clips", "vram_limit", "warmup_steps",
    "weight_decay", "width",
})  # fmt: skip
"""Settings of a run that a workflow may set: numbers, switches, and words that the trainer itself lists. A new setting
is refused until it is named here.
"""

WORDS: Mapping[str, tuple[str, ...]] = {"log_with": ("tensorboard",), "resume": ("auto", "never")}
"""Flags of which only these values are allowed: the others name a server or a folder."""

ALTERNATIVES: Mapping[str, str] = {
    "cache_dir": "encoded samples are kept in the run's folder",
    "config": "write its settings into the node, or into flags",
    "confined": "the files of a workflow's data set always lie in its folder",
    "dataset_base_path": "choose the folder in Training Data",
    "dataset_metadata_path": "name it in metadata of Training Data",
    "local_model_path": "models are taken from ComfyUI's folders",
    "log_with": "in the graph it takes tensorboard; what sends data to a server is for `python -m trainer.train`",
    "lora_checkpoint": "`python -m trainer.train` in a shell starts from a LoRA",
    "model_id_with_origin_paths": "choose models in the node, with its switch download",
    "model_paths": "choose models in the node",
    "output_path": "the run's name decides it",
    "preset_lora_model": "`python -m trainer.train` in a shell makes a LoRA part of the model",
    "preset_lora_path": "`python -m trainer.train` in a shell makes a LoRA part of the model",
    "reference": "here every setting has one name; see docs/training.md",
    "resume": "in the graph it takes auto or never; `python -m trainer.train` continues from any folder",
    "resume_from_checkpoint": "choose the trained weights as the model",
    "skip_download": "use the node's switch download",
    "stop_file": "the node uses its own",
    "switched": "name inputs in extra_inputs of Training Data",
    "task": "a node encodes and trains",
    "tokenizer_path": "it is found beside the text encoder",
    "wandb_project": "what sends data to a server is for `python -m trainer.train`",
}


def parse_flags(flags: str) -> dict[str, Any]:
    """The settings that the text box holds.

    Raises:
        ValueError: a flag is unknown, its value cannot be read, or a workflow may not set it.
    """
    found = parse_known(parser(prints_help=False), shlex.split(flags), REFUSED_FLAGS)
    for name, value in found.items():
        words = value if isinstance(value, tuple) else (value,)
        if name not in ALLOWED or (name in WORDS and not set(words) <= set(WORDS[name])):
            flag = value[0][0] if name == "reference" else name
            shown = "input_contains_..." if name == "switched" else flag
            instead = ALTERNATIVES.get(name, "use `python -m trainer.train` in a shell")
            raise ValueError(f"flags: --{shown} is for the command line; {instead}.")
    return found


RUNS = "training"
"""The subfolder of the output folder that holds a folder for each run."""

LARGEST = 10**9

WIDER = ("batch_size", "dataset_repeat", "gradient_accumulation_steps", "lora_rank", "num_epochs")
"""Flags whose widgets keep the range that they were published with; the trainer refuses larger values itself."""

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def widget(name: str, default: Any = None, tooltip: str = "") -> sockets.Declaration:
    """The flag `name` of the trainer as a widget. An optional flag that is not set is 0 or empty here."""
    options = FIELDS[name].metadata
    kind, optional = flag_type(FIELDS[name])
    value: Any = FIELDS[name].default if default is None else default
    text = tooltip or f"{options['help'][:1].upper()}{options['help'][1:]}."
    if optional and not tooltip:
        text += " 0: none." if kind in (int, float) else " Empty: none."
    if kind is bool:
        return sockets.flag(value, text)
    if options["choices"] and kind is str:
        return sockets.choice(list(options["choices"]), value, text)
    if kind in (int, float):
        low = 0 if optional or not options["low"] else options["low"]
        high = LARGEST if name in WIDER else min(options["high"], LARGEST)
        if kind is int:
            return sockets.whole(value or 0, int(low), int(high), text)
        declared = sockets.number(float(value or 0), float(low), float(high), text, step=1e-5)
        return declared[0], {**declared[1], "round": 1e-9}
    return sockets.line(",".join(value) if isinstance(value, tuple) else value or "", text)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the widgets' values that are flags; for optional flags 0 and empty become None."""
    found = {}
    for name, value in values.items():
        if name in FIELDS and value is not None:
            optional = flag_type(FIELDS[name])[1]
            found[name] = None if optional and value in (0, "") else value
    return found


def check_widgets(cls: type[Any], values: Mapping[str, Any]) -> None:
    """Raise ValueError when a value is outside of its widget's range or list.

    ComfyUI does not check the inputs of a node whose VALIDATE_INPUTS takes all of them, nor linked values.
    """
    declared = cls.INPUT_TYPES()
    for name, (kind, options) in {**declared["required"], **declared.get("optional", {})}.items():
        value = values.get(name)
        if isinstance(kind, list) and value is not None:
            if value not in kind:
                raise ValueError(f"Value not in list: {name}: {value!r:.200}. Known: {', '.join(kind)}")
        elif kind in ("INT", "FLOAT") and value is not None:
            check_number(name, value, low=options["min"], high=options["max"])


def defaults(cls: type[Any]) -> dict[str, Any]:
    """The default of every widget of a node."""
    declared = cls.INPUT_TYPES()
    rows = {**declared["required"], **declared.get("optional", {})}
    return {name: options["default"] for name, (_, options) in rows.items() if "default" in options}


def run_folder(name: str) -> Path:
    """The folder of the run called `name`.

    Raises:
        ValueError: it is not a valid name.
    """
    return host.current.output_dir().absolute() / RUNS / plain_name("name", name)


def image(pictures: Sequence[Image.Image]) -> Tensor:
    """IMAGE (T, H, W, 3)."""
    return frames_to_tensor(pictures)


CHECK_PATIENCE = 1.0
"""Seconds that a cancelled check has to end by itself; it has nothing to save."""

EXAMPLE = "training_example"
"""Among the shipped assets."""

TINY = {**host.TINY_SIZE, "dataset_repeat": 1, "fps": 0.0}


@dataclass(frozen=True)
class TrainingData:
    """A checked data set: settings of the trainer, and a mark that changes with its files."""

    settings: Mapping[str, Any]
    mark: str


class TrainingDataNode:
    """A folder of clips and captions, checked."""

    CATEGORY = "WanCore/training"
    FUNCTION = "check"
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Open every file of a data set and say what is wrong with it, before anything is trained. A data set is a "
        "folder of clips or pictures, with metadata.csv (.json, .jsonl), or a text file with the caption beside each."
    )
    RETURN_TYPES = (sockets.TRAINING_DATA, "STRING", "IMAGE")
    RETURN_NAMES = ("data", "report", "contact_sheet")
    OUTPUT_TOOLTIPS = (
        "The data set, for a training node.",
        "What was found, and what is wrong with it.",
        "First and last frames, inputs and captions of the first rows.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = ", ".join(INPUTS)
        side = "0 for both sides: each clip keeps its own size."
        return {
            "required": {
                "folder": sockets.line(
                    EXAMPLE,
                    "A folder in ComfyUI's input folder, or a path that WANCORE_FOLDERS allows workflows to read.",
                ),
                "width": sockets.whole(832, 0, sockets.MAX_SIDE, f"Width to train at. {side}", step=sockets.SIDE),
                "height": sockets.whole(480, 0, sockets.MAX_SIDE, f"Height to train at. {side}", step=sockets.SIDE),
                "num_frames": sockets.whole(
                    81,
                    1,
                    10001,
                    "Frames of a clip (4k + 1); pictures are clips of one.",
                    step=sockets.FRAMES,
                ),
            },
            "optional": {
                "extra_inputs": sockets.line("", f"Inputs besides the prompt, with commas between them: {names}."),
                "metadata": sockets.line("", "The file that lists the rows, if it is not metadata.* of the folder."),
                "fps": widget(
                    "fps",
                    float(DEFAULT_GEOMETRY.fps),
                    "Resample clips to this frame rate; Wan was trained at 16, its 5B models at 24. 0 takes frames as "
                    "stored.",
                ),
                "frame_pick": widget("frame_pick"),
                "short_clip": widget("short_clip"),
                "on_bad_sample": widget("on_bad_sample"),
                "dataset_repeat": widget("dataset_repeat"),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """Small and few clips."""
        return dict(TINY)

    @classmethod
    def settings(cls, **values: Any) -> dict[str, Any]:
        """The trainer's settings for the widgets' values.

        Raises:
            ValueError: there is no such folder, or a value cannot be used.
        """
        values = {**defaults(cls), **{name: value for name, value in values.items() if value is not None}}
        check_widgets(cls, values)
        folder = places.data_folder(values["folder"])
        metadata = values["metadata"].strip()
        found = settings_of(values) | {
            "dataset_base_path": str(folder),
            "dataset_metadata_path": str(_metadata(folder, metadata)) if metadata else None,
            "confined": True,
        }
        found["cache"] = "off" if found["frame_pick"] == "random" else "disk"
        load_settings(found, {})
        return found

    @classmethod
    def plan_outputs(cls, **values: Any) -> tuple[TrainingData, None, None]:
        return TrainingData(cls.settings(**values), ""), None, None

    @classmethod
    def VALIDATE_INPUTS(cls, **values: Any) -> bool | str:
        return sockets.true_or_message(lambda: cls.settings(**values))

    @classmethod
    def IS_CHANGED(cls, folder: str, **_: Any) -> str:
        return files_mark([places.data_folder(folder)])

    def check(self, **values: Any) -> dict[str, Any]:
        def show_progress(event: Mapping[str, Any]) -> None:
            if event["event"] == "checked":
                host.current.show_progress("Checking", event["done"], event["total"])

        settings = self.settings(**values)
        mark = files_mark([Path(settings["dataset_base_path"])])
        with tempfile.TemporaryDirectory(prefix="wancore_", dir=host.current.temp_dir()) as work:
            folder = Path(work)
            load_settings(settings, {}).save_json(folder / "settings.json")
            words = ["--out", str(folder), "--config", str(folder / "settings.json")]
            file = folder / "report.txt"
            launch = Launch(pack_command(host.PACK_FOLDER, "trainer.check", words), folder)
            try:
                supervise(launch, show_progress, host.current.check_cancelled, CHECK_PATIENCE)
            except ChildError as error:
                raise ValueError(file.read_text(encoding="utf-8") if file.exists() else error.message) from error
            report = file.read_text(encoding="utf-8")
            sheet = image(load_video(folder / "contact_sheet.png"))
        log.info("%s", report.strip())
        return {"ui": {"text": [report]}, "result": (TrainingData(settings, mark), report, sheet)}


def _metadata(folder: Path, name: str) -> Path:
    """The metadata file of that name in the folder of a data set.

    Raises:
        ValueError: the name leads out of the folder.
    """
    found = places.inside(folder, name)
    if found is None:
        raise ValueError(f"metadata: {name!r} is not in the folder of the data set; put the file there.")
    return found
