"""Attention by several kernels that agree, and no lossy one without being asked for."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from wan_core.models import attention, kernels
from wan_core.models.attention import FastestAttention, by_heads, load_backend, sdpa

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, 2, 128)


def test_what_requires_gradients_takes_sdpa():
    q = tokens(5).requires_grad_()
    attend = FastestAttention({"other": lambda q, k, v: pytest.fail("this kernel knows no gradients")}, CPU)
    with kernels.run({"attention 1x5x2x128x5 float32 cpu": "other"}):
        attend(q, q, q).sum().backward()
    assert q.grad is not None


def test_auto_is_exact_kernels_on_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_flash", lambda: asked.append("flash") or sdpa)
    monkeypatch.setitem(attention._LOADERS, "flash", attention._flash)
    monkeypatch.setitem(attention._LOADERS, "sage", lambda: pytest.fail("8-bit attention was not asked for"))
    monkeypatch.setattr(attention, "_self_test", lambda *_: 0.0)
    found = load_backend("auto", CUDA, torch.bfloat16)
    assert asked == ["flash"]
    assert list(found.operation.kernels) == ["sdpa", "cuDNN", "flash", "memory-efficient", "FlashAttention"]


def test_a_kernel_that_pytorch_lacks_here_says_so():
    q = tokens(5)
    with pytest.raises(RuntimeError):
        attention._only(SDPBackend.CUDNN_ATTENTION)(q, q, q)
    torch.testing.assert_close(attention._only(SDPBackend.FLASH_ATTENTION)(q, q, q), sdpa(q, q, q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(1, 1040, 1040), (2, 700, 512), (1, 521, 2003), (1, 9, 5)], ids=str
)
def test_heads_one_by_one_are_as_exact_as_sdpa(monkeypatch, dtype, batch, queries, keys):
    monkeypatch.setattr(attention, "MOST_LOGITS", 2**18)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, n, 2, 128, generator=generator).mul_(3).to(dtype) for n in (queries, keys, keys))
    expected = sdpa(*(x.double() for x in (q, k, v)))
    error, theirs = ((way(q, k, v) - expected).norm() / expected.norm() for way in (by_heads, sdpa))
    assert by_heads(q, k, v).dtype == dtype and error < 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_offers_heads_one_by_one_on_a_cpu(dtype):
    offered = load_backend("auto", CPU, dtype).operation.kernels
    assert next(iter(offered)) == "sdpa" and "by heads" in offered
    q = tokens(64).to(dtype)
    expected = sdpa(q.double(), q.double(), q.double())
    for kernel in offered.values():
        assert ((kernel(q, q, q) - expected).norm() / expected.norm()) < 3 * torch.finfo(dtype).eps
