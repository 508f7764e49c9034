"""A camera path as Plücker rays: for every pixel of every frame, where its line of sight runs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..runtime import log
from ..types import VAE_STRIDE, Conditioning, VideoSize
from .camera_path import CameraPath

RAY_CHANNELS = 6
"""Moment (origin x direction) and direction, three numbers each."""

POSE_ASPECT = 1280 / 720
"""Shape of the picture that a path's focal lengths belong to; VideoX-Fun fixes it for all pose files."""


def plucker_rays(path: CameraPath, width: int, height: int) -> Tensor:
    """Rays (T, H, W, 6) in float32 through the pixels' centres: moment, then direction.

    The world is the first camera. A picture of another shape than 1280 x 720 sees a part of the field of view, cut at
    the longer side, as in VideoX-Fun.

    Raises:
        ValueError: a side is below 1.
    """
    rays = torch.empty(path.num_frames, height, width, RAY_CHANNELS)
    for frame, values in zip(rays, _frames(path, width, height), strict=True):
        frame.copy_(values.permute(1, 2, 0))
    return rays


def camera_embedding(path: CameraPath, size: VideoSize, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rays as the DiT's camera adapter takes them: (1, 24, F, H, W) on the CPU.

    A path of another length is resampled to the video's, with a notice. As for the VAE, frame 0 fills the first latent
    frame alone, four times, and every further one holds four frames; channel 4 c + k is ray channel c of the k-th.
    """
    if path.num_frames != size.num_frames:
        log.warning("Stretching a camera path of %d frames over the video's %d.", path.num_frames, size.num_frames)
        path = path.resampled(size.num_frames)
    group = VAE_STRIDE[0]
    folded = torch.empty(RAY_CHANNELS, group, size.latent.frames, size.height, size.width, dtype=dtype)
    for index, values in enumerate(_frames(path, size.width, size.height)):
        if index == 0:
            folded[:, :, 0] = values[:, None]
        else:
            latent_frame, within = divmod(index + group - 1, group)
            folded[:, within, latent_frame] = values
    return folded.flatten(0, 1)[None]


def camera_conditioning(cond: Conditioning, path: CameraPath, size: VideoSize) -> Conditioning:
    """`cond` with the camera moving along `path` in a video of `size`.

    Raises:
        ValueError: `cond` was made for a video of another size.
    """
    return cond.given("camera", size=size, camera=camera_embedding(path, size))


def _frames(path: CameraPath, width: int, height: int) -> Iterator[Tensor]:
    """Rays (6, H, W) of one frame after another, in float32.

    With the pixel's direction d in the camera, a ray is (o x R d, R d): one 6 x 3 matrix per frame, applied to the
    directions, which stay the same as long as the lens does.
    """
    if min(width, height) < 1:
        raise ValueError(f"Rays need a picture of at least 1x1 pixels; got {width}x{height}.")
    lens = directions = None
    for pose, row_lens in zip(path.poses, path.lens, strict=True):
        if lens is None or directions is None or not torch.equal(lens, row_lens):
            lens, directions = row_lens, _directions(row_lens, width, height)
        rotation, origin = pose[:3, :3], pose[:3, 3:]
        moment = torch.linalg.cross(origin.expand(3, 3), rotation, dim=0)
        yield (torch.cat((moment, rotation)).float() @ directions).view(RAY_CHANNELS, height, width)


def _directions(lens: Tensor, width: int, height: int) -> Tensor:
    """Unit vectors (3, H * W) from the camera through the pixels' centres, in float32."""
    fx, fy, cx, cy = lens.tolist()[:4]
    if width / height < POSE_ASPECT:
        fx *= POSE_ASPECT * height / width
    else:
        fy *= width / POSE_ASPECT / height
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - cx * width) / (fx * width)
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - cy * height) / (fy * height)
    points = torch.stack((x.expand(height, -1), y[:, None].expand(-1, width), torch.ones(height, width)))
    return torch.nn.functional.normalize(points, dim=0).flatten(1).float()
