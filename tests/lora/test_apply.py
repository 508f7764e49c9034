"""LoRAs come and go without a trace, stack, follow curves and blocks, and never reach a neighbour."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.lora.fixtures import WRITERS, factors, linear_paths, streaming
from tests.lora.test_dialects import inputs, merged_output, output, with_loras
from tests.reference import relative_error, tiny_dit, tiny_motion_controller
from tests.sampling.runs import sample, sample_state
from wan_core.lora.apply import _same_device, apply_loras
from wan_core.lora.bind import BlockStrengths
from wan_core.lora.target import MODEL_BLOCKS, Target, lora_report, open_lora, use_lora
from wan_core.offload.quant import big_linears, quantise
from wan_core.runtime import Runtime
from wan_core.sampling.checkpoint import RunState
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.types import Conditioning, Curve, LatentSize

STEPS = 4


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Two different LoRAs on every linear layer, with their factors and files."""
    folder = tmp_path_factory.mktemp("loras")
    dit = tiny_dit("t2v")
    found = {}
    for seed, name in enumerate(("first", "second")):
        made = factors(dit, linear_paths(dit), seed=seed)
        save_file(WRITERS["ComfyUI"](made), folder / f"{name}.safetensors")
        found[name] = (made, folder / f"{name}.safetensors")
    return found


def weights(dit: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (t.data_ptr(), t.clone()) for name, t in dit.state_dict().items()}


def assert_untouched(dit: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor, before[name][1]) and tensor.data_ptr() == before[name][0], name
    hooks = [m for m in dit.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks


def used(path, dit, **settings):
    return use_lora(path, Target.of_modules("tiny", [dit]), **settings)


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_remove_apply_another(loras, mode, dtype):
    dit = tiny_dit("t2v").to(dtype)
    before, base = weights(dit), output(dit)
    results = []
    for name in ("first", "second", "first"):
        results.append(with_loras(dit, used(loras[name][1], dit, mode=mode)))
        assert_untouched(dit, before)
        assert torch.equal(output(dit), base)
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


class Boom(Exception):
    pass


@pytest.mark.parametrize("settings", [{"mode": "fold"}, {"mode": "side"}, {"strength": [1.0, 0.5]}])
def test_a_run_that_fails_leaves_nothing(loras, settings):
    """The failure strikes inside a block, where weights are swapped and hooks are at work."""
    dit = tiny_dit("t2v")
    changes = {f"diffusion_model.blocks.1.{n}": torch.ones(256) for n in ("self_attn.norm_q.diff", "ffn.2.diff_b")}
    file = loras["first"][1].with_name("norms.safetensors")
    if not file.exists():
        save_file(changes, file)
    before = weights(dit)
    uses = [used(path, dit, **settings) for path in (loras["first"][1], file)]

    def fail(*_: object) -> None:
        raise Boom

    handle = dit.blocks[1].ffn.register_forward_hook(fail)
    handle_o = dit.blocks[1].cross_attn.o.register_forward_hook(fail)
    with pytest.raises(Boom), apply_loras([dit], uses, MODEL_BLOCKS, steps=2):
        output(dit)
    handle.remove()
    handle_o.remove()
    assert_untouched(dit, before)


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_stacked(loras, mode):
    dit = tiny_dit("t2v")
    strengths = {"first": 0.7, "second": -0.4}
    uses = [used(loras[name][1], dit, strength=s, mode=mode) for name, s in strengths.items()]
    both = {}
    for path in loras["first"][0]:
        pieces = [(loras[name][0][path], s) for name, s in strengths.items()]
        both[path] = (torch.cat([a for (a, _), _ in pieces]), torch.cat([b * s for (_, b), s in pieces], 1))
    expected = merged_output(tiny_dit("t2v"), both)
    assert relative_error(with_loras(dit, *uses), expected) < 1e-6
    assert relative_error(with_loras(dit, *reversed(uses)), expected) < 1e-6


def test_strength_zero_is_the_base(loras):
    dit = tiny_dit("t2v")
    for mode in ("fold", "side"):
        use = used(loras["first"][1], dit, strength=0.0, mode=mode)
        assert torch.equal(with_loras(dit, use), output(dit))


BLOCKS = {
    "0-1": lambda path: float(path.startswith(("blocks.0.", "blocks.1."))),
    "2": lambda path: float(path.startswith("blocks.2.")),
    "0-3=0.5": lambda path: 0.5 * path.startswith("blocks."),
    "1=2, 3=-1, other=0.25": lambda path: (
        2.0 if path.startswith("blocks.1.") else -1.0 if path.startswith("blocks.3.")
        else 0.0 if path.startswith("blocks.") else 0.25
    ),
    "": lambda path: 1.0,
}  # fmt: skip


@pytest.mark.parametrize("text", BLOCKS)
def test_block_ranges(loras, text):
    dit, (made, path) = tiny_dit("t2v"), loras["first"]
    factor = BLOCKS[text]
    expected = merged_output(tiny_dit("t2v"), {p: (a, b * factor(p)) for p, (a, b) in made.items() if factor(p)})
    for mode in ("fold", "side"):
        use = used(path, dit, blocks=BlockStrengths.parse(text), mode=mode)
        assert relative_error(with_loras(dit, use), expected) < 1e-6


def test_blocks_of_the_vace_branch_have_their_own_numbers():
    blocks = BlockStrengths.parse("vace_blocks.0-1, other=1")
    assert [blocks.factor(n) for n in ("vace_blocks.1.ffn.0.weight", "vace_blocks.2.ffn.0.weight")] == [1, 0]
    assert blocks.factor("blocks.1.ffn.0.weight") == 1
    assert BlockStrengths.parse("0-3").factor("vace_blocks.0.ffn.0.weight") == 0


@pytest.mark.parametrize("text", ["a", "3-1", "0-", "1=x", "0--2", "-1"])
def test_blocks_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="Blocks are given as"):
        BlockStrengths.parse(text)


