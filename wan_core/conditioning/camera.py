"""Camera paths from named moves, pose rows and pose files, and the Plücker rays of their pixels."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_text
from ..models.config import RAY_CHANNELS
from ..runtime import log
from ..types import Conditioning, VideoSize
from .pose_rows import DEFAULT_ORIGIN, LENS, MATRIX, PoseRow, check_row, pose_row, rows_from_text

DEFAULT_SPEED = 1 / 54
"""Distance per frame of VideoX-Fun's trajectory files."""

TURN = 2 * math.pi / 9
"""Radians of roll per unit of speed: a third of pi over 81 frames at the default speed, as in VideoX-Fun."""

MOVES = {
    "None": (0, 0, 0, 0),
    "Left": (1, 0, 0, 0),
    "Right": (-1, 0, 0, 0),
    "Up": (0, 1, 0, 0),
    "Down": (0, -1, 0, 0),
    "LeftUp": (1, 1, 0, 0),
    "LeftDown": (1, -1, 0, 0),
    "RightUp": (-1, 1, 0, 0),
    "RightDown": (-1, -1, 0, 0),
    "In": (0, 0, -2, 0),
    "Out": (0, 0, 2, 0),
    "CW": (0, 0, 0, TURN),
    "ACW": (0, 0, 0, -TURN),
}
"""What a move adds per frame, in units of speed: to the translation (x, y, z) of world-to-camera, and to the roll.

The signs are those of world-to-camera: the camera itself moves the other way. "None" stands still.
"""

MODES = ("official", "diffsynth")
"""official: the trajectories of VideoX-Fun, which the checkpoints were trained on. diffsynth: what DiffSynth-Studio
makes of the same names, for LoRAs trained with it: Left, Right, Up and Down add to the third column of the matrix
instead of the fourth, which tilts the rays, and In and Out go half as far.
"""


