"""The sampler: model and conditioning to latents."""

from typing import Any

from torch import Tensor

from ..wan_core.memory.residency import on_device
from ..wan_core.models.vae import denormalise, normalise
from ..wan_core.prepare import VideoModel
from ..wan_core.sampling.loop import sample
from ..wan_core.settings import CFG_MODES, MAX_SEED, SOLVER_NAMES, GuidanceSettings, SamplerSettings
from ..wan_core.types import Conditioning, LatentSize, VideoSize
from . import host, sockets


class Sampler:
    """Denoise latents with classifier-free guidance."""

    CATEGORY = "WanCore/sampling"
    FUNCTION = "sample"
    DESCRIPTION = "Generate the latents of a video. Decode them with VAE Decode (WanCore) or ComfyUI's own."
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Raw VAE latents, (B, 16, frames, height / 8, width / 8).",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"step": 16}
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader."),
                "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt."),
                "seed": sockets.whole(
                    0, 0, MAX_SEED, "The same seed gives the same video on every machine.", control_after_generate=True
                ),
                "steps": sockets.whole(50, 1, 1000, "More steps: finer and slower."),
                "cfg": sockets.number(
                    5.0, 0.0, 100.0, "How closely to follow the prompt. 1 ignores the negative prompt, twice as fast."
                ),
                "shift": sockets.number(
                    5.0, 0.01, 100.0, "Moves the schedule towards high noise: 3 for image to video at 480p, 5 usually."
                ),
                "solver": sockets.choice(list(SOLVER_NAMES), "euler", "How a step is taken."),
                "width": sockets.whole(832, 16, sockets.MAX_SIDE, "In pixels; rounded up to a multiple of 16.", **side),
                "height": sockets.whole(
                    480, 16, sockets.MAX_SIDE, "In pixels; rounded up to a multiple of 16.", **side
                ),
                "num_frames": sockets.whole(
                    81, 1, 10001, "Rounded up to 4k + 1; 81 is five seconds, 1 a still.", step=4
                ),
            },
            "optional": {
                "denoise": sockets.number(
                    1.0, 0.0, 1.0, "Below 1 starts from the latent input with that much noise.", step=0.01
                ),
                "cfg_mode": sockets.choice(
                    list(CFG_MODES), "sequential", "How the two branches of guidance run; the result is the same."
                ),
                "latent": sockets.socket("LATENT", "A video to start from when denoise is below 1; its size counts."),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """Sizes and steps that take a second on any machine."""
        return {**host.TINY_SIZE, "steps": 4}

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
        cfg_mode: str = "sequential",
        latent: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor]]:
        guidance = GuidanceSettings(scale=cfg, mode=cfg_mode)
        settings = SamplerSettings(
            seed=seed, steps=steps, shift=shift, denoise=denoise, solver=solver, guidance=guidance
        )
        start = None
        size = VideoSize.rounded(width, height, num_frames)
        if latent is not None and denoise < 1:
            start = normalise(latent["samples"])
            size = VideoSize.of_latent(LatentSize(*start.shape[2:]))
        cond = model.fit(conditioning, size)
        dit = model.dit
        runtime = host.runtime(dit.dtype, host.weight_bytes(dit))
        with model.adapted(steps, runtime.device) as run, on_device(dit, runtime.device):
            latents = sample(
                dit, cond.to(runtime.device), size.latent, settings, run.follow(runtime), start, model.motion_controller
            )
        return ({"samples": denormalise(latents).cpu()},)
