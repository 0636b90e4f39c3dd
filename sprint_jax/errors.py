"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad input.

    The message is one line: what is wrong, with its name and value, and the remedy.
    """
