"""The benchmarks run and say what they promise; how fast this machine is, no test asks."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import fork_server
from tests.benchmarks import __main__ as entry
from tests.benchmarks import cache, counting, gpu, meta, report
from tests.benchmarks.report import Row
from tests.programs import PATIENCE
from wan_core.types import LatentSize

ROOT = Path(__file__).parents[2]


def benchmarks(*arguments: str) -> subprocess.CompletedProcess:
    command = [fork_server.python(), "-m", "tests.benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("row", "ratio", "met", "said"),
    [
        (Row("a", 2.0, 4.0, "peer", "s", 0.6), 0.5, True, "met"),
        (Row("a", 2.0, 4.0, "peer", "s", 0.4), 0.5, False, "**missed**"),
        (Row("a", 0.98, 1.0, "share", "", 0.97, at_least=True), 0.98, True, "met"),
        (Row("a", 55.0, 110.0, "peer", "a", 60, absolute=True), 0.5, True, "met"),
        (Row("a", 65.0, 110.0, "peer", "a", 60, absolute=True), 65 / 110, False, "**missed**"),
        (Row("a", 7.0, goal=7.5), None, True, "met"),
        (Row("a", 7.0, 3.0, "peer"), 7 / 3, None, ""),
        (Row("a", math.nan, 3.0, "peer", goal=1.0), None, None, ""),
    ],
)
def test_a_row_says_whether_its_goal_is_met(row, ratio, met, said):
    assert row.ratio == ratio and row.met is met and row.cells()[-1] == said
    assert len(row.cells()) == len(Row.HEADER)


def test_a_section_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "RESULTS.md"
    report.write("cpu", report.section("cpu", "one", "cpu", [Row("first", 1.0)]), path)
    report.write("meta", report.section("meta", "two", "meta", [Row("second", 2.0)]), path)
    kept = path.read_text()
    report.write("cpu", report.section("cpu", "one", "cpu", [Row("third", 3.0)]), path)
    changed = path.read_text()
    assert "first" in kept and "second" in kept and changed == kept.replace("first", "third").replace("| 1 s", "| 3 s")
    assert changed.count("## ") == 2


def test_figures_for_programs_are_json():
    found = json.loads(
        report.as_json("gpu", "cpu", [Row("a", math.nan, unit=""), Row("b", 1.0, 2.0, "peer", "s", 0.6)])
    )
    assert found["rows"][0]["ours"] is None
    assert found["rows"][1]["ratio"] == 0.5 and found["rows"][1]["met"] is True


def test_work_is_counted_as_it_is_done():
    x, weight = torch.empty(8, 16, device="meta"), torch.empty(32, 16, device="meta")
    work = counting.counted(lambda: torch.nn.functional.linear(x, weight).relu_().add(1.0), [x, weight])
    assert work.flops == 2 * 8 * 16 * 32
    assert work.bytes == 4 * 8 * 32 * 4
    assert work.peak == 2 * 8 * 32 * 4
    q = torch.empty(1, 2, 5, 4, device="meta")
    attention = counting.counted(lambda: torch.nn.functional.scaled_dot_product_attention(query=q, key=q, value=q), [q])
    assert (attention.flops, attention.bytes, attention.peak) == (4 * 2 * 5 * 5 * 4, 0, q.nbytes)


def test_what_was_counted_of_two_blocks_is_what_four_take():
    shape = meta.Shape("1.3B", "480p")
    flops, _ = meta.whole(meta.ours(shape, 1), meta.ours(shape, 2), 4)
    assert flops == meta.ours(shape, 4).flops
    assert meta.ours(shape, 4).peak == meta.ours(shape, 2).peak


def test_goals_of_the_transformer_hold():
    rows = [row for row in meta.model_rows(meta.Shape("14B", "480p")) if row.goal is not None]
    assert len(rows) == 4 and all(row.met for row in rows)


def test_goals_of_the_5b_transformer_hold_with_a_clean_frame():
    shape = meta.Shape("5B", "704p")
    one, two = meta.ours(shape, 1), meta.ours(shape, 2)
    flops, traffic = meta.whole(one, two, shape.config.num_layers)
    assert flops <= 1.001 * meta.least_flops(shape) and traffic <= 60 * shape.hidden_state
    assert two.peak <= 6.5 * shape.hidden_state


def test_a_decode_is_what_its_frames_take():
    size = LatentSize(6, 4, 6)
    assert meta.vae_work(size, torch.bfloat16) == meta.decoded(size, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_goal_of_the_vae_holds(dtype):
    size = LatentSize(4, 30, 52)
    cells = meta.SIZES["480p"].latent.height * meta.SIZES["480p"].latent.width / (size.height * size.width)
    assert cells * meta.decoded(size, dtype).peak <= 0.65 * meta.OFFICIAL_VAE_PEAK["480p", dtype]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpu", "--device", "cpu"), "add --quick"),
        (("meta", "--device", "cpu"), "for the gpu mode"),
        (("meta", "--plot", "x.png"), "for the cache mode"),
        (("all",), "choice"),
    ],
)
def test_a_wrong_command_says_so(arguments, message):
    done = benchmarks(*arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_without_a_card_the_gpu_mode_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        gpu.main()


@pytest.mark.parametrize("mode", ["meta", "cpu"])
def test_the_quick_benchmarks_run(mode):
    done = benchmarks(mode, "--quick")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"## {mode}\n") and done.stdout.count("\n| ") > 5


def test_the_gpu_script_runs_at_tiny_shapes(tmp_path):
    result = tmp_path / "gpu.json"
    done = benchmarks("gpu", "--device", "cpu", "--quick", "--json", str(result))
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text())["rows"]
    names = " ".join(row["name"] for row in rows)
    for part in ("matrix product", "attention of", "step", "TeaCache", "FP8 weights", "VAE decode", "file to device"):
        assert part in names
    missing = [row["name"] for row in rows if row["name"].startswith("not measured")]
    assert all("diffsynth" in name or "diffusers" in name or "products" in name for name in missing), missing


def test_the_caches_are_compared_on_the_bundled_model(tmp_path):
    done = benchmarks("cache", "--quick", "--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert {row["cache"] for row in rows} == {"fewer steps", *cache.CANDIDATES}
    assert all(row["counted"] >= 1 and row["measured"] > 0 and row["ssim"] <= 1 for row in rows)
    assert done.stdout.count("\n| ") == len(rows) + 2
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size == (800, 500)


def test_likeness_of_frames_is_measured_as_published():
    frames = np.random.default_rng(0).random((2, 24, 24, 3))
    assert cache.psnr(frames, frames) == math.inf and cache.ssim(frames, frames) == pytest.approx(1)
    assert cache.psnr(frames, frames + 0.1) == pytest.approx(20)
    flat, other = np.full((1, 24, 24, 3), 0.2), np.full((1, 24, 24, 3), 0.6)
    assert cache.ssim(flat, other) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))
    assert cache.ssim(frames, 1 - frames) < 0


def test_every_mode_has_its_module():
    assert all((Path(entry.__file__).parent / f"{mode}.py").is_file() for mode in entry.MODES)
