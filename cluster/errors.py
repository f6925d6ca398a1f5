"""What is wrong with a submission, in one line."""

from cluster.credentials import hidden


class SubmitError(Exception):
    """A command could not be submitted or followed; `str(error)` is one line that names the value and the remedy, and
    no credentials.

    Attributes
    ----------
    code
        The exit code: 2 for bad usage, 1 for anything else.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(hidden(" ".join(message.split())))
        self.code = code


class Unreachable(SubmitError):
    """The cluster does not answer, or not as it should: it may do so later."""


def last_line(text: str) -> str:
    """The last line of a text that says something, as the reason that Ray gives."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    return lines[-1] if lines else "no reason given"
