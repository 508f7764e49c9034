"""The training loop: steps, one after the other, when the run is saved, and how it is asked to stop."""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from wan_core.atomic import abandon
from wan_core.runtime import OutOfMemoryError, is_out_of_memory

from ..config import TrainConfig
from ..data.conditions import Batch, Examples, collate
from ..export import STEP, Exporter
from ..model.memory import activation_checkpointing, in_host_memory
from ..objective import Objective, seed_for, weighted
from .engine import Engine
from .events import Events, StepTimer
from .plan import Plan, Step, learning_rate
from .state import Progress, States, require_space
from .validate import Evaluator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
QUIT_NOW = 130


class StopRequest:
    """Whether the run shall end after the step that runs."""

    def __init__(self, file: Path) -> None:
        """`file`: its appearance is a request too."""
        self._file = file
        self._seen: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._seen) or self._file.exists()

    def obeyed(self) -> None:
        """Remove the file, so that the run can be continued."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals ask for the end; the second one of a kind quits on the spot.

        A launcher passes on as SIGTERM the Ctrl-C that the terminal has sent to every process, so signals of two kinds
        are one wish.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = list(SIGNALS)
        # `nohup` has it ignored, and means that.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen[number] += 1
        if self._seen[number] > 1:
            abandon()
            os._exit(QUIT_NOW)


log = logging.getLogger("wancore")

FAILURES = (OSError, SafetensorError, RuntimeError)
"""How libraries say that a file could not be written."""

KEPT_STATES = 2
"""States that stay when `--keep_last` does not say otherwise: one to go on from, and one before it."""

MAX_FAILURES = 2


class SaveError(RuntimeError):
    """A run that cannot be saved any more."""


@dataclass(eq=False)
class Saver:
    """Saves weights and state where the settings say so.

    Attributes:
        needed: bytes that one save takes.
        run: what the run is, see `state.Progress`.
        saved: the step of the last state.
    """

    config: TrainConfig
    engine: Engine
    exporter: Exporter
    states: States
    events: Events
    needed: int
    run: dict[str, Any]
    saved: int = 0
    _failures: int = field(default=0, repr=False)

    def after_step(self, step: Step, is_last: bool) -> None:
        """Save where it is due after `step`; the last step of a run always is.

        Raises:
            SaveError: the last save, or two in a row, failed. What was saved before is whole.
        """
        due = step.number % self.config.save_steps == 0 if self.config.save_steps else step.ends_epoch
        if not due and not is_last:
            return
        stem = f"epoch-{step.epoch}" if due and not self.config.save_steps else f"step-{step.number}"
        with self.engine.evaluating():
            failure = self._save(step, stem)
        if not self.engine.any(failure is not None):
            self._failures, self.saved = 0, step.number
            return
        self._failures += 1
        reason = failure or "another process failed"
        self.events.emit("warning", step=step.number, message=f"saving failed: {reason}")
        if is_last or self._failures >= MAX_FAILURES:
            raise SaveError(
                f"The run cannot be saved after step {step.number}: {reason}. The last good state is that of step "
                f"{self.saved}; make room and start the same command again to continue from it."
            )
        log.error("SAVING FAILED after step %d (%s). The last good state stays, training goes on.", step.number, reason)

    def _save(self, step: Step, stem: str) -> Exception | None:
        """Weights first, so that a state never promises files that are not there; what went wrong."""
        engine, main = self.engine, self.engine.is_main
        failure: Exception | None = None
        tensors = engine.trained()
        files: list[Path] = []
        try:
            if main:
                require_space(self.exporter.folder, self.needed, self.config.min_free_gb)
                told = {STEP: str(step.number), "ss_epoch": str(step.epoch)}
                files = self.exporter.write(stem, tensors, told)
                self.states.begin(step.number)
        except FAILURES as error:
            failure = error
        if engine.any(failure is not None):
            return failure
        try:
            engine.fill(self.states.draft(step.number))
        except FAILURES as error:
            failure = error
        if not engine.any(failure is not None) and main:
            failure = self._commit(step)
        if main:
            self.states.discard(step.number)
            if failure is None:
                self.events.emit("saved", step=step.number, files=files, state=self.states.path(step.number))
                log.info("Saved %s after step %d.", ", ".join(file.name for file in files), step.number)
        return failure

    def _commit(self, step: Step) -> Exception | None:
        try:
            self.states.commit(Progress(step.number, self.run, self.config.resolved(), self.engine.world))
            self.states.prune(self.config.keep_last or KEPT_STATES)
            if self.config.keep_last:
                self.exporter.prune(self.config.keep_last)
        except FAILURES as error:
            return error
        return None


LOG_SECONDS = 15.0
"""Seconds between lines of progress in the log."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient became something else than a number."""


