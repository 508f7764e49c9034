"""The solvers by the names that users choose from."""

from collections.abc import Sequence

from ..settings import SamplerSettings
from .dpmpp import DPMpp2M
from .schedule import shifted_sigmas
from .solver import LCM, Euler, Solver
from .unipc import UniPC

SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "unipc": UniPC, "dpm++": DPMpp2M, "lcm": LCM}


def build_solver(settings: SamplerSettings) -> Solver:
    """The chosen solver on its own schedule, or on the noise levels that the user gave."""
    solver = SOLVERS[settings.solver]
    sigmas: Sequence[float] | None = settings.sigmas
    if sigmas is None:
        highest = min(settings.denoise, solver.HIGHEST)
        sigmas = shifted_sigmas(settings.steps, settings.shift, highest).tolist()
    return solver(sigmas, seed=settings.seed, rand_device=settings.rand_device)