@torch.no_grad()
def test_a_curve_gives_each_step_its_strength(loras):
    """Predictions at every step equal those of the LoRA at the constant strength of that step."""
    dit, path = tiny_dit("t2v"), loras["first"][1]
    blocks = BlockStrengths.parse("0-3")  # what is read before the first step has the mean strength
    curve = Curve((1.0, -0.5), start=0.0, end=0.7, outside=0.25)
    use = used(path, dit, strength=curve, blocks=blocks)
    with apply_loras([dit], [use], MODEL_BLOCKS, steps=STEPS) as run:
        got = []
        for index in range(STEPS):
            run.step(index)
            got.append(output(dit))
    for index in range(STEPS):
        constant = used(path, dit, strength=curve.at(index, STEPS), blocks=blocks, mode="side")
        assert relative_error(got[index], with_loras(dit, constant)) < 1e-6
    assert not torch.equal(got[0], got[1])


@torch.no_grad()
def test_a_curve_on_whole_tensors_and_embedders(tmp_path):
    dit = tiny_dit("t2v")
    before = weights(dit)
    parts = {
        "head.modulation": torch.ones(1, 2, 256), "patch_embedding.bias": torch.ones(256),
        "time_embedding.0.bias": torch.ones(256), "blocks.0.modulation": torch.ones(1, 6, 256),
    }  # fmt: skip
    ending = {"modulation": "diff_m", "bias": "diff_b"}
    stored = {}
    for name, change in parts.items():
        path, _, leaf = name.rpartition(".")
        stored[f"diffusion_model.{path}.{ending[leaf]}"] = change
    save_file(stored, tmp_path / "lora.safetensors")
    use = used(tmp_path / "lora.safetensors", dit, strength=[1.0, 0.0])
    seen = {}
    dit.blocks[0].register_forward_hook(lambda m, *_: seen.update(inside=m.modulation.clone()))
    with apply_loras([dit], [use], MODEL_BLOCKS, steps=3) as run:
        for index, strength in enumerate((1.0, 0.5, 0.0)):
            run.step(index)
            output(dit)
            for name in ("head.modulation", "patch_embedding.bias"):
                assert torch.allclose(dit.get_parameter(name), before[name][1] + strength)
            assert torch.allclose(dit.time_embedding[0].bias, before["time_embedding.0.bias"][1] + 0.5)
            assert torch.allclose(seen["inside"], before["blocks.0.modulation"][1] + strength)
            assert torch.equal(dit.blocks[0].modulation, before["blocks.0.modulation"][1])
    assert all(torch.equal(t, before[name][1]) for name, t in dit.state_dict().items())


