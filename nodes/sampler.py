"""The sampler, and the latents that it saved."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_core.cache_settings import CacheSettings
from wan_core.catalog import TINY_PRESET
from wan_core.model import VideoModel
from wan_core.models.config import Geometry
from wan_core.models.vae import denormalise
from wan_core.planning.encoders import checked_size
from wan_core.planning.job import Job
from wan_core.recommend import CHOICES, OFF
from wan_core.runtime import log
from wan_core.sampling.checkpoint import Checkpoint, RunState, find_latents, load_latents, manifest, save_latents
from wan_core.sampling.compose import build_solver
from wan_core.sampling.experts import RunInputs
from wan_core.sampling.solvers import SOLVERS
from wan_core.settings import (
    CFG_MODES,
    MAX_SEED,
    GuidanceMode,
    GuidanceSettings,
    MemorySettings,
    RunSettings,
    SamplerSettings,
    ScheduleSettings,
    WindowSettings,
)
from wan_core.tiling import AUTO
from wan_core.types import Conditioning, LatentSize, VideoSize
from wan_core.variants import check

from . import host, places, planning, sockets
from .vae import normalised_latents, with_known_latents

FOLDER = "wancore"
"""The subfolder of the output folder for saved latents and unfinished runs."""

SAME = -1.0
"""`cfg_low` that stands for `cfg`."""

STATE = "wancore_state"
"""The key of a LATENT under which a sampler that ran a part of the steps passes its state to the next."""


class Sampler:
    """Denoise latents with classifier-free guidance."""

    CATEGORY = "WanCore/sampling"
    FUNCTION = "sample"
    DESCRIPTION = "Generate the latents of a video. Decode them with VAE Decode (WanCore) or ComfyUI's own."
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Raw VAE latents; for Wan 2.1 (B, 16, frames, height / 8, width / 8).",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        rounded = (
            f"In pixels; rounded up to a size that the model can make, for Wan 2.1 a multiple of {sockets.SIDE}. "
            "Conditioning with pictures brings its own size, which counts."
        )
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader."),
                "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt."),
                "seed": sockets.whole(
                    0, 0, MAX_SEED, "The same seed gives the same noise on every machine.", control_after_generate=True
                ),
                "steps": sockets.whole(50, 1, 1000, "More steps: finer and slower."),
                "cfg": sockets.number(
                    5.0,
                    0.0,
                    100.0,
                    "How closely to follow the prompt. 1 ignores the negative prompt and is twice as fast.",
                ),
                "shift": sockets.number(
                    5.0, 0.01, 100.0, "Moves the schedule towards high noise: 3 for image to video at 480p, 5 usually."
                ),
                "solver": sockets.choice(
                    list(SOLVERS),
                    "euler",
                    "How a step is taken. unipc or dpm++: the authors' choice for 20 steps and more; euler: simple, "
                    "and right for Lightning; lcm: for LightX2V 2.1, Self-Forcing and FastWan; res_multistep: from 6 "
                    "steps on; heun: two evaluations a step. euler_ancestral, dpm++_sde and er_sde add fresh noise.",
                ),
                "width": sockets.whole(832, sockets.SIDE, sockets.MAX_SIDE, rounded, step=sockets.SIDE),
                "height": sockets.whole(480, sockets.SIDE, sockets.MAX_SIDE, rounded, step=sockets.SIDE),
                "num_frames": sockets.whole(
                    81,
                    1,
                    10001,
                    "Rounded up, for Wan 2.1 to 4k + 1: 81 is five seconds. 1 is a still.",
                    step=sockets.FRAMES,
                ),
            },
            "optional": cls._optional(),
            "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def _optional(cls) -> dict[str, Any]:
        return {
            "denoise": sockets.number(
                1.0, 0.0, 1.0, "Below 1 starts from the latent input with that much noise.", step=0.01
            ),
            "cfg_mode": sockets.choice(
                list(CFG_MODES), "sequential", "How the two branches of guidance run; the result is the same."
            ),
            "latent": sockets.socket(
                "LATENT",
                "A video to start from when denoise is below 1; its size replaces width, height and num_frames.",
            ),
            "cache": sockets.socket(sockets.CACHE, "Steps to skip, from a cache node such as TeaCache."),
            "windows": sockets.socket(sockets.WINDOWS, "A long video in pieces."),
            "prompts": sockets.socket(sockets.PROMPTS, "A prompt for each window, in place of the conditioning's."),
            "guidance": sockets.socket(sockets.GUIDANCE, "Guidance that changes over the steps, in place of cfg."),
            "schedule": sockets.socket(sockets.SCHEDULE, "Your own noise levels, or a part of the steps."),
            "run": sockets.socket(sockets.RUN, "What a long run saves to disk."),
            "memory": sockets.socket(sockets.MEMORY, "How much of the card may be used. Not linked: all that is free."),
            "cfg_low": sockets.number(
                SAME, SAME, 100.0, f"Of a model of two experts, cfg of the one for low noise. {SAME:g}: as cfg."
            ),
            "recommended": sockets.choice(
                list(CHOICES),
                OFF,
                "auto: the authors' steps, cfg, shift, solver and noise levels for the distilled LoRA on the "
                "model, or else for the model, in place of the widgets. Or those of the named few-step weights.",
            ),
            "more_motion": sockets.flag(
                False,
                "With recommended few-step settings: the first step has cfg 3.5 and no distilled LoRA, and there "
                "are two steps more. Users found that this brings back motion.",
            ),
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        cfg: float | None = None,
        shift: float | None = None,
        denoise: float | None = None,
        cfg_low: float | None = None,
        recommended: str | None = OFF,
        more_motion: bool | None = False,
    ) -> bool | str:
        """NaN passes the host's check of ranges, so it is refused here. Linked values are None, and checked later."""
        values: dict[str, Any] = {"shift": shift, "denoise": denoise}
        values = {name: value for name, value in values.items() if value is not None}
        # The host leaves the list to whoever names the input here.
        if recommended not in (None, *CHOICES):
            return f"Value not in list: recommended: {recommended!r:.80} is none of {', '.join(CHOICES)}."
        if more_motion and recommended == OFF:
            return f"more_motion changes recommended few-step settings; set recommended to {', '.join(CHOICES[1:])}."
        guidance = partial(_guidance, 1.0 if cfg is None else cfg, SAME if cfg_low is None else cfg_low)
        return sockets.true_or_message(lambda: SamplerSettings(guidance=guidance(), **values))

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size and the settings of the bundled models."""
        settings = ("steps", "cfg", "shift", "solver")
        values = {name: getattr(TINY_PRESET, name) for name in settings}
        return {**host.TINY_SIZE, **values, "recommended": OFF}

    @classmethod
    def plan_outputs(
        cls, model: Any, conditioning: Any, seed: Any, width: int, height: int, num_frames: int, **inputs: Any
    ) -> tuple[planning.PlannedRun]:
        handle = planning.require(planning.PlannedModel, "model", model)
        cond = planning.require(planning.PlannedConditioning, "conditioning", conditioning)
        size = cond.size or VideoSize.rounded(width, height, cond.num_frames or num_frames, handle.geometry)
        latent = inputs.get("latent")
        if isinstance(latent, planning.PlannedLatent) and inputs["denoise"] < 1:
            encoded = replace(cond.sizes, encoded_frames=size.latent.frames)
            cond = replace(cond, sizes=encoded, vae=latent.vae, tiles=latent.tiles)
        check(handle.variant, cond.names, handle.name, handle.motion_controller is not None)
        options = ("guidance", "schedule", "cache", "windows", "memory")
        known = {name: planning.or_none(inputs.get(name)) for name in options}
        settings = _settings(
            _guidance(inputs["cfg"], inputs.get("cfg_low", SAME)), inputs["cfg_mode"], known["guidance"],
            known["schedule"],
            seed=0 if isinstance(seed, planning.Unknown) else seed, steps=inputs["steps"], shift=inputs["shift"],
            denoise=inputs["denoise"], solver=inputs["solver"], cache=known["cache"],
            windows=cond.windows or known["windows"],
        )  # fmt: skip
        settings = handle.recommended(inputs.get("recommended", OFF), settings, inputs.get("more_motion", False))
        job = Job(
            name=handle.name, experts=handle.experts, size=size, settings=settings, given=cond.sizes,
            motion_controller=handle.motion_controller, text_encoder=cond.text_encoder,
            image_encoder=cond.image_encoder, vae=cond.vae, decodes=False,
            tiles={"encode": cond.tiles, "decode": AUTO}, memory=known["memory"] or MemorySettings(),
            ranks=handle.ranks,
        )  # fmt: skip
        return (planning.PlannedRun(job),)

    def sample(
        self,
        model: VideoModel,
        conditioning: Conditioning,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        solver: str,
        width: int,
        height: int,
        num_frames: int,
        denoise: float = 1.0,
        cfg_mode: GuidanceMode = "sequential",
        latent: dict[str, Any] | None = None,
        cache: CacheSettings | None = None,
        windows: WindowSettings | None = None,
        prompts: tuple[Conditioning, ...] = (),
        guidance: GuidanceSettings | None = None,
        schedule: ScheduleSettings | None = None,
        run: RunSettings | None = None,
        memory: MemorySettings | None = None,
        cfg_low: float = SAME,
        recommended: str = OFF,
        more_motion: bool = False,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any]]:
        settings = _settings(
            _guidance(cfg, cfg_low), cfg_mode, guidance, schedule, seed=seed, steps=steps, shift=shift, denoise=denoise,
            solver=solver, cache=model.resolved(cache), windows=windows,
        )  # fmt: skip
        model, settings = model.recommended(recommended, settings, more_motion=more_motion)
        geometry = model.geometry
        given = conditioning
        conditioning = with_known_latents(given, latent or {}, geometry)
        start, size = None, _size(conditioning, checked_size(width, height, num_frames, geometry))
        # At full noise a latent has no effect, so it is ignored. Otherwise its size is that of the video.
        if latent is not None and (settings.starts_clean or settings.start_step):
            start = normalised_latents(latent, geometry)
            if settings.start_step:
                start = start * _signal(settings, settings.start_step)
            size = LatentSize.of(start, geometry).video
        elif latent is not None and conditioning is given:
            log.warning("The latent has no effect at denoise 1: lower denoise to start from it, or remove its link.")
        run = run or RunSettings(checkpoint_every=0, keep_latents=False)
        here = host.current
        checkpoint = Checkpoint(here.output_dir() / FOLDER, run.checkpoint_every)
        inputs = RunInputs(model.fit(conditioning, size), size.latent, start, tuple(prompts))
        state = model.sample(
            inputs, settings, memory or here.memory_settings(), here.runtime(model.dtype, geometry),
            checkpoint=checkpoint, earlier=_earlier_state(latent, settings, geometry), keep=here.keeps_weights(),
        )  # fmt: skip
        if (film := conditioning.continues) is not None:
            latents = torch.cat((state.latents[:, :, : state.prefix], film.joined(state.video)), 2)
            state = replace(state, latents=latents)
            size = LatentSize.of(state.video, geometry).video
        # Weights that stayed on the device: ComfyUI counts them from now on, and evicts them when others need memory.
        for module in model.modules:
            here.register_weights(module)
        return (_latent_output(state, settings, size, run, checkpoint, extra_pnginfo),)


def _size(conditioning: Conditioning, typed: VideoSize) -> VideoSize:
    """The size of the video: that which the conditioning was made for, if it has one."""
    size = conditioning.size or typed
    if size != typed:
        log.info("The size is that of the pictures: %s, not %s as typed here.", size, typed)
    return size


def _guidance(cfg: float, cfg_low: float) -> GuidanceSettings:
    return GuidanceSettings(scale=cfg, scale_low=None if cfg_low == SAME else cfg_low)


def _settings(
    own: GuidanceSettings,
    cfg_mode: GuidanceMode,
    guidance: GuidanceSettings | None,
    schedule: ScheduleSettings | None,
    **others: Any,
) -> SamplerSettings:
    """The settings of the widgets and of the sockets `guidance` and `schedule`, which replace some of them."""
    guidance = replace(guidance or own, mode=cfg_mode)
    return SamplerSettings(guidance=guidance, **vars(schedule or ScheduleSettings()), **others)


def _earlier_state(latent: dict[str, Any] | None, settings: SamplerSettings, geometry: Geometry) -> RunState | None:
    """The state that an earlier sampler attached to its latents; None when the latents were changed since."""
    state = (latent or {}).get(STATE)
    if latent is None or not settings.start_step or state is None:
        return None
    if state.step != settings.start_step:
        raise ValueError(
            f"start_step is {settings.start_step}, but the sampler before ended at step {state.step}; make them equal."
        )
    # A node between both samplers may have changed the latents: then a multistep solver's history is wrong for them.
    return state if torch.equal(_raw(state, settings, geometry), latent["samples"]) else None


def _signal(settings: SamplerSettings, step: int) -> float:
    """The share of the video in latents after `step` steps. ComfyUI's samplers divide latents with leftover noise by
    it, and multiply those that they continue (`comfy.model_sampling.CONST`).
    """
    return 1 - build_solver(settings).sigmas[step]


def _raw(state: RunState, settings: SamplerSettings, geometry: Geometry) -> Tensor:
    """The latents of a state as ComfyUI's samplers pass them on."""
    signal = _signal(settings, state.step)
    return denormalise(state.video if signal == 1 else state.video / signal, geometry)


