"""A linear layer is the same whoever computes it, and oneDNN is asked only for what it can do."""

import pytest
import torch
import torch.nn.functional as F

from wan_core.models import ops as module
from wan_core.models.ops import Linear, linear, onednn_has

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture
def layers(monkeypatch):
    """How often PyTorch's own product was called."""
    calls = []

    def counted(*args):
        calls.append(args)
        return torch.ops.aten.linear(*args)

    monkeypatch.setattr(module.F, "linear", counted)
    return calls


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 7, 48), (0, 48), (1, 2, 3, 48)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_it_is_the_product_plus_the_bias(shape, biased, dtype):
    x, weight, bias = drawn(*shape, dtype=dtype), drawn(32, 48, dtype=dtype), drawn(32, dtype=dtype) if biased else None
    got, expected = (
        linear(x, weight, bias),
        F.linear(x.double(), weight.double(), None if bias is None else bias.double()),
    )
    assert got.dtype == dtype and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


CASES = {
    "a weight with gaps": lambda: linear(drawn(4, 16), drawn(8, 32)[:, ::2]),
    "a transposed weight": lambda: linear(drawn(4, 16), drawn(16, 8).T),
    "float64": lambda: linear(drawn(4, 16).double(), drawn(8, 16).double()),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_onednn_does_not_do_well_is_left_to_pytorch(layers, case):
    CASES[case]()
    assert len(layers) == 1


@pytest.mark.skipif(not onednn_has(torch.float32), reason="this PyTorch has no oneDNN")
@torch.no_grad()
def test_inference_in_float32_takes_onednn(layers):
    for x in (drawn(4, 16), drawn(4, 32)[:, ::2], drawn(16, 4).T):
        torch.testing.assert_close(linear(x, drawn(8, 16)), x @ drawn(8, 16).T)
    assert not layers


def test_gradients_reach_input_weight_and_bias():
    layer, x = Linear(16, 8), drawn(4, 16).requires_grad_()
    layer(x).square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for tensor in (x, layer.weight, layer.bias))


@torch.no_grad()
def test_autocast_decides_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(16, 8)(drawn(4, 16)).dtype == torch.bfloat16


@torch.no_grad()
def test_mixed_dtypes_are_refused_as_pytorch_does():
    with pytest.raises(RuntimeError, match="dtype"):
        linear(drawn(4, 16), drawn(8, 16).bfloat16())
