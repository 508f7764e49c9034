"""FP8 layers: their numbers, their gradients, what they cost, and products in FP8."""

import pytest
import torch
from torch import nn

from tests.reference import relative_error, tiny_dit, tiny_image_encoder, tiny_text_encoder
from wan_core.models.ops import Linear
from wan_core.offload import formats, quant
from wan_core.offload.blocks import weight_bytes
from wan_core.offload.formats import FP8_DTYPES, FP8_MAX
from wan_core.offload.formats import FP8_MADE as FP8
from wan_core.offload.quant import QuantisedLinear, big_linears, quantise, to_fp8
from wan_core.types import Conditioning, VaceInput

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(dtype=torch.float32, bias=True, n=256, m=512):
    linear = nn.Linear(n, m, bias).requires_grad_(False)
    linear.weight.copy_(normal(m, n) * 0.02)
    return linear.to(dtype)


def test_rows_use_the_whole_range_and_zero_rows_stay_zero():
    weight = normal(6, 64) * torch.tensor([1e-30, 1e-3, 1, 100, 1e30, 0])[:, None]
    stored, scale = to_fp8(weight)
    assert (stored.dtype, scale.dtype, scale.shape) == (FP8, torch.float32, (6, 1))
    assert stored.float().abs().amax(1).tolist() == [FP8_MAX] * 5 + [0]
    assert torch.isfinite(scale).all() and not (stored.float() * scale)[5].any()
    # Half a unit in the last of 4 significant bits, and half a step below the smallest normal number.
    error = (stored.float() * scale - weight).abs()
    assert (error <= weight.abs() / 16 + scale * 2**-10).all()


@pytest.mark.parametrize("chunk", [1, 24, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_quantised_in_float32_whatever_they_are_stored_in(chunk, dtype, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK", chunk)
    weight = normal(7, 8, dtype=dtype)
    stored, scale = formats.FP8.quantise(weight)
    expected = to_fp8(weight.float())
    assert torch.equal(stored.float(), expected[0].float()) and torch.equal(scale, expected[1])
    stored, scale = formats.FP8.quantise(weight, per_row=False)
    assert scale.shape == (1, 1) and stored.float().abs().amax() == FP8_MAX
    assert relative_error(stored.float() * scale, weight) < 0.04


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_within_four_percent(dtype, bias):
    plain = layer(dtype, bias)
    x = normal(64, 256, seed=1, dtype=dtype)
    fp8 = QuantisedLinear.of(plain)
    out = fp8(x)
    assert out.dtype == dtype and 0 < relative_error(out, plain(x)) < 0.04
    assert relative_error(fp8.dequantised(), plain.weight) < 0.04
    assert fp8.state_dict().keys() == plain.state_dict().keys() | {"scale"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(512, 1), (1, 1), None])
@pytest.mark.parametrize("stored", FP8_DTYPES)
def test_the_weight_is_rounded_once(dtype, shape, stored):
    weight = normal(512, 256).to(stored)
    scale = None if shape is None else normal(*shape, seed=3).abs() * 0.01
    fp8 = QuantisedLinear(weight, scale, None, dtype)
    exact = weight.double() * (1 if scale is None else scale.double())
    assert torch.equal(fp8(torch.eye(256, dtype=dtype)).T, exact.to(dtype))
    assert torch.equal(fp8.dequantised(), exact.float())


def test_gradients_reach_the_input_and_not_the_weight():
    fp8 = QuantisedLinear.of(layer())
    x = normal(4, 256, seed=1).requires_grad_()
    fp8(x).square().sum().backward()
    plain = nn.Linear(256, 512)
    plain.weight.data, plain.bias.data = fp8.dequantised(), fp8.bias.data
    y = x.detach().clone().requires_grad_()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in fp8.parameters())


def run(dit, variant):
    size = (3, 8, 8)
    vace = (VaceInput(context=normal(1, 96, *size, seed=4)),) if variant == "vace" else None
    cond = Conditioning(
        text=normal(1, 7, 64, seed=2),
        concat=normal(1, 20, *size, seed=3) if variant == "i2v" else None,
        image_tokens=normal(1, 257, 1280, seed=5) if variant == "i2v" else None,
        vace=vace,
    )
    with torch.no_grad():
        return dit(normal(1, 16, *size, seed=1), torch.tensor([500.0]), cond)


@pytest.mark.parametrize("variant", ["t2v", "i2v", "vace"])
def test_a_dit_is_within_five_percent_at_a_quarter_of_float32(variant):
    dit = tiny_dit(variant)
    expected = run(dit, variant)
    before = sum(weight_bytes(part) for part in big_linears(dit).values())
    assert quantise(dit) is dit
    layers = big_linears(dit)
    assert all(isinstance(part, QuantisedLinear) for part in layers.values())
    assert sum(weight_bytes(part) for part in layers.values()) == pytest.approx(before / 4, rel=0.03)
    assert 0 < relative_error(run(dit, variant), expected) < 0.05


OUTSIDE = ("patch_embedding", "text_embedding", "time_", "img_emb", "head", "vace_patch", "ref_conv", "control_adapter")


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (tiny_dit("t2v"), 4 * 10),
        (tiny_dit("i2v"), 4 * 12),
        (tiny_dit("vace"), 4 * 10 + 2 * 11 + 1),
        (tiny_image_encoder(), 4 * 4),
        (tiny_text_encoder(), 7 * len(tiny_text_encoder().blocks)),
    ],
)
def test_what_is_big(module, count):
    assert len(big_linears(module)) == count
    assert not [path for path in big_linears(module) if path.startswith(OUTSIDE)]


