"""Encoded prompts that are kept: the same bits with and without, nothing moved on a hit, damage is a miss."""

import contextlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.reference import tiny_text_encoder
from wan_core import ModelConfig, WanVideoPipeline, bundled, catalog, model_files
from wan_core.conditioning import text
from wan_core.conditioning.text import (
    LOCK,
    MemoryStore,
    TextCache,
    TextEncoder,
    Tokenizer,
    fingerprint,
    text_conditioning,
)
from wan_core.models.text_encoder import UMT5Encoder
from wancore.nodes import host
from wancore.nodes.prompts import TextEncode, WindowPrompts

PROMPTS = ["a dog is running", "", "a cat sees the river and the mountain in the snow", "a dog"]
FILE = catalog.TEXT_ENCODER_PATTERN


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    bundled.write_model(root, catalog.TINY)
    return root


@pytest.fixture(scope="module")
def tokenizer(models):
    return Tokenizer.from_folder(models / catalog.TINY / catalog.TOKENIZER_PATTERN)


@pytest.fixture
def plain(tokenizer):
    """An encoder without a cache."""
    return TextEncoder(tiny_text_encoder(), tokenizer)


@pytest.fixture
def kept(tokenizer):
    return TextEncoder(tiny_text_encoder(), tokenizer, TextCache.in_memory("these weights"))


def asleep(encoder):
    """The same cache with a model that must not be used: its weights have no data."""
    return TextEncoder(encoder.model.to("meta"), encoder.tokenizer, encoder.cache)


def never():
    pytest.fail("the encoder was brought to the device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_is_the_same_bits_in_any_company_and_from_the_cache(plain, kept, dtype):
    for encoder in (plain, kept):
        encoder.model.to(dtype)
    alone = torch.cat([plain.encode([prompt]) for prompt in PROMPTS])
    assert torch.equal(plain.encode(PROMPTS), alone)
    assert torch.equal(kept.encode(PROMPTS[:2]), alone[:2])
    assert torch.equal(kept.encode(PROMPTS), alone)
    assert torch.equal(kept.encode(PROMPTS[::-1]), alone.flip(0))
    assert alone.dtype == dtype


def test_a_hit_neither_moves_nor_touches_the_weights(kept):
    entered = []

    @contextlib.contextmanager
    def ready():
        entered.append(1)
        yield

    first = text_conditioning(kept, PROMPTS[0], PROMPTS[1], ready)
    assert entered == [1]
    encoder = asleep(kept)
    assert encoder.missing(PROMPTS) == PROMPTS[2:]
    again = text_conditioning(encoder, PROMPTS[0], PROMPTS[1], never)
    assert torch.equal(again.text, first.text)
    assert torch.equal(again.negative_text, first.negative_text)


def test_without_a_cache_the_model_is_always_used(plain):
    plain.encode(PROMPTS)
    assert plain.missing(PROMPTS) == PROMPTS
    with pytest.raises(ValueError, match="was loaded from files"):
        plain.kept_in("anywhere")


def test_what_is_given_out_can_be_changed(kept):
    first = kept.encode(PROMPTS[:1])
    expected = first.clone()
    first.zero_()
    assert torch.equal(kept.encode(PROMPTS[:1]), expected)


def test_another_dtype_and_other_weights_are_other_embeddings(kept, tokenizer):
    kept.encode(PROMPTS)
    other = TextEncoder(kept.model, tokenizer, TextCache("other weights", kept.cache.stores))
    assert other.missing(PROMPTS) == PROMPTS
    kept.model.to(torch.bfloat16)
    assert kept.missing(PROMPTS) == PROMPTS


def test_spellings_that_clean_to_the_same_text_share_an_embedding(kept):
    kept.encode(["a dog &amp; a cat"])
    assert kept.missing(["  a   dog & a cat\n"]) == []


def test_memory_is_bounded_and_drops_what_was_used_least():
    store, row = MemoryStore(max_bytes=3 * 16), torch.zeros(1, 4)
    for key in "abc":
        store.put(key, row)
    store.get("a")
    store.put("d", row)
    assert [key for key in "abcd" if store.get(key) is not None] == ["a", "c", "d"]
    store.put("large", torch.zeros(100, 4))
    assert store.get("large") is None
    assert store.get("a") is not None


def on_disk(encoder, directory):
    """A new process' view of the files: the same weights, nothing in memory."""
    return TextEncoder(encoder.model, encoder.tokenizer, TextCache.in_memory("these weights")).kept_in(directory)


def stored(directory):
    """The files of embeddings, beside the lock of who encodes."""
    assert {path.name for path in directory.iterdir()} - {LOCK} == {
        path.name for path in directory.glob("*.safetensors")
    }
    return sorted(directory.glob("*.safetensors"))


def test_several_processes_encode_each_prompt_once(kept, tmp_path, monkeypatch):
    """As threads: each has its own cache in memory, and its own open file to lock."""
    encoded, encode = [], UMT5Encoder.encode

    def slow(self, ids):
        encoded.extend(ids)
        time.sleep(0.1)
        return encode(self, ids)

    monkeypatch.setattr(UMT5Encoder, "encode", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: on_disk(kept, tmp_path).encode(PROMPTS), range(4)))
    assert len(encoded) == len(PROMPTS) == len(stored(tmp_path))
    assert all(torch.equal(each, found[0]) for each in found)


