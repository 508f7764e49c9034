"""Keys and values of cross-attention that are kept over the steps: the same bits, made once, and planned for."""

import pytest
import torch
from safetensors.torch import save_file

from tests.reference import DITS
from tests.sampling.runs import sample
from tests.sampling.variants import SMALL, conditioning, small_dit, small_motion_controller
from wan_core.model import VideoModel
from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.models.ops import on_meta
from wan_core.planning.estimate import LiveBytes, kept_bytes
from wan_core.planning.run import WORTH_KEEPING, kept_share, plan_run
from wan_core.runtime import GIB, Runtime
from wan_core.sampling.checkpoint import digest_run
from wan_core.sampling.experts import RunInputs
from wan_core.settings import CFG_MODES, GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, LatentSize, VideoSize, tensors_in
from wan_core.variants import match_variant

CPU, META = torch.device("cpu"), torch.device("meta")
RUNTIME = Runtime(device=CPU, dtype=torch.float32)
SIZE = LatentSize(4, 2, 4)


def run(variant: str, dit: WanDiT, **settings) -> torch.Tensor:
    controller = small_motion_controller() if variant == "t2v" else None
    settings = SamplerSettings(steps=3, seed=1, **settings)
    return sample(dit, conditioning(variant, SIZE, models=SMALL), SIZE, settings, RUNTIME, motion_controller=controller)


@pytest.mark.parametrize("mode", CFG_MODES)
@pytest.mark.parametrize("variant", DITS)
def test_the_latents_are_the_same_bits(variant, mode):
    dit, guidance = small_dit(variant), GuidanceSettings(scale=3.0, mode=mode, start=0.3)
    again = run(variant, dit, guidance=guidance)
    assert torch.equal(run(variant, dit, guidance=guidance, keep_projections=True), again)


@pytest.mark.parametrize("windows", [WindowSettings(size=3, stride=2), WindowSettings(size=3, stride=2, mode="chain")])
def test_windows_have_their_own(windows):
    dit = small_dit("i2v")
    assert torch.equal(run("i2v", dit, windows=windows, keep_projections=True), run("i2v", dit, windows=windows))


@pytest.mark.parametrize(("keep", "times"), [(True, 1), (False, 3)])
def test_each_layer_makes_them_once_per_branch(keep, times):
    dit, calls = small_dit("i2v"), []
    for layer in (dit.blocks[1].cross_attn.k, dit.blocks[1].cross_attn.v_img):
        layer.register_forward_hook(lambda *_: calls.append(1))
    run("i2v", dit, keep_projections=keep)
    assert len(calls) == 2 * 2 * times


def planned(dit: WanDiT, memory: MemorySettings, room: float | None, size: LatentSize, **settings) -> SamplerSettings:
    text = torch.empty(1, 512, dit.config.text_dim, device=META)
    cond = Conditioning(text=text, negative_text=text)
    return plan_run(dit, cond, size, SamplerSettings(**settings), memory, lambda _: room).settings


@pytest.fixture(scope="module")
def large() -> WanDiT:
    with on_meta():
        return WanDiT(DiTConfig(dim=5120, ffn_dim=13824, num_layers=40)).requires_grad_(False).to(torch.bfloat16)


STILL, VIDEO = VideoSize(832, 480, 1).latent, VideoSize(832, 480, 81).latent


@pytest.mark.parametrize(
    ("gib", "size", "settings", "keeps"),
    [
        (None, STILL, {}, True),
        (40, STILL, {}, True),
        (24, STILL, {}, False),
        (None, VIDEO, {}, False),
        (None, STILL, {"steps": 1}, False),
        (None, STILL, {"windows": WindowSettings(size=1, stride=1)}, True),
        (None, VideoSize(832, 480, 9).latent, {"windows": WindowSettings(size=1, stride=1)}, False),
    ],
)
def test_the_plan_keeps_them_where_that_pays_and_fits(large, gib, size, settings, keeps):
    room = None if gib is None else gib * GIB
    assert planned(large, MemorySettings(), room, size, **settings).keep_projections is keeps


def test_what_they_take_is_planned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)
    with on_meta():
        dit = WanDiT(DITS["i2v"]).requires_grad_(False).to(torch.bfloat16)
        cond = conditioning("i2v", SIZE).map(lambda tensor, _: torch.empty_like(tensor, device=META))

    def held(settings: SamplerSettings) -> int:
        """Bytes that are alive between two steps."""
        seen = []
        with LiveBytes(given=[*dit.parameters(), *tensors_in(cond)]) as counter:
            runtime = Runtime(device=META, dtype=dit.dtype, before_step=lambda *_: seen.append(counter.live))
            sample(dit, cond, SIZE, settings, runtime)
        return seen[-1]

    plain, kept = SamplerSettings(steps=2), SamplerSettings(steps=2, keep_projections=True)
    assert held(kept) - held(plain) == kept_bytes(dit.config, cond, dit.dtype, plain.guidance) > 0


@pytest.mark.parametrize("scale", [(1.0,), (1.0, 1.0)])
@pytest.mark.parametrize("mode", ["sequential", "interleaved", "batched"])
def test_a_curve_that_is_1_throughout_is_planned_as_one_branch(scale, mode):
    dit, cond = small_dit(), conditioning("t2v", SIZE)

    def plan(scale):
        settings = SamplerSettings(steps=2, guidance=GuidanceSettings(scale=scale, mode=mode))
        plan = plan_run(dit, cond, STILL, settings, MemorySettings(persistent_params=0), lambda _: None)
        kept = kept_bytes(dit.config, cond, dit.dtype, settings.guidance)
        return kept, plan.flops, plan.activations, plan.passes_per_step, plan.settings.guidance.mode

    assert plan(scale) == plan(1.0) != plan((1.0, 2.0))


def test_a_lora_that_changes_over_the_steps_keeps_nothing(tmp_path):
    dit = small_dit()
    weight = dit.blocks[0].cross_attn.k.weight
    path = tmp_path / "lora.safetensors"
    name = "diffusion_model.blocks.0.cross_attn.k.lora_"
    save_file(
        {f"{name}A.weight": torch.randn(2, weight.shape[1]), f"{name}B.weight": torch.randn(weight.shape[0], 2)}, path
    )
    model = VideoModel.of(dit, match_variant(dit.config), None, "tiny")
    cond, settings = conditioning("vace", SIZE), SamplerSettings(steps=3)
    cond = Conditioning(text=cond.text, negative_text=cond.negative_text)

    def keeps(strength):
        changed, _ = model.with_lora(path, strength=strength)
        return changed.plan(RunInputs(cond, SIZE), settings, MemorySettings(), RUNTIME).settings.keep_projections

    assert keeps(0.5) and not keeps((0.0, 1.0))


def test_a_run_is_the_same_run_with_and_without_them():
    dit, cond = small_dit(), conditioning("t2v", SIZE)
    plain, kept = SamplerSettings(steps=3), SamplerSettings(steps=3, keep_projections=True)
    assert digest_run(dit, cond, SIZE, plain) == digest_run(dit, cond, SIZE, kept)


def test_they_are_a_large_share_of_a_still_and_none_of_a_video():
    config = DiTConfig()
    assert kept_share(config, STILL.shape, 512) > WORTH_KEEPING > 10 * kept_share(config, (81, 60, 104), 512)
