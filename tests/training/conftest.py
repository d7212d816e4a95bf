"""Fixtures that tests of training share."""

import pytest

from tests.checkpoints import save


@pytest.fixture
def saved(tmp_path):
    """Returns the folder of a small checkpoint."""
    return save(tmp_path)
