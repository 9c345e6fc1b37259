"""The one exception that means "you asked for something that cannot work"."""


class UserError(ValueError):
    """A mistake in what the user gave: says what was given, what was expected and what to do.

    Launchers print it on one line and exit with status 2; anything else is a bug and keeps its traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
