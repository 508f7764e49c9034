"""Compiled steps compute what the eager ones do: in every model, wherever weights are, whatever hangs on layers."""

import re
import shutil
import tempfile
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from tests.reference import relative_error, tiny_dit
from tests.sampling.runs import planned
from tests.sampling.variants import conditioning
from wan_core.model import VideoModel
from wan_core.model_files import DiTSettings, inspect, load_dit
from wan_core.models import fused
from wan_core.models.attention import rotary_table
from wan_core.models.dit import WanDiT
from wan_core.models.fused import EAGER, compiled, load_fused
from wan_core.offload.quant import quantise
from wan_core.runtime import Runtime
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings
from wan_core.types import Conditioning, LatentSize
from wan_core.variants import match_variant

CPU = torch.device("cpu")
SIZE = LatentSize(2, 4, 4)
GRAPHS = "aot_eager"
"""The compiler without its last stage, so that no machine needs a C++ compiler for most of these tests."""


def latents(dit: WanDiT, variant: str = "t2v", memory: MemorySettings | None = None, lora=None, **settings):
    model = VideoModel.of(dit, match_variant(dit.config), None, "tiny")
    if lora:
        model, _ = model.with_lora(*lora[:1], **lora[1])
    cond = conditioning(variant, SIZE)
    if variant == "t2v":
        cond = Conditioning(text=cond.text, negative_text=cond.negative_text)
    settings = SamplerSettings(**{"steps": 3, "seed": 4, "guidance": GuidanceSettings(scale=3.0)} | settings)
    runtime = Runtime(device=CPU, dtype=dit.dtype)
    return planned(model, cond, SIZE, settings, runtime, memory)


def both(make, **options):
    """Latents with compiled steps and without."""
    dit = make()
    plain = latents(dit, **options)
    dit.fused = compiled(GRAPHS)
    return latents(dit, **options), plain


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("name", [field.name for field in fields(fused.FusedSteps)])
def test_every_form_of_a_step_computes_its_definition(name, dtype, error, gradients):
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(2, 300, 256, generator=generator).to(dtype) for _ in range(2))
    shift, scale = (torch.randn(2, 1, 256, generator=generator) for _ in range(2))
    others = {
        "norm_modulate": (shift, scale, 1e-6, dtype),
        "norm_rotate": (scale[0, 0].to(dtype), 1e-6, rotary_table((3, 10, 10), 128, CPU), 128),
        "gated_add": (update, scale),
    }[name]
    expected = getattr(fused, name)(x.float(), *others)
    for steps in (EAGER, compiled(GRAPHS)):
        got = getattr(steps, name)(x.clone().requires_grad_(gradients), *others)
        assert got.dtype == dtype and got.requires_grad == gradients
        assert relative_error(got, expected) < error


@pytest.mark.parametrize("variant", ["i2v", "vace"])
def test_every_model_gives_the_same_latents(variant):
    got, expected = both(lambda: tiny_dit(variant), variant=variant)
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_so_does_every_mode_of_guidance_in_bfloat16(mode):
    got, expected = both(lambda: tiny_dit().bfloat16(), guidance=GuidanceSettings(scale=3.0, mode=mode))
    assert relative_error(got, expected) < 0.03


def test_a_residual_stream_in_float32_keeps_its_dtype():
    def exact():
        dit = tiny_dit().bfloat16()
        dit.exact = True
        return dit

    got, expected = both(exact)
    assert relative_error(got, expected) < 0.03


def test_streamed_weights_and_fp8_are_out_of_the_compilers_sight():
    got, expected = both(tiny_dit, memory=MemorySettings(persistent_params=0))
    assert relative_error(got, expected) < 1e-5
    got, expected = both(lambda: quantise(tiny_dit()))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize(("mode", "strength"), [("side", (0.0, 1.0)), ("fold", 0.8)])
