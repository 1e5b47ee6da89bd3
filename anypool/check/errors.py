"""What can be wrong with what a user asks `anypool check`. All are `ValueError`s: exit code 2 at the command line."""


class CheckError(ValueError):
    """A question that makes no sense; the message names the option, its value and what to write instead."""


class CompilerMissingError(CheckError):
    """A compiler that is not installed; the message says how to install it."""
