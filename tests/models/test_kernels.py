"""The default kernel computes, unless another is clearly faster here; a choice once made is made for good."""

import json
import multiprocessing
import os
import platform
import time

import pytest
import torch

from wan_core.models import kernels
from wan_core.models.kernels import Choices, Known, Operation, current, fastest

CPU = torch.device("cpu")
X = torch.arange(6.0)


def taking(seconds: float, add: float = 1.0):
    """A kernel of that many seconds."""

    def kernel(x):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return x + add

    return kernel


def failing(x):
    raise RuntimeError("no such kernel here")


@pytest.fixture
def known(monkeypatch, tmp_path):
    """Choices that are measured, and kept below the test's folder."""
    monkeypatch.setenv(kernels.CACHE_FOLDER, str(tmp_path / "kept"))
    kernels._known.cache_clear()
    yield tmp_path / "kept" / "kernels.jsonl"
    kernels._known.cache_clear()


@pytest.fixture
def measuring(known):
    token = kernels._current.set(Choices())
    yield known
    kernels._current.reset(token)


def operation(reference=None, **kernels_by_name) -> Operation:
    return Operation("add", kernels_by_name, reference=reference)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"default": 0.002, "fast": 0.001, "slow": 0.004}, "fast"),
        ({"default": 0.001, "slow": 0.002}, "default"),
        ({"default": 0.0010, "hardly": 0.00095}, "default"),
        ({"default": 0.002, "faster": 0.001, "fastest": 0.0005}, "fastest"),
    ],
    ids=str,
)
def test_another_kernel_takes_the_defaults_place_where_it_is_clearly_faster(seconds, chosen):
    made = operation(**{name: taking(time) for name, time in seconds.items()})
    name, times = fastest(made, (X,))
    assert name == chosen and times.keys() == seconds.keys()


def test_a_kernel_that_does_not_run_here_is_left_out():
    name, times = fastest(operation(default=taking(0.001), broken=failing), (X,))
    assert name == "default" and list(times) == ["default"]


def test_a_default_that_does_not_run_says_so():
    with pytest.raises(RuntimeError, match="no such kernel"):
        fastest(operation(default=failing, other=taking(0)), (X,))


def test_a_fast_kernel_that_rounds_worse_is_left_out():
    made = operation(lambda x: x + 1, default=taking(0.002, 1.001), rough=taking(0.0, 1.01), fine=taking(0.001, 0.999))
    assert fastest(made, (X,))[0] == "fine"


def test_one_disturbed_round_changes_nothing(monkeypatch):
    """Another program that takes the processor for a while must not make a slow kernel win, nor a fast one lose."""
    times = iter([10, 10] + [v for turn in range(9) for v in ((90, 5) if turn == 0 else (10, 9.8))] + [0] * 99)
    monkeypatch.setattr(kernels, "seconds", lambda kernel, arguments, repeats: next(times))
    assert fastest(operation(a=taking(0), b=taking(0)), (X,))[0] == "a"


def test_each_size_is_measured_once_for_all_processes(measuring, monkeypatch):
    measured = []
    monkeypatch.setattr(kernels, "fastest", lambda made, _: measured.append(1) or ("b", {"a": 2.0, "b": 1.0}))
    made = operation(a=lambda x: x + 1, b=lambda x: x + 2)
    for sizes in ((6,), (6,), (7,)):
        torch.testing.assert_close(made(X, sizes=sizes), X + 2)
    assert len(measured) == 2
    lines = [json.loads(line) for line in measuring.read_text().splitlines()]
    assert [(line["key"], line["kernel"]) for line in lines] == [("add 6 float32 cpu", "b"), ("add 7 float32 cpu", "b")]
    kernels._known.cache_clear()
    kernels._current.set(Choices())
    torch.testing.assert_close(made(X, sizes=(6,)), X + 2)
    assert len(measured) == 2


