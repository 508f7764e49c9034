"""The judge of the attacks sees what it is there to see."""

import os
import time

import pytest

from tests.attack import child as child_module
from tests.attack.child import Child


def _fails(path):
    raise KeyError("x")


def _refuses(path):
    raise ValueError(f"{path} is damaged.")


def _refuses_namelessly(path):
    raise ValueError("It is damaged.")


def _allocates(path):
    return str(len(bytearray(os.urandom(2**20) * 300)))


def _asks_for_all(path):
    return str(len(bytearray(2**40)))


JOBS = {
    "survived": lambda path: "done", "clear": _refuses, "nameless": _refuses_namelessly, "raw": _fails,
    "allocates": _allocates, "asks": _asks_for_all, "hang": lambda path: time.sleep(99),
    "executed": lambda path: str(os.system("true")),
}  # fmt: skip
VERDICTS = {"nameless": "raw", "allocates": "memory", "asks": "memory"}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    file = tmp_path_factory.mktemp("attacked") / "file"
    file.write_bytes(bytes(99))
    with Child("tests.attack.test_child") as child:
        yield lambda job: child.judge("a file", job, file)


@pytest.mark.parametrize("job", JOBS)
def test_every_fault_is_seen(judge, job, monkeypatch):
    if job == "hang":
        monkeypatch.setattr(child_module, "PATIENCE", 1)
    assert judge(job).verdict == VERDICTS.get(job, job)
