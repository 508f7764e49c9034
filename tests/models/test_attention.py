"""The kernel that is fastest is found once for each shape, and no lossy one is taken without being asked for."""

import pytest
import torch
from torch.nn.attention import SDPBackend
from wancore.wan_core.models import attention
from wancore.wan_core.models.attention import Fastest, load_backend, sdpa

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


def test_auto_is_sdpa_on_the_cpu_and_exact_kernels_on_cuda(monkeypatch):
    assert load_backend("auto", CPU, torch.float32) is sdpa
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
