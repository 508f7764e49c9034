"""The table of formats in docs/memory.md has what its script computes."""

import pytest

from tests.benchmarks import format_table as script
from wan_core.offload.formats import FORMATS, PLAIN

ROWS = {row.name: row for row in script.ROWS}


def cells():
    _, _, rest = script.DOCUMENT.read_text(encoding="utf-8").partition(script.BEGIN)
    lines = rest.partition(script.END)[0].splitlines()
    return {
        row[0]: row[1:] for row in ([c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line)
    }


def test_every_format_is_in_the_document():
    assert [*cells()][2:] == [*ROWS]
    assert {row.form for row in script.ROWS} == set(FORMATS)


@pytest.mark.parametrize("name", ROWS)
def test_sizes_and_errors_are_those_of_the_document(name):
    row, (size, linear, _, took, step) = ROWS[name], cells()[name]
    assert f"{script.gigabytes_of_14b(row):.1f}" == size and float(took) > 0 and float(step) > 0
    error = script.error_of_a_linear(row)
    assert (error is None) == (not linear)
    assert error is None or float(linear.strip("%")) == pytest.approx(100 * error, rel=0.05)
    assert row.form is PLAIN or script.milliseconds(row, 256, 8) > 0
