"""Speed control: the adapter beside the model, the number in the conditioning."""

from typing import Any

from wan_core import catalog, prepare
from wan_core.conditioning.speed import FASTEST, SLOWEST, speed_conditioning
from wan_core.types import Conditioning

from . import host, sockets
from .loaders import Loader


class SpeedControl(Loader):
    """Load the adapter and set the speed of motion."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "apply"
    INPUT, KIND, FOLDER = "adapter", "motion_controller", "diffusion_models"
    PATTERN = catalog.MOTION_CONTROLLER_PATTERN
    ROWS = (catalog.SPEED_CONTROL, catalog.TINY)
    DESCRIPTION = "Control how fast things move, with the speed-control adapter for Wan 2.1 T2V 1.3B."
    RETURN_TYPES = (sockets.MODEL, sockets.CONDITIONING)
    RETURN_NAMES = ("model", "conditioning")
    OUTPUT_TOOLTIPS = ("The model with the adapter beside it.", "Conditioning with the speed.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        listed, shared = cls.shared_inputs("The speed-control adapter")
        speed = sockets.number(50.0, SLOWEST, FASTEST, "Larger is faster.", step=1.0)
        linked = {
            "model": sockets.socket(sockets.MODEL, "Wan 2.1 T2V 1.3B, from the model loader."),
            "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt."),
        }
        return {
            "required": {**linked, **listed, "motion_bucket_id": speed},
            "optional": {"download": shared["download"]},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, adapter: str, download: bool = False) -> bool | str:
        return cls.check(adapter, download)

    @classmethod
    def IS_CHANGED(cls, adapter: str, download: bool = False, **_: Any) -> str:
        return cls.fingerprint(adapter, download)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The bundled adapter."""
        return {"adapter": catalog.TINY, "download": False}

    def apply(
        self,
        model: prepare.VideoModel,
        conditioning: Conditioning,
        adapter: str,
        motion_bucket_id: float,
        download: bool = False,
    ) -> tuple[prepare.VideoModel, Conditioning]:
        component = self.component(adapter, download)
        controlled = prepare.with_speed_control(model, component, host.device())
        return controlled, speed_conditioning(conditioning, motion_bucket_id)