def sampled(dit: nn.Module, *uses, cfg: float = 3.0, runtime: Runtime | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, 8, dit.config.text_dim, generator=generator)
    cond = Conditioning(text=text, negative_text=-text)
    settings = SamplerSettings(seed=1, steps=STEPS, guidance=GuidanceSettings(scale=cfg))
    runtime = runtime or Runtime(device=torch.device("cpu"), dtype=torch.float32)
    with apply_loras([dit], uses, MODEL_BLOCKS, steps=STEPS, device=runtime.device) as run:
        return sample(dit, cond, LatentSize(2, 4, 6), settings, replace(runtime, before_step=run.before_step))


def test_sampling_follows_the_curve(loras):
    """A LoRA that ends after half of the steps: latents are those of the constant LoRA until then, and not after."""
    dit, path = tiny_dit("t2v"), loras["first"][1]
    blocks = BlockStrengths.parse("0-3")

    def steps_of(*uses) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        runtime = Runtime(
            device=torch.device("cpu"),
            dtype=torch.float32,
            on_progress=lambda phase, done, total, latents: seen.append(latents.clone()),
        )
        sampled(dit, *uses, runtime=runtime)
        return seen

    half = steps_of(used(path, dit, strength=Curve((1.0,), end=0.4), blocks=blocks))
    constant = steps_of(used(path, dit, blocks=blocks, mode="side"))
    base = steps_of()
    assert len(half) == STEPS
    assert all(torch.equal(half[i], constant[i]) for i in (0, 1))
    assert not torch.equal(half[2], constant[2]) and not torch.equal(half[1], base[1])
    folded = steps_of(used(path, dit, blocks=blocks))
    assert relative_error(folded[-1], constant[-1]) < 1e-5
    never = steps_of(used(path, dit, strength=Curve((1.0,), start=0.4, end=0.5), blocks=blocks))
    assert torch.equal(never[-1], base[-1])


def test_a_run_that_begins_in_the_middle_follows_the_curve(loras):
    """Both halves of a schedule, one after the other, give what the whole gives."""
    dit, path = tiny_dit("t2v"), loras["first"][1]
    use = used(path, dit, strength=[1.0, -1.0], blocks=BlockStrengths.parse("0-3"))
    text = torch.randn(1, 8, dit.config.text_dim, generator=torch.Generator().manual_seed(3))
    cond = Conditioning(text=text, negative_text=-text)
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    whole = SamplerSettings(seed=1, steps=STEPS)

    def part(settings: SamplerSettings, **start) -> RunState:
        with apply_loras([dit], [use], MODEL_BLOCKS, steps=STEPS) as run:
            return sample_state(
                dit, cond, LatentSize(2, 4, 6), settings, replace(runtime, before_step=run.before_step), **start
            )

    first = part(replace(whole, end_step=2))
    second = part(replace(whole, start_step=2), earlier=first)
    assert torch.equal(second.latents, part(whole).latents)
    assert not torch.equal(second.latents, sample_state(dit, cond, LatentSize(2, 4, 6), whole, runtime).latents)


