"""GGUF files: types bit for bit, models in all of the layout's variants, packed in memory; damaged files refused."""

import random
import struct
import time
import tracemalloc
from functools import cache

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from tests.loading import ggufs, test_formats
from tests.loading.test_formats import CPU, dequantised, velocity
from tests.reference import load_case, relative_error, tiny_dit, tiny_text_encoder
from wan_core.inspection import report
from wan_core.loading.detect import detect_files, join_vace
from wan_core.loading.load import build, inspect
from wan_core.loading.state_dict import load_state_dict
from wan_core.loading.tensor_files import CheckpointError, TensorFiles, read_header
from wan_core.offload import formats
from wan_core.offload.formats import PACKED
from wan_core.offload.quant import QuantisedLinear, big_linears, quantised_layers
from wan_core.offload.streaming import place
from wan_core.offload.weights import WeightProvider

BLOCKS = load_case("gguf_blocks")


@cache
def weights(variant="t2v"):
    return dict(tiny_dit(variant).state_dict())


EVERY_TYPE = (*map(Type.__getitem__, PACKED), Type.F16, Type.BF16)


def every_type(name, tensor):
    """All types in turn."""
    kind = EVERY_TYPE[sum(map(ord, name)) % len(EVERY_TYPE)]
    return kind if ggufs.big(name, tensor) else ggufs.types(Type.Q8_0, Type.F16)(name, tensor)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("chunk", [1, formats.CHUNK])
