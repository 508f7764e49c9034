"""Optional settings of the sampler, each a frozen value for one of its sockets."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from wan_core.settings import (
    WINDOW_MODES,
    GuidanceSettings,
    NagSettings,
    RunSettings,
    ScheduleSettings,
    SkipSettings,
    WindowMode,
    WindowSettings,
)

from . import planning, sockets


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers in a text, separated by commas or blanks.

    Raises:
        ValueError: the text is empty or holds anything else.
    """
    try:
        found = tuple(float(part) for part in re.split(r"[,;\s]+", text.strip()))
    except ValueError as error:
        raise ValueError(f"{name} is a list of numbers such as '7, 5, 3'; got {text!r}.") from error
    return found


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The whole numbers in a text, as of `numbers`."""
    found = numbers(name, text)
    if not all(number.is_integer() for number in found):
        raise ValueError(f"{name} is a list of whole numbers such as '8, 9'; got {text!r}.")
    return tuple(map(int, found))


def _validate(build: Callable[..., Any], **values: Any) -> bool | str:
    """What VALIDATE_INPUTS returns for what `build` makes of the values; linked values (None) are not checked yet."""
    return True if None in values.values() else sockets.true_or_message(partial(build, **values))


class Options(planning.Settings):
    """The base of the nodes that make settings for one of the sampler's sockets."""

    CATEGORY = "WanCore/sampling"
    FUNCTION = "build"
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("For the socket of that name on the sampler.",)


