"""The errors users meet: one line that says what is wrong, where, and what to do."""


class ZoError(Exception):
    """Something failed while running; the command line exits with 1.

    Args:
        message: line breaks in it, as libraries like them, are taken out.
    """

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(" ".join(line.strip() for line in message.splitlines()))


class UsageError(ZoError):
    """The input or the command is wrong (files, fields, flags); the command line exits with 2."""

    exit_code = 2


class Interrupted(ZoError):
    """The user stopped a run; the command line exits with 130, as shells do for Ctrl-C."""

    exit_code = 130
