import re
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

from tests.reference import DITS, filled, relative_error, tiny_text_encoder, tiny_vae
from tests.trainer.models import config, inputs, trainables, video_model
from wan_core import bundled
from wan_core.conditioning.text import TextEncoder
from wan_core.model import VideoModel
from wan_core.models.dit import WanDiT
from wan_core.models.ops import rms_norm
from wan_core.offload.quant import big_linears, quantise
from wan_core.offload.streaming import place
from wan_core.offload.weights import WeightProvider
from wan_core.types import Conditioning
from wan_core.variants import match_variant
from wancore.trainer.model.memory import activation_checkpointing, in_host_memory
from wancore.trainer.model.trainable import lora_patches, prepare
from wancore.trainer.objective import Noising, Objective, noisy

MODES = {
    "lora": dict(lora_base_model="dit"),
    "full": dict(trainable_models=("dit",)),
    "controller": dict(trainable_models=("motion_controller",)),
    "lora and controller": dict(lora_base_model="dit", trainable_models=("motion_controller",)),
}


def give_the_lora_an_effect(found, scale=0.05):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in found.parameters().items():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale


def loss_and_gradients(found, variant="t2v", **how):
    x, timesteps, cond = inputs(variant)
    around = activation_checkpointing(found.module.blocks, **how) if how else nullcontext()
    with around:
        loss = found.module.velocity(x, timesteps, cond).square().mean()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in found.parameters().items()}
    found.module.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("mode", MODES)
def test_only_what_is_named_is_trained_and_in_float32(mode):
    found = trainables(**MODES[mode], mixed_precision="bf16")
    trained = found.parameters()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    owners = {(n.split(".")[0], "lora_" in n) for n in trained}
    expected = {
        "lora": {("dit", True)},
        "full": {("dit", False)},
        "controller": {("motion_controller", False)},
        "lora and controller": {("dit", True), ("motion_controller", False)},
    }
    assert owners == expected[mode]
    assert {n for part in found.parts for n in part.parameter_names()} == trained.keys()


def test_a_step_leaves_frozen_tensors_bit_for_bit():
    found = trainables(lora_base_model="dit", trainable_models=("motion_controller",), mixed_precision="bf16")
    trained = found.parameters().keys()
    before = {n: p.clone() for n, p in found.module.named_parameters()}
    optimizer = torch.optim.AdamW(found.groups(0.01), lr=1e-2)
    x, timesteps, cond = inputs()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), activation_checkpointing(found.module.blocks):
            found.module.velocity(x, timesteps, cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in found.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    assert {p.dtype for n, p in found.module.named_parameters() if n not in trained} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("variant", DITS)
def test_the_lora_changes_nothing_before_it_is_trained(variant):
    x, timesteps, cond = inputs(variant)
    with torch.no_grad():
        expected = video_model(variant).dit(x, timesteps, cond, None if variant != "t2v" else motion(variant, cond))
        found = trainables(variant, lora_base_model="dit").module.velocity(x, timesteps, cond)
    assert torch.equal(found, expected)


def motion(variant, cond):
    return video_model(variant).motion_controller(cond.motion_bucket)


def test_the_gradient_of_a_lora_is_that_of_plain_autograd():
    """dL/dA and dL/dB by the chain rule from dL/dW of the merged weights, computed without LoRA layers."""
    found = trainables(lora_base_model="dit", lora_alpha=2.0)
    give_the_lora_an_effect(found)
    loss, gradients = loss_and_gradients(found)
    merged = trainables(trainable_models=("dit",))
    tensors = dict(found.module.named_parameters())
    with torch.no_grad():
        for name, patch in lora_patches(found.parts[0], tensors, 2.0):
            merged.module.dit.get_parameter(name).add_(patch.delta())
    plain_loss, plain = loss_and_gradients(merged)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    for layer in found.parts[0].names:
        a, b = (f"dit.{layer}.lora_{side}.default.weight" for side in "AB")
        whole = plain[f"dit.{layer}.weight"] * 0.5
        assert relative_error(gradients[a], tensors[b].T @ whole) < 1e-3
        assert relative_error(gradients[b], whole @ tensors[a].T) < 1e-3


@pytest.mark.parametrize("variant", ["t2v", "fun_v1_1_control", "fun_camera", "vace"])
@pytest.mark.parametrize(
    "how",
    [{"keeps_attention": False}, {"keeps_attention": True}, {"saving": in_host_memory}, {"preserve_rng": True}],
    ids=["inputs", "attention", "host memory", "random numbers"],
)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_checkpointing_and_offload_change_no_gradient(variant, how, mode):
    found = trainables(variant, **MODES[mode])
    give_the_lora_an_effect(found)
    loss, plain = loss_and_gradients(found, variant)
    again, gradients = loss_and_gradients(found, variant, **how)
    assert again == loss
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)


