"""The kernel that is fastest is found once for each shape, and no lossy one is taken without being asked for."""

import pytest
import torch
from torch.nn.attention import SDPBackend
from wancore.wan_core.models import attention
from wancore.wan_core.models.attention import Fastest, by_heads, load_backend, sdpa
from wancore.wan_core.models.linear import onednn_has

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Timed:
    """Kernels that take the seconds they are told, and what was asked of them."""

    def __init__(self, **seconds: float | None) -> None:
        self.seconds, self.timed, self.used = {"sdpa": 1.0, **seconds}, [], []
        self._running = "sdpa"

    def kernels(self):
        return {name: self._kernel(name) for name in self.seconds if name != "sdpa"}

    def _kernel(self, name):
        def attend(q, k, v):
            self._running = name
            self.used.append(name)
            if self.seconds[name] is None:
                raise RuntimeError("no such kernel")
            return sdpa(q, k, v)

        return attend

    def measure(self, run):
        self._running = "sdpa"
        run()
        self.timed.append(self._running)
        return self.seconds[self._running]

    def fastest(self) -> Fastest:
        return Fastest(self.kernels(), self.measure)


def tokens(count: int) -> torch.Tensor:
    return torch.randn(1, count, 2, 128)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"cuDNN": 0.5, "flash": 0.7}, "cuDNN"),
        ({"cuDNN": 1.5, "flash": 2.0}, None),
        ({"cuDNN": 0.96}, None),
        ({"cuDNN": None, "flash": 0.9}, "flash"),
        ({"cuDNN": None}, None),
    ],
    ids=str,
)
def test_the_fastest_that_runs_is_used(seconds, chosen):
    timed = Timed(**seconds)
    attend, q = timed.fastest(), tokens(7)
    torch.testing.assert_close(attend(q, q, q), sdpa(q, q, q))
    timed.used.clear()
    attend(q, q, q)
    assert timed.used == ([] if chosen is None else [chosen])


def test_each_shape_is_timed_once():
    timed = Timed(cuDNN=0.5)
    attend, short, long = timed.fastest(), tokens(5), tokens(9)
    for _ in range(3):
        attend(long, long, long)
        attend(long, short, short)
    assert timed.timed == ["sdpa", "cuDNN"] * 2
    attend(short, short, short)
    assert len(timed.timed) == 6


def test_what_requires_gradients_is_not_timed():
    timed, q = Timed(cuDNN=0.5), tokens(5).requires_grad_()
    timed.fastest()(q, q, q).sum().backward()
    assert timed.timed == [] and q.grad is not None


def test_where_no_kernel_can_be_timed_sdpa_runs():
    def refuse(run):
        raise RuntimeError("out of memory")

    q = tokens(5)
    torch.testing.assert_close(Fastest({}, refuse)(q, q, q), sdpa(q, q, q))


def test_auto_is_exact_kernels_on_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_flash", lambda: asked.append("flash") or sdpa)
    monkeypatch.setitem(attention._LOADERS, "flash", attention._flash)
    monkeypatch.setitem(attention._LOADERS, "sage", lambda: pytest.fail("8-bit attention was not asked for"))
    monkeypatch.setattr(attention, "_self_test", lambda *_: 0.0)
    found = load_backend("auto", CUDA, torch.bfloat16)
    assert isinstance(found, Fastest) and asked == ["flash"]
    assert list(found.kernels) == ["sdpa", "cuDNN", "flash", "memory-efficient", "FlashAttention"]


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


def test_heads_one_by_one_leave_gradients_to_sdpa():
    q = torch.randn(1, 600, 1, 128, requires_grad=True)
    by_heads(q, q, q).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_auto_takes_heads_one_by_one_where_onednn_multiplies(dtype):
    assert load_backend("auto", CPU, dtype) is (by_heads if onednn_has(dtype) else sdpa)