def _latent_output(
    state: RunState,
    settings: SamplerSettings,
    size: VideoSize,
    run: RunSettings,
    checkpoint: Checkpoint,
    extra_pnginfo: dict[str, Any] | None,
) -> dict[str, Any]:
    """The LATENT of a state, with its settings added to the metadata of the files that the host saves."""
    raw = _raw(state, settings, size.geometry)
    record = manifest(settings, size, state.video, state.kernels)
    if run.keep_latents:
        _save_latents(host.current.output_dir() / FOLDER, run.name, raw, record, checkpoint.resumed)
    # Only after the video is saved: when decoding fails, the next attempt resumes at the last step.
    if state.run and state.step == settings.total_steps:
        host.current.when_saved(partial(checkpoint.remove, state.run))
    if extra_pnginfo is not None:
        extra_pnginfo.setdefault("wancore", []).append(record)
    # The state of a complete run is left out: nothing continues it, and ComfyUI would cache a second copy of the video.
    return {"samples": raw, STATE: state} if settings.is_part else {"samples": raw}


def _save_latents(folder: Path, name: str, raw: Tensor, record: dict[str, Any], resumed: bool) -> None:
    """Save latents, unless a resumed run had saved them already. A full disk gives a warning, and the run goes on."""
    try:
        path = (find_latents(folder, name, record) if resumed else None) or save_latents(folder, name, raw, record)
    except (OSError, ValueError) as error:
        log.warning("The latents cannot be kept (%s); the run goes on.", error)
    else:
        log.info("Latents are saved in %s.", path)


class LoadLatents:
    """Latents of an earlier run."""

    CATEGORY = "WanCore/long video"
    FUNCTION = "load"
    DESCRIPTION = "Load latents that a sampler with Long Run saved, to decode them or to start from them."
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Raw VAE latents; for Wan 2.1 (B, 16, frames, height / 8, width / 8).",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "file": sockets.line("wancore/wancore_00001_.latent", "A .latent file in the output or input folder."),
            },
            "hidden": {"extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, file: str | None = None) -> bool | str:
        return True if file is None else sockets.true_or_message(lambda: places.saved_file(file))

    @classmethod
    def IS_CHANGED(cls, file: str, **_: Any) -> float:
        return places.saved_file(file).stat().st_mtime

    def load(self, file: str, extra_pnginfo: dict[str, Any] | None = None) -> tuple[dict[str, Tensor]]:
        raw, record = load_latents(places.saved_file(file))
        if extra_pnginfo is not None and record:
            extra_pnginfo.setdefault("wancore", []).append(record)
        return ({"samples": raw},)