def test_fingerprints_tell_what_decides_the_result(loras):
    dit, path = tiny_dit("t2v"), loras["first"][1]
    copies = [used(path, dit).fingerprint, used(path, dit, mode="side").fingerprint]
    assert len(set(copies)) == 1
    others = [
        used(loras["second"][1], dit),
        used(path, dit, strength=0.5),
        used(path, dit, strength=[1.0, 0.5]),
        used(path, dit, blocks=BlockStrengths.parse("0-1")),
    ]
    assert len({*copies, *(use.fingerprint for use in others)}) == 5


@pytest.mark.parametrize("mode", ["fold", "side"])
def test_two_samplers_on_one_model_do_not_meet(loras, mode):
    """Interleaved or not, each sampler gets what it would get alone on its own copy."""
    shared = tiny_dit("t2v")
    before = weights(shared)
    first, second = (used(loras[name][1], shared, mode=mode) for name in ("first", "second"))
    alone = {}
    for name in ("first", "second"):
        own = tiny_dit("t2v")
        alone[name] = sampled(own, used(loras[name][1], own, mode=mode))
    base = sampled(tiny_dit("t2v"))
    for name, use in (("first", first), ("second", second), ("first", first)):
        assert torch.equal(sampled(shared, use), alone[name])
        assert torch.equal(sampled(shared), base)
        assert_untouched(shared, before)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [("cuda", "cuda:0", True), ("cuda:0", "cuda:1", False), ("cpu", "cuda", False), ("cpu", "cpu", True)],
)
def test_names_of_one_device(first, second, same):
    assert _same_device(torch.device(first), torch.device(second)) is same


def test_modes(loras):
    """`auto` folds what rests where the run computes; quantised, streamed, moved and curved weights get branches."""
    path = loras["first"][1]

    def hooked(dit: nn.Module, device=None, streamed=False, **settings) -> bool:
        with apply_loras([dit], [used(path, dit, **settings)], MODEL_BLOCKS, steps=2, device=device, streamed=streamed):
            return bool(dit.blocks[0].self_attn.q._forward_hooks)

    cpu, elsewhere = torch.device("cpu"), torch.device("meta")
    dit = tiny_dit("t2v")
    assert not hooked(dit) and not hooked(dit, cpu) and not hooked(dit, mode="fold")
    assert hooked(dit, streamed=True) and hooked(dit, strength=[0.0, 1.0]) and hooked(dit, mode="side")
    blocks = BlockStrengths.parse("0-3")
    assert hooked(dit, elsewhere, blocks=blocks)
    quantised = tiny_dit("t2v")
    quantised.blocks[0].self_attn.q.weight.data = quantised.blocks[0].self_attn.q.weight.data.to(torch.float8_e4m3fn)
    assert hooked(quantised)
    for settings, words in (
        ({"streamed": True}, "streamed"),
        ({"strength": [0.0, 1.0]}, "curve"),
    ):
        with pytest.raises(ValueError, match=words):
            hooked(dit, mode="fold", **settings)
    with pytest.raises(ValueError, match="quantised"):
        hooked(quantised, mode="fold")
    with pytest.raises(ValueError, match="LoRA mode must be one of"):
        used(path, dit, mode="merge")


@torch.no_grad()
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_quantised_weights_get_the_exact_change(loras, streams):
    """On FP8 the LoRA is computed beside the layer: the change is that of the unquantised model, not rounded again."""
    made, path = loras["first"]
    eight, plain = quantise(tiny_dit("t2v")), tiny_dit("t2v")
    layers = big_linears(eight)
    for name, layer in layers.items():
        plain.get_submodule(name).weight.copy_(layer.dequantised())
    assert relative_error(output(eight), output(plain)) < 1e-6
    stored = {name: layer.weight.view(torch.uint8).clone() for name, layer in layers.items()}
    use = used(path, eight)
    assert len(use.bound.patches) == len(made)
    with streaming(eight) if streams else nullcontext():
        assert relative_error(with_loras(eight, use, streamed=streams), merged_output(plain, made)) < 1e-6
    assert all(torch.equal(layer.weight.view(torch.uint8), stored[name]) for name, layer in layers.items())


