"""The pool of ranks, one for a session."""

import pytest

from tests.fork_server import CAN_FORK
from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    if not CAN_FORK:
        pytest.skip("ranks are forked, and this system cannot")
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def without_threads(one_thread):
    """As the ranks compute."""
