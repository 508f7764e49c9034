"""Distilled checkpoints and LoRAs, which make a video in a few steps: the settings that their authors publish.

They are recognised by their names, which a LoRA's metadata may also hold, and one of them by its tensors. A row says
what is recommended, never what a file is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .settings import GuidanceSettings, SamplerSettings


@dataclass(frozen=True, kw_only=True)
class FewSteps:
    """The settings of one kind of distilled weights.

    Attributes:
        name: of the row, as users choose it.
        pattern: a regular expression that the lower-case path or title of a file contains; `[-_. ]` is written `_`.
        source: where the numbers were published.
        steps, shift, cfg, solver: as of `SamplerSettings`.
        sigmas: the noise levels, where the authors list them; they take the place of steps and shift.
        strength: of a LoRA.
    """

    name: str
    pattern: str
    source: str
    steps: int
    shift: float = 5.0
    cfg: float = 1.0
    solver: str = "euler"
    sigmas: tuple[float, ...] | None = None
    strength: float = 1.0

    @property
    def summary(self) -> str:
        """The settings in words."""
        levels = f"shift {self.shift:g}"
        if self.sigmas is not None:
            levels = f"noise levels {', '.join(f'{sigma:g}' for sigma in self.sigmas)}"
        strength = "" if self.strength == 1 else f", LoRA strength {self.strength:g}"
        settings = f"{self.steps} steps, cfg {self.cfg:g}, {levels}, solver {self.solver}{strength}"
        return f"{settings} ({self.name}; {self.source})"


# In this order: the first row whose pattern is found counts, so that the names of merges (FusionX holds CausVid and
# AccVideo) and of the newer generation come before the general ones.
FEW_STEPS: tuple[FewSteps, ...] = (
    FewSteps(
        name="FusionX", pattern="fusi?oni?x", steps=8, shift=2.0, solver="unipc",
        source="MeiGen-AI/InfiniteTalk README; the author names UniPC and cfg 1",
    ),
    FewSteps(
        name="FastWan", pattern="fast_?wan", steps=3, shift=8.0, solver="lcm", sigmas=(1.0, 0.757, 0.522, 0.0),
        source="hao-ai-lab/FastVideo fastvideo/configs/pipelines/wan.py",
    ),
    FewSteps(
        name="CausVid 1.3B", pattern="caus_?vid.*1_?3b|1_?3b.*caus_?vid", steps=4,
        sigmas=(1.0, 0.75, 0.5, 0.25, 0.0), source="kijai/ComfyUI-WanVideoWrapper, scheduler flowmatch_causvid",
    ),
    FewSteps(
        name="CausVid 14B", pattern="caus_?vid", steps=9,
        sigmas=(0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074, 0.0), strength=0.5,
        source="ModelTC/LightX2V causvid configuration; strength: Kijai's page of the LoRA",
    ),
    FewSteps(
        name="AccVideo", pattern="acc_?(?:vid|wan)", steps=10, solver="unipc", source="aejion/AccVideo README",
    ),
    FewSteps(
        name="Lightning 2.2",
        pattern="(?=.*(?:wan_?2_?2|a14b))(?=.*(?:lightning|lightx2v|seko|4_?steps?))|lightning.*(?:high|low)_?noise",
        steps=4, source="ModelTC/Wan2.2-Lightning #3; ModelTC/LightX2V Wan22StepDistillScheduler",
    ),
    FewSteps(
        name="5B Turbo", pattern="5b_?turbo|turbo_?5b", steps=4, solver="lcm",
        source="quanhaol/Wan2.2-TI2V-5B-Turbo README, which uses Self-Forcing's sampler",
    ),
    FewSteps(
        name="Self-Forcing", pattern="self_?forcing", steps=4, solver="lcm",
        source="hao-ai-lab/FastVideo SelfForcingWanT2V480PConfig",
    ),
    FewSteps(
        name="LightX2V 2.1", pattern="lightx2v|step_?distill|cfg_?distill", steps=4, solver="lcm",
        source="ModelTC/LightX2V configs/distill/wan21, WanStepDistillScheduler",
    ),
)  # fmt: skip

TITLES = ("modelspec.title", "ss_output_name", "name", "title", "general.name", "general.basename")
"""Metadata of safetensors and GGUF files in which programs keep a file's first name."""

_LIGHTNING_RANK, _LIGHTNING_ALPHA = 64, 8


class StoredEntry(Protocol):
    """What a header says of one tensor."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Any: ...


def names_of(path: Path) -> tuple[str, str]:
    """What `recognise` is to look at: the name of a file, then its folder's too, which some publishers name it by."""
    return path.name, f"{path.parent.name}/{path.name}"


def named(name: str) -> FewSteps:
    """The row of that name.

    Raises:
        ValueError: there is none.
    """
    found = next((row for row in FEW_STEPS if row.name == name), None)
    if found is None:
        known = ", ".join(row.name for row in FEW_STEPS)
        raise ValueError(f"There are no few-step settings called {name!r}; known are {known}.")
    return found


def recognise(
    names: Iterable[str], metadata: Mapping[str, str] | None = None, header: Mapping[str, StoredEntry] | None = None
) -> FewSteps | None:
    """The row of a file of these names, the most telling first, and of this metadata and header; None if it is none.

    A LoRA that was renamed is still known as Lightning's by its tensors: no other has alphas as 64-bit integers beside
    factors of rank 64 (ModelTC/Wan2.2-Lightning).
    """
    titles = [value for key in TITLES if (value := (metadata or {}).get(key))]
    for text in (*names, *titles):
        plain = re.sub(r"[-_. ]+", "_", text.lower())
        if row := next((row for row in FEW_STEPS if re.search(row.pattern, plain)), None):
            return row
    entries = header or {}
    alphas = [key for key, entry in entries.items() if key.endswith(".alpha") and entry.dtype == torch.int64]
    if alphas and len(alphas) > len(entries) / 4:
        downs = [entry for key, entry in entries.items() if ".lora_down." in key or ".lora_A." in key]
        if downs and all(tuple(entry.shape)[:1] == (_LIGHTNING_RANK,) for entry in downs):
            return named("Lightning 2.2")
    return None


def applied(row: FewSteps, settings: SamplerSettings) -> SamplerSettings:
    """`settings` with the recommended steps, shift, cfg, solver and noise levels of `row`.

    Guidance beside cfg (NAG, skip-layer guidance) stays. Of a run from a video, the noise levels start as low as
    `denoise` says, so the authors' list is not used.
    """
    sigmas = row.sigmas if settings.denoise == 1 else None
    guidance = replace(settings.guidance, scale=row.cfg, scale_low=None, start=0.0, end=1.0)
    return replace(settings, steps=row.steps, shift=row.shift, solver=row.solver, sigmas=sigmas, guidance=guidance)


MOTION_STEPS, MOTION_CFG = 2, 3.5
"""More steps, and the guidance of the first of them, by which users bring back motion that distilled LoRAs lose: the
first step has guidance and no LoRA (workflows linked in ModelTC/Wan2.2-Lightning #13; vita-epfl/Stable-Video-Infinity
#66).
"""


def with_motion(settings: SamplerSettings) -> SamplerSettings:
    """Few-step `settings` with guidance in the first step and `MOTION_STEPS` more steps; of a list of noise levels the
    number of steps stays.
    """
    steps = settings.steps + (0 if settings.sigmas is not None else MOTION_STEPS)
    guidance: GuidanceSettings = replace(settings.guidance, scale=MOTION_CFG, scale_low=None, start=0.0, end=0.0)
    return replace(settings, steps=steps, guidance=guidance)
