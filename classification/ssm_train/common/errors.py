"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """What is wrong, the offending value and the way out, in one line. `main` prints it without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