def test_packed_numbers_are_bit_for_bit_those_of_the_reference(name, chunk, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", chunk * PACKED[name].packing.numbers)
    raw, values = BLOCKS[f"{name}_raw"], BLOCKS[name]
    form = PACKED[name]
    assert torch.equal(form.dequantise(raw, None), values)
    assert torch.equal(form.dequantise(raw, None, torch.bfloat16), values.bfloat16())
    assert torch.equal(form.rows(raw, None, 1, 3), values[1:3])
    assert form.weight_shape(tuple(raw.shape)) == form.dequantise(raw.to("meta"), None).shape == values.shape


def test_all_types_are_read_from_a_file(tmp_path):
    kinds = {name: Type[name] for name in (*PACKED, "BF16")}
    tensors = {name: BLOCKS[name] for name in kinds} | {"F16": BLOCKS["Q4_0"].half(), "F32": BLOCKS["Q4_0"]}
    blocks = {name: BLOCKS[f"{name}_raw"].numpy() for name in kinds}
    writer = ggufs.gguf.GGUFWriter(tmp_path / "all.gguf", "wan")
    for name in tensors:
        kind = kinds.get(name, Type[name])
        writer.add_tensor(name, blocks.get(name, tensors[name].numpy()), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_state_dict(tmp_path / "all.gguf", torch.float32)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
    header = read_header([tmp_path / "all.gguf"])
    assert header.metadata == {"general.architecture": "wan"}
    assert header["F16"].dtype == torch.float16 and header["BF16"].dtype == torch.bfloat16
    with TensorFiles(header) as files:
        for name in header:
            assert torch.equal(files.map(name), files.read(name))


class GgufCase(test_formats.Case):
    """A tiny DiT whose big layers are of one type, as `test_formats` looks at every format."""

    def __init__(self, kind, error, folder):
        self.file, self.words, self.error = folder / f"{kind.name}.gguf", f"GGUF {kind.name}", error
        ggufs.write(self.file, weights(), ggufs.types(kind))
        self.component = detect_files(self.file)
        self.plain = build(self.component, dtype=torch.float32, weights="plain")
        self.held = build(self.component, dtype=torch.bfloat16)


UNIFORM = {Type.Q8_0: 0.01, Type.Q4_0: 0.15}
"""Relative error of normal numbers: a step over the root of 12. 254 or 16 steps reach from the largest of 32 numbers to
its opposite, about 4.2 standard deviations; doubled for blocks of other ranges."""


@pytest.mark.parametrize("kind", UNIFORM, ids=lambda kind: kind.name)
def test_a_file_of_one_type_does_all_that_other_formats_do(kind, tmp_path):
    case = GgufCase(kind, UNIFORM[kind], tmp_path)
    test_formats.test_it_stays_as_it_is_stored_and_stands_for_the_weights_of_the_model(case)
    test_formats.test_it_streams_and_rests_on_disk_at_its_bytes(case)
    test_formats.test_fp8_is_made_of_it_on_request_and_files_are_written(case, tmp_path)
    test_formats.test_a_lora_works_beside_it(case, tmp_path)
    test_formats.test_a_lora_is_written_into_it(case, tmp_path)
    error = relative_error(velocity(build(case.component, dtype=torch.float32)), velocity(tiny_dit()))
    # The errors of layers are independent, and none is amplified on its way to the output.
    layers = len(big_linears(case.held))
    assert UNIFORM[kind] / 50 < error < UNIFORM[kind] * layers**0.5
    tensors = load_state_dict(case.file)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in case.plain.state_dict().items())


@pytest.mark.parametrize("variant", ["t2v", "vace"])
def test_types_are_mixed_within_a_file(variant, tmp_path):
    """Streamed, resident and from disk, with the K and IQ types: the bits of the same weights in a safetensors file."""
    values = ggufs.write(tmp_path / "mixed.gguf", weights(variant), every_type)
    save_file(values, tmp_path / "plain.safetensors")
    component, plain = detect_files(tmp_path / "mixed.gguf"), detect_files(tmp_path / "plain.safetensors")
    assert component.config == plain.config
    wide, held = build(plain, dtype=torch.float32), build(component, dtype=torch.float32)
    mapped = build(component, dtype=torch.float32, mapped=True)
    kinds = {layer.words for layer in big_linears(held).values() if isinstance(layer, QuantisedLinear)}
    assert len(kinds) > (5 if variant == "t2v" else 8) and set(component.quantised.split(" and ")) == kinds
    for path, layer in quantised_layers(held).items():
        assert layer.weight.dtype == torch.uint8 and layer.weight.nbytes < 2 * layer.in_features * layer.out_features
        assert torch.equal(layer.dequantised(), wide.get_parameter(f"{path}.weight"))
    # All by PyTorch's own product.
    expected = velocity(dequantised(build(component, dtype=torch.float32)))
    assert relative_error(expected, velocity(wide)) < 1e-5
    for module in (held, mapped):
        inventory = WeightProvider.of(module).inventory()
        assert inventory.bytes < WeightProvider.of(wide).inventory().bytes / 2
        for placement in (place(inventory), place(inventory, 0)):
            with WeightProvider.of(module).working(CPU, placement):
                assert torch.equal(velocity(module), expected)


def prefixed(tensors):
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def squeezed(tensors):
    """As ggml stores them: without outermost axes of 1."""
    return {name: tensor[0] if tensor.ndim == 3 else tensor for name, tensor in tensors.items()}


VARIANTS = {
    "ComfyUI's prefix": ("t2v", prefixed, "wan"),
    "no architecture": ("t2v", dict, None),
    "another converter": ("t2v", prefixed, "pig"),
    "axes of 1 dropped": ("flf2v", squeezed, "wan"),
    "axes of 1 dropped, VACE": ("vace", squeezed, "wan"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layouts_of_converters(name, tmp_path):
    variant, change, arch = VARIANTS[name]
    ggufs.write(tmp_path / "dit.gguf", change(weights(variant)), ggufs.types(Type.F16, Type.F16), arch)
    save_file({name: t.half() for name, t in weights(variant).items()}, tmp_path / "dit.safetensors")
    found, expected = (inspect(tmp_path / f"dit.{end}", "dit") for end in ("gguf", "safetensors"))
    assert found.config == expected.config and "variant" in str(report(tmp_path / "dit.gguf"))
    ours, theirs = (build(part, dtype=torch.float16, mapped=True).state_dict() for part in (found, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].half(), theirs[name].half()) for name in ours)


def test_tensors_that_a_converter_stored_in_another_shape(tmp_path):
    tensors, changed = weights(), dict(weights())
    patch, row, other = "patch_embedding.weight", "blocks.0.ffn.0.weight", "blocks.1.ffn.2.weight"
    changed[patch] = changed[patch].reshape(-1, 256)
    changed[row], changed[other] = changed[row].reshape(-1, 1024), changed[other].reshape(4, 64, 512)
    shapes = {name: tuple(tensors[name].shape) for name in (patch, row, other)}

    def choose(name, tensor):
        return Type.Q8_0 if name in shapes else Type.F32

    values = ggufs.write(tmp_path / "dit.gguf", changed, choose, shapes=shapes)
    module = build(inspect(tmp_path / "dit.gguf", "dit"), dtype=torch.float32)
    assert torch.equal(module.patch_embedding.weight, values[patch].reshape(shapes[patch]))
    assert isinstance(module.blocks[0].ffn[0], QuantisedLinear)
    assert torch.equal(module.blocks[0].ffn[0].dequantised(), values[row].reshape(shapes[row]))
    assert torch.equal(module.blocks[1].ffn[2].dequantised(), values[other].reshape(shapes[other]))


def test_rows_that_are_no_whole_blocks(tmp_path):
    """A convolution with a kernel of 2 x 2 has rows of two numbers: it is dequantised when it is loaded."""
    changed = dict(weights())
    linear = "blocks.0.ffn.0.weight"
    changed[linear] = changed[linear].reshape(512, 8, 32)
    changed["patch_embedding.weight"] = changed["patch_embedding.weight"].reshape(-1, 64)
    shapes = {"patch_embedding.weight": tuple(weights()["patch_embedding.weight"].shape), linear: (512, 256)}

    def choose(name, tensor):
        return Type.Q5_0 if name in shapes else Type.F32

    values = ggufs.write(tmp_path / "dit.gguf", changed, choose, shapes=shapes)
    module = build(inspect(tmp_path / "dit.gguf", "dit"), dtype=torch.float32)
    for name, shape in shapes.items():
        layer = module.get_submodule(name.removesuffix(".weight"))
        weight = layer.dequantised() if isinstance(layer, QuantisedLinear) else layer.weight
        assert torch.equal(weight, values[name].reshape(shape))


@pytest.mark.parametrize(("variant", "lost"), [("t2v", "patch_embedding"), ("vace", "vace_patch_embedding")])
def test_a_file_whose_5d_tensors_were_not_put_back_says_so(variant, lost, tmp_path):
    tensors = {name: tensor for name, tensor in weights(variant).items() if name != f"{lost}.weight"}
    ggufs.write(tmp_path / "unfixed.gguf", tensors)
    with pytest.raises(CheckpointError, match=rf"unfixed.gguf.*lacks the tensor '{lost}.weight'.*fix_5d_tensors.py"):
        detect_files(tmp_path / "unfixed.gguf")


def test_a_vace_branch_and_its_base_may_be_of_different_formats(tmp_path):
    tensors = weights("vace")
    branch = {name: tensor for name, tensor in tensors.items() if name.startswith("vace_")}
    ggufs.write(tmp_path / "branch.gguf", squeezed(branch))
    save_file({name: t for name, t in tensors.items() if name not in branch}, tmp_path / "base.safetensors")
    whole = join_vace(inspect(tmp_path / "base.safetensors", "dit"), inspect(tmp_path / "branch.gguf", "vace"))
    assert build(whole, dtype=torch.float32).vace_blocks[0].ffn[0].words == "GGUF Q8_0"


LLAMA_CPP = {
    "token_embedding": "token_embd", "norm": "enc.output_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
    "pos_embedding.embedding": "attn_rel_b", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v",
    "attn.o": "attn_o", "ffn.gate.0": "ffn_gate", "ffn.fc1": "ffn_up", "ffn.fc2": "ffn_down",
}  # fmt: skip
"""llama.cpp's names of a T5 encoder by the authors'."""


def llama_cpp(name):
    parts = name.removesuffix(".weight").split(".", 2)
    inner = LLAMA_CPP[parts[2] if parts[0] == "blocks" else ".".join(parts)]
    return f"enc.blk.{parts[1]}.{inner}.weight" if parts[0] == "blocks" else f"{inner}.weight"


def test_umt5_in_llama_cpps_names(tmp_path, one_thread):
    module = tiny_text_encoder()
    tensors = {llama_cpp(name): tensor for name, tensor in module.state_dict().items()}
    values = ggufs.write(tmp_path / "umt5.gguf", tensors, ggufs.types(Type.Q8_0), "t5encoder")
    component = inspect(tmp_path / "umt5.gguf", "text_encoder")
    held = build(component, dtype=torch.float32)
    assert {layer.words for layer in big_linears(held).values()} == {"GGUF Q8_0"}
    for name, weight in build(component, dtype=torch.float32, weights="plain").state_dict().items():
        assert torch.equal(weight, values[llama_cpp(name)])
    ids, mask = torch.arange(1, 7)[None], torch.ones(1, 6, dtype=torch.bool)
    plain = build(component, dtype=torch.float32, weights="plain")
    assert torch.equal(held(ids, mask), plain(ids, mask))
    assert relative_error(held(ids, mask), module(ids, mask)) < 0.05


MANY = 2**62
BAD = {
    "nothing after the mark": (b"GGUF", "truncated or damaged: its header goes on"),
    "cut within the counts": (ggufs.made()[:20], "truncated or damaged"),
    "version 1": (ggufs.made(version=1), "of version 1"),
    "big-endian": (ggufs.made(version=3 << 24), "of a big-endian machine"),
    "many tensors": (ggufs.made(counts=(MANY, 0)), f"claims {MANY} tensors"),
    "more tensors than there are": (ggufs.made(ggufs.tensor(), counts=(2, 0), data=0), "truncated or damaged"),
    "many fields": (ggufs.made(counts=(0, MANY)), "occur twice|truncated or damaged|metadata of the type"),
    "a long name": (ggufs.made(struct.pack("<Q", MANY), counts=(1, 0)), f"a name in it has {MANY} bytes"),
    "a name that is no text": (ggufs.made(struct.pack("<Q", 1) + b"\xff" + bytes(40), counts=(1, 0)), "utf-8"),
    "a name twice": (ggufs.made(ggufs.tensor(), ggufs.tensor()), "'a' occurs twice"),
    "a key twice": (ggufs.made(fields=(ggufs.number("k", 1), ggufs.number("k", 2))), "'k' occur twice"),
    "many axes": (ggufs.made(ggufs.tensor(axes=(1,) * 9)), "'a' has 9 axes; 8 is the most"),
    "very many axes": (ggufs.made(ggufs.text("a") + struct.pack("<I", 2**32 - 1)), "axes; 8 is the most"),
    "a shape that no file holds": (ggufs.made(ggufs.tensor(axes=(2**40, 2**40))), "which no file can hold"),
    "a shape whose product overflows": (ggufs.made(ggufs.tensor(axes=(2**63, 2, 2))), "which no file can hold"),
    "rows of half a block": (ggufs.made(ggufs.tensor(axes=(48, 2), kind=8)), "no blocks of Q8_0"),
    "packed numbers without axes": (ggufs.made(ggufs.tensor(axes=(), kind=8)), "no blocks of Q8_0"),
    "an unread type": (ggufs.made(ggufs.tensor(axes=(256,), kind=17)), "stores tensors as IQ2_XS, which is not read"),
    "an unknown type": (ggufs.made(ggufs.tensor(kind=999)), "stores tensors as type 999"),
    "an offset after the end": (ggufs.made(ggufs.tensor(offset=2**62)), "is truncated: it has"),
    "an offset between": (ggufs.made(ggufs.tensor(offset=8)), "does not begin after"),
    "tensors over each other": (ggufs.made(ggufs.tensor(), ggufs.tensor("b")), "does not begin after"),
    "short of data": (ggufs.made(ggufs.tensor(), data=127), "is truncated: it has 191 bytes, its header says 192"),
    "no alignment": (ggufs.made(ggufs.tensor(), fields=(ggufs.number("general.alignment", 0),)), "alignment is 0"),
    "an odd alignment": (ggufs.made(fields=(ggufs.number("general.alignment", 48),)), "alignment is 48"),
    "a huge alignment": (ggufs.made(fields=(ggufs.number("general.alignment", 2**31),)), "alignment is 2147483648"),
    "an array without end": (ggufs.made(fields=(ggufs.array("k", 4, MANY),)), "truncated or damaged"),
    "texts without end": (ggufs.made(fields=(ggufs.array("k", 8, MANY),), data=4096), "truncated or damaged"),
    "an array of arrays": (ggufs.made(fields=(ggufs.array("k", 9, 2, bytes(64)),)), "an array of the type 9"),
    "metadata of no type": (ggufs.made(fields=(ggufs.text("k") + struct.pack("<I", 77),)), "metadata of the type 77"),
    "another shape": (
        ggufs.made(ggufs.tensor(), fields=(ggufs.array("comfy.gguf.orig_shape.a", 5, 1, struct.pack("<i", 31)),)),
        r"has the shape \[32\], and metadata that call it \[31\]",
    ),
    "a negative shape": (
        ggufs.made(ggufs.tensor(), fields=(ggufs.array("comfy.gguf.orig_shape.a", 5, 2, struct.pack("<2i", -4, -8)),)),
        r"metadata that call it \[-4, -8\]",
    ),
    "a shape of texts": (
        ggufs.made(ggufs.tensor(), fields=(ggufs.array("comfy.gguf.orig_shape.a", 8, 1, ggufs.text("32")),)),
        "a shape in the metadata is",
    ),
    "no tensors": (ggufs.made(), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_damaged_files(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / "bad.gguf").write_bytes(content)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        with pytest.raises(CheckpointError, match=message) as error:
            detect_files(tmp_path / "bad.gguf")
        assert tracemalloc.get_traced_memory()[1] < 50e6 and time.perf_counter() - begin < 20
    finally:
        tracemalloc.stop()
    assert "bad.gguf" in str(error.value)


@pytest.mark.parametrize("seed", range(2))
def test_no_damage_of_the_header_does_more_than_raise_the_clear_error(seed, tmp_path):
    """Bytes changed, cut and repeated: a file is refused, or read within itself."""
    whole, draw, file = tmp_path / "whole.gguf", random.Random(seed), tmp_path / "damaged.gguf"
    some = {name: tensor for name, tensor in weights().items() if name.startswith(("blocks.0.", "head"))}
    ggufs.write(whole, some, shapes={"head.head.weight": tuple(some["head.head.weight"].shape)})
    content = whole.read_bytes()
    header = min(info.offset for info in read_header([whole]).values())
    refused = 0
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(header)
            size = draw.choice((1, 1, 4, 8))
            changes = (bytes(size), b"\xff" * size, draw.randbytes(size), b"", bytes(2 * size))
            changed[at : at + size] = draw.choice(changes)
        file.write_bytes(changed[: draw.randrange(len(changed))] if draw.random() < 0.2 else changed)
        try:
            found = read_header([file])
            with TensorFiles(found) as files:
                assert all(files.read(name).nbytes == info.nbytes for name, info in found.items())
        except CheckpointError as error:
            refused += 1
            assert "damaged.gguf" in str(error)
    assert refused > 25


def test_a_header_of_a_large_vocabulary_is_read_in_a_moment(tmp_path):
    count = 256_384
    texts = b"".join(map(ggufs.text, map("▁word{}".format, range(count))))
    fields = (ggufs.array("tokenizer.ggml.tokens", 8, count, texts), ggufs.array("scores", 6, count, bytes(4 * count)))
    (tmp_path / "v.gguf").write_bytes(ggufs.made(ggufs.tensor("x"), fields=fields))
    begin = time.perf_counter()
    assert read_header([tmp_path / "v.gguf"])["x"].shape == (32,)
    assert time.perf_counter() - begin < 20
