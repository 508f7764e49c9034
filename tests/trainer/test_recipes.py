"""Recipes: the reference's arguments for every published checkpoint, and that each of them trains."""

import dataclasses
import functools
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import fork_server
from tests.programs import PATIENCE, wait_for
from tests.sampling.runs import planned
from tests.trainer import material
from tests.trainer.models import SIZE, inputs
from tests.trainer.runs import ROOT, environment, events, run
from wan_core.catalog import WAN_21
from wan_core.model_files import DiTSettings, inspect, load_dit
from wan_core.runtime import Runtime
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.types import LatentSize
from wancore.trainer.config import parse
from wancore.trainer.model import load, trainable
from wancore.trainer.objective import Objective, expert_range
from wancore.trainer.recipe import LAUNCHERS, TRAIN, command, find_row, main, recipes

ROWS = [row.short_name for row in WAN_21]

EXPECTED = {
    "Wan2.1-T2V-1.3B": ("metadata.csv", (), ()),
    "Wan2.1-T2V-14B": ("metadata.csv", (), ()),
    "Wan2.1-I2V-14B-480P": ("metadata.csv", (), ("input_image",)),
    "Wan2.1-I2V-14B-720P": ("metadata.csv", (), ("input_image",)),
    "Wan2.1-FLF2V-14B-720P": ("metadata.csv", (), ("input_image", "end_image")),
    "Wan2.1-Fun-1.3B-InP": ("metadata.csv", (), ("input_image", "end_image")),
    "Wan2.1-Fun-14B-InP": ("metadata.csv", (), ("input_image", "end_image")),
    "Wan2.1-Fun-1.3B-Control": ("metadata_control.csv", ("control_video",), ("control_video",)),
    "Wan2.1-Fun-14B-Control": ("metadata_control.csv", ("control_video",), ("control_video",)),
    "Wan2.1-Fun-V1.1-1.3B-Control": (
        "metadata_reference_control.csv", ("control_video", "reference_image"), ("control_video", "reference_image"),
    ),
    "Wan2.1-Fun-V1.1-14B-Control": (
        "metadata_reference_control.csv", ("control_video", "reference_image"), ("control_video", "reference_image"),
    ),
    "Wan2.1-Fun-V1.1-1.3B-InP": ("metadata.csv", (), ("input_image", "end_image")),
    "Wan2.1-Fun-V1.1-14B-InP": ("metadata.csv", (), ("input_image", "end_image")),
    "Wan2.1-Fun-V1.1-1.3B-Control-Camera": (
        "metadata_camera_control.csv", (), ("input_image", "camera_control_direction", "camera_control_speed"),
    ),
    "Wan2.1-Fun-V1.1-14B-Control-Camera": (
        "metadata_camera_control.csv", (), ("input_image", "camera_control_direction", "camera_control_speed"),
    ),
    "VACE-Wan2.1-1.3B-Preview": (
        "metadata_vace.csv", ("vace_video", "vace_reference_image"), ("vace_video", "vace_reference_image"),
    ),
    "Wan2.1-VACE-1.3B": (
        "metadata_vace.csv", ("vace_video", "vace_reference_image"), ("vace_video", "vace_reference_image"),
    ),
    "Wan2.1-VACE-14B": (
        "metadata_vace.csv", ("vace_video", "vace_reference_image"), ("vace_video", "vace_reference_image"),
    ),
    "Wan2.1-1.3b-speedcontrol-v1": ("metadata_motion_bucket_id.csv", (), ("motion_bucket_id",)),
}  # fmt: skip
"""Metadata file, columns beside the video, extra inputs."""

