"""The sampling loop: a predictor and a solver from one noise level to the next."""

from collections.abc import Callable

from torch import Tensor

from ..runtime import Runtime
from ..types import Conditioning, StepInfo
from .predictor import Predictor
from .solver import Solver

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each step with the number of steps done, the latents, and the clean latents they point at."""


def denoise(
    predict: Predictor,
    solver: Solver,
    x: Tensor,
    cond: Conditioning,
    runtime: Runtime,
    *,
    steps: range | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Latents after `steps` (all by default) of `solver`'s schedule, from latents `x` (B, 16, R + F, h, w) before."""
    total = len(solver.sigmas) - 1
    for index in range(total) if steps is None else steps:
        runtime.check_cancelled()
        runtime.before_step(index, total)
        velocity = predict(x, solver.timesteps[index], cond, StepInfo(index, total))
        clean = solver.clean(velocity, index, x) if on_step else x
        x = solver.step(velocity, index, x)
        if on_step:
            on_step(index + 1, x, clean)
    return x
