"""LoRA files and trained weights for Wan models: opened, matched with a model, described."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from ..checks import check_choice
from ..distilled import names_of, recognise
from ..files import errors_from, read_json
from ..loading.detect import Component, detect
from ..loading.foreign_names import diffusers_name
from ..loading.load import TensorsInMemory, combine, header_of_tensors, open_component
from ..loading.names import ModelKind
from ..loading.paths import describe_files, resolve_model
from ..loading.tensor_files import CheckpointError, TensorFiles, read_header
from ..models.config import DiTConfig, MotionControllerConfig
from ..models.dit import WanDiT
from ..models.layers import MotionController
from ..models.ops import on_meta
from ..offload.quant import quantised_layers
from ..types import Curve
from .apply import LORA_MODES, LoraMode, LoraUse, ModelBlocks
from .bind import EVERYWHERE, NO_SUCH_PART, BlockStrengths, Bound, Shapes, bind, module_names, parameter_shapes
from .naming import Spellings, is_lora
from .patches import Patch, Replacement
from .read import AdapterConfig, Layer, Lora, Skipped, read_lora
from .report import LoraReport, describe, estimated_norm

PathLike = str | Path

PEFT_FILE = "adapter_model"
"""PEFT's fixed file name; the configuration with alpha lies beside it."""
PEFT_CONFIG = "adapter_config.json"

REPLACING_KINDS: tuple[ModelKind, ...] = ("dit", "vace", "motion_controller")


def open_lora(path: PathLike) -> Lora:
    """The LoRA at `path`, its tensors in host memory; a checkpoint of trained weights comes as replacements.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds neither.
    """
    files = resolve_model(path)
    header = read_header(files)
    name = describe_files(files)
    few_steps = recognise(names_of(files[0].resolve()), header.metadata, header)
    if not is_lora(header):
        return replace(replacing(detect(header, REPLACING_KINDS)), few_steps=few_steps)
    with TensorFiles(header) as tensors:
        lora = read_lora(name, header, tensors.read, header.metadata, peft_config(files[0]))
    return replace(lora, few_steps=few_steps)


def lora_from_tensors(tensors: Mapping[str, Tensor], name: str = "state_dict") -> Lora:
    """The LoRA, or the trained weights, in a state dict, called `name` in messages.

    Raises:
        ValueError: it is no dict of tensors, or holds neither.
    """
    header = header_of_tensors(tensors, name)
    if is_lora(header):
        return read_lora(name, header, lambda key: tensors[key].detach().cpu().clone(), {})
    component, reader = detect(header, REPLACING_KINDS), TensorsInMemory(tensors)
    return replacing(component, lambda key: combine(component.sources[key], reader))


def peft_config(file: Path) -> AdapterConfig | None:
    """PEFT's configuration beside `file`; None when there is none, or the file is not PEFT's.

    Raises:
        ValueError: the configuration is no JSON object.
    """
    config = file.with_name(PEFT_CONFIG)
    if file.stem != PEFT_FILE or not config.is_file():
        return None
    with errors_from(config, "is no configuration of PEFT", "Save the adapter again."):
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


SIZES = {1536: "Wan 2.1 1.3B", 3072: "Wan 2.2 5B", 5120: "Wan 2.1 14B"}
"""Published models by width."""

WIDTHS = (
    (r".*self_attn\.[qkvo]\.weight", 1),
    (r".*cross_attn\.[qkvo]\.weight", 0),
    (r".*ffn\.0\.weight", 1),
    (r".*ffn\.2\.weight", 0),
    (r".*norm_[qk]\.weight", 0),
    (r".*(?:vace_)?patch_embedding\.weight", 0),
    (r"linear\.[02]\.weight", 0),
)
"""Parameters whose shape shows the width of a model, each with the axis of it."""

SAMPLED_ROWS = 64
"""Rows of a quantised weight from which its norm is estimated."""

IMAGE_BRANCH = re.compile(r"img_emb\.|.*\.(k_img|v_img|norm_k_img)\b")
"""Names that only models with image input have."""

OTHER_MODELS = {
    r"double_blocks": "FLUX or HunyuanVideo",
    r"single_transformer_blocks": "FLUX",
    r"joint_blocks": "Stable Diffusion 3",
    r"input_blocks|down_blocks|mid_block": "Stable Diffusion",
    r"transformer_blocks": "LTX-Video, CogVideoX or another diffusers transformer",
    r"layers\.\d+\.": "a language model or Lumina",
}


def _layout_block(name: str) -> str | None:
    match = re.match(r"(?:vace_)?blocks\.\d+(?=\.)", name)
    return match and match[0]


MODEL_BLOCKS = ModelBlocks(
    block=_layout_block,
    once=lambda name: _layout_block(name) is None and not name.startswith(("patch_embedding.", "head.")),
)
"""The DiT reads weights of its embedders before the first step; inputs that no step changes are projected once."""


