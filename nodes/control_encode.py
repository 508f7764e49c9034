"""Control video, start image and reference image to conditioning."""

from typing import Any

from torch import Tensor

from wan_core.budget.room import size_held
from wan_core.conditioning.control import control_conditioning, reference_conditioning
from wan_core.conditioning.encoders import Fit
from wan_core.conditioning.image import first_frame_conditioning
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE
from wan_core.types import Conditioning

from . import host, sockets
from .encoding import Encode, encoders, tile_settings


class ControlEncode(Encode):
    """Inputs of the Fun control and camera models."""

    DESCRIPTION = (
        "Give a Fun control model its control video (edges, depth, poses), a Fun control or camera model its start "
        "image, and a V1.1 control model its reference image."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": sockets.encode_inputs(),
            "optional": {
                "image_encoder": sockets.socket(sockets.IMAGE_ENCODER, "Needed for start and reference images."),
                "control_video": sockets.socket("IMAGE", "What steers the video, frame by frame."),
                "start_image": sockets.socket("IMAGE", "The first frame."),
                "reference_image": sockets.socket("IMAGE", "What the subject looks like (V1.1 control models)."),
                **sockets.encode_settings("stretch"),
            },
        }

    def encode(
        self,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        image_encoder: ImageEncoder | None = None,
        control_video: Tensor | None = None,
        start_image: Tensor | None = None,
        reference_image: Tensor | None = None,
        aspect: str = "stretch",
        too_short: str = "repeat last",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        if control_video is None and start_image is None and reference_image is None:
            raise ValueError("Connect a control video, a start image or a reference image.")
        size, fit = size_held(width, height, num_frames), Fit(aspect=aspect, length=too_short)
        cond = conditioning
        with encoders(vae, image_encoder, tile_settings(**tiles)) as encoder:
            if control_video is not None:
                cond = control_conditioning(cond, size, encoder, control_video, fit)
            if start_image is not None:
                cond = first_frame_conditioning(cond, size, encoder, image_encoder, start_image, fit)
            if reference_image is not None:
                cond = reference_conditioning(cond, size, encoder, image_encoder, reference_image, fit)
        return (cond.to(host.resting_device()),)
