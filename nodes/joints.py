"""Decoded clips as one film, and how well they fit together."""

from typing import Any

import torch
from torch import Tensor

from wan_core.atomic import creating_first, numbered_paths
from wan_core.drift import clip_starts, draw_drift, measure_drift
from wan_core.media import frames_to_tensor
from wan_core.media.fitting import fit_size
from wan_core.runtime import log

from . import host, sockets


class JoinClips:
    """Decoded clips as one film."""

    CATEGORY = "WanCore/long video"
    FUNCTION = "join"
    DESCRIPTION = "Join clips, or a film and the clips that continue it, without the frames that they share."
    RETURN_TYPES = ("IMAGE", "INT", "INT")
    RETURN_NAMES = ("images", "first_frames", "new_frames")
    OUTPUT_TOOLTIPS = (
        "The film.",
        "How many frames come before the first joint, for Drift Meter.",
        "New frames of each clip after Segments, for Drift Meter.",
    )
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        shared = "First frames of each clip that the one before ends with: 1 after Segments, kept_frames after Extend."
        return {
            "required": {
                "images": sockets.socket("IMAGE", "The clips, such as those of Segments."),
                "shared_frames": sockets.whole(1, 0, 10001, shared),
            },
            "optional": {"film": sockets.socket("IMAGE", "What comes before them: the film that Extend continues.")},
        }

    def join(
        self, images: list[Tensor], shared_frames: list[int], film: list[Tensor] | None = None
    ) -> tuple[Tensor, int, int]:
        height, width = images[0].shape[1:3]
        before = [fit_size(part, width, height, "crop") for part in film or ()]
        parts = [*before, *(clip[shared_frames[0] if number or before else 0 :] for number, clip in enumerate(images))]
        return torch.cat(parts), len(parts[0]), len(parts[-1])


class DriftMeter:
    """What changes over a film that should not."""

    CATEGORY = "WanCore/long video"
    FUNCTION = "measure"
    DESCRIPTION = "Draw colour, sharpness and motion over the frames of a film, and how visible its joints are."
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("chart", "report")
    OUTPUT_TOOLTIPS = ("The chart, which the node shows too.", "A line for each clip and each joint.")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        first = "How many frames come before the first joint: from Join Clips. 0: as clip_frames."
        return {
            "required": {
                "images": sockets.socket("IMAGE", "The film."),
                "clip_frames": sockets.whole(76, 0, 100000, "New frames of each clip; 0: the film is one clip."),
            },
            "optional": {"first_frames": sockets.whole(0, 0, 1000000, first)},
        }

    def measure(self, images: Tensor, clip_frames: int, first_frames: int = 0) -> dict[str, Any]:
        drift = measure_drift(images, clip_starts(len(images), first_frames or clip_frames, clip_frames))
        picture = draw_drift(drift)
        log.info("%s", drift.report)
        with creating_first(numbered_paths(host.current.temp_dir(), "wancore_drift", ".png")) as file:
            picture.save(file.partial, "PNG")
        shown = {"filename": file.path.name, "subfolder": "", "type": "temp"}
        return {
            "ui": {"images": [shown], "text": [drift.report]},
            "result": (frames_to_tensor([picture]), drift.report),
        }
