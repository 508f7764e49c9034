"""Runs that are cut off go on as if nothing had been; files appear whole or not at all."""

import dataclasses
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests import fork_server
from tests.reference import DITS, tiny_dit, tiny_vae
from tests.sampling import interrupted
from tests.sampling.runs import sample, sample_state
from tests.sampling.variants import conditioning
from wan_core.decode import decode
from wan_core.model import VideoModel
from wan_core.models import kernels
from wan_core.models.ops import onednn_has
from wan_core.runtime import Cancelled, OutOfMemoryError, Pace, Runtime
from wan_core.sampling.checkpoint import Checkpoint, RunState, digest_run, load_latents, manifest, save_latents
from wan_core.sampling.experts import RunInputs
from wan_core.sampling.predictor import NonFiniteError
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings
from wan_core.tiling import TileSettings
from wan_core.types import Curve, LatentSize, VideoSize
from wan_core.variants import match_variant

PROGRAM = "import sys, tests.conftest; from tests.sampling.interrupted import main; main(*sys.argv[1:])"
ROOT = Path(__file__).parents[2]
RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SIZE = LatentSize(3, 2, 4)


@pytest.mark.parametrize(
    ("solver", "cache", "windows"),
    [("unipc", "teacache", "none"), ("dpm++", "easycache", "blend"), ("lcm", "first block", "chain")],
)
def test_a_killed_run_goes_on_bit_for_bit(solver, cache, windows, tmp_path):
    result = tmp_path / "result.safetensors"
    command = ["-c", PROGRAM, tmp_path / "kept", solver, cache, windows, result]
    total = 7 * (2 if windows == "chain" else 1)
    at = random.randint(1, total - 1)
    with fork_server.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if int(line) == at:
                process.kill()
                break
    assert process.wait() == -9
    assert not result.exists()
    again = fork_server.run(command)
    assert again.returncode == 0, again.stderr
    steps = [int(line) for line in again.stdout.split()]
    assert steps[0] >= at
    assert steps[-1] == total
    assert torch.equal(load_file(result)["latents"], interrupted.run(None, solver, cache, windows))
    assert not list((tmp_path / "kept").iterdir())


def run(folder, dit=None, cond=None, runtime=RUNTIME, **changes):
    settings = SamplerSettings(**{"steps": 4, "seed": 1} | changes)
    checkpoint = Checkpoint(folder, every=1)
    return sample(dit or tiny_dit(), cond or conditioning("t2v", SIZE), SIZE, settings, runtime, checkpoint=checkpoint)


def stopped_at(step: int) -> Runtime:
    def report(phase, done, total, latents):
        if done == step:
            raise Cancelled("enough")

    return dataclasses.replace(RUNTIME, on_progress=report)


def cut_off(folder, **changes) -> None:
    with pytest.raises(Cancelled):
        run(folder, runtime=stopped_at(3), **changes)


def steps_of(folder, **changes) -> list[int]:
    seen = []
    runtime = dataclasses.replace(RUNTIME, on_progress=lambda phase, done, *_: seen.append(done))
    run(folder, runtime=runtime, **changes)
    return seen


def test_another_run_does_not_take_it_up(tmp_path):
    cut_off(tmp_path)
    assert steps_of(tmp_path, seed=2) == [1, 2, 3, 4]
    assert steps_of(tmp_path, guidance=GuidanceSettings(scale=4.0)) == [1, 2, 3, 4]
    assert steps_of(tmp_path, cond=conditioning("t2v", SIZE, seed=9)) == [1, 2, 3, 4]
    changed = tiny_dit()
    changed.blocks[0].ffn[0].weight[0, 0] += 1
    assert steps_of(tmp_path, dit=changed) == [1, 2, 3, 4]
    tuned = tiny_dit()
    tuned.blocks[3].ffn[0].weight[300:] *= 1.01
    assert steps_of(tmp_path, dit=tuned) == [1, 2, 3, 4]
    assert steps_of(tmp_path) == [3, 4]
    assert not list(tmp_path.iterdir())


