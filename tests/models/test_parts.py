"""Rotary positions and attention kernels."""

import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import DITS
from wan_core import bundled
from wan_core.models import attention
from wan_core.models.dit import WanDiT
from wan_core.models.layers import sinusoid
from wan_core.models.ops import on_meta
from wan_core.models.text_encoder import UMT5Encoder
from wan_core.models.vae import WanVAE


def test_axes_share_the_head_as_published():
    assert attention.axis_widths(128) == (44, 42, 42)


def test_rotation_depends_on_the_distance_alone():
    table = attention.rotary_table((6, 5, 4), 128, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 128)

    def score(a, b):
        turned = [
            attention.rotate_(t.clone(), attention.RotaryTable(table.cos[i : i + 1], table.sin[i : i + 1]))
            for t, i in ((q, a), (k, b))
        ]
        return (turned[0] * turned[1]).sum().item()

    def index(f, r, c):
        return (f * 5 + r) * 4 + c

    assert score(index(0, 0, 0), index(2, 1, 1)) == pytest.approx(score(index(3, 2, 2), index(5, 3, 3)), abs=1e-3)
    assert score(index(0, 0, 0), index(2, 1, 1)) != pytest.approx(score(index(0, 0, 0), index(1, 1, 1)), abs=1e-3)


def test_rotation_equals_complex_multiplication():
    table = attention.rotary_table((3, 4, 5), 128, torch.device("cpu"))
    x = torch.randn(2, 60, 3, 128)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(table.cos, table.sin)
    expected = torch.view_as_real(turned).flatten(-2)
    assert torch.allclose(attention.rotate_(x.clone(), table), expected, atol=1e-6)
    assert torch.allclose(attention.rotate_(x.clone().requires_grad_(), table), expected, atol=1e-6)


def test_long_sequences_are_rotated_in_pieces(monkeypatch):
    table, x = attention.rotary_table((3, 4, 5), 128, torch.device("cpu")), torch.randn(1, 60, 2, 128)
    whole = attention.rotate_(x.clone(), table)
    monkeypatch.setattr(attention, "ROTATION_TOKENS", 7)
    assert torch.equal(attention.rotate_(x.clone(), table), whole)


def test_sinusoid_keeps_fractions_of_a_timestep():
    a, b = sinusoid(torch.tensor([937.5, 936.0]), 256)
    assert a[0] == pytest.approx(torch.cos(torch.tensor(937.5, dtype=torch.float64)).item(), abs=1e-6)
    assert (a - b).abs().max() > 1


CPU = torch.device("cpu")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="sdpa, flash, sage, xformers"):
        attention.load_backend("fast", CPU, torch.float32)


@pytest.mark.parametrize("name", ["flash", "sage", "xformers"])
def test_backend_that_is_not_installed_says_so(name):
    with pytest.raises(ValueError, match=f"{name}.*not installed"):
        attention.load_backend(name, CPU, torch.float32)


@pytest.mark.parametrize(
    ("kernel", "usable"),
    [
        (lambda q, k, v, **_: attention.sdpa(q, k, v), True),
        (lambda q, k, v, **_: attention.sdpa(q, k, v) + 0.5, False),
        (lambda q, k, v, **_: q * float("nan"), False),
        (lambda q, k, v, **_: 1 / 0, False),
    ],
)
def test_backend_is_used_only_when_it_agrees_with_sdpa(monkeypatch, kernel, usable):
    module = types.ModuleType("sageattention")
    module.sageattn = kernel
    monkeypatch.setitem(sys.modules, "sageattention", module)
    if usable:
        assert callable(attention.load_backend("sage", CPU, torch.float32))
    else:
        with pytest.raises(ValueError, match="wrong results"):
            attention.load_backend("sage", CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rotation_is_the_same_in_real_and_in_complex_numbers(dtype):
    table = attention.rotary_table((3, 5, 7), 128, CPU)
    x = torch.randn(2, 105, 2, 128).to(dtype)
    expected = attention.rotate(x.double(), table)
    for way in (attention.rotate, attention._rotate_complex):
        torch.testing.assert_close(way(x, table).double(), expected, rtol=0, atol=3e-6 if dtype.itemsize == 4 else 0.02)
    torch.testing.assert_close(attention.rotate_(x.clone(), table), attention._rotate_complex(x, table), rtol=0, atol=0)


MODELS = [(WanDiT, DITS["i2v"]), (UMT5Encoder, bundled.TEXT_ENCODER), (WanVAE, bundled.VAE)]


@pytest.mark.parametrize(("cls", "sizes"), MODELS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_module_on_the_meta_device_is_made_without_drawing_weights(cls, sizes):
    with on_meta(), Draws() as found:
        module = cls(sizes)
    with torch.device("meta"):
        plain = cls(sizes)
    described = [{name: (t.shape, t.dtype, t.device) for name, t in m.state_dict().items()} for m in (module, plain)]
    assert described[0] == described[1] and not found.seen
    assert [type(m) for m in module.modules()] == [type(m) for m in plain.modules()]


class Draws(TorchDispatchMode):
    """The operations that fill tensors with random numbers."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.normal_, torch.ops.aten.uniform_):
            self.seen.add(func)
        return func(*args, **(kwargs or {}))