@dataclass(frozen=True)
class CameraPath:
    """A camera's pose in every pixel frame, as `rows` of 19 numbers. Frozen; functions return another path.

    With `sheared` the matrices need not be rotations, as in the mode "diffsynth".

    Raises:
        ValueError: there is no row, or `pose_rows.check_row` refuses one; the message names the row.
    """

    rows: tuple[PoseRow, ...]
    sheared: bool = False

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("A camera path needs at least one pose row; got none.")
        for number, row in enumerate(self.rows, 1):
            check_row(row, f"Row {number} of the camera path", rotated=not self.sheared)

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[float]]) -> "CameraPath":
        """The path of these rows of 19 numbers, one per pixel frame; the frame numbers in them are ignored.

        Raises:
            ValueError: as the class; or a row holds something that is not a number.
        """
        return cls(tuple(pose_row(row, f"Row {number} of the camera path") for number, row in enumerate(rows, 1)))

    @classmethod
    def from_text(cls, text: str) -> "CameraPath":
        """The rows of a text, as `pose_rows.rows_from_text` reads them.

        Raises:
            ValueError: there is no row, or a line is not one; the message names the line.
        """
        return cls(tuple(rows_from_text(text, "The pose text")))

    @classmethod
    def from_file(cls, path: str | Path) -> "CameraPath":
        """The rows of a pose file, as `pose_rows.rows_from_text` reads them.

        Raises:
            ValueError: there is no such text file or no row in it, or a line is not one; the message names the file
                and the line.
        """
        text = read_text(Path(path))
        return cls(tuple(rows_from_text(text, f"The pose file {path}")))

    @classmethod
    def from_direction(
        cls,
        direction: str,
        num_frames: int,
        speed: float = DEFAULT_SPEED,
        origin: Sequence[float] | None = None,
        mode: str = "official",
    ) -> "CameraPath":
        """One of the named `MOVES`, from the pose `origin` along the camera's own axes.

        Args:
            direction: a key of `MOVES`.
            num_frames: poses; the first is `origin`, so that the move takes `num_frames - 1` steps.
            speed: distance per frame; In and Out go twice as far, CW and ACW turn by `TURN` times as many radians.
                A negative speed goes the other way.
            origin: a pose row; None is VideoX-Fun's camera at rest.
            mode: one of `MODES`.

        Raises:
            ValueError: an argument is invalid; the message names it.
        """
        _check_move(direction, num_frames, speed, mode)
        start = pose_row(DEFAULT_ORIGIN if origin is None else origin, "The camera's origin")
        check_row(start, "The camera's origin")
        x, y, z, roll = MOVES[direction]
        steps = torch.arange(num_frames, dtype=torch.float64) * speed
        lens = torch.tensor(start[LENS], dtype=torch.float64).expand(num_frames, -1)
        matrix = torch.tensor(start[MATRIX], dtype=torch.float64).view(3, 4)
        if mode == "diffsynth":
            change = torch.zeros(num_frames, 3, 4, dtype=torch.float64)
            change[:, 0, 2], change[:, 1, 2], change[:, 2, 3] = x * steps, y * steps, z / 2 * steps
            return cls._of(lens, matrix + change, sheared=True)
        # World-to-camera of a camera that moves from the origin; the start pose is applied first.
        motion = torch.zeros(num_frames, 3, 4, dtype=torch.float64)
        cosine, sine = (roll * steps).cos(), (roll * steps).sin()
        motion[:, 0, 0], motion[:, 0, 1], motion[:, 1, 0], motion[:, 1, 1] = cosine, sine, -sine, cosine
        motion[:, 2, 2] = 1
        motion[:, 0, 3], motion[:, 1, 3], motion[:, 2, 3] = x * steps, y * steps, z * steps
        return cls._of(lens, motion @ _square(matrix[None]))

    @property
    def num_frames(self) -> int:
        return len(self.rows)

    @property
    def lens(self) -> Tensor:
        """(T, 6) float64: fx, fy, cx, cy in fractions of the picture, and two zeros."""
        return torch.tensor([row[LENS] for row in self.rows], dtype=torch.float64)

    @property
    def world_to_camera(self) -> Tensor:
        """(T, 4, 4), float64."""
        return _square(torch.tensor([row[MATRIX] for row in self.rows], dtype=torch.float64).view(-1, 3, 4))

    @property
    def poses(self) -> Tensor:
        """Camera-to-world (T, 4, 4) in float64; the world is the first camera, whose pose is the identity."""
        matrices = self.world_to_camera
        poses = matrices[:1] @ torch.linalg.inv(matrices)
        poses[0] = torch.eye(4, dtype=torch.float64)
        return poses

    def then(self, other: "CameraPath") -> "CameraPath":
        """This path followed by the motion of `other`, which begins at this path's last pose.

        The last frame of this path is the first of `other`: paths of n and m frames make one of n + m - 1. Each part
        keeps its lens.
        """
        first, second = self.world_to_camera, other.world_to_camera
        motion = second[1:] @ torch.linalg.inv(second[:1]) @ first[-1:]
        lens = torch.cat((self.lens, other.lens[1:]))
        return self._of(lens, torch.cat((first, motion))[:, :3], self.sheared or other.sheared)

    def resampled(self, num_frames: int) -> "CameraPath":
        """The same motion in `num_frames` frames, slower or faster.

        Between two poses, position and lens are interpolated linearly and the rotation along the shorter arc; of
        sheared paths all entries of the matrix are interpolated linearly. A path of one pose stands still.

        Raises:
            ValueError: `num_frames` is not a whole number of at least 1.
        """
        _check_whole("num_frames", num_frames)
        if num_frames == self.num_frames:
            return self
        place = torch.linspace(0, self.num_frames - 1, num_frames, dtype=torch.float64)
        low = place.long()
        high = (low + 1).clamp(max=self.num_frames - 1)
        weight = place - low

        def between(values: Tensor) -> Tensor:
            return values[low].lerp(values[high], weight.view(-1, *[1] * (values.ndim - 1)))

        lens, matrices = between(self.lens), self.world_to_camera
        if self.sheared:
            return self._of(lens, between(matrices)[:, :3], sheared=True)
        poses = torch.linalg.inv(matrices)
        rotation = _slerp(poses[low, :3, :3], poses[high, :3, :3], weight).mT
        return self._of(lens, torch.cat((rotation, -rotation @ between(poses[:, :3, 3:])), -1))

    @classmethod
    def _of(cls, lens: Tensor, matrices: Tensor, sheared: bool = False) -> "CameraPath":
        """The path of lenses (T, 6) and world-to-camera matrices (T, 3, 4)."""
        frames = torch.arange(len(matrices), dtype=torch.float64)[:, None]
        rows = torch.cat((frames, lens, matrices.flatten(1)), 1).tolist()
        return cls(tuple(map(tuple, rows)), sheared)


