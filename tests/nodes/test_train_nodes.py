"""The training nodes as ComfyUI calls them, with real processes on the bundled models."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import fork_server
from tests.nodes.running import outputs as run
from tests.programs import wait_for
from tests.trainer.runs import ROOT, environment
from wan_core import catalog
from wan_core.model_files import DiTSettings, experts_of, inspect_experts, load_dit
from wan_core.runtime import Cancelled
from wancore.nodes import NODE_CLASS_MAPPINGS, host, training_inputs, training_run
from wancore.nodes.launcher import ChildError, pack_command
from wancore.nodes.model_loader import ModelLoader
from wancore.nodes.training_inputs import defaults
from wancore.nodes.training_run import Display, step_line
from wancore.trainer.config import TrainConfig
from wancore.trainer.data.synthetic import write_dataset

NODES = NODE_CLASS_MAPPINGS
SMALL = {"width": 32, "height": 32, "num_frames": 5, "fps": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models and data, under a name that shells do not like."""
    root = tmp_path_factory.mktemp("place") / "with space 训练"
    write_dataset(root / "data 数据", count=2, width=32, height=32, num_frames=9)
    return root


@pytest.fixture(autouse=True)
def configured(place, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "executable", fork_server.python())
    host.configure(device="cpu", models_dir=place / "models", input_dir=place, output_dir=tmp_path / "out 输出")
    yield
    host.configure()


@pytest.fixture(scope="module")
def data(place):
    host.configure(device="cpu", models_dir=place / "models", input_dir=place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", fork_server.python())
        return run("WanCoreTrainingData", folder="data 数据", dataset_repeat=50, **SMALL)[0]


def lora(data, **changes):
    values = {
        "model": catalog.TINY, "text_encoder": catalog.TINY, "vae": catalog.TINY, "name": "风格 1", "part": "dit",
        "lora_rank": 4, "learning_rate": 1e-2, "max_steps": 2, "mixed_precision": "no", "flags": "--min_free_gb 0",
    }  # fmt: skip
    return run("WanCoreTrainLora", data=data, **{**values, **changes})


def out(tmp_path: Path, name: str = "风格 1") -> Path:
    return tmp_path / "out 输出" / "training" / name


def steps(folder: Path) -> list[int]:
    told = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["step"] for event in map(json.loads, told) if event["event"] == "step"]


def test_a_data_set_is_reported_and_shown(place):
    told, report, sheet = run(
        "WanCoreTrainingData", folder=str(place / "data 数据"), extra_inputs="control_video, reference_image", **SMALL
    )
    assert "2 good rows, 0 bad" in report
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert told.settings["extra_inputs"] == "control_video, reference_image" and told.settings["fps"] is None


