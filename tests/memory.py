"""How much memory a call takes, whatever the process took before."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

_RESET = Path("/proc/self/clear_refs")


def growth_of(function: Callable[[], object]) -> int:
    """Bytes by which the process was larger, at most, while `function` ran."""
    if not _RESET.exists():
        pytest.skip("only Linux tells the most memory that a process has taken")
    before = begin_peak()
    function()
    return max(0, peak() - before)


def begin_peak() -> int:
    """Lets the most memory that the process has held begin anew; returns the bytes held now."""
    _RESET.write_text("5")
    return _bytes("VmRSS")


def peak() -> int:
    """Returns the most bytes that the process has held since `begin_peak`."""
    return _bytes("VmHWM")


def _bytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
