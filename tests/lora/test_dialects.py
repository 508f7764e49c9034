"""Every dialect of one change gives the same output: folded and beside the layers, resident, moved and in bf16."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.lora.fixtures import DEFAULT, RANK, WRITERS, factors, joined, linear_paths, pairs, streaming
from tests.reference import relative_error, tiny_dit, tiny_motion_controller
from wan_core.lora.apply import apply_loras
from wan_core.lora.target import MODEL_BLOCKS, Target, lora_file_report, lora_report, open_lora, use_lora
from wan_core.offload.weights import WeightProvider
from wan_core.types import Conditioning

TOLERANCE = 1e-6


def inputs(dit: nn.Module, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 2, 4, 6, generator=generator)
    cond = Conditioning(text=torch.randn(1, 8, dit.config.text_dim, generator=generator))
    if dit.config.concat_channels:
        cond = cond.with_inputs(concat=torch.randn(1, dit.config.concat_channels, 2, 4, 6, generator=generator))
    if dit.config.has_image_input:
        cond = cond.with_inputs(image_tokens=torch.randn(1, 257, dit.config.image_dim, generator=generator))
    return x, torch.tensor([500.0]), cond


@torch.no_grad()
def output(dit: nn.Module) -> torch.Tensor:
    return dit(*inputs(dit))


@torch.no_grad()
def merged_output(dit: nn.Module, made) -> torch.Tensor:
    """What the change should give, by the plainest arithmetic."""
    for path, (down, up) in made.items():
        weight = dit.get_submodule(path).weight
        weight.add_((up @ down).reshape(weight.shape).to(weight.dtype))
    return output(dit)


def used(path, dit: nn.Module, **settings):
    return use_lora(path, Target.of_modules("tiny", [dit]), **settings)


@torch.no_grad()
def with_loras(dit: nn.Module, *uses, steps: int = 1, **settings) -> torch.Tensor:
    with apply_loras([dit], uses, MODEL_BLOCKS, steps=steps, **settings):
        return output(dit)


@pytest.fixture(scope="module")
def cases():
    """A model, factors for every linear layer of it, and the outputs without and with them."""
    found = {}
    for variant in ("t2v", "i2v"):
        dit = tiny_dit(variant)
        made = factors(dit, linear_paths(dit))
        found[variant] = (dit, made, output(dit), merged_output(tiny_dit(variant), made))
    return found


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_dialect_is_the_same_change(tmp_path, cases, name, variant):
    dit, made, base, expected = cases[variant]
    assert relative_error(base, expected) > 0.1
    file = tmp_path / "lora.safetensors"
    save_file(WRITERS[name](made), file)
    for mode in ("fold", "side"):
        use = used(file, dit, mode=mode)
        assert len(use.bound.patches) == len(made) and not use.bound.skipped
        assert relative_error(with_loras(dit, use), expected) < TOLERANCE
    with streaming(dit):
        assert relative_error(with_loras(dit, used(file, dit), streamed=True), expected) < TOLERANCE
    assert torch.equal(output(dit), base)


@pytest.mark.parametrize(
    ("writer", "told"),
    [
        ("DiffSynth", "DiffSynth"), ("DiffSynth, pipe.dit", "DiffSynth"), ("PEFT", "PEFT"), ("diffusers", "diffusers"),
        ("kohya", "kohya"), ("VideoX-Fun", "VideoX-Fun"), ("ComfyUI", "ComfyUI"), ("LyCORIS", "LyCORIS"),
    ],
)  # fmt: skip
def test_the_dialect_is_named(tmp_path, cases, writer, told):
    _, made, *_ = cases["t2v"]
    tensors = WRITERS[writer](made)
    save_file(tensors, tmp_path / "lora.safetensors")
    assert open_lora(tmp_path / "lora.safetensors").dialects == {told: len(tensors)}


def test_pickled_and_half_precision_files(tmp_path, cases):
    dit, made, _, expected = cases["t2v"]
    torch.save(WRITERS["DiffSynth"](made), tmp_path / "lora.pt")
    assert relative_error(with_loras(dit, used(tmp_path / "lora.pt", dit)), expected) < TOLERANCE
    half = {key: tensor.bfloat16() for key, tensor in WRITERS["ComfyUI"](made).items()}
    save_file(half, tmp_path / "half.safetensors")
    assert relative_error(with_loras(dit, used(tmp_path / "half.safetensors", dit)), expected) < 0.02


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_moving_the_model_moves_the_lora(tmp_path, cases, mode):
    """Weights that rest elsewhere: a LoRA is applied to what is at rest and travels with the phase."""
    dit, made, base, expected = cases["t2v"]
    save_file(WRITERS["ComfyUI"](made), tmp_path / "lora.safetensors")
    use = used(tmp_path / "lora.safetensors", dit, mode=mode)
    resting = {name: p.data_ptr() for name, p in dit.named_parameters()}

    with apply_loras([dit], [use], MODEL_BLOCKS), torch.no_grad():
        copies = [(p, p.data) for p in dit.parameters()]
        for p, data in copies:
            p.data = data.clone()
        got = output(dit)
        for p, data in copies:
            p.data = data
    assert relative_error(got, expected) < TOLERANCE
    cpu = torch.device("cpu")
    with apply_loras([dit], [use], MODEL_BLOCKS, device=cpu), WeightProvider.of(dit).working(cpu):
        assert relative_error(output(dit), expected) < TOLERANCE
    assert {name: p.data_ptr() for name, p in dit.named_parameters()} == resting
    assert torch.equal(output(dit), base)


def test_bf16_base(tmp_path, cases):
    _, made, *_ = cases["t2v"]
    save_file(WRITERS["ComfyUI"](made), tmp_path / "lora.safetensors")
    dit = tiny_dit("t2v").to(torch.bfloat16)
    base = output(dit)
    expected = merged_output(tiny_dit("t2v"), made)
    for mode in ("fold", "side"):
        got = with_loras(dit, used(tmp_path / "lora.safetensors", dit, mode=mode))
        assert relative_error(got, expected) < 0.03
        assert relative_error(base, expected) > 0.1
    assert torch.equal(output(dit), base)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_diffusers_attn1_is_self_attention_and_attn2_is_cross_attention(tmp_path, mode):
    dit = tiny_dit("i2v")
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        made = factors(dit, [f"blocks.1.{ours}.q"])
        down, up = made[f"blocks.1.{ours}.q"]
        key = f"transformer.blocks.1.{theirs}.to_q"
        file = tmp_path / f"{theirs}.safetensors"
        save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, file)
        use = used(file, dit, mode=mode)
        assert [name for name, _ in use.bound.patches] == [f"blocks.1.{ours}.q.weight"]
        assert relative_error(with_loras(dit, use), merged_output(tiny_dit("i2v"), made)) < TOLERANCE


ALPHAS = {
    "tensor": ({"alpha": 2.0}, {}, None, 2.0 / RANK),
    "none": ({}, {}, None, 1.0),
    "metadata": ({}, {"transformer.r": RANK, "transformer.lora_alpha": 6}, None, 6.0 / RANK),
    "rank-stabilised": ({}, {}, {"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6.0 / RANK**0.5),
    "by module": (
        {}, {}, {"r": 8, "lora_alpha": 6, "rank_pattern": {"self_attn.q": RANK}, "alpha_pattern": {"q": 3}}, 3.0 / RANK
    ),
    "tensor wins": ({"alpha": 2.0}, {"transformer.r": RANK, "transformer.lora_alpha": 6}, None, 2.0 / RANK),
}  # fmt: skip


@pytest.mark.parametrize("name", ALPHAS)
def test_alpha_in_every_convention(tmp_path, name):
    tensors, metadata, config, scale = ALPHAS[name]
    dit, path = tiny_dit("t2v"), "blocks.0.self_attn.q"
    made = factors(dit, [path])
    stored = pairs("base_model.model.", "lora_A.weight", "lora_B.weight")(made)
    stored |= {f"base_model.model.{path}.{role}": torch.tensor(value) for role, value in tensors.items()}
    file = tmp_path / "adapter_model.safetensors"
    save_file(stored, file, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    if config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    down, up = made[path]
    expected = merged_output(tiny_dit("t2v"), {path: (down, up * scale)})
    for mode in ("fold", "side"):
        assert relative_error(with_loras(dit, used(file, dit, mode=mode)), expected) < TOLERANCE


def differences(dit: nn.Module) -> dict[str, torch.Tensor]:
    """A change of every parameter that is no matrix of a linear layer, and of some that are."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator) * 0.1 * p.abs().mean()
        for name, p in dit.named_parameters()
        if p.ndim != 2 or name.startswith(("head.head", "blocks.2.ffn"))
    }


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("mode", ["auto", "side"])
@torch.no_grad()
def test_whole_tensor_differences(tmp_path, mode, streamed, prefix):
    dit, changed = tiny_dit("flf2v"), tiny_dit("flf2v")
    changes = differences(dit)
    endings = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    stored = {}
    for name, change in changes.items():
        path, _, leaf = name.rpartition(".")
        path, ending = (path, endings[leaf]) if leaf in endings else (name, "diff")
        path = joined(path) if prefix == "lora_unet_" else path
        stored[f"{prefix}{path}.{ending}"] = change
        changed.get_parameter(name).add_(change)
    save_file(stored, tmp_path / "lora.safetensors")

    def clip_output(model):
        x, t, cond = inputs(model)
        return model(x, t, cond.with_inputs(image_tokens=torch.ones(1, 514, model.config.image_dim)))

    base = clip_output(dit)
    use = used(tmp_path / "lora.safetensors", dit, mode=mode)
    assert len(use.bound.patches) == len(changes)
    with streaming(dit) if streamed else nullcontext(), apply_loras([dit], [use], MODEL_BLOCKS, streamed=streamed):
        got = clip_output(dit)
    assert relative_error(got, clip_output(changed)) < TOLERANCE
    assert torch.equal(clip_output(dit), base)


