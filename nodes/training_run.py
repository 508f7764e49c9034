"""One training run in the graph: its folder, the process that works in it, and the display of its progress."""

import contextlib
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from wan_core.atomic import replacing
from wan_core.files import files_below, read_json
from wan_core.media import load_video
from wan_core.runtime import log

from ..trainer.config import TrainConfig
from ..trainer.run.chart import draw_chart
from ..trainer.run.events import latest_steps, read_events, validation_points
from . import host
from .launcher import Event, Launch, pack_command, supervise

SETTINGS, FINISHED = "request.json", "finished.json"
MODULE = "trainer.supervised"
PACKAGES = ("accelerate", "peft", "av", "matplotlib")
SECONDS_BETWEEN_PICTURES = 2.0
MAX_ETA = 86400
"""Seconds; longer estimates are not shown."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run: its newest files, the steps that are done, and a line that says so."""

    files: tuple[Path, ...]
    steps: int
    total: int
    summary: str


@dataclass(frozen=True)
class Run:
    """A run in `folder` with `config`; `mark` changes when its data or models do.

    Its whole state is in the folder, so that running it again continues it.
    """

    folder: Path
    config: TrainConfig
    mark: str = ""
    processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        settings = json.dumps([self.config.resolved(), self.mark], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()

    def finished(self) -> Outcome | None:
        """The result, when a run with the same settings, data and models has finished in the folder."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            found = read_json(self.folder / FINISHED)
            files = tuple(self.folder / name for name in found["files"])
            if found["identity"] == self.identity and all(file.is_file() for file in files):
                summary = f"Finished before, after {found['steps']} steps: {files[0]}"
                return Outcome(files, found["steps"], found["steps"], summary)
        return None

    def execute(self, node_id: str | None = None) -> Outcome:
        """Train to the end, from where an earlier attempt stopped.

        Raises:
            ChildError: the training failed; the message is the trainer's own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        request = self.folder / SETTINGS
        self.config.save_json(request)
        # The trainer is another process, for which this one's models only take memory of the card.
        host.current.free_device()
        command = pack_command(host.PACK_FOLDER, MODULE, ["--config", str(request)], self.processes)
        launch = Launch(command, self.folder, self.environment)
        supervise(launch, Display(self.folder, node_id).take, host.current.check_cancelled)
        outcome = self._outcome(launch.events)
        if outcome.steps >= outcome.total:
            finished = {"identity": self.identity, "files": [f.name for f in outcome.files], "steps": outcome.steps}
            try:
                with replacing(self.folder / FINISHED) as partial:
                    partial.write_text(json.dumps(finished), encoding="utf-8")
            except OSError as error:
                log.warning("%s cannot be written (%s); when it is queued, the run will start again.", FINISHED, error)
        return outcome

    def _outcome(self, events: Path) -> Outcome:
        found = {event.get("event"): event for event in read_events(events)}
        end, saved = found["end"], found.get("saved", {})
        files = tuple(Path(file) for file in saved.get("files", ()))
        state = "Finished" if end["step"] >= end["total"] else "Stopped; queue it again to continue:"
        named = ", ".join(map(str, files)) or "nothing was saved"
        return Outcome(
            files, end["step"], end["total"], f"{state} after {end['step']} of {end['total']} steps: {named}"
        )


def chart(folder: Path) -> Image.Image:
    """The loss chart of the run in `folder`."""
    file = folder / "events.jsonl"
    return draw_chart(latest_steps(file), validation_points(file))


def samples(folder: Path) -> list[Image.Image]:
    """The frames of the newest sample video; of the first training sample, as the model gets it, when there is none."""
    places = (folder / "samples", folder / "first_samples")
    drawn = sorted(places[0].glob("step-*"), reverse=True) if places[0].is_dir() else []
    first = sorted(places[1].iterdir()) if places[1].is_dir() else []
    for file in (*drawn[:1], *first):
        with contextlib.suppress(ValueError, OSError, ImportError):
            return load_video(file)
    return [Image.new("RGB", (64, 64))]


class Display:
    """Shows the events of a run in the graph: a bar, a line of text, and pictures of the loss and a sample in turn."""

    def __init__(self, folder: Path, node_id: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._node_id, self._clock = folder, node_id, clock
        self._steps: dict[int, Event] = {event["step"]: event for event in latest_steps(folder / "events.jsonl")}
        self._held_out: dict[int, float] = {}
        self._has_sample = False
        self._turn = 0
        self._next_picture = 0.0

    def take(self, event: Event) -> None:
        """Show one event; unknown kinds are ignored."""
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    def _show_text(self, line: str) -> None:
        host.current.show_text(line, self._node_id)

    def _on_check(self, event: Event) -> None:
        self._show_text(f"{event['good']} good rows, {len(event['bad'])} bad")

    def _on_cache(self, event: Event) -> None:
        host.current.show_progress("Encoding", event["done"], event["total"])
        self._show_text(f"encoding {event['done']}/{event['total']}")

    def _on_step(self, event: Event) -> None:
        self._steps[event["step"]] = event
        picture = None
        if self._clock() >= self._next_picture:
            self._next_picture = self._clock() + SECONDS_BETWEEN_PICTURES
            picture = self._picture()
        host.current.show_progress("Training", event["step"], event["total"], picture)
        self._show_text(step_line(event, self._held_out))

    def _on_validation(self, event: Event) -> None:
        self._held_out[event["step"]] = event["loss"]

    def _on_sample(self, event: Event) -> None:
        self._has_sample = True

    def _on_warning(self, event: Event) -> None:
        log.warning("%s", event["message"])
        self._show_text(str(event["message"]))

    def _on_waiting(self, event: Event) -> None:
        self._show_text("waiting for an earlier process of this run to save and end")

    def _on_stopping(self, event: Event) -> None:
        log.info("Stopping: the training finishes its step and saves.")
        self._show_text("stopping after this step; what is done is kept")

    def _picture(self) -> Image.Image | None:
        """The loss and the newest sample in turn; None when drawing fails, which must not stop the run."""
        self._turn += 1
        try:
            if self._has_sample and self._turn % 2 == 0:
                frames = samples(self._folder)
                return frames[len(frames) // 2]
            return draw_chart([self._steps[step] for step in sorted(self._steps)], sorted(self._held_out.items()))
        except Exception as error:
            log.warning("No picture of the training: %s", error)
            return None


def step_line(event: Event, held_out: Mapping[int, float]) -> str:
    """A step in words, such as "step 120/2000  loss 0.0810 (held out 0.1120)  1.9 s/step  about 59 min left"."""
    loss = "loss is not finite" if event.get("loss") is None else f"loss {event['loss']:.4f}"
    held_out_loss = f" (held out {held_out[max(held_out)]:.4f})" if held_out else ""
    eta = event.get("eta")
    left = ""
    if eta and eta <= MAX_ETA:
        left = f"  about {eta / 60:.0f} min left" if eta >= 100 else f"  {eta:.0f} s left"
    return f"step {event['step']}/{event['total']}  {loss}{held_out_loss}  {event.get('seconds', 0):.1f} s/step{left}"


def files_mark(places: Sequence[Path]) -> str:
    """A text that changes when a file, or one below a folder, gets another name, size or time."""
    files = (f for place in places for f in ([place] if place.is_file() else files_below(place)) if f.is_file())
    marks = [[str(f), (stat := f.stat()).st_size, stat.st_mtime_ns] for f in files]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()


def require_packages(names: Sequence[str] = ()) -> None:
    """Raise ValueError when this Python lacks one of the packages `names`; without names, those for training."""
    missing = [name for name in names or PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"This node needs {' and '.join(missing)}. Install them into ComfyUI's own Python:\n"
            f'"{sys.executable}" -m pip install -r "{host.PACK_FOLDER / "requirements.txt"}"'
        )


def load_settings(values: Mapping[str, Any], typed: Mapping[str, Any]) -> TrainConfig:
    """The configuration of widgets; flags that were typed override them.

    Raises:
        ValueError: a value cannot be used.
    """
    return TrainConfig.from_mapping({**values, **typed}, "The node")
