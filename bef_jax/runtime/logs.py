"""What the program prints on stderr: its own messages, and the warnings of its libraries."""

import logging

from absl import logging as absl_logging

from bef_jax.errors import printable


def set_up() -> None:
    """Shows the project's messages and its libraries' warnings: each warning once, in one line.

    Orbax logs a lot, through absl, so only its errors are shown.
    """
    log = logging.getLogger("bef_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(Printable())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # The root logger's handler below would print every line again.
    log.propagate = False
    _set_up_libraries(logging.getLogger())


def _set_up_libraries(root: logging.Logger) -> None:
    # absl's own handler prints tracebacks, and a prefix that tells a user nothing.
    root.removeHandler(absl_logging.get_absl_handler())
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    handler.addFilter(Once())
    handler.setLevel(logging.WARNING)
    root.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Our own line about a damaged picture says what these libraries say in several lines.
    for library in ("tifffile", "PIL"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


class Printable(logging.Formatter):
    """Escapes what a terminal would obey, because file and patch names come from strangers."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        return printable(super().format(record))


class OneLine(logging.Formatter):
    """Folds a message, and the exception that it reports, into one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; it has the type and text of an exception, not the traceback."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {error}"
        return printable(" ".join(text.split()))


class Once(logging.Filter):
    """Drops messages that were shown already."""

    def __init__(self) -> None:
        """Starts without any message."""
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record's message is new."""
        text = record.getMessage()
        is_new = text not in self._said
        self._said.add(text)
        return is_new
