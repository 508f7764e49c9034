"""What the samplers of a workflow will run, read from its links, widgets and the headers of its model files."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wan_core import catalog
from wan_core.decode import Tiles
from wan_core.loading.detect import Component, join_vace
from wan_core.lora.apply import LoraUse
from wan_core.lora.target import Target, use_lora
from wan_core.model_files import BUNDLED, inspect
from wan_core.models.config import DEFAULT_GEOMETRY, DiTConfig
from wan_core.planning.job import Given, Job
from wan_core.planning.parts import Part, published_dit, published_part
from wan_core.runtime import log
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.types import VideoSize
from wan_core.variants import SPEED, Variant, check, match_variant

from ..nodes import host, places, sockets
from ..nodes.camera import SpeedControl
from ..nodes.conditioning import tile_settings
from ..nodes.loaders import DTYPES, NONE, ImageEncoderLoader, Loader, ModelLoader, TextEncoderLoader, VAELoader
from ..nodes.lora import FOLDER
from .schema import NodeSchema
from .validate import dependency_order
from .workflow import Link, NodeSpec, Workflow, WorkflowError

SAMPLER, DECODER = "WanCoreSampler", "WanCoreVAEDecode"

PURE = ("WanCoreTeaCache", "WanCoreEasyCache", "WanCoreWindows", "WanCoreGuidance", "WanCoreMemory")
"""Nodes that make settings of their widgets; they are run."""

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Unknown:
    """An output of a node that does not count for memory, or is not known."""

    node: NodeSpec


@dataclass(frozen=True)
class Model:
    """What a MODEL socket carries."""

    name: str
    variant: Variant
    dit: Part
    motion_controller: Part | None = None
    loras: tuple[LoraUse, ...] = ()


@dataclass(frozen=True)
class Conditions:
    """What a CONDITIONING socket carries: the names of the user's inputs, and what made it."""

    text_encoder: Part | None
    names: tuple[str, ...] = ()
    size: VideoSize | None = None
    given: Given = Given()
    vae: Part | None = None
    image_encoder: Part | None = None
    tiles: Tiles = "auto"


@dataclass(frozen=True)
class Encoded:
    """A LATENT that the VAE makes of frames."""

    vae: Part
    tiles: Tiles


