"""Files are there whole or not at all, nobody's is lost, and what killed processes leave goes away."""

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan_core import atomic
from wan_core.atomic import abandon, clean, creating, creating_first, locked, numbered_paths, partial_path, replacing
from wan_core.loading.tensor_files import write_safetensors

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path, sync):
    path = tmp_path / "deep" / "a.txt"
    for content in ("first", "second"):
        with replacing(path, sync=sync) as partial:
            partial.write_text(content)
            assert partial.suffix == ".txt" and (not path.exists() or path.read_text() == "first")
        assert path.read_text() == content
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("way", [replacing, creating])
def test_an_error_leaves_nothing(tmp_path, way):
    with pytest.raises(KeyboardInterrupt), way(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_error_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_name_that_is_taken_or_being_written_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    with creating(path) as partial:
        partial.write_text("mine")
        with pytest.raises(ValueError, match="being written by another process"), creating(path):
            pytest.fail("the name is claimed")
    with pytest.raises(ValueError, match="exists already"), creating(path):
        pytest.fail("the name is taken")
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="cannot be written"), creating(path / "b.txt"):
        pytest.fail("a file is no folder")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_what_appears_under_the_name_meanwhile_is_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(atomic.Path, "hardlink_to", refuse_links)
    with pytest.raises(ValueError, match="exists already"), creating(tmp_path / "a.txt") as partial:
        partial.write_text("mine")
        (tmp_path / "a.txt").write_text("another's")
    with creating_first(numbered_paths(tmp_path, "b", ".txt")) as file:
        file.partial.write_text("mine")
        (tmp_path / "b_00001.txt").write_text("another's")
    assert file.path.name == "b_00002.txt"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.txt": "another's", "b_00001.txt": "another's", "b_00002.txt": "mine",
    }  # fmt: skip


def refuse_links(path, target):
    raise PermissionError(1, "Operation not permitted")


def test_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"

    def replace(text: str) -> None:
        with replacing(path) as partial:
            partial.write_text(text)

    def create(text: str) -> None:
        with creating_first(numbered_paths(tmp_path, "b", ".txt")) as file:
            file.partial.write_text(text)

    texts = [str(n) * 10000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(replace, texts * 4))
        list(pool.map(create, texts * 4))
    assert path.read_text() in texts
    assert names(tmp_path) == ["a.txt", *(f"b_{number:05}.txt" for number in range(1, 33))]
    assert sorted(path.read_text() for path in tmp_path.glob("b_*")) == sorted(texts * 4)


def killed_in(way: str, path: Path, work: str = "partial.write_text('half')") -> None:
    """Let a process be killed while it writes `path`."""
    program = (
        "import os, signal, pathlib\n"
        f"from wan_core.atomic import {way}\n"
        f"with {way}(pathlib.Path({str(path)!r})) as partial:\n"
        f"    {work}\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("way", ["replacing", "creating"])
def test_what_a_kill_left_is_taken_over(tmp_path, way):
    path = tmp_path / "a.txt"
    killed_in(way, path)
    assert names(tmp_path) == [partial_path(path).name]
    with getattr(atomic, way)(path) as partial:
        assert partial.read_text() == ""
        partial.write_text("whole")
    assert path.read_text() == "whole" and names(tmp_path) == ["a.txt"]


def test_what_a_kill_left_goes_away_with_the_next_file_in_the_folder(tmp_path):
    killed_in("creating", tmp_path / "a.txt")
    with creating(tmp_path / "b.txt"):
        assert names(tmp_path) == [partial_path(tmp_path / "b.txt").name]
        clean(tmp_path)
        assert names(tmp_path) == [partial_path(tmp_path / "b.txt").name]


def test_a_kill_after_a_file_got_its_name_costs_nothing(tmp_path):
    """The partial name is then another name of the same file, which nobody may write into."""
    path = tmp_path / "a.txt"
    killed_in("creating", path, f"partial.write_text('whole'); pathlib.Path({str(path)!r}).hardlink_to(partial)")
    assert len(names(tmp_path)) == 2
    with creating_first([path, path.with_name("b.txt")]) as file:
        file.partial.write_text("other")
    assert path.read_text() == "whole" and names(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("kind", ["folder", "symlink", "other name"])
def test_only_partial_files_are_cleaned(tmp_path, kind):
    partial = partial_path(tmp_path / "a.txt")
    (tmp_path / "kept.txt").write_text("kept")
    match kind:
        case "folder":
            partial.mkdir()
        case "symlink":
            partial.symlink_to(tmp_path / "kept.txt")
        case "other name":
            (tmp_path / ".a.part.txt").write_text("kept")
    before = names(tmp_path)
    clean(tmp_path)
    assert names(tmp_path) == before and (tmp_path / "kept.txt").read_text() == "kept"


def test_a_process_that_quits_at_once_takes_its_files_along(tmp_path):
    with replacing(tmp_path / "a.txt") as partial:
        abandon()
        assert names(tmp_path) == []
        partial.write_text("again")


def test_a_long_name_may_be_used_to_its_end(tmp_path):
    for name in ("n" * 251 + ".txt", "é" * 125 + ".txt"):
        with creating(tmp_path / name) as partial:
            partial.write_text("whole")
        assert (tmp_path / name).read_text() == "whole"


def test_a_lock_ends_with_its_holder(tmp_path):
    path = tmp_path / "events.jsonl"
    program = (
        "import sys, pathlib\n"
        "from wan_core.atomic import locked\n"
        f"with locked(pathlib.Path({str(path)!r})) as mine:\n"
        "    print(mine, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "True\n"
        with locked(path) as mine:
            assert not mine
        holder.kill()
    with locked(path) as mine:
        assert mine


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without named pipes")
def test_only_a_file_is_locked(tmp_path):
    """Without a reader, opening a pipe waits without end."""
    pipe = tmp_path / "events.jsonl"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    for path in (pipe, tmp_path):
        with pytest.raises(OSError, match=rf"is no file: '.*{path.name}'"), locked(path):
            pass
    os.close(reader)


def test_without_locks_nothing_is_cleaned_and_a_claim_holds(tmp_path, monkeypatch):
    """As on network drives that have none: a partial file may be another machine's."""
    monkeypatch.setattr(atomic, "try_lock", lambda file: None)
    path = tmp_path / "a.txt"
    with creating(path) as partial:
        partial.write_text("whole")
    assert path.read_text() == "whole"
    partial = partial_path(tmp_path / "b.txt")
    partial.write_text("somebody's")
    with pytest.raises(ValueError, match="being written by another process"), creating(tmp_path / "b.txt"):
        pytest.fail("the name is claimed")
    with replacing(tmp_path / "b.txt") as second:
        second.write_text("mine")
    assert partial.read_text() == "somebody's" and (tmp_path / "b.txt").read_text() == "mine"


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
@pytest.mark.parametrize("way", [replacing, creating])
def test_files_have_the_mode_of_the_umask(tmp_path, way, mask):
    with umask(mask), way(tmp_path / "a.safetensors") as partial:
        write_safetensors(partial, {"x": torch.zeros(2)})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~mask


def test_tensors_survive_their_file(tmp_path):
    tensors = {
        "scalar": torch.tensor(1.5), "none": torch.zeros(0, 3), "bytes": torch.arange(3, dtype=torch.uint8),
        "turned": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(3, dtype=torch.bfloat16),
        "é": torch.tensor([True, False]), "wide": torch.tensor([1, 2**40]),
    }  # fmt: skip
    write_safetensors(tmp_path / "a.safetensors", tensors, {"told": "ä"})
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
