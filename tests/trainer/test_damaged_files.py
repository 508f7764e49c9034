"""What a training reads of its own, damaged: one error that names the file, or a file that is made again."""

import json

import pytest
import torch
from torch import nn

from wancore.trainer.data.cache import HASHES, LatentCache
from wancore.trainer.run.events import latest_steps
from wancore.trainer.run.state import (
    MANIFEST,
    OPTIMIZER,
    PROGRESS,
    WEIGHTS,
    Progress,
    StateError,
    States,
    read_progress,
    read_weights_and_optimizer,
    verify,
    write_weights_and_optimizer,
)

DEEP = "[" * 100_000
JSON = (DEEP, "[]", "3", "null", "{", '"a"', "{}", "\0", '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"a": {}}}')


@pytest.fixture
def state(tmp_path):
    states = States(tmp_path)
    draft = states.begin(3)
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    write_weights_and_optimizer(draft, layer.state_dict(), optimizer.state_dict())
    return states.commit(Progress(step=3, run={}, config={}, world=1))


def test_a_whole_state_is_read(state):
    weights, optimizer = read_weights_and_optimizer(state)
    assert read_progress(state).step == 3 and weights["weight"].shape == (2, 2)
    assert optimizer["state"][0]["step"] == 1


@pytest.mark.parametrize("text", JSON)
def test_damaged_manifests(state, text):
    (state / MANIFEST).write_text(text)
    with pytest.raises(StateError, match="step-0000003"):
        verify(state)
        read_progress(state)
    with pytest.raises(StateError, match="All saved states are damaged"):
        States(state.parent).latest()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_manifests_name_files_of_their_folder_alone(state, name):
    (state / MANIFEST).write_text(json.dumps({"files": {name: {"size": 1, "sha256": ""}}}))
    with pytest.raises(StateError, match="none of its files"):
        verify(state)


@pytest.mark.parametrize("text", (*JSON[:8], '{"step": "3", "run": {}, "config": {}, "world": 1}', '{"step": 3}'))
def test_damaged_progress(state, text):
    (state / PROGRESS).write_text(text)
    (state / MANIFEST).write_text('{"files": {}}')
    with pytest.raises(StateError, match=PROGRESS):
        read_progress(state)


@pytest.mark.parametrize("name", [OPTIMIZER, WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"\x80\x02cposix\nsystem\nX\4\0\0\0true\x85R.", b"PK\3\4", bytes(99)])
def test_damaged_parts(state, name, content):
    (state / name).write_bytes(content)
    with pytest.raises(StateError, match=name):
        read_weights_and_optimizer(state)


LINES = (
    DEEP, "[]", "3", "{", '{"event": 3}', '{"event": "step"}', '{"event": "step", "step": "1"}',
    '{"event": "step", "step": [1], "loss": 1}', '{"event": "step", "step": 2, "loss": "x"}', "\x00\xff",
)  # fmt: skip


def test_damaged_events_are_left_out(tmp_path):
    whole = '{"event": "step", "step": 1, "loss": 0.5}'
    (tmp_path / "events.jsonl").write_text("\n".join([*LINES, whole, *LINES]), encoding="latin-1")
    assert [event["step"] for event in latest_steps(tmp_path / "events.jsonl")] == [1]


@pytest.mark.parametrize("text", [DEEP, "[]", "3", '[["a", 1]]', '{"a": [1]}', "{"])
def test_damaged_hashes_are_made_again(tmp_path, text):
    (tmp_path / HASHES).write_text(text)
    (tmp_path / "clip").write_bytes(b"content")
    assert len(LatentCache(tmp_path).file_hash(tmp_path / "clip")) == 64


def test_damaged_tensors_are_made_again(tmp_path):
    cache = LatentCache(tmp_path)
    cache.put("ab", {"latents": torch.ones(2)})
    file = next(tmp_path.glob("ab/*.safetensors"))
    for content in (b"", file.read_bytes()[:-1], b"\x80\x02.", bytes(100)):
        file.write_bytes(content)
        assert cache.get("ab") is None
