"""The nodes as ComfyUI calls them: their declarations, their work on the bundled model, what they refuse."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.loading import ggufs
from tests.nodes.running import outputs
from tests.reference import arguments, load_case, relative_error, write_drawn
from wan_core import bundled, catalog
from wan_core.media.fitting import fit_size
from wan_core.models.config import WAN_21
from wan_core.models.vae import normalise
from wan_core.types import Conditioning
from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host

NODES = NODE_CLASS_MAPPINGS


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_drawn(root, catalog.TINY)
    return root


@pytest.fixture(autouse=True)
def configured(models):
    host.configure(device="cpu", models_dir=models)
    yield
    host.configure()


@pytest.mark.parametrize("node_id", NODES)
def test_declarations_are_complete(node_id):
    cls = NODES[node_id]
    assert node_id.startswith("WanCore")
    assert NODE_DISPLAY_NAME_MAPPINGS[node_id]
    assert cls.CATEGORY.startswith("WanCore/")
    assert cls.DESCRIPTION
    assert callable(getattr(cls, cls.FUNCTION))
    assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) == len(cls.OUTPUT_TOOLTIPS)
    declared = cls.INPUT_TYPES()
    for section in ("required", "optional"):
        for name, (kind, options) in declared.get(section, {}).items():
            assert options["tooltip"], name
            if isinstance(kind, list):
                assert options["default"] in kind
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"]


def run(node_id: str, **inputs):
    return outputs(node_id, **inputs)[0]


@pytest.fixture(scope="module")
def loaded(models):
    host.configure(device="cpu", models_dir=models)
    return {
        "model": run("WanCoreModelLoader", model=catalog.TINY),
        "text_encoder": run("WanCoreTextEncoderLoader", text_encoder=catalog.TINY),
        "vae": run("WanCoreVAELoader", vae=catalog.TINY),
    }


def prompt(loaded, **changes):
    return run("WanCoreTextEncode", text_encoder=loaded["text_encoder"], **{"prompt": "a dog", **changes})


def sampled(loaded, cond, **changes):
    settings = {
        "seed": 1, "steps": 2, "cfg": 5.0, "shift": 5.0, "solver": "euler", "width": 32, "height": 48, "num_frames": 5,
    }  # fmt: skip
    return run("WanCoreSampler", model=loaded["model"], conditioning=cond, **{**settings, **changes})


def test_the_published_call_through_the_nodes(loaded):
    case = load_case("t2v", "e2e")
    call = arguments(case)
    cond = prompt(loaded, prompt=call["prompt"], negative_prompt=call["negative_prompt"])
    size = {name: call[name] for name in ("seed", "width", "height", "num_frames")}
    latent = sampled(loaded, cond, **size, steps=call["num_inference_steps"])
    assert relative_error(normalise(latent["samples"], WAN_21), case["latents"]) < 1e-4
    images = run("WanCoreVAEDecode", vae=loaded["vae"], latent=latent)
    expected = case["frames"].float() / 255
    assert images.shape == expected.shape
    assert (
        images - expected
    ).abs().mean() * 255 < 0.75  # the reference rounds down to whole grey levels, IMAGE does not


def test_images_survive_encoding_of_odd_sizes(loaded, caplog):
    caplog.set_level("INFO", "wancore")
    latent = run("WanCoreVAEEncode", vae=loaded["vae"], images=torch.rand(7, 50, 35, 3))
    assert latent["samples"].shape == (1, 16, 2, 6, 4)
    assert "Encoding 32x48, 5 frames" in caplog.text
    images = run("WanCoreVAEDecode", vae=loaded["vae"], latent=latent)
    assert images.shape == (5, 48, 32, 3)
    assert 0 <= images.min() <= images.max() <= 1


def test_tiled_decoding_with_one_tile_changes_nothing(loaded):
    latent = {"samples": torch.randn(1, 16, 2, 6, 4)}
    whole = run("WanCoreVAEDecode", vae=loaded["vae"], latent=latent)
    assert torch.equal(run("WanCoreVAEDecode", vae=loaded["vae"], latent=latent, tiled=True), whole)
    sizes = {"tile_height": 4, "tile_width": 4, "stride_height": 3, "stride_width": 3}
    assert not torch.equal(run("WanCoreVAEDecode", vae=loaded["vae"], latent=latent, tiled=True, **sizes), whole)


def test_denoise_starts_from_the_latent(loaded):
    cond, start = prompt(loaded), {"samples": torch.randn(1, 16, 2, 6, 4)}
    assert relative_error(sampled(loaded, cond, latent=start, denoise=0.0)["samples"], start["samples"]) < 1e-5
    near = sampled(loaded, cond, latent=start, denoise=0.05)["samples"]
    far = sampled(loaded, cond, latent=start, denoise=0.9)["samples"]
    assert relative_error(near, start["samples"]) < relative_error(far, start["samples"])
    with pytest.raises(ValueError, match="give one"):
        sampled(loaded, cond, denoise=0.5)


def test_progress_is_reported(loaded, models):
    seen = []
    host.configure(device="cpu", models_dir=models, on_progress=lambda *report: seen.append(report))
    latent = sampled(loaded, prompt(loaded))
    run("WanCoreVAEDecode", vae=loaded["vae"], latent=latent)
    assert seen == [("Sampling", 1, 2), ("Sampling", 2, 2), ("Decoding", 1, 2), ("Decoding", 2, 2)]


def test_weights_are_back_where_they_rest_after_an_error(loaded, monkeypatch):
    dit = loaded["model"].dit
    before = [p.data_ptr() for p in dit.parameters()]
    with pytest.raises(ValueError, match="text embeddings"):
        sampled(loaded, prompt(loaded).map(lambda t, _: t[..., :8]))
    assert [p.data_ptr() for p in dit.parameters()] == before


def test_loaders_list_files_of_the_models_folders(models):
    folder = models / "diffusion_models" / "wan"
    folder.mkdir(parents=True)
    shutil.copy(models / catalog.TINY / "diffusion_pytorch_model.safetensors", folder / "mine.safetensors")
    choices = NODES["WanCoreModelLoader"].INPUT_TYPES()["required"]["model"][0]
    assert choices[0] == "wan/mine.safetensors"
    assert "Wan-AI/Wan2.1-T2V-14B" in choices
    assert NODES["WanCoreModelLoader"].VALIDATE_INPUTS(model="wan/mine.safetensors") is True
    assert run("WanCoreModelLoader", model="wan/mine.safetensors").variant.name == "t2v"


def test_two_files_of_a_pair_are_one_entry_of_the_list(models):
    folder, pair = models / "diffusion_models" / "pairs", bundled.write_model(models, catalog.tiny_id("t2v", True))
    folder.mkdir(parents=True)
    for expert in ("high", "low"):
        file = pair / f"{expert}_noise_model" / catalog.DIT_FILE
        shutil.copy(file, folder / f"wan2.2_t2v_{expert}_noise_14B.safetensors")
    entry, loader = "pairs/wan2.2_t2v_{high,low}_noise_14B.safetensors", NODES["WanCoreModelLoader"]
    choices = loader.INPUT_TYPES()["required"]["model"][0]
    assert entry in choices and "pairs/wan2.2_t2v_low_noise_14B.safetensors" in choices
    assert loader.VALIDATE_INPUTS(model=entry) is True
    model = run("WanCoreModelLoader", model=entry)
    assert model.boundary == 0.875 and len(model.experts) == 2
    (planned,) = loader.plan_outputs(model=entry)
    assert [expert.lowest for expert in planned.experts] == [875, 0]
    assert len(run("WanCoreModelLoader", model="pairs/wan2.2_t2v_low_noise_14B.safetensors").experts) == 1
    before = loader.IS_CHANGED(model=entry)
    shutil.copy(pair / "high_noise_model" / catalog.DIT_FILE, folder / "wan2.2_t2v_low_noise_14B.safetensors")
    assert loader.IS_CHANGED(model=entry) != before
    other = bundled.write_model(models, catalog.tiny_id("vace")) / catalog.DIT_FILE
    shutil.copy(other, folder / "wan2.2_t2v_low_noise_14B.safetensors")
    assert "so they are not two experts of one model" in loader.VALIDATE_INPUTS(model=entry)


def test_gguf_files_are_listed_in_old_and_new_folders_and_loaded(models):
    for folder in ("unet", "diffusion_models"):
        (models / folder).mkdir(exist_ok=True)
        ggufs.write(models / folder / f"{folder}_Q8_0.gguf", bundled.state_dict(bundled.WanDiT(bundled.DIT)))
        name = f"{folder}_Q8_0.gguf"
        assert name in NODES["WanCoreModelLoader"].INPUT_TYPES()["required"]["model"][0]
        assert NODES["WanCoreModelLoader"].VALIDATE_INPUTS(model=name) is True
        model = run("WanCoreModelLoader", model=name, rest="disk")
        assert (model.variant.name, model.dit.blocks[0].ffn[0].words) == ("t2v", "GGUF Q8_0")


def test_a_replaced_file_is_loaded_again(models):
    file = models / "vae" / "mine.pth"
    file.parent.mkdir(exist_ok=True)
    shutil.copy(models / catalog.TINY / catalog.VAE_PATTERN, file)
    changed = NODES["WanCoreVAELoader"].IS_CHANGED
    before = changed(vae="mine.pth")
    assert changed(vae="mine.pth") == before
    shutil.copy(models / catalog.TINY / catalog.TEXT_ENCODER_PATTERN, file)
    assert changed(vae="mine.pth") != before


def lora(path: Path) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 256)}, path)


def truncated(path: Path) -> None:
    whole = (host.current.models_dir() / catalog.TINY / "diffusion_pytorch_model.safetensors").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def copy_of(name: str):
    return lambda path: shutil.copy(host.current.models_dir() / catalog.TINY / name, path)


WRONG = {
    "vae.safetensors": (lambda path: save_file(bundled.state_dict(bundled.WanVAE(bundled.VAE)), path), "is a Wan VAE"),
    "t5.pth": (copy_of(catalog.TEXT_ENCODER_PATTERN), "is a UMT5 text encoder"),
    "lora.safetensors": (lora, "LoRA"),
    "truncated.safetensors": (truncated, "truncated|bytes"),
    "pointer.safetensors": (pointer, "git-LFS"),
    "shard-00001-of-00002.safetensors": (copy_of("diffusion_pytorch_model.safetensors"), "shard-00002-of-00002"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_before_the_prompt_starts(models, name):
    make, words = WRONG[name]
    path = models / "diffusion_models" / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    try:
        answer = NODES["WanCoreModelLoader"].VALIDATE_INPUTS(model=name)
        assert isinstance(answer, str)
        with pytest.raises(ValueError, match=words):
            run("WanCoreModelLoader", model=name)
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("node_id", "inputs", "words"),
    [
        ("WanCoreModelLoader", {"model": "Wan-AI/Wan2.1-T2V-14B"}, "Set download to true"),
        ("WanCoreTextEncoderLoader", {"text_encoder": "Wan-AI/Wan2.1-T2V-1.3B"}, "Set download to true"),
        ("WanCoreVAELoader", {"vae": "gone.safetensors"}, "Value not in list"),
    ],
)
def test_an_absent_model_is_refused_before_the_prompt_starts(node_id, inputs, words):
    assert words in NODES[node_id].CHECK_INPUTS(**inputs)


def test_a_vae_loader_says_what_it_was_given(models):
    shutil.copy(models / catalog.TINY / "diffusion_pytorch_model.safetensors", models / "vae" / "dit.safetensors")
    assert "is a Wan DiT" in NODES["WanCoreVAELoader"].VALIDATE_INPUTS(vae="dit.safetensors")


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.bfloat16)]
)
def test_dtypes_on_the_cpu(dtype, expected):
    dit = run("WanCoreModelLoader", model=catalog.TINY, dtype=dtype).dit
    assert dit.dtype == expected
    assert dit.blocks[0].modulation.dtype == torch.float32


@pytest.mark.parametrize("name", ["cfg", "shift", "denoise"])
def test_a_widget_that_holds_no_number_is_refused_before_the_prompt_starts(name):
    check = NODES["WanCoreSampler"].VALIDATE_INPUTS
    assert check(cfg=5.0, shift=None, denoise=1.0) is True
    assert "must be" in check(**{name: float("nan")})
    assert "must be" in check(**{name: -1.0})


@pytest.mark.parametrize("value", ["x", 1, 0.5, None, True, [1, 2], {"samples": 3}, {}])
def test_constants_in_sockets_are_refused_by_name(value):
    """ComfyUI calls a node with what the workflow holds there."""
    for node_id, name, others in (
        ("WanCoreVAEDecode", "latent", {"vae": object()}),
        ("WanCoreSampler", "model", {"conditioning": Conditioning()}),
        ("WanCoreToConditioning", "conditioning", {"width": 32, "height": 32, "num_frames": 5}),
        ("WanCoreTrainLora", "data", {}),
    ):
        with pytest.raises(ValueError, match=f"^{name} takes a "):
            outputs(node_id, **{name: value, **others})


@pytest.mark.parametrize("node_id", ["WanCoreSampler", "WanCoreVAEDecode"])
def test_a_wrong_latent_is_refused_with_what_fits(loaded, node_id):
    wrong = ((torch.zeros(1, 16, 4, 6), "of images; a video's is"), (torch.zeros(1, 48, 2, 4, 6), "16 channels"))
    for samples, words in wrong:
        with pytest.raises(ValueError, match=words):
            if node_id == "WanCoreSampler":
                sampled(loaded, prompt(loaded), latent={"samples": samples}, denoise=0.5)
            else:
                run(node_id, vae=loaded["vae"], latent={"samples": samples})


def test_a_latent_that_would_be_ignored_is_told(loaded, caplog):
    sampled(loaded, prompt(loaded), latent={"samples": torch.zeros(1, 16, 2, 4, 6)})
    assert "The latent has no effect at denoise 1" in caplog.text


def test_a_text_to_video_graph_shows_twenty_widgets():
    """Those of the other nodes of the graph are two, and three that ComfyUI's Save Video has."""
    ids = ("ModelLoader", "TextEncoderLoader", "VAELoader", "TextEncode", "Sampler", "VAEDecode")
    shown = []
    for node_id in ids:
        for group in NODES[f"WanCore{node_id}"].INPUT_TYPES().values():
            for name, (kind, *options) in group.items():
                is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN")
                if is_widget and not options[0].get("advanced"):
                    shown += [name] * (2 if options[0].get("control_after_generate") else 1)
    assert len(shown) <= 15, shown