@torch.no_grad()
def test_vace_and_motion_controller_modules(tmp_path):
    dit, controller = tiny_dit("vace"), tiny_motion_controller()
    paths = [p for p in linear_paths(dit) if p.startswith("vace_blocks")]
    made = factors(dit, paths)
    steering = factors(controller, linear_paths(controller), seed=1)
    stored = pairs("", *DEFAULT)(made) | pairs("pipe.motion_controller.", *DEFAULT)(steering)
    save_file(stored, tmp_path / "lora.safetensors")
    modules = [dit, controller]
    use = use_lora(tmp_path / "lora.safetensors", Target.of_modules("tiny", modules))
    bucket = torch.tensor([50.0])
    base = controller(bucket)
    want = tiny_motion_controller()
    for path, (down, up) in steering.items():
        want.get_submodule(path).weight.add_(up @ down)
    with apply_loras(modules, [use], MODEL_BLOCKS):
        assert relative_error(controller(bucket), want(bucket)) < TOLERANCE
        for path, (down, up) in made.items():
            expected = tiny_dit("vace").get_submodule(path).weight + up @ down
            assert relative_error(dit.get_submodule(path).weight, expected) < TOLERANCE
    assert torch.equal(controller(bucket), base)
    assert "VACE branch, motion controller" in str(lora_file_report(open_lora(tmp_path / "lora.safetensors")))