X86 = """processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 143
model name	: Some Xeon
flags		: fpu avx sse2 amx_tile

processor	: 1
model name	: Another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"


@pytest.mark.parametrize(
    ("cpuinfo", "named"),
    [
        (X86, "GenuineIntel 6 143 Some Xeon avx amx_tile"),
        (ARM, "0x41 0xd0c"),
        ("no fields", platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
    ids=["x86", "ARM", "empty", "no file"],
)
def test_a_processor_is_named_by_its_model_and_vector_units(tmp_path, cpuinfo, named):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo, encoding="utf-8")
    assert kernels.processor(tmp_path / "cpuinfo") == named


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_a_named_pipe_in_place_of_the_file_of_choices_is_not_opened(measuring):
    """Opening it would wait without end; the default kernel computes."""
    measuring.parent.mkdir()
    os.mkfifo(measuring)
    made = operation(a=lambda x: x + 1, b=lambda x: x + 1)
    assert torch.equal(made(X, sizes=(6,)), X + 1)
    assert current().used == {"add 6 float32 cpu": "a"}


def test_other_machines_threads_and_damaged_lines_do_not_count(known, monkeypatch):
    monkeypatch.setattr(kernels, "fastest", lambda *_: ("a", {"a": 1.0}))
    made = operation(a=lambda x: x, b=lambda x: x)
    here = Known("here", known)
    known.parent.mkdir()
    known.write_text('{"machine": "there", "key": "k", "kernel": "b"}\n[]\n{\n\0\xff\n' + "[" * 100000 + "\n")
    assert here.choose("k", made, (X,)) == "a"
    assert Known("there", known).choose("k", made, (X,)) == "b"
    known.write_text('{"machine": "here", "key": "k", "kernel": "gone"}\n')
    assert Known("here", known).choose("k", made, (X,)) == "a"


def _choose(file, name, results):
    kernels.fastest = lambda *_: (time.sleep(0.05) or name, {"a": 1.0, "b": 1.0})
    results.put(Known("m", file).choose("k", operation(a=lambda x: x, b=lambda x: x), (X,)))


def test_processes_that_measure_at_once_agree(known):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_choose, args=(known, name, results)) for name in "abab"]
    for process in processes:
        process.start()
    assert len({results.get(timeout=30) for _ in processes}) == 1
    for process in processes:
        process.join()


def test_where_nothing_can_be_kept_the_default_is_used(known, monkeypatch):
    known.parent.parent.joinpath("file").write_text("")
    monkeypatch.setattr(kernels, "fastest", lambda *_: ("b", {"a": 2.0, "b": 1.0}))
    blocked = Known("m", known.parent.parent / "file" / "kernels.jsonl")
    assert blocked.choose("k", operation(a=lambda x: x, b=lambda x: x), (X,)) == "a"


def test_a_run_goes_on_with_the_kernels_that_it_began_with(measuring, monkeypatch):
    monkeypatch.setattr(kernels, "fastest", lambda *_: ("a", {"a": 1.0}))
    made = operation(a=lambda x: x + 1, b=lambda x: x + 2)
    with kernels.run({"add 6 float32 cpu": "b", "add 7 float32 cpu": "gone"}) as choices:
        torch.testing.assert_close(made(X, sizes=(6,)), X + 2)
        torch.testing.assert_close(made(X, sizes=(7,)), X + 1)
    assert choices.used == {"add 6 float32 cpu": "b", "add 7 float32 cpu": "a"}
    torch.testing.assert_close(made(X, sizes=(6,)), X + 1)


def test_a_run_records_the_same_kernels_whether_it_measured_them_or_not(measuring):
    """A kernel that calls an operation itself is timed and left: the first run on a machine must not tell of that."""
    part = Operation("part", {"only": taking(0), "other": taking(0)})
    whole = Operation("whole", {"default": taking(0), "slow": lambda x: taking(0.001)(part(x, sizes=(6,)))})
    records = []
    for _ in range(2):
        with kernels.run() as choices:
            whole(X, sizes=(6,))
            records.append(dict(choices.used))
    assert records[0] == records[1] and list(records[1].values()) == ["default"]


def test_deterministic_runs_use_the_defaults_whatever_was_measured(measuring, monkeypatch):
    monkeypatch.setattr(kernels, "fastest", lambda *_: pytest.fail("nothing is to be measured"))
    made = operation(a=lambda x: x + 1, b=lambda x: x + 2)
    with kernels.run({"add 6 float32 cpu": "b"}, deterministic=True):
        torch.testing.assert_close(made(X, sizes=(6,)), X + 1)
        with kernels.run({"add 6 float32 cpu": "b"}):
            torch.testing.assert_close(made(X, sizes=(6,)), X + 1)


def test_counting_on_the_meta_device_measures_nothing(measuring, monkeypatch):
    monkeypatch.setattr(kernels, "fastest", lambda *_: pytest.fail("nothing is to be measured"))
    assert operation(a=lambda x: x, b=lambda x: x)(X.to("meta"), sizes=(6,)).is_meta


def test_the_suite_itself_is_deterministic():
    assert kernels.current().deterministic and os.environ[kernels.DETERMINISTIC]


@pytest.mark.parametrize(("count", "shared"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_sizes_share_a_choice_up_to_a_power_of_two(count, shared):
    assert kernels.up_to_power_of_two(count) == shared
