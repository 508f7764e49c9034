"""The table in docs/memory.md is what its script computes, and plans in it are what runs take."""

import pytest

from tests.benchmarks import memory_table as script

LINES = [line for line in script.DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [
    script.Case("T2V 1.3B", "480p", "bf16", 6),
    script.Case("T2V 14B", "480p", "bf16", 8),
    script.Case("T2V 1.3B", "720p", "fp8", 6),
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_the_document_says_what_the_script_computes(case):
    assert script.line(script.row(case)) in LINES


def test_the_table_plans_as_a_run_does():
    case = ROWS[1]
    own = script.plan_run(
        script.dit(case.model, case.weights), script.conditioning(case), script.SIZES[case.size].latent,
        script.settings(), script.MemorySettings(), lambda wanted: case.gib * script.GIB,
    )  # fmt: skip
    assert own == script.planned(case)


def test_every_case_is_in_the_document_and_planned_is_counted():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES]
    found = {tuple(row[:4]): row for row in rows if row[0] in script.MODELS and len(row) == len(script.HEADER)}
    assert list(found) == [(case.model, case.size, case.weights, str(case.gib)) for case in script.cases()]
    for _, _, _, limit, planned, counted, stay, *_ in found.values():
        if "missing" in stay:
            missing = float(stay.strip("*").split()[0])
            assert float(planned) - float(limit) == pytest.approx(missing, abs=0.011)
        else:
            assert float(planned) <= float(limit) + 0.005
            assert float(counted) == pytest.approx(float(planned), rel=0.05)


def test_filling_replaces_the_marked_part_alone(monkeypatch):
    monkeypatch.setattr(script, "table", lambda: "| a |")
    document = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.filled(document) == f"before\n{script.BEGIN}\n| a |\n{script.END}\nafter\n"
    assert script.filled(script.filled(document)) == script.filled(document)