def test_the_sampler_takes_the_size_of_conditioning_that_has_one(loaded, caplog):
    cond = prompt(loaded)
    video = torch.rand(5, 32, 48, 3)
    size = {"width": 48, "height": 32, "num_frames": 5}
    made = run("WanCoreVaceEncode", conditioning=cond, vae=loaded["vae"], **size, strength=1.0, video=video)
    (model,) = outputs("WanCoreModelLoader", model=catalog.tiny_id("vace"))
    caplog.set_level("INFO", "wancore")
    latent = sampled({**loaded, "model": model}, made, width=832, height=480, num_frames=81)
    assert latent["samples"].shape == (1, 16, 2, 4, 6)
    assert "The size is that of the pictures: 48x32" in caplog.text


@pytest.mark.parametrize("frames", [1, 5])
def test_start_frames_come_out_as_they_are(loaded, frames):
    (model,) = outputs("WanCoreModelLoader", model=catalog.TINY_TI2V)
    (vae,) = outputs("WanCoreVAELoader", vae=catalog.TINY_TI2V)
    pictures, size = torch.rand(frames, 64, 96, 3), {"width": 64, "height": 32, "num_frames": 13}
    start = {"conditioning": prompt(loaded), "vae": vae, **size, "start_image": pictures}
    cond = run("WanCoreStartFrames", **start)
    latent = sampled({**loaded, "model": model}, cond)["samples"]
    kept = run("WanCoreVAEEncode", vae=vae, images=fit_size(pictures, 64, 32, "crop"))["samples"]
    assert latent.shape == (1, 48, 4, 2, 4)
    assert relative_error(latent[:, :, : kept.shape[2]], kept) < 1e-5
    ruled = run("WanCoreStartFrames", **{**start, "start_image": torch.rand(1, 96, 32, 3)}, size_rule="area and crop")
    assert (ruled.size.width, ruled.size.height) == (32, 64)
    with pytest.raises(ValueError, match=r"Start Frames is for Wan 2\.2 TI2V-5B"):
        run("WanCoreStartFrames", **{**start, "vae": loaded["vae"]})