def test_what_should_not_be_quantised_stays():
    dit = quantise(tiny_dit(), lambda path, _: "ffn" in path)
    kinds = {path: type(part) for path, part in big_linears(dit).items()}
    assert kinds["blocks.0.ffn.0"] is QuantisedLinear and kinds["blocks.0.self_attn.q"] is Linear
    first = dit.blocks[0].ffn[0].weight
    assert quantise(dit).blocks[0].ffn[0].weight is first


CPU = torch.device("cpu")
needs_fp8_matmul = pytest.mark.skipif(
    not quant.supports_fp8_matmul(CPU), reason="this PyTorch has no FP8 product on the CPU"
)


@needs_fp8_matmul
@pytest.mark.parametrize("scale", ["rows", "tensor", None])
def test_products_in_fp8_are_those_of_the_rounded_numbers(scale):
    fp8 = QuantisedLinear.of(layer(torch.bfloat16))
    if scale != "rows":
        fp8.scale = torch.full((1, 1), 0.01) if scale else None
    x = normal(2, 24, 256, seed=1, dtype=torch.bfloat16)
    plain = fp8(x)
    rows, row_scale = to_fp8(x)
    emulated = (rows.float() * row_scale) @ fp8.dequantised().T + fp8.bias.float()
    fp8.fp8_matmul = True
    out = fp8(x)
    assert out.shape == plain.shape and out.dtype == torch.bfloat16
    assert relative_error(out, emulated) < 0.004
    assert 0 < relative_error(out, plain) < 0.04


@needs_fp8_matmul
def test_gradients_take_the_plain_way():
    fp8 = quantise(nn.ModuleList([nn.Sequential(layer(torch.bfloat16), nn.SiLU())]))[0][0]
    x = normal(4, 256, dtype=torch.bfloat16).requires_grad_()
    expected = fp8(x)
    fp8.fp8_matmul = True
    assert torch.equal(fp8(x), expected) and expected.requires_grad


@needs_fp8_matmul
def test_fp8_products_are_switched_on_for_every_layer():
    dit = quant.use_fp8_matmul(quantise(tiny_dit().bfloat16()), CPU)
    assert all(part.fp8_matmul for part in big_linears(dit).values())
    assert 0 < relative_error(run(dit, "t2v"), run(tiny_dit(), "t2v")) < 0.1


@pytest.mark.parametrize(
    ("module", "works", "message"),
    [
        (tiny_dit().bfloat16(), True, "this model has none; set weights to 'fp8'"),
        (quantise(tiny_dit()), True, "not in torch.float32; set dtype to bf16"),
        (quantise(tiny_dit().bfloat16()), False, "does not work on cpu .* Turn it off"),
    ],
)
def test_where_fp8_products_cannot_work(module, works, message, monkeypatch):
    monkeypatch.setattr(quant, "supports_fp8_matmul", lambda device: works)
    with pytest.raises(ValueError, match=message):
        quant.use_fp8_matmul(module, CPU)
    assert not any(getattr(part, "fp8_matmul", False) for part in module.modules())


def test_the_probe_says_no_where_there_is_no_kernel(monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("not on this device")

    quant.supports_fp8_matmul.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", missing)
    assert not quant.supports_fp8_matmul(CPU)
    quant.supports_fp8_matmul.cache_clear()
