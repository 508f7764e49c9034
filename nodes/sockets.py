"""Socket types of the pack, and input declarations that several nodes share.

Standard ComfyUI sockets are used wherever the meaning is the same: IMAGE (T, H, W, 3) in [0, 1]; LATENT with raw,
un-normalised VAE latents (B, z, F, h, w) under "samples", as ComfyUI's own Wan nodes expect.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

from wan_core.media.fitting import ASPECTS, LENGTH_POLICIES, SIZE_RULES
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.tiling import TileSettings

MODEL = "WANCORE_MODEL"
"""`model.VideoModel`: a DiT whose weights are on the host's offload device."""

TEXT_ENCODER = "WANCORE_TEXT_ENCODER"
"""`conditioning.text.TextEncoder`: UMT5 and its tokenizer."""

IMAGE_ENCODER = "WANCORE_IMAGE_ENCODER"
"""`models.image_encoder.ImageEncoder`: CLIP's vision tower."""

REFERENCES = "WANCORE_REFERENCES"
"""A tuple of IMAGE batches, each of its own size; every image of them is a reference."""

CAMERA_PATH = "WANCORE_CAMERA_PATH"
"""`conditioning.camera.CameraPath`: the camera's pose in every frame, frozen."""

VAE = "WANCORE_VAE"
"""`models.vae.WanVAE`."""

CONDITIONING = "WANCORE_CONDITIONING"
"""`types.Conditioning`, frozen, on the CPU; nodes return changed copies."""

CACHE = "WANCORE_CACHE"
"""`settings.CacheSettings`: which steps are skipped."""

WINDOWS = "WANCORE_WINDOWS"
"""`settings.WindowSettings`: a long video in pieces."""

PROMPTS = "WANCORE_PROMPTS"
"""A tuple of `types.Conditioning` with nothing but text, one per window, on the CPU."""

GUIDANCE = "WANCORE_GUIDANCE"
"""`settings.GuidanceSettings`; the sampler's own cfg_mode replaces that in it."""

SCHEDULE = "WANCORE_SCHEDULE"
"""`settings.ScheduleSettings`: noise levels, and which steps are run."""

RUN = "WANCORE_RUN"
"""`settings.RunSettings`: what a run saves to disk."""

MEMORY = "WANCORE_MEMORY"
"""`settings.MemorySettings`: how much of the device a run may use."""

TRAINING_DATA = "WANCORE_TRAINING_DATA"
"""`training_inputs.TrainingData`: a checked data set, as settings of the trainer."""

LINKED = frozenset({
    MODEL, TEXT_ENCODER, IMAGE_ENCODER, REFERENCES, CAMERA_PATH, VAE, CONDITIONING, CACHE, WINDOWS, PROMPTS, GUIDANCE,
    SCHEDULE, RUN, MEMORY, TRAINING_DATA, "IMAGE", "MASK", "LATENT", "SIGMAS", "CONDITIONING", "VAE", "VIDEO", "AUDIO",
    "CLIP_VISION_OUTPUT",
})  # fmt: skip
"""Types that only another node can give; a hand-written workflow may hold a constant in their place."""

MAX_SIDE = 16384
"""ComfyUI's largest image side."""

SIDE, FRAMES = DEFAULT_GEOMETRY.side_multiple, DEFAULT_GEOMETRY.temporal_stride
"""Steps of the widgets for sides, in pixels, and for lengths, before a model is known: Wan 2.1's. The model's own
geometry rounds further.
"""

CELL = f"latent cells (for Wan 2.1 {DEFAULT_GEOMETRY.spatial_stride} pixels each)"

Declaration = tuple[Any, dict[str, Any]]


def _is_possible(kind: str, value: Any) -> bool:
    """Whether a value can be of a type of LINKED. Only two of them, ComfyUI's own, are made of JSON's types."""
    if kind == "LATENT":
        return isinstance(value, dict) and isinstance(value.get("samples"), torch.Tensor)
    if kind == "CONDITIONING":
        return isinstance(value, list) and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value)
    return not isinstance(value, (str, int, float, list, dict))


def guard_sockets(cls: type[Any]) -> type[Any]:
    """The node class, with a function that raises ValueError for a constant in a socket; ComfyUI would pass it on."""
    function = getattr(cls, cls.FUNCTION)
    names = list(inspect.signature(function).parameters)[1:]

    @functools.cache
    def sockets_of() -> dict[str, tuple[str, bool]]:
        declared = cls.INPUT_TYPES()
        rows = [(declared["required"], True), (declared.get("optional", {}), False)]
        return {
            name: (entry[0], needed)
            for group, needed in rows
            for name, entry in group.items()
            if isinstance(entry[0], str) and entry[0] in LINKED
        }

    @functools.wraps(function)
    def call(self: Any, *values: Any, **inputs: Any) -> Any:
        received = {**dict(zip(names, values, strict=False)), **inputs}
        for name, (kind, needed) in sockets_of().items():
            value = received.get(name)
            if getattr(cls, "INPUT_IS_LIST", False) and isinstance(value, list):
                # The values of all calls of the node before; one that is wrong stands for them.
                value = next((one for one in value if not _is_possible(kind, one)), value[0] if value else None)
            if (name in received and value is None and needed) or (value is not None and not _is_possible(kind, value)):
                raise ValueError(f"{name} takes a {kind} from another node; got {value!r:.100}.")
        return function(self, *values, **inputs)

    setattr(cls, cls.FUNCTION, call)
    return cls


