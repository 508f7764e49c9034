"""What a training leaves behind, in the graph: its loss, and its weights on a model."""

from pathlib import Path
from typing import Any

from torch import Tensor

from wan_core.prepare import VideoModel
from wan_core.runtime import log

from ..trainer.events import latest_steps
from . import places, sockets
from .lora import LIMIT
from .training_run import chart, files_mark
from .training_widgets import RUNS, image, run_folder, true_or_message


class LossPlot:
    """The loss of a run."""

    CATEGORY = "WanCore/training"
    FUNCTION = "plot"
    DESCRIPTION = "Draw the loss of a training run, also of one that is still going or that the shell has started."
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("loss_chart", "report")
    OUTPUT_TOOLTIPS = ("The loss over the steps and by timestep.", "How far the run is.")

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
                f"{name!r} is not where a workflow may read; write the name of a run of the output folder."
            )
        if not (path / "events.jsonl").is_file():
            raise ValueError(f"{path} holds no training run (there is no events.jsonl in it).")
        return path / "events.jsonl"

    @classmethod
    def VALIDATE_INPUTS(cls, run: str | None = None) -> bool | str:
        return True if run is None else true_or_message(lambda: cls.events(run))

    @classmethod
    def IS_CHANGED(cls, run: str | None = None) -> str:
        return files_mark([cls.events(run)]) if run else ""

    def plot(self, run: str) -> tuple[Tensor, str]:
        file = self.events(run)
        try:
            steps, picture = latest_steps(file), chart(file.parent)
        except (AttributeError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(f"{file} is damaged: its events lack numbers that every run writes.") from error
        told = f"{len(steps)} of {steps[-1]['total']} steps" if steps else "no steps yet"
        return image([picture]), told


class TrainedWeights:
    """What a training gave, on a model."""

    CATEGORY = "WanCore/training"
    FUNCTION = "load"
    DESCRIPTION = (
        "Put what a training wrote on a model: a LoRA, a whole model, a VACE branch or a speed-control adapter. The "
        "loaded model stays as it is."
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
        return True if weights is None else true_or_message(lambda: places.trained_file(weights))

    @classmethod
    def IS_CHANGED(cls, weights: str | None = None, **_: Any) -> str:
        return files_mark([places.trained_file(weights)]) if weights else ""

    def load(self, model: VideoModel, weights: str, strength: float = 1.0) -> tuple[VideoModel, str]:
        changed, told = model.with_lora(places.trained_file(weights), strength=strength)
        log.info("%s", told.summary)
        return changed, str(told)
