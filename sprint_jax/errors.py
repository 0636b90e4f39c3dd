"""The one exception whose message is meant for the person at the keyboard."""

_MOST, _END = 1000, 300  # characters


class UserError(Exception):
    """Bad input.

    The message is one line: what is wrong, with its name and value, and the remedy. Of a longer
    one, which quotes what a damaged file holds, the beginning and the end are kept.
    """

    def __init__(self, message: str):
        if len(message) > _MOST:
            message = f"{message[: _MOST - _END]} ... {message[-_END:]}"
        super().__init__(message)
