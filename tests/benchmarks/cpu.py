"""Time and peak memory on the CPU against diffusers and DiffSynth-Studio, at equal weights, shapes and results.

Every contestant is a process of its own (`peers_worker`). The first run of a job is compared with ours and gives the
peak; then runs of all contestants take turns, so that what else the machine does meets them alike, and medians count.
Peaks are of the whole process, with the libraries that it imported and the weights, and of the run alone.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pack
from tests.benchmarks.peers import Job
from tests.benchmarks.report import Row
from wan_core import bundled
from wan_core.catalog import TI2V_BASE, published, published_config
from wan_core.models.config import DiTConfig, TextEncoderConfig, VAEConfig
from wan_core.models.dit import WanDiT
from wan_core.models.text_encoder import UMT5Encoder
from wan_core.models.vae import WanVAE
from wan_core.planning.modules import VAE_22

log = logging.getLogger("wancore")

OURS = "ours"
DIFFSYNTH_PYTHON = "WANCORE_DIFFSYNTH_PYTHON"
"""Environment variable with the Python of an environment that holds `diffsynth`, torch and torchvision."""

TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest relative error, in the 2-norm, of what a peer computes against ours; beyond it nothing is timed. In bfloat16
each contestant keeps other parts in float32: two layers of UMT5 with random weights are 0.05 (ours), 0.05 (diffusers)
and 0.07 (DiffSynth-Studio) from their float32 values.
"""

RUN_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15}
"""The same of a whole run, whose steps and guidance of 5 magnify what bfloat16 rounds."""

MEMORY_GOAL = 0.9
QUICK_BUDGET = {"repeats": 2}
MB = 1e6

