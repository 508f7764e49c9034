"""Rotary positions and attention kernels."""

import sys
import types

import pytest
import torch

from wan_core.models import attention
from wan_core.models.layers import sinusoid


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
