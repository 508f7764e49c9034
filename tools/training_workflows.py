"""The workflows that train and try the result: on the example data, and on what the shell has trained."""

from dataclasses import dataclass
from typing import Any

from tools.graph import Graph, Stage, Step
from tools.templates import both, chinese
from tools.workflow_texts import TASKS, loaders, recommended, save_steps, split_steps
from wan_core.catalog import SPEED_CONTROL, T2V_BASE, CatalogRow, published

DATA_FOLDER = "training_example"
DATA_SIZE = {"width": 416, "height": 240, "num_frames": 33}
"""Of the example data; small enough to train on a 12 GB card."""

CAPTION = "on the sand a red triangle flies to the left slowly"
"""One of the example data's own."""

VALIDATION_PROMPT = "from sunset to night, a small town, light, house, river"
"""The caption of the reference's example clip."""


@dataclass(frozen=True)
class Training:
    """One workflow that trains.

    Attributes:
        title, what: for its reader.
        model_id: the checkpoint.
        trainer: the training node, and its inputs that differ from their defaults.
        extra_inputs: what is trained besides the prompt.
    """

    title: str
    what: str
    model_id: str
    trainer: tuple[str, dict[str, Any]]
    extra_inputs: str = ""


TRAININGS = {
    "train_lora_t2v": Training(
        "Train a LoRA", "A LoRA learns how the clips of a data set look.", T2V_BASE,
        ("WanCoreTrainLora", {"num_epochs": 5}),
    ),
    "train_lora_control": Training(
        "Train a LoRA on a control model", "A LoRA learns how clips follow their control videos.",
        "PAI/Wan2.1-Fun-1.3B-Control", ("WanCoreTrainLora", {"num_epochs": 5}), "control_video",
    ),
    "train_speed_control": Training(
        "Train speed control", "The speed-control adapter learns how fast things move.", SPEED_CONTROL,
        ("WanCoreTrainModel", {"part": "motion_controller", "num_epochs": 2, "adapter": SPEED_CONTROL}),
        "motion_bucket_id",
    ),
}  # fmt: skip

VALIDATIONS = {
    "validate_lora": f"models/train/{T2V_BASE.rpartition('/')[2]}_lora/epoch-4.safetensors",
    "validate_full": f"models/train/{T2V_BASE.rpartition('/')[2]}_full/epoch-1.safetensors",
}
"""Workflow to the file that the recipe of that kind writes last."""

TITLES = {
    **{name: training.title for name, training in TRAININGS.items()},
    "validate_lora": "Try a trained LoRA",
    "validate_full": "Try a trained model",
}

NAMES = (*TRAININGS, *VALIDATIONS)


def describe(name: str) -> Graph:
    """The workflow called `name`, with the preset of its checkpoint."""
    return _training(name) if name in TRAININGS else _validation(name)


def _training(name: str) -> Graph:
    training = TRAININGS[name]
    row = published(training.model_id)
    node, settings = training.trainer
    data = {"folder": DATA_FOLDER, **DATA_SIZE, "extra_inputs": training.extra_inputs, "dataset_repeat": 25}
    model = {"data": ("Training data", 0), "model": row.base or row.model_id, "name": name}
    before = [
        Stage(
            "Data", [Step("Training data", "WanCoreTrainingData", data), _preview("Contact sheet", "Training data", 2)]
        ),
        Stage("Training", [Step("Train", node, {**model, **settings}), _preview("Loss chart", "Train", 1)]),
    ]
    made = _video(name, row, ("Train", 0), CAPTION, DATA_SIZE, {})
    return Graph(name, _training_note(training), [*before, *made])


def _validation(name: str) -> Graph:
    row = published(T2V_BASE)
    size = {"width": row.preset.width, "height": row.preset.height, "num_frames": row.preset.num_frames}
    made = _video(name, row, VALIDATIONS[name], VALIDATION_PROMPT, size, {"tiled": True})
    return Graph(name, _validation_note(name), made)


def _preview(title: str, source: str, output: int) -> Step:
    return Step(title, "PreviewImage", {"images": (source, output)})


def _video(
    name: str, row: CatalogRow, weights: Any, prompt: str, size: dict[str, Any], decode: dict[str, Any]
) -> list[Stage]:
    """From models and trained weights to a video."""
    preset = row.preset
    words = {"prompt": prompt, "negative_prompt": preset.negative_prompt}
    inputs = TASKS[row.task].inputs(row, size)
    controlled = row.task == "speed"
    conditioning = (inputs[-1].title, 1 if controlled else 0) if inputs else ("Prompt", 0)
    model = ("Speed control", 0) if controlled else ("Load model", 0)
    links = {"model": ("Trained weights", 0), "conditioning": conditioning}
    settings = {"seed": 1, **recommended(row), **size}
    saved = save_steps(name, preset.fps)
    saved[0] = Step(saved[0].title, saved[0].class_type, {**saved[0].inputs, **decode})
    return [
        Stage("Models", loaders(row)),
        Stage("Prompt", [Step("Prompt", "WanCoreTextEncode", {"text_encoder": ("Load text encoder", 0), **words})]),
        *(Stage(title, steps) for title, steps in split_steps(inputs).items() if steps),
        Stage(
            "Trained",
            [Step("Trained weights", "WanCoreTrainedWeights", {"model": model, "weights": weights, "strength": 1.0})],
        ),
        Stage("Sampling", [Step("Sampler", "WanCoreSampler", {**links, **settings})]),
        Stage("Video", saved),
    ]


def _training_note(training: Training) -> str:
    return "\n".join(
        [
            f"## {both(training.title)}",
            "",
            f"{training.what} Then a video is made with it. {chinese(training.what)}随后用它生成一段视频。",
            "",
            "The data is an example of moving shapes; write the folder of your own into *Training Data*. Queue the "
            "workflow again after a stop, and the training goes on where it was; raise *num_epochs* to train longer. "
            "Another *name* begins a new run. Everything that a run writes is in `output/training/<name>`.",
            "",
            "数据是移动图形的示例；在“训练数据”中写入自己的文件夹。中断后再次运行工作流，训练会从断点继续；"
            "调大 *num_epochs* 可训练更久。换一个 *name* 即开始新的训练。"
            "一次训练写出的所有内容都在 `output/training/<name>`。",
            "",
            "All settings are in `docs/training.md` of the pack. 全部设置见本节点包的 `docs/training.md`。",
        ]
    )


def _validation_note(name: str) -> str:
    what, zh = ("a LoRA", "LoRA") if name == "validate_lora" else ("a whole model", "整个模型")
    return "\n".join(
        [
            f"## {both(TITLES[name])}",
            "",
            f"A video with {what} that `python -m trainer.recipe` has trained, from the prompt that it was trained "
            "with. Choose the model that was trained in *Load Model*, and the file in *Trained Weights*.",
            "",
            f"用 `python -m trainer.recipe` 训练好的{zh}，按训练时的提示词生成视频。"
            "在“加载模型”中选择所训练的模型，在“训练好的权重”中选择文件。",
            "",
            "For models with further inputs put *Trained Weights* between the model and the sampler of their own "
            "workflow. 有其他输入的模型：把“训练好的权重”接在该模型自己的工作流中模型与采样器之间。",
        ]
    )
