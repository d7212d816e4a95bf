"""What the tests of several sources share."""

import pytest

from bef_jax.data import sources
from bef_jax.errors import UserError


def read_chunks(data):
    """Returns the (split, chunk) of a source."""
    return sources.open_source(data).chunks


def expect_error(source, *messages, read=read_chunks):
    """Checks that read(source) raises an error of one line, with all of `messages` in it."""
    with pytest.raises(UserError) as caught:
        list(read(source))
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)
