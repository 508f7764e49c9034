"""The LoRA nodes as ComfyUI calls them: chained, shared, told, saved, and through a whole workflow."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora.fixtures import WRITERS, factors, linear_paths
from tests.nodes.running import outputs as run
from tests.reference import relative_error
from wan_core import bundled, catalog
from wan_core.types import Curve
from wancore.nodes import NODE_CLASS_MAPPINGS, host
from wancore.nodes.lora import strength_curve

NODES = NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    host.configure(device="cpu", models_dir=root)
    dit = run("WanCoreModelLoader", model=catalog.TINY)[0].dit
    (root / "loras").mkdir()
    for seed, name in enumerate(("diffusers", "kohya")):
        save_file(WRITERS[name](factors(dit, linear_paths(dit), seed=seed)), root / "loras" / f"{name}.safetensors")
    bad = {"transformer.double_blocks.0.x.lora_A.weight": torch.ones(1, 2)}
    save_file(
        bad | {"transformer.double_blocks.0.x.lora_B.weight": torch.ones(2, 1)}, root / "loras" / "flux.safetensors"
    )
    return root


@pytest.fixture(autouse=True)
def configured(models, tmp_path):
    host.configure(device="cpu", models_dir=models, output_dir=tmp_path)
    yield
    host.configure()


@pytest.fixture(scope="module")
def loaded(models):
    host.configure(device="cpu", models_dir=models)
    encoder = run("WanCoreTextEncoderLoader", text_encoder=catalog.TINY)[0]
    cond = run("WanCoreTextEncode", text_encoder=encoder, prompt="a dog")[0]
    return run("WanCoreModelLoader", model=catalog.TINY)[0], cond


def sampled(model, cond, **changes) -> torch.Tensor:
    settings = {
        "seed": 1, "steps": 3, "cfg": 5.0, "shift": 5.0, "solver": "euler", "width": 32, "height": 48, "num_frames": 5,
    }  # fmt: skip
    return run("WanCoreSampler", model=model, conditioning=cond, **{**settings, **changes})[0]["samples"]


def test_chained_loras_on_a_shared_base(loaded):
    """The loader gives a new handle on the same weights; samplers that share them do not meet."""
    model, cond = loaded
    before = {name: t.clone() for name, t in model.dit.state_dict().items()}
    base = sampled(model, cond)
    one, told = run("WanCoreLoraLoader", model=model, lora="diffusers.safetensors", strength=1.0)
    two, _ = run("WanCoreLoraLoader", model=one, lora="kohya.safetensors", strength=-0.5)
    assert "dialect   diffusers (92 keys)" in told and "skipped   0" in told
    assert one.dit is model.dit is two.dit and not model.loras and len(two.loras) == 2
    first, both = sampled(one, cond), sampled(two, cond)
    assert not torch.equal(first, base) and not torch.equal(first, both)
    assert torch.equal(sampled(model, cond), base) and torch.equal(sampled(one, cond), first)
    assert all(torch.equal(t, before[name]) for name, t in model.dit.state_dict().items())


def test_modes_strengths_and_curves(loaded):
    model, cond = loaded

    def with_lora(**settings) -> torch.Tensor:
        changed, _ = run("WanCoreLoraLoader", model=model, lora="kohya.safetensors", **{"strength": 0.6, **settings})
        return sampled(changed, cond)

    base, folded = sampled(model, cond), with_lora(mode="fold")
    assert relative_error(with_lora(mode="side"), folded) < 1e-4
    assert torch.equal(with_lora(strength=0.0), base)
    assert relative_error(with_lora(strength=0.3, strength_curve="2"), folded) < 1e-4
    assert torch.equal(with_lora(strength_curve="1 @ 0.6-0.9"), base)
    assert not torch.equal(with_lora(strength_curve="1, 0", blocks="0-3"), with_lora(blocks="0-3"))
    assert not torch.equal(with_lora(blocks="0-1, other=1"), folded)
    with pytest.raises(ValueError, match="follows a curve"):
        with_lora(strength_curve="1, 0", mode="fold")


@pytest.mark.parametrize(
    ("text", "curve"),
    [
        ("", Curve((0.5,))),
        ("1, 0.5, 0", Curve((0.5, 0.25, 0.0))),
        ("1 0", Curve((0.5, 0.0))),
        ("-2 @ 0.25-.75", Curve((-1.0,), 0.25, 0.75)),
    ],
)
def test_curves_as_text(text, curve):
    assert strength_curve(0.5, text) == curve


@pytest.mark.parametrize("text", ["a", "1 @", "1 @ 0.5", "@ 0-1", "1 @ 0.8-0.2"])
def test_curves_that_cannot_be_read(text):
    words = NODES["WanCoreLoraLoader"].VALIDATE_INPUTS(lora="kohya.safetensors", strength_curve=text)
    assert isinstance(words, str) and "curve" in words


def test_what_is_wrong_is_said_before_a_run(models, loaded):
    loader = NODES["WanCoreLoraLoader"]
    assert loader.VALIDATE_INPUTS(lora="kohya.safetensors", blocks="0-3", strength_curve="1") is True
    assert "Blocks are given as" in loader.VALIDATE_INPUTS(lora="kohya.safetensors", blocks="all")
    assert "models/loras" in loader.VALIDATE_INPUTS(lora="none.safetensors")
    with pytest.raises(ValueError, match=r"flux.safetensors matches .*FLUX"):
        run("WanCoreLoraLoader", model=loaded[0], lora="flux.safetensors", strength=1.0)
    save = NODES["WanCoreLoraSave"]
    assert save.VALIDATE_INPUTS(lora="kohya.safetensors", filename="style") is True
    for name in ("", "../style", "a/b", ".."):
        assert "plain name" in save.VALIDATE_INPUTS(lora="kohya.safetensors", filename=name)


def test_without_any_lora_the_lists_say_so(tmp_path):
    host.configure(device="cpu", models_dir=tmp_path)
    files, options = NODES["WanCoreLoraLoader"].INPUT_TYPES()["required"]["lora"]
    assert files == [options["default"], "none"] == ["no files in models/loras", "none"]
    assert "Put LoRA files into models/loras" in NODES["WanCoreLoraLoader"].VALIDATE_INPUTS(lora=files[0])


def test_info(loaded):
    told = run("WanCoreLoraInfo", lora="kohya.safetensors")[0]
    assert "model     none given" in told and "dialect   kohya" in told
    model, _ = run("WanCoreLoraLoader", model=loaded[0], lora="kohya.safetensors", strength=1.0)
    told = run("WanCoreLoraInfo", lora="kohya.safetensors", model=model)[0]
    assert "applied   46" in told and "in the same way" in told


def test_save_converts_merges_and_numbers(loaded, tmp_path):
    model, cond = loaded
    told = run("WanCoreLoraSave", lora="kohya.safetensors", strength=1.0, filename="style", dtype="fp32")[0]
    first = tmp_path / "loras" / "style_00001.safetensors"
    assert str(first) in told and "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in load_file(first)
    run(
        "WanCoreLoraSave", lora="kohya.safetensors", strength=0.5, filename="style", format="diffsynth", dtype="fp32",
        second_lora="diffusers.safetensors", second_strength=2.0,
    )  # fmt: skip
    merged = tmp_path / "loras" / "style_00002.safetensors"
    one, _ = run("WanCoreLoraLoader", model=model, lora="kohya.safetensors", strength=0.5)
    two, _ = run("WanCoreLoraLoader", model=one, lora="diffusers.safetensors", strength=2.0)
    assert relative_error(sampled(model.with_lora(merged)[0], cond), sampled(two, cond)) < 1e-4


def test_a_changed_file_changes_the_fingerprint(models):
    node, file = NODES["WanCoreLoraLoader"], models / "loras" / "new.safetensors"
    save_file({"a.diff": torch.ones(1)}, file)
    before = node.IS_CHANGED(lora="new.safetensors")
    save_file({"a.diff": torch.ones(2)}, file)
    assert node.IS_CHANGED(lora="new.safetensors") != before
    file.unlink()


def test_the_handle_is_frozen(loaded):
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded[0].loras = ()
    assert bundled.DIT.num_layers == 4
