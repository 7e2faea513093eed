"""The one exception that means "the user can fix this"."""

from ssm_models.printable import printable


class UserError(Exception):
    """What is wrong, the offending value and the way out, in one printable line. `main` prints it without a
    traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))
