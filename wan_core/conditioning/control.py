"""Control video and reference image of the Fun control models."""

from torch import Tensor

from ..models.image_encoder import ImageEncoder
from ..types import Conditioning, VideoSize
from ..variants import CONTROL
from .encoders import FUN_FIT, Fit, LatentEncoder, image_tokens


def control_conditioning(
    cond: Conditioning, size: VideoSize, encoder: LatentEncoder, video: Tensor, fit: Fit | None = None
) -> Conditioning:
    """`cond` with a control video (T, H, W, 3) in [0, 1]: edges, depth, poses and the like, encoded like any video."""
    latents = encoder.frames((fit or FUN_FIT).clip(video, size, "control_video"))
    return cond.given("control_video", size=size, slots={**(cond.slots or {}), CONTROL.name: latents})


def reference_conditioning(
    cond: Conditioning,
    size: VideoSize,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    reference: Tensor,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with the reference image (T, H, W, 3) of V1.1 control models; its tokens take the place of a start
    image's.

    Raises:
        ValueError: the image encoder is missing.
    """
    if image_encoder is None:
        raise ValueError("A reference image needs the CLIP image encoder; load it (open-clip XLM-RoBERTa ViT-H/14).")
    latents = encoder.frames((fit or FUN_FIT).picture(reference, size))
    return cond.given(
        "reference_image", size=size, reference=latents[:, :, 0], clip=image_tokens(image_encoder, reference)
    )