def _square(matrices: Tensor) -> Tensor:
    """(T, 3, 4) with the last row (0, 0, 0, 1) added."""
    last = matrices.new_tensor((0, 0, 0, 1)).expand(len(matrices), 1, 4)
    return torch.cat((matrices, last), 1)


def _check_whole(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")


def _check_move(direction: str, num_frames: int, speed: float, mode: str) -> None:
    if direction not in MOVES:
        raise ValueError(f"There is no camera direction {direction!r}; choose one of {', '.join(MOVES)}.")
    if mode not in MODES:
        raise ValueError(f"There is no camera mode {mode!r}; choose one of {', '.join(MODES)}.")
    if mode == "diffsynth" and MOVES[direction][3]:
        raise ValueError(f"DiffSynth-Studio has no camera direction {direction}; choose the mode official for it.")
    _check_whole("num_frames", num_frames)
    if not isinstance(speed, (int, float)) or not math.isfinite(speed):
        raise ValueError(f"The camera's speed must be a finite number; got {speed!r}.")


def _slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Rotation matrices (N, 3, 3) at `weight` (N,) of the way from `first` to `second`, along the shorter arc."""
    from scipy.spatial.transform import Rotation  # here, because it takes a third of a second to import

    start, end = Rotation.from_matrix(first.numpy()), Rotation.from_matrix(second.numpy())
    turn = (start.inv() * end).as_rotvec()
    return torch.from_numpy((start * Rotation.from_rotvec(weight.numpy()[:, None] * turn)).as_matrix())


POSE_ASPECT = 1280 / 720
"""Aspect ratio of the picture that a path's focal lengths belong to, the same for all pose files of VideoX-Fun."""


def plucker_rays(path: CameraPath, width: int, height: int) -> Tensor:
    """Rays (T, H, W, 6) in float32 through the pixels' centres: moment, then direction.

    World coordinates are those of the first camera. A picture of another aspect ratio than 1280 x 720 shows a crop of
    the field of view, as in VideoX-Fun.

    Raises:
        ValueError: a side is below 1.
    """
    rays = torch.empty(path.num_frames, height, width, RAY_CHANNELS)
    for frame, values in zip(rays, _frames(path, width, height), strict=True):
        frame.copy_(values.permute(1, 2, 0))
    return rays


def camera_embedding(path: CameraPath, size: VideoSize, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rays as the DiT's camera adapter takes them: (1, 24, F, H, W) on the CPU.

    A path of another length is resampled to the video's, with a warning. As for the VAE, the first latent frame holds
    frame 0 alone, repeated four times, and every other one holds four frames; channel 4 c + k is ray channel c of the
    k-th frame.
    """
    if path.num_frames != size.num_frames:
        log.info("Stretching a camera path of %d frames over the video's %d.", path.num_frames, size.num_frames)
        path = path.resampled(size.num_frames)
    group = size.geometry.temporal_stride
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
    return cond.with_inputs("camera", size=size, camera=camera_embedding(path, size))


def _frames(path: CameraPath, width: int, height: int) -> Iterator[Tensor]:
    """Rays (6, H, W) of one frame after another, in float32.

    With camera position o, rotation R and a pixel's direction d in camera coordinates, its ray is (o x R d, R d): one
    6 x 3 matrix per frame, applied to directions that are computed once per lens.
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