def test_patch_embedding_and_convolutions(tmp_path):
    """Convolution factors come in their own shape and flattened."""
    dit = tiny_dit("fun_camera")
    weights = {"patch_embedding": dit.patch_embedding.weight, "control_adapter.conv": dit.control_adapter.conv.weight}
    generator = torch.Generator().manual_seed(0)
    for flat in (False, True):
        stored, deltas = {}, {}
        for path, weight in weights.items():
            down = torch.randn((RANK, *weight.shape[1:]), generator=generator)
            up = torch.randn((weight.shape[0], RANK, *(1,) * (weight.ndim - 2)), generator=generator)
            deltas[path] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            stored[f"diffusion_model.{path}.lora_down.weight"] = down.flatten(1) if flat else down
            stored[f"diffusion_model.{path}.lora_up.weight"] = up.flatten(1) if flat else up
        save_file(stored, tmp_path / f"{flat}.safetensors")
        use = used(tmp_path / f"{flat}.safetensors", dit)
        before = {path: weight.clone() for path, weight in weights.items()}
        with apply_loras([dit], [use], MODEL_BLOCKS):
            for path, weight in weights.items():
                assert relative_error(weight.data, before[path] + deltas[path]) < TOLERANCE


def test_report_of_a_model(tmp_path, cases):
    dit, made, *_ = cases["t2v"]
    save_file(WRITERS["kohya"](made), tmp_path / "lora.safetensors")
    target = Target.of_modules("tiny", [dit])
    told = lora_report(use_lora(tmp_path / "lora.safetensors", target), target)
    assert told.dialects == {"kohya": 3 * len(made)} and told.ranks == (RANK,)
    assert told.alpha == "alpha tensor over rank"
    assert len(told.applied) == len(made) and not told.skipped
    by_block = {e.block: e for e in told.effects}
    assert set(by_block) == {*(f"blocks.{i}" for i in range(4)), "head", "text_embedding", "time_embedding",
                             "time_projection"}  # fmt: skip
    change = sum((up @ down).square().sum() for path, (down, up) in made.items() if path.startswith("blocks.2."))
    weights = sum(dit.get_submodule(p).weight.square().sum() for p in made if p.startswith("blocks.2."))
    assert by_block["blocks.2"].change == pytest.approx(change.sqrt().item(), rel=1e-4)
    assert by_block["blocks.2"].share == pytest.approx((change / weights).sqrt().item(), rel=0.02)
    assert "blocks.0-3.self_attn.q.weight" in str(told)
