"""When a run is saved, and what becomes of it when the disk says no."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .config import TrainConfig
from .engine import Engine
from .events import Events
from .export import STEP, Exporter
from .plan import Step
from .state import Progress, States, require_space

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