def run_by_handle(folder, runtime=RUNTIME):
    """`run` by the model's handle, which also plans it and brings the weights."""
    model, checkpoint = VideoModel.of(tiny_dit(), match_variant(DITS["t2v"]), None, "tiny"), Checkpoint(folder, every=1)
    inputs, settings = RunInputs(conditioning("t2v", SIZE), SIZE), SamplerSettings(steps=4, seed=1)
    state = model.sample(inputs, settings, MemorySettings(), runtime, checkpoint=checkpoint)
    checkpoint.remove(state.run)
    return state.video


@pytest.mark.skipif(not onednn_has(torch.float32), reason="this PyTorch has one product only")
@pytest.mark.parametrize("run", [run, run_by_handle], ids=["alone", "by the handle"])
def test_it_goes_on_with_the_kernels_that_it_began_with(tmp_path, monkeypatch, run):
    """However fast another one seems after a restart, and however the file of choices fared."""

    def choosing(name, folder):
        monkeypatch.setenv(kernels.CACHE_FOLDER, str(tmp_path / folder))
        monkeypatch.setattr(kernels, "fastest", lambda operation, _: (
            name if name in operation.kernels else operation.default, {}))  # fmt: skip
        return kernels.run()

    monkeypatch.setattr(kernels.current(), "deterministic", False)
    with choosing("PyTorch", "a"):
        expected = run(tmp_path / "whole")
    with choosing("PyTorch", "b"), pytest.raises(Cancelled):
        run(tmp_path / "kept", runtime=stopped_at(3))
    with choosing("oneDNN", "c"):
        assert torch.equal(run(tmp_path / "kept"), expected)
    assert not (tmp_path / "c" / "kernels.jsonl").exists()
    cut_off(tmp_path / "kept")
    with kernels.run(deterministic=True):
        assert steps_of(tmp_path / "kept") == [1, 2, 3, 4]