@dataclass(frozen=True)
class Target:
    """A model that LoRAs are matched with: its name, the shapes of its parameters, and the norm of each, if known."""

    name: str
    shapes: Shapes
    norm: Callable[[str], float | None] = lambda name: None

    @classmethod
    def of_modules(cls, name: str, modules: Sequence[nn.Module]) -> "Target":
        """A loaded model, with the parts that belong to it."""
        found = {n: t for module in modules for n, t in module.state_dict(keep_vars=True).items()}
        layers = {f"{path}.weight": layer for module in modules for path, layer in quantised_layers(module).items()}

        def norm(parameter: str) -> float | None:
            layer, weight = layers.get(parameter), found[parameter]
            if weight.is_meta:  # an expert that no run has needed yet
                return None
            if layer is None:
                return estimated_norm(weight)
            rows = layer.some_rows(SAMPLED_ROWS)
            return estimated_norm(rows) * (layer.out_features / len(rows)) ** 0.5

        return cls(name, parameter_shapes(modules), norm)

    @classmethod
    @contextmanager
    def of_file(cls, component: Component) -> Iterator["Target"]:
        """A model file, which is open inside the block. Weights are read when their norm is asked for."""
        with open_component(component) as read:
            shapes = {name: source.shape for name, source in component.sources.items()}
            yield cls(component.name, shapes, lambda name: estimated_norm(read(name)))

    @property
    def width(self) -> int:
        return width_of((name, shape) for name, shape in self.shapes.items()) or 0

    @property
    def blocks(self) -> int:
        return _block_count(self.shapes)

    @property
    def takes_images(self) -> bool:
        return any(name.startswith("img_emb.") for name in self.shapes)

    def __str__(self) -> str:
        return f"{self.name} ({size_in_words(self.width, self.blocks)})"


def width_of(shapes: "Iterator[tuple[str, tuple[int, ...]]]") -> int | None:
    """The model width that most parameters have; None when none of them shows it."""
    votes: Counter[int] = Counter()
    for name, shape in shapes:
        axis = next((axis for pattern, axis in WIDTHS if re.fullmatch(pattern, name)), None)
        if axis is not None and axis < len(shape):
            votes[shape[axis]] += 1
    return votes.most_common(1)[0][0] if votes else None


def _block_count(names: Shapes | Sequence[str]) -> int:
    found = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def size_in_words(width: int | None, blocks: int) -> str:
    """The published model of that width, with the width and the number of blocks."""
    if not width:
        return "a size that its shapes do not show"
    counted = f", {blocks} blocks" if blocks else ""
    return f"{SIZES.get(width, 'a Wan model of its own size')}: width {width}{counted}"


@cache
def all_names() -> tuple[str, ...]:
    """Every module and parameter name that a Wan 2.1 model can have."""
    config = DiTConfig(
        num_layers=40, in_channels=36, has_image_input=True, image_positions=514, has_reference=True,
        camera_channels=24, vace_layers=tuple(range(40)), vace_channels=96,
    )  # fmt: skip
    with on_meta():
        modules = (WanDiT(config), MotionController(MotionControllerConfig()))
    return tuple(module_names(parameter_shapes(modules)))


def _aliases(path: str) -> tuple[str, ...]:
    return (diffusers_name(path),)


@cache
def all_spellings() -> Spellings:
    """Spellings of `all_names`."""
    return Spellings.of(all_names(), _aliases)


def canonical(lora: Lora) -> tuple[tuple[tuple[str, Patch], ...], tuple[Skipped, ...]]:
    """The patches of `lora` under the original names of Wan 2.1, and what has no such name; needs no model."""
    patches, skipped = [], list(lora.skipped)
    for layer in lora.layers:
        target = all_spellings().find(layer.path, layer.joined)
        if target is None:
            skipped.append(Skipped(layer.path, "names no part of Wan 2.1"))
            continue
        # These are parameters, to which no `weight` is added.
        bare = target.rpartition(".")[2] in ("modulation", "emb_pos")
        patches += [(target if bare else f"{target}.{leaf}", patch) for leaf, patch in layer.patches]
    return tuple(patches), tuple(skipped)


def made_for(patches: Sequence[tuple[str, Patch]]) -> str:
    """The model that patches of these names and shapes were trained on, in words."""
    names = [name for name, _ in patches]
    words = [size_in_words(width_of((name, patch.shape) for name, patch in patches), _block_count(names))]
    words += ["with image input"] * any(IMAGE_BRANCH.match(name) for name in names)
    words += ["VACE branch"] * any(name.startswith("vace_") for name in names)
    words += ["motion controller"] * any(name.startswith("linear.") for name in names)
    return ", ".join(words)


