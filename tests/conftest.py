"""Tests import the pack as it imports itself: `from wan_core...`, `from wancore.nodes...`."""

import gc
import os
import signal

# Workers share the cores already: more threads than one each, here or in programs that tests start, only get in each
# other's way. Before torch is imported, which reads it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from pack import register

# Kernels by default, not by their time: a test's bits must not depend on what else the machine does.
os.environ.setdefault("WANCORE_DETERMINISTIC", "1")

# A shell that runs the tests in the background ignores Ctrl-C for them, and nohup a closed terminal; the programs that
# they start would inherit it.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)

register()

LONGEST = (
    "tests/trainer/", "tests/benchmarks/", "tests/planning/", "tests/nodes/test_train_nodes.py",
    "tests/test_workflows.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with them."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """What was imported stays. Looking at a million objects of it costs each garbage collection half a second, and
    whatever frees memory asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """Several threads share out a matrix product by where its numbers lie in memory, so that bits may differ."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
