"""Pose rows: a camera's lens and place in one frame as 19 numbers.

A row is: frame, fx, fy, cx, cy, 0, 0, and the world-to-camera matrix (3 x 4, row by row). The lens is in fractions of
the picture's width and height; x points right, y down and z into the picture. The format is RealEstate10K's, which
VideoX-Fun reads.
"""

import math
import re
from collections.abc import Iterable

import numpy as np

PoseRow = tuple[float, ...]

COLUMNS = 19
LENS = slice(1, 7)
MATRIX = slice(7, COLUMNS)

DEFAULT_ORIGIN: PoseRow = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
"""The first pose of VideoX-Fun's trajectory files."""

ROTATION_TOLERANCE = 1e-2
"""Largest entry of R Rᵀ - 1 that a rotation R may have: enough for numbers rounded to two decimals."""


def pose_row(values: Iterable[float | str], where: str) -> PoseRow:
    """`values` as numbers; `where` begins the error message.

    Raises:
        ValueError: one is not a number.
    """
    row = []
    for column, value in enumerate(values, 1):
        try:
            row.append(float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: column {column} is not a number: {value!r}.") from error
    return tuple(row)


def check_row(row: PoseRow, where: str, rotated: bool = True) -> None:
    """Check a pose row; `where` begins the error message.

    Raises:
        ValueError: not 19 finite numbers, a focal length not above 0, or, when `rotated`, a matrix whose first three
            columns are not a rotation.
    """
    if len(row) != COLUMNS:
        raise ValueError(
            f"{where} has {len(row)} numbers; a pose row has {COLUMNS}: "
            "frame, fx, fy, cx, cy, 0, 0, and the 3 x 4 world-to-camera matrix row by row."
        )
    for column, value in enumerate(row, 1):
        if not math.isfinite(value):
            raise ValueError(f"{where}: column {column} is {value}; all numbers must be finite.")
    fx, fy = row[1:3]
    if min(fx, fy) <= 0:
        raise ValueError(f"{where}: the focal lengths fx and fy (columns 2, 3) must be above 0; got {fx:g} and {fy:g}.")
    if rotated:
        rotation = np.array(row[MATRIX]).reshape(3, 4)[:, :3]
        error = np.abs(rotation @ rotation.T - np.eye(3)).max()
        if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0:
            raise ValueError(
                f"{where}: columns 8-10, 12-14 and 16-18 must be the rows of a rotation (orthonormal within "
                f"{ROTATION_TOLERANCE:g}, not mirrored); got {np.round(rotation, 4).tolist()}, off by {error:.3g}."
            )


def rows_from_text(text: str, name: str) -> list[PoseRow]:
    """The checked rows of a text, one per line, numbers separated by spaces or commas; `name` stands in error messages.

    A first line that does not start with a number is a header; blank lines are ignored. Rows of 18 numbers lack the
    frame number, as in VideoX-Fun's own trajectory files.

    Raises:
        ValueError: there is no row, or a line is not one; the message names the line.
    """
    lines = [(n, words) for n, line in enumerate(text.splitlines(), 1) if (words := re.findall(r"[^\s,()\[\]]+", line))]
    if lines and not _is_number(lines[0][1][0]):
        del lines[0]
    if not lines:
        raise ValueError(f"{name} holds no pose rows; expected one line of {COLUMNS} numbers per frame.")
    rows: list[PoseRow] = []
    for number, words in lines:
        where = f"{name}, line {number}"
        row = pose_row([len(rows), *words] if len(words) == COLUMNS - 1 else words, where)
        check_row(row, where)
        rows.append(row)
    return rows


def origin_from_text(text: str) -> PoseRow:
    """The pose row in a text; an empty text is the default origin.

    Raises:
        ValueError: the text is not one pose row.
    """
    if not text.strip():
        return DEFAULT_ORIGIN
    rows = rows_from_text(text, "The camera's origin")
    if len(rows) != 1:
        raise ValueError(f"The camera's origin is one pose row; got {len(rows)}.")
    return rows[0]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
