"""The magnitude ratios that MagCache needs of a model: kept beside its file once they were measured."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from .atomic import replacing
from .cache_settings import MagCacheSettings
from .files import check_writable, errors_from, read_json
from .runtime import log
from .settings import SamplerSettings

SUFFIX = ".magcache.json"
DIGITS = 5
"""Ratios are rounded to as many digits as the authors of MagCache publish."""


def path_beside(model: Path) -> Path:
    """Where the ratios of the model in this file are kept."""
    return model.with_name(model.name + SUFFIX)


def place(files: Sequence[Path], name: str) -> Path:
    """Where to keep the ratios of the model called `name`, which was read from `files`.

    Raises:
        ValueError: it was read from no file, or its folder cannot be written to.
    """
    if not files:
        raise ValueError(f"The ratios of {name} cannot be kept: it was not loaded from a file.")
    with errors_from(path_beside(files[0]), "cannot be written", "MagCache keeps what it measures beside the model."):
        check_writable(files[0].parent)
    return path_beside(files[0])


def save(files: Sequence[Path], name: str, ratios: Sequence[float], settings: SamplerSettings) -> None:
    """Keep the ratios of a run of N steps with these settings, N - 1 numbers from its second step on, in place of
    earlier ones.

    Raises:
        ValueError: as of `place`, or a step was not measured, because the run was continued from another.
    """
    path = place(files, name)
    if not all(map(math.isfinite, ratios)):
        raise ValueError("MagCache could not measure every step; run all steps of one schedule in one go.")
    made_with = {"steps": settings.total_steps, "shift": settings.shift, "solver": settings.solver}
    content = {"magnitude_ratios": [round(ratio, DIGITS) for ratio in ratios], **made_with}
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    log.info("MagCache: the magnitude ratios of %s are kept in %s.", name, path)


def measured(files: Sequence[Path]) -> tuple[float, ...] | None:
    """The ratios that were measured of the model in `files`, or None.

    Raises:
        ValueError: there is a file with them, but it is damaged.
    """
    if not files or not path_beside(files[0]).exists():
        return None
    path = path_beside(files[0])
    found = read_json(path, advice="Remove it or measure again.")
    with errors_from(path, "holds no ratios for MagCache", "Remove it or measure again."):
        ratios = tuple(found["magnitude_ratios"])
        return MagCacheSettings(ratios=ratios).ratios
