"""Settings of a run as frozen dataclasses, which check their values when they are made."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from .cache_settings import CacheSettings, MagCacheSettings
from .checks import check_choice, check_number, check_whole
from .files import check_name
from .sampling.solvers import SOLVERS

CFG_MODES = ("sequential", "interleaved", "batched")
GuidanceMode = Literal["sequential", "interleaved", "batched"]
WindowMode = Literal["blend", "chain"]
WINDOW_MODES = ("blend", "chain")

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class NagSettings:
    """Normalised attention guidance (NAG, Chen et al. 2025, arXiv 2505.21179): each cross-attention of the conditional
    branch is led away from what it would be with the negative text, so that a negative prompt works at a scale of 1.

    Attributes:
        scale: how far; 1 or less is off. The authors use 11 for few-step Wan (ChenDarYen/ComfyUI-NAG).
        tau: the most by which a token's attention may grow in size (L1 norm), at least 1.
        alpha: the share of the result, the rest is the plain attention. The authors advise a lower tau and alpha for
            image to video and for many steps; these are WanVideoWrapper's, theirs for text are 3.5 and 0.5.
        end: off from this fraction of the run on.
    """

    scale: float = 1.0
    tau: float = 2.5
    alpha: float = 0.25
    end: float = 1.0

    def __post_init__(self) -> None:
        check_number("nag_scale", self.scale, low=0, high=100)
        check_number("nag_tau", self.tau, low=1, high=100)
        check_number("nag_alpha", self.alpha, low=0, high=1)
        check_number("nag_end", self.end, low=0, high=1)

    @property
    def is_on(self) -> bool:
        return self.scale > 1 and self.alpha > 0


@dataclass(frozen=True, kw_only=True)
class SkipSettings:
    """Skip-layer guidance (Stability AI's for SD 3.5; Hyung et al. 2024, arXiv 2411.18664): the velocity is led away
    from what the model gives without some of its blocks.

    Attributes:
        blocks: numbers of the blocks, from 0; none is off.
        scale: how far, in a branch of its own with the positive text (ComfyUI's SkipLayerGuidanceDiT); 0 is off. None
            leaves the blocks out of the unconditional branch instead, which costs nothing (ComfyUI's
            SkipLayerGuidanceDiTSimple, WanVideoWrapper).
        start, end: from here to there, in fractions of the run.
    """

    blocks: tuple[int, ...] = ()
    scale: float | None = None
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        for block in self.blocks:
            check_whole("skip_blocks", block, low=0, high=1000)
        if self.scale is not None:
            check_number("skip_scale", self.scale, low=0, high=100)
        check_number("skip_start", self.start, low=0, high=1)
        check_number("skip_end", self.end, low=0, high=1)
        if self.start > self.end:
            raise ValueError(f"skip_start must not be after skip_end; got {self.start:g} to {self.end:g}.")

    @property
    def is_own_branch(self) -> bool:
        return bool(self.blocks and self.scale)


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Classifier-free guidance, and what goes with it or in its place.

    Attributes:
        scale: with 1 only the conditional branch runs; larger values follow the prompt more closely. Several numbers
            are a curve, spread evenly from `start` to `end`.
        scale_low: of the second of two experts, that for the less noisy timesteps; None is `scale`.
        mode: `sequential` runs the branches one after the other; `interleaved` runs both through each block before the
            next, so that a streamed block is copied once; `batched` makes them one batch (fewer, larger kernels, twice
            the activations). All give the same result.
        start, end: guidance from here to there, in fractions of the run; elsewhere only the conditional branch runs.
        zero_star: project the unconditional velocity onto the conditional one before they are combined (CFG-Zero*, Fan
            et al. 2025).
        zero_steps: so many first steps have velocity zero, the other half of CFG-Zero*.
        nag: normalised attention guidance.
        skip: skip-layer guidance.
    """

    scale: float | tuple[float, ...] = 5.0
    scale_low: float | tuple[float, ...] | None = None
    mode: GuidanceMode = "sequential"
    start: float = 0.0
    end: float = 1.0
    zero_star: bool = False
    zero_steps: int = 0
    nag: NagSettings = field(default_factory=NagSettings)
    skip: SkipSettings = field(default_factory=SkipSettings)

    def __post_init__(self) -> None:
        for name, scale in (("cfg_scale", self.scale), ("cfg_scale_low", self.scale_low)):
            numbers = _numbers(scale)
            if not numbers and scale is not None:
                raise ValueError(f"A {name} curve needs at least one number.")
            for number in numbers:
                check_number(name, number, low=0, high=100)
        check_choice("cfg mode", self.mode, CFG_MODES)
        check_number("guidance start", self.start, low=0, high=1)
        check_number("guidance end", self.end, low=0, high=1)
        if self.start > self.end:
            raise ValueError(f"guidance must not start after its end; got {self.start:g} to {self.end:g}.")
        check_whole("zero_steps", self.zero_steps, low=0, high=10000)
        if self.skip.blocks and self.skip.scale is None and not self.has_negative:
            raise ValueError(
                "skip_blocks leave blocks out of the negative branch, which cfg 1 does not run; set skip_scale to run "
                "a branch of their own, or cfg above 1."
            )

    @property
    def scales(self) -> tuple[float, ...]:
        """`scale` as a tuple."""
        return _numbers(self.scale)

    @property
    def branches(self) -> int:
        """The most branches that a step of the run needs: 1 when the scale is always 1, else 2; skip-layer guidance may
        have a further one.
        """
        return 1 + self.has_negative + self.skip.is_own_branch

    @property
    def has_negative(self) -> bool:
        """Whether a step of the run needs the unconditional branch."""
        return any(scale != 1 for scale in (*self.scales, *_numbers(self.scale_low)))

    def of_expert(self, number: int) -> "GuidanceSettings":
        """The guidance of a run's expert, numbered from 0."""
        if self.scale_low is None:
            return self
        scale, skip = self.scale_low if number else self.scale, self.skip
        if skip.scale is None and all(each == 1 for each in _numbers(scale)):
            skip = SkipSettings()  # this expert has no negative branch that could leave blocks out
        return replace(self, scale=scale, scale_low=None, skip=skip)


def _numbers(scale: float | tuple[float, ...] | None) -> tuple[float, ...]:
    return () if scale is None else scale if isinstance(scale, tuple) else (scale,)


@dataclass(frozen=True, kw_only=True)
class WindowSettings:
    """A long video in windows of `size` latent frames, `stride` apart.

    Attributes:
        mode: `blend` runs all windows in every step and blends them where they overlap; `chain` finishes one clip after
            the other, each of which begins with the last frames of the one before.
        colour_limit: `chain` only: the most by which each clip's channels are moved towards the mean (in latent units)
            and contrast (as a fraction) of the first clip; 0 changes nothing.
    """

    size: int = 21
    stride: int = 15
    mode: WindowMode = "blend"
    colour_limit: float = 0.05

    def __post_init__(self) -> None:
        check_whole("sliding_window_size", self.size, low=1, high=100000)
        check_choice("window mode", self.mode, WINDOW_MODES)
        check_number("colour_limit", self.colour_limit, low=0, high=1)
        longest = self.size - (self.mode == "chain")
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or not 1 <= self.stride <= longest:
            why = (
                "so that a clip can begin with frames of the one before" if self.mode == "chain" else "to leave no gap"
            )
            raise ValueError(f"sliding_window_stride must be from 1 to {longest}, {why}; got {self.stride!r}.")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How much of a device a model may use. Under the strictest limit every block is streamed.

    Attributes:
        vram_limit: GiB that may be in use on the device, by all programs; None is all of its memory; 0 streams every
            block and limits nothing else.
        vram_buffer: GiB of it that weights leave free; None computes what the run needs.
        persistent_params: whatever the limit, keep so many blocks on the device that they have at most so many
            parameters; 0 streams every block.
    """

    vram_limit: float | None = None
    vram_buffer: float | None = None
    persistent_params: int | None = None

    def __post_init__(self) -> None:
        for name in ("vram_limit", "vram_buffer"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0, high=100000)
        if self.persistent_params is not None:
            check_whole("persistent_params", self.persistent_params, low=0, high=10**15)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a long run saves to disk.

    Attributes:
        checkpoint_every: save the run every so many steps; 0 only when it runs out of memory.
        keep_latents: save the final latents with a manifest, before they are decoded.
        name: the file name of those latents.
    """

    checkpoint_every: int = 5
    keep_latents: bool = True
    name: str = "wancore"

    def __post_init__(self) -> None:
        check_whole("checkpoint_every", self.checkpoint_every, low=0, high=10000)
        if not self.name.strip() or set(self.name) & set('/\\:*?"<>|') or self.name.startswith("."):
            raise ValueError(f"name must be a plain file name without folders; got {self.name!r}.")
        try:
            check_name(self.name, spare=len("_00001_.latent"))
        except ValueError as error:
            raise ValueError(f"name must be a plain file name, but {error}; got {self.name[:60]!r}.") from None


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Which noise levels a run goes through.

    Attributes:
        sigmas: noise levels in place of the solver's own schedule, falling from at most 1; replaces steps, shift and
            denoise of `SamplerSettings`.
        start_step, end_step: run only these steps of the schedule, the last one excluded, so that a run can be split.
    """

    sigmas: tuple[float, ...] | None = None
    start_step: int = 0
    end_step: int | None = None

    def __post_init__(self) -> None:
        if self.sigmas is None:
            return
        for sigma in self.sigmas:
            check_number("sigmas", sigma, low=0, high=1)
        if len(self.sigmas) < 2 or any(low >= high for high, low in pairwise(self.sigmas)):
            raise ValueError(
                f"sigmas must be at least two falling numbers from at most 1 to at least 0; got {self.sigmas}."
            )


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(ScheduleSettings):
    """How noise is drawn and denoised.

    Attributes:
        seed: of the initial noise, 0 to 2**64 - 1.
        steps: each evaluates the model once per branch, or as often as the solver needs.
        shift: moves the schedule towards high noise; 5 in the reference, 3 for image-to-video at 480p.
        denoise: 1 starts from noise; below 1 starts from a video with that much noise. All steps are run either way.
        solver: how a velocity becomes the next latents, a key of `SOLVERS`.
        rand_device: where the noise is drawn. `cpu` gives the same numbers on every machine.
        guidance: how the two branches are run and combined.
        cache: how steps are skipped.
        windows: for videos longer than the model was trained on.
        keep_projections: keep the keys and values of text and image from the first step for the others, which takes
            memory of the device. The plan of a run sets it; weights must not change during the run.
    """

    seed: int = 0
    steps: int = 50
    shift: float = 5.0
    denoise: float = 1.0
    solver: str = "euler"
    rand_device: str = "cpu"
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    cache: CacheSettings | None = None
    windows: WindowSettings | None = None
    keep_projections: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("seed", self.seed, low=0, high=MAX_SEED)
        check_whole("steps", self.steps, low=1, high=10000)
        check_number("shift", self.shift, low=0.01, high=1000)
        check_number("denoise", self.denoise, low=0, high=1)
        check_choice("solver", self.solver, SOLVERS)
        check_whole("end_step", self.last_step, low=1, high=self.total_steps)
        check_whole("start_step", self.start_step, low=0, high=self.last_step - 1)
        if self.is_part and self.windows is not None and self.windows.mode == "chain":
            raise ValueError("A chain of clips cannot be split by start_step: it finishes one clip after the other.")
        if self.is_part and isinstance(self.cache, MagCacheSettings) and self.cache.measures:
            raise ValueError("MagCache measures a model in a whole run: leave start_step and end_step out.")

    def of_expert(self, number: int) -> "SamplerSettings":
        """The settings as the expert of that number follows them."""
        return replace(self, guidance=self.guidance.of_expert(number))

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule, whatever part of it is run."""
        return self.steps if self.sigmas is None else len(self.sigmas) - 1

    @property
    def last_step(self) -> int:
        return self.total_steps if self.end_step is None else self.end_step

    @property
    def is_part(self) -> bool:
        """Whether only a part of the schedule is run."""
        return (self.start_step, self.last_step) != (0, self.total_steps)

    @property
    def starts_clean(self) -> bool:
        """Whether the run starts from a video with noise added, and not from noise alone."""
        return self.start_step == 0 and (self.denoise if self.sigmas is None else self.sigmas[0]) < 1

    def windows_over(self, frames: int, mode: WindowMode | None = None) -> WindowSettings | None:
        """The windows that a video of `frames` latent frames is made in; None where one window holds all of it, or
        where they are of another `mode` than the one that is asked for.
        """
        windows = self.windows
        if windows is None or windows.size >= frames or mode not in (None, windows.mode):
            return None
        return windows

    def frames_at_once(self, frames: int) -> int:
        """How many of a video's `frames` latent frames pass through the model at once."""
        windows = self.windows_over(frames)
        return frames if windows is None else windows.size
