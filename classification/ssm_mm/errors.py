"""The one exception that means "the user can fix this"."""


class UsageError(Exception):
    """What is wrong, the offending value and the way out, in one line. The tools print it without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
