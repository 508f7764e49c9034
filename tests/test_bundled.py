"""The bundled models: what is stored of trained weights becomes ordinary checkpoints, which follow the pack."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import filled, relative_error
from tools.family import store, text
from tools.training_workflows import TRAININGS
from tools.workflow_texts import WORKFLOWS
from wan_core import bundled, catalog
from wan_core.conditioning.text import Tokenizer
from wan_core.lora.target import Target, use_lora
from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.models.text_encoder import UMT5Encoder
from wancore.headless.overrides import apply_tiny
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).parents[1]

NARROW = {name: replace(sizes, dim=128, ffn_dim=256, num_layers=1) for name, sizes in bundled.DITS.items()}
NARROW["vace"] = replace(NARROW["vace"], vace_layers=(0,))


def near(config: DiTConfig, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model that was trained from `base` for a while, all but its first block's."""
    begun = bundled.widened(base, config)
    return {n: w if n.startswith("blocks.0") else w + 0.01 * torch.randn_like(w) for n, w in begun.items()}


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """A folder as a training leaves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("family")
    base = filled(WanDiT, NARROW["t2v"], seed=3).bfloat16().float().state_dict()
    parts = {
        "text": filled(UMT5Encoder, bundled.TEXT_ENCODER, seed=3).state_dict(),
        "dit_t2v": base,
        "dit_i2v": near(NARROW["i2v"], base),
        "dit_t2v_low": near(NARROW["t2v"], base),
    }
    for name, weights in parts.items():
        save_file(weights, folder / f"{name}.safetensors")
    tokenizer = folder / catalog.TOKENIZER_PATTERN / bundled.TOKENIZER_FILE
    tokenizer.parent.mkdir(parents=True)
    bundled.write_tokenizer(tokenizer, ["red", "ball"])
    return folder


@pytest.fixture(scope="module")
def packed(family, tmp_path_factory):
    """What is stored of it, in the place of the pack's own weights."""
    target = tmp_path_factory.mktemp("trained")
    with mock.patch.multiple(bundled, TRAINED=target, DITS=NARROW):
        store.pack(family, target)
        yield target


def test_what_a_loader_sees_is_whole_and_what_was_trained(family, packed, tmp_path):
    folder = bundled.write_model(tmp_path, catalog.tiny_id("i2v"))
    written, trained = load_file(folder / catalog.DIT_FILE), load_file(family / "dit_i2v.safetensors")
    base = load_file(family / "dit_t2v.safetensors")
    assert written.keys() == trained.keys() and {t.dtype for t in written.values()} == {torch.float32}
    begun = bundled.widened(base, NARROW["i2v"])
    for name, weight in trained.items():
        if weight.numel() <= store.SMALL:
            assert torch.equal(written[name], weight.bfloat16().float())
        elif name.startswith("blocks.0"):
            assert torch.equal(written[name], weight)
        else:
            # Four levels keep 88 % of the variance of normal numbers (Max 1960).
            assert relative_error(written[name] - begun[name], weight - begun[name]) < 0.38, name


def test_the_encoder_its_words_and_the_base_are_stored_whole(family, packed, tmp_path):
    folder = bundled.write_model(tmp_path, catalog.TINY)
    encoder = torch.load(folder / catalog.TEXT_ENCODER_PATTERN, weights_only=True)
    for written, name in ((encoder, "text"), (load_file(folder / catalog.DIT_FILE), "dit_t2v")):
        for key, weight in load_file(family / f"{name}.safetensors").items():
            assert torch.equal(written[key], weight.bfloat16().float())
    words = (catalog.TOKENIZER_PATTERN, bundled.TOKENIZER_FILE)
    assert folder.joinpath(*words).read_bytes() == family.joinpath(*words).read_bytes()


def test_an_expert_that_was_not_trained_is_the_model_for_all_timesteps(family, packed, tmp_path):
    folder = bundled.write_model(tmp_path, catalog.tiny_id("t2v", is_pair=True))
    high, low = (load_file(folder / pattern.replace("*", "")) for pattern in catalog.PAIR_PATTERNS)
    base = load_file(family / "dit_t2v.safetensors")
    assert all(torch.equal(high[name], weight.bfloat16().float()) for name, weight in base.items())
    assert not torch.equal(low["text_embedding.0.weight"], high["text_embedding.0.weight"])


