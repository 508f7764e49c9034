"""Pictures and videos: what their numbers mean, and their files.

`pixels` has the rule for values, `reader` opens what a user has, `writer` makes files.
"""

from .pixels import (
    FPS,
    Frames,
    PictureSequence,
    as_tensor,
    eight_bit,
    frames_to_pixels,
    frames_to_tensor,
    pixels_to_frames,
    pixels_to_images,
    to_colour,
    to_unit,
)
from .reader import (
    CLIP_SUFFIXES,
    PICTURE_SUFFIXES,
    Clip,
    MediaError,
    check_frame,
    frame_files,
    frames,
    load_video,
    open_container,
    pictures,
    probe,
    video_stream,
)
from .video_data import VideoData
from .writer import save_frames, save_video, write_video

__all__ = [
    "CLIP_SUFFIXES",
    "FPS",
    "PICTURE_SUFFIXES",
    "Clip",
    "Frames",
    "MediaError",
    "PictureSequence",
    "VideoData",
    "as_tensor",
    "check_frame",
    "eight_bit",
    "frame_files",
    "frames",
    "frames_to_pixels",
    "frames_to_tensor",
    "load_video",
    "open_container",
    "pictures",
    "pixels_to_frames",
    "pixels_to_images",
    "probe",
    "save_frames",
    "save_video",
    "to_colour",
    "to_unit",
    "video_stream",
    "write_video",
]
