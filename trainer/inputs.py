"""The inputs besides text that a model can be trained with, and which column of a data set each one comes from.

Flags, checks of the data, cache keys and conditioning are all derived from this table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from wan_core.conditioning.camera_path import DEFAULT_SPEED, MOVES
from wan_core.conditioning.speed import FASTEST, SLOWEST

Kind = Literal["start", "end", "clip", "mask", "picture", "pictures", "poses", "number", "word"]
"""`start` and `end` are pictures of the trained clip itself; `clip` and `mask` follow it frame by frame."""

FILE_KINDS = ("clip", "mask", "picture", "pictures", "poses")
ALIGNED_KINDS = ("clip", "mask")


@dataclass(frozen=True, kw_only=True)
class ExtraInput:
    """One input.

    Attributes:
        name: what `--extra_inputs` calls it, and its column.
        kind: how a cell is read.
        gives: the name by which `wan_core.variants` knows it.
        help: what the column holds.
        droppable: whether condition dropout may leave it out where a model does not require it.
        needs: another input without which it means nothing.
        choices: the words that the column may hold.
        low, high: the range of its numbers.
        default: what an empty cell means; None makes it an error.
    """

    name: str
    kind: Kind
    gives: str
    help: str
    droppable: bool = False
    needs: str | None = None
    choices: tuple[str, ...] = ()
    low: float = float("-inf")
    high: float = float("inf")
    default: float | None = None

    @property
    def column(self) -> str | None:
        """The column that it is read from; None when it is taken from the trained clip."""
        return None if self.kind in ("start", "end") else self.name

    @property
    def is_file(self) -> bool:
        return self.kind in FILE_KINDS


INPUTS: dict[str, ExtraInput] = {
    row.name: row
    for row in (
        ExtraInput(
            name="input_image", kind="start", gives="input_image", droppable=True, help="the first frame of the clip"
        ),
        ExtraInput(name="end_image", kind="end", gives="end_image", droppable=True, help="the last frame of the clip"),
        ExtraInput(name="control_video", kind="clip", gives="control_video", help="a control video"),
        ExtraInput(
            name="reference_image", kind="picture", gives="reference_image", droppable=True, help="a reference picture"
        ),
        ExtraInput(name="vace_video", kind="clip", gives="vace_video", help="a VACE source video"),
        ExtraInput(
            name="vace_video_mask", kind="mask", gives="vace_video_mask", help="a mask video, white where to draw"
        ),
        ExtraInput(
            name="vace_reference_image",
            kind="pictures",
            gives="vace_reference_image",
            droppable=True,
            help="one or more reference pictures",
        ),
        ExtraInput(
            name="motion_bucket_id",
            kind="number",
            gives="motion_bucket_id",
            low=SLOWEST,
            high=FASTEST,
            help="the speed of the motion, 0 to 100",
        ),
        ExtraInput(
            name="camera_control_direction",
            kind="word",
            gives="camera",
            choices=tuple(MOVES),
            help="the direction of the camera",
        ),
        ExtraInput(
            name="camera_control_speed",
            kind="number",
            gives="camera",
            needs="camera_control_direction",
            default=DEFAULT_SPEED,
            help="the speed of the camera",
        ),
        ExtraInput(name="camera_path", kind="poses", gives="camera", help="a text file of camera poses"),
    )
}

SWITCHES = (
    "input_image",
    "end_image",
    "control_video",
    "reference_image",
    "vace_video",
    "vace_video_mask",
    "vace_reference_image",
    "motion_bucket_id",
)
"""Inputs that `--input_contains_<name>` turns on, the older spelling of `--extra_inputs`."""


def given_names(names: Sequence[str]) -> tuple[str, ...]:
    """What `wan_core.variants` calls the inputs `names`, each once."""
    return tuple(dict.fromkeys(INPUTS[name].gives for name in names))
