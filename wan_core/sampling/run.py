"""A sampling run: noise in, latents out, in one piece, in parts, or as a chain of clips."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, reduce

import torch
from torch import Tensor

from ..cache_settings import MagCacheSettings
from ..models import kernels
from ..runtime import OutOfMemoryError, Runtime, is_out_of_memory, log
from ..settings import SamplerSettings
from ..tiling import Span, plan_spans
from ..types import Conditioning, StepInfo
from .checkpoint import Checkpoint, HasMemory, RunState, digest, digest_run, digest_weights, memory_of, restore
from .compose import Composed, build_solver
from .experts import Active, RunInputs, RunModel, expert_at
from .parallel import composed, leading
from .predictor import Predictor, check_latents
from .skip_rules import Magnitudes
from .solvers import Solver, add_noise, initial_noise
from .windows import (
    Anchored,
    CleanFrames,
    colour_corrected,
    cut,
    window_of,
    window_reports,
    with_known_frames,
    with_text,
)

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each step with the number of steps done, the latents, and the model's estimate of the clean latents."""


def denoise(
    predict: Predictor,
    solver: Solver,
    x: Tensor,
    cond: Conditioning,
    runtime: Runtime,
    *,
    steps: range | None = None,
    on_step: OnStep | None = None,
    put: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Latents after `steps` (all by default) of `solver`'s schedule, from the latents `x` (B, z, R + F, h, w) before
    them; `put` replaces them before the first step and after each.
    """
    total, x = len(solver.sigmas) - 1, put(x)
    for index in range(total) if steps is None else steps:
        runtime.check_cancelled()
        runtime.before_step(index, total)

        def evaluate(x: Tensor, number: int, index: int = index) -> Tensor:
            info = StepInfo(index, total, evaluation=number)
            return predict(x, solver.evaluations[index][number], cond, info)

        velocity = evaluate(x, 0)
        # Before `advance`: a solver may replace the velocity by one of a later evaluation.
        clean = solver.clean(velocity, index, x) if on_step else x
        x = put(solver.advance(velocity, index, x, evaluate))
        if on_step:
            on_step(index + 1, x, clean)
    return x


@torch.no_grad()
def sample(
    model: RunModel,
    inputs: RunInputs,
    settings: SamplerSettings,
    runtime: Runtime,
    *,
    checkpoint: Checkpoint | None = None,
    earlier: RunState | None = None,
) -> RunState:
    """Run the steps that `settings` select and return the state after them, on the CPU.

    Reference frames that conditioning puts in front of the video are denoised with it.

    Args:
        checkpoint: where the state is saved during the run. An interrupted run continues from there, even when all its
            steps are done; pass the `run` of the state to `checkpoint.remove` once the video is saved.
        earlier: the state at the end of an earlier part of this schedule, in place of `inputs.start`.

    Raises:
        ValueError: an input does not match the model or the size, latents to start from are missing, or the model
            returned NaN or infinity.
        OutOfMemoryError: the device is too small; the steps that are done are kept in `checkpoint`.
    """
    run = _Run(model, inputs, settings, runtime, checkpoint)
    run.check(earlier)
    if settings.sigmas is None and settings.denoise == 0:
        assert inputs.start is not None, "`check` refuses a run from nothing to nothing"
        return RunState(latents=inputs.start.float().cpu(), prefix=0, step=settings.total_steps)
    with kernels.run(), model, leading(runtime.ranks, model.task):
        return run.execute(earlier)


class _Run:
    """One run: its inputs, which stay as they are, and the steps from noise to latents."""

    def __init__(
        self,
        model: RunModel,
        inputs: RunInputs,
        settings: SamplerSettings,
        runtime: Runtime,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model, self.inputs, self.settings, self.runtime = model, inputs, settings, runtime
        self.cond, self.size, self.prompts, self.checkpoint = inputs.cond, inputs.size, inputs.prompts, checkpoint
        self.shape = (len(self.cond.encoded_text), model.first.config.out_channels, *self.size.shape)
        self.prefix = self.cond.prefix_frames(self.size.frames)
        frames, windows = self.size.frames, settings.windows_over(self.size.frames)
        self.film = self.cond.continues
        self.chained = self.film is not None or (windows is not None and windows.mode == "chain")
        self.spans = [Span(0, frames, True, True)]
        if windows is not None:
            self.spans = plan_spans(frames, windows.size, windows.stride)
        self.start: Tensor | None = None
        measures = isinstance(settings.cache, MagCacheSettings) and settings.cache.measures
        # Beside the parts of each expert, because it goes on from one to the next.
        self.measures = {"magnitudes": Magnitudes()} if measures else {}

    def check(self, earlier: RunState | None) -> None:
        """Raise ValueError for what cannot run, before weights are moved."""
        settings, start = self.settings, self.inputs.start
        if start is not None and tuple(start.shape) != self.shape:
            raise ValueError(f"The latents to start from are {tuple(start.shape)}; this run needs {self.shape}.")
        if earlier is not None and tuple(earlier.video.shape) != self.shape:
            raise ValueError(f"The earlier run has latents {tuple(earlier.video.shape)}; this one needs {self.shape}.")
        skipped, count = settings.guidance.skip.blocks, self.model.first.config.num_layers
        if skipped and max(skipped) >= count:
            raise ValueError(f"skip_blocks has block {max(skipped)}; this model has blocks 0 to {count - 1}.")
        if settings.guidance.nag.is_on and self.cond.negative_text is None:
            raise ValueError("nag_scale needs a negative prompt; this conditioning has none.")
        if start is None and earlier is None and settings.start_step:
            raise ValueError(f"start_step {settings.start_step} continues an earlier sampler; connect its latents.")
        if start is None and settings.starts_clean:
            strength = settings.denoise if settings.sigmas is None else settings.sigmas[0]
            raise ValueError(f"denoise {strength:g} starts from a video; give one, or set denoise to 1.")

    @cached_property
    def digest(self) -> str:
        """Identifies everything that decides the result.

        It reads all of the conditioning, so it is computed only for runs that are saved.
        """
        # Of the weights between runs: read it before an expert is active, whose weights are moved and hold LoRAs.
        controller = None if self.model.motion_controller is None else self.model.motion_controller.state_dict()
        first, *others = self.model.experts
        applied = tuple(lora.fingerprint for lora in first.loras)
        boundaries = [expert.lowest for expert in self.model.experts[:-1]]
        further = [(digest_weights(expert.dit), [lora.fingerprint for lora in expert.loras]) for expert in others]
        values = (self.prompts, self.start, controller, self.runtime.dtype, applied, *boundaries, *further)
        return digest_run(first.dit, self.cond, self.size, self.settings, *values)

    @cached_property
    def schedule(self) -> str:
        return digest(self.settings.solver, build_solver(self.settings).sigmas)

    def execute(self, earlier: RunState | None) -> RunState:
        """The state after the last step, on the CPU."""
        start = self.inputs.start
        # An earlier state takes the place of a start, and then must not count in the digest.
        self.start = start if earlier is None and self.settings.starts_clean else None
        run = self.digest if self._is_saved else ""
        saved = self.checkpoint.load(run) if self.checkpoint is not None and self.checkpoint.in_use else None
        if saved is not None and saved.kernels and kernels.current().deterministic:
            log.warning("The unfinished run used kernels chosen by timing; deterministic, this run starts over.")
            saved = None
        if (before := saved or earlier) is not None:
            # The same kernels as before: another choice gives other last bits.
            kernels.current().used.update(before.kernels)
        if saved is not None:
            log.info("Resuming an unfinished run after %d of its steps.", self._steps_done(saved))
        noise = self._noise()
        clean = self._with_references(start.to(noise), noise) if start is not None and self.uses_start else None
        state = self._chain(clean, noise, saved) if self.chained else self._whole(clean, noise, before)
        if state.step == self.settings.total_steps:
            check_latents(state.video, "at the end of the run")
        if self.settings.windows is not None:
            for report in window_reports(state.video, self.spans, self.size.geometry):
                log.info("Window, latent %s", report)
        return state

    def _noise(self) -> Tensor:
        """Noise (B, z, R + F, h, w); of a film that is continued it is cut from that of the whole film."""
        before = 0 if self.film is None else self.film.before
        shape, settings = (*self.shape[:2], before + self.shape[2], *self.shape[3:]), self.settings
        noise = initial_noise(shape, settings.seed, settings.rand_device, self.runtime.device, self.prefix)
        return cut(noise, Span(before, shape[2], True, True), self.prefix, 2) if before else noise

    @property
    def _is_saved(self) -> bool:
        """Whether another run may continue from a state of this one."""
        return self.settings.is_part or (self.checkpoint is not None and self.checkpoint.in_use)

    @property
    def uses_start(self) -> bool:
        return self.settings.starts_clean or self.settings.start_step > 0

    def _with_references(self, start: Tensor, noise: Tensor) -> Tensor:
        """`start` (B, z, F, h, w) behind the reference frames, which are brought to its noise level."""
        if not self.prefix:
            return start
        references = reference_latents(self.cond, self.prefix, self.shape[1]).to(start)
        if self.settings.start_step:
            sigma = build_solver(self.settings).sigmas[self.settings.start_step]
            references = add_noise(references, noise[:, :, : self.prefix], sigma)
        return torch.cat((references, start), 2)

    def _whole(self, clean: Tensor | None, noise: Tensor, earlier: RunState | None) -> RunState:
        solver, settings = build_solver(self.settings), self.settings
        cond = self.cond if len(self.spans) > 1 else with_text(self.cond, self.prompts, 0)
        memory: Mapping[str, Tensor] = {}
        if earlier is not None:
            x, memory = earlier.latents.to(self.runtime.device), self._usable_memory(earlier)
        elif settings.start_step:
            log.warning("Starting at step %d without the earlier sampler's state; the solver begins at first order.",
                        settings.start_step)  # fmt: skip
            assert clean is not None, "`check` refuses a start_step without latents"
            x = clean
        else:
            x = noise if clean is None else add_noise(clean, noise, solver.sigmas[0])
        first = settings.start_step if earlier is None else earlier.step
        before = RunState(latents=x, prefix=self.prefix, step=first, memory=memory)
        return self._steps(solver, x, cond, self.size.frames, range(first, settings.last_step), before)

    def _usable_memory(self, earlier: RunState) -> Mapping[str, Tensor]:
        """The part of an earlier run's memory that this one can use: all of it for the same run, the solver's for the
        same schedule, else nothing.
        """
        if earlier.run == self.digest:
            return earlier.memory
        if earlier.schedule == self.schedule:
            return {name: value for name, value in earlier.memory.items() if name.startswith("solver.")}
        log.warning("The earlier sampler had another solver or schedule; this one starts over from its latents.")
        return {}

    def _chain(self, clean: Tensor | None, noise: Tensor, saved: RunState | None) -> RunState:
        """Clip after clip, each held to the last `overlap` frames of the one before."""
        windows, done = self.settings.windows, None if saved is None else saved.done
        assert windows is not None, "a chain is made of windows"
        overlap, device = windows.size - windows.stride, self.runtime.device
        first = None if self.film is None else self.film.film[:, :, self.film.before :]
        done = first if done is None else done
        done = None if done is None else done.to(device)
        state = saved
        for number in range(0 if saved is None else saved.clip, len(self.spans)):
            span = self.spans[number]
            solver = build_solver(self.settings)
            cond = with_text(window_of(self.cond, span, self.prefix), self.prompts, number)
            known = None if done is None else done[:, :, -overlap:]
            if known is not None:
                cond = with_known_frames(cond, known, span.length, self.size.geometry)
            x = cut(noise, span, self.prefix, 2)
            if clean is not None:
                x = add_noise(cut(clean, span, self.prefix, 2), x, solver.sigmas[0])
            if known is not None:
                # The known frames are noised to the level that the other frames begin at.
                place = slice(self.prefix, self.prefix + overlap)
                x = x.clone()
                x[:, :, place] = add_noise(known, cut(noise, span, self.prefix, 2)[:, :, place], solver.sigmas[0])
            before = RunState(latents=x, prefix=self.prefix, step=0, done=done, clip=number)
            if saved is not None and saved.clip == number:
                x = saved.latents.to(device)
                before = dataclasses.replace(before, latents=x, step=saved.step, memory=saved.memory)
            steps = range(before.step, self.settings.total_steps)
            anchor = None if cond.clean is not None else known
            state = self._steps(solver, x, cond, span.length, steps, before, anchor)
            clip = state.video.to(device)
            if done is None:
                done = clip
            else:
                like = done[:, :, : windows.size] if self.film is None else self.film.film[:, :, -windows.size :]
                new = colour_corrected(clip[:, :, overlap:], like.to(clip), overlap, windows.colour_limit)
                done = torch.cat((done, new), 2)
        assert state is not None and done is not None, "a chain has at least one clip"
        latents = torch.cat((state.latents[:, :, : self.prefix], done.cpu()), 2)
        return dataclasses.replace(state, latents=latents, done=None)

    def _composed(
        self, active: Active, solver: Solver, cond: Conditioning, frames: int, known: Tensor | None
    ) -> Composed:
        shape, prompts = (*self.shape[:2], self.prefix + frames, *self.shape[3:]), () if self.chained else self.prompts
        parts = composed(
            self.model, active, solver, cond, shape, frames, self.settings, self.runtime, prompts,
            self.measures.get("magnitudes"),
        )  # fmt: skip
        if cond.clean is not None:
            return dataclasses.replace(parts, predict=CleanFrames(parts.predict, cond, self.prefix))
        if known is None:
            return parts
        return dataclasses.replace(parts, predict=Anchored(parts.predict, known, self.prefix, solver))

    def _steps(
        self,
        solver: Solver,
        x: Tensor,
        cond: Conditioning,
        frames: int,
        steps: range,
        before: RunState,
        known: Tensor | None = None,
    ) -> RunState:
        """The state after `steps`, whose solver and cache continue with the memory of `before`; reports progress and
        saves checkpoints on the way.
        """
        device, latest = self.runtime.device, (steps.start, x)
        memories: dict[str, HasMemory] = {"solver": solver, **self.measures}
        restore(memories, before.memory, device)

        def state_at(step: int, latents: Tensor, *names: str) -> RunState:
            memory = memory_of({name: memories[name] for name in names or memories})
            return dataclasses.replace(
                before, latents=latents.float().cpu(), step=step, memory=memory if steps else before.memory,
                done=None if before.done is None else before.done.cpu(), kernels=dict(kernels.current().used),
                run=self.digest if self._is_saved else "", schedule=self.schedule,
            )  # fmt: skip

        def on_step(done: int, latents: Tensor, clean: Tensor) -> None:
            nonlocal latest
            latest = (done, latents)
            per_clip, clips = self.settings.total_steps, len(self.spans) if self.chained else 1
            video = clean[:, :, self.prefix :]
            self.runtime.on_progress("Sampling", before.clip * per_clip + done, clips * per_clip, video)
            checkpoint = self.checkpoint
            if checkpoint and checkpoint.every and (done % checkpoint.every == 0 or done == self.settings.last_step):
                checkpoint.save(state_at(done, latents))

        problem = ""
        try:
            shares = self.model.shares(solver.timesteps, steps)
            then = [*(number for number, _ in shares[1:]), None]
            for (number, share), following in zip(shares, then, strict=False):  # none without a step to do
                active = self.model.active(number, self.settings)
                parts = self._composed(active, solver, cond, frames, known)
                memories = {"solver": solver, **self.measures, **parts.memories}
                # A cache continues only with the residuals of its own expert.
                if share.start and expert_at(self.model.experts, solver.timesteps[share.start - 1]) == number:
                    restore(parts.memories, before.memory, device)
                runtime = self._with_expert(active, share[-1], following)
                put = parts.predict.put if isinstance(parts.predict, CleanFrames) else lambda x: x
                x = denoise(parts.predict, solver, x, cond, runtime, steps=share, on_step=on_step, put=put)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error).splitlines()[0]
        if problem:
            # Outside of `except`: there the traceback would still hold the failed step's tensors on the device.
            self.model.release(RuntimeError(problem))
            raise self._out_of_memory(problem, state_at(*latest, "solver"))
        return state_at(*latest)

    def _with_expert(self, active: Active, last: int, following: int | None) -> Runtime:
        """The runtime, which also calls the expert's `before_step`, because LoRA strengths change with the step, and
        announces the expert `following` before step `last`.
        """

        def before_step(index: int, total: int) -> None:
            self.runtime.before_step(index, total)
            active.before_step(index, total)
            if index == last and following is not None:
                self.model.announce(following)

        return dataclasses.replace(self.runtime, before_step=before_step)

    def _steps_done(self, state: RunState) -> int:
        return state.clip * self.settings.total_steps + state.step

    def _out_of_memory(self, problem: str, state: RunState) -> OutOfMemoryError:
        kept = ""
        if self.checkpoint is not None:
            path = self.checkpoint.save(dataclasses.replace(state, run=self.digest))
            if path is not None:
                kept = f" The {self._steps_done(state)} steps done are saved in {path}; the same settings resume there."
        mode = self.settings.guidance.mode
        advice = ["lower width, height or num_frames", "connect a Windows node"]
        if mode != "sequential":
            advice.insert(0, f"set cfg_mode from {mode} to sequential")
        if self.settings.cache is not None and not self.settings.cache.residual_on_cpu:
            advice.insert(0, "switch residual_on_cpu on in the cache node")
        return OutOfMemoryError(
            f"Out of memory in step {state.step + 1} of {self.settings.total_steps} ({problem}). To make it fit, "
            f"{'; or '.join(advice)}.{kept}",
            state.latents,
        )


def reference_latents(cond: Conditioning, prefix: int, channels: int) -> Tensor:
    """The clean latents (B, z, R, h, w) of the reference frames.

    Each VACE input holds its own references in its first channels and zeros at the others', so they add up.
    """
    return reduce(torch.add, (vace.context[:, :channels, :prefix] for vace in cond.vace or ()))