def test_so_are_loras(mode, strength, tmp_path):
    path, rows = tmp_path / "lora.safetensors", {}
    for name, weight in tiny_dit().named_parameters():
        if name.startswith("blocks.") and name.endswith((".q.weight", ".k.weight")):
            stem = f"diffusion_model.{name.removesuffix('.weight')}"
            rows[f"{stem}.lora_A.weight"] = torch.randn(2, weight.shape[1]) / 16
            rows[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    save_file(rows, path)
    lora = (path, {"mode": mode, "strength": strength})
    got, expected = both(tiny_dit, lora=lora)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, latents(tiny_dit())) > 1e-3


def test_blocks_and_steps_share_what_is_compiled():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    dit = tiny_dit()
    dit.fused = compiled(counter)
    latents(dit)
    first = counter.frame_count
    latents(dit, steps=5, seed=9)
    assert first == counter.frame_count == 3


def test_what_requires_gradients_runs_in_steps():
    steps = compiled(GRAPHS)
    x, update = torch.randn(1, 6, 256, requires_grad=True), torch.randn(1, 6, 256)
    before, gate = x.detach().clone(), torch.randn(1, 1, 256)
    steps.gated_add(x, update, gate).sum().backward()
    assert torch.equal(x, before) and torch.equal(x.grad, torch.ones_like(x))


def test_off_is_the_steps_themselves():
    assert load_fused(False, CPU, torch.float32) is EAGER


@pytest.fixture
def checkpoint(tmp_path):
    save_file(tiny_dit().state_dict(), tmp_path / "dit.safetensors")
    return inspect(tmp_path / "dit.safetensors", "dit")


def test_a_machine_that_cannot_compile_says_so_before_weights_are_read(checkpoint, monkeypatch):
    def broken(*_):
        raise RuntimeError("no working C++ compiler\nand more")

    monkeypatch.setattr(fused, "compiled", broken)
    monkeypatch.setattr("wan_core.model_files.Offload.load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"no working C\+\+ compiler\. It needs .* turn torch_compile off"):
        load_dit(checkpoint, DiTSettings(dtype=torch.float32, torch_compile=True), "cpu")


def test_a_compiler_that_errs_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda: fused.FusedSteps(gated_add=lambda x, update, gate: x))
    with pytest.raises(ValueError, match="wrong results"):
        load_fused(True, CPU, torch.float32)


@pytest.mark.parametrize("remedy", ["Move the Python environment", "Set TMPDIR", "Set TORCHINDUCTOR_CACHE_DIR"])
def test_a_folder_that_torch_cannot_pass_to_a_compiler_is_named(remedy, tmp_path, monkeypatch):
    place = str(tmp_path / "with a space")

    def broken(*_):
        raise RuntimeError(f"C++ compile error\nCommand:\ng++ -L{place}/lib\nOutput:\nld: cannot find -ltorch")

    places = {"Move the Python environment": "/torch", "Set TMPDIR": "/tmp", "Set TORCHINDUCTOR_CACHE_DIR": "/cache"}
    places[remedy] = place
    monkeypatch.setattr(fused, "compiled", broken)
    monkeypatch.setattr(torch, "__file__", f"{places['Move the Python environment']}/__init__.py")
    monkeypatch.setattr(tempfile, "tempdir", places["Set TMPDIR"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", places["Set TORCHINDUCTOR_CACHE_DIR"])
    with pytest.raises(
        ValueError, match=f"path '{re.escape(place)}' has a space, .* without quotes. {remedy} to a folder"
    ):
        load_fused(True, CPU, torch.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_real_compiler_makes_a_model_that_agrees(checkpoint):
    settings = DiTSettings(dtype=torch.float32, torch_compile=True)
    if any(" " in place for place in (torch.__file__, tempfile.gettempdir())):
        with pytest.raises(ValueError, match=r"has a space"):
            load_dit(checkpoint, settings, "cpu")
    else:
        assert relative_error(latents(load_dit(checkpoint, settings, "cpu").dit), latents(tiny_dit())) < 1e-5
