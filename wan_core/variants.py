"""What a Wan 2.1 DiT is, told by its structure alone: which conditioning it takes and how its extra channels are
filled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .models.config import DiTConfig, Geometry
from .types import Slot

MASK, IMAGE = Slot("mask", "mask"), Slot("image", "frames")
CONTROL, FIRST_FRAME = Slot("control"), Slot("first_frame", "first")

SPEED = "motion_bucket_id"


@dataclass(frozen=True)
class Variant:
    """One structure of the family.

    Attributes:
        name: identifies the row; it is never compared with in models, sampling or memory.
        label: what users call it.
        matches: whether a configuration is of this structure; the first row that matches counts. None matches by the
            channels beside the noise alone.
        slots: the channels beside the noise, in order.
        accepts: inputs that it can use besides text.
        requires: inputs without which its result is meaningless.
    """

    name: str
    label: str
    matches: Callable[[DiTConfig], bool] | None
    slots: tuple[Slot, ...] = ()
    accepts: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def channels(self, geometry: Geometry) -> int:
        """How many channels there are beside the noise."""
        return sum(slot.channels(geometry) for slot in self.slots)

    def describes(self, config: DiTConfig) -> bool:
        """Whether a DiT of this configuration is of this structure."""
        if self.matches is not None:
            return self.matches(config)
        return config.concat_channels == self.channels(config.geometry)


VARIANTS = (
    Variant(
        "vace",
        "VACE",
        lambda c: bool(c.vace_layers),
        accepts=("vace_video", "vace_video_mask", "vace_reference_image"),
    ),
    Variant(
        "fun_camera",
        "Fun Control-Camera",
        lambda c: c.camera_channels > 0,
        (FIRST_FRAME,),
        accepts=("input_image", "camera"),
        requires=("input_image", "camera"),
    ),
    Variant(
        "fun_v1_1_control",
        "Fun V1.1 Control",
        lambda c: c.has_reference,
        (CONTROL, FIRST_FRAME),
        accepts=("control_video", "input_image", "reference_image"),
        requires=("control_video",),
    ),
    Variant(
        "fun_control",
        "Fun Control",
        None,
        (CONTROL, FIRST_FRAME),
        accepts=("control_video", "input_image"),
        requires=("control_video",),
    ),
    Variant(
        "flf2v",
        "first-last-frame to video",
        lambda c: c.image_positions > 0,
        (MASK, IMAGE),
        accepts=("input_image", "end_image"),
        requires=("input_image", "end_image"),
    ),
    Variant(
        "i2v",
        "image to video or Fun InP",
        None,
        (MASK, IMAGE),
        accepts=("input_image", "end_image", "inpaint_video"),
    ),
    Variant("t2v", "text to video", None, accepts=(SPEED,)),
)


def match_variant(config: DiTConfig) -> Variant:
    """The row that describes a DiT of this configuration.

    Raises:
        ValueError: no row does.
    """
    for variant in VARIANTS:
        if variant.describes(config):
            return variant
    known = sorted({config.out_channels + variant.channels(config.geometry) for variant in VARIANTS})
    raise ValueError(
        f"No {config.geometry.name} model has {config.in_channels} input channels "
        f"({', '.join(map(str, known[:-1]))} and {known[-1]} are known)."
    )


def check(variant: Variant, inputs: Sequence[str], label: str, has_motion_controller: bool = False) -> None:
    """Raise ValueError when a model of this structure, called `label`, cannot use `inputs` or lacks one that it
    needs.
    """
    strange = [name for name in inputs if name not in variant.accepts]
    if strange:
        takers = sorted({v.label for v in VARIANTS if set(strange) <= set(v.accepts)})
        hint = f", or load a model that takes it ({' or '.join(takers)})" if takers else ""
        raise ValueError(f"{label} takes {_listed(variant.accepts)}, but got {_listed(strange)}. Remove it{hint}.")
    if not set(variant.requires) <= set(inputs):
        raise ValueError(f"{label} ({variant.label}) needs {_listed(variant.requires)}; got {_listed(inputs)}.")
    if SPEED in inputs and not has_motion_controller:
        raise ValueError(f"{SPEED} needs the speed-control adapter beside {label}; load it with the model.")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "nothing besides text"
