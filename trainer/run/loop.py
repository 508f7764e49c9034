"""The training loop: its steps, when it saves, and how it is asked to stop."""

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
from ..data.choices import Plan, Step, learning_rate
from ..data.conditions import Batch, Examples, collate
from ..export import STEP, Exporter
from ..model.memory import checkpointing_of, in_host_memory
from ..objective import Objective, seed_for, weighted
from .engine import Engine
from .events import Events, StepTimer
from .state import Progress, States, require_space
from .validate import Evaluator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
QUIT_NOW = 130
"""The exit code of a shell's command that Ctrl-C ended."""


class StopRequest:
    """Whether the run is to end after the current step: a signal came, or `file` exists."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seen: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._seen) or self._file.exists()

    def clear(self) -> None:
        """Remove the file, so that the run can be continued."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within the block a signal requests the stop, and a second signal of the same kind quits at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = list(SIGNALS)
        # `nohup` ignores SIGHUP, so that the run outlives its terminal.
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
        # By kind: on Ctrl-C the terminal sends SIGINT to every process, and a launcher adds SIGTERM for it.
        if self._seen[number] > 1:
            abandon()
            os._exit(QUIT_NOW)


log = logging.getLogger("wancore")

FAILURES = (OSError, SafetensorError, RuntimeError)
"""The errors that libraries raise when a file cannot be written."""

KEPT_STATES = 2
"""States that are kept without `--keep_last`: the newest, and the one before it in case the newest is damaged."""

MAX_FAILURES = 2


class SaveError(RuntimeError):
    """The run cannot be saved any more."""


