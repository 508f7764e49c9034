"""VACE inputs to conditioning."""

from typing import Any

from torch import Tensor

from wan_core.budget.room import size_held
from wan_core.conditioning.encoders import Fit
from wan_core.conditioning.vace import vace_conditioning
from wan_core.models.vae import WanVAE
from wan_core.types import Conditioning, Curve

from . import host, sockets
from .encoding import Encode, encoders, tile_settings


class VaceReferences:
    """Reference images of different sizes, one batch after the other."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "collect"
    DESCRIPTION = "Collect reference images of different sizes for VACE Encode; chain as many as needed."
    RETURN_TYPES = (sockets.REFERENCES,)
    RETURN_NAMES = ("references",)
    OUTPUT_TOOLTIPS = ("All references so far.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": sockets.socket("IMAGE", "Each image becomes a reference of its own.")},
            "optional": {"references": sockets.socket(sockets.REFERENCES, "References that come before these.")},
        }

    def collect(self, images: Tensor, references: tuple[Tensor, ...] = ()) -> tuple[tuple[Tensor, ...]]:
        return ((*references, images),)


class VaceEncode(Encode):
    """One VACE input; several are chained."""

    DESCRIPTION = (
        "Give a VACE model a source video, a mask of what to draw, and reference images. Chain several for several "
        "inputs; reference frames are trimmed by the sampler."
    )
    OUTPUT_TOOLTIPS = ("The conditioning with one more VACE input.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        part = "Fraction of the steps"
        return {
            "required": {
                **sockets.encode_inputs(),
                "strength": sockets.number(1.0, 0.0, 10.0, "How strongly this input counts.", step=0.05),
            },
            "optional": {
                "start": sockets.number(0.0, 0.0, 1.0, f"{part} from which on the input counts.", step=0.01),
                "end": sockets.number(1.0, 0.0, 1.0, f"{part} up to which the input counts.", step=0.01),
                "end_strength": sockets.number(
                    -1.0,
                    -1.0,
                    10.0,
                    "Strength at the end; it changes evenly from strength. -1 keeps strength.",
                    step=0.05,
                ),
                "video": sockets.socket("IMAGE", "The source: a video to change, or depth, poses, edges and the like."),
                "mask": sockets.socket("MASK", "White where the model draws; all white when absent."),
                "reference_images": sockets.socket("IMAGE", "Pictures of what appears; each is fitted on white."),
                "references": sockets.socket(sockets.REFERENCES, "More references, of other sizes."),
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
        strength: float,
        start: float = 0.0,
        end: float = 1.0,
        end_strength: float = -1.0,
        video: Tensor | None = None,
        mask: Tensor | None = None,
        reference_images: Tensor | None = None,
        references: tuple[Tensor, ...] = (),
        aspect: str = "crop",
        too_short: str = "repeat last",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        size = size_held(width, height, num_frames)
        curve = Curve((strength,) if end_strength < 0 else (strength, end_strength), start, end)
        pictures = references if reference_images is None else (reference_images, *references)
        with encoders(vae, None, tile_settings(**tiles)) as encoder:
            cond = vace_conditioning(
                conditioning,
                size,
                encoder,
                video=video,
                mask=mask,
                references=pictures,
                strength=curve,
                fit=Fit(aspect=aspect, length=too_short),
            )
        return (cond.to(host.resting_device()),)