SPECIAL = {
    ("VACE-Wan2.1-1.3B-Preview", "full"): (5e-5, 49), ("Wan2.1-VACE-1.3B", "full"): (5e-5, 49),
    ("Wan2.1-VACE-14B", "full"): (5e-5, 17), ("Wan2.1-VACE-14B", "lora"): (1e-4, 17),
    ("Wan2.1-Fun-V1.1-1.3B-Control-Camera", "lora"): (1e-5, 81),
    ("Wan2.1-Fun-V1.1-14B-Control-Camera", "lora"): (1e-5, 81),
}  # fmt: skip
"""Learning rates and lengths that differ from those of the other rows."""


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_is_what_the_reference_types(name, mode):
    (found,) = recipes(name, mode)
    config = parse(found.words())
    metadata, columns, extra = EXPECTED[name]
    is_vace, is_speed = "VACE" in name, "speedcontrol" in name
    model = "vace" if is_vace else "motion_controller" if is_speed and mode == "full" else "dit"
    rate, frames = SPECIAL.get((name, mode), ({"lora": 1e-4, "full": 1e-5}[mode], 81))

    assert (config.dataset_base_path, config.dataset_metadata_path) == (
        "data/example_video_dataset", f"data/example_video_dataset/{metadata}",
    )  # fmt: skip
    assert config.data_file_keys == (("video", *columns) if columns else ("image", "video"))
    assert config.extra_inputs == extra
    assert (config.height, config.width, config.num_frames, config.dataset_repeat) == (480, 832, frames, 100)
    assert (config.learning_rate, config.num_epochs) == (rate, {"lora": 5, "full": 2}[mode])
    assert config.trainable_models == ((model,) if mode == "full" else ())
    assert config.lora_base_model == (model if mode == "lora" else None)
    assert (config.lora_rank, config.lora_target_modules) == (32, ("q", "k", "v", "o", "ffn.0", "ffn.2"))
    assert config.remove_prefix_in_ckpt == f"pipe.{model}."
    assert config.output_path == f"./models/train/{name}_{mode}"
    assert config.use_gradient_checkpointing_offload == is_vace
    assert found.launcher == ("zero2_offload" if "14B" in name and mode == "full" else None)

    row = find_row(name)
    base = "Wan-AI/Wan2.1-T2V-1.3B" if is_speed else row.model_id
    files = [f"{base}:diffusion_pytorch_model*.safetensors", f"{base}:models_t5_umt5-xxl-enc-bf16.pth"]
    files += [f"{base}:Wan2.1_VAE.pth"]
    files += [f"{base}:models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"] * ("I2V" in name or "F" in name[7:])
    files += ["DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1:model.safetensors"] * is_speed
    assert config.model_id_with_origin_paths == tuple(files)


CAMERA = ("input_image", "camera_control_direction", "camera_control_speed")
VACE = ("vace_video", "vace_reference_image")
OF_22 = {
    "Wan2.2-T2V-A14B": ("metadata.csv", (), 49, 417),
    "Wan2.2-I2V-A14B": ("metadata.csv", ("input_image",), 49, 358),
    "Wan2.2-TI2V-5B": ("metadata.csv", ("input_image",), 49, None),
    "Wan2.2-Fun-A14B-InP": ("metadata.csv", ("input_image", "end_image"), 81, 358),
    "Wan2.2-Fun-A14B-Control": ("metadata_reference_control.csv", ("control_video", "reference_image"), 81, 358),
    "Wan2.2-Fun-A14B-Control-Camera": ("metadata_camera_control.csv", CAMERA, 81, 358),
    "Wan2.2-VACE-Fun-A14B": ("metadata_vace.csv", VACE, 17, 417),
    "Wan2.2-Fun-5B-InP": ("metadata.csv", ("input_image", "end_image"), 81, None),
    "Wan2.2-Fun-5B-Control": ("metadata_reference_control.csv", ("control_video", "reference_image"), 81, None),
    "Wan2.2-Fun-5B-Control-Camera": ("metadata_camera_control.csv", CAMERA, 81, None),
}
"""Metadata file, extra inputs, frames, and the first timestep of the low-noise expert.

As the reference, but for VACE-Fun, whose authors split at 875, and whole Fun models, which it trains at the rate of a
LoRA.
"""


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("name", OF_22)
def test_a_recipe_of_wan_22_trains_each_expert_on_its_timesteps(name, mode):
    metadata, extra, frames, split = OF_22[name]
    found = recipes(name, mode)
    is_vace, is_pair = "VACE" in name, split is not None
    assert [each.expert for each in found] == (["high", "low"] if is_pair else [None])
    for each in found:
        config = parse(each.words())
        model = "vace" if is_vace else "dit"
        rate = 1e-4 if mode == "lora" else 5e-5 if is_vace else 1e-5
        kind = f"{each.expert}_noise_{mode}" if is_pair else mode
        folder = f"{each.expert}_noise_model/" if is_pair else ""
        assert config.dataset_metadata_path == f"data/example_video_dataset/{metadata}"
        assert (config.extra_inputs, config.num_frames, config.learning_rate) == (extra, frames, rate)
        assert (config.height, config.width, config.lora_rank) == (480, 832, 32)
        assert (config.trainable_models, config.lora_base_model) == (
            ((), model) if mode == "lora" else ((model,), None)
        )
        assert config.output_path == f"./models/train/{name}_{kind}"
        assert config.model_id_with_origin_paths == tuple(
            f"{find_row(name).model_id}:{file}"
            for file in (
                f"{folder}diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth",
                "Wan2.1_VAE.pth" if is_pair else "Wan2.2_VAE.pth",
            )
        )  # fmt: skip
        drawn = {None: (0, 1000), "high": (0, split), "low": (split, 1000)}[each.expert]
        objective = config.objective
        assert (int(objective.low * 1000), int(objective.high * 1000)) == drawn
        assert each.launcher == ("zero2_offload" if is_pair and mode == "full" else None)


