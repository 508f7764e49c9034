"""Files that change a model, read for what they are: a LoRA of any dialect, or trained weights of the whole model."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from ..checkpoints.detect import Component, detect
from ..checkpoints.dialects import Kind
from ..checkpoints.files import describe_files, resolve_model
from ..checkpoints.header import CheckpointError, read_header
from ..checkpoints.load import combine, open_component
from ..checkpoints.read import TensorFiles
from ..checkpoints.state_dict import GivenTensors, given_header
from ..lora.naming import is_lora
from ..lora.patches import Replacement
from ..lora.read import AdapterConfig, Layer, Lora, read_lora
from ..reading import blamed_on, read_json

PathLike = str | Path

PEFT_FILE = "adapter_model"
"""PEFT's fixed file name; the configuration with alpha lies beside it."""
PEFT_CONFIG = "adapter_config.json"

REPLACING_KINDS: tuple[Kind, ...] = ("dit", "vace", "motion_controller")


def open_lora(path: PathLike) -> Lora:
    """The LoRA at `path`, its tensors in host memory; a checkpoint of trained weights comes as replacements.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds neither.
    """
    files = resolve_model(path)
    header = read_header(files)
    name = describe_files(files)
    if not is_lora(header):
        return replacing(detect(header, REPLACING_KINDS))
    with TensorFiles(header) as tensors:
        return read_lora(name, header, tensors.read, header.metadata, peft_config(files[0]))


def given_lora(tensors: Mapping[str, Tensor], name: str = "state_dict") -> Lora:
    """The LoRA, or the trained weights, in a state dict; `name` stands for it in messages.

    Raises:
        ValueError: it is no dict of tensors, or holds neither.
    """
    header = given_header(tensors, name)
    if is_lora(header):
        return read_lora(name, header, lambda key: tensors[key].detach().cpu().clone(), {})
    component, given = detect(header, REPLACING_KINDS), GivenTensors(tensors)
    return replacing(component, lambda key: combine(component.sources[key], given))


def peft_config(file: Path) -> AdapterConfig | None:
    """PEFT's configuration beside `file`, None when the file is not PEFT's or alone.

    Raises:
        ValueError: the configuration is no JSON object.
    """
    config = file.with_name(PEFT_CONFIG)
    if file.stem != PEFT_FILE or not config.is_file():
        return None
    with blamed_on(config, "is no configuration of PEFT", "Save the adapter again."):
        return AdapterConfig(read_json(config))


def replacing(component: Component, read: Callable[[str], Tensor] | None = None) -> Lora:
    """Trained weights of a DiT, a VACE branch or a motion controller as replacements of every parameter.

    `read` gives a tensor by its original name, from the files if None.

    Raises:
        CheckpointError: the file is a model of another kind.
    """
    if component.kind not in REPLACING_KINDS:
        raise CheckpointError(
            f"{component.name} is no LoRA and no trained video model, VACE branch or motion controller, but a "
            f"{component.kind.replace('_', ' ')}; load it with the loader of that kind."
        )
    layers = []
    with nullcontext(read) if read else open_component(component) as read:
        for name in component.sources:
            owner, _, leaf = name.rpartition(".")
            layers.append(Layer(owner, False, ((leaf, Replacement(read(name).clone())),)))
    dialect = f"trained weights ({component.layout} names)"
    return Lora(
        component.name,
        tuple(layers),
        dialects={dialect: len(layers)},
        alpha="none: whole weights",
        metadata=component.header.metadata,
    )