def bind_to(lora: Lora, target: Target) -> Bound:
    """`lora` tied to `target`.

    Raises:
        ValueError: nothing matches, or the LoRA was made for a model of another size.
    """
    bound = bind(lora, target.shapes, Spellings.of(module_names(target.shapes), _aliases))
    named, _ = canonical(lora)
    width = width_of((name, patch.shape) for name, patch in named)
    if bound.misfits and width and width != target.width:
        raise ValueError(
            f"{lora.name} was made for {made_for(named)}, but {target} is another size. LoRAs do not carry over "
            "between sizes; use one that was trained on this size."
        )
    misfits = (
        Skipped(misfit.name, f"made for shape {list(misfit.made_for)}, the model has {list(misfit.found)}")
        for misfit in bound.misfits
    )
    skipped = (*bound.skipped, *misfits)
    skipped = tuple(_explained(s, target) for s in skipped)
    if not bound.patches:
        raise ValueError(_nothing_matches(lora, named, skipped, target))
    return Bound(lora, bound.patches, skipped)


def _explained(skipped: Skipped, target: Target) -> Skipped:
    """`skipped` under its original name, where there is one, with the reason that this model gives."""
    spellings = all_spellings()
    name = spellings.find(skipped.name, False) or spellings.find(skipped.name, True) or skipped.name
    reason = skipped.reason
    if reason == NO_SUCH_PART:
        block = re.match(r"blocks\.(\d+)\.", name)
        if IMAGE_BRANCH.match(name) and not target.takes_images:
            reason = "image branch, which this model does not have"
        elif block and int(block[1]) >= target.blocks:
            reason = f"the model has only {target.blocks} blocks"
    return Skipped(name, reason)


def _nothing_matches(lora: Lora, named: Sequence[tuple[str, Patch]], skipped: Sequence[Skipped], target: Target) -> str:
    names = "\n".join(layer.path for layer in lora.layers)
    guess = next((model for pattern, model in OTHER_MODELS.items() if re.search(pattern, names)), None)
    if guess and not named:
        likeness = f"It looks like a LoRA for {guess}."
    elif named:
        likeness = f"It was made for {made_for(named)}."
    else:
        likeness = f"Dialect: {', '.join(lora.dialects)}."
    examples = ", ".join(s.name for s in skipped[:3])
    reasons = "; ".join(dict.fromkeys(s.reason for s in skipped))
    return f"Nothing in {lora.name} matches {target}: {examples} ({reasons}). {likeness}"


def _notes(bound: Bound, target: Target) -> list[str]:
    notes = []
    reasons = Counter(s.reason for s in bound.skipped)
    images = sum(count for reason, count in reasons.items() if reason.startswith("image branch"))
    if images:
        notes.append(
            f"It is for a model that reads pictures through CLIP: {images} names of that branch are left out, the "
            "others apply."
        )
    others = sum(reasons.values()) - images
    if others:
        notes.append(f"{others} names are not used; they are listed with the reason.")
    if "PEFT" in bound.lora.dialects and bound.lora.alpha.startswith("no alpha"):
        notes.append("PEFT keeps alpha in adapter_config.json, which is not beside the file; factor 1 is assumed.")
    replaced = {name for name, patch in bound.patches if isinstance(patch, Replacement)}
    if replaced:
        notes.append(f"Trained weights: {len(replaced)} parameters take the place of the model's.")
    declared = bound.lora.metadata.get("ss_network_alpha")
    if declared and bound.lora.alpha.startswith("no alpha"):
        notes.append(f"The metadata say alpha {declared}, but there are no alpha tensors: taken as folded in.")
    return notes


def use_lora(
    source: PathLike | Lora,
    target: Target,
    *,
    strength: float | Sequence[float] | Curve = 1.0,
    blocks: BlockStrengths = EVERYWHERE,
    mode: LoraMode = "auto",
) -> LoraUse:
    """The LoRA, or the trained weights, at `source`, ready to be applied to `target`.

    Raises:
        ValueError: the file cannot be read, nothing in it matches, it was made for another size, or a setting is wrong.
    """
    check_choice("LoRA mode", mode, LORA_MODES)
    lora = source if isinstance(source, Lora) else open_lora(Path(source))
    curve = Curve.of(strength)
    return LoraUse(bound=bind_to(lora, target), strength=curve, blocks=blocks, mode=mode)


def lora_report(use: LoraUse, target: Target, stacked: Sequence[LoraUse] = ()) -> LoraReport:
    """What `use` does to `target`, on which the LoRAs `stacked` are applied already."""
    named, _ = canonical(use.bound.lora)
    is_used = any((*use.strength.values, use.strength.outside))
    return describe(
        use.bound.lora,
        made_for(named),
        target=str(target),
        patches=use.bound.patches if is_used else (),
        skipped=use.bound.skipped,
        notes=_notes(use.bound, target),
        stacked=(*stacked, use),
        blocks=use.blocks,
        base_norm=target.norm,
    )


def lora_file_report(lora: Lora) -> LoraReport:
    """What `lora` is, without a model."""
    patches, skipped = canonical(lora)
    return describe(lora, made_for(patches), patches=patches, skipped=skipped)