@torch.no_grad()
def test_trained_checkpoints_take_the_place_of_weights(tmp_path):
    """A fine-tune of the DiT, of the VACE branch and of the motion controller, each through the same door."""
    tuned = tiny_dit("vace")
    for p in tuned.parameters():
        p.mul_(1.1)
    full = {k: v.clone() for k, v in tuned.state_dict().items()}
    save_file(full, tmp_path / "dit.safetensors")
    save_file({k: v for k, v in full.items() if k.startswith("vace_")}, tmp_path / "vace.safetensors")
    controller, trained = tiny_motion_controller(), tiny_motion_controller()
    for p in trained.parameters():
        p.add_(0.1)
    save_file(dict(trained.state_dict()), tmp_path / "controller.safetensors")
    dit = tiny_dit("vace")
    before, base = weights(dit), output(dit)
    modules = [dit, controller]
    target = Target.of_modules("tiny", modules)
    for streamed in (False, True):
        with apply_loras(modules, [use_lora(tmp_path / "dit.safetensors", target)], MODEL_BLOCKS, streamed=streamed):
            assert torch.equal(output(dit), output(tuned))
        assert_untouched(dit, before)
    use = use_lora(tmp_path / "vace.safetensors", target)
    with apply_loras(modules, [use], MODEL_BLOCKS):
        state = dit.state_dict()
        assert all(torch.equal(v, full[k] if k.startswith("vace_") else before[k][1]) for k, v in state.items())
    use = use_lora(tmp_path / "controller.safetensors", target)
    told = lora_report(use, target)
    assert "6 parameters take the place of the model's" in str(told)
    bucket = torch.tensor([30.0])
    with apply_loras(modules, [use], MODEL_BLOCKS):
        assert torch.equal(controller(bucket), trained(bucket))
    assert not torch.equal(controller(bucket), trained(bucket)) and torch.equal(output(dit), base)
    with pytest.raises(ValueError, match="motion controller"):
        use_lora(tmp_path / "controller.safetensors", Target.of_modules("tiny", [dit]))


def test_conflicts_are_told(loras, tmp_path):
    dit = tiny_dit("t2v")
    target = Target.of_modules("tiny", [dit])
    first, second = (used(loras[name][1], dit) for name in ("first", "second"))
    assert not lora_report(second, target, [first]).conflicts
    against = used(loras["first"][1], dit, strength=-1.0)
    assert "in opposite directions" in lora_report(against, target, [first]).conflicts[0]
    assert "in the same way" in lora_report(first, target, [first]).conflicts[0]
    down, up = loras["first"][0]["blocks.0.ffn.0"]
    key = "diffusion_model.blocks.0.ffn.0"
    dora = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.dora_scale": torch.ones(512, 1)}
    save_file(dora, tmp_path / "dora.safetensors")
    told = lora_report(used(tmp_path / "dora.safetensors", dit), target, [second])
    assert "where one is a DoRA" in told.conflicts[0]


def test_reading_again_is_not_needed_for_another_strength(loras, monkeypatch):
    dit, (made, path) = tiny_dit("t2v"), loras["first"]
    lora = open_lora(path)
    path_gone = Target.of_modules("tiny", [dit])
    monkeypatch.setattr("wan_core.lora.target.open_lora", lambda _: pytest.fail("read again"))
    for strength in (1.0, 0.5):
        expected = merged_output(tiny_dit("t2v"), {p: (a, b * strength) for p, (a, b) in made.items()})
        assert relative_error(with_loras(dit, use_lora(lora, path_gone, strength=strength)), expected) < 1e-6
    assert inputs(dit)[0].shape[1] == 16
