import pytest

from bef_jax.errors import one_line


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("one\n  two\x1b[31m"), "one two\\x1b[31m"),
        (KeyError("stem"), "stem"),  # str(error) has quotes
        (KeyError(), ""),
        (OSError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
    ],
)
def test_an_error_is_one_line(error, text):
    assert one_line(error) == text