class Reading:
    """The values on the links of a workflow, as far as they count for memory.

    Attributes:
        absent: published models that are not on this machine, in words; they are planned by their published sizes.
    """

    def __init__(self, workflow: Workflow, nodes: Mapping[str, type[Any]], schemas: Mapping[str, NodeSchema]) -> None:
        """Raises:
        WorkflowError: a link leads nowhere, or links form a cycle.
        """
        self.absent: dict[str, str] = {}
        self._workflow, self._nodes, self._schemas = workflow, nodes, schemas
        self._values: dict[str, tuple[Any, ...]] = {}
        dependency_order(workflow, workflow.nodes)
        for node in workflow.nodes.values():
            for name, link in node.links.items():
                if link.node_id not in workflow.nodes:
                    raise WorkflowError(f"{node}: {name} is linked to node #{link.node_id}, which is not there.")

    def jobs(self) -> list[Job]:
        """What each sampler runs, in the order of the file.

        Raises:
            WorkflowError: there is no sampler, or what it is linked to is not known.
            ValueError: a setting is wrong, a file is broken or missing, or the model cannot use an input.
        """
        samplers = [node for node in self._workflow.nodes.values() if node.class_type == SAMPLER]
        if not samplers:
            raise WorkflowError(f"There is nothing to plan: the workflow has no sampler of this pack ({SAMPLER}).")
        return [self._job(node) for node in samplers]

    def _job(self, node: NodeSpec) -> Job:
        given = self._inputs(node)
        model, cond = self.linked(Model, node, given, "model"), self.linked(Conditions, node, given, "conditioning")
        geometry = model.dit.module.config.geometry
        size = VideoSize.rounded(given["width"], given["height"], given["num_frames"], geometry)
        if cond.size and cond.size != size:
            raise WorkflowError(f"{node}: {', '.join(cond.names)} is made for {cond.size}, but the video is {size}.")
        if isinstance(given.get("latent"), Encoded) and given["denoise"] < 1:
            start = given["latent"]
            whole = replace(cond.given, encoded_frames=size.latent.frames)
            cond = replace(cond, given=whole, vae=start.vae, tiles=start.tiles)
        check(model.variant, cond.names, model.name, model.motion_controller is not None)
        options = {name: _known(given.get(name)) for name in ("cache", "windows", "guidance", "memory")}
        guidance = options["guidance"] or GuidanceSettings(scale=given["cfg"])
        settings = SamplerSettings(
            seed=0 if isinstance(given["seed"], Unknown) else given["seed"], steps=given["steps"], shift=given["shift"],
            denoise=given["denoise"], solver=given["solver"], guidance=replace(guidance, mode=given["cfg_mode"]),
            cache=options["cache"], windows=options["windows"],
        )  # fmt: skip
        decoder = self._decoder_of(node)
        decoded = {} if decoder is None else self._inputs(decoder)
        decodes = isinstance(decoded.get("vae"), Part)
        memory = {} if options["memory"] is None else {"memory": options["memory"]}
        return Job(
            name=model.name, dit=model.dit, size=size, settings=settings, given=cond.given, loras=model.loras,
            motion_controller=model.motion_controller, text_encoder=cond.text_encoder,
            image_encoder=cond.image_encoder, vae=decoded["vae"] if decodes else cond.vae, decodes=decodes,
            tiles={"encode": cond.tiles, "decode": _tiles(decoded)}, **memory,
        )  # fmt: skip

    def _decoder_of(self, sampler: NodeSpec) -> NodeSpec | None:
        """The node of this pack that decodes what `sampler` gives, if one does."""
        for node in self._workflow.nodes.values():
            latent = node.links.get("latent")
            if node.class_type == DECODER and latent is not None and latent.node_id == sampler.id:
                return node
        return None

    def linked(self, kind: type, node: NodeSpec, given: Inputs, name: str) -> Any:
        """What the input `name` of `node` carries, which must be of `kind`.

        Raises:
            WorkflowError: it is not, or comes from a node that is not known.
        """
        value = given[name]
        if not isinstance(value, kind):
            source = f"comes from {value.node}" if isinstance(value, Unknown) else "is of another kind"
            raise WorkflowError(f"{node}: {name} {source}, so that this run cannot be planned.")
        return value

    def _inputs(self, node: NodeSpec) -> dict[str, Any]:
        """The inputs of a node of this pack: constants, values of links, defaults of those that are left out."""
        found = {}
        for name, spec in self._schemas[node.class_type].inputs.items():
            value = node.inputs.get(name)
            if isinstance(value, Link):
                found[name] = self._value(value)
            elif name in node.inputs:
                found[name] = value
            elif "default" in spec.options:
                found[name] = spec.options["default"]
            elif spec.required:
                raise WorkflowError(f"{node}: Required input is missing: {name}")
        return found

    def _value(self, link: Link) -> Any:
        node = self._workflow.nodes[link.node_id]
        if node.id not in self._values:
            self._values[node.id] = self._outputs(node)
        values = self._values[node.id]
        return values[link.slot] if link.slot < len(values) else Unknown(node)

    def _outputs(self, node: NodeSpec) -> tuple[Any, ...]:
        if node.class_type in PURE:
            cls = self._nodes[node.class_type]
            return getattr(cls(), cls.FUNCTION)(**self._inputs(node))
        reader = READERS.get(node.class_type)
        return (Unknown(node),) if reader is None else reader(self, node, self._inputs(node))

    def component(self, loader: type[Loader], name: str) -> Component:
        """What an entry of a loader's list is: by its header, or by what is published of it.

        Raises:
            ValueError: the file is broken, or is neither here nor a published model.
        """
        row = catalog.find_row(name) if loader is ModelLoader and name in loader.ROWS else None
        unread = None if row is None else published_dit(row)
        if name in loader.ROWS and name in BUNDLED:
            return unread or published_part(loader.KIND, name)
        try:
            files = loader.files(name, False)
        except ValueError as error:
            if name not in loader.ROWS:
                raise
            log.debug("%s", error)
            self.absent[f"{name}/{loader.PATTERN}"] = loader.KIND
            return unread or published_part(loader.KIND, name)
        return inspect(files, loader.KIND)

    def part(self, loader: type[Loader], given: Inputs) -> Part:
        """The part that a loader with these inputs gives."""
        return _part(self.component(loader, given[loader.INPUT]), given)


def _part(component: Component, given: Inputs) -> Part:
    dtype = DTYPES.get(given.get("dtype", ""), torch.bfloat16)
    return Part.planned(component, dtype, weights=given.get("weights", "auto"), mapped=given.get("rest") == "disk")


def _known(value: Any) -> Any:
    return None if isinstance(value, Unknown) else value


def _tiles(given: Inputs) -> Tiles:
    return tile_settings(**{name: given[name] for name in sockets.tile_inputs() if name in given})


