"""A training run from its settings to its files, in the order in which things happen.

From any folder by `python <pack>/trainer/train.py` and `accelerate launch <pack>/trainer/train.py`; from the pack's
folder also by `python -m trainer.train` and `accelerate launch -m trainer.train`.
"""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":  # before the imports below, which need the names of the pack's packages
    run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))["run_file"](__file__)

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from wan_core.model_files import Offload
from wan_core.offload.formats import WeightChoice
from wan_core.offload.quant import quantise
from wan_core.runtime import OutOfMemoryError, Runtime

from .config import PROGRAM, TrainConfig, parse
from .data import dataset, report
from .data.cache import Encoders, LatentCache
from .data.choices import Plan
from .data.conditions import Examples
from .data.report import Row
from .export import Exporter
from .model import load, trainable
from .model.trainable import Trainables
from .run import engine
from .run.engine import Engine
from .run.estimate import Estimate, Estimator
from .run.events import Events, open_trackers
from .run.loop import LoadError, Loop, NonFiniteError, SaveError, Saver, StopRequest
from .run.output import (
    CONFIG,
    FIRST_SAMPLES,
    locked_output,
    record_data,
    record_settings,
    require_own_outputs,
    run_id,
    with_recorded_data,
)
from .run.state import FREE_SETTINGS, LOCATION_SETTINGS, Progress, States, find_state, require_space, run_identity
from .run.validate import EVENTS, Evaluator, sample_requests, save_first_samples

log = logging.getLogger("wancore")

STATES = "states"
LARGEST_EPOCH = 10**6
"""Samples of an epoch with `--dataset_repeat`: one permutation of all of them is in memory."""
WRONG_INPUT, FAILED = 2, 1
"""Exit codes: the run could not begin because of its settings or files; it failed later."""


