"""Formats of quantised weights: read as they are stored, held, streamed and planned at their bytes, under LoRAs."""

import json
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference import relative_error, tiny_dit
from wan_core.inspection import report as info
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.loading.save import save_plain, save_quantised
from wan_core.loading.tensor_files import CheckpointError
from wan_core.lora.convert import fuse
from wan_core.model_files import DiTSettings, load_dit
from wan_core.offload import formats
from wan_core.offload.blocks import weights_of
from wan_core.offload.formats import EightBit, WeightFormat
from wan_core.offload.quant import QuantisedLinear, big_linears, quantised_layers, replace_layer, weight_shapes
from wan_core.offload.streaming import place
from wan_core.offload.weights import WeightProvider
from wan_core.planning.modules import SizedModule
from wan_core.types import Conditioning

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def blocks(weight, rows, columns, peak):
    """A scale for each block of rows x columns of `weight`, and the scale of every number."""
    out, width = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -width % columns, 0, -out % rows))
    cells = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = cells.amax((1, 3)) / peak
    return scale, scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :width]


def per_row(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def mark(**entry):
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def block_fp8(layer, weight):
    scale, whole = blocks(weight, 128, 128, 448)
    return {f"{layer}.weight": (weight / whole).to(FP8), f"{layer}.weight_scale_inv": scale}


def block_int8(layer, weight):
    scale, whole = blocks(weight, 128, 128, 127)
    return {f"{layer}.int8_weight": (weight / whole).round().to(torch.int8), f"{layer}.scale": scale}


def group_int8(layer, weight):
    scale, whole = blocks(weight, 1, 32, 127)
    mark_ = mark(format="int8_blockwise", group_size=32)
    return {f"{layer}.weight": (weight / whole).round().to(torch.int8), f"{layer}.weight_scale": scale,
            f"{layer}.comfy_quant": mark_}  # fmt: skip


def comfy_int8(layer, weight):
    numbers, scale = per_row(weight)
    mark_ = mark(format="int8_tensorwise", per_row=True)
    return {f"{layer}.weight": numbers, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": mark_}


def one_int8(layer, weight):
    scale = weight.abs().amax() / 127
    return {f"{layer}.int8_weight": (weight / scale).round().to(torch.int8), f"{layer}.scale": scale.reshape(1)}


def quanto_int8(layer, weight):
    numbers, scale = per_row(weight)
    ones = {f"{layer}.{name}_scale": torch.ones(()) for name in ("input", "output")}
    return {f"{layer}.weight._data": numbers, f"{layer}.weight._scale": scale, **ones}


def quanto_fp8(layer, weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {f"{layer}.weight._data": (weight / scale).to(FP8), f"{layer}.weight._scale": scale}


def llm_int8(layer, weight):
    peak = weight.abs().amax(1)
    numbers = (weight / peak[:, None] * 127).round().to(torch.int8)
    beside = torch.zeros((), dtype=torch.uint8)
    return {f"{layer}.weight": numbers, f"{layer}.SCB": peak, f"{layer}.weight_format": beside}


KINDS = {
    "block FP8": (block_fp8, "FP8, a scale per block of 128x128", 0.05),
    "block int8": (block_int8, "int8, a scale per block of 128x128", 0.02),
    "int8 in groups": (group_int8, "int8, a scale per block of 1x32", 0.02),
    "ComfyUI int8": (comfy_int8, "int8, a scale per row", 0.02),
    "TurboDiffusion int8": (one_int8, "int8, a scale per tensor", 0.03),
    "quanto int8": (quanto_int8, "int8, a scale per row", 0.02),
    "quanto FP8": (quanto_fp8, "FP8, a scale per row", 0.05),
    "LLM.int8": (llm_int8, "int8, a scale per row", 0.02),
}


def stored(make, variant="t2v"):
    """The tensors of a tiny DiT whose big layers `make` writes."""
    module = tiny_dit(variant)
    tensors = dict(module.state_dict())
    for path in big_linears(module):
        tensors |= make(path, tensors.pop(f"{path}.weight"))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


class Case:
    """A file in one format, what it is called, and the same weights in the compute dtype."""

    def __init__(self, make, words, error, folder):
        self.file, self.words, self.error = folder / f"{make.__name__}.safetensors", words, error
        save_file(stored(make), self.file)
        self.component = detect_files(self.file)
        self.plain = build(self.component, dtype=torch.float32, weights="plain")
        self.held = build(self.component, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    return Case(*KINDS[request.param], tmp_path_factory.mktemp("formats"))


one_of_each = pytest.mark.parametrize("case", ["block FP8", "ComfyUI int8", "block int8"], indirect=True)


@cache
def original():
    return tiny_dit()


def velocity(dit, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 1, 4, 4, generator=draw), torch.randn(1, 5, 64, generator=draw)
    with torch.no_grad():
        return dit(latents.to(dtype), torch.tensor([500.0]), Conditioning(text=text)).float()


def test_it_stays_as_it_is_stored_and_stands_for_the_weights_of_the_model(case):
    assert case.component.quantised == case.words and case.words in str(info(case.file))
    layers, wide, weights = (big_linears(module) for module in (case.held, case.plain, original()))
    for path, layer in layers.items():
        assert isinstance(layer, QuantisedLinear) and layer.weight.dtype.itemsize == 1 and layer.words == case.words
        assert torch.equal(layer.dequantised(), wide[path].weight)
        assert relative_error(wide[path].weight, weights[path].weight) < case.error
        assert torch.equal(layer.rows(100, 131), wide[path].weight[100:131])
    assert relative_error(velocity(case.held, torch.bfloat16), velocity(case.plain)) < 0.02


@one_of_each
def test_it_streams_and_rests_on_disk_at_its_bytes(case):
    mapped = build(case.component, dtype=torch.bfloat16, mapped=True)
    expected = velocity(case.held, torch.bfloat16)
    inventory = WeightProvider.of(case.held).inventory()
    assert (
        SizedModule.planned(case.component, torch.bfloat16).inventory
        == inventory
        == WeightProvider.of(mapped).inventory()
    )
    assert inventory.bytes < sum(t.nbytes for t in weights_of(case.plain).values()) / 2 * 0.75
    assert {f"{path}.weight" for path in big_linears(mapped)} <= WeightProvider.of(mapped).mapped
    placement = place(inventory, 0)
    assert len(placement.streamed) == len(inventory.blocks)
    for module in (case.held, mapped):
        before = {name: tensor.clone() for name, tensor in weights_of(module).items()}
        with WeightProvider.of(module).working(CPU, placement) as stream:
            assert torch.equal(velocity(module, torch.bfloat16), expected)
            assert stream.copied >= placement.streamed_bytes
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(module).items())


@one_of_each
def test_prefixes_and_pickles_change_nothing(case, tmp_path):
    tensors = {f"model.diffusion_model.{k}": t for k, t in load_file(case.file).items()}
    torch.save({"state_dict": tensors}, tmp_path / "model.pth")
    other = detect_files(tmp_path / "model.pth")
    assert (other.config, other.quantised) == (case.component.config, case.words)
    ours, theirs = case.held.state_dict(), build(other, dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@one_of_each
def test_fp8_is_made_of_it_on_request_and_files_are_written(case, tmp_path):
    eight, wide = build(case.component, dtype=torch.bfloat16, weights="fp8"), big_linears(case.plain)
    for path, layer in big_linears(eight).items():
        assert layer.weight.dtype == FP8
        assert relative_error(layer.dequantised(), wide[path].weight) < 0.04
    after = build(detect_files(save_plain(case.component, tmp_path / "p.safetensors", torch.float32)), dtype=None)
    assert all(torch.equal(tensor, case.plain.state_dict()[name]) for name, tensor in after.state_dict().items())
    fp8 = detect_files(save_quantised(case.component, tmp_path / "f.safetensors"))
    assert fp8.quantised == "FP8, a scale per tensor"


@one_of_each
def test_a_lora_works_beside_it(case, tmp_path):
    model = load_dit(case.component, DiTSettings(dtype=torch.float32), "cpu")
    draw = torch.Generator().manual_seed(1)
    layer, file = "blocks.0.ffn.0", tmp_path / "style.safetensors"
    down, up = torch.randn(4, 256, generator=draw), torch.randn(512, 4, generator=draw)
    save_file({f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}, file)
    changed, text = model.with_lora(file)
    assert text.applied == (f"{layer}.weight",)
    weight = case.plain.blocks[0].ffn[0].weight
    assert text.effects[0].share == pytest.approx(((up @ down).norm() / weight.norm()).item(), rel=0.1)
    before = weight.clone()
    weight += up @ down
    expected = velocity(case.plain)
    weight.copy_(before)
    with changed.working(1, CPU):
        assert relative_error(velocity(changed.dit), expected) < 1e-5
    folded, _ = model.with_lora(file, mode="fold")
    with pytest.raises(ValueError, match="cannot be folded: the weights are quantised"), folded.working(1, CPU):
        pass


@one_of_each
def test_a_lora_is_written_into_it(case, tmp_path):
    """`lora --fuse` writes the weights of the file with the change added to them."""
    draw = torch.Generator().manual_seed(1)
    layer, file = "blocks.0.ffn.0", tmp_path / "written.safetensors"
    down, up = torch.randn(4, 256, generator=draw), torch.randn(512, 4, generator=draw)
    save_file({f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}, file)
    fuse([(file, 1.0)], case.file, tmp_path / "fused.safetensors", "fp32")
    expected = dict(case.plain.state_dict())
    expected[f"{layer}.weight"] = expected[f"{layer}.weight"] + up @ down
    fused = build(detect_files(tmp_path / "fused.safetensors"), dtype=None).state_dict()
    assert all(relative_error(tensor, expected[name]) < 1e-6 for name, tensor in fused.items())
    fuse([(file, 1.0)], case.file, tmp_path / "eight.safetensors")
    assert detect_files(tmp_path / "eight.safetensors").quantised == "FP8, a scale per tensor"


def extra(name, dtype=torch.uint8, shape=(4,)):
    return lambda layer, weight: {f"{layer}.{name}": torch.zeros(shape, dtype=dtype), f"{layer}.weight": weight}


def packed(layer, weight):
    return {f"{layer}.qweight": torch.zeros(len(weight), 8, dtype=torch.int32)}


UNREAD = {
    "bitsandbytes NF4": (extra("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes NF4 or FP4"),
    "NVFP4": (extra("weight_scale_2", torch.float32, ()), "NVFP4"),
    "MXFP8": (lambda layer, weight: {f"{layer}.weight": weight.to(FP8), f"{layer}.weight_scale":
              torch.zeros(len(weight), weight.shape[1] // 32, dtype=torch.uint8)}, "MXFP8"),
    "Nunchaku": (lambda layer, weight: packed(layer, weight) | {f"{layer}.wscales": torch.zeros(4)}, "Nunchaku"),
    "GPTQ": (packed, "GPTQ or AWQ"),
    "quanto, 4 bits": (extra("weight._data._data"), "quanto with 4 or 2 bits"),
    "torchao": (extra("_weight_qdata", torch.int8), "torchao"),
    "rotated int8": (lambda layer, weight: comfy_int8(layer, weight) | {f"{layer}.comfy_quant":
                     mark(format="int8_tensorwise", convrot=True)}, "rotated"),
    "int8 alone": (lambda layer, weight: {f"{layer}.weight": weight.to(torch.int8)}, "as int8 with no scale"),
    "odd blocks": (lambda layer, weight: {f"{layer}.weight": weight.to(FP8), f"{layer}.weight_scale":
                   torch.ones(7, 11)}, r"with a scale \[7, 11\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_named_and_not_called_damaged(name, tmp_path):
    make, message = UNREAD[name]
    save_file(stored(make), tmp_path / "model.safetensors")
    for ask in (detect_files, info):
        with pytest.raises(CheckpointError, match=message) as error:
            ask(tmp_path / "model.safetensors")
        text = str(error.value)
        assert text.startswith("model.safetensors ") and "Use the bf16, fp16, FP8 or int8 file" in text
        assert "download" not in text and "incomplete" not in text


@dataclass(frozen=True)
class Nibbles(WeightFormat):
    """Two numbers of 4 bits in a byte, times a scale per row: bytes that are no dtype's."""

    quantised: bool = True
    cast_suffices: bool = False

    def weight_shape(self, numbers):
        return numbers[0], 2 * numbers[1]

    def dequantise(self, numbers, scale, dtype=torch.float32):
        halves = torch.stack([numbers & 15, numbers >> 4], 2).flatten(1)
        return (halves.float() - 8).mul_(scale).to(dtype)


def nibbles(layer, weight):
    scale = weight.abs().amax(1, keepdim=True) / 7
    numbers = ((weight / scale).round() + 8).to(torch.uint8)
    return {f"{layer}.weight": numbers[:, ::2] | numbers[:, 1::2] << 4, f"{layer}.weight_scale": scale}


GROUP, GROUP_BYTES = 32, 18
"""Weights of a group, and its bytes: a float16 scale and 16 bytes of two weights each, as GGUF's Q4_0 has them."""


@dataclass(frozen=True)
class Groups(WeightFormat):
    """Groups of 4-bit numbers with their scales among them: the bytes of a row are numbers of no dtype."""

    quantised: bool = True
    cast_suffices: bool = False

    def recognises(self, info):
        return info.dtype == torch.uint8 and len(info.shape) == 2 and info.shape[1] % GROUP_BYTES == 0

    def weight_shape(self, numbers):
        return numbers[0], numbers[1] // GROUP_BYTES * GROUP

    def dequantise(self, numbers, scale, dtype=torch.float32):
        groups = numbers.unflatten(1, (-1, GROUP_BYTES))
        packed = groups[..., 2:]
        fours = torch.cat([packed & 15, packed >> 4], -1).float() - 8
        return fours.mul_(groups[..., :2].contiguous().view(torch.float16).float()).flatten(1).to(dtype)


def groups(layer, weight):
    fours = weight.unflatten(1, (-1, GROUP))
    scale = (fours.abs().amax(-1, keepdim=True) / 7).half()
    fours = ((fours / scale.float()).round().clamp(-8, 7) + 8).to(torch.uint8)
    packed = fours[..., : GROUP // 2] | fours[..., GROUP // 2 :] << 4
    return {f"{layer}.weight": torch.cat([scale.view(torch.uint8), packed], -1).flatten(1)}


def dequantised(module):
    """`module` with plain layers in the place of its quantised ones, of the weights that these stand for."""
    for path, layer in quantised_layers(module).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, device="meta").requires_grad_(False)
        plain.load_state_dict({"weight": layer.dequantised(), "bias": layer.bias}, assign=True)
        replace_layer(module, path, plain.eval())
    return module


FURTHER = {
    "two numbers in a byte": (Nibbles("4 bits", (torch.uint8,)), nibbles, "4 bits, a scale per row", 0.3, (7, 8)),
    "groups": (Groups("4 bits in groups", ()), groups, "4 bits in groups", 0.2, (6.5, 4 * GROUP / GROUP_BYTES)),
}
"""A row of `FORMATS`, what writes it, its words, its error, and how many times smaller a block of float32 gets."""


@pytest.mark.parametrize("name", FURTHER)
def test_a_further_format_is_one_more_row(name, tmp_path, monkeypatch):
    """Bytes of no dtype load, plan, stream, stay on disk, carry LoRAs and are saved with a row of FORMATS alone."""
    row, make, words, error, (least, most) = FURTHER[name]
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, row))
    case = Case(make, words, error, tmp_path)
    layers = big_linears(case.held)
    assert all(layer.weight.nbytes < layer.in_features * layer.out_features for layer in layers.values())
    assert weight_shapes(case.held) == {name: source.shape for name, source in case.component.sources.items()}
    four, whole = (WeightProvider.of(module).inventory() for module in (case.held, case.plain))
    block = "blocks.0"
    assert least < whole.blocks[block].bytes / four.blocks[block].bytes < most
    scales = [layer.scale for path, layer in layers.items() if path.startswith(f"{block}.")]
    beside = sum(scale.numel() for scale in scales if scale is not None)
    assert four.blocks[block].parameters == whole.blocks[block].parameters + beside
    exact = build(case.component, dtype=torch.float32)
    got = velocity(exact)
    assert torch.equal(got, velocity(dequantised(exact)))
    test_it_stays_as_it_is_stored_and_stands_for_the_weights_of_the_model(case)
    test_it_streams_and_rests_on_disk_at_its_bytes(case)
    test_a_lora_works_beside_it(case, tmp_path)
    test_a_lora_is_written_into_it(case, tmp_path)
    test_fp8_is_made_of_it_on_request_and_files_are_written(case, tmp_path)


@pytest.mark.parametrize(
    ("scale", "weight", "held"),
    [
        ((), (300, 200), (1, 1)), ((1,), (300, 200), (1, 1)), ((300,), (300, 200), (300, 1)),
        ((300, 1), (300, 200), (300, 1)), ((3, 2), (300, 200), (3, 2)), ((300, 25), (300, 200), (300, 25)),
        ((3, 9), (300, 200), None), ((200,), (300, 200), None), ((1, 300), (300, 200), None),
    ],
)  # fmt: skip
def test_scales_by_shape(scale, weight, held):
    assert EightBit("x", ()).scale_shape(scale, weight) == held


@pytest.mark.parametrize("side", [(300, 200), (256, 256), (1, 130)])
def test_blocks_that_end_before_their_weight_does(side):
    weight = torch.randn(*side, generator=torch.Generator().manual_seed(0))
    scale, whole = blocks(weight, 128, 128, 448)
    numbers = (weight / whole).to(FP8)
    assert torch.equal(formats.FP8.dequantise(numbers, scale), numbers.float() * whole)
    end = side[0] - side[0] // 3
    assert torch.equal(formats.FP8.rows(numbers, scale, end // 2, end), (numbers.float() * whole)[end // 2 : end])
