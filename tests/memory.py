"""How much memory a call takes, whatever the process took before."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest


def growth_of(function: Callable[[], object]) -> int:
    """Bytes by which the process was larger, at most, while `function` ran."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("only Linux tells the most memory that a process has taken")
    before = _kilobytes("VmRSS")
    reset.write_text("5")  # forgets the most until now
    function()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def _kilobytes(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
