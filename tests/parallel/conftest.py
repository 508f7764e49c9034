"""The pool of ranks, one for a session."""

import pytest

from tests.digests import one_thread
from tests.fork_server import CAN_FORK
from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    if not CAN_FORK:
        pytest.skip("ranks are forked, and this system cannot")
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture(autouse=True, scope="module")
def without_threads():
    """As the ranks compute; so are films of a module's fixtures, which those of ranks are compared with."""
    with one_thread():
        yield
