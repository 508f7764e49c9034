"""What a clip of the drawn world shows, by measurement: to test whether a model follows what it is asked for.

`measure` reads colour, shape, ground, motion, speed and the camera's motion from the pixels alone. It takes any clip,
and gives None for what is not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .synthetic import COLOURS, GROUNDS, SHAPES, TRAVEL, Frames, Scene

Array = NDArray[np.float32]

SHAPE_DISTANCE = 42.0
"""Least RGB distance from the ground's shades at which a pixel belongs to a shape."""

LEAST_AREA = 0.004
"""Smallest share of the picture that counts as a shape: a triangle of 5 pixels' radius at 96x64."""

ATTRIBUTES = ("colour", "shape", "ground", "motion")


@dataclass(frozen=True)
class Reading:
    """What a clip shows.

    Attributes:
        colour, shape, ground, motion: as of `Scene`; None where no shape is found.
        travel: of the shape over the ground from the first frame to the last, (x, y) in parts of the sides.
        growth: the logarithm of the ratio of its last area to its first.
        ground_travel: of the ground itself, (x, y) in parts of the sides; right and down are positive.
        zoom: the logarithm of the factor by which the ground grows.
        match: how well the shape's outline agrees with the named one, 0 to 1 (intersection over union).
        dot: how dark the shape's middle is beside the colour around it, from 0 to 1.
        masks: (T, H, W), where the shape is.
    """

    colour: str | None
    shape: str | None
    ground: str
    motion: str | None
    travel: tuple[float, float]
    growth: float
    ground_travel: tuple[float, float]
    zoom: float
    match: float
    dot: float
    masks: NDArray[np.bool_]

    @property
    def speed(self) -> float:
        """As of `Scene.speed`, by the motion that is shown; 0 for one that spins or stands still."""
        if self.motion in TRAVEL:
            return abs(self.travel[0]) / 0.55 if TRAVEL[self.motion][0] else abs(self.travel[1]) / 0.5
        return abs(self.growth) / 2.6 if self.motion in ("grows", "shrinks") else 0.0

    @property
    def camera(self) -> str:
        """The key of `CAMERAS` that the ground's motion is opposite to, "None" where it stands still."""
        if abs(self.zoom) > 0.15:
            return "In" if self.zoom > 0 else "Out"
        x, y = self.ground_travel
        far = max(abs(x), abs(y))
        if far < 0.04:
            return "None"
        # Within 22.5 degrees of an axis the other axis does not count.
        across = "" if abs(x) < 0.41 * far else "Left" if x > 0 else "Right"
        along = "" if abs(y) < 0.41 * far else "Up" if y > 0 else "Down"
        return across + along


def measure(clip: Frames) -> Reading:
    """Read a clip (T, H, W, 3), 0 to 255, of at least two frames."""
    frames = clip.astype(np.float32)
    ground = _ground(frames)
    distance = _ground_distance(frames, ground)
    masks = np.stack([_mask(one) for one in distance])
    shift, zooms = _camera(frames.mean(-1), masks)
    height, width = masks.shape[1:]
    zoom = float(np.log(zooms[-1]))
    areas = masks.mean((1, 2))
    seen = areas >= LEAST_AREA
    empty = Reading(
        colour=None, shape=None, ground=ground, motion=None, travel=(0.0, 0.0), growth=0.0,
        ground_travel=(shift[-1, 1] / width, shift[-1, 0] / height), zoom=zoom, match=0.0, dot=0.0, masks=masks,
    )  # fmt: skip
    if seen.sum() < max(2, 2 * len(frames) // 3):
        return empty
    middles = np.array([ndimage.center_of_mass(mask) if ok else (0, 0) for mask, ok in zip(masks, seen, strict=True)])
    whole = seen & ~_touches_edge(masks)
    counted = whole if whole.sum() >= 2 else seen
    centre = np.array((height - 1, width - 1)) / 2
    places = (middles - centre - shift) / zooms[:, None]
    travel = _change(places[:, 1], counted) / width, _change(places[:, 0], counted) / height
    growth = _change(np.log(np.maximum(areas, 1e-6)) - 2 * np.log(zooms), counted)
    colour, dot = _inside(frames, masks, seen)
    shape, match, turn = _shape(masks, middles, counted)
    return replace(
        empty,
        colour=min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name][0])))),
        shape=shape,
        motion=_motion(travel, growth, turn),
        travel=travel,
        growth=growth,
        match=match,
        dot=dot,
    )


