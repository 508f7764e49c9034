"""The first run: what lists show, what a missing file says, and what the editor is told of the pack."""

import inspect
import re
import shutil
from pathlib import Path

import pytest

from tests.nodes.running import outputs
from wan_core import catalog
from wan_core.files import known_names_below
from wan_core.model_files import BUNDLED
from wan_core.planning.modules import published_component
from wancore.nodes import NODE_CLASS_MAPPINGS as NODES
from wancore.nodes import host, sockets
from wancore.nodes.model_loader import SIZES
from wancore.nodes.replacements import REPLACEMENTS


@pytest.fixture
def models(tmp_path):
    host.configure(device="cpu", models_dir=tmp_path)
    yield tmp_path
    host.configure()


def test_lists_begin_with_what_is_on_this_disk(models):
    """Then published models with what a download is, then the bundled ones."""
    loader = NODES["WanCoreVAELoader"]
    kind, options = loader.INPUT_TYPES()["required"]["vae"]
    assert kind == [catalog.T2V_BASE, catalog.TI2V_BASE, catalog.TINY, catalog.TINY_TI2V]
    assert options["wancore_labels"][catalog.T2V_BASE] == f"{catalog.T2V_BASE} (download, 0.5 GB)"
    assert options["wancore_tiny"] == {catalog.T2V_BASE: catalog.TINY, catalog.TI2V_BASE: catalog.TINY_TI2V}
    published = models / catalog.TI2V_BASE / catalog.VAE_22_PATTERN
    published.parent.mkdir(parents=True)
    own = models / "vae" / "my_vae.safetensors"
    own.parent.mkdir(exist_ok=True)
    try:
        for path in (published, own):
            path.write_bytes(b"0")
        kind, options = loader.INPUT_TYPES()["required"]["vae"]
        assert kind[:3] == ["my_vae.safetensors", catalog.TI2V_BASE, catalog.T2V_BASE]
        assert catalog.TI2V_BASE not in options["wancore_labels"]
    finally:
        own.unlink()
        shutil.rmtree(published.parent)


def test_an_absent_model_names_a_file_that_would_fit(models, monkeypatch):
    """The published structure is that of the tiny VAE here, which has a file of its own."""
    outputs("WanCoreVAELoader", vae=catalog.TINY)
    own = models / "vae" / "wan_2.1_vae.pth"
    own.parent.mkdir(exist_ok=True)
    shutil.copy(models / catalog.TINY / catalog.VAE_PATTERN, own)
    loader = NODES["WanCoreVAELoader"]
    monkeypatch.setattr(loader, "published", classmethod(lambda cls, name: [published_component("vae", catalog.TINY)]))
    try:
        with pytest.raises(ValueError, match=r"wan_2\.1_vae\.pth in models/vae would fit.*Set download.*WanCore/tiny"):
            outputs("WanCoreVAELoader", vae=catalog.T2V_BASE)
    finally:
        own.unlink()


def test_a_loader_is_asked_about_one_input():
    """ComfyUI shows what it answers once for each input that it is asked about."""
    for node_id in ("ModelLoader", "TextEncoderLoader", "VAELoader", "ImageEncoderLoader", "SpeedControl"):
        assert len(inspect.signature(NODES[f"WanCore{node_id}"].VALIDATE_INPUTS).parameters) == 1


def test_sizes_of_downloads_are_those_of_the_readme():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name, size in SIZES.items():
        assert re.search(rf"^\| `{re.escape(name)}` .*\| {re.escape(size)} \|$", readme, re.MULTILINE), name
    assert SIZES.keys() == {name for name in NODES["WanCoreModelLoader"].ROWS if name not in BUNDLED}


def test_a_folder_that_cannot_be_served_is_told(caplog):
    for name in ("wancore", "ComfyUI-WanCore_1.0"):
        host.check_folder_name(name)
    assert not caplog.text
    host.check_folder_name("my nodes")
    assert "rename it to 'wancore'" in caplog.text


def test_replacements_of_another_pack_fit_our_nodes():
    for each in REPLACEMENTS:
        declared = NODES[each.new].INPUT_TYPES()
        known = {**declared["required"], **declared.get("optional", {})}
        given = {entry["new_id"] for entry in each.input_mapping()}
        assert given <= known.keys() and set(declared["required"]) <= given, each.new


def test_every_socket_has_a_colour_of_its_own():
    script = (Path(__file__).parents[2] / "web" / "wancore.js").read_text(encoding="utf-8")
    colours = dict(re.findall(r'(WANCORE_\w+): "(#\w{6})"', script))
    assert colours.keys() == {kind for kind in sockets.LINKED if kind.startswith("WANCORE_")}
    assert len(set(colours.values())) == len(colours)


def test_a_walk_over_folders_is_repeated_only_after_a_change(tmp_path):
    folders, deep = (tmp_path / "a", tmp_path / "b"), tmp_path / "b" / "deep"
    deep.mkdir(parents=True)
    assert known_names_below(folders, (".gguf",)) == []
    (deep / "x.gguf").touch()
    (folders[1] / "y.bin").touch()
    assert known_names_below(folders, (".gguf",)) == ["deep/x.gguf"]
    walked = known_names_below(folders, (".gguf",))
    assert known_names_below(folders, (".gguf",)) is walked
    folders[0].mkdir()
    (folders[0] / "z.gguf").touch()
    assert known_names_below(folders, (".gguf",)) == ["deep/x.gguf", "z.gguf"]