class LoadError(ValueError):
    """A sample that could be read when the run began, and now cannot."""


@dataclass(frozen=True)
class StepResult:
    """What a step gave, over all processes: loss, gradient norm, and timestep and error of every sample."""

    loss: float
    grad_norm: float
    timesteps: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, eq=False)
class Loop:
    """Everything that a run's steps need."""

    config: TrainConfig
    engine: Engine
    examples: Examples
    plan: Plan
    objective: Objective
    saver: Saver
    watcher: Evaluator
    events: Events
    stop: StopRequest

    def run(self, done: int) -> int:
        """Train from step `done` to the end, or until someone asks to stop; the number of steps that are done then.

        Raises:
            NonFiniteError: the loss or the gradient is no number; the weights are those of the step before.
            OutOfMemoryError: the device is too small.
            LoadError: a file cannot be read any more; the run was saved before, if it has one process.
            SaveError: two saves in a row failed, or the last one.
        """
        pace, spoken = StepTimer(), 0.0
        last: Step | None = None
        if self._stops():
            return done
        try:
            for step, batches in self._loaded(done):
                started = time.monotonic()
                outcome = self._step(step, batches)
                last, done = step, step.number
                pace.add(time.monotonic() - started)
                self._tell(step, outcome, time.monotonic() - started, pace.left(self.plan.total - done))
                if time.monotonic() - spoken > LOG_SECONDS:
                    spoken = time.monotonic()
                    log.info(
                        "Step %d of %d: loss %.4f, about %.0f min left.",
                        done, self.plan.total, outcome.loss, pace.left(self.plan.total - done) / 60,
                    )  # fmt: skip
                self.watcher.after_step(done, is_last=done == self.plan.total)
                stops = self._stops()
                self.saver.after_step(step, is_last=stops or done == self.plan.total)
                if stops:
                    break
        except LoadError:
            # Other processes know nothing of it and wait elsewhere, so that only a run of one can still save.
            if last is not None and last.number > self.saver.saved and self.engine.world == 1:
                self.saver.after_step(last, is_last=True)
            raise
        return done

    def _tell(self, step: Step, outcome: StepResult, seconds: float, left: float) -> None:
        self.events.step(
            step.number, self.plan.total, epoch=step.epoch, loss=outcome.loss,
            lr=learning_rate(self.config, step.number, self.plan.total), grad_norm=outcome.grad_norm, seconds=seconds,
            eta=left, timesteps=outcome.timesteps, errors=outcome.errors,
        )  # fmt: skip

    def _stops(self) -> bool:
        """Whether any process was asked to stop; all of them then do."""
        return self.engine.any(bool(self.stop))

    def _step(self, step: Step, batches: list[Batch]) -> StepResult:
        engine, errors, timesteps = self.engine, [], []
        loss = torch.zeros((), device=engine.device)
        engine.set_learning_rate(learning_rate(self.config, step.number, self.plan.total))
        try:
            for index, batch in enumerate(batches):
                with engine.accumulating(is_last=index == len(batches) - 1):
                    error, weights, times = self._forward_backward(step, batch)
                loss += (error * weights).sum() / step.samples
                errors.append(error)
                timesteps.append(times)
            norm = engine.clip()
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(self._memory_advice(step, batches)) from error
            raise
        outcome = StepResult(
            engine.sum(loss).item(), norm, engine.gather(torch.cat(timesteps)), engine.gather(torch.cat(errors))
        )
        if not outcome.is_finite:
            raise NonFiniteError(self._where(step, batches, outcome))
        engine.update()
        return outcome

    def _forward_backward(self, step: Step, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The errors, weights and timesteps of a batch (B,), whose gradients are added to what is there."""
        config, engine, device = self.config, self.engine, self.engine.device
        # Dropout then draws the same after a resumed run as in one that was not stopped.
        torch.manual_seed(seed_for("step", config.seed, step.epoch, batch.positions[0]))
        draw = self.objective.draw(batch.latents.shape[1:], config.seed, step.epoch, batch.positions)
        around: AbstractContextManager[None] = nullcontext()
        if config.use_gradient_checkpointing:
            around = activation_checkpointing(
                engine.trainables.module.blocks,
                keeps_attention=config.gradient_checkpointing_keeps == "attention",
                saving=in_host_memory if config.use_gradient_checkpointing_offload else None,
                preserve_rng=config.lora_dropout > 0,
                stream=engine.stream,
            )
        pixels = None if batch.pixels is None else batch.pixels.to(device)
        with around:
            error = engine.model(batch.latents.to(device), draw, batch.cond.to(device), batch.captions, pixels)
            engine.backward(weighted(error, draw).sum() / step.samples)
        return error.detach(), draw.weights.to(device), draw.timesteps.to(device)

    def _loaded(self, done: int) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps after the first `done` with their samples, loaded ahead where threads may do that."""
        steps = self.plan.steps(done)
        # Encoders are not made for several threads; what comes from the cache passes none.
        threads = self.config.num_workers if self.config.caches else 0
        if not threads:
            yield from ((step, self._load(step)) for step in steps)
            return
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[tuple[Step, Future[list[Batch]]]] = deque()
            for step in steps:
                ahead.append((step, pool.submit(self._load, step)))
                if len(ahead) > threads:
                    first, future = ahead.popleft()
                    yield first, future.result()
            yield from ((step, future.result()) for step, future in ahead)

    def _load(self, step: Step) -> list[Batch]:
        try:
            return [collate([self.examples.get(position, step.epoch) for position in group]) for group in step.batches]
        except (ValueError, OSError) as error:
            raise LoadError(f"Step {step.number} cannot load its samples: {error}") from error

    def _where(self, step: Step, batches: list[Batch], outcome: StepResult) -> str:
        names = ", ".join(name for batch in batches for name in batch.names)
        times = ", ".join(f"{t:.0f}" for t in outcome.timesteps)
        return (
            f"Step {step.number} gave a loss of {outcome.loss} and a gradient of norm {outcome.grad_norm} (files "
            f"{names}; timesteps {times}). The weights are those of the step before, and the last saved state is good. "
            "Look at those files, lower --learning_rate, or set --mixed_precision no."
        )

    def _memory_advice(self, step: Step, batches: list[Batch]) -> str:
        config = self.config
        knobs = {
            "--batch_size 1 with more --gradient_accumulation_steps": config.batch_size > 1,
            "--cache disk": config.cache == "off",
            "--use_gradient_checkpointing": not config.use_gradient_checkpointing,
            "--use_gradient_checkpointing_offload": not config.use_gradient_checkpointing_offload,
            "fewer --num_frames or a smaller --height and --width": True,
            "a lower --lora_rank": config.lora_base_model is not None,
            "a LoRA in place of whole weights": bool({"dit", "vace"} & set(config.trainable_models)),
        }
        shapes = ", ".join(str(tuple(batch.latents.shape)) for batch in batches)
        advice = "; ".join(knob for knob, helps in knobs.items() if helps)
        return f"Out of memory in step {step.number}, with latents {shapes}. What helps, in this order: {advice}."
