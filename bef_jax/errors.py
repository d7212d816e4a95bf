"""The errors that a user reads as one line, and hints for their texts."""

import difflib
from collections.abc import Iterable, Sequence

_LISTED = 20  # texts in a line, because another network's tensors are wrong by the hundred


class UserError(ValueError):
    """A user's mistake; its text is one line that names the field or file, and how to fix it.

    `main` prints it without a traceback and exits with status 2. Its text is final, but it
    is a ValueError. So `except UserError: raise` stands before an `except` that would wrap it.
    """

    def __init__(self, text: str) -> None:
        """Takes the line, and escapes what is not printable, so that it stays one line."""
        super().__init__(printable(text))


class RunError(Exception):
    """A failure that is not the user's mistake; its text is one line that says what failed."""

    def __init__(self, text: str) -> None:
        """Takes the line, as `UserError` does."""
        super().__init__(printable(text))


class DivergedError(FloatingPointError):
    """A loss or a score that is not finite; `main` prints its line and exits with status 1.

    Attributes:
        last_good: the last step whose state is known to have had a finite loss. A state that was
            saved later may be bad.
    """

    def __init__(self, text: str, last_good: int) -> None:
        """Takes the line, as `UserError` does, and the step."""
        super().__init__(printable(text))
        self.last_good = last_good


def printable(text: str) -> str:
    """Returns `text` with all characters escaped that are not printable, such as a newline.

    Names of files, tensors and patches come from strangers. A newline in one would make two lines
    of an error, and a terminal would obey an escape sequence.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Returns the whole text of an error on one line, without what a terminal would obey."""
    # The text of a KeyError is the repr of its argument.
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return printable(" ".join(text.split()))


def reason_of(error: BaseException) -> str:
    """Returns the first line of an error's text; a system error's text is without the file."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def install_command(extra: str) -> str:
    """Returns how to install what an extra of the package has, such as "cuda"."""
    return f'pip install "bef_jax[{extra}]", or, in a checkout, pip install -e ".[{extra}]"'


def listed(texts: Sequence[str]) -> str:
    """Returns the first 20 texts as one line, and how many more there are."""
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns "; did you mean ...?" with `prefix` and the nearest known word, or "" without one.

    For a dotted name, its last part is enough, or the initials of that part: tta is near eval.tta,
    and optim.lr is near optim.learning_rate.
    """
    known = list(known)
    group, _, last = word.rpartition(".")
    same = [name for name in known if name.startswith(group) and last in _short_forms(name)]
    near = same or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _short_forms(name: str) -> tuple[str, str]:
    last = name.rpartition(".")[2]
    return last, "".join(part[:1] for part in last.split("_"))
