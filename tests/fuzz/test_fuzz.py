"""Inputs that once failed, and twelve of each entry point; `python -m tests.fuzz` tries more."""

import pytest

from tests.fuzz.entries import ENTRIES
from tests.fuzz.run import CORPUS, judge, try_seed


@pytest.mark.parametrize(
    "case", sorted(CORPUS.glob("*/*")), ids=lambda case: f"{case.parent.name}_{case.name}"
)
def test_what_once_failed_is_refused_or_right(case):
    verdict = judge(case.parent.name, case)
    assert verdict.outcome != "failed", verdict.said


@pytest.mark.parametrize("entry", ENTRIES)
def test_damaged_inputs_are_refused_in_one_line_or_right(entry):
    for seed in range(12):
        verdict = try_seed(entry, seed)
        assert verdict.outcome != "failed", verdict.said
