"""A data set in the graph, with its check."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_core.media import load_video
from wan_core.runtime import log

from ..trainer.inputs import INPUTS
from . import host, places, sockets
from .launcher import ChildError, Launch, attend, pack_command
from .training_run import files_mark, load_settings
from .training_widgets import check_widgets, defaults, image, settings_of, true_or_message, widget

CHECK_PATIENCE = 1.0
"""Seconds that a check has to end by itself; it has nothing to save."""

EXAMPLE = "training_example"
"""Among the shipped assets."""

TINY = {"width": 64, "height": 48, "num_frames": 5, "dataset_repeat": 1, "fps": 0.0}


@dataclass(frozen=True)
class TrainingData:
    """A data set that was found good: settings of the trainer, and a mark that changes with its files."""

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
        side = "0 with 0 for the other side: clips keep sizes of their own."
        return {
            "required": {
                "folder": sockets.line(
                    EXAMPLE,
                    "A folder in ComfyUI's input folder, or a path in one that its owner lets workflows read.",
                ),
                "width": sockets.whole(832, 0, sockets.MAX_SIDE, f"Width to train at. {side}", step=16),
                "height": sockets.whole(480, 0, sockets.MAX_SIDE, f"Height to train at. {side}", step=16),
                "num_frames": sockets.whole(
                    81, 1, 10001, "Frames of a clip, 4k + 1; pictures are clips of one.", step=4
                ),
            },
            "optional": {
                "extra_inputs": sockets.line("", f"Inputs besides the prompt, with commas between them: {names}."),
                "metadata": sockets.line("", "The file that lists the rows, if it is not metadata.* of the folder."),
                "fps": widget("fps", 16.0, "Bring clips to this frame rate; Wan knows 16. 0 takes frames as stored."),
                "frame_pick": widget("frame_pick"),
                "short_clip": widget("short_clip"),
                "on_bad_sample": widget("on_bad_sample"),
                "dataset_repeat": widget("dataset_repeat"),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """Small clips."""
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
    def VALIDATE_INPUTS(cls, **values: Any) -> bool | str:
        return true_or_message(lambda: cls.settings(**values))

    @classmethod
    def IS_CHANGED(cls, folder: str, **_: Any) -> str:
        return files_mark([places.data_folder(folder)])

    def check(self, **values: Any) -> dict[str, Any]:
        settings = self.settings(**values)
        mark = files_mark([Path(settings["dataset_base_path"])])
        with tempfile.TemporaryDirectory(prefix="wancore_", dir=host.temp_dir()) as work:
            folder = Path(work)
            load_settings(settings, {}).save_json(folder / "settings.json")
            words = ["--out", str(folder), "--config", str(folder / "settings.json")]
            launch = Launch(pack_command(host.PACK_FOLDER, "trainer.checking", words), folder)
            try:
                attend(launch, _show_check, host.check_cancelled, CHECK_PATIENCE)
            except ChildError as error:
                told = folder / "report.txt"
                raise ValueError(told.read_text(encoding="utf-8") if told.exists() else error.said) from error
            report = (folder / "report.txt").read_text(encoding="utf-8")
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


def _show_check(event: Mapping[str, Any]) -> None:
    if event["event"] == "checked":
        host.show("Checking", event["done"], event["total"])
