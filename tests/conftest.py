"""Fixtures that tests of several modules share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pcam_dir() -> Path:
    """The folder of real PCam patches, with pcam_subset.py that reads them."""
    if "BEF_PCAM_DIR" not in os.environ:
        pytest.skip("BEF_PCAM_DIR is not set: no real PCam patches to read")
    return Path(os.environ["BEF_PCAM_DIR"])