@pytest.mark.parametrize("variant", ["t2v", "vace"])
@pytest.mark.parametrize("share", [0.0, 0.85])
def test_streaming_the_base_changes_no_gradient(variant, share):
    found = trainables(variant, lora_base_model="dit")
    give_the_lora_an_effect(found)
    loss, plain = loss_and_gradients(found, variant, keeps_attention=False)
    dit = found.module.dit
    before = {name: parameter.clone() for name, parameter in dit.named_parameters()}
    provider = WeightProvider.of(dit)
    inventory = provider.inventory(dit.block_order())
    placement = place(inventory, share * inventory.bytes)
    assert placement.streamed and bool(placement.resident) == bool(share)
    with provider.working(torch.device("cpu"), placement) as stream:
        copied = []
        for _ in range(3):
            seen = stream.copied
            again, gradients = loss_and_gradients(found, variant, stream=stream)
            copied.append(stream.copied - seen)
            assert again == loss
            assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert copied[-1] < 2 * placement.streamed_bytes, "forward and backward; the last block serves both"
    assert all(torch.equal(parameter, before[name]) for name, parameter in dit.named_parameters())


def test_a_lora_on_fp8_weights_is_trained_like_one_on_the_same_plain_weights():
    model = video_model()
    quantise(model.dit)
    eight = prepare(model, config(lora_base_model="dit"))
    model = video_model()
    for name, layer in big_linears(quantise(video_model().dit)).items():
        model.dit.get_submodule(name).weight.data = layer.dequantised()
    plain = prepare(model, config(lora_base_model="dit"))
    assert {p.dtype for p in eight.parameters().values()} == {torch.float32}
    for name, parameter in eight.parameters().items():
        assert name.split(".")[-3] == "lora_B" or len(parameter.unique()) > 0.9 * parameter.numel(), "not drawn in FP8"
        plain.parameters()[name].data.copy_(parameter)
    for found in (eight, plain):
        give_the_lora_an_effect(found)
    (loss, gradients), (expected, wanted) = (
        loss_and_gradients(found, keeps_attention=False) for found in (eight, plain)
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all(relative_error(gradients[name], wanted[name]) < 1e-4 for name in wanted)


@pytest.mark.parametrize("mode", [dict(trainable_models=("vace",)), dict(lora_base_model="vace")], ids=str)
def test_the_vace_branch_is_trained_alone(mode):
    found = trainables("vace", **mode)
    give_the_lora_an_effect(found)
    names = found.parameters().keys()
    assert names and all(name.startswith("dit.vace_") for name in names)
    _, plain = loss_and_gradients(found, "vace")
    _, gradients = loss_and_gradients(found, "vace", saving=in_host_memory)
    assert all(torch.equal(gradients[name], plain[name]) and plain[name].any() for name in plain)


@pytest.mark.parametrize("mode", [dict(trainable_models=("dit",)), dict(lora_base_model="dit")], ids=str)
def test_the_dit_of_a_vace_model_is_trained_without_its_branch(mode):
    assert not any("vace" in name for name in trainables("vace", **mode).parameters())


def test_checkpointing_keeps_less_and_leaves_nothing_behind():
    found = trainables(lora_base_model="dit")

    def kept(around):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
        x, timesteps, cond = inputs()
        with around, hooks:
            found.module.velocity(x, timesteps, cond)
        return sum(sizes)

    assert kept(activation_checkpointing(found.module.blocks)) < kept(nullcontext()) / 4
    assert not any("forward" in vars(block) for block in found.module.blocks)


def test_checkpointing_runs_blocks_once_when_no_gradient_is_wanted():
    found = trainables(lora_base_model="dit")
    calls = []
    for block in found.module.blocks:
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    x, timesteps, cond = inputs()
    with torch.no_grad(), activation_checkpointing(found.module.blocks):
        found.module.velocity(x, timesteps, cond)
    assert len(calls) == len(found.module.blocks)


def test_a_trained_text_encoder_gets_gradients_through_the_prompt():
    encoder = TextEncoder(tiny_text_encoder(), lambda prompts, limit: (torch.tensor([[5, 6, 1]]), torch.ones(1, 3)))
    found = prepare(video_model(), config(trainable_models=("text_encoder",), cache="off"), encoder)
    x, timesteps, cond = inputs(batch=1)
    found.module.velocity(x, timesteps, cond, ["a town"]).square().mean().backward()
    seen = {name for name, p in found.parameters().items() if p.grad is not None and p.grad.any()}
    assert len(seen) > 0.9 * len(found.parameters())
    assert all(name.startswith("text_encoder.") for name in seen)


def test_weight_decay_leaves_vectors_and_modulations_alone():
    decayed, spared = trainables(trainable_models=("dit",)).groups(0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} <= {2, 3, 5}
    assert sum(p.ndim == 3 for p in spared["params"]) == 5
    (only,) = trainables(lora_base_model="dit").groups(0.1)
    assert only["weight_decay"] == 0.1


def test_lora_start_follows_the_seed():
    first, same, other = (
        [p for n, p in trainables(lora_base_model="dit", seed=seed).parameters().items() if "lora_A" in n]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_targets_are_matched_by_the_end_of_the_name():
    found = trainables("i2v", lora_base_model="dit", lora_target_modules=("k", "ffn.0", "img_emb.proj.1"))
    assert {re.sub(r"\d+", "N", name) for name in found.parts[0].names} == {
        "blocks.N.self_attn.k", "blocks.N.cross_attn.k", "blocks.N.ffn.N", "img_emb.proj.N"
    }  # fmt: skip
    assert "blocks.0.ffn.2" not in found.parts[0].names


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("t2v", dict(), "Nothing is to be trained"),
        ("t2v", dict(lora_base_model="dit", trainable_models=("dit",)), "not both"),
        ("t2v", dict(trainable_models=("vace",)), "no VACE branch"),
        ("t2v", dict(lora_base_model="vace"), "no VACE branch"),
        ("t2v", dict(trainable_models=("vae",), cache="off"), "vae is to be trained, but none was loaded"),
        ("i2v", dict(trainable_models=("motion_controller",)), "add its file"),
        ("t2v", dict(lora_base_model="dit", lora_target_modules=("q", "kk")), "no layer of dit is called 'kk'"),
        ("t2v", dict(lora_base_model="dit", lora_target_modules=("time_embedding.0",)), "cannot carry a LoRA"),
        ("t2v", dict(lora_base_model="dit", lora_target_modules=("patch_embedding",)), "cannot carry a LoRA"),
        ("t2v", dict(trainable_models=("dit",), fp8_base=True), "--fp8_base is for frozen weights"),
        ("vace", dict(trainable_models=("vace",), vram_limit=4.0), "--stream_base is for frozen weights"),
        ("t2v", dict(lora_base_model="dit", lora_checkpoint="/nowhere.safetensors"), "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused(variant, changes, message):
    with pytest.raises(ValueError, match=message):
        trainables(variant, **changes)


def test_a_trained_vae_gets_gradients_through_the_clip():
    found = prepare(video_model(), config(trainable_models=("vae",), cache="off"), vae=tiny_vae())
    _, _, cond = inputs(batch=1)
    pixels = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draw = Objective().draw((16, 2, 4, 4), 0, 0, [0])
    found.module(torch.zeros(1, 16, 2, 4, 4), draw, cond, pixels=pixels).sum().backward()
    seen = {name for name, p in found.parameters().items() if p.grad is not None and p.grad.any()}
    assert "vae.encoder.conv1.weight" in seen
    assert all(name.startswith("vae.") for name in seen)


@pytest.fixture(scope="module")
def ti2v():
    """A step of TI2V-5B whose first frame is given: the model, latents, noise and conditioning of two clips."""
    dit = filled(WanDiT, bundled.DITS["ti2v_5b"])
    found = prepare(VideoModel.of(dit, match_variant(dit.config), None, "tiny"), config(trainable_models=("dit",)))
    generator = torch.Generator().manual_seed(4)
    latents, start = (torch.randn(2, 48, frames, 4, 4, generator=generator) for frames in (3, 1))
    text = Conditioning(text=torch.randn(2, 8, 64, generator=generator))
    return found, latents, Objective().draw((48, 3, 4, 4), 0, 0, [0, 1]), text, text.with_clean_frames(start, 3)


def test_a_clean_first_frame_is_given_as_it_is_and_does_not_count(ti2v):
    found, latents, drawn, _, cond = ti2v
    with torch.no_grad():
        error = found.module(latents, drawn, cond)
        sigma = drawn.sigmas.reshape(2, 1, 1, 1, 1)
        x = (1 - sigma) * latents + sigma * drawn.noise
        x[:, :, :1] = cond.clean[:, :, :1]
        # The two timesteps of each clip: 0 for the tokens of the first frame, that of its noise for the others.
        velocity = found.module.dit(x, drawn.timesteps, cond)
        target = (drawn.noise - latents)[:, :, 1:]
        assert torch.allclose(error, (velocity[:, :, 1:] - target).square().mean((1, 2, 3, 4)), rtol=1e-5)
        changed = drawn.noise.clone()
        changed[:, :, 0] += 3
        assert torch.equal(found.module(latents, replace(drawn, noise=changed), cond), error)
        other = latents.clone()
        other[:, :, 0] -= 5
        assert torch.equal(found.module(other, drawn, cond), error)
        moved = replace(cond, clean=cond.clean + 1)
        assert not torch.equal(found.module(latents, drawn, moved), error)


def test_without_a_start_image_all_frames_are_noisy_and_count(ti2v):
    found, latents, drawn, text, cond = ti2v
    with torch.no_grad():
        error = found.module(latents, drawn, text)
        velocity = found.module.dit(noisy(latents, drawn), drawn.timesteps, text)
        expected = (velocity - (drawn.noise - latents)).square().mean((1, 2, 3, 4))
        assert torch.allclose(error, expected, rtol=1e-5)
        assert not torch.allclose(error, found.module(latents, drawn, cond), rtol=1e-3)


def test_each_clip_of_a_batch_has_its_own_timestep_beside_the_clean_frame(ti2v):
    found, latents, drawn, _, cond = ti2v

    def alone(index):
        part = Noising(*(getattr(drawn, f.name)[index : index + 1] for f in fields(drawn)))
        return found.module(latents[index : index + 1], part, cond.map(lambda t, _: t[index : index + 1]))

    with torch.no_grad():
        both = found.module(latents, drawn, cond)
        assert torch.allclose(both, torch.cat([alone(0), alone(1)]), rtol=1e-4)


def test_the_text_task_and_the_image_task_give_gradients(ti2v):
    found, latents, drawn, text, cond = ti2v
    for given in (text, cond):
        found.module(latents, drawn, given).sum().backward()
        missing = [name for name, p in found.parameters().items() if p.grad is None or not p.grad.isfinite().all()]
        assert not missing
        found.module.zero_grad()


def test_timesteps_stay_float32_under_autocast():
    dit = video_model(dtype=torch.bfloat16).dit
    timesteps = torch.tensor([937.5, 3.0])
    plain = dit.embed_time(timesteps)
    with torch.autocast("cpu", torch.bfloat16):
        found = dit.embed_time(timesteps)
    assert torch.equal(found.head, plain.head) and found.blocks.dtype == torch.float32


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_norm_that_is_trained_in_float32_keeps_the_dtype_of_its_tokens(needs_gradient):
    """As a saved bf16 weight will be used; PyTorch alone would multiply in float32, by a slower way."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = (1 + torch.randn(64, generator=torch.Generator().manual_seed(1))).requires_grad_(needs_gradient)
    found = rms_norm(x, weight, 1e-6)
    saved = weight.detach().bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found.detach(), rms_norm(x, saved, 1e-6))
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * saved.double()
    assert relative_error(found.detach().double(), exact) < 2**-8
    if needs_gradient:
        found.float().sum().backward()
        assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()
