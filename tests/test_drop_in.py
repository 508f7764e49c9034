"""The Python surface as scripts written for DiffSynth-Studio use it: names, order and defaults of arguments, models by
name, weights that replace a model's, memory settings, the environment, and the scripts themselves where they are.
"""

import dataclasses
import inspect
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from tests import reference_scripts
from tests.reference import relative_error, write_drawn
from wan_core import ModelConfig, WanVideoPipeline, load_state_dict
from wan_core.catalog import tiny_id
from wan_core.loading.download import download_source
from wan_core.model_config import TOKENIZER_CONFIG
from wan_core.model_files import Offload
from wan_core.pipeline_models import attention_of_environment
from wan_core.runtime import default_device

CHECKOUT = os.environ.get("WANCORE_DIFFSYNTH")
"""A clone of modelscope/DiffSynth-Studio, with its history."""

CPU = torch.device("cpu")
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
PATTERNS = ("diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
PICTURE = Image.new("RGB", (40, 30), "red")
LORA_TENSORS = {f"blocks.0.self_attn.q.lora_{factor}.default.weight": torch.ones(1) for factor in "AB"}

# Names and defaults in their order, at 9bb51fe8; what later revisions put in between is for other families of models.
CALL = {
    "prompt": "", "negative_prompt": "", "input_image": None, "end_image": None, "input_video": None,
    "denoising_strength": 1.0, "control_video": None, "reference_image": None, "camera_control_direction": None,
    "camera_control_speed": 1 / 54,
    "camera_control_origin": (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0),
    "vace_video": None, "vace_video_mask": None, "vace_reference_image": None, "vace_scale": 1.0, "seed": None,
    "rand_device": "cpu", "height": 480, "width": 832, "num_frames": 81, "cfg_scale": 5.0, "cfg_merge": False,
    "num_inference_steps": 50, "sigma_shift": 5.0, "motion_bucket_id": None,
    # Documented as False; the reference's code has True. Tiles come by themselves where memory asks for them.
    "tiled": False,
    "tile_size": (30, 52), "tile_stride": (15, 26), "sliding_window_size": None, "sliding_window_stride": None,
    "tea_cache_l1_thresh": None, "tea_cache_model_id": "", "progress_bar_cmd": tqdm, "output_type": "quantized",
}  # fmt: skip
LOAD = {
    "torch_dtype": torch.bfloat16, "device": default_device().type, "model_configs": (),
    "tokenizer_config": TOKENIZER_CONFIG, "local_model_path": "./models", "skip_download": False,
    "redirect_common_files": True, "use_usp": False, "vram_limit": None,
}  # fmt: skip
CONFIG = dict.fromkeys((
    "path", "model_id", "origin_file_pattern", "download_source", "local_model_path", "skip_download",
    "offload_device", "offload_dtype", "onload_device", "onload_dtype", "preparing_device", "preparing_dtype",
    "computation_device", "computation_dtype",
)) | {"clear_parameters": False, "state_dict": None, "quantize": None}  # fmt: skip
REQUIRED = inspect.Parameter.empty
LORA = {"module": REQUIRED, "lora_config": None, "alpha": 1, "hotload": None, "state_dict": None, "verbose": 1}
READ = {"file_path": REQUIRED, "torch_dtype": None, "device": "cpu", "pin_memory": False, "verbose": 0}
MEMORY = {"num_persistent_param_in_dit": None, "vram_limit": None, "vram_buffer": None}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (WanVideoPipeline.__call__, CALL), (WanVideoPipeline.from_pretrained, LOAD), (ModelConfig, CONFIG),
        (WanVideoPipeline.load_lora, LORA), (WanVideoPipeline.clear_lora, {"verbose": 1}), (load_state_dict, READ),
        (WanVideoPipeline.enable_vram_management, MEMORY),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)  # fmt: skip
def test_arguments_have_the_reference_s_names_order_and_defaults(function, expected):
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n != "self"}
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[: len(expected)] == list(expected)
    assert {name: parameters[name].default for name in expected} == expected


