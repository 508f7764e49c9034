"""Start image, end image, and a video with a mask to conditioning."""

from typing import Any

from torch import Tensor

from wan_core.budget.room import size_held
from wan_core.conditioning.encoders import Fit
from wan_core.conditioning.image import image_conditioning
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE
from wan_core.types import Conditioning

from . import host, sockets
from .encoding import Encode, encoders, tile_settings


class ImageEncode(Encode):
    """What is known of the video: its first and last frame, or all but a masked part."""

    DESCRIPTION = (
        "Give an image-to-video, first-last-frame or Fun InP model its pictures: a start image, an end image, or a "
        "video and a mask of what to draw anew."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": sockets.encode_inputs(),
            "optional": {
                "image_encoder": sockets.socket(sockets.IMAGE_ENCODER, "Needed for start and end images."),
                "start_image": sockets.socket("IMAGE", "The first frame."),
                "end_image": sockets.socket("IMAGE", "The last frame."),
                "video": sockets.socket("IMAGE", "A video to change in part."),
                "mask": sockets.socket("MASK", "White where the video is drawn anew; one mask or one per frame."),
                **sockets.encode_settings(),
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
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        video: Tensor | None = None,
        mask: Tensor | None = None,
        aspect: str = "crop",
        too_short: str = "repeat last",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        size = size_held(width, height, num_frames)
        pictures = {"start": start_image, "end": end_image, "video": video, "mask": mask}
        with encoders(vae, image_encoder, tile_settings(**tiles)) as encoder:
            cond = image_conditioning(
                conditioning, size, encoder, image_encoder, **pictures, fit=Fit(aspect=aspect, length=too_short)
            )
        return (cond.to(host.resting_device()),)
