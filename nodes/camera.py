"""Camera moves and speed to conditioning."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from wan_core import catalog
from wan_core.checks import check_choice
from wan_core.conditioning.camera import DEFAULT_SPEED, MODES, MOVES, CameraPath, camera_conditioning
from wan_core.conditioning.camera_picture import trajectory_picture
from wan_core.conditioning.inputs import FASTEST, SLOWEST, speed_conditioning
from wan_core.conditioning.pose_rows import origin_from_text
from wan_core.media import frames_to_tensor
from wan_core.model import VideoModel
from wan_core.model_files import with_speed_control
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.planning.encoders import checked_size
from wan_core.types import Conditioning, VideoSize
from wan_core.variants import SPEED

from . import host, places, planning, sockets
from .loaders import Loader

NO_FILE = "None"


class _Path:
    """The base of the nodes that make a camera path: their outputs, and the path that they continue."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "build"
    RETURN_TYPES = (sockets.CAMERA_PATH, "IMAGE")
    RETURN_NAMES = ("camera_path", "picture")
    OUTPUT_TOOLTIPS = (
        "The pose of the camera in every frame, for Camera Encode or for the next move.",
        "The path seen from above, behind and the side.",
    )
    PREVIOUS = sockets.socket(sockets.CAMERA_PATH, "An earlier path; this one starts at its last pose.")

    @staticmethod
    def outputs(path: CameraPath, previous: CameraPath | None) -> tuple[CameraPath, Tensor]:
        whole = previous.then(path) if previous else path
        return whole, frames_to_tensor([trajectory_picture(whole)])


class MovePath(_Path):
    """A named move of the camera."""

    DESCRIPTION = "Move the camera in one direction. Chain several for a longer path."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "direction": sockets.choice(
                    list(MOVES), "Left", "The direction of the camera; CW and ACW roll it. None keeps it still."
                ),
                "speed": (
                    "FLOAT",
                    {
                        "default": DEFAULT_SPEED,
                        "min": -10.0,
                        "max": 10.0,
                        "step": 0.001,
                        "round": False,
                        "tooltip": "Distance per frame; the models were trained with 1/54. Negative: the opposite "
                        "direction.",
                    },
                ),
                "num_frames": sockets.whole(
                    81, 1, 10001, "Length of this move; the whole path is stretched over the video.", step=4
                ),
            },
            "optional": {
                "previous": cls.PREVIOUS,
                "origin": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "First pose as 19 numbers: frame, fx, fy, cx, cy, 0, 0, world-to-camera 3 x 4. "
                        "Empty: the camera that the models were trained with.",
                    },
                ),
                "mode": sockets.choice(
                    list(MODES),
                    "official",
                    "official: as VideoX-Fun. diffsynth: as DiffSynth-Studio, for LoRAs that were trained with it.",
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, direction: str | None = None, mode: str | None = None, origin: str | None = None
    ) -> bool | str:
        return sockets.true_or_message(
            lambda: _move(direction or "None", 1, DEFAULT_SPEED, origin or "", mode or MODES[0])
        )

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The length of every node's tiny form."""
        return {"num_frames": host.TINY_SIZE["num_frames"]}

    def build(
        self,
        direction: str,
        speed: float,
        num_frames: int,
        previous: CameraPath | None = None,
        origin: str = "",
        mode: str = MODES[0],
    ) -> tuple[CameraPath, Tensor]:
        return self.outputs(_move(direction, num_frames, speed, origin, mode), previous)


class RowsPath(_Path):
    """A path from pose rows, pasted or in a file."""

    DESCRIPTION = "Read a camera path: 19 numbers per frame, as in the pose files of VideoX-Fun and RealEstate10K."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = [NO_FILE, *places.list_input_files((".txt",))]
        tooltip = "A pose file in the input folder; leave poses empty then."
        return {
            "required": {
                "poses": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "One line per frame: frame, fx, fy, cx, cy, 0, 0, world-to-camera 3 x 4.",
                    },
                ),
            },
            "optional": {
                "file": (files, {"default": NO_FILE, "tooltip": tooltip, "file_upload": True}),
                "previous": cls.PREVIOUS,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, poses: str | None = None, file: str | None = NO_FILE) -> bool | str:
        return True if poses is None or file is None else sockets.true_or_message(lambda: _rows(poses, file))

    @classmethod
    def IS_CHANGED(cls, poses: str | None = None, file: str | None = NO_FILE, **_: Any) -> str:
        try:
            path = _file(file)
        except ValueError as error:
            return str(error)
        return f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" if path else ""

    def build(self, poses: str, file: str = NO_FILE, previous: CameraPath | None = None) -> tuple[CameraPath, Tensor]:
        return self.outputs(_rows(poses, file), previous)