def configs(variant: str = "t2v", **changes) -> list[ModelConfig]:
    dit = ModelConfig(model_id=tiny_id(variant), origin_file_pattern=PATTERNS[0], **changes)
    return [dit, *(ModelConfig(model_id="WanCore/tiny", origin_file_pattern=p, **changes) for p in PATTERNS[1:])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """With drawn weights: what a trained model loses as FP8 changes with every training."""
    folder = tmp_path_factory.mktemp("models")
    write_drawn(folder, "WanCore/tiny")
    return folder


@pytest.fixture(scope="module")
def load(root):
    def pipeline(model_configs=None, **changes) -> WanVideoPipeline:
        changes = {"torch_dtype": torch.float32, "device": "cpu", "local_model_path": root} | changes
        return WanVideoPipeline.from_pretrained(model_configs=model_configs or configs(), **changes)

    return pipeline


@pytest.fixture(scope="module")
def pipe(load):
    """For calls that leave it as it is."""
    return load()


HELD = {
    "in memory": {},
    "streamed": {"offload_device": "cpu"},
    "in its file": {"offload_device": "disk"},
    "as FP8": {"offload_dtype": torch.float8_e4m3fn},
    "at rest in half": {"offload_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    ("held", "prefix"),
    [*((held, "pipe.dit.") for held in HELD), ("in memory", ""), ("in its file", "anything.at.all.")],
)
def test_given_weights_take_the_place_of_a_model_s_however_it_is_held(load, root, held, prefix):
    """As a model that was loaded with them; afterwards a LoRA still applies to them and is left out again."""
    pipe = load(configs(**HELD[held]))
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    pipe("a dog", **SMALL)
    stored = load_file(root / "WanCore/tiny/diffusion_pytorch_model.safetensors")
    other = {name: tensor * 0.8 for name, tensor in stored.items()}
    assert pipe.dit.load_state_dict({f"{prefix}{name}": t for name, t in other.items()}) == ([], [])
    path = root / "other.safetensors"
    save_file(other, path)
    expected = load([ModelConfig(path=path), *configs()[1:]])("a dog", **SMALL)
    got = pipe("a dog", **SMALL)
    assert relative_error(got, expected) < {"as FP8": 0.05, "at rest in half": 0.02}.get(held, 1e-6)
    name = "blocks.0.self_attn.q.lora_{}.weight"
    pipe.load_lora(pipe.dit, state_dict={name.format("A"): torch.ones(4, 256), name.format("B"): torch.ones(256, 4)})
    assert not torch.equal(pipe("a dog", **SMALL), got)
    pipe.clear_lora()
    assert torch.equal(pipe("a dog", **SMALL), got)


def test_every_part_takes_its_own_weights_for_good(load, root):
    controller = ModelConfig(model_id="WanCore/tiny", origin_file_pattern="model.safetensors")
    pipe = load([*configs(), controller])
    for name in ("motion_controller", "vae", "text_encoder", "dit"):
        before = pipe("a dog", **{**SMALL, "output_type": "tensor"}, motion_bucket_id=50)
        part = getattr(pipe, name)
        weights = {key: tensor.clone() * 0.7 for key, tensor in part.state_dict().items()}
        part.load_state_dict({f"pipe.{name}.{key}": tensor for key, tensor in weights.items()})
        assert all(torch.equal(tensor, weights[key]) for key, tensor in getattr(pipe, name).state_dict().items())
        assert not torch.equal(pipe("a dog", **{**SMALL, "output_type": "tensor"}, motion_bucket_id=50), before), name
    assert pipe.vace is None and pipe.image_encoder is None


def test_the_vace_branch_is_a_part_of_its_own(load):
    pipe = load(configs("vace"))
    names = set(pipe.vace.state_dict())
    assert names and all(name.startswith("vace_") for name in names)
    assert not names & set(pipe.dit.state_dict())
    call = {**SMALL, "vace_reference_image": PICTURE}
    before = pipe("a dog", **call)
    with pytest.raises(ValueError, match=r"1 missing: vace_patch_embedding\.bias"):
        pipe.vace.load_state_dict({n: t for n, t in pipe.vace.state_dict().items() if "patch_embedding.bias" not in n})
    pipe.vace.load_state_dict({name: tensor * 2 for name, tensor in pipe.vace.state_dict().items()})
    assert not torch.equal(pipe("a dog", **call), before)
    assert isinstance(pipe.dit, torch.nn.Module) and pipe.dit.config.vace_layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {}, "must be a dict of tensors"),
        (lambda w: "epoch-1.safetensors", "must be a dict of tensors"),
        (lambda w: {"a": 1}, "must be a dict of tensors"),
        (lambda w: {**w, "blocks.0.extra.weight": torch.ones(2)}, r"1 unknown: blocks\.0\.extra\.weight"),
        (lambda w: dict(list(w.items())[1:]), "1 missing"),
        (lambda w: {**w, "head.modulation": torch.ones(1, 2, 5)}, r"head\.modulation \[1, 2, 5\] instead of"),
        (lambda w: {"decoder.conv1.weight": torch.ones(2)}, "does not fit WanDiT"),
        (lambda w: LORA_TENSORS, "It holds a LoRA, which pipe.load_lora applies"),
        (lambda w: {**w, **LORA_TENSORS}, "It holds a LoRA, which pipe.load_lora applies"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(load, change, words):
    pipe = load()
    before = {name: tensor.clone() for name, tensor in pipe.dit.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        pipe.dit.load_state_dict(change({name: tensor + 1 for name, tensor in before.items()}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.dit.state_dict().items())


def test_weights_may_be_given_in_part_where_that_is_asked_for(load):
    pipe = load()
    missing, unexpected = pipe.dit.load_state_dict(
        {"head.head.bias": torch.ones(64), "nothing": torch.ones(1)}, strict=False
    )
    assert torch.equal(pipe.dit.head.head.bias, torch.ones(64))
    assert unexpected == ["nothing"] and "head.head.bias" not in missing and len(missing) > 50


def test_a_state_dict_in_a_configuration_is_loaded(load):
    weights = {name: tensor * 0.5 for name, tensor in load().dit.state_dict().items()}
    pipe = load([dataclasses.replace(configs()[0], state_dict=weights), *configs()[1:]])
    assert torch.equal(pipe.dit.patch_embedding.weight, weights["patch_embedding.weight"])


class Bomb:
    """Runs code when it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_state_dicts_are_read_from_both_kinds_of_files_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = {"a": torch.ones(2, 2), "n": torch.arange(3)}
    save_file(weights, "a.safetensors")
    torch.save({"state_dict": weights}, "a.pth")
    for path in ("a.safetensors", tmp_path / "a.pth", ["a.safetensors"]):
        found = load_state_dict(path, torch.bfloat16, "cpu")
        assert found["a"].dtype == torch.bfloat16 and torch.equal(found["n"], weights["n"])
    for dump in (torch.save, lambda value, file: Path(file).write_bytes(pickle.dumps(value))):
        dump({"a": Bomb()}, "bomb.pth")
        with pytest.raises(ValueError, match=r"bomb\.pth"):
            load_state_dict("bomb.pth")
    assert not (tmp_path / "executed").exists()
    for path, words in ((7, "file_path must be"), ("", "file_path must be"), ("gone.pth", "gone.pth does not exist")):
        with pytest.raises(ValueError, match=words):
            load_state_dict(path)
    with pytest.raises(ValueError, match="torch_dtype must be"):
        load_state_dict("a.pth", "bf16")


LOW_VRAM = {
    "offload_dtype": "disk", "offload_device": "disk", "onload_dtype": torch.bfloat16, "onload_device": "cpu",
    "preparing_dtype": torch.bfloat16, "preparing_device": "cpu",
    "computation_dtype": torch.bfloat16, "computation_device": "cpu",
}  # fmt: skip
EIGHT = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Offload()),
        (LOW_VRAM, Offload(mapped=True)),
        ({"offload_device": "cpu", "offload_dtype": EIGHT}, Offload(weights="fp8")),
        ({"offload_device": "cpu", "onload_dtype": EIGHT, "preparing_dtype": EIGHT}, Offload(weights="fp8")),
        (
            {"offload_device": "cpu", "offload_dtype": torch.bfloat16, "onload_dtype": EIGHT},
            Offload(dtype=torch.bfloat16),
        ),
        ({"offload_device": "disk", "onload_dtype": EIGHT}, Offload(mapped=True)),
    ],
)
def test_the_memory_states_become_how_weights_rest(given, expected):
    assert ModelConfig(**given).offload(CPU) == expected


def test_what_the_memory_states_cannot_mean_is_said(caplog):
    ModelConfig(offload_device="disk", onload_dtype=EIGHT).offload(CPU)
    assert "float8_e4m3fn is not applied" in caplog.text
    ModelConfig(offload_device="cpu", computation_device="cpu").offload(torch.device("cuda"))
    assert "computation_device cpu is not applied" in caplog.text


def test_the_low_memory_scripts_settings_change_no_bit(load):
    plain = load(torch_dtype=torch.bfloat16)("a dog", **SMALL)
    low = load(configs(**LOW_VRAM), torch_dtype=torch.bfloat16, vram_limit=22.0)
    assert low.memory.vram_limit == 22
    assert torch.equal(low("a dog", **SMALL), plain)


def test_a_model_computes_in_a_dtype_of_its_own(load):
    changed = [dataclasses.replace(c, computation_dtype=torch.float32) for c in configs()[2:]]
    pipe = load([*configs()[:2], *changed], torch_dtype=torch.bfloat16)
    assert {part.state_dict()["conv2.weight"].dtype for part in (pipe.vae,)} == {torch.float32}
    assert pipe.dit.patch_embedding.weight.dtype == torch.bfloat16
    assert pipe("a dog", **{**SMALL, "output_type": "floatpoint"}).shape == (1, 3, 5, 32, 32)


def test_a_configuration_may_be_changed_until_it_is_used(load, root):
    config = ModelConfig("nowhere.safetensors")
    config.path, config.model_id, config.origin_file_pattern = None, "WanCore/tiny", PATTERNS[0]
    pipe = load([config, *configs()[1:]])
    config.download_if_necessary(local_model_path=root)
    assert config.path == str(root / "WanCore/tiny/diffusion_pytorch_model.safetensors")
    assert pipe("a dog", **SMALL).shape == (1, 16, 2, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"offload_device": "nope"}, "offload_device must name a device"),
        ({"computation_device": "nope"}, "computation_device must name a device"),
        ({"onload_device": "nope"}, "onload_device must name a device"),
        ({"offload_dtype": "fp8"}, "offload_dtype must be a torch.dtype"),
        ({"offload_dtype": torch.int8}, "floating-point dtypes only"),
        ({"computation_dtype": EIGHT}, r"computation_dtype must be torch\.bfloat16.* offload_dtype"),
        ({"computation_dtype": 16}, "computation_dtype must be a torch.dtype"),
        ({"quantize": object()}, "quantize is not available; offload_dtype"),
        ({"clear_parameters": True}, "clear_parameters is not available"),
        ({"origin_file_pattern": ["a", "b"]}, r"origin_file_pattern must be a string; got \['a', 'b'\]"),
        ({"model_id": 5}, "model_id must be a string"),
        ({"path": 5}, "path must be a path"),
        ({"path": []}, "path must be a path"),
        ({"path": [None]}, "path must be a path"),
        ({"local_model_path": 5}, "local_model_path must be a path"),
        ({"download_source": "ftp", "model_id": "Wan-AI/Wan2.1-T2V-14B"}, "download_source .* must be one of"),
        ({"state_dict": {"a": torch.ones(1)}}, "does not fit WanDiT"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(load, change, words):
    with pytest.raises(ValueError, match=words):
        load([dataclasses.replace(configs()[0], **change), *configs()[1:]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"torch_dtype": "bf16"}, "torch_dtype must be"),
        ({"torch_dtype": EIGHT}, "torch_dtype must be .* offload_dtype"),
        ({"device": "foo"}, "device must name a device"),
        ({"model_configs": ModelConfig()}, "model_configs must be a list of ModelConfig; got ModelConfig"),
        ({"model_configs": ["model.safetensors"]}, "model_configs must be a list of ModelConfig; one of them is"),
        ({"tokenizer_config": "google/umt5-xxl"}, "tokenizer_config must be a ModelConfig"),
        ({"use_usp": True}, "use_usp is not available"),
        ({"skip_download": "no"}, "skip_download must be True or False; got 'no'"),
        ({"redirect_common_files": "no"}, "redirect_common_files must be True or False"),
        ({"torch_compile": "auto"}, "torch_compile must be True or False"),
        ({"deterministic": None}, "deterministic must be True or False"),
        ({"vram_limit": "8GB"}, "vram_limit must be a number"),
        ({"vram_limit": -1}, "vram_limit must be from 0"),
    ],
)
def test_loading_refuses_wrong_arguments_by_name(load, change, words):
    with pytest.raises(ValueError, match=words):
        load(**({"model_configs": configs()} | change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cfg_scale": None}, "cfg_scale must be a number from 0 to 100; got None"),
        ({"cfg_scale": "5"}, "cfg_scale must be a number"),
        ({"cfg_scale": []}, "cfg_scale needs at least one number"),
        ({"tile_size": 30}, r"tile_size must be two whole numbers of latent cells, \(height, width\); got 30"),
        ({"tile_stride": (0, 26)}, "tile_stride must be two whole numbers"),
        ({"rand_device": "foo"}, "rand_device must name a device"),
        ({"rand_device": "meta"}, "rand_device: 'meta' cannot be used on this machine"),
        ({"denoising_strength": 7}, "denoising_strength must be from 0 to 1; got 7"),
        ({"denoising_strength": None}, "denoising_strength must be a number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": None}, "num_inference_steps must be a number"),
        ({"sigma_shift": 0}, "sigma_shift must be from 0.01"),
        ({"height": float("inf")}, "height must be a whole number"),
        ({"width": "832"}, "width must be a whole number"),
        ({"num_frames": None}, "num_frames must be a"),
        ({"height": 10**9}, "height must be a whole number from 1 to 16384"),
        ({"motion_bucket_id": 101}, "motion_bucket_id must be from 0 to 100"),
        ({"vace_scale": "strong"}, "vace_scale must be a number"),
        ({"tea_cache_l1_thresh": "low"}, "tea_cache_l1_thresh must be a number"),
        ({"tea_cache_model_id": "Wan9"}, "tea_cache_model_id must be one of"),
        ({"sliding_window_size": 2.5, "sliding_window_stride": 1}, "sliding_window_size must be a whole number"),
        ({"progress_bar_cmd": 5}, "progress_bar_cmd must wrap an iterable"),
        ({"fit": "crop"}, "fit must be a Fit"),
        ({"camera_path": "Left"}, "camera_path must be a CameraPath"),
        ({"camera_control_direction": "Sideways"}, "camera_control_direction must be one of"),
        ({"camera_control_direction": "Left", "camera_control_speed": "fast"}, "camera_control_speed must be"),
        ({"camera_control_direction": "Left", "camera_control_origin": "here"}, "camera_control_origin must be"),
        ({"input_image": Image.new("RGB", (0, 0))}, "input_image"),
        ({"window_prompts": 5}, "window_prompts must be a list"),
        ({"seed": 2**70}, "seed must be a whole number"),
        ({"cfg_merge": "no"}, "cfg_merge must be True or False; got 'no'"),
        ({"tiled": "no"}, "tiled must be True or False"),
        ({"tiled": 2}, "tiled must be True or False"),
    ],
)
def test_calls_refuse_wrong_values_by_the_argument_s_name(pipe, change, words):
    with pytest.raises(ValueError, match=words):
        pipe("a dog", **{**SMALL, **change})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["device", "rand_device", "offload_device"])
def test_cuda_where_there_is_none_is_said(load, name):
    with pytest.raises(ValueError, match=f"{name}: 'cuda' cannot be used on this machine"):
        if name == "rand_device":
            load()("a dog", **SMALL, rand_device="cuda")
        elif name == "device":
            load(device="cuda")
        else:
            load(configs(offload_device="cuda"))


def test_numbers_of_numpy_are_numbers(pipe):
    given = {"cfg_scale": np.float32(4), "seed": np.int64(3), "height": np.int32(32), "sigma_shift": np.float16(3)}
    plain = {"cfg_scale": 4.0, "seed": 3, "height": 32, "sigma_shift": 3.0}
    assert torch.equal(pipe("a dog", **{**SMALL, **given}), pipe("a dog", **{**SMALL, **plain}))


def test_teacache_takes_a_threshold_of_any_size(pipe):
    call = {**SMALL, "num_inference_steps": 6, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}
    assert torch.equal(
        pipe("a dog", **call, tea_cache_l1_thresh=1e30), pipe("a dog", **call, tea_cache_l1_thresh=999.0)
    )


def test_arguments_by_position_are_those_by_name(pipe):
    order = list(CALL)
    given = {**CALL, **SMALL, "prompt": "a dog", "progress_bar_cmd": iter}
    assert torch.equal(pipe(*(given[name] for name in order)), pipe("a dog", **SMALL))


def test_loras_come_as_files_configurations_and_tensors(load, tmp_path):
    pipe = load(configs("vace"))
    lora = {
        f"vace_blocks.0.self_attn.q.lora_{x}.default.weight": torch.ones(s)
        for x, s in (("A", (4, 256)), ("B", (256, 4)))
    }
    path = tmp_path / "epoch-4.safetensors"
    save_file(lora, path)
    call = {**SMALL, "vace_reference_image": PICTURE}
    films = []
    for given in (
        {"lora_config": str(path)}, {"path": path}, {"lora_config": ModelConfig(path=str(path))}, {"state_dict": lora},
        {"lora_config": path, "hotload": True, "alpha": np.float32(1), "verbose": 0},
    ):  # fmt: skip
        pipe.load_lora(pipe.vace, **given)
        films.append(pipe("a dog", **call))
        pipe.clear_lora(verbose=0)
    assert all(torch.equal(film, films[0]) for film in films)
    assert not torch.equal(pipe("a dog", **call), films[0])
    refused = {
        "needs a file": {},
        "not both": {"lora_config": path, "state_dict": lora},
        "lora_config must": {"lora_config": 5},
        "state_dict is no Wan": {"state_dict": {"x": torch.ones(1)}},
        "alpha must be": {"lora_config": path, "alpha": "much"},
        "gone.safetensors does not exist": {"lora_config": "gone.safetensors"},
    }
    for words, given in refused.items():
        with pytest.raises(ValueError, match=words):
            pipe.load_lora(pipe.vace, **given)
    with pytest.raises(ValueError, match="got None"):
        pipe.load_lora(pipe.motion_controller, path)


def test_the_environment_chooses_source_and_attention(monkeypatch):
    assert (download_source(), attention_of_environment()) == ("modelscope", "auto")
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "HuggingFace")
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "torch")
    assert (download_source(), attention_of_environment()) == ("huggingface", "sdpa")
    assert download_source("ModelScope") == "modelscope"
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "ftp")
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "magic")
    with pytest.raises(
        ValueError, match=r"DIFFSYNTH_DOWNLOAD_SOURCE.* must be one of modelscope, huggingface; got 'ftp'"
    ):
        download_source()
    with pytest.raises(ValueError, match=r"DIFFSYNTH_ATTENTION_IMPLEMENTATION must be one of .*; got 'magic'"):
        attention_of_environment()


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return reference_scripts.Stage(tmp_path_factory.mktemp("scripts"))


SCRIPTS = (
    [s for revision in reference_scripts.REVISIONS for s in reference_scripts.scripts(CHECKOUT, revision)]
    if CHECKOUT else []
)  # fmt: skip


@pytest.mark.skipif(not CHECKOUT, reason="WANCORE_DIFFSYNTH names no clone of DiffSynth-Studio")
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_reference_script_runs_with_its_imports_changed(stage, script):
    reference_scripts.check(*stage.run(script), script)
