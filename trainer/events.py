"""What happens in a run, as it happens: a file of JSON lines, a progress bar, and the trackers that are asked for.

The file is what other programs follow; it survives whoever reads it. Each line is one object with `event`, the name of
what happened, and `time`, seconds since 1970.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .config import TrainConfig

log = logging.getLogger("wancore")


class Tracker(Protocol):
    """A program that plots numbers."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Events:
    """The events of one process. Only the main process of a run has a `file`; the others keep silent."""

    def __init__(self, file: Path | None, trackers: Sequence[Tracker] = (), show: bool = False) -> None:
        """Append to `file`; `show` a progress bar when there is a terminal."""
        self._file = file
        self._trackers = trackers
        self._show = show and file is not None and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._warned = False
        if file is not None:
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
            for tracker in self._trackers:
                tracker.add(step, numbers)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for tracker in self._trackers:
            tracker.close()


def read_events(file: Path) -> Iterator[dict[str, Any]]:
    """The events in `file`, in their order; a line that a kill cut off is left out."""
    with contextlib.suppress(FileNotFoundError), file.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def latest_steps(file: Path) -> list[dict[str, Any]]:
    """The `step` events in ascending order; of steps that ran twice, after a stop, the later one."""
    steps = {event["step"]: event for event in read_events(file) if event.get("event") == "step"}
    return [steps[step] for step in sorted(steps)]


class Pace:
    """How long the rest takes, judged by the last steps."""

    WINDOW = 20

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def add(self, seconds: float) -> None:
        # The first step allocates memory and chooses kernels, so it tells little of the others.
        self._seconds = [*self._seconds, seconds][-self.WINDOW :]

    def left(self, steps: int) -> float:
        """Seconds for `steps` more."""
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
    """A run of Weights & Biases, whose files stand in `folder`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(dir=str(folder), project=config.wandb_project)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(config: TrainConfig, folder: Path) -> list[Tracker]:
    """The trackers that `--log_with` names, with files under `folder`.

    Raises:
        ValueError: the package of one is not installed.
    """
    trackers = []
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
