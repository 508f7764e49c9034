"""The events of a run: a file of JSON lines that other programs follow, a progress bar, and trackers.

Each line is one object with `event`, the name of
what happened, and `time`, seconds since 1970."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from ..config import TrainConfig

log = logging.getLogger("wancore")

LARGEST = 1e18
"""Numbers from here on are no step, loss or timestep of a run."""


class Tracker(Protocol):
    """A program that plots numbers."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Events:
    """The events of one process. Only the main process of a run has a `file`; the others keep silent."""

    def __init__(self, file: Path | None, trackers: Sequence[Tracker] = (), show: bool = False) -> None:
        """Append to `file`; `show` a progress bar when there is a terminal.

        Raises:
            ValueError: `file` is there and is no file.
        """
        self._file = file
        self._trackers = list(trackers)
        self._show = show and file is not None and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._warned = False
        if file is not None:
            if file.exists() and not file.is_file():
                raise ValueError(f"{file} is no file, so that events cannot be written to it; move it away.")
            file.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(file)

    def emit(self, event: str, **values: Any) -> None:
        """Write one event down. A disk that is full costs the line, not the run."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **_plain(values)}, ensure_ascii=False)
        try:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")
        except OSError as error:
            if not self._warned:
                log.warning("Events cannot be written to %s any more (%s).", self._file, error)
            self._warned = True

    def step(self, step: int, total: int, **values: Any) -> None:
        """One step of training: an event, the progress bar, the trackers."""
        self.emit("step", step=step, total=total, **values)
        self.numbers(step, {name: v for name, v in values.items() if isinstance(v, float)})
        if self._show:
            self._bar = self._bar or tqdm(total=total, initial=step - 1, unit="step", dynamic_ncols=True)
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['lr']:.3g}")
            self._bar.update(step - self._bar.n)

    def numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers for the trackers alone."""
        if self._file is not None:
            for tracker in tuple(self._trackers):
                try:
                    tracker.add(step, numbers)
                except Exception as error:
                    log.warning("%s gets no more numbers (%s).", type(tracker).__name__, error)
                    self._trackers.remove(tracker)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                log.warning("%s may lack the last numbers (%s).", type(tracker).__name__, error)


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """The events in `file`, in their order; a line that a kill cut off is left out."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            event = None
            with contextlib.suppress(ValueError, RecursionError):
                event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                yield event


def latest_steps(file: Path) -> list[dict[str, Any]]:
    """The `step` events in ascending order; of steps that ran twice, after a stop, the later one."""
    steps = {event["step"]: event for event in read_events(file) if event["event"] == "step" and _is_measured(event)}
    return [steps[step] for step in sorted(steps)]


def validation_points(file: Path) -> list[tuple[int, float]]:
    """Held-out losses as (step, loss), ascending."""
    found = (event for event in read_events(file) if event["event"] == "validation" and _is_measured(event))
    return sorted({event["step"]: event["loss"] for event in found}.items())


def _is_measured(event: Mapping[str, Any]) -> bool:
    """Whether an event has the numbers of a step. Checked, because a file in a run's folder may contain anything."""
    step, loss = event.get("step"), event.get("loss")
    rows = [event.get(name, []) for name in ("timesteps", "errors")]
    whole = isinstance(step, int) and 0 < step < LARGEST and (loss is None or _is_number(loss))
    return whole and all(isinstance(row, list) and all(map(_is_number, row)) for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


class StepTimer:
    """Estimates the time that is left from the median of the last steps."""

    WINDOW = 20

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        self._seconds = [*self._seconds, seconds][-self.WINDOW :]

    def remaining(self, steps: int) -> float:
        """Seconds for `steps` more steps; NaN before the first."""
        # The median: the first step is slow, because it allocates memory and chooses kernels.
        known = sorted(self._seconds)
        return known[len(known) // 2] * steps if known else math.nan


class TensorBoard:
    """TensorBoard's event files in `folder`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files are in `folder`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder), project=config.wandb_project)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, TrainConfig], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(config: TrainConfig, folder: Path) -> list[Tracker]:
    """The trackers that `--log_with` names, with files under `folder`.

    Raises:
        ValueError: the package of one is not installed.
    """
    trackers: list[Tracker] = []
    for name in config.log_with:
        try:
            trackers.append(TRACKERS[name](folder / "logs" / name, config))
        except ImportError as error:
            raise ValueError(
                f"--log_with {name} needs a package ({error}): pip install {name}, or leave it out."
            ) from error
    return trackers


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with paths as text and numbers that JSON lacks as None."""
    return {name: _json(value) for name, value in values.items()}


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _end_last_line(file: Path) -> None:
    if file.exists() and file.stat().st_size:
        with file.open("rb+") as stream:
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
