"""What the trainer's tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, models and encoded samples that all runs of a session share. Tiny models run on one thread:
    more would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("training")
    torch.set_num_threads(threads)