def test_a_pair_of_loras_is_one_entry_and_one_for_each_expert(models, loaded):
    folder = models / "loras"
    folder.mkdir(exist_ok=True)
    files = [folder / f"few_steps_{noise}_noise.safetensors" for noise in ("high", "low")]
    path = "diffusion_model.blocks.0.self_attn.q"
    for file in files:
        save_file({f"{path}.lora_A.weight": torch.ones(4, 256), f"{path}.lora_B.weight": torch.ones(256, 4)}, file)
    name = "few_steps_{high,low}_noise.safetensors"
    try:
        assert name in NODES["WanCoreLoraLoader"].INPUT_TYPES()["required"]["lora"][0]
        (pair,) = outputs("WanCoreModelLoader", model=catalog.tiny_id("t2v", is_pair=True))
        changed, report = outputs("WanCoreLoraLoader", model=pair, lora=name, strength=1.0, strength_low=0.25)
        high, low = (expert.loras for expert in changed.experts)
        assert (len(high), len(low)) == (1, 1)
        assert (high[0].strength.values, low[0].strength.values) == ((1.0,), (0.25,))
        assert "few_steps_high_noise" in report and "few_steps_low_noise" in report
        same, _ = outputs("WanCoreLoraLoader", model=pair, lora="none", strength=1.0)
        assert same is pair
        with pytest.raises(ValueError, match="two experts"):
            run("WanCoreLoraLoader", model=loaded["model"], lora=name, strength=1.0)
    finally:
        for file in files:
            file.unlink()
