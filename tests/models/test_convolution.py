"""A convolution is the same whichever kernel computes it, in any memory layout, in pieces or whole."""

import pytest
import torch
import torch.nn.functional as F

from tests.reference import relative_error
from wan_core.models import convolution as module
from wan_core.models.convolution import conv2d, conv3d, enlarge

SHAPES = {
    "causal": ((3, 3, 3), (0, 1, 1), (1, 1, 1)),
    "shortcut": ((1, 1, 1), (0, 0, 0), (1, 1, 1)),
    "doubles frames": ((3, 1, 1), (0, 0, 0), (1, 1, 1)),
    "halves frames": ((3, 1, 1), (0, 0, 0), (2, 1, 1)),
    "halves sides": ((1, 3, 3), (0, 0, 0), (1, 2, 2)),
}
"""Kernel, padding and stride of the autoencoders' convolutions."""

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("piece", [2**22, 600, 1], ids="pieces of {}".format)
@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_products_of_matrices_are_the_convolution(case, piece, layout, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    kernel, padding, stride = SHAPES[case]
    x, weight, bias = (
        drawn(2, 8, 5, 7, 9).to(memory_format=layout),
        drawn(6, 8, *kernel).to(memory_format=layout),
        drawn(6),
    )
    for given in (bias, None):
        got = module._matrices(x, weight, given, padding, stride)
        expected = F.conv3d(x, weight, given, stride, padding)
        assert got.shape == expected.shape and got.is_contiguous(memory_format=torch.channels_last_3d)
        assert relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SHAPES)
@torch.no_grad()
def test_16_bits_without_vector_units_are_multiplied_in_float32(case, dtype, monkeypatch):
    monkeypatch.setattr(module, "onednn_has", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(module, "WEIGHT_PIECE", 200)
    monkeypatch.setattr(module, "_conv3d_pytorch", None)
    kernel, padding, stride = SHAPES[case]
    x, weight, bias = (t.to(dtype) for t in (drawn(1, 8, 5, 7, 9), drawn(6, 8, *kernel), drawn(6)))
    exact = F.conv3d(x.double(), weight.double(), bias.double(), stride, padding)
    got = conv3d(x, weight, bias, padding, stride)
    assert got.dtype == dtype and relative_error(got.double(), exact) < (4e-3 if dtype == torch.bfloat16 else 5e-4)
    if kernel[0] == 1:
        frame = conv2d(x[:, :, 0], weight[:, :, 0], bias, padding[1:], stride[1:])
        assert torch.equal(frame, got[:, :, 0])


@pytest.mark.parametrize(
    "operation", [module._FEW_3D, module._FEW_2D, module._MANY_3D, module._ENLARGE], ids=lambda o: o.name
)
@torch.no_grad()
def test_all_kernels_of_an_operation_agree(operation):
    x, conv = drawn(1, 8, 5, 6, 4), torch.nn.Conv2d(8, 6, 3, padding=1)
    arguments = {
        "enlarge": (x[:, :, 0], conv, {}),
        "conv2d of few pixels": (x[:, :, 0], conv.weight, conv.bias, (1, 1), (1, 1)),
    }.get(operation.name, (x, drawn(6, 8, 3, 3, 3), conv.bias, (0, 1, 1), (1, 1, 1)))
    expected, *others = (kernel(*arguments) for kernel in operation.kernels.values())
    assert others and all(relative_error(other, expected) < 1e-6 for other in others)


@torch.no_grad()
def test_products_are_tried_for_few_pixels_only(monkeypatch):
    asked = []
    for name in ("_FEW_3D", "_MANY_3D", "_FEW_2D"):
        monkeypatch.setattr(module, name, lambda x, *rest, sizes, name=name: asked.append(name) or x)
    for side in (32, 64):
        conv3d(drawn(1, 2, 2, side, side), drawn(2, 2, 3, 3, 3), None, (0, 1, 1), (1, 1, 1))
        conv2d(drawn(1, 2, side, side), drawn(2, 2, 3, 3), None, (1, 1), (1, 1))
    conv2d(drawn(1, 2, 64, 64), drawn(2, 2, 3, 3), None, (0, 0), (2, 2))  # 1024 pixels come out
    assert asked == ["_FEW_3D", "_FEW_2D", "_MANY_3D", "_FEW_2D"]


def test_gradients_flow_through_the_enlargement():
    conv, x = torch.nn.Conv2d(4, 3, 3, padding=1), drawn(1, 4, 5, 6).requires_grad_()
    steps = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), conv.weight, conv.bias, padding=1)
    one, other = (torch.autograd.grad(y.square().sum(), (x, conv.weight)) for y in (steps, enlarge(x, conv, {})))
    assert all(relative_error(got, expected) < 1e-5 for got, expected in zip(one, other, strict=True))
