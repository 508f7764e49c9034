"""The sampling loop, and the run around it: noise in, latents out."""

import torch
from torch import Tensor

from ..models.dit import WanDiT
from ..models.motion_controller import MotionController
from ..runtime import Runtime
from ..settings import SamplerSettings
from ..types import Conditioning, LatentSize, StepInfo
from .compose import build_predictor, build_solver
from .noise import initial_noise
from .predictor import Predictor
from .schedule import NUM_TRAIN_TIMESTEPS, Solver, add_noise


LATENT_CHANNELS = 16


def denoise(predict: Predictor, solver: Solver, x: Tensor, cond: Conditioning, runtime: Runtime) -> Tensor:
    """Latents at the end of `solver`'s schedule, from latents `x` (B, 16, R + F, h, w) at its start."""
    total = len(solver.sigmas) - 1
    for index, sigma in enumerate(solver.sigmas[:-1]):
        runtime.check_cancelled()
        velocity = predict(x, sigma * NUM_TRAIN_TIMESTEPS, cond, StepInfo(index, total))
        x = solver.step(velocity, index, x)
        runtime.on_progress("Sampling", index + 1, total, x)
    return x


@torch.no_grad()
def sample(
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    runtime: Runtime,
    start: Tensor | None = None,
    motion_controller: MotionController | None = None,
) -> Tensor:
    """Normalised latents (B, 16, F, h, w) in float32, drawn from noise or from `start`.

    Reference frames that conditioning puts in front of the video are denoised with it and left out of the result.

    Args:
        cond: fitted to the model (`conditioning.slots.fit`); its tensors may lie on any device.
        start: normalised latents of that size for `settings.denoise` below 1; ignored at 1.

    Raises:
        ValueError: an input does not fit the model or the size, or `denoise` is below 1 without `start`.
    """
    shape = (cond.text.shape[0], dit.config.out_channels, *size.shape)
    if settings.denoise < 1 and start is None:
        raise ValueError(f"denoise {settings.denoise:g} starts from a video; give one, or set denoise to 1.")
    if start is not None and tuple(start.shape) != shape:
        raise ValueError(f"The latents to start from are {tuple(start.shape)}, but this run needs {shape}.")
    if settings.denoise == 0:
        return start.float()
    solver = build_solver(settings)
    prefix = cond.prefix_frames(size.frames)
    x = initial_noise(shape, settings.seed, settings.rand_device, runtime.device, prefix)
    if settings.denoise < 1:
        start = start.to(x)
        if prefix:
            start = torch.cat((reference_latents(cond, prefix).to(x), start), 2)
        x = add_noise(start, x, solver.sigmas[0])
    predict = build_predictor(dit, solver, settings, runtime, motion_controller)
    return denoise(predict, solver, x, cond, runtime)[:, :, prefix:]


def reference_latents(cond: Conditioning, prefix: int) -> Tensor:
    """The clean latents (B, 16, R, h, w) of the reference frames; each lies in the inactive part of one VACE input."""
    return sum(vace.context[:, :LATENT_CHANNELS, :prefix] for vace in cond.vace)
