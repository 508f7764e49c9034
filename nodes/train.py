"""Nodes that train."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from wan_core import catalog, model_files
from wan_core.loading.pairs import BOTH, EXPERTS, expand, find_pairs
from wan_core.models.config import DiTConfig
from wan_core.runtime import log

from ..trainer.config import TrainConfig
from . import host, planning, sockets
from .camera import SpeedControl
from .loaders import AUTO, NONE, ImageEncoderLoader, Loader, TextEncoderLoader, VAELoader, tokenizer_folder
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

T = TypeVar("T")


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
                    [*EXPERTS, BOTH],
                    EXPERTS[0],
                    "Of a model of two experts (Wan 2.2 A14B) the one that is trained, on the timesteps at which it "
                    "works: high or low noise, in a run of its own with the expert at the end of its name. Or both in "
                    "one run: each gets a file, or --expert_loras shared in flags makes one LoRA for both.",
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
        """The folder of the run: of a model of two experts one for each that is trained alone.

        Raises:
            ValueError: the name cannot be that of a folder.
        """
        model = values["model"]
        is_pair = len(ModelLoader.ROWS.get(model, expand(model))) == len(EXPERTS)
        is_alone = is_pair and values["expert"] != BOTH
        return run_folder(f"{values['name']}_{values['expert']}_noise" if is_alone else values["name"])

    @classmethod
    def trained(cls, experts: Sequence[T], values: Mapping[str, Any]) -> tuple[T, ...]:
        """Those of a model's `experts` that are trained."""
        expert = values["expert"]
        return tuple(experts) if len(experts) == 1 or expert == BOTH else (experts[EXPERTS.index(expert)],)

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
        model = replace(model, experts=cls.trained(model.experts, values))
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
        pair = next(iter(find_pairs(file.name for file in outcome.files)), None)
        weights = str(outcome.files[0].with_name(pair or outcome.files[0].name)) if outcome.files else ""
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
        is split of which one expert is trained.
        """
        download = values["download"]
        experts, (text,), (vae,) = (loader().components(values[loader.INPUT], download) for loader in self.LOADERS)
        dits = self.trained(experts, values)
        dit = dits[0]
        components = [*dits, text, vae]
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
        return found, model_files.boundary_of(dit) if len(dits) < len(experts) else None


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
