"""From settings to a predictor: the only place that knows which feature wraps which."""

import torch

from ..models.dit import WanDiT
from ..models.motion_controller import MotionController
from ..runtime import Runtime
from ..settings import SamplerSettings
from .guidance import Guided
from .predictor import ModelPredictor, Predictor
from .schedule import NUM_TRAIN_TIMESTEPS, SOLVERS, Solver, shifted_sigmas


def build_solver(settings: SamplerSettings) -> Solver:
    return SOLVERS[settings.solver](shifted_sigmas(settings.steps, settings.shift, settings.denoise))


def build_predictor(
    dit: WanDiT,
    solver: Solver,
    settings: SamplerSettings,
    runtime: Runtime,
    motion_controller: MotionController | None = None,
) -> Predictor:
    timesteps = torch.tensor(solver.sigmas[:-1]) * NUM_TRAIN_TIMESTEPS
    model = ModelPredictor(dit, timesteps, runtime, motion_controller=motion_controller)
    return Guided(model, settings.guidance)
