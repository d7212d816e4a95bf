"""The one exception that a user should read."""


class UserError(ValueError):
    """A user's mistake: its text is one line that names the field or file, and the mend.

    `main` prints it without a traceback and exits with status 2.
    """


class RunError(Exception):
    """Something failed that is no mistake of the user's; its text is one line that says what."""