class Windows(Options):
    """A long video in pieces."""

    CATEGORY = "WanCore/long video"
    DESCRIPTION = (
        "Make a video longer than the model was trained on: in overlapping windows, with the memory of one window, or "
        "as a chain of clips, each of which continues from the last frames of the one before."
    )
    RETURN_TYPES = (sockets.WINDOWS,)
    RETURN_NAMES = ("windows",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "sliding_window_size": sockets.whole(
                    21, 1, 2500, "Latent frames per window; for Wan 2.1, 21 are 81 frames."
                ),
                "sliding_window_stride": sockets.whole(15, 1, 2500, "Latent frames from one window to the next."),
            },
            "optional": {
                "mode": sockets.choice(
                    list(WINDOW_MODES), "blend", "blend mixes all windows at every step; chain makes clip after clip."
                ),
                "colour_limit": sockets.number(
                    0.05,
                    0.0,
                    1.0,
                    "chain: the largest correction of colours towards those of the first clip; 0 is off.",
                    step=0.01,
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        sliding_window_size: int | None = None,
        sliding_window_stride: int | None = None,
        mode: WindowMode = "blend",
    ) -> bool | str:
        size, stride = sliding_window_size, sliding_window_stride
        return _validate(WindowSettings, size=size, stride=stride, mode=mode)

    def build(
        self,
        sliding_window_size: int,
        sliding_window_stride: int,
        mode: WindowMode = "blend",
        colour_limit: float = 0.05,
    ) -> tuple[WindowSettings]:
        return (
            WindowSettings(
                size=sliding_window_size, stride=sliding_window_stride, mode=mode, colour_limit=colour_limit
            ),
        )


class Guidance(Options):
    """Guidance that changes during the run."""

    DESCRIPTION = (
        "Change the guidance over the steps, use it for a part of the run, or use CFG-Zero*, attention guidance (NAG) "
        "or skip-layer guidance. Replaces cfg."
    )
    RETURN_TYPES = (sockets.GUIDANCE,)
    RETURN_NAMES = ("guidance",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "cfg": sockets.line("6, 4", "One number, or several, interpolated over the steps from start to end."),
            },
            "optional": {
                "start": sockets.number(
                    0.0, 0.0, 1.0, "Fraction of the run before which there is no guidance: only the prompt is computed."
                ),
                "end": sockets.number(
                    1.0,
                    0.0,
                    1.0,
                    "Fraction of the run after which there is no guidance: only the prompt is computed, twice as fast.",
                ),
                "zero_star": sockets.flag(False, "CFG-Zero*: scale the negative branch to the positive one."),
                "zero_steps": sockets.whole(
                    0, 0, 100, "CFG-Zero*: first steps whose velocity is set to zero; its authors use 1."
                ),
                "cfg_low": sockets.line("", "Of a model of two experts, cfg of the one for low noise. Empty: as cfg."),
                "nag_scale": sockets.number(
                    1.0,
                    0.0,
                    100.0,
                    "Attention guidance (NAG): the negative prompt works at cfg 1 too, for a few percent more time. "
                    "1: off; its authors use 11 for few-step Wan.",
                ),
                "nag_tau": sockets.number(
                    2.5, 1.0, 100.0, "NAG: the most by which a token's attention may grow; 3.5 for text to video."
                ),
                "nag_alpha": sockets.number(
                    0.25, 0.0, 1.0, "NAG: its share of the attention; 0.5 for text to video.", step=0.01
                ),
                "nag_end": sockets.number(1.0, 0.0, 1.0, "NAG: fraction of the run after which it is off.", step=0.01),
                "skip_blocks": sockets.line(
                    "", "Skip-layer guidance: blocks to leave out, such as 9 or '8, 9'. Empty: off."
                ),
                "skip_scale": sockets.number(
                    -1.0,
                    -1.0,
                    100.0,
                    "-1: the negative branch leaves these blocks out, which costs nothing. Above 0: a branch of its "
                    "own does, and the result is led away from it so far. 0: off.",
                ),
                "skip_start": sockets.number(0.0, 0.0, 1.0, "Fraction of the run where blocks are left out from."),
                "skip_end": sockets.number(1.0, 0.0, 1.0, "Fraction of the run where blocks are left out to."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        cfg: str | None = None,
        start: float = 0.0,
        end: float = 1.0,
        cfg_low: str = "",
        skip_blocks: str = "",
        skip_scale: float = -1.0,
        skip_start: float = 0.0,
        skip_end: float = 1.0,
    ) -> bool | str:
        skip = {"skip_blocks": skip_blocks, "skip_scale": skip_scale, "skip_start": skip_start, "skip_end": skip_end}
        return _validate(cls().build, cfg=cfg, start=start, end=end, cfg_low=cfg_low, **skip)

    def build(
        self,
        cfg: str,
        start: float = 0.0,
        end: float = 1.0,
        zero_star: bool = False,
        zero_steps: int = 0,
        cfg_low: str = "",
        nag_scale: float = 1.0,
        nag_tau: float = 2.5,
        nag_alpha: float = 0.25,
        nag_end: float = 1.0,
        skip_blocks: str = "",
        skip_scale: float = -1.0,
        skip_start: float = 0.0,
        skip_end: float = 1.0,
    ) -> tuple[GuidanceSettings]:
        low = numbers("cfg_low", cfg_low) if cfg_low.strip() else None
        blocks = whole_numbers("skip_blocks", skip_blocks) if skip_blocks.strip() else ()
        own_scale = None if skip_scale < 0 else skip_scale
        return (
            GuidanceSettings(
                scale=numbers("cfg", cfg),
                scale_low=low,
                start=start,
                end=end,
                zero_star=zero_star,
                zero_steps=zero_steps,
                nag=NagSettings(scale=nag_scale, tau=nag_tau, alpha=nag_alpha, end=nag_end),
                skip=SkipSettings(blocks=blocks, scale=own_scale, start=skip_start, end=skip_end),
            ),
        )


class Schedule(Options):
    """The noise levels of a run."""

    DESCRIPTION = (
        "Set the noise levels yourself, or run only a part of the steps and leave the others to another sampler."
    )
    RETURN_TYPES = (sockets.SCHEDULE,)
    RETURN_NAMES = ("schedule",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "start_step": sockets.whole(
                    0,
                    0,
                    1000,
                    "First step to run. Above 0 the latent input has to come from a sampler that ends at this step.",
                ),
                "end_step": sockets.whole(0, 0, 1000, "The step to stop before; 0 runs to the end."),
            },
            "optional": {
                "sigmas": sockets.socket("SIGMAS", "Noise levels in place of steps, shift and denoise."),
                "sigma_list": sockets.line("", "Noise levels as numbers, such as 1, 0.94, 0.83, 0.63, 0."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, sigma_list: str = "") -> bool | str:
        return _validate(partial(cls().build, 0, 0, None), sigma_list=sigma_list)

    def build(
        self, start_step: int, end_step: int, sigmas: Tensor | None = None, sigma_list: str = ""
    ) -> tuple[ScheduleSettings]:
        levels = None if sigmas is None else tuple(float(sigma) for sigma in sigmas)
        if sigma_list.strip():
            if levels is not None:
                raise ValueError("Give the noise levels either as sigmas or as sigma_list, not as both.")
            levels = numbers("sigma_list", sigma_list)
        return (ScheduleSettings(sigmas=levels, start_step=start_step, end_step=end_step or None),)


class LongRun(Options):
    """What a run saves to disk."""

    CATEGORY = "WanCore/long video"
    DESCRIPTION = (
        "Save the state of a long run as it goes on, so that the same run continues after an interruption, and save "
        "its latents before they are decoded. The files are in output/wancore."
    )
    RETURN_TYPES = (sockets.RUN,)
    RETURN_NAMES = ("run",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "checkpoint_every": sockets.whole(5, 0, 1000, "Steps between two saved states; 0 saves none."),
                "keep_latents": sockets.flag(True, "Save the final latents with their settings."),
            },
            "optional": {"name": sockets.line("wancore", "Name of the latents' file; a number is added.")},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str = "wancore") -> bool | str:
        return _validate(RunSettings, name=name)

    def build(self, checkpoint_every: int, keep_latents: bool, name: str = "wancore") -> tuple[RunSettings]:
        return (RunSettings(checkpoint_every=checkpoint_every, keep_latents=keep_latents, name=name),)