@dataclass(frozen=True)
class Result:
    """How a run ended: `steps` of its `total` steps are done.

    A run that only encodes data has no steps; when it was stopped, `total` is its number of rows.
    """

    steps: int
    total: int

    @property
    def stopped(self) -> bool:
        return self.steps < self.total


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """The command, which its help calls `prog`: 0 when the run finished or was stopped, 2 when it could not begin, 1
    when it failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if os.environ.get("RANK", "0") != "0":
        log.setLevel(logging.ERROR)
    try:
        train(parse(sys.argv[1:] if argv is None else argv, prog))
    except (NonFiniteError, SaveError, LoadError, OutOfMemoryError, OSError) as error:
        log.error("%s", error)
        return FAILED
    except ValueError as error:
        log.error("%s", error)
        return WRONG_INPUT
    return 0


def train(config: TrainConfig) -> Result:
    """Run `config` to its end, or until it is stopped.

    Raises:
        ValueError: data, models or settings cannot be used; nothing was trained.
        NonFiniteError, OutOfMemoryError, LoadError, SaveError: see `loop`.
    """
    config = with_recorded_data(config)
    if config.task != "sft:data_process":
        trainable.check(config)
    for line in config.notices:
        log.info("%s", line)
    accelerator = engine.start(config)
    is_main = accelerator.is_main_process
    folder = Path(config.output_path)
    with locked_output(folder) if is_main else nullcontext():
        stop = StopRequest(Path(config.stop_file or folder / "stop"))
        trackers = open_trackers(config, folder) if is_main else ()
        events = Events(folder / EVENTS if is_main else None, trackers, show=True)
        try:
            with stop.on_signals():
                result = Run(config, accelerator, events, stop).execute()
        except Exception as error:
            events.emit("error", message=str(error))
            raise
        finally:
            events.close()
            accelerator.end_training()
        if result.stopped:
            stop.clear()
        return result


class Run:
    """A run from its data to its last save: `execute` is the order, the other methods are its steps."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, events: Events, stop: StopRequest) -> None:
        self.config, self.accelerator, self.events, self.stop = config, accelerator, events, stop
        self.is_main = accelerator.is_main_process
        self.folder = Path(config.output_path)
        self.states = States(self.folder / STATES)
        self.dtype = config.compute_dtype
        self.runtime = Runtime.default(accelerator.device, self.dtype)

    def execute(self) -> Result:
        config, world = self.config, self.accelerator.num_processes

        # Check data, then models, before anything is encoded or loaded. Data first: models may have to be downloaded.
        data = dataset.load(config)
        checked = report.check(data, config)
        try:
            self._split(checked)
            found = load.find(config)
            checked = report.fit_to_geometry(checked, data, config, found.config.geometry)
        finally:
            self._show(checked)
        rows, held_out = self._split(checked)
        encoders = Encoders(found, self.dtype, self.accelerator.device)
        cache = LatentCache(config.cache_folder) if config.caches else None
        everything = Examples((*rows, *held_out), found, encoders, config, cache)
        if config.task == "sft:data_process":
            return self._encode_only(everything)

        # Continue a run that was stopped from its newest state.
        identity = run_identity(config, data.fingerprint, found.components)
        earlier = find_state(self.states, config, identity, world)
        done = self._step_of(earlier)
        require_own_outputs(self.folder, identity)
        if self.is_main:
            self.states.tidy()
        examples = Examples(rows, found, encoders, config, cache)
        plan = Plan(config, examples.shapes, self.accelerator.process_index, world, examples.shapes_change)
        if earlier is not None and done >= plan.total:
            return self._nothing_left(earlier[1], plan.total)

        # Encode everything and free the encoders before the model is loaded: both together may not fit into memory.
        if self._fill(everything):
            return self._stopped_encoding(done, plan.total)
        clips = Examples(held_out, found, encoders, replace(config, dataset_repeat=1), cache)
        evaluator = self._evaluator(examples, clips)
        trainables = self._trainables(found, encoders)
        if cache is not None:
            encoders.free()

        # Wrap the model and build its optimizer, in every process.
        settings, needs = self._needs(trainables, rows)
        trained = Engine(self.accelerator, trainables, config)
        evaluator.engine = trained
        if earlier is not None:
            trained.load_state(earlier[0])
        self.events.emit(
            "resume" if earlier else "start", step=done, total=plan.total, epochs=config.num_epochs, rows=len(rows),
            held_out=len(held_out), processes=trained.world, memory=needs.device, disk=needs.saved,
        )  # fmt: skip
        if self.is_main:
            record_settings(config, self.folder / CONFIG)

        # Train. Saves, validation and samples happen between steps.
        exporter = Exporter(config, trainables, run_id(identity))
        saver = Saver(config, trained, exporter, self.states, self.events, needs.saved, identity, done)
        loop = Loop(settings, trained, examples, plan, evaluator.objective, saver, evaluator, self.events, self.stop)
        with trained.weights_on_device():
            result = Result(loop.run(done), plan.total)
        return self._end(result, saver.saved)

    def _show(self, checked: report.DatasetReport) -> None:
        if self.is_main:
            log.info("%s", checked)
            self.events.emit(
                "check", good=len(checked.rows), bad=[str(bad) for bad in checked.bad], notices=checked.notices
            )

    def _split(self, checked: report.DatasetReport) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        """The rows to train on, and those held out for validation."""
        config = self.config
        rows = checked.require(config.on_bad_sample)
        count = len(rows) - config.validation_clips
        if count < 1:
            raise ValueError(
                f"--validation_clips {config.validation_clips} leaves nothing of {len(rows)} rows to train on; hold "
                "out fewer."
            )
        samples = count * config.dataset_repeat
        if samples > max(count, LARGEST_EPOCH):
            raise ValueError(
                f"--dataset_repeat {config.dataset_repeat} makes {samples} samples of {count} rows; repeated rows "
                f"make an epoch of at most {LARGEST_EPOCH}. Use --num_epochs for longer runs."
            )
        return rows[:count], rows[count:]

    def _fill(self, examples: Examples) -> bool:
        """Fill the cache, each process its share. Returns whether any process was asked to stop meanwhile."""
        if examples.cache is None:
            return False
        index, world = self.accelerator.process_index, self.accelerator.num_processes
        examples.fill(
            index, world, lambda done, total: self.events.emit("cache", done=done, total=total), lambda: bool(self.stop)
        )
        asked = torch.tensor(float(bool(self.stop)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum").item())

    def _step_of(self, earlier: tuple[Path, Progress] | None) -> int:
        """The steps that are done.

        Raises:
            ValueError: processes find different states, as on machines that do not share a folder.
        """
        done = 0 if earlier is None else earlier[1].step
        steps = self.accelerator.gather(torch.tensor([done], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"The processes of this run find different saved states, after steps {steps}; --output_path must be a "
                "folder that all machines share."
            )
        if earlier is not None and self.is_main:
            log.info("Continuing from %s, after step %d.", earlier[0], done)
        return done

    def _evaluator(self, examples: Examples, clips: Examples) -> Evaluator:
        """The evaluator with its inputs, encoded while the encoders are loaded. Its engine is set later."""
        if self.is_main:
            try:
                files = save_first_samples(examples, self.folder / FIRST_SAMPLES, self.runtime)
                self.events.emit("first_samples", files=files)
            except (OSError, ValueError) as error:
                log.warning("The first samples cannot be written to %s (%s).", self.folder / FIRST_SAMPLES, error)
        validation = [clips.encode(clips.fixed(index), index) for index in range(len(clips.rows))]
        requests = sample_requests(examples, self.config)
        objective = examples.models.objective(self.config)
        return Evaluator(self.config, examples.encoders, self.events, objective, validation, requests)

    def _trainables(self, found: load.FoundModels, encoders: Encoders) -> Trainables:
        trained = self.config.trainable_models
        device = torch.device("cpu") if self.config.streams else self.accelerator.device
        changes = load.changes_weights(self.config)
        # Weights that are changed first are quantised afterwards, so that each is rounded once.
        weights: WeightChoice = "plain" if changes else "fp8" if self.config.fp8_base else "auto"
        model = found.load_dit(self.dtype, Offload.on(device, weights=weights))
        if changes:
            load.change_weights(model, self.config)
            if self.config.fp8_base:
                for module in model.modules:
                    quantise(module)
        text_encoder = encoders.text if "text_encoder" in trained else None
        return trainable.prepare(model, self.config, text_encoder, encoders.vae if "vae" in trained else None)

    def _needs(self, trainables: Trainables, rows: Sequence[Row]) -> tuple[TrainConfig, Estimate]:
        """Estimate and log the memory and disk that the run needs. Also returns the settings with "auto" resolved.

        Activations are counted on a card only: there they have to fit beside the weights.

        Raises:
            OSError: the disk has no space for one save.
        """
        config, memory = self.config, Estimator(trainables, (row.latent_shape for row in rows))
        counts = self.accelerator.device.type != "cpu"
        if config.gradient_checkpointing_keeps == "auto":
            config = replace(config, gradient_checkpointing_keeps="inputs")
            keeping = replace(config, gradient_checkpointing_keeps="attention")
            if counts and config.use_gradient_checkpointing and not config.use_gradient_checkpointing_offload:
                there = sum(p.nbytes for p in trainables.module.parameters() if p.device.type != "cpu")
                wanted = memory.needs(keeping).device - there
                left = self.runtime.request_memory(wanted)
                config = keeping if left is None or wanted <= left else config
        found = memory.needs(config, counts=counts)
        if self.is_main:
            log.info("%s", found)
        require_space(self.folder, found.saved, config.min_free_gb)
        return config, found

    def _encode_only(self, examples: Examples) -> Result:
        """Encode the data and end."""
        if self._fill(examples):
            return self._stopped_encoding(0, len(examples.rows))
        if self.is_main:
            record_data(self.config)
        return self._end(
            Result(0, 0), 0,
            f"Encoded the data into {self.config.cache_folder}. Train on it with --task sft:train "
            f"--dataset_base_path {self.folder}.",
        )  # fmt: skip

    def _stopped_encoding(self, step: int, total: int) -> Result:
        return self._end(
            Result(step, total), step,
            "Stopped while the data was being encoded. Start the same command again to go on from "
            f"{self.config.cache_folder}.",
        )  # fmt: skip

    def _nothing_left(self, progress: Progress, total: int) -> Result:
        """The end of a run whose steps are all done already."""
        now = self.config.resolved()
        changed = [
            n for n in FREE_SETTINGS - LOCATION_SETTINGS if n in progress.config and progress.config[n] != now[n]
        ]
        others = f" (changed without effect: {', '.join(sorted(changed))})" if changed else ""
        return self._end(
            Result(progress.step, total), progress.step,
            f"Nothing was trained: the run in {self.folder} has all of its {progress.step} steps{others}. Raise "
            "--num_epochs or --max_steps to train longer, or choose another --output_path for another run.",
            logging.WARNING,
        )  # fmt: skip

    def _end(self, result: Result, saved: int, text: str = "", level: int = logging.INFO) -> Result:
        """Log the end and return `result`. `saved` is the step of the last save."""
        usual = f"Finished after {result.steps} steps; everything is in {self.folder}."
        if result.stopped:
            usual = f"Stopped after step {result.steps} of {result.total}. Start the same command again to continue."
        if self.is_main:
            log.log(level, "%s", text or usual)
        self.events.emit("end", step=result.steps, total=result.total, stopped=result.stopped, saved=saved)
        return result