@pytest.mark.parametrize(
    ("boundary", "shift"), [(0.875, 5.0), (0.9, 5.0), (0.9, 3.0), (0.875, 12.0), (0.0, 5.0), (1.0, 5.0)]
)
def test_the_ranges_of_two_experts_are_all_timesteps_once(boundary, shift):
    """As a run chooses: the high-noise expert from 1000 times the boundary on."""
    timesteps = Objective(shift=shift).sigmas * 1000
    for is_high in (True, False):
        low, high = (round(1000 * side) for side in expert_range(is_high, boundary, shift))
        assert torch.equal(timesteps[low:high], timesteps[(timesteps >= 1000 * boundary) == is_high])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Wan2.2-T2V-A14B", "lora", "--output_path", "mine"], "--output_path would be that of both experts"),
        (["Wan2.2-T2V-A14B", "lora", "--max_timestep_boundary=0.5"], "--max_timestep_boundary would be"),
        (["Wan2.1-T2V-14B", "lora", "--expert", "low"], "not a pair of experts"),
        (["Wan2.2-TI2V-5B", "lora", "--expert", "high"], "not a pair of experts"),
        (["Wan2.1-T2V-14B", "lora", "--expert", "both"], "not a pair of experts"),
    ],
)
def test_flags_of_one_expert_are_not_those_of_both(words, message, capsys):
    assert main([*words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_both_experts_are_trained_in_turn_or_one_that_is_named(capsys):
    for words, experts in (([], ("high", "low")), (["--expert", "low"], ("low",))):
        assert main(["Wan2.2-I2V-A14B", "lora", *words, "--dry-run"]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert [f"{expert}_noise_model" in line for expert, line in zip(experts, printed, strict=True)] == [True] * len(
            experts
        )


@pytest.mark.parametrize("name", ["Wan2.2-T2V-A14B", "Wan2.2-VACE-Fun-A14B"])
def test_one_recipe_trains_both_experts(name):
    (found,) = recipes(name, "lora", "both")
    config = parse(found.words())
    files = [each.rpartition(":")[2] for each in config.model_id_with_origin_paths]
    assert [file.partition("/")[0] for file in files[:2]] == ["high_noise_model", "low_noise_model"]
    assert (config.min_timestep_boundary, config.max_timestep_boundary) == (0.0, 1.0)
    assert config.output_path == f"./models/train/{name}_lora"


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("Wan2.1-T2V-13B", "lora", "Did you mean Wan2.1-T2V-1"),
        ("wan2.1-vace-14", "full", "Did you mean Wan2.1-VACE-14B"),
        ("flux", "full", "Known are: Wan2.1-T2V-1.3B"),
        ("Wan2.1-T2V-1.3B", "dreambooth", "lora, full"),
    ],
)
def test_an_unknown_recipe_is_refused(name, mode, message):
    with pytest.raises(ValueError, match=message):
        recipes(name, mode)


def test_names_are_read_generously():
    assert find_row("wan-ai/wan2.1-t2v-1.3b") is find_row("Wan2.1-T2V-1.3B")


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """Trains a recipe on the tiny model of its structure: (variant, config, what was trained).

    Rows whose recipes differ in nothing that is left of them share a run.
    """

    @functools.cache
    def run_once(words: tuple[str, ...]):
        config = parse([*words, "--output_path", str(tmp_path_factory.mktemp("recipe"))])
        kept, prepared = [], trainable.prepare

        def prepare_and_keep(*arguments):
            kept.append(prepared(*arguments))
            return kept[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainable, "prepare", prepare_and_keep)
            assert run(config).steps == 3
        return config, kept[0]

    def execute(name: str, mode: str):
        variant = "speed" if "speedcontrol" in name else find_row(name).variant
        tiny = material.config(shared, variant)
        data = tiny.dataset_base_path
        overrides = {
            "dataset_base_path": data, "dataset_metadata_path": f"{data}/metadata.csv",
            "model_id_with_origin_paths": ",".join(tiny.model_id_with_origin_paths), "dataset_repeat": 2,
            "local_model_path": tiny.local_model_path, "height": 32, "width": 32, "num_frames": 5, "max_steps": 3,
            "mixed_precision": "no", "cache_dir": shared / "cache", "min_free_gb": 0, "output_path": "unused",
        }  # fmt: skip
        found = recipes(name, mode)[-1]
        return variant, *run_once(tuple(dataclasses.replace(found, flags={**found.flags, **overrides}).words()))

    return execute


def latents(model, variant):
    """What inference draws with `model`, given everything that it takes."""
    cond = inputs("t2v" if variant == "speed" else variant, batch=1)[2]
    if cond.image_tokens is not None:
        size = (*cond.image_tokens.shape[:2], model.dit.config.image_dim)
        cond = dataclasses.replace(cond, image_tokens=torch.randn(size, generator=torch.Generator().manual_seed(2)))
    if variant == "t2v":
        cond = dataclasses.replace(cond, motion_bucket=None)
    settings = SamplerSettings(seed=1, steps=2, guidance=GuidanceSettings(scale=1.0))
    runtime = Runtime.default("cpu", torch.float32)
    return planned(model, cond, LatentSize(*SIZE, model.geometry), settings, runtime)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, mode) for name in ROWS for mode in ("lora", "full")), *((name, "lora") for name in OF_22)],
)
def test_a_recipe_trains_and_its_result_changes_the_video(trained, name, mode):
    variant, config, kept = trained(name, mode)
    (file,) = Path(config.output_path).glob("*.safetensors")
    base = load.find(config).load_dit(torch.float32, "cpu")
    before = latents(base, variant)
    after = latents(base.with_lora(file)[0], variant)
    assert after.isfinite().all() and not torch.equal(after, before)
    if config.trainable_models == ("dit",):
        whole = load_dit(inspect(file, "dit"), DiTSettings(dtype=torch.float32), "cpu")
        assert torch.equal(latents(whole, variant), after)

    own = dict(base.dit.named_parameters())
    frozen = {n: p for n, p in kept.module.dit.named_parameters() if not p.requires_grad}
    for n, parameter in frozen.items():
        assert torch.equal(parameter, own[n.replace(".base_layer.", ".")]), n
    assert len(frozen) == (len(own) if config.trainable_models != ("dit",) else 0) - (
        sum(n.startswith("vace_") for n in own) if config.trainable_models == ("vace",) else 0
    )


