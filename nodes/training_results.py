"""Nodes for what a training leaves: its loss, and its weights on a model."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_core.loading.pairs import EXPERTS, expand, side_of
from wan_core.model import VideoModel
from wan_core.runtime import log

from ..trainer.run.events import latest_steps
from . import places, planning, sockets
from .lora import LIMIT
from .training_inputs import RUNS, image, run_folder
from .training_run import chart, files_mark, require_packages


class LossPlot:
    """The loss of a run."""

    CATEGORY = "WanCore/training"
    FUNCTION = "plot"
    DESCRIPTION = "Draw the loss of a training run, also of one that is still running or was started in a shell."
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("loss_chart", "report")
    OUTPUT_TOOLTIPS = ("The loss over the steps and by timestep.", "How many steps are done.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "run": sockets.line(
                    "my_training", f"Name of a run below {RUNS} of the output folder, or a path in a folder of ComfyUI."
                )
            }
        }

    @classmethod
    def events(cls, run: str) -> Path:
        """The event file of a run.

        Raises:
            ValueError: there is none.
        """
        name = run.strip()
        path = places.trained_folder(name) if Path(name).is_absolute() else run_folder(name)
        if path is None:
            raise ValueError(
                f"{name!r} is not where a workflow may read; write the name of a run in the output folder."
            )
        if not (path / "events.jsonl").is_file():
            raise ValueError(f"{path} holds no training run (there is no events.jsonl in it).")
        return path / "events.jsonl"

    @classmethod
    def VALIDATE_INPUTS(cls, run: str | None = None) -> bool | str:
        return True if run is None else sockets.true_or_message(lambda: cls.events(run))

    @classmethod
    def IS_CHANGED(cls, run: str | None = None) -> str:
        return files_mark([cls.events(run)]) if run else ""

    def plot(self, run: str) -> tuple[Tensor, str]:
        file = self.events(run)
        require_packages(("matplotlib",))
        try:
            steps, picture = latest_steps(file), chart(file.parent)
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"{file} is damaged: its events lack numbers that every run writes.") from error
        return image([picture]), f"{len(steps)} of {steps[-1]['total']} steps" if steps else "no steps yet"


class TrainedWeights:
    """Trained weights on a model."""

    CATEGORY = "WanCore/training"
    FUNCTION = "load"
    DESCRIPTION = (
        "Apply trained weights to a model: a LoRA, a whole model, a VACE branch or a speed-control adapter. The "
        "loaded model is not changed. Of two experts the one is changed that the name of the file or its folder says; "
        "a name with braces, as {high,low}, is a file for each."
    )
    RETURN_TYPES = (sockets.MODEL, "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The model with the weights, for the sampler.",
        "What was found in the file and what it changes.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "The model that was trained, from the loader or Speed Control."),
                "weights": sockets.line("", "From a training node, or a path below the output or the models folder."),
                "strength": sockets.number(1.0, -LIMIT, LIMIT, "Factor on the change; 0 leaves it out.", step=0.05),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, weights: str | None = None) -> bool | str:
        return True if weights is None else sockets.true_or_message(lambda: cls.files(weights))

    @classmethod
    def IS_CHANGED(cls, weights: str | None = None, **_: Any) -> str:
        return files_mark(cls.files(weights)) if weights else ""

    @classmethod
    def files(cls, weights: str) -> list[Path]:
        """The file that `weights` names, or both of a pair.

        Raises:
            ValueError: one is not there.
        """
        return [places.trained_file(name) for name in expand(weights)]

    @classmethod
    def expert(cls, file: Path, count: int) -> int | None:
        """The number of the expert, of `count`, that `file` is for by its name; None is all."""
        side = side_of(file) if count == len(EXPERTS) else None
        return None if side is None else EXPERTS.index(side)

    @classmethod
    def plan_outputs(cls, model: Any, weights: Any, strength: Any, **_: Any) -> tuple[planning.PlannedModel, None]:
        """Weights that are still to be trained are left out: beside the model they are small."""
        handle = planning.require(planning.PlannedModel, "model", model)
        with suppress(ValueError):
            for file in cls.files(weights) if isinstance(weights, str) else ():
                handle = handle.with_lora(file, strength, cls.expert(file, len(handle.experts)))
        return handle, None

    def load(self, model: VideoModel, weights: str, strength: float = 1.0) -> tuple[VideoModel, str]:
        files, count, reports = self.files(weights), len(model.experts), []
        if len(files) > count:
            raise ValueError(f"{weights} is a pair of files, but {model.name} has one expert; name one of them.")
        for file in files:
            model, report = model.with_lora(file, strength=strength, expert=self.expert(file, count))
            log.info("%s", report.summary)
            reports.append(str(report))
        return model, "\n".join(reports)
