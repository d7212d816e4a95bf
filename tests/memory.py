"""Measures how much memory a call takes, independent of what the process took before."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

_RESET = Path("/proc/self/clear_refs")


def growth_of(function: Callable[[], object]) -> int:
    """Returns by how many bytes the process grew, at most, while `function` ran."""
    if not _RESET.exists():
        pytest.skip("only Linux reports the peak memory of a process")
    before = begin_peak()
    function()
    return max(0, peak() - before)


def begin_peak() -> int:
    """Resets the peak memory of the process, and returns the bytes that it holds now."""
    _RESET.write_text("5")
    return _bytes("VmRSS")


def peak() -> int:
    """Returns the most bytes that the process has held since `begin_peak`."""
    return _bytes("VmHWM")


def _bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
