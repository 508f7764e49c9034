"""Nodes that train, plot the loss of a run, and load trained weights."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_core import catalog, model_files
from wan_core.loading.pairs import EXPERTS, expand, side_of
from wan_core.model import VideoModel
from wan_core.models.config import DiTConfig
from wan_core.runtime import log

from ..trainer.config import TrainConfig
from ..trainer.run.events import latest_steps
from . import host, places, planning, sockets
from .camera import SpeedControl
from .loaders import AUTO, NONE, ImageEncoderLoader, Loader, TextEncoderLoader, VAELoader, tokenizer_folder
from .lora import LIMIT
from .model_loader import ModelLoader
from .training_inputs import (
    RUNS,
    TrainingData,
    check_widgets,
    defaults,
    image,
    parse_flags,
    run_folder,
    settings_of,
    widget,
)
from .training_run import Run, chart, files_mark, load_settings, require_packages, samples


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
        "loaded model is not changed. Of two experts the one is changed that the name of the file or its folder says."
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
        return True if weights is None else sockets.true_or_message(lambda: places.trained_file(weights))

    @classmethod
    def IS_CHANGED(cls, weights: str | None = None, **_: Any) -> str:
        return files_mark([places.trained_file(weights)]) if weights else ""

    @classmethod
    def plan_outputs(cls, model: Any, weights: Any, strength: Any, **_: Any) -> tuple[planning.PlannedModel, None]:
        """Weights that are still to be trained are left out: beside the model they are small."""
        handle = planning.require(planning.PlannedModel, "model", model)
        with suppress(ValueError):
            if isinstance(weights, str):
                handle = handle.with_lora(places.trained_file(weights), strength)
        return handle, None

    def load(self, model: VideoModel, weights: str, strength: float = 1.0) -> tuple[VideoModel, str]:
        file = places.trained_file(weights)
        side = side_of(file) if len(model.experts) == len(EXPERTS) else None
        expert = None if side is None else EXPERTS.index(side)
        changed, report = model.with_lora(file, strength=strength, expert=expert)
        log.info("%s", report.summary)
        return changed, str(report)


TINY = {"max_steps": 2, "sample_steps": 0, "validation_clips": 0, "mixed_precision": "no", "download": False}
BOUNDARIES = {"min_timestep_boundary", "max_timestep_boundary"}
MODEL_LABELS = ("The model to train", "The text encoder", "The VAE")


class Train:
    """The base of the two training nodes."""

    CATEGORY = "WanCore/training"
    FUNCTION = "train"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "IMAGE", "IMAGE", "INT", "STRING")
    RETURN_NAMES = ("weights", "loss_chart", "samples", "steps", "report")
    OUTPUT_TOOLTIPS = (
        "The path of the trained weights, for Trained Weights.",
        "The loss over the steps and by timestep.",
        "The newest sample video, or the first training sample as the model gets it.",
        "Steps that are done.",
        "How the run ended.",
    )
    LOADERS: tuple[type[Loader], ...] = (ModelLoader, TextEncoderLoader, VAELoader)

    @classmethod
    def own_inputs(cls) -> dict[str, sockets.Declaration]:
        """The widgets of one kind of training."""
        raise NotImplementedError

    @classmethod
    def own_settings(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Their values as settings of the trainer."""
        raise NotImplementedError

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        listed = [loader.shared_inputs(what)[0] for loader, what in zip(cls.LOADERS, MODEL_LABELS, strict=True)]
        download = ModelLoader.shared_inputs("")[1]["download"]
        return {
            "required": {
                "data": sockets.socket(sockets.TRAINING_DATA, "From Training Data."),
                **listed[0],
                "name": sockets.line(
                    "my_training", f"Folder of the run, below {RUNS} of the output folder; the same name continues it."
                ),
                **cls.own_inputs(),
                "num_epochs": widget("num_epochs"),
                # False: for a widget of this name the editor would change the value after each run.
                "seed": sockets.whole(
                    0, 0, 2**63 - 1, "Seed of order, noise, timesteps and dropout.", control_after_generate=False
                ),
            },
            "optional": {
                **listed[1],
                **listed[2],
                "image_encoder": sockets.choice(
                    [AUTO, *ImageEncoderLoader.choices()],
                    AUTO,
                    "CLIP; auto: the published one, where the model needs it.",
                ),
                "adapter": sockets.choice(
                    [NONE, *SpeedControl.choices()], NONE, "The speed-control adapter, for motion_bucket_id."
                ),
                "download": download,
                "max_steps": widget("max_steps"),
                "batch_size": widget("batch_size"),
                "gradient_accumulation_steps": widget("gradient_accumulation_steps"),
                "lr_scheduler": widget("lr_scheduler"),
                "warmup_steps": widget("warmup_steps"),
                "mixed_precision": widget("mixed_precision"),
                "use_gradient_checkpointing_offload": widget("use_gradient_checkpointing_offload"),
                "save_steps": widget("save_steps"),
                "validation_clips": widget("validation_clips"),
                "sample_steps": widget("sample_steps"),
                "sample_prompt": widget("sample_prompt"),
                "gpus": sockets.whole(1, 1, 64, "Processes, one per GPU."),
                "flags": sockets.text(
                    "",
                    "Further flags as in docs/training.md, such as --lora_alpha 16; they win. What names files, models "
                    "or servers is for the command line.",
                    prompt=False,
                ),
                "expert": sockets.choice(
                    list(EXPERTS),
                    EXPERTS[0],
                    "Of a model of two experts (Wan 2.2 A14B) the one that is trained, on the timesteps at which it "
                    "works: high or low noise. Each is a run of its own, with the expert at the end of its name.",
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The bundled models, and two steps."""
        adapter = catalog.TINY if inputs.get("adapter", NONE) != NONE else NONE
        model = ModelLoader.tiny(inputs)["model"]
        row = catalog.find_row(model)
        assert row is not None, "bundled models are in the catalog"
        bundled = {"text_encoder": catalog.TINY, "vae": row.vae[0], "image_encoder": AUTO, "adapter": adapter}
        return {"model": model, **bundled, **TINY}

    @classmethod
    def folder(cls, values: Mapping[str, Any]) -> Path:
        """The folder of the run: of a model of two experts one for each.

        Raises:
            ValueError: the name cannot be that of a folder.
        """
        model = values["model"]
        is_pair = len(ModelLoader.ROWS.get(model, expand(model))) == len(EXPERTS)
        return run_folder(f"{values['name']}_{values['expert']}_noise" if is_pair else values["name"])

    @classmethod
    def settings(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration of the widgets' values, without data and models.

        Raises:
            ValueError: a value cannot be used.
        """
        check_widgets(cls, values)
        gpus = values["gpus"]
        cards = max(1, torch.cuda.device_count()) if gpus > 1 else 1
        if gpus > cards:
            raise ValueError(f"gpus: {gpus} processes need as many cards; this machine has {cards}.")
        own = {**settings_of(values), **cls.own_settings(values), "output_path": str(cls.folder(values))}
        own["validate_steps"] = own.get("save_steps") if own.get("validation_clips") else None
        return load_settings(own, parse_flags(values["flags"]))

    @classmethod
    def plan_outputs(cls, data: Any, **values: Any) -> tuple[planning.PlannedTraining, None, None, None, None]:
        found = planning.require(TrainingData, "data", data)
        values = {**defaults(cls), **values}
        config = cls._complete(found, values, {})
        dtype = "fp32" if config.mixed_precision == "no" else "bf16"
        model, *_ = ModelLoader.plan_outputs(values["model"], dtype=dtype, weights="fp8" if config.fp8_base else "auto")
        number = EXPERTS.index(values["expert"]) if len(model.experts) > 1 else 0
        model = replace(model, experts=(model.experts[number],))
        if values["adapter"] != NONE:
            ((component, absent),) = SpeedControl.describe(values["adapter"])
            adapter = planning.plan_module(component, absent, dtype)
            model = replace(model, motion_controller=adapter)
        return planning.PlannedTraining(config, model), None, None, None, None

    @classmethod
    def VALIDATE_INPUTS(cls, **values: Any) -> bool | str:
        values = {**defaults(cls), **{name: value for name, value in values.items() if value is not None}}
        for check in (require_packages, lambda: cls.settings(values)):
            if (message := sockets.true_or_message(check)) is not True:
                return message
        checks = (loader.check(values[loader.INPUT], values["download"]) for loader in cls.LOADERS)
        return next((message for message in checks if message is not True), True)

    @classmethod
    def IS_CHANGED(cls, name: str | None = None, **values: Any) -> str:
        if not name or not name.strip():
            return ""
        known = {key: value for key, value in values.items() if value is not None}
        folder = cls.folder({**defaults(cls), **known, "name": name})
        return files_mark(sorted(folder.glob("*.safetensors")))

    def train(self, data: TrainingData, unique_id: str | None = None, **values: Any) -> dict[str, Any]:
        values = {**defaults(type(self)), **values}
        run = self._run(data, values)
        outcome = run.finished() or run.execute(unique_id)
        log.info("%s", outcome.summary)
        weights = str(outcome.files[0]) if outcome.files else ""
        result = (weights, image([chart(run.folder)]), image(samples(run.folder)), outcome.steps, outcome.summary)
        return {"ui": {"text": [outcome.summary]}, "result": result}

    def _run(self, data: TrainingData, values: Mapping[str, Any]) -> Run:
        found, boundary = self._models(values)
        files = [Path(file) for group in found["model_paths"] for file in group]
        environment = {"ACCELERATE_USE_CPU": "true"} if host.current.device().type == "cpu" else {}
        mark = f"{data.mark} {files_mark(files)}"
        config = self._complete(data, values, found, boundary)
        return Run(self.folder(values), config, mark, values["gpus"], environment)

    @classmethod
    def _complete(
        cls, data: TrainingData, values: Mapping[str, Any], models: Mapping[str, Any], boundary: float | None = None
    ) -> TrainConfig:
        """The configuration of a run on `data` with these models; of one expert, if they are split at a `boundary`."""
        words, typed = {**cls.settings(values).resolved(), **data.settings, **models}, parse_flags(values["flags"])
        config = load_settings(words, typed)
        if boundary is None or BOUNDARIES & typed.keys():
            return config
        return config.for_expert(values["expert"], boundary)

    def _models(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
        """The files of every model that the run needs, downloaded where that is allowed, as settings; and where a pair
        is split.
        """
        download = values["download"]
        experts, (text,), (vae,) = (loader().components(values[loader.INPUT], download) for loader in self.LOADERS)
        is_pair = len(experts) == len(EXPERTS)
        dit = experts[EXPERTS.index(values["expert"])] if is_pair else experts[0]
        components = [dit, text, vae]
        if dit.config_of(DiTConfig).has_image_input:
            bundled = values["model"] in model_files.BUNDLED
            name = values["image_encoder"]
            if name == AUTO:
                name = catalog.TINY if bundled else catalog.IMAGE_ENCODER_SOURCE
            components.append(ImageEncoderLoader().component(name, download))
        if values["adapter"] != NONE:
            components.append(SpeedControl().component(values["adapter"], download))
        # All files are on this machine now: the training process does not need the network.
        paths = [[str(file.resolve()) for file in part.header.files] for part in components]
        found = {"model_paths": paths, "skip_download": True}
        if tokenizer := tokenizer_folder(text, download):
            found["tokenizer_path"] = str(tokenizer)
        return found, model_files.boundary_of(dit) if is_pair else None


class TrainLora(Train):
    """A LoRA."""

    DESCRIPTION = (
        "Train a LoRA on any Wan model. Queue it again to continue after a stop; raise num_epochs or max_steps to "
        "train longer. Training runs in a process of its own, which gets the whole card."
    )

    @classmethod
    def own_inputs(cls) -> dict[str, sockets.Declaration]:
        return {
            "part": sockets.choice(["dit", "vace"], "dit", "What the LoRA is on: the model, or its VACE branch."),
            "lora_rank": widget("lora_rank"),
            "learning_rate": widget("learning_rate"),
        }

    @classmethod
    def own_settings(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"lora_base_model": values["part"]}


class TrainModel(Train):
    """Whole weights."""

    DESCRIPTION = (
        "Train all weights of a model, of its VACE branch, or of the speed-control adapter. Queue it again to continue "
        "after a stop. Training runs in a process of its own, which gets the whole card."
    )

    @classmethod
    def own_inputs(cls) -> dict[str, sockets.Declaration]:
        parts = ["dit", "vace", "motion_controller"]
        return {
            "part": sockets.choice(parts, "dit", "What is trained; motion_controller is the speed-control adapter."),
            "learning_rate": widget("learning_rate", 1e-5),
        }

    @classmethod
    def own_settings(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"trainable_models": [values["part"]], "remove_prefix_in_ckpt": f"pipe.{values['part']}."}