def test_the_command_for_14b_is_launched_by_accelerate():
    words = command(*recipes("Wan2.1-T2V-14B", "full"), ["--num_frames", "33"])
    assert words[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    assert words[4] == str(LAUNCHERS / "zero2_offload.yaml") and words[5] == str(TRAIN)
    assert words[-2:] == ["--num_frames", "33"] and parse(words[6:]).num_frames == 33
    assert command(*recipes("Wan2.1-T2V-14B", "full"), launcher="none")[:2] == [sys.executable, str(TRAIN)]
    assert str(LAUNCHERS / "fsdp.yaml") in command(*recipes("Wan2.1-T2V-1.3B", "lora"), launcher="fsdp")


def test_a_dry_run_prints_the_command_and_runs_nothing(capsys, tmp_path):
    assert main(["Wan2.1-T2V-1.3B", "lora", "--dry-run", "--output_path", str(tmp_path / "my run")]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert parse(words[2:]).output_path == str(tmp_path / "my run")
    assert not (tmp_path / "my run").exists()


@pytest.mark.parametrize("words", [["Wan2.1-T2V-1.3B", "lora", "--lora_rnk", "3"], ["Wan2.1-T2V", "lora"]])
def test_mistakes_are_named_and_nothing_runs(capsys, words):
    assert main(words) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_a_recipe_obeys_a_signal(shared, tmp_path):
    """Through the shell, as a user does it."""
    tiny = material.config(shared, output_path=str(tmp_path), dataset_repeat=200, lora_rank=4, min_free_gb=0.0)
    overrides = [*material.flags(tiny), "--dataset_metadata_path", f"{tiny.dataset_base_path}/metadata.csv"]
    words = [fork_server.python(), "-m", "trainer.recipe", "Wan2.1-T2V-1.3B", "lora", *overrides]
    child = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: events(tmp_path), child)
    child.send_signal(signal.SIGTERM)
    text = child.communicate(timeout=PATIENCE)[0]
    assert child.returncode == 0 and "Stopped after step" in text and str(TRAIN) in text
