"""The one kind of error that a person can mend."""


class UserError(ValueError):
    """Something a person gave that cannot be used.

    message: what was given and what was expected, in one line.
    hint: what to do about it.

    The command line prints it in one line and exits 2. A package that wants a class of its own derives from this one,
    and from the built-in that callers would catch where there is one: `class PriorMissingError(UserError, KeyError)`.
    """

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = " ".join(self.message.split())
        return f"{text}; {' '.join(self.hint.split())}" if self.hint else text
