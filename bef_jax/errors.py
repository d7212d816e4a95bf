"""The one exception that a user should read."""


class UserError(ValueError):
    """A user's mistake: its text is one line that names the field or file, and the mend.

    `main` prints it without a traceback and exits with status 2.
    """


class RunError(Exception):
    """A run in a process of its own failed; the message is one line that names its log."""
