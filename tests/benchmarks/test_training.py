"""The measurement of training runs, as far as a CPU can tell."""

import pytest
import torch

from tests.benchmarks import training


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_option_is_measured(one_thread):
    rows = training.training_rows("cpu", quick=True)
    assert [row["option"] for row in rows] == list(training.OPTIONS)
    assert all(row["seconds"] > 0 and row["counted_gib"] > 0 and row["peak_gib"] is None for row in rows)
    assert len({training.line(row).count("|") for row in rows}) == 1


def test_a_device_that_is_too_small_is_a_row_too(one_thread, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("wancore.trainer.run.loop.weighted", full)
    monkeypatch.setattr(training, "OPTIONS", {"checkpointing": training.OPTIONS["checkpointing"]})
    rows = training.training_rows("cpu", quick=True)
    assert {row["seconds"] for row in rows} == {None}
