"""What a model's file may make the pack build, whatever its names and shapes say."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.loading import inventories as inv
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.loading.save import save_plain
from wan_core.loading.tensor_files import CheckpointError

NAMES = {
    "dit_t2v": ("blocks.0.ffn.0.weight", "head.modulation", "patch_embedding.weight", "head.head.weight"),
    "vae": ("conv2.weight", "encoder.conv1.weight"),
    "umt5": ("blocks.0.pos_embedding.embedding.weight", "token_embedding.weight", "blocks.0.attn.q.weight"),
    "clip": ("visual.patch_embedding.weight", "visual.pos_embedding", "visual.transformer.0.mlp.0.weight"),
}
SHAPES = ((), (0,), (1,), (0, 0, 0, 0, 0), (1, 2, 3), (2**20,), (1, 1, 1, 1, 1))


@pytest.fixture
def saved(tmp_path):
    def save(tensors):
        save_file(tensors, tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    return save


@pytest.mark.parametrize("index", ["3000000", "99", "9" * 400, "007"])
@pytest.mark.parametrize("kind, block", [("dit_t2v", "blocks"), ("umt5", "blocks"), ("clip", "visual.transformer")])
def test_one_name_makes_no_blocks(saved, kind, block, index):
    file = saved(inv.tiny(kind) | {f"{block}.{index}.ffn.0.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"m\.safetensors.*but not of all the blocks before it"):
        detect_files(file)


def test_blocks_are_bounded(saved):
    more = {f"blocks.{n}.ffn.0.bias": torch.zeros(0) for n in range(4, 5000)}
    with pytest.raises(CheckpointError, match=r"has 5000 blocks; the largest Wan 2\.1 model has 40"):
        detect_files(saved(inv.tiny("dit_t2v") | more))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in NAMES.items() for name in names])
def test_shapes_of_no_model(saved, kind, name, shape):
    file = saved(inv.tiny(kind) | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"m\.safetensors"):
        build(detect_files(file), dtype=None)


def test_a_file_without_tensors(saved):
    with pytest.raises(CheckpointError, match=r"m\.safetensors holds no tensors"):
        detect_files(saved({}))


@pytest.mark.parametrize("lost", ["blocks.1.ffn.0.bias", "head.head.bias", "blocks.1"])
def test_incomplete_models_are_not_converted(saved, tmp_path, lost):
    file = saved({k: v for k, v in inv.tiny("dit_t2v").items() if not k.startswith(lost)})
    with pytest.raises(CheckpointError, match=r"missing|blocks"):
        save_plain(detect_files(file), tmp_path / "out.safetensors", torch.bfloat16)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_vace_branch_is_converted_whole_or_not_at_all(saved, tmp_path):
    branch = {name: t for name, t in inv.tiny("dit_vace").items() if name.startswith("vace_")}
    component = detect_files(saved(branch))
    assert component.kind == "vace"
    save_plain(component, tmp_path / "whole.safetensors", torch.bfloat16)
    component = detect_files(saved({name: t for name, t in branch.items() if name != "vace_blocks.1.norm3.bias"}))
    with pytest.raises(CheckpointError, match=r"1 missing: vace_blocks\.1\.norm3\.bias"):
        save_plain(component, tmp_path / "out.safetensors", torch.bfloat16)


def test_an_incomplete_series_is_not_converted(tmp_path):
    tensors = inv.tiny("dit_t2v")
    save_file(tensors, tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="m-00002-of-00002"):
        detect_files(tmp_path / "m-00001-of-00002.safetensors")


INDICES = {
    "other folders": {"weight_map": {"a": "../secret.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}},
    "numbers": {"weight_map": {"a": 3, "b": "x"}},
    "lists": {"weight_map": {"a": ["x"]}},
    "no map": {"weight_map": 3},
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", INDICES)
def test_indices_that_are_none(tmp_path, name):
    content = INDICES[name]
    (tmp_path / "m.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        detect_files(tmp_path / "m.safetensors.index.json")


def test_a_series_of_a_million_files_is_none(tmp_path):
    (tmp_path / "m-000001-of-999999.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="999998 of the 999999 files") as error:
        detect_files(tmp_path / "m-000001-of-999999.safetensors")
    assert len(str(error.value)) < 1000
