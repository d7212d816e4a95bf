"""What the program says on stderr: its own lines, and of its libraries what warns."""

import logging

from absl import logging as absl_logging

from bef_jax.errors import printable


def set_up() -> None:
    """Lets the project speak, and its libraries warn: each warning once, as one line.

    Of Orbax, which is chatty and speaks through absl, errors alone are shown.
    """
    log = logging.getLogger("bef_jax")
    handler = logging.StreamHandler()
    handler.setFormatter(Printable())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    # The root logger's handler below would say every line again.
    log.propagate = False
    _set_up_libraries(logging.getLogger())


def _set_up_libraries(root: logging.Logger) -> None:
    # absl's own handler prints tracebacks, and a prefix that says nothing to a user.
    root.removeHandler(absl_logging.get_absl_handler())
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    handler.addFilter(Once())
    handler.setLevel(logging.WARNING)
    root.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Of a damaged picture our own line says what they say in several.
    for library in ("tifffile", "PIL"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


class Printable(logging.Formatter):
    """Escapes what a terminal would obey: names of files and patches come from strangers."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        return printable(super().format(record))


class OneLine(logging.Formatter):
    """Folds a message, and the exception that it reports, into one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; of an exception its last words, not the traceback."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            error = record.exc_info[1]
            text += f": {type(error).__name__}: {error}"
        return printable(" ".join(text.split()))


class Once(logging.Filter):
    """Drops what has been said already."""

    def __init__(self) -> None:
        """Starts with nothing said."""
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is new."""
        text = record.getMessage()
        is_new = text not in self._said
        self._said.add(text)
        return is_new
