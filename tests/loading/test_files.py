"""Which files a path stands for."""

import json
import os

import pytest

from wan_core.loading.paths import describe_files, missing_shards, resolve_files, resolve_model
from wan_core.loading.tensor_files import CheckpointError


@pytest.fixture
def make(tmp_path):
    def make(*names, **contents):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(contents.get("text", "x"))
        return tmp_path

    return make


def series(stem, total, suffix=".safetensors"):
    return [f"{stem}-{k:05}-of-{total:05}{suffix}" for k in range(1, total + 1)]


def names(group):
    return [file.name for file in group]


SHARDS = series("dit", 3)


@pytest.mark.parametrize("given", [
    lambda d: d,
    lambda d: str(d),
    lambda d: d / SHARDS[0],
    lambda d: d / SHARDS[2],
    lambda d: d / "dit*.safetensors",
    lambda d: [d / SHARDS[2], d / SHARDS[0], d / SHARDS[1]],
    lambda d: [str(d / SHARDS[1]), d / SHARDS[1], d / SHARDS[0]],
])  # fmt: skip
def test_a_series_is_one_model(make, given):
    folder = make(*SHARDS)
    (folder / "README.md").write_text("no weights")
    assert names(resolve_model(given(folder))) == SHARDS


def test_flat_list_of_two_models(make):
    folder = make(*series("a/model", 2), *series("b/model", 3), "vae.pth")
    shards = [*folder.glob("b/*"), folder / "vae.pth", *folder.glob("a/*")]
    groups = resolve_files(shards[::2] + shards[1::2])
    assert sorted([f"{g[0].parent.name}:{len(g)}" for g in groups]) == sorted(["a:2", "b:3", f"{folder.name}:1"])
    assert all(names(group) == sorted(names(group)) for group in groups)


def test_missing_shards_are_named(make):
    folder = make(SHARDS[0], SHARDS[2])
    for given in (folder, folder / SHARDS[0], [folder / SHARDS[2]]):
        with pytest.raises(CheckpointError, match=f"1 of the 3 files of this model are missing: {SHARDS[1]}"):
            resolve_files(given)
    assert missing_shards(folder / SHARDS[0]) == [SHARDS[1]]


def index(folder, *files):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {f"t{i}": f for i, f in enumerate(files)}}))
    return path


def test_index_groups_and_names_absent_files(make):
    folder = make("one.safetensors", "two.safetensors")
    path = index(folder, "two.safetensors", "one.safetensors", "one.safetensors")
    for given in (folder, path, folder / "two.safetensors"):
        assert names(resolve_model(given)) == ["one.safetensors", "two.safetensors"]
    index(folder, "one.safetensors", "two.safetensors", "three.safetensors")
    for given in (folder, path):
        with pytest.raises(CheckpointError, match=r"missing: three\.safetensors"):
            resolve_files(given)


def test_an_index_of_other_files_is_ignored(make):
    folder = make("whole.safetensors")
    index(folder, *SHARDS)
    assert names(resolve_model(folder)) == ["whole.safetensors"]
    (folder / "model.safetensors.index.json").write_text("[]")
    assert names(resolve_model(folder)) == ["whole.safetensors"]
    with pytest.raises(CheckpointError, match="not a shard index"):
        resolve_model(folder / "model.safetensors.index.json")


def test_two_models_in_a_folder(make):
    folder = make(*SHARDS, "Wan2.1_VAE.pth")
    assert len(resolve_files(folder)) == 2
    with pytest.raises(CheckpointError, match="holds 2 models; name one") as error:
        resolve_model(folder)
    assert "Wan2.1_VAE.pth" in str(error.value) and "dit-*-of-00003.safetensors (3 files)" in str(error.value)


@pytest.mark.parametrize(("given", "message"), [
    ("wan2.1_t2v.safetensor", "does not exist.*holds: wan2.1_t2v.safetensors"),
    ("*.gguf", r"\*.gguf does not exist.*wan2.1_t2v"),
    ("none/at/all.pth", "does not exist.*holds: "),
    ("empty", "holds no model file"),
    ("n" * 300, "n does not exist.*holds: "),
    ("n" * 300 + "/a.pth", "does not exist.*holds: "),
    ("pipe.pth", "pipe.pth is no regular file"),
])  # fmt: skip
def test_nothing_there(make, given, message):
    folder = make("wan2.1_t2v.safetensors", "clip.pth")
    (folder / "empty").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.pth")
    elif given == "pipe.pth":
        pytest.skip("this system has no named pipes")
    with pytest.raises(CheckpointError, match=message):
        resolve_files(folder / given)


def test_empty_list():
    with pytest.raises(CheckpointError, match="No model file"):
        resolve_files([])


def test_names_with_glob_characters(make):
    folder = make("wan [final].safetensors")
    assert names(resolve_model(folder / "wan [final].safetensors")) == ["wan [final].safetensors"]


def test_describe(make):
    folder = make(*SHARDS, "a.pth", "b.pth")
    assert describe_files([folder / "a.pth"]) == "a.pth"
    assert describe_files([folder / "a.pth", folder / "b.pth"]) == "a.pth and 1 more"
