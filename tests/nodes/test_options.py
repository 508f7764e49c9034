"""The sampler's optional sockets: each option node's settings, what the sampler does with them, and what is kept."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import fork_server
from tests.disks import full_disk
from tests.nodes.running import outputs
from tests.reference import relative_error, tiny_vae, tiny_vae_22
from wan_core import bundled, catalog
from wan_core.cache_settings import EasyCacheSettings, FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from wan_core.media import probe
from wan_core.models.config import WAN_21, PreviewDecoderConfig
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.models.vae import denormalise
from wan_core.sampling.checkpoint import load_latents
from wan_core.sampling.compose import build_solver
from wan_core.sampling.preview import Previewer
from wan_core.settings import (
    GuidanceSettings,
    NagSettings,
    RunSettings,
    SamplerSettings,
    ScheduleSettings,
    SkipSettings,
    WindowSettings,
)
from wancore.nodes import NODE_CLASS_MAPPINGS, host
from wancore.nodes.previews import find_decoder, for_editor
from wancore.nodes.sampler import STATE

ROOT = Path(__file__).parents[2]
NODES = NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    bundled.write_model(root, catalog.TINY)
    return root


@pytest.fixture(autouse=True)
def configured(models, tmp_path):
    host.configure(device="cpu", models_dir=models, output_dir=tmp_path / "out")
    yield
    host.configure()


def run(node_id: str, **inputs):
    return outputs(node_id, **inputs)[0]


@pytest.fixture(scope="module")
def loaded(models):
    host.configure(device="cpu", models_dir=models)
    text_encoder = run("WanCoreTextEncoderLoader", text_encoder=catalog.TINY)
    return {
        "model": run("WanCoreModelLoader", model=catalog.TINY),
        "text_encoder": text_encoder,
        "conditioning": run("WanCoreTextEncode", text_encoder=text_encoder, prompt="a dog"),
        "vae": run("WanCoreVAELoader", vae=catalog.TINY),
    }


def sampled(loaded, **changes):
    settings = {
        "seed": 1, "steps": 4, "cfg": 5.0, "shift": 5.0, "solver": "unipc", "width": 32, "height": 32, "num_frames": 9,
    }  # fmt: skip
    inputs = {name: loaded[name] for name in ("model", "conditioning")}
    return run("WanCoreSampler", **inputs, **{**settings, **changes})


@pytest.mark.parametrize(
    ("node", "inputs", "expected"),
    [
        ("TeaCache", {"threshold": 0.2}, TeaCacheSettings(threshold=0.2)),
        ("TeaCache", {"threshold": 0.2, "speedup": 2.0}, TeaCacheSettings(threshold=None, speedup=2.0)),
        ("EasyCache", {"threshold": 0.1, "start_step": 5}, EasyCacheSettings(threshold=0.1, start_step=5)),
        ("TeaCache", {"threshold": 0.2, "preset": "fast"}, TeaCacheSettings.preset("fast")),
        ("EasyCache", {"threshold": 0.1, "start_step": 5, "preset": "careful"}, EasyCacheSettings.preset("careful")),
        ("MagCache", {"preset": "balanced"}, MagCacheSettings.preset("balanced")),
        (
            "MagCache",
            {"preset": "custom", "threshold": 0.3, "max_skips": 4, "retention": 0.1, "template": "measure"},
            MagCacheSettings(threshold=0.3, max_skips=4, retention=0.1, template="measure"),
        ),
        ("FirstBlockCache", {"preset": "fast"}, FirstBlockSettings.preset("fast")),
        (
            "FirstBlockCache",
            {"preset": "custom", "threshold": 0.3, "first_blocks": 2, "start_step": 1, "max_skips": 3},
            FirstBlockSettings(threshold=0.3, blocks=2, start_step=1, max_skips=3),
        ),
        (
            "Windows",
            {"sliding_window_size": 9, "sliding_window_stride": 6, "mode": "chain"},
            WindowSettings(size=9, stride=6, mode="chain"),
        ),
        ("Guidance", {"cfg": "6, 4 2", "end": 0.8}, GuidanceSettings(scale=(6.0, 4.0, 2.0), end=0.8)),
        (
            "Guidance",
            {"cfg": "1", "nag_scale": 11.0, "nag_end": 0.7, "skip_blocks": "8, 9", "skip_scale": 2.0, "skip_end": 0.5},
            GuidanceSettings(
                scale=(1.0,),
                nag=NagSettings(scale=11.0, end=0.7),
                skip=SkipSettings(blocks=(8, 9), scale=2.0, end=0.5),
            ),
        ),
        ("Guidance", {"cfg": "4", "skip_blocks": "9"}, GuidanceSettings(scale=(4.0,), skip=SkipSettings(blocks=(9,)))),
        ("Schedule", {"start_step": 0, "end_step": 0}, ScheduleSettings()),
        ("Schedule", {"start_step": 2, "end_step": 4}, ScheduleSettings(start_step=2, end_step=4)),
        (
            "Schedule",
            {"start_step": 0, "end_step": 0, "sigmas": torch.tensor([1.0, 0.5, 0.0])},
            ScheduleSettings(sigmas=(1.0, 0.5, 0.0)),
        ),
        (
            "Schedule",
            {"start_step": 0, "end_step": 0, "sigma_list": "1, 0.5 0"},
            ScheduleSettings(sigmas=(1.0, 0.5, 0.0)),
        ),
        (
            "LongRun",
            {"checkpoint_every": 3, "keep_latents": False},
            RunSettings(checkpoint_every=3, keep_latents=False),
        ),
    ],
)
def test_option_nodes_give_frozen_settings(node, inputs, expected):
    assert run(f"WanCore{node}", **inputs) == expected


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [
        ("Windows", {"sliding_window_size": 4, "sliding_window_stride": 5}, "from 1 to 4"),
        ("Guidance", {"cfg": "six"}, "list of numbers"),
        ("Guidance", {"cfg": "6", "start": 0.8, "end": 0.2}, "not start after its end"),
        ("Guidance", {"cfg": "4", "skip_blocks": "nine"}, "list of numbers"),
        ("Guidance", {"cfg": "4", "skip_blocks": "1.5"}, "list of whole numbers"),
        ("Guidance", {"cfg": "1", "skip_blocks": "1"}, "set skip_scale"),
        ("Sampler", {"cfg": 1.0, "more_motion": True}, "set recommended to auto, FusionX"),
        ("Sampler", {"recommended": "fast"}, "none of off, auto"),
        ("Schedule", {"sigma_list": "0, 1"}, "falling"),
        ("LongRun", {"name": "../mine"}, "plain file name"),
        ("WindowPrompts", {"prompts": " \n "}, "at least one line"),
        ("LoadLatents", {"file": "gone.latent"}, "no input file"),
        ("LoadLatents", {"file": "n" * 300}, "no input file"),
    ],
)
def test_bad_options_are_refused_before_the_prompt_starts(node, inputs, words):
    assert words in NODES[f"WanCore{node}"].VALIDATE_INPUTS(**inputs)


def test_nothing_connected_is_the_default(loaded):
    plain = sampled(loaded)
    assert set(plain) == {"samples"}
    assert torch.equal(sampled(loaded, guidance=GuidanceSettings(scale=5.0))["samples"], plain["samples"])
    assert torch.equal(sampled(loaded, schedule=ScheduleSettings())["samples"], plain["samples"])


@pytest.mark.parametrize(
    "option",
    [
        {"cache": TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B")},
        {"cache": EasyCacheSettings(threshold=1000.0, start_step=2)},
        {"cache": MagCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B")},
        {"cache": FirstBlockSettings(threshold=1000.0, start_step=2)},
        {"windows": WindowSettings(size=2, stride=1)},
        {"guidance": GuidanceSettings(scale=(8.0, 2.0))},
        {"schedule": ScheduleSettings(sigmas=(1.0, 0.5, 0.0))},
        {"guidance": GuidanceSettings(scale=5.0, nag=NagSettings(scale=11.0))},
        {"recommended": "FastWan"},
    ],
    ids=lambda option: type(*option.values()).__name__,
)
def test_every_option_reaches_the_run(loaded, option):
    assert not torch.equal(sampled(loaded, **option)["samples"], sampled(loaded)["samples"])


def test_auto_needs_a_published_model(loaded):
    unknown = dataclasses.replace(loaded["model"], row=None)
    with pytest.raises(ValueError, match="TeaCache has no coefficients for this model"):
        sampled({**loaded, "model": unknown}, cache=TeaCacheSettings())
    with pytest.raises(ValueError, match="MagCache has no ratios for this model; measure them once"):
        sampled({**loaded, "model": unknown}, cache=MagCacheSettings())
    with pytest.raises(ValueError, match=r"must leave blocks to skip: .* has 4, and 4 are"):
        sampled(loaded, cache=FirstBlockSettings(blocks=4))


def test_recommended_settings_take_the_place_of_the_widgets(loaded):
    typed = sampled(loaded, steps=4, cfg=1.0, shift=5.0, solver="lcm")
    assert torch.equal(sampled(loaded, recommended="LightX2V 2.1")["samples"], typed["samples"])
    with pytest.raises(ValueError, match="more_motion changes the recommended settings"):
        sampled(loaded, more_motion=True)


def test_two_samplers_give_what_one_gives(loaded):
    whole = sampled(loaded)["samples"]
    first = sampled(loaded, schedule=ScheduleSettings(end_step=2))
    rest = ScheduleSettings(start_step=2)
    assert torch.equal(sampled(loaded, schedule=rest, latent=first)["samples"], whole)
    with pytest.raises(ValueError, match="start_step is 3, but the sampler before ended at step 2"):
        sampled(loaded, schedule=ScheduleSettings(start_step=3), latent=first)
    changed = {**first, "samples": first["samples"] + 0.5}
    assert not torch.equal(sampled(loaded, schedule=rest, latent=changed)["samples"], whole)
    assert STATE in first


def test_leftover_noise_is_passed_on_as_comfyui_does(loaded):
    """Latents at noise level sigma are divided by 1 - sigma, and what comes without our own state is multiplied."""
    whole = sampled(loaded, solver="euler")["samples"]
    first = sampled(loaded, solver="euler", schedule=ScheduleSettings(end_step=2))
    signal = 1 - build_solver(SamplerSettings(steps=4, shift=5.0)).sigmas[2]
    assert torch.equal(first["samples"], denormalise(first[STATE].video / signal, WAN_21))
    without = {"samples": first["samples"]}
    ours = sampled(loaded, solver="euler", schedule=ScheduleSettings(start_step=2), latent=without)["samples"]
    assert relative_error(ours, whole) < 1e-5


def test_windows_take_a_prompt_each(loaded):
    prompts = run("WanCoreWindowPrompts", text_encoder=loaded["text_encoder"], prompts="a dog\n\na cat\n")
    assert len(prompts) == 2
    windows = WindowSettings(size=2, stride=1)
    with_one = sampled(loaded, windows=windows)["samples"]
    assert not torch.equal(sampled(loaded, windows=windows, prompts=prompts)["samples"], with_one)


def test_latents_are_kept_with_what_made_them(loaded, tmp_path):
    metadata = {}
    latent = sampled(loaded, run=RunSettings(checkpoint_every=1, name="mine"), extra_pnginfo=metadata)
    kept = tmp_path / "out" / "wancore" / "mine_00001_.latent"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    raw, record = load_latents(kept)
    assert torch.equal(raw, latent["samples"])
    assert metadata == {"wancore": [record]}
    assert record["settings"]["solver"] == "unipc"
    again = {}
    assert torch.equal(run("WanCoreLoadLatents", file=f"wancore/{kept.name}", extra_pnginfo=again)["samples"], raw)
    assert again == metadata


def test_a_run_cut_off_after_its_last_step_goes_on_there(loaded, models, tmp_path):
    run_settings, folder = RunSettings(checkpoint_every=3), tmp_path / "out" / "wancore"
    with pytest.raises(ZeroDivisionError), host.current.workflow():
        first = sampled(loaded, run=run_settings)
        raise ZeroDivisionError("while decoding")
    assert sorted(path.suffix for path in folder.iterdir()) == [".latent", ".safetensors"]
    seen = []
    host.configure(
        device="cpu", models_dir=models, output_dir=tmp_path / "out", on_progress=lambda phase, *_: seen.append(phase)
    )
    with host.current.workflow():
        again = sampled(loaded, run=run_settings)
        assert len(list(folder.iterdir())) == 2
    assert "Sampling" not in seen and torch.equal(again["samples"], first["samples"])
    assert [path.name for path in folder.iterdir()] == ["wancore_00001_.latent"]
    sampled(loaded, run=run_settings)
    assert len(list(folder.glob("*.latent"))) == 2


@pytest.mark.parametrize("folder", ["models_dir", "input_dir", "output_dir", "temp_dir"])
def test_folders_mean_the_same_to_a_process_that_works_elsewhere(folder, tmp_path, monkeypatch):
    """As those of a training do, and what checks its data."""
    monkeypatch.chdir(tmp_path)
    host.configure(models_dir=Path("models"), input_dir=Path("in"), output_dir=Path("out"))
    place = getattr(host.current, folder)()
    assert place.is_absolute() and place.is_relative_to(tmp_path)


def test_a_full_disk_costs_what_is_kept_and_not_the_run(loaded, models, tmp_path, caplog):
    plain = sampled(loaded)["samples"]
    host.configure(device="cpu", models_dir=models, output_dir=tmp_path / "out", preview_every=1)
    with full_disk():
        latent = sampled(loaded, run=RunSettings(checkpoint_every=1))
    assert torch.equal(latent["samples"], plain)
    assert caplog.text.count("unfinished run cannot be kept") == caplog.text.count("latents cannot be kept") == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_previews_are_written_every_few_steps(loaded, models, tmp_path):
    host.configure(device="cpu", models_dir=models, output_dir=tmp_path, preview_every=3)
    plain = sampled(loaded)["samples"]
    names = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert names == ["step_0003.png", "step_0003_strip.png", "step_0004.png", "step_0004_strip.png"]
    with Image.open(tmp_path / "previews" / "step_0003.png") as still:
        assert still.size == (4, 4)
    with Image.open(tmp_path / "previews" / "step_0003_strip.png") as strip:
        assert strip.n_frames == 3
    host.configure(device="cpu", models_dir=models)
    assert torch.equal(sampled(loaded)["samples"], plain)


def test_a_preview_that_fails_does_not_stop_the_run(loaded, models, tmp_path, caplog):
    (tmp_path / "previews").write_text("in the way")
    host.configure(device="cpu", models_dir=models, output_dir=tmp_path, preview_every=1)
    assert sampled(loaded)["samples"].isfinite().all()
    assert "No preview" in caplog.text


class Red:
    """A models folder whose tiny autoencoder shows everything in red."""

    WEIGHTS = PreviewDecoder(PreviewDecoderConfig(widths=(8, 6, 4, 4))).state_dict()

    def __init__(self, models: Path, folder: Path) -> None:
        self.models, self.file = folder, folder / "vae_approx" / "taew2_1.safetensors"
        self.file.parent.mkdir(parents=True)
        (folder / "WanCore").symlink_to(models / "WanCore")
        weights = {key: torch.zeros_like(value) for key, value in self.WEIGHTS.items()}
        save_file(weights | {"decoder.22.bias": torch.tensor([1.0, 0, 0])}, self.file)


@pytest.fixture
def red(models, tmp_path) -> Red:
    return Red(models, tmp_path / "models")


def colours(path: Path) -> list:
    with Image.open(path) as picture:
        return picture.convert("RGB").getcolors()


def test_previews_are_decoded_where_the_tiny_autoencoder_is(loaded, red, tmp_path):
    plain = sampled(loaded)["samples"]
    host.configure(device="cpu", models_dir=red.models, output_dir=tmp_path, preview_every=4)
    assert torch.equal(sampled(loaded)["samples"], plain)
    for name in ("step_0004.png", "step_0004_strip.png"):
        assert colours(tmp_path / "previews" / name) == [(32 * 32, (255, 0, 0))]
    with Image.open(tmp_path / "previews" / "step_0004_strip.png") as strip:
        assert strip.size == (32, 32)


@pytest.mark.parametrize("content", ["broken", "foreign"])
def test_a_bad_tiny_autoencoder_is_said_once(loaded, red, tmp_path, caplog, content):
    if content == "broken":
        red.file.write_bytes(red.file.read_bytes()[:-8])
    else:
        save_file({"first_stage_model.decoder.mid.block_1.weight": torch.zeros(2)}, red.file)
    host.configure(device="cpu", models_dir=red.models, output_dir=tmp_path, preview_every=1)
    sampled(loaded)
    assert caplog.text.count("Previews are latent-to-RGB") == 1
    with Image.open(tmp_path / "previews" / "step_0004.png") as still:
        assert still.size == (4, 4)


class LatentToRGB:
    """A previewer as ComfyUI and other packs have them."""

    def decode_latent_to_preview_image(self, kind, latents):
        return kind, latents.shape[2]


def test_the_tiny_autoencoder_takes_the_place_of_comfyuis_own_previewer(red):
    host.configure(device="cpu", models_dir=red.models)
    latents, tiny = torch.zeros(1, 16, 5, 4, 4), Previewer(find_decoder(host.current), torch.device("cpu"))
    kind, picture, largest = for_editor(LatentToRGB(), True, tiny, latents, 512)
    assert (kind, picture.size, picture.getpixel((0, 0)), largest) == ("JPEG", (32, 32), (255, 0, 0), 512)
    without = Previewer(None, torch.device("cpu"))
    assert for_editor(LatentToRGB(), True, without, latents, 512) == ("JPEG", 1)
    assert for_editor(LatentToRGB(), False, tiny, latents, 512) == ("JPEG", 5)


def test_latents_of_48_channels_have_a_tiny_autoencoder_of_their_own(red, caplog):
    host.configure(device="cpu", models_dir=red.models)
    assert find_decoder(host.current, 48) is None
    weights = PreviewDecoder(PreviewDecoderConfig(latent_channels=48, widths=(8, 6, 4, 4), patch=2)).state_dict()
    save_file(weights, red.file.with_name("taew2_2.safetensors"))
    decoder = find_decoder(host.current, 48)
    (picture,) = Previewer(decoder, torch.device("cpu")).strip(torch.zeros(1, 48, 1, 2, 3))
    assert picture.size == (48, 32) and find_decoder(host.current, 16).config.latent_channels == 16
    red.file.replace(red.file.with_name("taew2_2.safetensors"))
    assert find_decoder(host.current, 48) is None and "is for latents of 16 channels, not of 48" in caplog.text


def test_the_tiny_autoencoder_decodes_in_the_graph(loaded, red, caplog):
    """In place of the VAE, told as approximate; without its file the graph is refused before it runs."""
    decode = NODE_CLASS_MAPPINGS["WanCoreVAEDecode"]
    host.configure(device="cpu", models_dir=red.models)
    vae, latent = tiny_vae(), {"samples": torch.randn(1, 16, 3, 4, 4)}
    assert decode.VALIDATE_INPUTS(decoder="taew2") is True
    with caplog.at_level("INFO", "wancore"):
        (frames,) = outputs("WanCoreVAEDecode", vae=vae, latent=latent, decoder="taew2")
    assert torch.equal(frames, torch.tensor([1.0, 0, 0]).expand(9, 32, 32, 3))
    assert "taew2_1.safetensors: an approximation" in caplog.text
    with pytest.raises(ValueError, match="vae_approx/taew2_2"):
        outputs("WanCoreVAEDecode", vae=tiny_vae_22(), latent={"samples": torch.randn(1, 48, 1, 2, 2)}, decoder="taew2")
    red.file.unlink()
    assert "taew2_1.safetensors or" in decode.VALIDATE_INPUTS(decoder="taew2")
    assert "Value not in list" in decode.VALIDATE_INPUTS(decoder="fast")


def test_the_command_decodes_kept_latents(loaded, tmp_path):
    sampled(loaded, run=RunSettings())
    command = [
        fork_server.python(), "-m", "headless", "decode", tmp_path / "out" / "wancore" / "wancore_00001_.latent",
        "--out", tmp_path / "videos", "--tiny", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    info = probe(path)
    assert (info.num_frames, info.width, info.height, info.fps) == (9, 32, 32, 16.0)
    import av

    with av.open(str(path)) as container:
        (record,) = json.loads(container.metadata["wancore"])
    assert record["settings"]["steps"] == 4
    missing = subprocess.run([*command[:4], tmp_path / "no.latent", *command[5:]], cwd=ROOT, capture_output=True)
    assert missing.returncode == 2
    assert b"no input file" in missing.stderr
