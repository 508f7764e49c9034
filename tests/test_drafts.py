"""Files are there whole or not at all, and nobody's is lost."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from wancore.wan_core.drafts import drafted, drafted_anew, forget_drafts

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_takes_its_name_when_it_is_whole(tmp_path, sync):
    path = tmp_path / "deep" / "a.txt"
    for content in ("first", "second"):
        with drafted(path, sync=sync) as draft:
            draft.write_text(content)
            assert draft.suffix == ".txt" and (not path.exists() or path.read_text() == "first")
        assert path.read_text() == content
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("way", [drafted, drafted_anew])
def test_an_error_leaves_nothing(tmp_path, way):
    with pytest.raises(KeyboardInterrupt), way(tmp_path / "a.txt") as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_error_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), drafted(path) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_name_that_is_taken_or_held_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    with drafted_anew(path) as draft:
        draft.write_text("mine")
        with pytest.raises(ValueError, match="exists already"), drafted_anew(path):
            pytest.fail("the name is held")
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="cannot be written"), drafted_anew(path / "b.txt"):
        pytest.fail("a file is no folder")


def test_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"

    def write(text: str) -> None:
        with drafted(path) as draft:
            draft.write_text(text)

    texts = [str(n) * 10000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts * 4))
    assert path.read_text() in texts and names(tmp_path) == ["a.txt"]


def test_what_a_kill_left_is_found(tmp_path):
    path = tmp_path / "a.txt"
    program = (
        "import os, signal, pathlib, pack; pack.load_pack()\n"
        "from wancore.wan_core.drafts import drafted\n"
        f"with drafted(pathlib.Path({str(path)!r})) as draft:\n"
        "    draft.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and not path.exists()
    path.with_name("b.txt").write_text("another")
    forget_drafts(path)
    assert names(tmp_path) == ["b.txt"]
