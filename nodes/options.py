"""Optional settings of the sampler, each a frozen value that plugs into one of its sockets."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from wan_core.conditioning.text import TextEncoder, text_conditioning
from wan_core.planning.modules import SizedModule
from wan_core.settings import (
    TEACACHE_TEMPLATES,
    WINDOW_MODES,
    CacheSettings,
    EasyCacheSettings,
    GuidanceSettings,
    RunSettings,
    ScheduleSettings,
    TeaCacheSettings,
    WindowMode,
    WindowSettings,
)
from wan_core.types import Conditioning

from . import host, planning, sockets
from .conditioning import text_encoder_at_work


def numbers(name: str, text: str) -> tuple[float, ...]:
    """The numbers in a text, separated by commas or blanks.

    Raises:
        ValueError: something else stands there, or nothing.
    """
    try:
        found = tuple(float(part) for part in re.split(r"[,;\s]+", text.strip()))
    except ValueError as error:
        raise ValueError(f"{name} is a list of numbers such as '7, 5, 3'; got {text!r}.") from error
    return found


def _answer(build: Callable[..., Any], **values: Any) -> bool | str:
    """What VALIDATE_INPUTS says: True, or why `build` refuses; values that are linked (None) are judged later."""
    if None in values.values():
        return True
    try:
        build(**values)
    except ValueError as error:
        return str(error)
    return True


def _row(index: int, tensor: Tensor, _: object) -> Tensor:
    return tensor[index : index + 1]


class _Options(planning.Settings):
    CATEGORY = "WanCore/sampling"
    FUNCTION = "build"
    OUTPUT_TOOLTIPS: tuple[str, ...] = ("For the socket of that name on the sampler.",)


class TeaCache(_Options):
    """Steps left out by a plan."""

    CATEGORY = "WanCore/speed and memory"
    DESCRIPTION = "Leave out steps that change little, by a plan made before the first one (TeaCache). About 2x faster."
    RETURN_TYPES = (sockets.CACHE,)
    RETURN_NAMES = ("cache",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "threshold": sockets.number(
                    0.1, 0.0, 10.0, "Higher leaves out more. 1.3B: 0.05 to 0.1; 14B: 0.1 to 0.3. 0 is off.", step=0.01
                ),
            },
            "optional": {
                "speedup": sockets.number(
                    0.0,
                    0.0,
                    100.0,
                    "Above 1 the threshold that gives this speed-up is found, in place of the widget's.",
                ),
                "template": sockets.choice(
                    ["auto", *TEACACHE_TEMPLATES],
                    "auto",
                    "Whose coefficients; auto is what the model's row recommends.",
                ),
                "start_step": sockets.whole(0, 0, 1000, "Steps at the beginning that always run; 5 is safer."),
                "residual_on_cpu": sockets.flag(False, "Keep what a step changed in host memory: saves card memory."),
            },
        }

    def build(
        self,
        threshold: float,
        speedup: float = 0.0,
        template: str = "auto",
        start_step: int = 0,
        residual_on_cpu: bool = False,
    ) -> tuple[CacheSettings]:
        wanted = {"threshold": None, "speedup": speedup} if speedup else {"threshold": threshold}
        return (TeaCacheSettings(**wanted, template=template, start_step=start_step, residual_on_cpu=residual_on_cpu),)


class EasyCache(_Options):
    """Steps left out by what the run itself shows."""

    CATEGORY = "WanCore/speed and memory"
    DESCRIPTION = "Leave out steps that change little, judged during the run (EasyCache). Works with any model."
    RETURN_TYPES = (sockets.CACHE,)
    RETURN_NAMES = ("cache",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "threshold": sockets.number(0.05, 0.0, 10.0, "Higher leaves out more; 0 is off.", step=0.01),
                "start_step": sockets.whole(10, 0, 1000, "Steps at the beginning that always run."),
            },
            "optional": {
                "residual_on_cpu": sockets.flag(False, "Keep what a step changed in host memory: saves card memory."),
            },
        }

    def build(self, threshold: float, start_step: int, residual_on_cpu: bool = False) -> tuple[CacheSettings]:
        return (EasyCacheSettings(threshold=threshold, start_step=start_step, residual_on_cpu=residual_on_cpu),)


class Windows(_Options):
    """A long video in pieces."""

    CATEGORY = "WanCore/long video"
    DESCRIPTION = (
        "Make a video longer than the model was trained on, in overlapping windows that need the memory of one, or as "
        "a chain of clips that each go on from the last frames of the one before."
    )
    RETURN_TYPES = (sockets.WINDOWS,)
    RETURN_NAMES = ("windows",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "sliding_window_size": sockets.whole(21, 1, 2500, "Latent frames per window; 21 are 81 frames."),
                "sliding_window_stride": sockets.whole(15, 1, 2500, "Latent frames from one window to the next."),
            },
            "optional": {
                "mode": sockets.choice(
                    list(WINDOW_MODES), "blend", "blend mixes all windows at every step; chain makes clip after clip."
                ),
                "colour_limit": sockets.number(
                    0.05, 0.0, 1.0, "chain: how far colours are pulled back to the first clip's; 0 is off.", step=0.01
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
        return _answer(WindowSettings, size=size, stride=stride, mode=mode)

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


class WindowPrompts(_Options):
    """A prompt for every window."""

    CATEGORY = "WanCore/long video"
    DESCRIPTION = "One prompt per line, one line per window of a long video. The last line holds for all after it."
    RETURN_TYPES = (sockets.PROMPTS,)
    RETURN_NAMES = ("prompts",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": sockets.socket(sockets.TEXT_ENCODER, "From the text encoder loader."),
                "prompts": sockets.text("", "What each window shows, one line per window."),
            },
            "optional": {
                "negative_prompt": sockets.text("", "What to avoid, the same in all windows."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompts: str | None = None) -> bool | str:
        return True if prompts is None or prompts.strip() else "prompts needs at least one line."

    @classmethod
    def planned(cls, **inputs: Any) -> tuple[planning.PlannedConditioning]:
        return (planning.PlannedConditioning(planning.known(SizedModule, "text_encoder", inputs["text_encoder"])),)

    def build(
        self, text_encoder: TextEncoder, prompts: str, negative_prompt: str = ""
    ) -> tuple[tuple[Conditioning, ...]]:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("prompts needs at least one line.")
        cond = text_conditioning(text_encoder, lines, negative_prompt, partial(text_encoder_at_work, text_encoder))
        cond = cond.to(host.current.offload_device())
        return (tuple(cond.map(partial(_row, i)) for i in range(len(lines))),)


class Guidance(_Options):
    """Guidance that changes during the run."""

    DESCRIPTION = "Change the guidance over the steps, use it for a part of them, or use CFG-Zero*. Replaces cfg."
    RETURN_TYPES = (sockets.GUIDANCE,)
    RETURN_NAMES = ("guidance",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "cfg": sockets.line("6, 4", "One number, or several that are spread over the steps from start to end."),
            },
            "optional": {
                "start": sockets.number(0.0, 0.0, 1.0, "Fraction of the run before which only the prompt counts."),
                "end": sockets.number(1.0, 0.0, 1.0, "Fraction of the run after which only the prompt counts: faster."),
                "zero_star": sockets.flag(False, "CFG-Zero*: scale the negative branch to the positive one."),
                "zero_steps": sockets.whole(0, 0, 100, "CFG-Zero*: steps at the beginning that are passed over; 1."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, cfg: str | None = None, start: float = 0.0, end: float = 1.0) -> bool | str:
        return _answer(cls().build, cfg=cfg, start=start, end=end)

    def build(
        self, cfg: str, start: float = 0.0, end: float = 1.0, zero_star: bool = False, zero_steps: int = 0
    ) -> tuple[GuidanceSettings]:
        return (
            GuidanceSettings(
                scale=numbers("cfg", cfg), start=start, end=end, zero_star=zero_star, zero_steps=zero_steps
            ),
        )


class Schedule(_Options):
    """Which noise levels are run."""

    DESCRIPTION = "Give the noise levels yourself, or run only some of the steps and let another sampler do the rest."
    RETURN_TYPES = (sockets.SCHEDULE,)
    RETURN_NAMES = ("schedule",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "start_step": sockets.whole(
                    0, 0, 1000, "First step to run. Above 0 the latent input must come from a sampler that ends there."
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
        return _answer(partial(cls().build, 0, 0, None), sigma_list=sigma_list)

    def build(
        self, start_step: int, end_step: int, sigmas: Tensor | None = None, sigma_list: str = ""
    ) -> tuple[ScheduleSettings]:
        given = None if sigmas is None else tuple(float(sigma) for sigma in sigmas)
        if sigma_list.strip():
            if given is not None:
                raise ValueError("Give the noise levels either as sigmas or as sigma_list, not as both.")
            given = numbers("sigma_list", sigma_list)
        return (ScheduleSettings(sigmas=given, start_step=start_step, end_step=end_step or None),)


class LongRun(_Options):
    """What a run leaves on disk."""

    CATEGORY = "WanCore/long video"
    DESCRIPTION = (
        "Write a long run down as it goes on, so that the same run goes on where it was cut off, and save its latents "
        "before they are decoded. The files are in the output folder, under wancore."
    )
    RETURN_TYPES = (sockets.RUN,)
    RETURN_NAMES = ("run",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "checkpoint_every": sockets.whole(5, 0, 1000, "Steps between two files; 0 writes none."),
                "keep_latents": sockets.flag(True, "Save the final latents and how they were made."),
            },
            "optional": {"name": sockets.line("wancore", "Name of the file of latents; a number is added.")},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str = "wancore") -> bool | str:
        return _answer(RunSettings, name=name)

    def build(self, checkpoint_every: int, keep_latents: bool, name: str = "wancore") -> tuple[RunSettings]:
        return (RunSettings(checkpoint_every=checkpoint_every, keep_latents=keep_latents, name=name),)
