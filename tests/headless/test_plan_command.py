"""`python -m headless plan`: what it says, what it reads, how it ends."""

import json
import subprocess
from pathlib import Path
from unittest.mock import ANY

import pytest

from tests import fork_server
from tests.programs import PATIENCE
from wan_core import bundled, catalog
from wancore.headless.cli import main
from wancore.nodes import host
from wancore.nodes.training_inputs import parse_flags

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))


@pytest.fixture(autouse=True)
def models(tmp_path):
    folder = tmp_path / "models"
    host.configure(device="cpu", models_dir=folder)
    yield folder
    host.configure()


def changed(tmp_path: Path, name: str, **nodes) -> Path:
    """A shipped workflow with inputs of some nodes (by class) changed; None takes an input away."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        for key, value in nodes.get(node["class_type"], {}).items():
            node["inputs"][key] = value
            if value is None:
                del node["inputs"][key]
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(prompt))
    return path


def plan(*arguments: object) -> int:
    return main(["plan", *map(str, arguments)])


def planned(capsys, *arguments: object) -> dict:
    plan(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_shipped_workflow_can_be_planned(path, models, capsys):
    assert plan(path, "--vram", 1, "--tiny") == 0
    out = capsys.readouterr().out
    assert "fits" in out.splitlines()[0]
    phases = {line.split("  ")[0].partition(", expert")[0] for line in out.splitlines()}
    assert {"text encoding", "sampling", "VAE decoding"} <= phases
    assert "Not on this machine" not in out
    assert not models.exists(), "nothing is made or downloaded"


def test_published_models_are_planned_without_their_files(capsys):
    assert plan(ROOT / "workflows" / "api" / "t2v_14b.json", "--vram", 8) == 0
    out = capsys.readouterr().out
    assert "fits" in out.splitlines()[0]
    assert "of 40 blocks stay, guidance interleaved" in out
    assert "  - Wan-AI/Wan2.1-T2V-14B/diffusion_pytorch_model*.safetensors" in out


def test_a_plan_takes_recommended_settings_as_a_run_does(capsys):
    """Without guidance there is one branch, and nothing is kept of the other."""
    file = ROOT / "workflows" / "api" / "t2v_14b.json"
    whole, fast = (planned(capsys, file, "--vram", 80, *flags) for flags in ((), ("--recommended", "LightX2V 2.1")))
    peaks = [next(p["peak_bytes"] for p in plans["plans"][0]["phases"] if p["name"] == "sampling")
             for plans in (whole, fast)]  # fmt: skip
    assert peaks[1] < peaks[0]
    assert plan(file, "--more-motion", "--set", "Sampler.solver=euler") == 2
    assert "more_motion changes the recommended settings of few-step weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t2v_14b", "ti2v_5b"])
def test_the_tiny_autoencoder_is_planned_in_place_of_the_vae(capsys, name):
    """It takes a part of the memory, and its file is named where it is not on this machine."""
    file = ROOT / "workflows" / "api" / f"{name}.json"
    whole, tiny = (planned(capsys, file, "--vram", 80, *sets) for sets in ((), ("--set", "Decode.decoder=taew2")))
    before, after = (plans["plans"][0]["phases"][-1] for plans in (whole, tiny))
    assert (before["name"], after["name"]) == ("VAE decoding", "decoding by the tiny autoencoder")
    assert after["peak_bytes"] < before["peak_bytes"] / 2
    channels = {"t2v_14b": 1, "ti2v_5b": 2}[name]
    assert f"vae_approx/taew2_{channels}.safetensors" in tiny["absent"]


def test_a_training_is_planned_by_count_with_what_makes_it_fit(capsys):
    file = ROOT / "workflows" / "api" / "train_lora_t2v.json"
    (train,) = (k for k, v in json.loads(file.read_text()).items() if v["class_type"] == "WanCoreTrainLora")
    sizes = ("--set", f"{train}.model=Wan-AI/Wan2.1-T2V-14B", "--vram", 16)
    assert plan(file, *sizes) == 1
    out = capsys.readouterr().out
    assert "Training Wan-AI/Wan2.1-T2V-14B. Device memory by count" in out and "does not fit into 16.0 GB" in out
    flags = out.rsplit("it fits: ", 1)[1].split(".\n")[0]
    assert parse_flags(flags) == {"use_gradient_checkpointing_offload": True, "stream_base": True, "vram_limit": ANY}


def test_a_plan_of_a_training_is_json_too(capsys):
    file = ROOT / "workflows" / "api" / "train_lora_t2v.json"
    (training,) = planned(capsys, file, "--tiny", "--vram", 1)["trainings"]
    assert training["fits"] and training["flops"] > 0 and training["activations"] > 0


def test_too_small_a_card_is_exit_code_1_with_what_is_missing_and_what_helps(capsys):
    file = ROOT / "workflows" / "api" / "t2v_1.3b.json"
    assert plan(file, "--vram", 1) == 1
    out = capsys.readouterr().out
    assert "does not fit, " in out
    assert "GB too much" in out
    assert "With --fit" in out


def test_fit_says_what_it_changed(capsys, tmp_path):
    file = changed(tmp_path, "t2v", WanCoreSampler={"cfg_mode": "batched"})
    sizes = ("--set", "Sampler.width=832", "--set", "Sampler.height=480", "--set", "Sampler.num_frames=81")
    least = planned(capsys, file, "--tiny", "--vram", 0.1, *sizes)["plans"][0]
    sampling = next(phase for phase in least["phases"] if phase["name"] == "sampling")
    short = (sampling["peak_bytes"] - 2**10) / 2**30
    small = planned(capsys, file, "--tiny", "--vram", short, *sizes, "--fit")["plans"][0]
    assert small["fits"]
    assert small["changes"] == ["cfg_mode sequential: one branch of guidance after the other"]
    assert small["peak_vram"] <= small["limit"]


def test_options_and_files_on_this_machine_count(capsys, tmp_path, models):
    bundled.write_model(models, catalog.TINY)
    (models / "diffusion_models").mkdir()
    (models / catalog.TINY / catalog.DIT_FILE).rename(models / "diffusion_models" / "mine.safetensors")
    prompt = json.loads((ROOT / "workflows" / "api" / "t2v.json").read_text(encoding="utf-8"))
    sampler = next(node for node in prompt.values() if node["class_type"] == "WanCoreSampler")
    for node in prompt.values():
        for loader, name in (("text_encoder", catalog.TINY), ("vae", catalog.TINY)):
            if node["class_type"].endswith("Loader") and loader in node["inputs"]:
                node["inputs"][loader] = name
        if "model" in node["inputs"] and isinstance(node["inputs"]["model"], str):
            node["inputs"]["model"] = "mine.safetensors"
    prompt["memory"] = {"class_type": "WanCoreMemory", "inputs": {"vram_limit": 0.0, "stream_all": True}}
    prompt["cache"] = {"class_type": "WanCoreTeaCache", "inputs": {"threshold": 0.1}}
    prompt["windows"] = {
        "class_type": "WanCoreWindows",
        "inputs": {"sliding_window_size": 5, "sliding_window_stride": 3},
    }
    sampler["inputs"] |= {"width": 96, "height": 64, "num_frames": 81, "memory": ["memory", 0]}
    file = tmp_path / "own.json"
    peaks = []
    for extra in ({}, {"cache": ["cache", 0]}, {"cache": ["cache", 0], "windows": ["windows", 0]}):
        sampler["inputs"] |= extra
        file.write_text(json.dumps(prompt))
        found = planned(capsys, file, "--vram", 4)
        assert not found["absent"]
        sampling = next(phase for phase in found["plans"][0]["phases"] if phase["name"] == "sampling")
        assert sampling["note"].startswith("0 of 4 blocks stay"), "stream_all was set"
        peaks.append(sampling["peak_bytes"])
    assert peaks[2] < peaks[0] < peaks[1]


BAD = {
    "no sampler": ({}, ["--set", "x"], "expected <node title or id>"),
    "vram is text": ({}, ["--vram", "nan"], "--vram must be a number"),
    "vram is nothing": ({}, ["--vram", "0"], "--vram must be from 0.1"),
    "an unknown file": ({"WanCoreModelLoader": {"model": "lost.safetensors"}}, [], "no file 'lost.safetensors'"),
    "no model": ({"WanCoreSampler": {"model": None}}, [], "Required input is missing: model"),
    "a node that is not there": ({"WanCoreSampler": {"model": ["99", 0]}}, [], "linked to node #99"),
    "a link to itself": ({"WanCoreTextEncode": {"text_encoder": ["4", 0]}}, [], "cycle"),
    "an output of another kind": (
        {"WanCoreSampler": {"conditioning": ["1", 0]}},
        [],
        "conditioning is of another kind",
    ),
    "a size of no pixels": ({"WanCoreSampler": {"width": 0}}, [], "width must be a whole number"),
    "an unknown mode": ({"WanCoreSampler": {"cfg_mode": "both"}}, [], "cfg mode must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_exit_code_2_and_says_what_to_do(case, tmp_path, capsys):
    nodes, arguments, message = BAD[case]
    given = arguments if "--vram" in arguments else [*arguments, "--vram", "8"]
    assert plan(changed(tmp_path, "t2v", **nodes), *given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_workflow_without_a_sampler_is_refused(tmp_path, capsys):
    file = tmp_path / "none.json"
    file.write_text(json.dumps({"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}))
    assert plan(file, "--vram", 8) == 2
    assert "no sampler or training of this pack" in capsys.readouterr().err
    assert plan(tmp_path / "absent.json", "--vram", 8) == 2


@pytest.mark.parametrize(
    ("name", "nodes", "message"),
    [
        ("i2v_480p", {"WanCoreModelLoader": {"model": catalog.T2V_BASE}}, "but got input_image"),
        ("fun_v1.1_camera_1.3b", {"WanCoreSampler": {"conditioning": ["5", 0]}}, "needs input_image and camera"),
    ],
)
def test_what_the_run_would_refuse_the_plan_refuses(name, nodes, message, tmp_path, capsys):
    assert plan(changed(tmp_path, name, **nodes), "--vram", 8) == 2
    assert message in capsys.readouterr().err


def test_the_command_as_a_process(tmp_path):
    command = [fork_server.python(), "-m", "headless", "plan", "workflows/api/t2v.json", "--tiny", "--vram"]
    done = [
        subprocess.run([*command, gib], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
        for gib in ("1", "0.2")
    ]
    assert [run.returncode for run in done] == [0, 1]
    assert done[0].stdout.startswith("WanCore/tiny, 96x64, 17 frames: fits")
    assert "0.1 GB too much" in done[1].stdout
