"""The cache on disk: what it keeps is what was put, and nothing stale or half written is ever found."""

import hashlib
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.disks import full_disk
from wancore.trainer.data import cache as cache_module
from wancore.trainer.data.cache import LatentCache


def test_what_is_put_comes_back_bit_for_bit(tmp_path):
    cache = LatentCache(tmp_path)
    tensors = {"latents": torch.randn(1, 16, 2, 4, 4), "text": torch.randn(1, 3, 8).bfloat16()}
    key = cache.key({"file": "a", "size": [1, 2]})
    assert key not in cache and cache.get(key) is None
    cache.put(key, tensors)
    found = LatentCache(tmp_path).get(key)
    assert key in cache and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)


def test_views_are_stored_as_they_look(tmp_path):
    cache = LatentCache(tmp_path)
    whole = torch.arange(24.0).view(4, 6)
    cache.put("ab", {"left": whole[:, :3], "turned": whole.T})
    assert torch.equal(cache.get("ab")["left"], whole[:, :3]) and torch.equal(cache.get("ab")["turned"], whole.T)


def test_every_part_of_a_key_counts(tmp_path):
    cache = LatentCache(tmp_path)
    parts = {"file": "a", "frames": [0, 1], "encoder": {"dtype": "float32"}}
    others = [{**parts, "file": "b"}, {**parts, "frames": [1, 0]}, {**parts, "encoder": {"dtype": "bfloat16"}}]
    assert len({cache.key(p) for p in (parts, *others)}) == 4
    assert cache.key(parts) == cache.key(dict(reversed(parts.items())))


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_file_counts_as_missing(tmp_path, damage, caplog):
    cache = LatentCache(tmp_path)
    cache.put("abcd", {"x": torch.ones(1000)})
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    assert cache.get("abcd") is None
    assert "damaged" in caplog.text


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    cache = LatentCache(tmp_path)
    with full_disk(8), pytest.raises(OSError, match="too large"):
        cache.put("abcd", {"x": torch.ones(3)})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_hashes_follow_content_and_are_remembered(tmp_path, monkeypatch):
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"first")
    cache = LatentCache(tmp_path / "cache")
    side_by_side = LatentCache(tmp_path / "cache")  # made before anything was remembered
    first = cache.file_hash(file)
    again = LatentCache(tmp_path / "cache")
    monkeypatch.setattr(cache_module.hashlib, "sha256", None)
    assert again.file_hash(file) == side_by_side.file_hash(file) == first
    monkeypatch.undo()
    (tmp_path / "copy.mp4").write_bytes(b"first")
    assert again.file_hash(tmp_path / "copy.mp4") == first
    file.write_bytes(b"other")
    os.utime(file, ns=(1, 1))
    assert again.file_hash(file) != first


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        LatentCache(tmp_path / "file")


def test_a_broken_memory_of_hashes_is_made_anew(tmp_path):
    (tmp_path / cache_module.HASHES).write_text("{")
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"first")
    assert len(LatentCache(tmp_path).file_hash(file)) == 64


@pytest.mark.parametrize(
    "text", ["[1]", "null", "3", '"a"', "[" * 10_000, '[["a", "b"]]', '{"a": 1}', "{", "\x00"], ids=lambda t: t[:9]
)
def test_remembered_hashes_that_are_none_are_forgotten(tmp_path, text):
    (tmp_path / "clip").write_bytes(b"clip")
    (tmp_path / "hashes.json").write_text(text, encoding="utf-8")
    assert LatentCache(tmp_path).file_hash(tmp_path / "clip") == hashlib.sha256(b"clip").hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {},
        lambda tensors: {"x": tensors["a"]},
        lambda tensors: {**tensors, "a": tensors["a"] + 1},
        lambda tensors: {**tensors, "a": tensors["a"].half()},
        lambda tensors: {**tensors, "a": tensors["a"][:1]},
        lambda tensors: {**tensors, "b": torch.zeros(1)},
    ],
    ids=["empty", "renamed", "changed", "another dtype", "shorter", "longer"],
)
def test_what_was_not_written_so_is_made_again(tmp_path, change, caplog):
    cache = LatentCache(tmp_path)
    written = {"a": torch.ones(2, 3)}
    cache.put("k", written)
    assert cache.get("k").keys() == {"a"} and torch.equal(cache.get("k")["a"], written["a"])
    (file,) = tmp_path.rglob("*.safetensors")
    tensors = load_file(file)
    save_file(change(tensors), file)
    assert cache.get("k") is None and "not those that were written" in caplog.text