def test_a_broken_file_starts_over_and_says_so(tmp_path, caplog):
    cut_off(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert "Starting from the beginning" in caplog.text


def test_a_state_survives_its_file(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    memory = {"solver.x": torch.randn(2, 3), "cache.residual.positive.0": torch.randn(2).bfloat16()}
    memory["cache.rule.rate.0"] = torch.tensor(0.3, dtype=torch.float64)
    state = RunState(
        latents=torch.randn(1, 16, 2, 2, 2), prefix=1, step=3, memory=memory, run="ab", schedule="c", clip=2,
        kernels={"linear 1x2x3 float32 cpu": "oneDNN"},
    )  # fmt: skip
    checkpoint.save(state)
    back = checkpoint.load("ab")
    assert torch.equal(back.latents, state.latents)
    assert {key: (value.dtype, value.tolist()) for key, value in back.memory.items()} == {
        key: (value.dtype, value.tolist()) for key, value in memory.items()
    }
    assert (back.prefix, back.step, back.run, back.schedule, back.clip, back.done) == (1, 3, "ab", "c", 2, None)
    assert back.kernels == state.kernels
    assert checkpoint.load("other") is None


def test_digests_tell_runs_apart():
    dit, cond = tiny_dit("vace"), conditioning("vace", SIZE)
    settings = SamplerSettings(steps=4)
    first = digest_run(dit, cond, SIZE, settings)
    assert first == digest_run(tiny_dit("vace"), conditioning("vace", SIZE), SIZE, settings)
    assert first == digest_run(dit, cond, SIZE, dataclasses.replace(settings, end_step=2))
    strength = dataclasses.replace(cond, vace=(dataclasses.replace(cond.vace[0], strength=Curve((0.5,))),))
    for other in (conditioning("vace", SIZE, seed=1), strength, dataclasses.replace(cond, inputs=("x",))):
        assert first != digest_run(dit, other, SIZE, settings)
    assert first != digest_run(dit, cond, LatentSize(4, 2, 4), settings)


def test_kept_latents_are_never_overwritten(tmp_path):
    raw, settings = torch.randn(1, 16, 2, 4, 6), SamplerSettings(steps=3, seed=8)
    record = manifest(settings, VideoSize.rounded(48, 32, 5), raw)
    first = save_latents(tmp_path, "mine", raw, record)
    second = save_latents(tmp_path, "mine", raw + 1, record)
    assert (first.name, second.name) == ("mine_00001_.latent", "mine_00002_.latent")
    back, read = load_latents(first)
    assert torch.equal(back, raw)
    assert read == record
    assert read["settings"]["seed"] == 8
    assert len(read["latents"]["sha256"]) == 64
    assert manifest(settings, VideoSize.rounded(48, 32, 5), raw + 1)["latents"] != record["latents"]
    assert torch.equal(load_file(first)["latent_tensor"], raw)
    with pytest.raises(ValueError, match="cannot be read"):
        load_latents(tmp_path / "absent.latent")
    with pytest.raises(ValueError, match="no video latents"):
        load_latents(Checkpoint(tmp_path).save(RunState(latents=raw, prefix=0, step=0, run="x")))


class Small:
    """A VAE on a device whose memory holds tiles of at most `cells` latent cells."""

    def __init__(self, cells: int) -> None:
        self.vae, self.cells, self.tried = tiny_vae(), cells, []
        self.config, self.source = self.vae.config, None

    def decode_pieces(self, latents, tiles, on_chunk):
        size = latents.shape[-2:] if tiles is None else tiles.size
        self.tried.append(tuple(size))
        if size[0] * size[1] > self.cells:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        yield from self.vae.decode_pieces(latents, tiles, on_chunk)


LARGE = torch.randn(1, 16, 1, 40, 60, generator=torch.manual_seed(0))


@pytest.mark.parametrize(
    ("cells", "tiles", "tried"),
    [
        (10000, None, [(40, 60)]),
        (1600, None, [(40, 60), (30, 52)]),
        (300, None, [(40, 60), (30, 52), (16, 16)]),
        (300, TileSettings(size=(20, 20), stride=(10, 10)), [(20, 20), (16, 16)]),
    ],
)
def test_decoding_falls_back_to_tiles(cells, tiles, tried, caplog):
    small = Small(cells)
    pixels = decode(small, LARGE, tiles, RUNTIME)
    assert pixels.shape == (1, 3, 1, 320, 480)
    assert small.tried == tried
    assert caplog.text.count("Out of memory while decoding") == len(tried) - 1


def test_decoding_that_cannot_fit_says_what_to_change():
    with pytest.raises(OutOfMemoryError, match=r"480x320, 1 latent frames, even in tiles of 16x16") as caught:
        decode(Small(10), LARGE, None, RUNTIME)
    assert torch.equal(caught.value.latents, LARGE)


def test_latents_without_numbers_are_not_decoded():
    bad = LARGE.clone()
    bad[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite before decoding; the video would be black"):
        decode(tiny_vae(), bad, None, RUNTIME)


def test_the_pace_tells_how_long_the_rest_takes(monkeypatch):
    pace, now = Pace(), iter([0.0, 10.0, 20.0, 30.0, 1000.0, 1400.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    said = [pace.left("Sampling", done, total) for done, total in ((1, 4), (2, 4), (3, 4), (4, 4), (1, 3), (2, 3))]
    assert said == ["", ", about 20 s left", ", about 10 s left", "", "", ", about 7 min left"]


def test_a_run_under_another_lora_is_another_run(tmp_path):
    """A kept run must not go on with weights that were changed in another way."""
    settings = SamplerSettings(steps=2)

    def kept(*adapters: str) -> str:
        state = sample_state(
            tiny_dit(), conditioning("t2v", SIZE), SIZE, settings, RUNTIME,
            checkpoint=Checkpoint(tmp_path, 1), loras=tuple(SimpleNamespace(fingerprint=each) for each in adapters),
        )  # fmt: skip
        return state.run

    assert len({kept(), kept("style 1.0"), kept("style 0.5"), kept("style 1.0")}) == 3