def score(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Mapping[str, float]:
    """The share of clips that show what their scene says, by attribute, and of those that show all four."""
    hits = {
        name: [getattr(r, name) == getattr(s, name) for r, s in zip(readings, scenes, strict=True)]
        for name in ATTRIBUTES
    }
    shares = {name: float(np.mean(hit)) for name, hit in hits.items()}
    return {**shares, "all": float(np.mean(np.all(list(hits.values()), axis=0)))}


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of one shape; 1 where both are empty."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0


def psnr(first: Frames, second: Frames) -> float:
    """Peak signal-to-noise ratio of two pictures or clips, in dB; infinite where they are equal."""
    error = float(np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def _ground(frames: Array) -> str:
    """The ground whose shades most pixels have."""
    some = frames[:: max(1, len(frames) // 4)]
    return max(GROUNDS, key=lambda name: float((_ground_distance(some, name) < SHAPE_DISTANCE / 2).mean()))


def _ground_distance(frames: Array, ground: str) -> Array:
    """From each pixel to the nearest shade of a ground (T, H, W)."""
    base, waves = np.array(GROUNDS[ground].rgb, np.float32), GROUNDS[ground].waves
    brightness = np.clip(frames @ base / (base @ base), 1 - 1.3 * waves, 1 + 1.3 * waves)
    return np.asarray(np.linalg.norm(frames - brightness[..., None] * base, axis=-1), np.float32)


def _mask(distance: Array) -> NDArray[np.bool_]:
    """Where the shape is in one frame: up to where a smooth edge is half ground."""
    mask = _largest(distance > SHAPE_DISTANCE)
    return _largest(distance > max(SHAPE_DISTANCE, 0.5 * float(np.median(distance[mask])))) if mask.any() else mask


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part, without holes."""
    labels, count = ndimage.label(mask)
    if count > 1:
        mask = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return np.asarray(ndimage.binary_fill_holes(mask))


def _touches_edge(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    edges = (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1])
    return np.any([edge.any(-1) for edge in edges], axis=0)


def _change(values: NDArray[np.floating], counted: NDArray[np.bool_]) -> float:
    """From the first frame to the last, along the line that fits the counted ones best."""
    index = np.arange(len(values))
    return float(np.polyfit(index[counted], values[counted], 1)[0] * (len(values) - 1))


def _inside(frames: Array, masks: NDArray[np.bool_], seen: NDArray[np.bool_]) -> tuple[Array, float]:
    """The colour of a shape between its rim and its middle, and how dark its middle is beside that."""
    ring, middle = [], []
    for frame, mask in zip(frames[seen], masks[seen], strict=True):
        depth = ndimage.distance_transform_edt(mask)
        deepest = depth.max()
        ring.append(frame[(depth > 0.2 * deepest) & (depth <= 0.45 * deepest)])
        middle.append(frame[depth >= 0.8 * deepest])
    colour, dark = (np.median(np.concatenate(pixels), 0) for pixels in (ring, middle))
    return colour, float(np.clip(1 - dark.max() / max(1.0, float(colour.max())), 0, 1))


def _template(
    shape: str, middle: NDArray[np.floating], area: float, angle: float, height: int, width: int
) -> NDArray[np.bool_]:
    """The pixels of a shape of that area."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x - middle[1], y - middle[0]
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = cos * x + sin * y, cos * y - sin * x
    if shape == "ball":
        return np.asarray(np.hypot(x, y) < np.sqrt(area / np.pi))
    if shape == "box":
        return np.asarray(np.maximum(abs(x), abs(y)) < np.sqrt(area) / 2)
    edge = np.sqrt(area / (3 * np.sqrt(3)))
    return np.asarray(np.maximum(np.maximum(y, 0.866 * x - 0.5 * y), -0.866 * x - 0.5 * y) < edge)


ANGLES = {"ball": (1, 2 * np.pi), "box": (6, np.pi / 2), "triangle": (8, 2 * np.pi / 3)}
"""By shape how many angles are tried, over the turn after which it looks the same."""


def _shape(
    masks: NDArray[np.bool_], middles: NDArray[np.floating], counted: NDArray[np.bool_]
) -> tuple[str, float, float]:
    """The shape whose outline agrees best, how well, and by how much it turns over the clip, in radians."""
    height, width = masks.shape[1:]
    indices = np.flatnonzero(counted)
    found: dict[str, tuple[float, float]] = {}
    for shape in SHAPES:
        count, period = ANGLES[shape]
        angles = np.arange(count) * period / count
        best, match = [], []
        for index in indices[:: max(1, len(indices) // 8)]:
            area = float(masks[index].sum())
            agree = [overlap(_template(shape, middles[index], area, a, height, width), masks[index]) for a in angles]
            best.append(angles[int(np.argmax(agree))] / period * 2 * np.pi)
            match.append(max(agree))
        turn = float(np.abs(np.diff(np.unwrap(best)) / (2 * np.pi) * period).sum()) if count > 1 else 0.0
        found[shape] = (float(np.mean(match)), turn)
    shape = max(found, key=lambda name: found[name][0])
    return shape, found[shape][0], found[shape][1]


def _motion(travel: tuple[float, float], growth: float, turn: float) -> str:
    """The motion that stands out most; the thresholds are half of what the slowest scene does."""
    scores = {
        "right": travel[0] / 0.069, "left": -travel[0] / 0.069, "down": travel[1] / 0.0625, "up": -travel[1] / 0.0625,
        "grows": growth / 0.325, "shrinks": -growth / 0.325,
    }  # fmt: skip
    motion = max(scores, key=lambda name: scores[name])
    if scores[motion] >= 1:
        return motion
    return "spins" if turn > 0.4 else "still"


def _camera(bright: Array, masks: NDArray[np.bool_]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Where the ground of the first frame is in every frame of a clip (T, H, W): its shift (T, 2), y and x in pixels,
    and by which factor it has grown (T,), around the middle of the picture.

    From frame to frame these are the shift and growth that explain the change of brightness best (Lucas and Kanade,
    1981), with the pixels around the shape left out.
    """
    y, x = np.mgrid[0 : bright.shape[1], 0 : bright.shape[2]].astype(np.float32)
    x, y = x - x.mean(), y - y.mean()
    smooth = ndimage.gaussian_filter(bright, (0, 1.5, 1.5))
    shifts, zooms = [np.zeros(2)], [1.0]
    for index in range(len(bright) - 1):
        away = ~ndimage.binary_dilation(masks[index] | masks[index + 1], iterations=4)
        away[[0, -1]] = away[:, [0, -1]] = False
        step = np.zeros(3)
        for _ in range(4 if away.sum() >= 50 else 0):
            zoom = np.exp(step[2])
            at = (y * zoom + step[0] - y[0, 0], x * zoom + step[1] - x[0, 0])
            after = ndimage.map_coordinates(smooth[index + 1], at, order=1, mode="nearest")
            dy, dx = np.gradient(after)
            slopes = np.stack((dy, dx, x * dx + y * dy), -1)[away]
            step += np.linalg.lstsq(slopes, (smooth[index] - after)[away], rcond=None)[0]
        zoom = float(np.exp(step[2]))
        shifts.append(shifts[-1] * zoom + step[:2])
        zooms.append(zooms[-1] * zoom)
    return np.stack(shifts), np.array(zooms)
