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


def read_all(data):
    """Returns the classes, and {split: [(the first value of the pixels, label, id, group)]}."""
    contents = sources.open_source(data)
    found = {}
    for split, chunk in contents.chunks:
        groups = [None] * len(chunk.ids) if chunk.groups is None else chunk.groups.tolist()
        pixels = chunk.images[:, 0, 0, 0].tolist()
        rows = zip(pixels, chunk.labels.tolist(), chunk.ids.tolist(), groups, strict=True)
        found.setdefault(split, []).extend(rows)
    return contents.classes, found