def mark_advanced(cls: type[Any], names: Collection[str]) -> None:
    """Declare these inputs of a node class as advanced, an option that editors which do not know it ignore.

    Raises:
        ValueError: the class has no input of such a name.
    """
    declare = cls.INPUT_TYPES
    known = {name for group in declare().values() for name in group}
    if unknown := set(names) - known:
        raise ValueError(f"{cls.__name__} has no inputs {', '.join(sorted(unknown))}.")

    def declared(_: type[Any]) -> dict[str, Any]:
        groups: dict[str, Any] = declare()
        for group in groups.values():
            for name in group.keys() & set(names):
                kind, options = group[name]
                group[name] = (kind, {**options, "advanced": True})
        return groups

    cls.INPUT_TYPES = classmethod(declared)


def true_or_message(check: Callable[[], object]) -> bool | str:
    """What VALIDATE_INPUTS returns: True, or why `check` refuses."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return True


def socket(kind: str, tooltip: str) -> Declaration:
    """An input that can only be linked."""
    return kind, {"tooltip": tooltip}


def choice(values: list[str], default: str, tooltip: str) -> Declaration:
    """A drop-down list."""
    return values, {"default": default, "tooltip": tooltip}


def whole(default: int, low: int, high: int, tooltip: str, *, step: int = 1, **options: Any) -> Declaration:
    """A whole number."""
    return "INT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **options}


def number(default: float, low: float, high: float, tooltip: str, *, step: float = 0.1) -> Declaration:
    """A decimal number."""
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "round": 0.001, "tooltip": tooltip}


def flag(default: bool, tooltip: str) -> Declaration:
    """A switch."""
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def text(default: str, tooltip: str, *, prompt: bool = True) -> Declaration:
    """A text box of several lines; in one for a `prompt` the editor replaces `{a|b}` by a random one of both."""
    return "STRING", {"default": default, "multiline": True, "dynamicPrompts": prompt, "tooltip": tooltip}


def line(default: str, tooltip: str) -> Declaration:
    """A text box of one line."""
    return "STRING", {"default": default, "multiline": False, "tooltip": tooltip}


TILE_STRIDE = "Distance from one tile to the next; tiles overlap by the difference, and are blended there."


def tile_inputs() -> dict[str, Declaration]:
    """The switch and the four sizes of tiled encoding and decoding, in latent cells."""
    return {
        "tiled": flag(
            False, "Work in overlapping tiles of these sizes. Off: tiles are used only when the whole does not fit."
        ),
        "tile_height": whole(TileSettings.size[0], 4, 2048, f"Height of a tile in {CELL}."),
        "tile_width": whole(TileSettings.size[1], 4, 2048, f"Width of a tile in {CELL}."),
        "stride_height": whole(TileSettings.stride[0], 1, 2048, TILE_STRIDE),
        "stride_width": whole(TileSettings.stride[1], 1, 2048, TILE_STRIDE),
    }


def size_inputs() -> dict[str, Declaration]:
    """Width, height and length of the video; they must be the sampler's."""
    return {
        "width": whole(832, SIDE, MAX_SIDE, "Width of the video, as in the sampler.", step=SIDE),
        "height": whole(480, SIDE, MAX_SIDE, "Height of the video, as in the sampler.", step=SIDE),
        "num_frames": whole(81, 1, 10001, "Length of the video, as in the sampler.", step=FRAMES),
    }


def fit_inputs(aspect: str) -> dict[str, Declaration]:
    """How pictures and clips are fitted to the size and length of the video; `aspect` is the authors' rule."""
    aspects = "crop fills the video and cuts what does not fit, stretch distorts, letterbox adds white borders."
    too_short = "What to do with a clip that is shorter than the video."
    return {
        "aspect": choice(list(ASPECTS), aspect, aspects),
        "too_short": choice(list(LENGTH_POLICIES), "repeat last", too_short),
    }


def size_rule() -> Declaration:
    """How the size of a video follows from that of its start image."""
    return choice(
        list(SIZE_RULES),
        "exact",
        "exact: width and height as typed. area, area and crop: about that area with the aspect of the start image, as "
        "the authors of Wan 2.2 I2V-A14B and TI2V-5B choose it.",
    )


def encode_inputs() -> dict[str, Declaration]:
    """Required inputs of every node that adds pictures or clips to conditioning."""
    return {
        "conditioning": socket(CONDITIONING, "From the prompt, or from another node that adds to it."),
        "vae": socket(VAE, "From the VAE loader."),
        **size_inputs(),
    }


def encode_settings(aspect: str = "crop") -> dict[str, Declaration]:
    """The last optional inputs of such a node: how it fits and encodes pictures and clips."""
    return {**fit_inputs(aspect), **tile_inputs()}