def test_bad_data_is_one_report(tmp_path, monkeypatch):
    monkeypatch.setenv("WANCORE_FOLDERS", os.pathsep.join(["", "/nowhere", str(tmp_path)]))
    rows = ["video,prompt", *(f"none{i}.mp4,a dog" for i in range(60))]
    (tmp_path / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(ValueError, match="0 good rows, 60 bad") as error:
        run("WanCoreTrainingData", folder=str(tmp_path), **SMALL)
    assert "row 1 " in str(error.value) and "row 60" in str(error.value)


@pytest.mark.parametrize(
    ("node_id", "changes", "message"),
    [
        ("WanCoreTrainingData", {"folder": "nowhere"}, "no folder 'nowhere'"),
        ("WanCoreTrainingData", {"folder": str(ROOT)}, "where a workflow may read"),
        ("WanCoreTrainingData", {"folder": "data 数据/../../.."}, "where a workflow may read"),
        (
            "WanCoreTrainingData",
            {"folder": "data 数据", "metadata": "/etc/passwd"},
            "not in the folder of the data set",
        ),
        ("WanCoreTrainingData", {"folder": "data 数据", "metadata": "../x.csv"}, "not in the folder of the data set"),
        ("WanCoreTrainingData", {"extra_inputs": "control"}, "control_video"),
        ("WanCoreTrainingData", {"height": 0}, "--width"),
        ("WanCoreTrainingData", {"fps": float("nan")}, "fps"),
        ("WanCoreTrainLora", {"lora_rank": 0}, "lora_rank"),
        ("WanCoreTrainLora", {"learning_rate": float("nan")}, "learning_rate"),
        ("WanCoreTrainLora", {"name": "../elsewhere"}, "plain name"),
        ("WanCoreTrainLora", {"name": ".."}, "plain name"),
        ("WanCoreTrainLora", {"name": " "}, "plain name"),
        ("WanCoreTrainLora", {"flags": "--lora_alhpa 3"}, "Did you mean --lora_alpha"),
        ("WanCoreTrainLora", {"flags": "--lora_alpha 'x"}, "No closing quotation"),
        ("WanCoreTrainLora", {"flags": "--fp8_models x.pth"}, "--fp8_models is for the command line"),
        ("WanCoreTrainLora", {"flags": "--config x.json"}, "--config is for the command line"),
        ("WanCoreTrainLora", {"flags": "--output_path x"}, "name decides"),
        ("WanCoreTrainLora", {"flags": "--input_contains_end_image"}, "extra_inputs of Training Data"),
        ("WanCoreTrainLora", {"flags": "--help"}, "There is no flag --help"),
        ("WanCoreTrainLora", {"flags": "--optimizer transformers.pipeline"}, "not one of the optimizers"),
        ("WanCoreTrainLora", {"flags": "--log_with wandb"}, "takes tensorboard"),
        ("WanCoreTrainLora", {"flags": "--resume /elsewhere"}, "auto or never"),
        ("WanCoreTrainLora", {"flags": "--model_id_with_origin_paths evil/repo:*.py"}, "choose models in the node"),
        ("WanCoreTrainLora", {"flags": "--dataset_base_path /"}, "Training Data"),
        ("WanCoreTrainLora", {"flags": "--lora_checkpoint /x"}, "in a shell"),
        ("WanCoreTrainLora", {"gpus": 65}, "gpus"),
        ("WanCoreTrainLora", {"gpus": 64}, "this machine has"),
        ("WanCoreTrainLora", {"adapter": "../x"}, "Value not in list: adapter"),
        ("WanCoreTrainingData", {"width": 10**9}, "width"),
        ("WanCoreTrainLora", {"model": "other"}, "Value not in list"),
        ("WanCoreTrainLora", {"model": "Wan-AI/Wan2.1-T2V-14B"}, "Downloads are switched off"),
        ("WanCoreTrainModel", {"validation_clips": -1}, "validation_clips"),
        ("WanCoreTrainingData", {"folder": "n" * 300}, "There is no folder"),
        ("WanCoreLossPlot", {"run": "none"}, "no training run"),
        ("WanCoreLossPlot", {"run": str(ROOT)}, "not where a workflow may read"),
        ("WanCoreTrainedWeights", {"weights": __file__}, "where a workflow may read"),
        ("WanCoreTrainedWeights", {"weights": "none.safetensors"}, "no file of trained weights"),
        ("WanCoreTrainedWeights", {"weights": "n" * 300}, "no file of trained weights"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_anything_runs(node_id, changes, message):
    cls = NODES[node_id]
    tiny = {"model": catalog.TINY, "text_encoder": catalog.TINY, "vae": catalog.TINY}
    values = {**defaults(cls), **(tiny if node_id.startswith("WanCoreTrainL") or "TrainM" in node_id else {})}
    if node_id in ("WanCoreLossPlot", "WanCoreTrainedWeights"):
        values = {}
    assert message in str(cls.VALIDATE_INPUTS(**{**values, **changes}))


@pytest.mark.parametrize("node_id", ["WanCoreTrainLora", "WanCoreTrainModel", "WanCoreTrainingData"])
def test_the_defaults_are_valid_and_links_are_left_to_later(node_id):
    cls = NODES[node_id]
    tiny = {"model": catalog.TINY, "text_encoder": catalog.TINY, "vae": catalog.TINY, "data": None}
    extra = tiny if node_id != "WanCoreTrainingData" else {}
    assert cls.VALIDATE_INPUTS(**{**defaults(cls), **extra}) is True
    assert cls.VALIDATE_INPUTS(**{name: None for name in defaults(cls)} | extra) is True


def test_what_only_training_needs_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(training_run, "PACKAGES", ("torch", "no_such_package"))
    told = NODES["WanCoreTrainLora"].VALIDATE_INPUTS(**defaults(NODES["WanCoreTrainLora"]))
    assert "needs no_such_package." in told and f'"{sys.executable}" -m pip install -r' in told


def test_a_run_is_stopped_continued_and_finished(data, tmp_path, monkeypatch):
    """Whoever asks: each call is a new node, as after a restart of ComfyUI."""
    folder = out(tmp_path)

    def cancel():
        if (folder / "events.jsonl").exists() and len(steps(folder)) >= 3:
            raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(host.current, "check_cancelled", cancel)
        with pytest.raises(Cancelled):
            lora(data, max_steps=60, learning_rate=1e-3)
    done = len(steps(folder))
    assert 3 <= done < 60 and list((folder / "states").iterdir()) and not (folder / "finished.json").exists()

    total = done + 3
    weights, chart, samples, count, report = lora(data, max_steps=total, learning_rate=1e-3)
    assert steps(folder) == list(range(1, total + 1)) and count == total and "Finished" in report
    assert Path(weights).parent == folder and chart.shape == (1, 640, 960, 3) and samples.shape == (5, 32, 32, 3)
    assert load_file(weights)

    with monkeypatch.context() as patch:
        patch.setattr(training_run, "supervise", None)
        assert lora(data, max_steps=total, learning_rate=1e-3)[0] == weights

    with pytest.raises(ChildError, match="lora_rank was 4 and is 8") as error:
        lora(data, max_steps=total + 1, learning_rate=1e-3, lora_rank=8)
    assert str(folder / "log.txt") in str(error.value) and "Traceback" not in str(error.value)


def test_trained_weights_change_what_the_model_draws(data, tmp_path):
    weights = lora(data)[0]
    model = run("WanCoreModelLoader", model=catalog.TINY)[0]
    encoder = run("WanCoreTextEncoderLoader", text_encoder=catalog.TINY)[0]
    cond = run("WanCoreTextEncode", text_encoder=encoder, prompt="a dog")[0]

    def drawn(handle):
        size = {"seed": 1, "steps": 2, "cfg": 1.0, "shift": 5.0, "solver": "euler", **SMALL}
        size.pop("fps")
        return run("WanCoreSampler", model=handle, conditioning=cond, **size)[0]["samples"]

    changed, report = run("WanCoreTrainedWeights", model=model, weights=weights, strength=1.0)
    assert not torch.equal(drawn(changed), drawn(model)) and "LoRA" in report
    assert run("WanCoreTrainedWeights", model=model, weights="training/风格 1/step-2.safetensors")[1] == report
    chart, told = run("WanCoreLossPlot", run="风格 1")
    assert chart.shape == (1, 640, 960, 3) and told == "2 of 2 steps"


def test_each_expert_is_a_run_of_its_own_on_its_timesteps(data, place, tmp_path, monkeypatch):
    pair = catalog.tiny_id("t2v", is_pair=True)
    monkeypatch.setitem(ModelLoader.ROWS, pair, catalog.PAIR_PATTERNS)
    weights = Path(lora(data, model=pair, expert="low")[0])
    assert weights.parent == out(tmp_path, "风格 1_low_noise")
    told = map(json.loads, (weights.parent / "events.jsonl").read_text(encoding="utf-8").splitlines())
    assert all(t < 875 for event in told if event["event"] == "step" for t in event["timesteps"])

    node = NODES["WanCoreTrainLora"]
    values = {**defaults(node), "model": pair, "text_encoder": catalog.TINY, "vae": catalog.TINY, "name": "风格 1"}
    for expert, drawn in (("high", (0.0, 0.417)), ("low", (0.417, 1.0))):
        config = node()._run(data, {**values, "expert": expert}).config
        assert (config.min_timestep_boundary, config.max_timestep_boundary) == drawn
        assert f"{expert}_noise_model" in config.model_paths[0][0] and config.output_path.endswith(f"_{expert}_noise")
    typed = node()._run(data, {**values, "flags": "--max_timestep_boundary 0.2"}).config
    assert (typed.min_timestep_boundary, typed.max_timestep_boundary) == (0.0, 0.2)

    model = load_dit(experts_of(inspect_experts(place / "models" / pair)), DiTSettings(dtype=torch.float32), "cpu")
    changed, _ = run("WanCoreTrainedWeights", model=model, weights=str(weights), strength=1.0)
    assert [len(each.loras) for each in changed.experts] == [0, 1]


def test_both_experts_are_one_run_whose_weights_are_one_name(data, place, tmp_path, monkeypatch):
    pair = catalog.tiny_id("t2v", is_pair=True)
    monkeypatch.setitem(ModelLoader.ROWS, pair, catalog.PAIR_PATTERNS)
    weights = lora(data, model=pair, expert="both")[0]
    assert weights == str(out(tmp_path, "风格 1") / "step-2.{high,low}_noise.safetensors")
    model = load_dit(experts_of(inspect_experts(place / "models" / pair)), DiTSettings(dtype=torch.float32), "cpu")
    changed, report = run("WanCoreTrainedWeights", model=model, weights=weights, strength=1.0)
    assert [len(each.loras) for each in changed.experts] == [1, 1] and report.count("LoRA") >= 2
    single = run("WanCoreModelLoader", model=catalog.TINY)[0]
    with pytest.raises(ValueError, match=r"is a pair of files, but .* has one expert"):
        run("WanCoreTrainedWeights", model=single, weights=weights, strength=1.0)
    node = NODES["WanCoreTrainLora"]
    (planned, *_) = node.plan_outputs(data, **{**defaults(node), "model": pair, "expert": "both"})
    assert len(planned.model.experts) == 2


def test_what_a_run_cannot_do_is_told_by_the_trainer(data, tmp_path):
    with pytest.raises(ChildError, match="motion_controller") as error:
        run(
            "WanCoreTrainModel", data=data, model=catalog.TINY, text_encoder=catalog.TINY, vae=catalog.TINY, name="x",
            part="motion_controller", max_steps=1,
        )  # fmt: skip
    assert str(out(tmp_path, "x") / "log.txt") in str(error.value)


PARENT = """
import sys
from pathlib import Path
from pack import register
register()
from wancore.nodes.launcher import Launch, supervise, pack_command
words = ["--config", sys.argv[2]]
supervise(Launch(pack_command(Path(sys.argv[1]), "trainer.supervised", words), Path(sys.argv[3])), print, lambda: None)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills as POSIX does")
def test_a_run_whose_parent_is_killed_saves_and_ends(data, tmp_path):
    folder = out(tmp_path)
    lora(data, max_steps=1)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8")) | {"max_steps": 100}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    words = [sys.executable, "-c", PARENT, str(ROOT), str(folder / "request.json"), str(folder)]
    parent = subprocess.Popen(
        words, cwd=ROOT, env={**environment(), "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    wait_for(lambda: len(steps(folder)) >= 3, parent)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: '"stopped": true' in (folder / "events.jsonl").read_text())
    before = steps(folder)[-1]
    assert before < 100 and lora(data, max_steps=before + 1)[3] == before + 1


def step(number, **more):
    return {"event": "step", "step": number, "total": 9, "loss": 0.08125, "seconds": 1.94, "eta": 3540.0, **more}


def test_a_step_in_words():
    assert step_line(step(3), {}) == "step 3/9  loss 0.0813  1.9 s/step  about 59 min left"
    assert "(held out 0.2000)" in step_line(step(3), {1: 0.1, 2: 0.2})
    assert "not finite" in step_line(step(3, loss=None, eta=None), {})


def test_progress_and_pictures_are_shown_in_turn(tmp_path, monkeypatch):
    shown, said, now = [], [], [0.0]
    monkeypatch.setattr(
        host.current, "show_progress", lambda phase, done, total, picture=None: shown.append((phase, done, picture))
    )
    monkeypatch.setattr(host.current, "show_text", lambda line, node_id: said.append((node_id, line)))
    (tmp_path / "samples").mkdir()
    sample = tmp_path / "samples" / "step-0000001_00.png"
    Image.new("RGB", (32, 16), "red").save(sample)
    display = Display(tmp_path, "7", lambda: now[0])
    events = [
        {"event": "check", "good": 3, "bad": []}, {"event": "cache", "done": 1, "total": 3}, step(1),
        {"event": "validation", "step": 1, "loss": 0.5}, {"event": "sample", "step": 1, "files": []},
        {"event": "waiting"}, {"event": "stopping"}, {"event": "of a later version"},
    ]  # fmt: skip
    for event in events:
        display.take(event)
    for number in (2, 3, 4):
        now[0] += 1.5
        display.take(step(number))
    pictures = [picture.size for _, _, picture in shown if picture is not None]
    assert shown[0][:2] == ("Encoding", 1) and shown[1][:2] == ("Training", 1)
    assert pictures == [(960, 640), (32, 16)]
    monkeypatch.setattr(training_run, "draw_chart", None)
    now[0] += 5
    display.take(step(5))
    assert shown[-1] == ("Training", 5, None)
    assert all(node == "7" for node, _ in said) and "3 good rows" in said[0][1]


def test_widgets_are_those_of_the_trainer():
    rows = {
        **NODES["WanCoreTrainLora"].INPUT_TYPES()["required"],
        **NODES["WanCoreTrainLora"].INPUT_TYPES()["optional"],
    }
    default = TrainConfig()
    for name in ("lora_rank", "learning_rate", "batch_size", "lr_scheduler", "mixed_precision"):
        assert rows[name][1]["default"] == getattr(default, name)


def test_each_flag_of_the_trainer_is_the_graphs_or_says_what_to_do_instead():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields > training_inputs.ALLOWED
    assert fields - training_inputs.ALLOWED <= training_inputs.ALTERNATIVES.keys()
    for name in fields - training_inputs.ALLOWED:
        with pytest.raises(ValueError, match=f"flags: --{name} is for the command line; "):
            training_inputs.parse_flags(f"--{name}" if name in ("skip_download", "confined") else f"--{name} 1")


def test_what_lies_in_the_folder_of_a_run_is_not_imported(tmp_path):
    """Uploads may put any file there."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the folder')")
    words = pack_command(ROOT, "trainer.supervised", ["--config", "x"], 2)
    assert words[1:4] == [str(ROOT / "pack.py"), "-m", "accelerate.commands.launch"]
    words = [*words[:3], "json.tool", "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage: python -m json.tool" in done.stdout, done.stderr