NOTES = (
    "Every contestant is a process of its own; runs take turns and medians count. Peaks of the process hold imported "
    "libraries and weights, those of the run are what it adds. Results agree to the difference given.",
)


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: for the table.
        kind: what contestants do, a key of their `KINDS`.
        models: (prefix in the weights' file, module, its config) of each model.
        inputs: the tensors that enter.
        goals: the largest ratio of time wanted, by dtype.
        peers: who can do it.
        repeats: timed runs of each contestant.
        call: arguments of a whole run.
        dtypes: those that are measured.
    """

    name: str
    kind: str
    models: tuple[tuple[str, type[nn.Module], Any], ...]
    inputs: dict[str, Tensor]
    goals: dict[str, float] = field(default_factory=dict)
    peers: tuple[str, ...] = ("diffusers", "diffsynth")
    repeats: int = 5
    call: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[str, ...] = tuple(TOLERANCES)

    @property
    def tolerances(self) -> dict[str, float]:
        return RUN_TOLERANCES if self.call else TOLERANCES

    @property
    def config(self) -> dict[str, Any]:
        if not self.call:
            return _sizes(self.models[0][2])
        with tempfile.TemporaryDirectory() as folder:
            bundled.write_tokenizer(Path(folder) / bundled.TOKENIZER_FILE)
            tokenizer = (Path(folder) / bundled.TOKENIZER_FILE).read_text(encoding="utf-8")
        configs = {prefix.rstrip("."): _sizes(config) for prefix, _, config in self.models}
        return {**configs, "call": self.call, "tokenizer": tokenizer}

    def job(self, folder: Path, dtype: str) -> Job:
        """The job, its files written into `folder`: weights drawn by the recipe of the bundled models, once for all
        jobs of the same models.
        """
        described = zlib.crc32(repr([(prefix, cls.__name__, config) for prefix, cls, config in self.models]).encode())
        weights = folder / f"{described}.safetensors"
        if not weights.exists():
            drawn = {}
            for prefix, cls, config in self.models:
                with torch.device("meta"):
                    module = cls(config)
                drawn |= {prefix + name: tensor for name, tensor in bundled.state_dict(module).items()}
            save_file(drawn, weights)
        save_file(self.inputs, folder / "inputs.safetensors")
        return Job(self.kind, self.config, dtype, str(weights), str(folder / "inputs.safetensors"))


def _sizes(config: Any) -> dict[str, Any]:
    """The numbers of a configuration, and of its latents."""
    sizes = {name: value for name, value in asdict(config).items() if name != "geometry"}
    geometry = getattr(config, "geometry", None)
    if geometry is None:
        return sizes
    latents = {"channels": geometry.channels, "stride": geometry.spatial_stride, "frame_times": geometry.frame_times}
    return {**sizes, "latents": latents | {"mean": geometry.mean, "std": geometry.std}}


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _dit_inputs(config: DiTConfig, frames: int, height: int, width: int) -> dict[str, Tensor]:
    shape = (1, config.out_channels, frames, height, width)
    return {
        "latents": _drawn(*shape),
        "text": _drawn(1, 512, config.text_dim, seed=1),
        "timestep": torch.tensor([500.0]),
        "target": _drawn(*shape, seed=2),
    }


def _text_inputs(config: TextEncoderConfig, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(3, config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(512) < tokens).long()[None]
    return {"ids": ids * mask, "mask": mask}


def cases(quick: bool) -> list[Case]:
    """What is measured: real widths and a few layers, or with `quick` small models and one repetition."""
    if quick:
        dit, vae, text = replace(bundled.DIT, num_layers=2), bundled.VAE, replace(bundled.TEXT_ENCODER, num_layers=1)
        latent, film, pixels = (2, 16, 16), (2, 8, 8), (5, 64, 64)
        dit_22, vae_22 = replace(bundled.DIT_5B, num_layers=2), bundled.VAE_22
    else:
        dit, vae = DiTConfig(num_layers=2), VAEConfig()
        dit_22, vae_22 = replace(published_config(published(TI2V_BASE)), num_layers=1), VAE_22
        text = TextEncoderConfig(vocab_size=32768, num_layers=2)
        latent, film, pixels = (4, 32, 48), (3, 12, 12), (9, 96, 96)
    tokens = latent[0] * latent[1] * latent[2] // 4
    size = f"{pixels[2]}x{pixels[1]}x{pixels[0]}"
    dit_models, vae_models = (("", WanDiT, dit),), (("", WanVAE, vae),)
    text_models = (("", UMT5Encoder, text),)
    dit_models_22, vae_models_22 = (("", WanDiT, dit_22),), (("", WanVAE, vae_22),)
    decoded = {"latents": _drawn(1, vae.latent_channels, *film)}
    encoded = {"video": _drawn(1, 3, *pixels).clamp(-1, 1)}
    goals = {"float32": 1.0, "bfloat16": 0.9}
    found = [
        Case(f"DiT forward, {tokens} tokens", "dit", dit_models, _dit_inputs(dit, *latent), goals),
        Case(f"DiT training step, {tokens} tokens", "train", dit_models, _dit_inputs(dit, *latent), repeats=3),
        Case(f"VAE decode {size}", "decode", vae_models, decoded, {"float32": 0.8}),
        Case(f"VAE encode {size}", "encode", vae_models, encoded),
        Case(
            f"Wan 2.2 5B DiT forward, {tokens} tokens, clean frame", "dit", dit_models_22, _dit_inputs(dit_22, *latent),
            goals, ("diffusers",), repeats=2,
        ),
        *_vae_22(vae_models_22, quick),
        Case("UMT5, 512 tokens", "text", text_models, _text_inputs(text, 512)),
        Case("UMT5, 80 tokens", "text", text_models, _text_inputs(text, 80)),
        _run(quick),
    ]  # fmt: skip
    return [replace(case, **QUICK_BUDGET) for case in found] if quick else found


def _vae_22(models: tuple[tuple[str, type[nn.Module], Any], ...], quick: bool) -> list[Case]:
    """The VAE of Wan 2.2 is four times as wide as that of 2.1, so smaller films take it as long; in bfloat16 the
    smallest, because diffusers needs minutes for others on a processor that cannot multiply in it.
    """
    goals, peers, found = dict.fromkeys(TOLERANCES, 0.9), ("diffusers",), []
    for side, dtypes in ((32, ("bfloat16",)), (64, ("float32",)), (128, ("float32",)))[: 2 if quick else 3]:
        latents = {"latents": _drawn(1, models[0][2].latent_channels, 2, side // 16, side // 16)}
        video = {"video": _drawn(1, 3, 5, side, side).clamp(-1, 1)}
        for kind, inputs in (("decode", latents), ("encode", video)):
            name = f"Wan 2.2 VAE {kind} {side}x{side}x5"
            found.append(Case(name, kind, models, inputs, goals, peers, repeats=2, dtypes=dtypes))
    return found


def _run(quick: bool) -> Case:
    """Prompt to frames with the bundled tiny model."""
    side, frames, steps = (64, 5, 2) if quick else (256, 17, 10)
    call = {
        "prompt": "a dog is running over the green field",
        "negative_prompt": "dark",
        "seed": 0,
        "height": side,
        "width": side,
        "num_frames": frames,
        "num_inference_steps": steps,
        "tiled": False,
    }
    models = (
        ("dit.", WanDiT, bundled.DIT),
        ("vae.", WanVAE, bundled.VAE),
        ("text_encoder.", UMT5Encoder, bundled.TEXT_ENCODER),
    )  # fmt: skip
    name = f"tiny model, prompt to frames, {side}x{side}x{frames}, {steps} steps"
    return Case(
        name, "run", models, {"none": torch.zeros(1)}, {"float32": 0.8, "bfloat16": 0.8}, ("diffsynth",), call=call
    )


class ContestantError(RuntimeError):
    """A contestant could not do its job."""


class Contestant:
    """The process of a contestant, see `peers_worker`."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, "-m", "tests.benchmarks.peers_worker", name],
            cwd=pack.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "DIFFSYNTH_SKIP_DOWNLOAD": "true", "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, order: Any) -> dict[str, Any]:
        """The answer to `order`.

        Raises:
            ContestantError: it failed, with what it said.
        """
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or '{"error": "the process ended"}')
        except BrokenPipeError:
            answer = {"error": "the process ended"}
        if "error" in answer:
            raise ContestantError(f"{self.name}: {answer['error'].strip().splitlines()[-1]}")
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def contestants() -> Iterator[dict[str, Contestant]]:
    """Ours, and the peers that are installed; of the others the log says so."""
    pythons = {OURS: sys.executable, "diffusers": sys.executable, "diffsynth": os.environ.get(DIFFSYNTH_PYTHON)}
    with ExitStack() as stack:
        found = {}
        for name, python in pythons.items():
            if python is None:
                log.warning("%s is not set: there are no figures of DiffSynth-Studio.", DIFFSYNTH_PYTHON)
                continue
            found[name] = Contestant(name, python)
            stack.callback(found[name].close)
        yield found


