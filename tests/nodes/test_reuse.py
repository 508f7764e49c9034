"""Pictures are encoded independently of text, and what is logged is shown on its node."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch

from tests.nodes.running import outputs
from wan_core.decode import VaeHandle
from wan_core.types import Conditioning
from wancore.nodes import NODE_CLASS_MAPPINGS, host
from wancore.nodes.notices import OnNode
from wancore.nodes.reuse import check_sizes

SIZE = {"width": 48, "height": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    host.configure(device="cpu", models_dir=tmp_path_factory.mktemp("models"))
    yield outputs("WanCoreVAELoader", vae="WanCore/tiny")[0]
    host.configure()


@pytest.fixture
def encoded(monkeypatch) -> list:
    """The shapes that the VAE encodes."""
    shapes, encode = [], VaeHandle.encode

    def counted(self, pixels, *rest, **others):
        shapes.append(tuple(pixels.shape))
        return encode(self, pixels, *rest, **others)

    monkeypatch.setattr(VaeHandle, "encode", counted)
    return shapes


def text(number: float) -> Conditioning:
    return Conditioning(text=torch.full((1, 512, 64), number), negative_text=torch.zeros(1, 512, 64))


PICTURES = {
    "WanCoreImageEncode": "video",
    "WanCoreControlEncode": "control_video",
    "WanCoreVaceEncode": "video",
}


@pytest.mark.parametrize("node_id", PICTURES)
def test_another_prompt_encodes_no_picture_again(node_id, vae, encoded):
    node, name = NODE_CLASS_MAPPINGS[node_id](), PICTURES[node_id]
    more = {"strength": 1.0} if "Vace" in node_id else {}
    clip = torch.rand(5, 32, 48, 3)

    def made(cond, picture=clip, **changes):
        return node.encode(conditioning=cond, vae=vae, **{**SIZE, **more, name: picture, **changes})[0]

    first, known = made(text(1.0)), len(encoded)
    assert known
    second = made(text(2.0))
    assert len(encoded) == known
    assert torch.equal(second.text, text(2.0).text)
    fresh = NODE_CLASS_MAPPINGS[node_id]().encode(conditioning=text(2.0), vae=vae, **SIZE, **more, **{name: clip})[0]
    for field in dataclasses.fields(Conditioning):
        assert str(getattr(second, field.name)) == str(getattr(fresh, field.name)), field.name
    assert first.text is not second.text
    # Everything else that changes is encoded.
    for change in ({"picture": clip.clone()}, {"width": 64}, {"aspect": "letterbox"}):
        before = len(encoded)
        made(text(2.0), **change)
        assert len(encoded) > before, change


def test_a_chain_of_inputs_is_kept_as_a_whole(vae, encoded):
    first, second = (NODE_CLASS_MAPPINGS["WanCoreVaceEncode"]() for _ in range(2))
    clips = [torch.rand(5, 32, 48, 3) for _ in range(2)]

    def made(cond):
        for node, clip in zip((first, second), clips, strict=True):
            (cond,) = node.encode(conditioning=cond, vae=vae, **SIZE, strength=1.0, video=clip)
        return cond

    assert len(made(text(1.0)).vace) == 2
    known = len(encoded)
    assert len(made(text(2.0)).vace) == 2
    assert len(encoded) == known
    clips[0] = torch.rand(5, 32, 48, 3)
    made(text(2.0))
    assert len(encoded) > known + 1, "what stands on another first input is encoded too"


def test_two_sizes_are_told_before_anything_is_encoded(vae, encoded):
    node = {"class_type": "WanCoreVaceEncode", "inputs": {"conditioning": ["1", 0], **SIZE}}
    camera = {"class_type": "WanCoreCameraEncode", "inputs": {"conditioning": ["2", 0], **SIZE, "width": 64}}
    sampler = {"class_type": "WanCoreSampler", "inputs": {"conditioning": ["3", 0], **SIZE, "width": 832}}
    prompt = {"2": node, "3": camera, "4": sampler}
    with pytest.raises(ValueError, match="width is 48 here and 64 in WanCoreCameraEncode"):
        NODE_CLASS_MAPPINGS["WanCoreVaceEncode"]().encode(
            conditioning=text(1.0), vae=vae, **SIZE, strength=1.0, video=torch.rand(5, 32, 48, 3), prompt=prompt,
            unique_id="2",
        )  # fmt: skip
    assert not encoded
    camera["inputs"]["width"] = ["9", 0]
    check_sizes(prompt, "2")


def test_lines_are_shown_once_below_each_other_on_the_node_that_runs():
    place, shown = SimpleNamespace(now=("prompt", "7")), []
    handler = OnNode(lambda: place.now, lambda line, node: shown.append((node, line)))
    log = logging.Logger("wancore")
    log.addHandler(handler)
    log.info("50 steps")
    log.info("Sampling %d/%d", 1, 50, extra={"passing": True})
    log.info("Sampling %d/%d", 2, 50, extra={"passing": True})
    log.warning("Rounded")
    log.warning("Rounded")
    log.debug("not for users")
    assert shown == [
        ("7", "50 steps"), ("7", "50 steps\nSampling 1/50"), ("7", "50 steps\nSampling 2/50"),
        ("7", "50 steps\nRounded"), ("7", "50 steps\nRounded"),
    ]  # fmt: skip
    place.now = ("prompt", "8")
    log.info("other")
    place.now = None
    log.info("between prompts")
    assert shown[-1] == ("8", "other")