@pytest.mark.parametrize("variant", ["vace", "fun_5b_inp"])
def test_what_was_not_trained_is_drawn(variant, packed, tmp_path):
    written = load_file(bundled.write_model(tmp_path, catalog.tiny_id(variant)) / catalog.DIT_FILE)
    drawn = filled(WanDiT, NARROW[variant]).state_dict()
    assert written.keys() == drawn.keys()
    assert all(torch.equal(written[name], weight) for name, weight in drawn.items())


def test_files_made_of_other_weights_are_made_again(packed, tmp_path, monkeypatch):
    folder = bundled.write_model(tmp_path, catalog.tiny_id("i2v"))
    file, times = folder / catalog.DIT_FILE, []
    before = file.read_bytes()
    file.write_bytes(b"of an earlier version")
    bundled.write_model(tmp_path, catalog.tiny_id("i2v"))
    assert file.read_bytes() == b"of an earlier version", "made of the weights of today, as far as is known"
    monkeypatch.setattr(bundled, "version", lambda: "other")
    bundled.write_model(tmp_path, catalog.tiny_id("i2v"))
    assert file.read_bytes() == before
    times = file.stat().st_mtime_ns
    bundled.write_model(tmp_path, catalog.tiny_id("i2v"))
    assert file.stat().st_mtime_ns == times


def test_one_training_is_stored_in_one_way(family, packed, tmp_path):
    assert next(path.name for path in store.pack(family, tmp_path)) == bundled.TOKENIZER_FILE
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in packed.iterdir()}


def test_a_structure_without_weights_has_those_of_its_neighbour(family, packed, tmp_path):
    """First-last-frame has the weights of image to video, and positions for two pictures that change nothing."""
    near, own = (
        load_file(bundled.write_model(tmp_path, catalog.tiny_id(variant)) / catalog.DIT_FILE)
        for variant in ("i2v", "flf2v")
    )
    assert all(torch.equal(own[name], weight) for name, weight in near.items())
    assert {name for name in own if name not in near} == {"img_emb.emb_pos"}


@pytest.mark.parametrize(("bits", "error"), [(2, 0.38), (4, 0.12), (8, 0.008)])
def test_levels_are_read_as_they_were_stored(bits, error):
    torch.manual_seed(1)
    weight = torch.randn(6, 8, 2, 2, 4) * torch.logspace(-3, 2, 6).view(-1, 1, 1, 1, 1)
    levels, scale = store.quantised(weight, bits)
    assert levels.shape == (6, 128 * bits // 8) and levels.dtype == torch.uint8
    read = bundled.unpack(levels, scale, weight.shape)
    for got, expected in zip(read, weight, strict=True):
        assert relative_error(got, expected) < error


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Tokenizer:
    """The words of the drawn world, as a training stores them."""
    folder = tmp_path_factory.mktemp("words")
    bundled.write_tokenizer(folder / bundled.TOKENIZER_FILE, text.english_words(), text.chinese_pieces())
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", [*WORKFLOWS, *TRAININGS])
def test_tiny_runs_have_the_size_and_the_words_of_the_training(name, words):
    file = ROOT / "workflows" / "api" / f"{name}.json"
    inputs = [node.inputs for node in apply_tiny(Workflow.load(file), NODE_CLASS_MAPPINGS).nodes.values()]
    preset, unknown = catalog.TINY_PRESET, 2
    for size in ("width", "height", "num_frames"):
        assert {given[size] for given in inputs if size in given} == {getattr(preset, size)}
    (sampler,) = (given for given in inputs if "steps" in given)
    assert (sampler["steps"], sampler["cfg"], sampler["shift"]) == (preset.steps, preset.cfg, preset.shift)
    (prompt,) = (given for given in inputs if "prompt" in given)
    assert unknown not in words.ids(prompt["prompt"], 64).tolist() and not prompt["negative_prompt"]
    assert {row.preset for row in catalog.TINY_ROWS} == {preset}


def test_what_is_shipped_fits_the_models():
    """Every stored file belongs to a bundled model, and holds all of its tensors."""
    parts = store.parts()
    assert sum(file.stat().st_size for file in bundled.TRAINED.iterdir()) < 20e6
    for file in sorted(bundled.TRAINED.glob("*.safetensors")):
        if file.stem.startswith("lora_"):
            # An error where nothing of it fits.
            use_lora(file, Target.of_modules("tiny", [WanDiT(bundled.DIT)]))
        else:
            part = parts[file.stem]
            part.cls(part.config).load_state_dict(part.weights())
