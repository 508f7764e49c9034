"""A drawing of a camera path, to see a move before a video is made."""

from collections.abc import Callable
from itertools import pairwise

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from .camera import CameraPath

CAMERAS = 6
"""How many cameras along the path are drawn."""

VIEWS = {"from above": (0, 2, 1), "from behind": (0, 1, -1), "from the side": (2, 1, -1)}
"""Per view: the axis that points right, the axis that points up, and its sign (y points down)."""

SMALLEST = 96
"""The shortest side, in pixels, that shows four panels clearly."""

BACKGROUND, GRID, TEXT = "#1d1f23", "#3a3d44", "#c9ccd3"
START, END = "#43c46b", "#f0743e"

SAMPLES = 2
"""Drawn this many times larger and scaled down, which smooths the lines."""

Point = tuple[float, float]


def trajectory_picture(path: CameraPath, width: int = 512, height: int = 512) -> Image.Image:
    """The path from above, from behind and from the side, at one scale, with cameras along it.

    Every camera is a pyramid from the eye to what it sees, from green at the start to orange at the end. The fourth
    panel says the number of frames, the distance and the rotation.

    Raises:
        ValueError: a side is below 96 pixels.
    """
    if min(width, height) < SMALLEST:
        raise ValueError(f"The picture of a camera path needs sides of at least {SMALLEST}; got {width}x{height}.")
    picture = Image.new("RGB", (width * SAMPLES, height * SAMPLES), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    half_width, half_height = picture.width / 2, picture.height / 2
    unit = min(half_width, half_height) / 128
    font = ImageFont.load_default(9 * unit)
    eyes, shown, pyramids = _shapes(path)
    points = torch.cat((eyes, pyramids.flatten(0, 1)))
    low, high = points.amin(0), points.amax(0)
    scale = 0.76 * min(half_width, half_height) / (high - low).max().item()
    for number, (title, view) in enumerate(VIEWS.items()):
        left, top = number % 2 * half_width, number // 2 * half_height
        centre = (left + half_width / 2, top + half_height / 2 + 6 * unit)
        draw.rectangle((left, top, left + half_width, top + half_height), outline=GRID, width=SAMPLES)
        draw.text((left + 6 * unit, top + 4 * unit), title, TEXT, font)
        _draw_view(draw, _projection(view, scale, (low + high) / 2, centre), eyes, shown, pyramids, unit)
    draw.multiline_text((half_width + 12 * unit, half_height + 14 * unit), _caption(path), TEXT, font, spacing=5 * unit)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _projection(
    view: tuple[int, int, int], scale: float, middle: Tensor, centre: Point
) -> Callable[[Tensor], list[Point]]:
    """A function from points (N, 3) to picture coordinates; `middle` is drawn at `centre`."""
    right, up, sign = view

    def project(points: Tensor) -> list[Point]:
        offsets = scale * (points - middle)
        return [(centre[0] + o[right], centre[1] - sign * o[up]) for o in offsets.tolist()]

    return project


def _shapes(path: CameraPath) -> tuple[Tensor, list[int], Tensor]:
    """Eyes (T, 3), the frames whose cameras are drawn, and those cameras' pyramids (N, 5, 3): eye and four corners."""
    poses, lens = path.poses, path.lens
    eyes = poses[:, :3, 3]
    shown = sorted(set(torch.linspace(0, path.num_frames - 1, CAMERAS).round().int().tolist()))
    way = (eyes.amax(0) - eyes.amin(0)).max().item()
    corners = torch.tensor(((0, 0), (1, 0), (1, 1), (0, 1)), dtype=torch.float64)
    sides = (corners - lens[shown, None, 2:4]) / lens[shown, None, 0:2]
    rays = torch.cat((sides, torch.ones_like(sides[..., :1])), -1)
    depth = (0.22 * way if way > 1e-9 else 1) / rays.abs().amax()
    seen = depth * rays @ poses[shown, :3, :3].mT + eyes[shown, None]
    return eyes, shown, torch.cat((eyes[shown, None], seen), 1)


def _draw_view(
    draw: ImageDraw.ImageDraw,
    project: Callable[[Tensor], list[Point]],
    eyes: Tensor,
    shown: list[int],
    pyramids: Tensor,
    unit: float,
) -> None:
    last = max(len(eyes) - 1, 1)
    track = project(eyes)
    for index, line in enumerate(pairwise(track)):
        draw.line(line, _colour(index / last), round(2 * unit))
    for frame, pyramid in zip(shown, pyramids, strict=True):
        eye, *corners = project(pyramid)
        colour = _colour(frame / last)
        for corner in corners:
            draw.line((eye, corner), colour, round(unit / 2))
        draw.line((*corners, corners[0]), colour, round(unit / 2))
        # The upper edge of the camera's picture is thicker, which shows a roll.
        draw.line(corners[:2], colour, round(2 * unit))
    for (x, y), fill, radius in ((track[0], START, 4 * unit), (track[-1], END, 2.5 * unit)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill, BACKGROUND, round(unit / 2))


def _colour(fraction: float) -> tuple[int, ...]:
    pairs = zip(ImageColor.getrgb(START), ImageColor.getrgb(END), strict=True)
    return tuple(round(start + fraction * (end - start)) for start, end in pairs)


def _caption(path: CameraPath) -> str:
    eyes, rotation = path.poses[:, :3, 3], path.poses[-1, :3, :3]
    way = torch.linalg.vector_norm(eyes.diff(dim=0), dim=1).sum().item()
    x, y, z = eyes[-1].tolist()
    turn = torch.rad2deg(((rotation.trace() - 1) / 2).clamp(-1, 1).acos()).item()
    lines = (
        f"{path.num_frames} frames",
        f"way {way:.2f}",
        f"right {x:+.2f}, down {y:+.2f},",
        f"forward {z:+.2f}",
        "rays sheared" if path.sheared else f"turn {turn:.0f}°",
        "green: start, orange: end",
    )
    return "\n".join(lines)
