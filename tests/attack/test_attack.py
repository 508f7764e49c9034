"""A few trials of each kind of attack; `python -m tests.attack` makes many."""

import importlib

import pytest

from tests.attack import FAULTS
from tests.attack.__main__ import KINDS

QUICK = 12
"""Trials of a kind here."""


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_finds_no_fault(kind):
    module = importlib.import_module(f".{kind}", __package__)
    trials = list(module.attack(getattr(module, "QUICK", QUICK), 0))
    assert trials
    assert not [trial for trial in trials if trial.verdict in FAULTS]
