"""Long videos: sliding windows, chains of clips, and the report on both."""

import dataclasses
import logging

import pytest
import torch

from tests.reference import DITS, arguments, load_case, relative_error, tiny_dit, tiny_text_encoder, tiny_vae
from tests.sampling.runs import sample
from tests.sampling.variants import conditioning
from wan_core.conditioning.text import TextEncoder, text_conditioning
from wan_core.models.config import WAN_21
from wan_core.models.dit import WanDiT
from wan_core.models.vae import WanVAE
from wan_core.runtime import Runtime
from wan_core.sampling.solvers import SOLVERS
from wan_core.sampling.windows import Windowed, colour_corrected, window_of, window_reports
from wan_core.settings import GuidanceSettings, SamplerSettings, WindowSettings
from wan_core.tiling import Span, plan_spans
from wan_core.types import Conditioning, LatentSize, StepInfo, VideoSize, tensors_in
from wan_core.variants import fit, match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SIZE = LatentSize(7, 4, 6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    from wan_core import bundled
    from wan_core.conditioning.text import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    bundled.write_tokenizer(folder / "tokenizer.json")
    return TextEncoder(tiny_text_encoder(), Tokenizer.from_folder(folder))


def test_windows_equal_the_published_call(encoder):
    case = load_case("t2v_window", "e2e")
    call = arguments(case)
    cond = text_conditioning(encoder, call["prompt"], call["negative_prompt"])
    windows = WindowSettings(size=call["sliding_window_size"], stride=call["sliding_window_stride"])
    settings = SamplerSettings(seed=call["seed"], steps=call["num_inference_steps"], windows=windows)
    size = VideoSize.rounded(call["width"], call["height"], call["num_frames"])
    latents = sample(tiny_dit(), cond, size.latent, settings, RUNTIME)
    assert relative_error(latents, case["latents"]) < 1e-5
    vae: WanVAE = tiny_vae()
    with torch.no_grad():
        frames = ((vae.decode(latents)[0] + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0)
    difference = (frames.int() - case["frames"].int()).abs().float()
    assert difference.mean() <= 0.25
    assert difference.max() <= 6


@pytest.mark.parametrize("variant", DITS)
@pytest.mark.parametrize("references", [0, 2])
def test_each_field_is_cut_along_its_axis(variant, references):
    cond = conditioning(variant, SIZE, references=references)
    inside = window_of(cond, Span(2, 5, False, False), cond.prefix_frames(SIZE.frames))
    for f in dataclasses.fields(Conditioning):
        for before, after in zip(tensors_in(getattr(cond, f.name)), tensors_in(getattr(inside, f.name)), strict=True):
            axis, prefix = f.metadata["time"], references if f.metadata["prefixed"] else 0
            if axis is None:
                assert after is before
                continue
            kept = [*range(prefix), *range(prefix + 2, prefix + 5)]
            assert torch.equal(after, before.index_select(axis, torch.tensor(kept)))


def test_overlaps_are_blended_with_the_weights_of_the_reference():
    windows = WindowSettings(size=4, stride=2)
    outputs = iter([torch.full((1, 16, 4, 2, 2), value) for value in (1.0, 2.0)])
    out = Windowed(lambda *_: next(outputs), windows, 6)(
        torch.zeros(1, 16, 6, 2, 2), 0.0, Conditioning(), StepInfo(0, 1)
    )
    # Weights of the first window 1 1 .75 .25, of the second .25 .75 1 1.
    expected = [1, 1, 1.25, 1.75, 2, 2]
    assert torch.allclose(out[0, 0, :, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("mode", ["blend", "chain"])
@pytest.mark.parametrize("variant", DITS)
def test_one_window_over_all_frames_is_none(variant, mode):
    dit, cond = tiny_dit(variant), conditioning(variant, SIZE)
    settings = SamplerSettings(steps=2, seed=1)
    windows = WindowSettings(size=SIZE.frames, stride=3, mode=mode)
    plain = sample(dit, cond, SIZE, settings, RUNTIME)
    assert torch.equal(sample(dit, cond, SIZE, dataclasses.replace(settings, windows=windows), RUNTIME), plain)
    narrow = dataclasses.replace(settings, windows=dataclasses.replace(windows, size=4, stride=2))
    assert not torch.allclose(sample(dit, cond, SIZE, narrow, RUNTIME), plain, atol=1e-3)


def chained(dit, cond, solver="euler", steps=3, **changes):
    windows = WindowSettings(**{"size": 4, "stride": 3, "mode": "chain", "colour_limit": 0.0} | changes.pop("w", {}))
    prompts = changes.pop("prompts", ())
    settings = SamplerSettings(steps=steps, seed=1, solver=solver, windows=windows, **changes)
    return sample(dit, cond, SIZE, settings, RUNTIME, prompts=prompts)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_chain_goes_on_from_the_last_frames(solver):
    dit, cond = tiny_dit(), conditioning("t2v", SIZE)
    long = chained(dit, cond, solver)
    first = sample(dit, cond, LatentSize(4, 4, 6), SamplerSettings(steps=3, seed=1, solver=solver), RUNTIME)
    assert long.shape == (1, 16, *SIZE.shape)
    # The first clip is a run of its own but for its noise, which is cut from that of the whole video.
    assert first.shape == long[:, :, :4].shape
    follower = chained(dit, cond, solver, w={"size": 4, "stride": 2})
    assert torch.equal(follower[:, :, :4], long[:, :, :4])
    assert not torch.equal(follower[:, :, 4:], long[:, :, 4:])


@pytest.mark.parametrize("variant", DITS)
def test_chains_run_with_every_conditioning(variant):
    dit, cond = tiny_dit(variant), conditioning(variant, SIZE)
    latents = chained(dit, cond)
    assert latents.shape == (1, 16, *SIZE.shape)
    assert latents.isfinite().all()


def fitted(variant):
    """Random slots, joined as the model of this structure takes them."""
    row, cond = match_variant(DITS[variant]), conditioning(variant, SIZE)
    parts = cond.concat.split([slot.channels(WAN_21) for slot in row.slots], 1)
    slots = {slot.name: part for slot, part in zip(row.slots, parts, strict=True)}
    # What inputs these were made of does not matter here, and some rows insist on theirs.
    cond = dataclasses.replace(cond, concat=None, slots=slots, inputs=row.requires)
    return fit(cond, row, DITS[variant], variant)


@pytest.mark.parametrize("variant", [name for name, config in DITS.items() if config.concat_channels])
def test_a_chain_states_the_frames_it_goes_on_from(variant, monkeypatch):
    dit, cond, seen = tiny_dit(variant), fitted(variant), []
    prepare = WanDiT.prepare

    def looking(self, given, *rest, **options):
        seen.append(given)
        return prepare(self, given, *rest, **options)

    monkeypatch.setattr(WanDiT, "prepare", looking)
    windows = {"size": 4, "stride": 2}
    latents = chained(dit, cond, w=windows, guidance=GuidanceSettings(scale=1.0))
    # Clips of the frames 0-3, 2-5 and 4-6 of seven.
    assert [given.concat.shape[2] for given in seen] == [4, 4, 3]
    assert torch.equal(seen[0].concat, cond.concat[:, :, :4])
    known, start = latents[:, :, 2:4], 0
    for slot in cond.layout:
        channels = slice(start, start + slot.channels(WAN_21))
        before, now = cond.concat[:, channels, 2:6], seen[1].concat[:, channels]
        expected = {"mask": torch.ones(1, 4, 2, 4, 6), "frames": known, "first": known[:, :, :1]}.get(slot.known)
        count = 0 if expected is None else expected.shape[2]
        assert count == 0 or torch.equal(now[:, :, :count], expected)
        assert torch.equal(now[:, :, count:], before[:, :, count:])
        start = channels.stop
    assert start == cond.concat.shape[1]
    silent = chained(dit, dataclasses.replace(cond, layout=None), w=windows, guidance=GuidanceSettings(scale=1.0))
    assert torch.equal(silent[:, :, :4], latents[:, :, :4])
    assert not torch.allclose(silent[:, :, 4:], latents[:, :, 4:], atol=1e-3)


@pytest.mark.parametrize("mode", ["blend", "chain"])
def test_windows_have_prompts_of_their_own(mode):
    dit, cond = tiny_dit(), conditioning("t2v", SIZE)
    other = conditioning("t2v", SIZE, seed=9)
    windows = {"mode": mode, "size": 3, "stride": 2}

    def run(*prompts):
        return chained(dit, cond, w=windows, prompts=prompts, guidance=GuidanceSettings(scale=3.0))

    assert torch.equal(run(cond), run())
    assert torch.equal(run(cond, cond, cond), run())
    changed = run(cond, cond, other)
    assert not torch.equal(changed[:, :, 5:], run()[:, :, 5:])
    if mode == "chain":
        assert torch.equal(changed[:, :, :5], run()[:, :, :5])
        assert torch.equal(run(other, cond), run(other, cond, cond))


def test_colours_are_pulled_back_no_further_than_allowed():
    like = torch.randn(1, 16, 6, 8, 8)
    drifted = like * 1.02 + 0.03
    back = colour_corrected(drifted, like, 2, limit=0.1)
    assert torch.allclose(back[:, :, 2:].mean((0, 2, 3, 4)), like[:, :, 2:].mean((0, 2, 3, 4)), atol=2e-3)
    other_scene = like * 2 + 1
    moved = (colour_corrected(other_scene, like, 0, limit=0.05) - other_scene).mean((0, 2, 3, 4)).abs()
    assert moved.max() <= 0.05 + 1e-4
    assert torch.equal(colour_corrected(drifted, like, 2, limit=0.0), drifted)
    joins = colour_corrected(other_scene, like, 4, limit=0.05) - other_scene
    assert joins[:, :, 0].abs().mean() < joins[:, :, 5].abs().mean()


def test_the_report_sees_drift(caplog):
    latents = torch.randn(1, 16, 8, 16, 16) * 0.2
    brighter = torch.tensor([row[0] + row[1] + row[2] for row in ([0.3568, 0.2548, 0.1747],)])
    latents[:, 2, 4:] += brighter
    latents[:, :, 4:] = latents[:, :, 4:].repeat_interleave(2, 3)[..., :16, :]
    first, second = window_reports(latents, plan_spans(8, 4, 4), WAN_21)
    assert second.mean > first.mean
    assert second.sharpness < first.sharpness
    with caplog.at_level(logging.INFO, "wancore"):
        chained(tiny_dit(), conditioning("t2v", SIZE))
    assert caplog.text.count("contrast") == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "sliding_window_size must be"),
        ({"size": 5, "stride": 6}, "from 1 to 5, to leave no gap"),
        ({"size": 5, "stride": 5, "mode": "chain"}, "from 1 to 4, so that a clip"),
        ({"mode": "jump"}, "window mode must be"),
    ],
)
def test_windows_that_cannot_work_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        WindowSettings(**values)


def test_a_chain_cannot_be_split():
    with pytest.raises(ValueError, match="cannot be split"):
        SamplerSettings(steps=4, end_step=2, windows=WindowSettings(mode="chain"))
