"""Distilled LoRAs and checkpoints: recognised, described, and run as their authors recommend."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.lora.fixtures import WRITERS, factors, linear_paths
from tests.reference import tiny_dit
from wan_core import distilled, inspection
from wan_core.catalog import find_row
from wan_core.distilled import FEW_STEPS, named, recognise
from wan_core.lora.target import lora_file_report, open_lora
from wan_core.model import VideoModel
from wan_core.recommend import CHOICES
from wan_core.sampling.compose import build_solver
from wan_core.sampling.experts import Expert
from wan_core.settings import GuidanceSettings, NagSettings, SamplerSettings
from wan_core.variants import match_variant
from wancore.headless.cli import main

PUBLISHED = {
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": "LightX2V 2.1",
    "lightx2v_I2V_14B_480p_cfg_step_distill_rank128_bf16.safetensors": "LightX2V 2.1",
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors": "LightX2V 2.1",
    "Wan2.1-T2V-14B-StepDistill-CfgDistill/distill_model.pt": "LightX2V 2.1",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "Lightning 2.2",
    "Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model.safetensors": "Lightning 2.2",
    "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors": "Lightning 2.2",
    "Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors": "Lightning 2.2",
    "Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors": "CausVid 14B",
    "Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32.safetensors": "CausVid 1.3B",
    "Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors": "AccVideo",
    "Wan2.1_T2V_14B_FusionX_LoRA.safetensors": "FusionX",
    "Wan14BT2VFusioniX_fp16_.safetensors": "FusionX",
    "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors": "FastWan",
    "FastWan2.1-T2V-1.3B-Diffusers/diffusion_pytorch_model.safetensors": "FastWan",
    "Wan2_2-TI2V-5B-Turbo_fp16.safetensors": "5B Turbo",
    "Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors": "5B Turbo",
    "self_forcing_dmd.pt": "Self-Forcing",
    "Wan2.1-T2V-14B-Q4_K_M.gguf": None,
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": None,
    "style.safetensors": None,
}


@pytest.mark.parametrize(("name", "row"), PUBLISHED.items())
def test_published_files_are_recognised_by_name(name, row):
    found = recognise([name.rpartition("/")[2], name])
    assert (found and found.name) == row
    assert (recognise(["renamed"], {"ss_output_name": name}) or found) == found


@pytest.mark.parametrize("row", FEW_STEPS, ids=lambda row: row.name)
def test_every_row_gives_a_run(row):
    re.compile(row.pattern)
    settings = distilled.applied(row, SamplerSettings(seed=3, guidance=GuidanceSettings(nag=NagSettings(scale=11.0))))
    solver = build_solver(settings)
    assert len(solver.timesteps) == row.steps and solver.sigmas[-1] == 0
    assert not settings.guidance.has_negative and settings.guidance.nag.scale == 11 and settings.seed == 3
    assert row.source and str(row.steps) in row.summary


@pytest.mark.parametrize("name", ["LightX2V 2.1", "Lightning 2.2"])
def test_the_noise_levels_are_those_of_the_authors(name):
    """Timesteps 1000, 937.5, 833.3 and 625, as ModelTC/Wan2.2-Lightning #3 lists them."""
    found = build_solver(distilled.applied(named(name), SamplerSettings())).sigmas
    assert found == pytest.approx([1.0, 0.9375, 0.83333, 0.625, 0.0], abs=1e-4)


def written(path, dit, rank=4, alpha=None, metadata=None):
    tensors = WRITERS["ComfyUI"](factors(dit, linear_paths(dit, "attn.q", "attn.k"), rank=rank))
    if alpha is not None:
        tensors = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for key, t in tensors.items()}
        ups = [key for key in tensors if ".lora_up." in key]
        tensors |= {key.split(".lora_up.")[0] + ".alpha": torch.tensor(alpha) for key in ups}
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(scope="module")
def dit():
    return tiny_dit()


def test_a_renamed_lora_is_known_by_its_metadata_or_its_tensors(dit, tmp_path):
    plain = written(tmp_path / "mine.safetensors", dit)
    titled = written(tmp_path / "other.safetensors", dit, metadata={"modelspec.title": "CausVid 14B"})
    lightning = written(tmp_path / "third.safetensors", dit, rank=64, alpha=8)
    floats = written(tmp_path / "fourth.safetensors", dit, rank=64, alpha=8.0)
    found = [open_lora(path).few_steps for path in (plain, titled, lightning, floats)]
    assert [row and row.name for row in found] == [None, "CausVid 14B", "Lightning 2.2", None]


def test_reports_say_what_is_recommended(dit, tmp_path, capsys):
    path = written(tmp_path / "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", dit)
    words = "4 steps, cfg 1, shift 5, solver lcm"
    assert words in str(lora_file_report(open_lora(path)))
    assert words in str(inspection.report(path))
    assert main(["info", str(path)]) == 0 and words in capsys.readouterr().out


@pytest.fixture(scope="module")
def model(dit):
    return VideoModel.of(dit, match_variant(dit.config), find_row("Wan-AI/Wan2.1-T2V-1.3B"), "a model")


def test_a_model_recommends_what_is_on_it(model, dit, tmp_path):
    given = SamplerSettings(seed=5)
    assert model.recommended("off", given) == (model, given)
    _, of_row = model.recommended("auto", given)
    assert (of_row.steps, of_row.shift, of_row.guidance.scale, of_row.seed) == (50, 8.0, 6.0, 5)
    lora = written(tmp_path / "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", dit)
    with_lora, report = model.with_lora(lora)
    assert "4 steps" in report.summary
    _, few = with_lora.recommended("auto", given)
    assert (few.steps, few.shift, few.guidance.scale, few.solver) == (4, 5.0, 1.0, "euler")
    assert model.with_lora(lora, strength=0.0)[0].recommended("auto", given)[1] == of_row
    _, other = with_lora.recommended("FastWan", given)
    assert other.sigmas == (1.0, 0.757, 0.522, 0.0) and other.total_steps == 3
    again, more = with_lora.recommended("auto", given, more_motion=True)
    assert more.steps == 6 and more.guidance.branches == 2
    strengths = [again.loras[0].strength.at(index, 6) for index in range(6)]
    assert strengths == [0, 1, 1, 1, 1, 1]
    assert with_lora.loras[0].constant


def test_a_checkpoint_is_known_by_its_name_or_its_metadata(dit, tmp_path):
    weights = {name: weight.contiguous() for name, weight in dit.state_dict().items()}
    for name, metadata in (("FastWan2.1-T2V-1.3B.safetensors", None), ("mine.safetensors", {"title": "FastWan"})):
        save_file(weights, tmp_path / name, metadata)
        expert = Expert(dit, files=(tmp_path / name,))
        model = VideoModel((expert,), match_variant(dit.config), None, name)
        assert model.recommended("auto", SamplerSettings())[1].total_steps == 3
        assert "3 steps" in str(inspection.report(tmp_path / name))
        (tmp_path / name).unlink()
    assert model.few_steps is None


def test_what_cannot_be_recommended_is_refused(model):
    nameless = dataclasses.replace(model, row=None)
    with pytest.raises(ValueError, match=r"No settings are recommended for a model.*FusionX"):
        nameless.recommended("auto", SamplerSettings())
    with pytest.raises(ValueError, match=r"no few-step settings called 'lightning'.*Lightning"):
        model.recommended("lightning", SamplerSettings())
    for choice in ("off", "auto"):
        with pytest.raises(ValueError, match="more_motion changes the recommended settings"):
            model.recommended(choice, SamplerSettings(), more_motion=True)
    assert CHOICES[:2] == ("off", "auto")