@dataclass(frozen=True)
class Figures:
    """What one contestant did: seconds of its runs, bytes of its process at most and before the first run."""

    seconds: Sequence[float]
    peak: float
    before: float
    error: float


def measure(case: Case, dtype: str, everyone: dict[str, Contestant], folder: Path) -> dict[str, Figures]:
    """The figures of all who take part in `case`; without seconds where the result is not ours. Files go to `folder`.

    Raises:
        ContestantError: ours could not do it. Peers that cannot are left out, and the log says so.
    """
    taking_part = {name: one for name, one in everyone.items() if name in (OURS, *case.peers)}
    job, firsts = asdict(case.job(folder, dtype)), {}
    for name, one in list(taking_part.items()):
        try:
            one.ask(job)
            firsts[name] = one.ask({"output": str(folder / f"{name}.safetensors")})
        except ContestantError as error:
            if name == OURS:
                raise
            log.warning("%s, %s: %s", case.name, dtype, error)
            del taking_part[name]
    errors = {name: difference(folder, name) for name in taking_part}
    timed = {name: one for name, one in taking_part.items() if errors[name] <= case.tolerances[dtype]}
    seconds: dict[str, list[float]] = {name: [] for name in taking_part}
    for turn in range(case.repeats):
        order = list(timed)[turn % len(timed) :] + list(timed)[: turn % len(timed)]
        for name in order:
            seconds[name].append(timed[name].ask({"output": None})["seconds"])
    for one in taking_part.values():
        one.ask(None)
    nothing = float("nan")
    return {
        name: Figures(seconds[name], first["peak"] or nothing, first["before"] or nothing, errors[name])
        for name, first in firsts.items()
    }


def difference(folder: Path, name: str) -> float:
    """The largest relative error, in the 2-norm, of a contestant's tensors against ours."""
    got, expected = (load_file(folder / f"{which}.safetensors") for which in (name, OURS))
    return max(((got[key] - expected[key]).norm() / expected[key].norm()).item() for key in expected)


def rows(case: Case, dtype: str, figures: dict[str, Figures]) -> Iterator[Row]:
    """The table's rows of one case: against each peer the time, the peaks, and how far results are apart."""
    ours, what = figures[OURS], f"{case.name}, {dtype}"
    if len(figures) == 1:
        yield Row(what, median(ours.seconds))
    for name, peer in figures.items():
        if name == OURS:
            continue
        if peer.seconds:
            yield Row(what, median(ours.seconds), median(peer.seconds), name, goal=case.goals.get(dtype))
            yield Row(f"{what}: peak of the process", ours.peak / MB, peer.peak / MB, name, "MB", MEMORY_GOAL)
            yield Row(f"{what}: peak of the run", *((f.peak - f.before) / MB for f in (ours, peer)), name, "MB")
        yield Row(f"{what}: difference to {name}", peer.error, unit="", goal=case.tolerances[dtype])


def main(quick: bool) -> list[Row]:
    """Measure and say how it goes; under ten minutes on two cores, or with `quick` under one."""
    found: list[Row] = []
    with contestants() as everyone, tempfile.TemporaryDirectory(prefix="wancore-benchmark-") as folder:
        for number, case in enumerate(cases(quick)):
            # A check that it runs takes turns.
            for dtype in case.dtypes[number % len(case.dtypes) :: 2] if quick else case.dtypes:
                fresh = list(rows(case, dtype, measure(case, dtype, everyone, Path(folder))))
                found += fresh
                for row in fresh:
                    log.info("%s", "  ".join(cell for cell in row.cells() if cell))
    return found
