"""Settings of a run as frozen values. Each checks itself, so a wrong value is refused where it is typed."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

SOLVER_NAMES = ("euler",)
CFG_MODES = ("sequential", "interleaved", "batched")
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Classifier-free guidance.

    Attributes:
        scale: 1 runs the conditional branch alone; larger follows the prompt more closely.
        mode: `sequential` runs the branches one after the other, `interleaved` takes both through each block before the
            next (one copy of a streamed block serves both), `batched` joins them into one batch (fewer, larger kernels,
            twice the activations). All give the same result.
    """

    scale: float = 5.0
    mode: Literal["sequential", "interleaved", "batched"] = "sequential"

    def __post_init__(self) -> None:
        check_number("cfg_scale", self.scale, low=0, high=100)
        check_choice("cfg mode", self.mode, CFG_MODES)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """How latents are drawn and denoised.

    Attributes:
        seed: of the initial noise, 0 to 2**64 - 1.
        steps: number of model evaluations per branch.
        shift: moves the schedule towards high noise; 5 in the reference, 3 for image-to-video at 480p.
        denoise: 1 starts from noise; below 1 starts from a video with that much noise. All steps are run either way.
        solver: how a velocity becomes the next latents.
        rand_device: where the noise is drawn. `cpu` gives the same numbers on every machine.
    """

    seed: int = 0
    steps: int = 50
    shift: float = 5.0
    denoise: float = 1.0
    solver: str = "euler"
    rand_device: str = "cpu"
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)

    def __post_init__(self) -> None:
        check_whole("seed", self.seed, low=0, high=MAX_SEED)
        check_whole("steps", self.steps, low=1, high=10000)
        check_number("shift", self.shift, low=0.01, high=1000)
        check_number("denoise", self.denoise, low=0, high=1)
        check_choice("solver", self.solver, SOLVER_NAMES)


def check_number(name: str, value: Any, *, low: float, high: float) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}; got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}; got {value:g}.")


def check_whole(name: str, value: Any, *, low: int, high: int) -> None:
    """Raise ValueError unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}; got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