def test_files_serve_the_next_process(kept, tmp_path):
    folder = tmp_path / "deep" / "prompts"
    expected = kept.kept_in(folder).encode(PROMPTS)
    files = stored(folder)
    assert len(files) == len(PROMPTS)
    assert {file.suffix for file in files} == {".safetensors"}
    lengths = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            lengths.add(opened.get_tensor("embedding").shape[0])
    assert lengths == {len(ids) for ids in kept._ids(PROMPTS).values()}
    later = asleep(on_disk(kept, folder))
    assert torch.equal(later.encode(PROMPTS, never), expected)
    shutil.rmtree(folder)
    assert torch.equal(later.encode(PROMPTS, never), expected)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "text": lambda file: file.write_text("not a tensor"),
    "another name": lambda file: save_file({"other": torch.zeros(3, 64)}, file),
    "another shape": lambda file: save_file({"embedding": torch.zeros(3, 7)}, file),
    "another dtype": lambda file: save_file({n: t.half() for n, t in load_file(file).items()}, file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_file_is_a_miss(kept, tmp_path, damage, caplog):
    expected = kept.kept_in(tmp_path).encode(PROMPTS[:1])
    (file,) = stored(tmp_path)
    DAMAGE[damage](file)
    later = on_disk(kept, tmp_path)
    assert later.missing(PROMPTS[:1]) == PROMPTS[:1]
    assert torch.equal(later.encode(PROMPTS[:1]), expected)
    assert stored(tmp_path) == [file]
    if file.is_file():
        assert on_disk(kept, tmp_path).missing(PROMPTS[:1]) == []
    else:
        assert "cannot be kept" in caplog.text


def test_a_folder_that_cannot_be_made_costs_a_notice(kept, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    expected = kept.encode(PROMPTS)
    encoder = on_disk(kept, tmp_path / "file")
    assert torch.equal(encoder.encode(PROMPTS), expected)
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_fingerprint_goes_by_content(tmp_path, suffix):
    file, copy, changed = (tmp_path / f"{name}.{suffix}" for name in ("file", "copy", "changed"))
    weights = {"a": torch.randn(64, 64), "b": torch.randn(8)}
    write = save_file if suffix == "safetensors" else torch.save
    write(weights, file)
    shutil.copy(file, copy)
    write({**weights, "b": weights["b"] + 1}, changed)
    first = fingerprint([file])
    assert fingerprint([copy]) == first
    assert fingerprint([changed]) != first
    assert fingerprint([file], "fp8") != first
    assert fingerprint([file, copy]) != first
    read = text._file_digest.cache_info().misses
    fingerprint([file])
    assert text._file_digest.cache_info().misses == read
    write({**weights, "b": weights["b"] + 2}, file)
    assert fingerprint([file]) != first


def test_a_sparse_change_in_a_large_checkpoint_is_seen(tmp_path, monkeypatch):
    """A PyTorch checkpoint's directory holds checksums, so that a change between the samples is seen too."""
    monkeypatch.setattr(text, "SAMPLES", 2)
    file, changed = tmp_path / "file.pth", tmp_path / "changed.pth"
    weights = {"a": torch.zeros(2**20), "b": torch.zeros(2**20)}
    torch.save(weights, file)
    weights["a"][2**19] = 1
    torch.save(weights, changed)
    monkeypatch.setattr(text, "DIRECTORY_BYTES", 2**12)
    assert fingerprint([file]) != fingerprint([changed])


def load(models):
    patterns = (catalog.DIT_PATTERN, FILE, catalog.VAE_PATTERN)
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig(model_id=catalog.TINY, origin_file_pattern=p) for p in patterns],
        local_model_path=models,
    )


def test_loaded_encoders_know_their_weights(models):
    component = model_files.inspect(models / catalog.TINY / FILE, "text_encoder")
    first, again, other = (
        model_files.load_text_encoder(component, None, dtype, "cpu").cache.fingerprint
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    assert first == again != other


def test_a_pipeline_keeps_prompts_across_processes(models, tmp_path):
    settings = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
    call = {"prompt": "a dog", "negative_prompt": "a cat", "output_type": "latent", **settings}
    pipe = load(models)
    expected = pipe(**call)
    assert not list(tmp_path.iterdir())
    pipe.text_cache_dir = tmp_path
    pipe.models.text.encode(["a bird"])
    assert torch.equal(pipe(**call), expected)
    pipe = load(models)
    pipe.text_cache_dir = tmp_path
    pipe(**call)
    assert len(stored(tmp_path)) == 2
    pipe = load(models)
    pipe.text_cache_dir = tmp_path
    pipe.models.text.model.to("meta")
    assert torch.equal(pipe(**call), expected)


def test_the_nodes_bring_the_encoder_only_for_new_prompts(kept, tmp_path, monkeypatch):
    brought = []
    host.configure(device="cpu", models_dir=tmp_path)
    real = host.current.runtime
    monkeypatch.setattr(host.current, "runtime", lambda *args: brought.append(args) or real(*args))
    try:
        first = TextEncode().encode(kept, "a dog", "a cat")[0]
        assert len(brought) == 1
        assert not list(tmp_path.iterdir())
        windows = WindowPrompts().build(kept, "a dog\na bird\n", "a cat")[0]
        assert len(brought) == 2
        again = TextEncode().encode(kept, "a bird", "a cat")[0]
        assert len(brought) == 2
        assert torch.equal(windows[0].text, first.text)
        assert torch.equal(windows[1].text, again.text)
        assert [tuple(cond.negative_text.shape) for cond in windows] == [(1, 512, 64)] * 2
        TextEncode().encode(kept, "a tree", "a cat", cache_on_disk=True)
        assert len(stored(host.current.prompts_dir())) == 1
        assert host.current.prompts_dir().is_relative_to(tmp_path)
    finally:
        host.configure()
