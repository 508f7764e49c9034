"""GGUF files that are written: what is in them, that they load as they were made, that nothing is overwritten."""

import io
import os
import subprocess

import gguf
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from tests.comfyui import comfyui
from tests.loading import ggufs
from tests.loading.test_formats import velocity
from tests.reference import relative_error, tiny_dit, tiny_text_encoder, tiny_vae
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build, inspect, spiece_model
from wan_core.loading.names import SPIECE_MODEL
from wan_core.loading.save import save_plain
from wan_core.loading.save_gguf import MADE_TYPES, save_gguf
from wan_core.loading.state_dict import load_state_dict
from wan_core.loading.tensor_files import CheckpointError
from wan_core.loading.vocabulary import Vocabulary
from wan_core.model_files import has_tokenizer, load_text_encoder
from wan_core.offload.quant import big_linears
from wancore.headless.cli import main


@pytest.fixture
def dit(tmp_path):
    save_file({name: t.bfloat16() for name, t in tiny_dit("vace").state_dict().items()}, tmp_path / "dit.safetensors")
    return detect_files(tmp_path / "dit.safetensors")


STEPS = {"Q8_0": 254, "Q5_1": 31, "Q5_0": 31, "Q4_1": 15, "Q4_0": 15}
"""Steps between the ends of a block's numbers, for types with a minimum; from the largest number to its opposite for
those without one."""


@pytest.mark.parametrize("kind", MADE_TYPES)
def test_a_file_holds_what_the_package_makes_of_the_weights(dit, kind, tmp_path):
    path = save_gguf(dit, tmp_path / "new" / "dit.gguf", kind)
    original, linears = load_file(dit.header.files[0]), big_linears(tiny_dit("vace"))
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "wan"
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    assert [tensor.name for tensor in reader.tensors] == list(dit.sources)
    for tensor in reader.tensors:
        weight, is_big = original[tensor.name], tensor.name.removesuffix(".weight") in linears
        assert tuple(map(int, tensor.shape[::-1])) == tuple(weight.shape)
        exact = weight.ndim in (1, 5) or weight.numel() <= 1024 or tensor.name.endswith("modulation")
        assert tensor.tensor_type == (Type[kind] if is_big else Type.F32 if exact else Type.BF16)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(weight.shape))
        if not is_big:
            assert torch.equal(torch.from_numpy(values.copy()), weight.float())
            continue
        # Half a step, or a whole one where the largest of 2^n numbers has no opposite, and the rounding of scales.
        blocks = weight.float().unflatten(1, (-1, 32))
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        reach = high - low if kind.endswith("1") else 2 * torch.maximum(high, -low)
        step = reach / STEPS[kind] * (0.51 if kind.endswith("1") or kind == "Q8_0" else 1.02)
        assert (torch.from_numpy(values).unflatten(1, (-1, 32)) - blocks).abs().le(step + 0.001 * reach).all()
    held = build(inspect(path, "dit"), dtype=torch.float32)
    plain = build(dit, dtype=torch.float32)
    # Each step's error is uniform; the layers' errors are independent and none is amplified.
    assert relative_error(velocity(held), velocity(plain)) < 4.2 / STEPS[kind] / 12**0.5 * len(linears) ** 0.5


CITY96 = "WANCORE_COMFYUI_GGUF"
"""Names a clone of city96/ComfyUI-GGUF."""

READER = """
import sys, types

comfyui, clone, *files = sys.argv[1:]
sys.path.insert(0, comfyui)
import comfy.cli_args
comfy.cli_args.args.cpu = True
sys.modules["city96"] = types.ModuleType("city96")
sys.modules["city96"].__path__ = [clone]
import torch
from city96.dequant import dequantize_tensor
from city96.loader import gguf_sd_loader
from safetensors.torch import save_file

for file in files:
    tensors, architecture = gguf_sd_loader(file, return_arch=True)
    assert architecture == "wan"
    plain = {name: dequantize_tensor(tensor, torch.float32, torch.float32) for name, tensor in tensors.items()}
    save_file({name: tensor.as_subclass(torch.Tensor).contiguous() for name, tensor in plain.items()}, file + ".read")
"""


def test_city96s_own_code_reads_the_same_numbers(dit, tmp_path):
    """Every weight of every type, bit for bit what we make of the file."""
    if not os.environ.get(CITY96):
        pytest.skip(f"{CITY96} names no clone of city96/ComfyUI-GGUF")
    host, files = comfyui(), [save_gguf(dit, tmp_path / f"{kind}.gguf", kind) for kind in MADE_TYPES]
    command = [host.python, "-c", READER, str(host.folder), os.environ[CITY96], *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in files:
        theirs, ours = load_file(f"{file}.read"), load_state_dict(file)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name].view(tensor.shape), tensor.float()) for name, tensor in ours.items())


def test_a_file_of_the_same_type_keeps_its_bytes_and_others_are_rounded_anew(dit, tmp_path):
    first = save_gguf(dit, tmp_path / "first.gguf", "Q5_1")
    again = save_gguf(detect_files(first), tmp_path / "again.gguf", "Q5_1")
    assert first.read_bytes() == again.read_bytes()
    ggufs.write(tmp_path / "k.gguf", tiny_dit().state_dict(), ggufs.types(Type.Q6_K))
    mixed = detect_files(save_gguf(detect_files(tmp_path / "k.gguf"), tmp_path / "mixed.gguf", "Q8_0"))
    assert mixed.quantised == "GGUF Q8_0"
    for path, layer in big_linears(build(mixed, dtype=torch.float32)).items():
        before = build(detect_files(tmp_path / "k.gguf"), dtype=torch.float32).get_submodule(path).dequantised()
        assert 0 < relative_error(layer.dequantised(), before) < 0.02
        break


