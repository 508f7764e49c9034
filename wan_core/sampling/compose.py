"""From settings to a predictor: the only place where the nesting of features is decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..cache_settings import EasyCacheSettings, FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from ..models.dit import WanDiT
from ..models.layers import MotionController
from ..parallel.mesh import Mesh
from ..runtime import Runtime, log
from ..settings import SamplerSettings
from ..types import Conditioning
from . import skip_rules
from .checkpoint import HasMemory
from .guidance import Guided, first_steps
from .predictor import (
    AllBlocks,
    BlockRunner,
    BranchPredictor,
    ModelPredictor,
    Predictor,
    TimeTable,
    motion_offset,
)
from .skip_rules import EasyCache, FirstBlock, Magnitudes, MeasuredBlocks
from .solvers import SOLVERS, Solver, shifted_sigmas
from .split import SplitBranches, mesh_of
from .step_cache import CachedBlocks, SkipRule
from .windows import Windowed

FEWEST_CACHED_STEPS = 4
"""Fewer steps change so much from one to the next that none can be skipped."""


def build_solver(settings: SamplerSettings) -> Solver:
    """The solver of `settings` on its own schedule, or on the noise levels of `settings.sigmas`."""
    solver = SOLVERS[settings.solver]
    sigmas: Sequence[float] | None = settings.sigmas
    if sigmas is None:
        highest = min(settings.denoise, solver.HIGHEST)
        sigmas = shifted_sigmas(settings.steps, settings.shift, highest, exact_ends=not solver.WHOLE_TIMESTEPS).tolist()
    return solver(sigmas, seed=settings.seed, rand_device=settings.rand_device)


@dataclass(frozen=True)
class Composed:
    """A predictor, those of its parts that remember tensors from step to step, and the mesh that it runs on."""

    predict: Predictor
    memories: Mapping[str, HasMemory]
    mesh: Mesh | None = None


def compose(
    dit: WanDiT,
    solver: Solver,
    cond: Conditioning,
    frames: int,
    settings: SamplerSettings,
    runtime: Runtime,
    motion_controller: MotionController | None = None,
    prompts: Sequence[Conditioning] = (),
    *,
    shares: Sequence[range] = (),
    magnitudes: Magnitudes | None = None,
) -> Composed:
    """The predictor of one run: step cache, model, guidance, windows, from the inside out.

    Args:
        cond: what the run is conditioned on; `prompts` replace its text, one window after the other.
        frames: latent frames of the video, without reference frames.
        shares: the steps of each expert of the run, one after the other; all are one model's if there are none.
        magnitudes: filled with what `MeasuredBlocks` measures, if the settings ask for it.
    """
    time, mesh = TimeTable(dit, solver.evaluations, cond), mesh_of(runtime, settings)
    blocks: BlockRunner = AllBlocks(dit, runtime)
    memories: dict[str, HasMemory] = {}
    windows = settings.windows_over(frames, "blend")
    rule = _skip_rule(settings, time, motion_controller, cond, shares)
    if isinstance(settings.cache, MagCacheSettings) and settings.cache.measures:
        blocks = MeasuredBlocks(blocks, magnitudes or Magnitudes())
    if rule is not None and settings.cache is not None:
        # There is a residual per window, so with windows they grow with the video and are kept in host memory.
        on_cpu = settings.cache.residual_on_cpu or windows is not None
        blocks = memories["cache"] = CachedBlocks(blocks, rule, dit.dtype, on_cpu=on_cpu, mesh=mesh)
    # A projection is kept for one window only, so with several windows none would ever be used again.
    keep = settings.keep_projections and windows is None
    guidance = settings.guidance
    model: BranchPredictor = ModelPredictor(
        dit, time, blocks, motion_controller, guidance=guidance, keep=keep, mesh=mesh
    )
    if mesh is not None and mesh.layout.cfg > 1:
        # All branches in one call, whatever the mode: each row takes its own.
        model, guidance = SplitBranches(model, mesh), replace(guidance, mode="interleaved")
    # Guidance is the innermost wrapper because it needs the branches apart; it commutes with the mean over windows.
    predict: Predictor = Guided(model, guidance)
    if windows is not None:
        predict = Windowed(predict, windows, frames, prompts)
    return Composed(predict, memories, mesh)


def _skip_rule(
    settings: SamplerSettings,
    time: TimeTable,
    controller: MotionController | None,
    cond: Conditioning,
    shares: Sequence[range],
) -> SkipRule | None:
    steps, cache = settings.total_steps, settings.cache
    if cache is None or (isinstance(cache, MagCacheSettings) and cache.measures):
        return None
    if steps < FEWEST_CACHED_STEPS:
        log.warning("The step cache is off: it needs at least %d steps, this run has %d.", FEWEST_CACHED_STEPS, steps)
        return None
    forced = first_steps(settings.guidance, steps)
    match cache:
        case EasyCacheSettings():
            return EasyCache(cache, steps, forced)
        case FirstBlockSettings():
            return FirstBlock(cache, steps, forced)
        case MagCacheSettings():
            plan = skip_rules.magcache_plan(cache, shares or (range(steps),), forced)
            log.info("MagCache (%s, threshold %.4g) %s.", cache.template, plan.threshold, plan.summary())
            return plan
        case TeaCacheSettings():
            motion = motion_offset(controller, cond)
            modulations = time.modulations[:, None]  # (N, 1, 6, D), what the blocks get in each step
            modulations = modulations if motion is None else modulations + motion.to(modulations)
            plan = skip_rules.teacache_plan(modulations, cache, forced)
            log.info("TeaCache (%s, threshold %.4g) %s.", cache.template, plan.threshold, plan.summary())
            return plan
