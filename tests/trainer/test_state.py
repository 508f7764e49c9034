import json
import os

import pytest
import torch

from wancore.trainer.run.state import (
    MANIFEST,
    OPTIMIZER,
    WEIGHTS,
    Progress,
    StateError,
    States,
    read_progress,
    read_weights_and_optimizer,
    require_same,
    require_space,
    verify,
    write_weights_and_optimizer,
)


def progress(step, **run):
    return Progress(step, {"seed": 0, **run}, {"learning_rate": 1e-4}, 1)


def save(states, step):
    folder = states.begin(step)
    parameter = torch.nn.Parameter(torch.arange(4.0) + step)
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    write_weights_and_optimizer(folder, {"a.b": parameter.detach()}, optimizer.state_dict())
    return states.commit(progress(step))


def test_a_state_comes_back_as_it_was(tmp_path):
    states = States(tmp_path / "states")
    folder = save(states, 7)
    assert states.latest() == folder
    assert read_progress(folder) == progress(7)
    weights, optimizer = read_weights_and_optimizer(folder)
    assert weights.keys() == {"a.b"} and optimizer["state"][0]["step"] == 1


def test_a_draft_is_no_state(tmp_path):
    states = States(tmp_path)
    draft = states.begin(3)
    write_weights_and_optimizer(draft, {"a": torch.zeros(1)}, {})
    assert states.steps() == [] and states.latest() is None
    states.discard(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "removed"])
def test_a_damaged_state_is_passed_over_and_refused(tmp_path, name, damage, caplog):
    states = States(tmp_path)
    good, bad = save(states, 1), save(states, 2)
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "removed":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content[:-1] if damage == "cut" else content)
    assert states.latest() == good
    assert name in caplog.text
    with pytest.raises(StateError, match=name):
        read_progress(bad)


def test_a_folder_without_a_manifest_is_no_state(tmp_path):
    states = States(tmp_path)
    folder = save(states, 1)
    (folder / MANIFEST).unlink()
    with pytest.raises(StateError, match="no saved state"):
        verify(folder)
    with pytest.raises(StateError, match=r"has no manifest\.json.*remove .* to start over"):
        states.latest()
    states.tidy()
    assert folder.is_dir()
    save(states, 2)
    assert states.latest() == states.path(2)
    states.tidy()
    assert not folder.exists()


def test_a_manifest_names_every_file(tmp_path):
    folder = save(States(tmp_path), 1)
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert {*listed, MANIFEST} == {path.name for path in folder.iterdir()}


def test_pruning_keeps_the_newest_and_clears_what_kills_left(tmp_path):
    states = States(tmp_path)
    for step in (1, 2, 3, 10):
        save(states, step)
    states.begin(11)
    (states.path(12)).mkdir()
    (tmp_path / "notes").mkdir()
    states.prune(2)
    assert states.steps() == [3, 10]
    assert {p.name for p in tmp_path.iterdir()} == {"step-0000003", "step-0000010", "notes"}


def test_a_state_of_the_same_step_takes_the_place_of_the_older_one(tmp_path):
    states = States(tmp_path)
    save(states, 4)
    save(states, 4)
    assert states.steps() == [4] and read_progress(states.path(4)).step == 4


def test_a_full_disk_leaves_the_older_state(tmp_path, monkeypatch):
    states = States(tmp_path)
    good = save(states, 1)
    states.begin(2)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        states.commit(progress(2))
    assert states.latest() == good


@pytest.mark.parametrize(
    ("run", "world", "words"),
    [({"seed": 1}, 1, "seed was 0 and is 1"), ({"seed": 0}, 2, "processes was 1 and is 2"),
     ({"seed": 0, "data": "x"}, 1, "data was None")],
)  # fmt: skip
def test_another_run_is_not_continued_unless_forced(run, world, words, caplog):
    with pytest.raises(StateError, match=words):
        require_same(progress(5), run, world, force=False)
    require_same(progress(5), run, world, force=True)
    assert words in caplog.text


@pytest.mark.parametrize("force", [False, True])
def test_the_same_run_is_continued_without_a_word(force, caplog):
    require_same(progress(5), {"seed": 0}, 1, force=force)
    assert not caplog.records


def test_room_on_the_disk_is_asked_for_in_words(tmp_path):
    require_space(tmp_path, 1, 0)
    with pytest.raises(OSError, match="--min_free_gb"):
        require_space(tmp_path, 1, 10**9)