def test_other_formats_are_made_of_it(dit, tmp_path):
    packed = detect_files(save_gguf(dit, tmp_path / "dit.gguf", "Q4_1"))
    plain = detect_files(save_plain(packed, tmp_path / "plain.safetensors", torch.float32))
    ours, theirs = (build(part, dtype=torch.float32, weights="plain").state_dict() for part in (packed, plain))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_command_says_what_it_wrote(dit, tmp_path, capsys):
    source, target = str(dit.header.files[0]), tmp_path / "dit.gguf"
    assert main(["convert", source, str(target), "--gguf", "Q8_0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(str(target)) and "MB" in out and "gguf:" not in err
    assert main(["info", str(target)]) == 0
    assert "mostly GGUF Q8_0" in capsys.readouterr().out


REFUSED = {
    "another ending": ("dit", "out.safetensors", "Q8_0", r"is written as \.gguf; got the name 'out.safetensors'"),
    "a type that is not made": ("dit", "out.gguf", "Q4_K", "written as Q8_0, Q5_1, Q5_0, Q4_1, Q4_0; got 'Q4_K'"),
    "a name that is taken": ("dit", "taken.gguf", "Q8_0", "taken.gguf"),
    "a VAE": ("vae", "out.gguf", "Q8_0", "only video models and text encoders"),
    "an incomplete model": ("part", "out.gguf", "Q8_0", "1 missing: blocks.0.ffn.0.bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing_behind(name, tmp_path):
    kind, out, form, message = REFUSED[name]
    module = tiny_vae() if kind == "vae" else tiny_dit()
    tensors = {name: t for name, t in module.state_dict().items() if kind != "part" or name != "blocks.0.ffn.0.bias"}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "taken.gguf").write_bytes(b"mine")
    with pytest.raises(ValueError, match=message):
        save_gguf(detect_files(tmp_path / "model.safetensors"), tmp_path / out, form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "taken.gguf"]
    assert (tmp_path / "taken.gguf").read_bytes() == b"mine"


TEXTS = ("a cat  walks on the grass ", "ein Häuschen, １２３ ﬁne", "猫在草地上走")


@pytest.fixture(scope="module")
def spiece():
    """A small SentencePiece model of UMT5's kind: unigram, with bytes for what it does not know."""
    made = io.BytesIO()
    sentences = (f"a cat number {n} walks on the grass, ein Vogel fliegt" for n in range(200))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=made, vocab_size=350, hard_vocab_limit=False, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


def test_a_vocabulary_gives_the_tokens_of_its_sentencepiece_model(spiece):
    vocabulary = Vocabulary.of_sentencepiece(spiece)
    assert (vocabulary.padding, vocabulary.eos, vocabulary.unknown) == (0, 1, 2) and vocabulary.charsmap
    one, other = (
        sentencepiece.SentencePieceProcessor(model_proto=model) for model in (spiece, vocabulary.sentencepiece())
    )
    assert [one.encode(text) for text in TEXTS] == [other.encode(text) for text in TEXTS]
    assert Vocabulary.of_sentencepiece(vocabulary.sentencepiece()) == vocabulary


@pytest.mark.parametrize("cut", [1, 7, 100, 2000])
def test_a_damaged_sentencepiece_model(spiece, cut):
    with pytest.raises(ValueError, match="The SentencePiece model cannot be read"):
        Vocabulary.of_sentencepiece(b"\xff" + spiece[cut:])


def test_a_text_encoder_brings_its_tokenizer(spiece, tmp_path):
    tensors = dict(tiny_text_encoder().state_dict())
    save_file(
        tensors | {SPIECE_MODEL: torch.frombuffer(bytearray(spiece), dtype=torch.uint8)}, tmp_path / "t5.safetensors"
    )
    source = detect_files(tmp_path / "t5.safetensors")
    packed = inspect(save_gguf(source, tmp_path / "alone" / "t5.gguf", "Q8_0"), "text_encoder")
    assert packed.layout == "llama.cpp" and packed.header.metadata["general.architecture"] == "t5encoder"
    assert has_tokenizer(packed) and packed.quantised == "GGUF Q8_0"
    ours, theirs = (load_text_encoder(part, None, torch.float32, "cpu") for part in (packed, source))
    assert [ours.tokenizer.ids(text, 64).tolist() for text in TEXTS] == [
        theirs.tokenizer.ids(text, 64).tolist() for text in TEXTS
    ]
    for path, layer in big_linears(ours.model).items():
        assert relative_error(layer.dequantised(), theirs.model.get_submodule(path).weight) < 0.01
    plain = detect_files(save_plain(packed, tmp_path / "again.safetensors", torch.float32))
    assert spiece_model(plain.header) == spiece_model(packed.header)
    reader = gguf.GGUFReader(packed.header.files[0])
    for key in ("add_space_prefix", "remove_extra_whitespaces", "eos_token_id", "padding_token_id"):
        assert reader.get_field(f"tokenizer.ggml.{key}") is not None, "ComfyUI-GGUF asks for it"


def test_a_vocabulary_that_does_not_fit_together(tmp_path):
    fields = (
        ggufs.text("tokenizer.ggml.model") + b"\x08\0\0\0" + ggufs.text("t5"),
        ggufs.array("tokenizer.ggml.tokens", 8, 2, ggufs.text("a") + ggufs.text("b")),
        ggufs.array("tokenizer.ggml.scores", 6, 3, bytes(12)),
    )
    (tmp_path / "t5.gguf").write_bytes(ggufs.made(ggufs.tensor(), fields=fields))
    with pytest.raises(CheckpointError, match=r"t5.gguf holds a vocabulary.*it has 2 pieces, 3 scores and 0 types"):
        Vocabulary.of_gguf(tmp_path / "t5.gguf")
