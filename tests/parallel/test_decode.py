"""A picture that ranks decode in strips of rows is the one that a process decodes alone."""

import pytest
import torch

from tests.parallel.cases import decoded
from tests.reference import relative_error
from wan_core import bundled

CASES = {
    "more ranks than rows": (4, bundled.VAE, (1, 16, 2, 3, 5), torch.float32),
    "uneven rows": (3, bundled.VAE, (2, 16, 3, 7, 4), torch.float32),
    "bf16": (2, bundled.VAE, (1, 16, 3, 8, 6), torch.bfloat16),
    "Wan 2.2": (4, bundled.VAE_22, (1, 48, 2, 6, 4), torch.float32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_strips_are_the_whole(pool, tmp_path, case):
    ranks, *given = case
    found, _ = pool.run(ranks, "decoded", *given, tmp_path)
    expected, _ = decoded(None, *given, tmp_path)
    # oneDNN takes other kernels for the wide layers of Wan 2.2 where a strip has a row or two.
    assert relative_error(found, expected) < 1e-6 if given[0] is bundled.VAE_22 else found.equal(expected)
