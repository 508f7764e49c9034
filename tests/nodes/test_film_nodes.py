"""The nodes of films of several clips, as ComfyUI calls them."""

import pytest
import torch
from PIL import Image

from tests.nodes.running import outputs
from tests.reference import tiny_vae
from tests.sampling.variants import SMALL, small_dit
from wan_core.model import VideoModel
from wan_core.models.vae import denormalise
from wan_core.types import Conditioning
from wan_core.variants import match_variant
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.plan import planned_runs
from wancore.headless.schema import schemas_of
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, host
from wancore.nodes.films import frame_numbers

SAMPLER = {
    "seed": 1,
    "steps": 1,
    "cfg": 1.0,
    "shift": 3.0,
    "solver": "euler",
    "width": 64,
    "height": 64,
    "num_frames": 81,
}


@pytest.fixture(autouse=True)
def here(tmp_path):
    host.configure(device="cpu", output_dir=tmp_path)
    yield
    host.configure()


def model(variant: str) -> VideoModel:
    return VideoModel.of(small_dit(variant), match_variant(SMALL[variant]), None, variant)


def text() -> Conditioning:
    return Conditioning(text=torch.randn(1, 8, 64), negative_text=torch.randn(1, 8, 64))


@pytest.mark.parametrize("variant", ["t2v", "vace", "i2v_a14b"])
def test_a_film_goes_on_through_the_sampler(variant):
    """From images to images: the film, and the new frames of both clips; the sampler takes size and clips from it."""
    film, vae, dit = torch.rand(7, 40, 33, 3), tiny_vae(), model(variant)
    extend = {"model": dit, "vae": vae, "clips": 2, "clip_frames": 9, "keep_frames": 5}
    cond, kept, new = outputs("WanCoreExtend", conditioning=text(), images=film, **extend)
    (latent,) = outputs("WanCoreSampler", model=dit, conditioning=cond, **SAMPLER)
    (clips,) = outputs("WanCoreVAEDecode", vae=vae, latent=latent)
    joined, first, _ = outputs("WanCoreJoinClips", images=[clips], shared_frames=[kept], film=[film])
    assert (kept, new, first) == (5, 4, 7)
    assert joined.shape == (7 + 2 * 4, 32, 32, 3)
    more, kept, _ = outputs("WanCoreExtend", conditioning=text(), latent=latent, **extend)
    (longer,) = outputs("WanCoreSampler", model=dit, conditioning=more, **SAMPLER)
    assert kept == 0
    assert longer["samples"].shape[2] == latent["samples"].shape[2] + 2
    assert torch.allclose(longer["samples"][:, :, :4], latent["samples"], atol=1e-5)


def test_a_film_comes_as_images_or_as_latents():
    call = {"model": model("t2v"), "conditioning": text(), "vae": tiny_vae(), "clips": 1, "clip_frames": 9,
            "keep_frames": 5}  # fmt: skip
    with pytest.raises(ValueError, match="as images or as latent, and not both"):
        outputs("WanCoreExtend", **call)
    with pytest.raises(ValueError, match="sides of at least 16 pixels; got 40x15"):
        outputs("WanCoreExtend", images=torch.rand(9, 15, 40, 3), **call)
    latent = {"samples": denormalise(torch.randn(1, 16, 3, 4, 4), SMALL["t2v"].geometry)}
    with pytest.raises(ValueError, match="not both"):
        outputs("WanCoreExtend", images=torch.rand(9, 32, 32, 3), latent=latent, **call)


def test_segments_are_as_many_as_pairs_of_pictures():
    call = {
        "model": model("i2v_a14b"),
        "conditioning": text(),
        "vae": tiny_vae(),
        "width": 32,
        "height": 32,
        "num_frames": 9,
    }
    pictures = torch.rand(3, 32, 32, 3)
    (row,) = outputs("WanCoreSegments", images=pictures, prompts=(text(), text()), **call)
    (looped,) = outputs("WanCoreSegments", images=pictures[1:], references=(pictures[:1],), loop=True, **call)
    assert (len(row), len(looped)) == (2, 3)
    (pair,) = outputs("WanCoreKeyframes", images=pictures[:2], frames="0, -1", **call)
    assert torch.equal(pair.slots["image"], row[0].slots["image"])
    assert not torch.equal(row[0].text, row[1].text)
    with pytest.raises(ValueError, match="two or more"):
        outputs("WanCoreSegments", images=pictures[:1], **call)
    with pytest.raises(ValueError, match="names 2 frames for 3 pictures"):
        outputs("WanCoreKeyframes", images=pictures, frames="0, -1", **call)


@pytest.mark.parametrize("words", ["", "0, a", "0 0", "1.5"])
def test_frames_are_numbers(words):
    with pytest.raises(ValueError, match="frames"):
        frame_numbers(words)


def test_clips_join_without_what_they_share():
    clips = [torch.full((n, 8, 8, 3), n / 10) for n in (3, 4, 5)]
    joined, first, new = outputs("WanCoreJoinClips", images=clips, shared_frames=[1])
    assert (len(joined), first, new) == (3 + 3 + 4, 3, 4)


def test_the_drift_meter_shows_its_chart(tmp_path):
    result = NODE_CLASS_MAPPINGS["WanCoreDriftMeter"]().measure(torch.rand(9, 16, 16, 3), 4)
    shown = result["ui"]["images"][0]
    assert Image.open(host.current.temp_dir() / shown["filename"]).size == (960, 720)
    assert result["result"][1].count("joint at frame") == 2


@pytest.mark.parametrize(("name", "frames"), [("extend_vace_1.3b", 33), ("segments_flf2v_720p", 17)])
def test_a_plan_knows_of_the_clips(name, frames):
    """An extension is planned as the chain that it is: the memory of one clip, at the size that the widgets say."""
    nodes = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    schemas = schemas_of(nodes)
    workflow = apply_tiny(Workflow.load(f"workflows/api/{name}.json"), nodes)
    (job,), _ = planned_runs(workflow, nodes, schemas)
    windows = job.settings.windows
    if name.startswith("extend"):
        assert (windows.size, windows.stride, windows.mode) == (5, 3, "chain")
        assert job.size.latent.frames == 2 + 2 * 3
    else:
        assert windows is None
        assert job.size.num_frames == 17