class CameraEncode:
    """A camera path to Plücker rays, the input of a camera checkpoint."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "encode"
    DESCRIPTION = "Give a camera path to a Control-Camera model. It also needs a start image."
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The conditioning with the camera's path, for the sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt."),
                "camera_path": sockets.socket(
                    sockets.CAMERA_PATH, "A path of another length is stretched over the video."
                ),
                **sockets.size_inputs(),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return dict(host.TINY_SIZE)

    @classmethod
    def plan_outputs(
        cls, conditioning: Any, width: int, height: int, num_frames: int, **_: Any
    ) -> tuple[planning.PlannedConditioning]:
        before = planning.require(planning.PlannedConditioning, "conditioning", conditioning)
        size = VideoSize.rounded(width, height, num_frames, before.size.geometry if before.size else DEFAULT_GEOMETRY)
        return (before.with_inputs(["camera"], size, camera=True),)

    def encode(
        self, conditioning: Conditioning, camera_path: CameraPath, width: int, height: int, num_frames: int
    ) -> tuple[Conditioning]:
        known = conditioning.size
        size = checked_size(width, height, num_frames, known.geometry if known else DEFAULT_GEOMETRY)
        cond = camera_conditioning(conditioning, camera_path, size)
        # Without a picture nothing says which latents the video will have.
        return (cond if known else replace(cond, size=None),)


def _move(direction: str, num_frames: int, speed: float, origin: str, mode: str) -> CameraPath:
    check_choice("direction", direction, tuple(MOVES))
    check_choice("mode", mode, tuple(MODES))
    return CameraPath.from_direction(direction, num_frames, speed, origin_from_text(origin), mode)


def _file(name: str | None) -> Path | None:
    return None if name in (None, "", NO_FILE) else places.input_file(name)


def _rows(poses: str, file: str) -> CameraPath:
    path = _file(file)
    if path and poses.strip():
        raise ValueError(f"Give poses or a pose file, not both: clear the text, or set file to {NO_FILE}.")
    if path:
        return CameraPath.from_file(path)
    if not poses.strip():
        raise ValueError("A camera path needs pose rows: paste them into poses, or choose a file.")
    return CameraPath.from_text(poses)


class SpeedControl(Loader):
    """Load the adapter and set the speed of motion."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "apply"
    INPUT, KIND, FOLDER = "adapter", "motion_controller", "diffusion_models"
    ROWS = dict.fromkeys((catalog.SPEED_CONTROL, catalog.TINY), (catalog.MOTION_CONTROLLER_PATTERN,))
    SIZES: ClassVar[Mapping[str, str]] = {catalog.SPEED_CONTROL: "0.1 GB"}
    DESCRIPTION = "Control how fast things move, with the speed-control adapter for Wan 2.1 T2V 1.3B."
    RETURN_TYPES = (sockets.MODEL, sockets.CONDITIONING)
    RETURN_NAMES = ("model", "conditioning")
    OUTPUT_TOOLTIPS = ("The model with the adapter.", "Conditioning with the speed.")

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
    def VALIDATE_INPUTS(cls, adapter: str) -> bool | str:
        return cls.check(adapter, True)

    @classmethod
    def CHECK_INPUTS(cls, adapter: str, download: bool = False) -> bool | str:
        return cls.check(adapter, download)

    @classmethod
    def IS_CHANGED(cls, adapter: str, download: bool = False, **_: Any) -> str:
        return cls.fingerprint(adapter, download)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The bundled adapter."""
        return {"adapter": catalog.TINY, "download": False}

    @classmethod
    def plan_outputs(
        cls, model: Any, conditioning: Any, adapter: str, **_: Any
    ) -> tuple[planning.PlannedModel, planning.PlannedConditioning]:
        handle = planning.require(planning.PlannedModel, "model", model)
        cond = planning.require(planning.PlannedConditioning, "conditioning", conditioning)
        ((component, absent),) = cls.describe(adapter)
        controller = planning.plan_module(component, absent)
        return replace(handle, motion_controller=controller), replace(cond, names=(*cond.names, SPEED))

    def apply(
        self,
        model: VideoModel,
        conditioning: Conditioning,
        adapter: str,
        motion_bucket_id: float,
        download: bool = False,
    ) -> tuple[VideoModel, Conditioning]:
        component = self.component(adapter, download)
        controlled = with_speed_control(model, component, host.current.device())
        return controlled, speed_conditioning(conditioning, motion_bucket_id)