@dataclass(eq=False)
class Saver:
    """Saves weights and state after the steps that the settings name.

    Attributes:
        needed: bytes that one save takes.
        identity: of the run, see `state.Progress`.
        saved: the step of the last state.
    """

    config: TrainConfig
    engine: Engine
    exporter: Exporter
    states: States
    events: Events
    needed: int
    identity: dict[str, Any]
    saved: int = 0
    _failures: int = field(default=0, repr=False)

    def after_step(self, step: Step, is_last: bool) -> None:
        """Save if a save is due after `step`; after the last step of a run it always is.

        Raises:
            SaveError: the last save, or two in a row, failed. Earlier saves are complete.
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
                f"{self.saved}; free some disk space and start the same command again to continue from it."
            )
        log.error("SAVING FAILED after step %d (%s). The last good state stays, training goes on.", step.number, reason)

    def _save(self, step: Step, stem: str) -> Exception | None:
        """Write weights and state. Returns what went wrong.

        Every process writes or none does: each phase ends with `engine.any`, because a process that left early would
        leave the others waiting in the next collective call.
        """
        engine, main = self.engine, self.engine.is_main
        failure: Exception | None = None
        tensors = engine.trained()
        files: list[Path] = []
        try:
            if main:
                require_space(self.exporter.folder, self.needed, self.config.min_free_gb)
                # Weights before the state: a state must never stand for files that are not there.
                files = self.exporter.write(stem, tensors, {STEP: str(step.number), "ss_epoch": str(step.epoch)})
                self.states.begin(step.number)
        except FAILURES as error:
            failure = error
        if engine.any(failure is not None):
            return failure
        try:
            engine.save_state(self.states.partial(step.number))
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
            self.states.commit(Progress(step.number, self.identity, self.config.resolved(), self.engine.world))
            self.states.prune(self.config.keep_last or KEPT_STATES)
            if self.config.keep_last:
                self.exporter.prune(self.config.keep_last)
        except FAILURES as error:
            return error
        return None


LOG_SECONDS = 15.0
"""Seconds between lines of progress in the log."""


class NonFiniteError(RuntimeError):
    """The loss or the gradient is NaN or infinite."""


class LoadError(ValueError):
    """A sample cannot be read any more."""


@dataclass(frozen=True)
class StepResult:
    """Loss, gradient norm, and timestep and error of every sample of a step, over all processes."""

    loss: float
    grad_norm: float
    timesteps: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, eq=False)
class Loop:
    """The steps of a run."""

    config: TrainConfig
    engine: Engine
    examples: Examples
    plan: Plan
    objective: Objective
    saver: Saver
    evaluator: Evaluator
    events: Events
    stop: StopRequest

    def run(self, done: int) -> int:
        """Train from step `done` to the end, or until a stop is requested. Returns the number of steps that are done.

        Raises:
            NonFiniteError: the loss or the gradient is NaN or infinite; the weights are those of the step before.
            OutOfMemoryError: the device is too small.
            LoadError: a file cannot be read any more; a run of one process was saved before.
            SaveError: two saves in a row failed, or the last one.
        """
        timer, logged = StepTimer(), 0.0
        last: Step | None = None
        if self._stops():
            return done
        try:
            for step, batches in self._loaded(done):
                started = time.monotonic()
                outcome = self._step(step, batches)
                last, done = step, step.number
                seconds = time.monotonic() - started
                timer.add(seconds)
                left = timer.remaining(self.plan.total - done)
                self.events.step(
                    done, self.plan.total, epoch=step.epoch, loss=outcome.loss,
                    lr=learning_rate(self.config, done, self.plan.total), grad_norm=outcome.grad_norm,
                    seconds=seconds, eta=left, timesteps=outcome.timesteps, errors=outcome.errors,
                )  # fmt: skip
                if time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    log.info(
                        "Step %d of %d: loss %.4f, about %.0f min left.",
                        done, self.plan.total, outcome.loss, left / 60,
                    )  # fmt: skip
                self.evaluator.after_step(done, is_last=done == self.plan.total)
                stops = self._stops()
                self.saver.after_step(step, is_last=stops or done == self.plan.total)
                if stops:
                    break
        except LoadError:
            # The other processes do not know of it and would never join the save, so only a run of one process saves.
            if last is not None and last.number > self.saver.saved and self.engine.world == 1:
                self.saver.after_step(last, is_last=True)
            raise
        return done

    def _stops(self) -> bool:
        """Whether any process was asked to stop; then all of them do."""
        return self.engine.any(bool(self.stop))

    def _step(self, step: Step, batches: list[Batch]) -> StepResult:
        engine, errors, timesteps = self.engine, [], []
        loss = torch.zeros((), device=engine.device)
        # Each expert of a pair is brought to the device once.
        batches = sorted(batches, key=lambda batch: self._expert(step, batch))
        engine.set_learning_rate(learning_rate(self.config, step.number, self.plan.total))
        try:
            for index, batch in enumerate(batches):
                with engine.accumulating(is_last=index == len(batches) - 1):
                    error, weights, times = self._forward_backward(step, batch)
                loss += (error * weights).sum() / step.samples
                errors.append(error)
                timesteps.append(times)
            norm = engine.clip_gradients()
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(self._memory_advice(step, batches)) from error
            raise
        outcome = StepResult(
            engine.sum(loss).item(), norm, engine.gather(torch.cat(timesteps)), engine.gather(torch.cat(errors))
        )
        # Before the optimizer's step, which would put NaN into every weight.
        if not outcome.is_finite:
            names = ", ".join(name for batch in batches for name in batch.names)
            moments = ", ".join(f"{t:.0f}" for t in outcome.timesteps)
            raise NonFiniteError(
                f"Step {step.number} gave a loss of {outcome.loss} and a gradient of norm {outcome.grad_norm} (files "
                f"{names}; timesteps {moments}). The weights are those of the step before, and the last saved state is "
                "good. Look at those files, lower --learning_rate, or set --mixed_precision no."
            )
        engine.update()
        return outcome

    def _expert(self, step: Step, batch: Batch) -> int:
        """The expert that the samples of a batch train."""
        return self.objective.experts(self.config.seed, step.epoch, batch.positions[:1])[0]

    def _forward_backward(self, step: Step, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Errors, weights and timesteps of a batch, each (B,). Adds its gradients to those of the step."""
        config, engine, device = self.config, self.engine, self.engine.device
        # Seeded by step, so that dropout is the same in a run that was stopped and resumed.
        torch.manual_seed(seed_for("step", config.seed, step.epoch, batch.positions[0]))
        noising = self.objective.draw(batch.latents.shape[1:], config.seed, step.epoch, batch.positions)
        expert = self._expert(step, batch)
        around = checkpointing_of(config, engine.trainables.module.blocks, in_host_memory, engine.bring(expert))
        pixels = None if batch.pixels is None else batch.pixels.to(device)
        with around:
            error = engine.model(
                batch.latents.to(device), noising, batch.cond.to(device), batch.captions, pixels, expert
            )
            # A share of the mean over all samples of the step, so that every sample counts the same in uneven batches.
            # Inside of `around`: activation checkpointing runs the blocks again in the backward pass.
            engine.backward(weighted(error, noising).sum() / step.samples)
        return error.detach(), noising.weights.to(device), noising.timesteps.to(device)

    def _loaded(self, done: int) -> Iterator[tuple[Step, list[Batch]]]:
        """The steps after the first `done` with their samples, which threads load ahead of time."""
        steps = self.plan.steps(done)
        # Only samples from the cache: encoders are not safe to call from several threads.
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

    def _memory_advice(self, step: Step, batches: list[Batch]) -> str:
        config = self.config
        advice = {
            "--batch_size 1 with more --gradient_accumulation_steps": config.batch_size > 1,
            "--cache disk": config.cache == "off",
            "--use_gradient_checkpointing": not config.use_gradient_checkpointing,
            "--use_gradient_checkpointing_offload": not config.use_gradient_checkpointing_offload,
            "fewer --num_frames or a smaller --height and --width": True,
            "a lower --lora_rank": config.lora_base_model is not None,
            "a LoRA in place of whole weights": bool({"dit", "vace"} & set(config.trainable_models)),
        }
        shapes = ", ".join(str(tuple(batch.latents.shape)) for batch in batches)
        use = "; ".join(change for change, is_possible in advice.items() if is_possible)
        return f"Out of memory in step {step.number}, with latents {shapes}. Try, in this order: {use}."
