"""All inputs of a user besides text as one value, and its conversion to conditioning."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..media.fitting import Pictures, as_frames, as_masks, as_references
from ..models.image_encoder import ImageEncoder
from ..types import Conditioning, Curve, VideoSize
from ..variants import CONTROL, FIRST_FRAME, Variant
from .camera import MOVES, CameraPath, camera_conditioning
from .image import (
    FUN_FIT,
    Fit,
    LatentEncoder,
    clean_start_conditioning,
    control_conditioning,
    first_frame_conditioning,
    image_conditioning,
    reference_conditioning,
)
from .vace import vace_conditioning

SLOWEST, FASTEST = 0.0, 100.0


def speed_conditioning(cond: Conditioning, motion_bucket_id: float) -> Conditioning:
    """`cond` with a speed of motion from 0 to 100, for a model that was loaded with the speed-control adapter.

    Raises:
        ValueError: the number is out of range.
    """
    check_number("motion_bucket_id", motion_bucket_id, low=SLOWEST, high=FASTEST)
    return cond.with_inputs("motion_bucket_id", motion_bucket=torch.tensor([float(motion_bucket_id)]))


@dataclass(frozen=True, kw_only=True)
class VideoInputs:
    """A user's inputs: pictures and clips as frames (T, H, W, 3) in [0, 1] and masks (T, H, W), at their own sizes.

    The field names are those of messages and of `variants`.
    """

    input_image: Tensor | None = None
    end_image: Tensor | None = None
    inpaint_video: Tensor | None = None
    inpaint_mask: Tensor | None = None
    control_video: Tensor | None = None
    reference_image: Tensor | None = None
    camera: CameraPath | None = None
    vace_video: Tensor | None = None
    vace_video_mask: Tensor | None = None
    vace_reference_image: tuple[Tensor, ...] | None = None
    motion_bucket_id: float | None = None
    vace_scale: float | Sequence[float] | Curve = 1.0

    @classmethod
    def of_call(
        cls,
        *,
        num_frames: int,
        camera_control_direction: str | None,
        camera_control_speed: float,
        camera_control_origin: Sequence[float] | None,
        camera_path: CameraPath | None,
        motion_bucket_id: float | None,
        vace_scale: Curve,
        vace_reference_image: Pictures | None,
        **pictures: Pictures | None,
    ) -> "VideoInputs":
        """The inputs from the arguments of a pipeline call; `pictures` are the fields of pictures, clips and masks.

        Raises:
            ValueError: an argument has the wrong type, or is out of range.
        """
        if camera_path is None and camera_control_direction is not None:
            check_choice("camera_control_direction", camera_control_direction, tuple(MOVES))
            if not isinstance(camera_control_speed, numbers.Real) or not math.isfinite(camera_control_speed):
                raise ValueError(f"camera_control_speed must be a finite number; got {camera_control_speed!r}.")
            origin = camera_control_origin
            if origin is not None and (isinstance(origin, str) or not isinstance(origin, (Sequence, np.ndarray))):
                raise ValueError(f"camera_control_origin must be a pose row of 19 numbers; got {origin!r}.")
            camera_path = CameraPath.from_direction(
                camera_control_direction, num_frames, float(camera_control_speed), origin
            )
        if camera_path is not None and not isinstance(camera_path, CameraPath):
            raise ValueError(f"camera_path must be a CameraPath; got {type(camera_path).__name__}.")
        present = {name: value for name, value in pictures.items() if value is not None}
        return cls(
            camera=camera_path,
            motion_bucket_id=motion_bucket_id,
            vace_scale=vace_scale,
            vace_reference_image=as_references(vace_reference_image, "vace_reference_image"),
            **{name: (as_masks if "mask" in name else as_frames)(value, name) for name, value in present.items()},
        )

    def names(self) -> tuple[str, ...]:
        """The names of the inputs that are not None; a mask counts with its video."""
        settings = ("vace_scale", "inpaint_mask")
        fields = (f.name for f in dataclasses.fields(self) if f.name not in settings)
        return tuple(name for name in fields if getattr(self, name) is not None)

    @property
    def uses_vace(self) -> bool:
        return any(v is not None for v in (self.vace_video, self.vace_video_mask, self.vace_reference_image))


def condition(
    cond: Conditioning,
    inputs: VideoInputs,
    variant: Variant,
    size: VideoSize,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with all `inputs`, in the form that models of `variant` take. The encoders are on their devices; that for
    images is used only if the model reads image tokens.

    Raises:
        ValueError: an input cannot be used; `variants.check` says beforehand which inputs a model takes.
    """
    start = inputs.input_image
    image_encoder = image_encoder if variant.reads_images else None
    if start is not None and not variant.slots:
        cond = clean_start_conditioning(cond, size, encoder, start, fit)
    elif start is not None and FIRST_FRAME in variant.slots:
        cond = first_frame_conditioning(cond, size, encoder, image_encoder, start, fit)
    elif any(v is not None for v in (start, inputs.end_image, inputs.inpaint_video, inputs.inpaint_mask)):
        pictures = {"start": start, "end": inputs.end_image, "video": inputs.inpaint_video, "mask": inputs.inpaint_mask}
        is_fun = CONTROL in variant.slots or "camera" in variant.accepts
        picture_fit = fit or (FUN_FIT if is_fun else None)
        cond = image_conditioning(cond, size, encoder, image_encoder, **pictures, fit=picture_fit)
    if inputs.control_video is not None:
        cond = control_conditioning(cond, size, encoder, inputs.control_video, fit)
    if inputs.reference_image is not None:
        cond = reference_conditioning(cond, size, encoder, image_encoder, inputs.reference_image, fit)
    if inputs.uses_vace:
        cond = vace_conditioning(
            cond,
            size,
            encoder,
            video=inputs.vace_video,
            mask=inputs.vace_video_mask,
            references=inputs.vace_reference_image or (),
            strength=inputs.vace_scale,
            fit=fit,
        )
    return numeric_conditioning(cond, inputs, size)


def numeric_conditioning(cond: Conditioning, inputs: VideoInputs, size: VideoSize) -> Conditioning:
    """`cond` with those of `inputs` that need no encoder: the camera path and the speed.

    Raises:
        ValueError: as `condition`.
    """
    if inputs.camera is not None:
        cond = camera_conditioning(cond, inputs.camera, size)
    if inputs.motion_bucket_id is not None:
        cond = speed_conditioning(cond, inputs.motion_bucket_id)
    return cond