def _load_model(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    component = reading.component(ModelLoader, given["model"])
    if given["vace_module"] != NONE:
        component = join_vace(component, inspect(ModelLoader.files(given["vace_module"], False), "vace"))
    return (Model(given["model"], match_variant(component.config_of(DiTConfig)), _part(component, given)),)


def _load_part(loader: type[Loader]) -> Callable[..., tuple[Any, ...]]:
    return lambda reading, node, given: (reading.part(loader, given),)


def _load_lora(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    model = reading.linked(Model, node, given, "model")
    return _with_lora(model, host.current.find_file(FOLDER, given["lora"]), given), Unknown(node)


def _put_trained(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    """Weights that are still to be trained are left out: beside the model they are small."""
    model = reading.linked(Model, node, given, "model")
    with suppress(ValueError):
        if isinstance(given["weights"], str):
            model = _with_lora(model, places.trained_file(given["weights"]), given)
    return model, Unknown(node)


def _with_lora(model: Model, path: Path, given: Inputs) -> Model:
    modules = [part.module for part in (model.dit, model.motion_controller) if part is not None]
    use = use_lora(path, Target.of_modules(model.name, modules), strength=float(given["strength"]))
    return replace(model, loras=(*model.loras, use))


def _encode_text(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    return (Conditions(reading.linked(Part, node, given, "text_encoder")),)


def _encode(
    names: Mapping[str, str], *, pictures: tuple[str, ...] = (), clips: tuple[str, ...] = ()
) -> Callable[..., tuple[Any, ...]]:
    """A reader of an encode node.

    Args:
        names: the model's name of each of the node's inputs.
        pictures: those that CLIP reads.
        clips: those that take the VAE for the whole length of the video; a picture takes it for one frame.
    """

    def read(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
        before = reading.linked(Conditions, node, given, "conditioning")
        linked = [name for name in names if name in given]
        vae = _known(given.get("vae"))
        geometry = DEFAULT_GEOMETRY if vae is None else vae.module.config.geometry
        size = VideoSize.rounded(given["width"], given["height"], given["num_frames"], geometry)
        if before.size and before.size != size:
            raise WorkflowError(f"{node} is made for {size}, but {', '.join(before.names)} for {before.size}.")
        frames = 0 if vae is None else size.latent.frames if set(linked) & set(clips) else 1
        read_by_clip = sum(name in pictures for name in linked)
        return (
            replace(
                before,
                names=tuple(dict.fromkeys((*before.names, *(names[name] for name in linked)))),
                size=size,
                given=replace(
                    before.given,
                    pictures=before.given.pictures + read_by_clip,
                    camera=before.given.camera or "camera_path" in linked,
                    encoded_frames=max(before.given.encoded_frames, frames),
                ),
                vae=vae or before.vae,
                image_encoder=_known(given.get("image_encoder")) or before.image_encoder,
                tiles=before.tiles if vae is None else _tiles(given),
            ),
        )

    return read


_VACE = {"video": "vace_video", "mask": "vace_video_mask", "reference_images": "vace_reference_image",
         "references": "vace_reference_image"}  # fmt: skip


def _encode_vace(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    (cond,) = _encode(_VACE, clips=tuple(_VACE))(reading, node, given)
    references = int("reference_images" in given) + (_known(given.get("references")) or 0)
    names = cond.names or ("vace_video",)
    frames = cond.size.latent.frames
    changed = replace(cond.given, vace=(*cond.given.vace, references), encoded_frames=frames)
    return (replace(cond, names=names, given=changed),)


def _collect_references(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    """How many reference pictures there are; each linked batch counts as one picture."""
    return ((_known(given.get("references")) or 0) + 1,)


def _encode_frames(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    return (Encoded(reading.linked(Part, node, given, "vae"), _tiles(given)),)


def _control_speed(reading: Reading, node: NodeSpec, given: Inputs) -> tuple[Any, ...]:
    model = reading.linked(Model, node, given, "model")
    cond = reading.linked(Conditions, node, given, "conditioning")
    controller = _part(reading.component(SpeedControl, given["adapter"]), {})
    return replace(model, motion_controller=controller), replace(cond, names=(*cond.names, SPEED))


READERS: Mapping[str, Callable[[Reading, NodeSpec, Inputs], tuple[Any, ...]]] = {
    "WanCoreModelLoader": _load_model,
    "WanCoreTextEncoderLoader": _load_part(TextEncoderLoader),
    "WanCoreVAELoader": _load_part(VAELoader),
    "WanCoreImageEncoderLoader": _load_part(ImageEncoderLoader),
    "WanCoreLoraLoader": _load_lora,
    "WanCoreTrainedWeights": _put_trained,
    "WanCoreTextEncode": _encode_text,
    "WanCoreImageEncode": _encode(
        {"start_image": "input_image", "end_image": "end_image", "video": "inpaint_video"},
        pictures=("start_image", "end_image"),
        clips=("start_image", "end_image", "video"),
    ),
    "WanCoreControlEncode": _encode(
        {"control_video": "control_video", "start_image": "input_image", "reference_image": "reference_image"},
        pictures=("start_image", "reference_image"),
        clips=("control_video",),
    ),
    "WanCoreCameraEncode": _encode({"camera_path": "camera"}),
    "WanCoreVaceEncode": _encode_vace,
    "WanCoreVaceReferences": _collect_references,
    "WanCoreSpeedControl": _control_speed,
    "WanCoreVAEEncode": _encode_frames,
}
"""What each node of this pack makes of its inputs, as far as memory goes."""
